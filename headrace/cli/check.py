"""`headrace check`: say how a model would run here, without running it.

Owns the report: the settings as resolved, with why; the memory plan; the attention backends, and why each of the others
is refused. Reads `config.json` only, so it answers for a checkpoint whose weights are not there yet.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig, ModelSpec, ResolvedConfig
from headrace.config.resolve import ELEMENT_SIZES, available_memory

_LOGITS_BYTES = 4
_WORKSPACE_COPIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `headrace check`."""
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, EngineConfig, title="engine settings", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 2 when no attention backend can run the model."""
    from headrace.engine.launch import resolve_settings

    config = EngineConfig.from_dict({"model": arguments.model, **given(arguments, EngineConfig)})
    report = build_report(resolve_settings(config))
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_report(report)
    return 2 if report["attention"]["chosen"] in report["attention"]["refused"] else 0


def build_report(resolved: ResolvedConfig) -> dict[str, Any]:
    """The report as JSON-like values. Sizes are bytes."""
    from headrace.attention import CAPABILITIES, refusals

    refused = refusals(
        device=resolved.device,
        dtype=resolved.dtype,
        numerics=resolved.engine.numerics,
        page_size=resolved.engine.page_size,
        head_dim=resolved.model.head_dim,
    )
    settings = msgspec.to_builtins(resolved.engine)
    for name in ("device", "dtype", "context_length", "num_threads", "attention_backend"):
        settings[name] = getattr(resolved, name)
    settings["kv_pool_tokens"] = resolved.max_total_num_tokens
    return {
        "model": {"folder": resolved.folder, **msgspec.to_builtins(resolved.model)},
        "settings": settings,
        "explanations": [list(entry) for entry in resolved.explanations],
        "memory": _memory_plan(resolved),
        "attention": {
            "chosen": resolved.attention_backend,
            "available": [name for name in CAPABILITIES if name not in refused],
            "refused": refused,
        },
    }


def _memory_plan(resolved: ResolvedConfig) -> dict[str, int]:
    """Bytes of weights and KV as they will be allocated; the workspace is an upper estimate of one step's tensors."""
    from headrace.models import weight_map

    model, engine = resolved.model, resolved.engine
    element_size = ELEMENT_SIZES[resolved.dtype]
    num_parameters = sum(math.prod(param.shape) for param in weight_map(model).params.values())
    kv_pool = resolved.num_pages * engine.page_size * model.kv_bytes_per_token(element_size)
    workspace = _workspace(model, resolved, element_size)
    return {
        "num_parameters": num_parameters,
        "weights": num_parameters * element_size,
        "kv_pool": kv_pool,
        "kv_pages": resolved.num_pages - 1,
        "workspace": workspace,
        "total": num_parameters * element_size + kv_pool + workspace,
        "available": available_memory(),
    }


def _workspace(model: ModelSpec, resolved: ResolvedConfig, element_size: int) -> int:
    """Float32 logits of every row, and the widest activations of a full step."""
    engine = resolved.engine
    rows = min(engine.max_running_requests, engine.max_num_batched_tokens)
    qkv_width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    width = 2 * model.intermediate_size + model.hidden_size + qkv_width
    logits = rows * model.vocab_size * _LOGITS_BYTES * _WORKSPACE_COPIES
    return logits + engine.max_num_batched_tokens * width * element_size


def _print_report(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    model, memory, attention = report["model"], report["memory"], report["attention"]
    console.print(f"[bold]{model['architecture']}[/] {escape(model['folder'])}")
    console.print(
        f"{memory['num_parameters']:,} parameters, {model['num_layers']} layers, {model['num_heads']} heads over"
        f" {model['num_kv_heads']} KV heads of {model['head_dim']}, vocabulary {model['vocab_size']:,}"
    )
    why = {name: text for name, _, text in report["explanations"]}
    settings = Table("setting", "value", "why", box=box.SIMPLE)
    for name, value in report["settings"].items():
        settings.add_row(name, escape(str(value)), escape(why.get(name, "")))
    console.print(settings)
    plan = Table("memory", "size", box=box.SIMPLE)
    for name in ("weights", "kv_pool", "workspace", "total", "available"):
        plan.add_row(name.replace("_", " "), _size(memory[name]))
    console.print(plan)
    console.print(f"KV pool: {memory['kv_pages']:,} pages, {report['settings']['kv_pool_tokens']:,} tokens")
    if memory["total"] > memory["available"]:
        console.print("[bold red]This is more memory than there is.[/]")
    backends = Table("attention backend", "", box=box.SIMPLE)
    for name in (*attention["available"], *attention["refused"]):
        state = "chosen" if name == attention["chosen"] else "available"
        why_not = attention["refused"].get(name)
        backends.add_row(name, escape(f"refused: {why_not}") if why_not else state)
    console.print(backends)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.1f} MiB"
