"""`headrace check`: say how a model would run here, without running it.

Owns what is reported: the settings as resolved, with why; the device; the memory plan; the attention backends, why each
of the others is refused, and which kernel serves which shape. It refuses what a start would refuse, by the same
functions, but answers for a checkpoint whose weights are not there yet; of those that are it reads the headers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig, ResolvedConfig, Software
from headrace.config.devices import installed_software
from headrace.config.layer_spec import ExpertsSpec
from headrace.config.machine import available_memory
from headrace.config.resolve import backend_refusal
from headrace.types.errors import ConfigError
from headrace.types.weights import ELEMENT_BYTES
from headrace.weights import Shard
from headrace.weights.saved import check_saved_model
from headrace.weights.weight_map import WeightMap

_LOGITS_BYTES = 4
_CPU_LOGITS_COPIES = 3
_CUDA_LOGITS_COPIES = 2
_GATHERED_COPIES = 2
"""What ranks have of each row beside these: what came from all of them, and it side by side."""

_COUNT_BYTES = 2
_WEIGHT_FILES = ("model*.safetensors*", "pytorch_model*.bin*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--digests", action="store_true", help="hold a folder that was saved against its digests")
    add_flags(parser, EngineConfig, title="engine settings", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Raises `ConfigError` when the attention backend cannot run the model or memory does not hold
    it."""
    from headrace.engine.core_host import CONFIG_FILES, load_tokenizer, resolve_settings, with_tokenizer
    from headrace.runner.loading import checked_weight_map

    config = EngineConfig.from_dict({"model": arguments.model, **given(arguments, EngineConfig)})
    if arguments.digests:
        check_saved_model(config.model)
    resolved = resolve_settings(config, files=CONFIG_FILES)
    if os.path.isdir(os.path.expanduser(config.model)):  # of a hub id only configurations are had
        if any(next(Path(resolved.folder).glob(pattern), None) for pattern in _WEIGHT_FILES):
            checked_weight_map(resolved)
        resolved = with_tokenizer(resolved, load_tokenizer(config, resolved.folder))
    report = build_report(resolved)
    if arguments.json:
        print(json.dumps(report))
    else:
        from headrace.cli.check_report import print_report

        print_report(report)
    chosen, refused = report["attention"]["chosen"], report["attention"]["refused"]
    if chosen in refused:
        raise ConfigError(f"attention backend {chosen!r} {refused[chosen]}", field="attention_backend")
    if not report["memory"]["fits"]:
        raise ConfigError("the memory plan is more than there is; lower kv_pool_tokens", field="kv_pool_tokens")
    return 0


def build_report(resolved: ResolvedConfig, software: Software | None = None) -> dict[str, Any]:
    """The report as JSON-like values. Sizes are bytes; a pool that is not measured yet has None tokens.

    `software` is what is installed here unless given.
    """
    settings = msgspec.to_builtins(resolved.engine)
    for name in ("device", "dtype", "kv_dtype", "context_length", "num_threads", "attention_backend"):
        settings[name] = getattr(resolved, name)
    settings["kv_pool_tokens"] = resolved.max_total_num_tokens or None
    experts = Counter(layer.mlp for layer in resolved.model.layers if isinstance(layer.mlp, ExpertsSpec))
    return {
        "model": {"folder": resolved.folder, **msgspec.to_builtins(resolved.model)},
        "kv_groups": msgspec.to_builtins(resolved.model.kv_groups),
        "experts": [{"num_layers": count, **msgspec.to_builtins(kind)} for kind, count in experts.items()],
        "device": None if resolved.cuda is None else msgspec.to_builtins(resolved.cuda),
        "settings": settings,
        "explanations": [list(entry) for entry in resolved.explanations],
        "memory": _memory_plan(resolved),
        "attention": _attention(resolved, installed_software() if software is None else software),
    }


