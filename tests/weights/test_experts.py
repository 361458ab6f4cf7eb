"""Experts in both name worlds, a router in float32, what is derived: loads, updates, reading, digests, on any mesh."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from headrace.types.errors import CheckpointError, InternalError, WeightUpdateError
from headrace.types.weights import UpdateMode
from headrace.weights import Box, Derived, ParamSpec, Piece, Shard, WeightMap, WeightRule, whole_rows
from headrace.weights.experts import ExpertTensors
from headrace.weights.position_sum import add_digests
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import prove_mesh
from tests.weights.tiny import Tensors, live_bits, make_store, manifest_of, update

EXPERTS, HIDDEN, WIDTH = 6, 5, 4
ROUTER = "mlp.gate.weight"


BOXES = (Box((0, 0), (2, 3)), Box((2, 0), (2, 3)))
TWO = tuple(Piece(param, box, BOXES[0]) for param, box in zip("qs", BOXES, strict=True))


def row_sums(values: torch.Tensor) -> torch.Tensor:
    return values.sum(1)


def make_map(*, is_transposed: bool = False, experts: Shard | None = None, width: Shard | None = None) -> WeightMap:
    tensors = ExpertTensors("mlp.experts", "gate_up", "down", EXPERTS, HIDDEN, WIDTH)
    tensors = msgspec.structs.replace(tensors, experts=experts or Shard(), width=width or Shard())
    is_counted = not any(shard and shard.rank for shard in (experts, width))
    num_holders = math.prod(shard.num_ranks for shard in (experts, width) if shard)
    whole = Box.whole((EXPERTS, HIDDEN))
    router = WeightRule(ROUTER, whole.shape, (Piece("router", whole, whole, (), is_counted, num_holders),))
    return WeightMap(
        [ParamSpec("router", (EXPERTS, HIDDEN), "float32"), *tensors.params()],
        [router, *tensors.one_by_one()],
        other_names=tensors.all_in_one(is_transposed=is_transposed),
        derived=[Derived(ParamSpec("sums", (EXPERTS,), "float32"), ("router",), row_sums)],
        is_shard=experts is not None or width is not None,
    )


def make_worlds(seed: int, *, is_transposed: bool = False) -> tuple[Tensors, Tensors]:
    """The same weights, one tensor per expert, and one for all."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator) for _ in range(2))
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator)
    single = {ROUTER: router}
    for expert in range(EXPERTS):
        for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            single[f"mlp.experts.{expert}.{name}.weight"] = tensor[expert]
    fused = {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    if is_transposed:
        fused = {name: tensor.transpose(1, 2).contiguous() for name, tensor in fused.items()}
    return single, {ROUTER: router, **fused}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("raw", [True, False])
def test_both_name_worlds_fill_the_same_memory(is_transposed: bool, mode: UpdateMode, raw: bool) -> None:
    """A -> B -> A -> B, each in another world than the last, with the bits of cold loads."""
    weight_map = make_map(is_transposed=is_transposed)
    worlds = [make_worlds(seed, is_transposed=is_transposed) for seed in (1, 2)]
    bits = [live_bits(make_store(weight_map, single, torch.bfloat16)) for single, _ in worlds]
    digests = [make_store(weight_map, single, torch.bfloat16).digest() for single, _ in worlds]
    assert bits[0] == live_bits(make_store(weight_map, worlds[0][1], torch.bfloat16)) != bits[1]
    store = make_store(weight_map, worlds[0][0], torch.bfloat16)
    addresses = {name: tensor.data_ptr() for name, tensor in store.live.items()}
    for step in (1, 0, 1, 0, 1):
        update(store, worlds[step][step], mode, raw=raw)
        assert live_bits(store) == bits[step] and store.digest() == digests[step]
        assert torch.equal(store.live["sums"], worlds[step][0][ROUTER].sum(1))
        for name, tensor in (worlds[step][0] | worlds[step][1]).items():
            assert torch.equal(store.read(name), tensor.to(store.read(name).dtype)), name
    assert {name: tensor.data_ptr() for name, tensor in store.live.items()} == addresses
    assert store.live["router"].dtype == torch.float32 and store.info(ROUTER).dtype == "float32"
    assert torch.equal(store.read(ROUTER), worlds[1][0][ROUTER])  # not rounded to the engine's dtype on its way


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_worlds_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """What it saves, and what its modules hold, of one layer."""
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(**sizes, num_key_value_heads=1, moe_intermediate_size=12, num_experts=4)
        below, projections = "mlp", ("gate_proj", "up_proj", "down_proj")
    else:
        config = MixtralConfig(**sizes, num_key_value_heads=1, intermediate_size=12, num_local_experts=4)
        below, projections = "block_sparse_moe", ("w1", "w3", "w2")
    prefix, whole = f"model.layers.0.{below}", "model.layers.0.mlp"
    tensors = ExpertTensors(
        f"{prefix}.experts", "up", "down", 4, 16, 12, whole_prefix=f"{whole}.experts", projections=projections
    )
    router = [whole_rows(f"{name}.gate.weight", "router", 0, (4, 16)) for name in dict.fromkeys((prefix, whole))]
    weight_map = WeightMap(
        [ParamSpec("router", (4, 16), "float32"), *tensors.params()],
        [router[0], *tensors.one_by_one()],
        other_names=[*router[1:], *tensors.all_in_one()],
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    saved = {name: each for name, each in load_file(tmp_path / "model.safetensors").items() if f".{below}." in name}
    held = {name: each for name, each in model.state_dict().items() if ".mlp." in name}
    assert saved.keys() == weight_map.rules_by_name.keys() and saved.keys() & held.keys() <= {router[0].hf_name}
    assert live_bits(make_store(weight_map, saved)) == live_bits(make_store(weight_map, held))


def test_a_manifest_of_both_worlds_or_of_a_part_of_one_is_refused() -> None:
    weight_map = make_map()
    single, fused = make_worlds(1)
    down = "mlp.experts.down_proj"
    mixed = {name: tensor for name, tensor in single.items() if "down_proj" not in name} | {down: fused[down]}
    weight_map.check_manifest(manifest_of(mixed), False)  # each parameter is filled once
    store = make_store(weight_map, mixed)
    assert live_bits(store) == live_bits(make_store(weight_map, single))
    twice = single | {down: fused[down]}
    for partial in (False, True):
        with pytest.raises(WeightUpdateError, match="down_proj.weight is sent under another name too"):
            weight_map.check_manifest(manifest_of(twice), partial)
    with pytest.raises(CheckpointError, match="is sent under another name too"):
        make_store(weight_map, twice)
    without = {name: tensor for name, tensor in fused.items() if name != down}
    with pytest.raises(WeightUpdateError, match=r"experts\.0\.down_proj\.weight is missing"):
        weight_map.check_manifest(manifest_of(without), False)
    del mixed["mlp.experts.3.up_proj.weight"]
    with pytest.raises(WeightUpdateError, match=r"experts\.3\.up_proj\.weight is missing") as caught:
        weight_map.check_manifest(manifest_of(mixed), False)
    assert ";" not in caught.value.message
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        make_store(weight_map, mixed)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("axis", ["experts", "width"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_ranks_share_experts_or_their_columns(num_ranks: int, axis: str, is_transposed: bool) -> None:
    if axis == "width" and num_ranks == 3:
        num_ranks = 8  # two ranks hold each column
    maps = [make_map(is_transposed=is_transposed, **{axis: Shard(rank, num_ranks)}) for rank in range(num_ranks)]
    prove_mesh(maps)
    single, fused = make_worlds(3, is_transposed=is_transposed)
    expected = make_store(make_map(), single).digest()
    stores = []
    for table in maps:
        first, second = (WeightStore(table, torch.float32, torch.device("cpu")) for _ in range(2))
        first.load(single.items())
        second.load(fused.items())
        assert live_bits(first) == live_bits(second)
        stores.append(first)
    digests = [store.digest() for store in stores]
    assert {name: add_digests(*(found[name] for found in digests)) for name in expected} == expected
    with pytest.raises(InternalError):
        prove_mesh(maps[:-1] if axis == "experts" or num_ranks == 2 else maps[:-2])


def test_what_is_derived_follows_every_change() -> None:
    weight_map = make_map()
    store = make_store(weight_map)
    sums = store.live["sums"]

    def is_right() -> bool:
        return torch.equal(sums, store.live["router"].sum(1)) and store.live["sums"] is sums

    store.fill_random(1)
    assert is_right()
    store.scramble(2)
    assert is_right()
    store.load(make_worlds(1)[0].items())
    assert is_right()
    before = sums.clone()
    router = {ROUTER: make_worlds(2)[0][ROUTER]}
    for mode in ("shadow", "inplace"):
        store.begin(manifest_of(router), mode, True)
        assert store.stage(0, router[ROUTER] + (mode == "inplace")).advance(1.0)
        assert torch.equal(sums, before)
        store.commit()
        assert is_right() and not torch.equal(sums, before)
        before = sums.clone()
    assert "sums" not in store.digest()


@pytest.mark.parametrize(
    ("derived", "named"),
    [
        ([Derived(ParamSpec("p", (2,)), ("p",), row_sums)], "p is declared twice"),
        ([Derived(ParamSpec("q", (2,)), ("r",), row_sums)], "q is derived from what comes later or never"),
        ([Derived(ParamSpec("q", (2,)), ("q",), row_sums)], "q is derived from what comes later or never"),
    ],
)
def test_a_derived_parameter_that_cannot_be_is_refused(derived: list[Derived], named: str) -> None:
    with pytest.raises(InternalError, match=named):
        WeightMap([ParamSpec("p", (2, 3))], [whole_rows("a", "p", 0, (2, 3))], derived=derived)


def test_a_function_of_the_wrong_shape_is_our_own_bug() -> None:
    derived = [Derived(ParamSpec("q", (7,)), ("p",), row_sums)]
    weight_map = WeightMap([ParamSpec("p", (2, 3))], [whole_rows("a", "p", 0, (2, 3))], derived=derived)
    with pytest.raises(InternalError, match=r"q is derived with shape \(2,\)"):
        make_store(weight_map, {"a": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([whole_rows("b", "p", 0, (2, 3))], "6 elements are not covered"),
        ([whole_rows("a", "p", 0, (4, 3))], "a has two rules"),
        ([whole_rows("b", "r", 0, (4, 3))], "other names fill what is no parameter"),
        ([whole_rows("b", "q", 0, (2, 3))], "tensor both has other names for a part of it"),
        ([whole_rows("b", "q", 0, (2, 3)), whole_rows("c", "s", 0, (2, 3))], "both has other names for a part of it"),
        ([WeightRule("b", (4, 3), TWO)], "b is another name for several parameters"),
    ],
)
def test_other_names_are_proved_too(others: list[WeightRule], named: str) -> None:
    params = [ParamSpec("p", (4, 3)), ParamSpec("q", (2, 3)), ParamSpec("s", (2, 3))]
    with pytest.raises(InternalError, match=named):
        WeightMap(params, [whole_rows("a", "p", 0, (4, 3)), WeightRule("both", (4, 3), TWO)], other_names=others)
