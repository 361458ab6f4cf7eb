"""What `headrace check` shows a person: its report as tables on standard output."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_report(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    _print_model(console, report)
    _print_memory(console, report)
    _print_attention(console, report["attention"])


def _print_model(console: Console, report: dict[str, Any]) -> None:
    model, device = report["model"], report["device"]
    console.print(f"[bold]{model['architecture']}[/] {escape(model['folder'])}")
    layers = ", ".join(
        f"{len(group['layer_ids'])} layers, {group['num_heads']} heads over {group['num_kv_heads']} KV heads of"
        f" {group['head_dim']}"
        for group in report["kv_groups"]
    )
    console.print(f"{report['memory']['num_parameters']:,} parameters, {layers}, vocabulary {model['vocab_size']:,}")
    for kind in report["experts"]:
        picked = f"{kind['num_per_token']} of {kind['num_experts']} per token, {kind['intermediate_size']:,} wide"
        console.print(f"experts: {picked}, in {kind['num_layers']} layers")
    ends = zip(model["eos_token_ids"], model["eos_sources"], strict=True)
    console.print("ends: " + (", ".join(f"{token} ({escape(source)})" for token, source in ends) or "no id"))
    if device is not None:
        major, minor = device["capability"]
        console.print(
            f"{escape(device['name'])}, compute capability {major}.{minor}, {device['num_multiprocessors']}"
            f" multiprocessors, {_size(device['total_bytes'])}"
        )
    why = {name: text for name, _, text in report["explanations"]}
    settings = Table("setting", "value", "why", box=box.SIMPLE)
    for name, value in report["settings"].items():
        settings.add_row(name, escape(str(value)), escape(why.get(name, "")))
    console.print(settings)


def _print_memory(console: Console, report: dict[str, Any]) -> None:
    memory = report["memory"]
    has_devices = report["device"] is not None and report["settings"]["tp_size"] * report["settings"]["pp_size"] > 1
    plan = Table("memory of each device" if has_devices else "memory", "size", box=box.SIMPLE)
    for name in ("weights", "kv_pool", "workspace", "total", "available"):
        plan.add_row(name.replace("_", " "), _size(memory[name]))
    console.print(plan)
    note = " (an estimate: the core measures it when it starts)" if memory["kv_is_estimate"] else ""
    console.print(f"KV pool: {memory['kv_pages']:,} pages, {memory['kv_tokens']:,} tokens{note}")
    if not memory["fits"]:
        console.print("[bold red]This is more memory than there is.[/]")


def _print_attention(console: Console, attention: dict[str, Any]) -> None:
    backends = Table("attention backend", "", box=box.SIMPLE)
    for name in (*attention["available"], *attention["refused"]):
        state = "chosen" if name == attention["chosen"] else "available"
        why_not = attention["refused"].get(name)
        backends.add_row(name, escape(f"refused: {why_not}") if why_not else state)
    console.print(backends)
    if attention["choices"]:
        choices = Table("queries", "rows", "kernel of auto", "why", box=box.SIMPLE)
        for choice in attention["choices"]:
            choices.add_row(*map(escape, choice))
        console.print(choices)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.1f} MiB"