def _attention(resolved: ResolvedConfig, software: Software) -> dict[str, Any]:
    """The chosen backend, the possible ones, why others are refused; on cuda also what "auto" runs, by queries."""
    from headrace import attention

    refused: dict[str, str] = {}
    for group in resolved.model.kv_groups:
        refused |= attention.refusals(
            device=resolved.device,
            dtype=resolved.dtype,
            numerics=resolved.engine.numerics,
            page_size=resolved.engine.page_size,
            head_dim=group.head_dim,
        )
    for name in attention.CAPABILITIES:
        missing = backend_refusal(name, resolved.model, resolved.device, software)
        if missing is not None:
            refused.setdefault(name, missing)
    choices = getattr(attention, "CHOICES", ()) if resolved.device == "cuda" else ()
    return {
        "chosen": resolved.attention_backend,
        "available": [name for name in attention.CAPABILITIES if name not in refused],
        "refused": refused,
        "choices": [list(choice) for choice in choices],
    }


def _memory_plan(resolved: ResolvedConfig) -> dict[str, int | bool]:
    """Bytes of weights and KV as they will be allocated; the workspace is an upper estimate of one step's tensors. Of
    several ranks all together on a CPU; of one, of devices, which have one each.

    Where the pool is measured at start, its share of the device's memory is an estimate: others may use the device,
    and graphs take some.
    """
    from headrace.models import weight_map

    num_ranks, num_stages, is_shared = resolved.engine.tp_size, resolved.engine.pp_size, resolved.cuda is None
    tables = [weight_map(resolved.model, Shard(0, num_ranks, stage, num_stages)) for stage in range(num_stages)]
    num_parameters = sum(math.prod(rule.shape) for rule in tables[0].rules_by_name.values())
    sizes = [_weight_bytes(table, resolved.dtype) for table in tables]
    weights = num_ranks * sum(sizes) if is_shared else max(sizes)
    workspace = _workspace(resolved) * (resolved.num_ranks if is_shared else 1)
    available = available_memory() if resolved.cuda is None else resolved.cuda.total_bytes
    page_size = resolved.engine.page_size
    num_pages, is_estimate = resolved.num_pages, resolved.num_pages == 0
    page_bytes = page_size * (resolved.host_bytes_per_token if is_shared else resolved.kv_bytes_per_token)
    if is_estimate:
        room = int(available * resolved.engine.memory_fraction) - weights - workspace
        num_pages = max(0, room // page_bytes)
    kv_pool, total = num_pages * page_bytes, weights + num_pages * page_bytes + workspace
    kv_pages = max(0, num_pages - 1)  # page 0 is nobody's
    return {
        "num_parameters": num_parameters,
        "weights": weights,
        "kv_pool": kv_pool,
        "kv_pages": kv_pages,
        "kv_tokens": kv_pages * page_size,
        "kv_is_estimate": is_estimate,
        "workspace": workspace,
        "total": total,
        "available": available,
        "fits": kv_pages > 0 and total <= available,
    }


def _weight_bytes(table: WeightMap, dtype: str) -> int:
    return sum(math.prod(each.shape) * ELEMENT_BYTES[each.dtype or dtype] for each in table.params.values())


def _workspace(resolved: ResolvedConfig) -> int:
    """Float32 logits of every row, the widest activations of a full step and, on a device, int16 counts of tokens."""
    engine, model = resolved.engine, resolved.share
    qkv_width = max((group.num_heads + 2 * group.num_kv_heads) * group.head_dim for group in model.kv_groups)
    width = max(layer.mlp.widest(model.hidden_size) for layer in model.layers) + model.hidden_size + qkv_width
    activations = engine.max_step_tokens * width * ELEMENT_BYTES[resolved.dtype]
    copies = _GATHERED_COPIES if engine.tp_size > 1 else 0
    if resolved.device == "cuda":
        logits = engine.max_running_requests * model.vocab_size * _LOGITS_BYTES * (_CUDA_LOGITS_COPIES + copies)
        return logits + engine.max_running_requests * model.vocab_size * _COUNT_BYTES + activations
    rows = min(engine.max_running_requests, engine.max_step_tokens)
    return rows * model.vocab_size * _LOGITS_BYTES * (_CPU_LOGITS_COPIES + copies) + activations
