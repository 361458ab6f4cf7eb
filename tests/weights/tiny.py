"""A small model's weight map in several layouts, with checkpoints to match."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.types.weights import TensorInfo, UpdateMode
from headrace.weights.staging import dtype_name
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, WeightMap, WeightRule, whole_rows

HIDDEN, HEADS, KV, FFN, VOCAB, LAYERS = 12, 16, 8, 20, 30, 2

Tensors = dict[str, torch.Tensor]


def make_map(*, fused: bool = True, tied: bool = False, bias: bool = True) -> WeightMap:
    """A decoder's names; `fused` puts q, k, v and gate, up into one parameter each, as engines do."""
    params: list[ParamSpec] = []
    rules: list[WeightRule] = []

    def group(param: str, columns: int | None, pieces: Sequence[tuple[str, int]], *, split: bool = False) -> None:
        start = 0
        for name, rows in pieces:
            shape = (rows,) if columns is None else (rows, columns)
            rules.append(whole_rows(name, name if split else param, 0 if split else start, shape))
            if split:
                params.append(ParamSpec(name, shape))
            start += rows
        if not split:
            params.append(ParamSpec(param, (start,) if columns is None else (start, columns)))

    group("embed", HIDDEN, [("model.embed_tokens.weight", VOCAB)])
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        sizes = (("q", HEADS), ("k", KV), ("v", KV))
        group(f"{layer}.qkv", HIDDEN, [(f"{attention}.{p}_proj.weight", n) for p, n in sizes], split=not fused)
        if bias:
            group(f"{layer}.qkv_bias", None, [(f"{attention}.{p}_proj.bias", n) for p, n in sizes], split=not fused)
        gate_up = [(f"{mlp}.{p}_proj.weight", FFN) for p in ("gate", "up")]
        group(f"{layer}.gate_up", HIDDEN, gate_up, split=not fused)
        group(f"{layer}.down", FFN, [(f"{mlp}.down_proj.weight", HIDDEN)])
        group(f"{layer}.norm", None, [(f"model.layers.{layer}.input_layernorm.weight", HIDDEN)])
    group("norm", None, [("model.norm.weight", HIDDEN)])
    if not tied:
        group("lm_head", HIDDEN, [("lm_head.weight", VOCAB)])
    return WeightMap(params, rules, {"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


LAYOUTS = [
    {"fused": fused, "tied": tied, "bias": bias}
    for fused in (False, True)
    for tied in (False, True)
    for bias in (False, True)
]


def make_tensors(weight_map: WeightMap, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rule.shape, generator=generator).to(dtype) for name, rule in weight_map.rules_by_name.items()
    }


def make_store(
    weight_map: WeightMap,
    tensors: Tensors | None = None,
    dtype: torch.dtype = torch.float32,
    memory: int = 1 << 40,
    check_finite: bool = True,
) -> WeightStore:
    store = WeightStore(weight_map, dtype, torch.device("cpu"), memory=lambda: memory, check_finite=check_finite)
    if tensors is not None:
        store.load(tensors.items())
    return store


def manifest_of(tensors: Tensors, digests: dict[str, str] | None = None) -> list[TensorInfo]:
    return [
        TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), (digests or {}).get(name, ""))
        for name, tensor in tensors.items()
    ]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """What arrives through shared memory: the tensor's raw bytes, here read-only and unaligned."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return memoryview(b"\0" + raw)[1:]


def update(
    store: WeightStore, tensors: Tensors, mode: UpdateMode = "shadow", *, partial: bool = False, raw: bool = True
) -> str:
    resolved = store.begin(manifest_of(tensors), mode, partial)
    for index, tensor in enumerate(tensors.values()):
        assert store.stage(index, as_bytes(tensor) if raw else tensor).advance(60.0)
    store.commit()
    return resolved


def live_bits(store: WeightStore) -> dict[str, bytes]:
    return {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in store.live.items()}
