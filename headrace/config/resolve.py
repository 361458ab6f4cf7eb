"""Every "auto" is decided here, once, and explained. Owns `ResolvedConfig`; reads the machine, never torch."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from headrace.config.engine_config import EngineConfig
from headrace.config.model_spec import ModelSpec
from headrace.types.errors import ConfigError

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_POOL_BYTES = 2 << 30
CPU_KV_POOL_FRACTION = 0.25
_GENEROUS_POOL_TOKENS = 1 << 22


class ResolvedConfig(msgspec.Struct, frozen=True):
    """An `EngineConfig` with nothing left open. `num_pages` includes page 0, which is never given to a sequence.

    `explanations` are (setting, value, why) for each setting that was "auto" or was cut.
    """

    engine: EngineConfig
    model: ModelSpec
    folder: str
    device: str
    dtype: str
    context_length: int
    num_pages: int
    num_threads: int
    attention_backend: str
    explanations: tuple[tuple[str, str, str], ...]

    @property
    def max_total_num_tokens(self) -> int:
        """Tokens the KV pool can hold."""
        return (self.num_pages - 1) * self.engine.page_size

    @property
    def max_columns(self) -> int:
        """Page-table columns per slot."""
        return -(-self.context_length // self.engine.page_size)


def resolve(config: EngineConfig, folder: Path) -> ResolvedConfig:
    """Decide every open setting of `config` for the checkpoint in `folder`.

    Raises `ConfigError`, `CheckpointError` or `UnsupportedModelError` naming the setting or file.
    """
    why: list[tuple[str, str, str]] = []
    model = ModelSpec.from_folder(folder)
    device = _device(config, why)
    dtype = _dtype(config, why)
    context_length = _context_length(config, model, why)
    num_threads = _num_threads(config, why)
    num_pages = _num_pages(config, model, dtype, context_length, why)
    backend = config.attention_backend
    if backend == "auto":
        backend = "cpu"
        why.append(("attention_backend", backend, "the batched CPU kernels; reference is the slow oracle"))
    return ResolvedConfig(
        config, model, str(folder), device, dtype, context_length, num_pages, num_threads, backend, tuple(why)
    )


def available_memory() -> int:
    """Bytes this process may still take: the cgroup's remainder or the machine's free memory, whichever is less."""
    amounts = [_meminfo_available()]
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound = Path("/sys/fs/cgroup", limit).read_text().strip()
            used = Path("/sys/fs/cgroup", usage).read_text().strip()
        except OSError:
            continue
        if bound.isdigit():
            amounts.append(max(0, int(bound) - int(used)))
    return min(amounts)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _device(config: EngineConfig, why: list[tuple[str, str, str]]) -> str:
    if config.device == "cuda":
        raise ConfigError("device 'cuda' is not built into this version; use 'cpu'", field="device")
    if config.device == "auto":
        why.append(("device", "cpu", "the only device this version runs on"))
    return "cpu"


def _dtype(config: EngineConfig, why: list[tuple[str, str, str]]) -> str:
    if config.dtype != "auto":
        return config.dtype
    why.append(("dtype", "float32", "CPU kernels are fastest and exact in float32"))
    return "float32"


def _context_length(config: EngineConfig, model: ModelSpec, why: list[tuple[str, str, str]]) -> int:
    limit = min(model.max_position, model.sliding_window or model.max_position)
    reason = (
        "the sliding window: beyond it attention would differ"
        if limit < model.max_position
        else "max_position_embeddings"
    )
    if config.context_length is None:
        why.append(("context_length", str(limit), reason))
        return limit
    if config.context_length > limit:
        raise ConfigError(
            f"context_length {config.context_length} is over the model's {limit} ({reason})", field="context_length"
        )
    return config.context_length


def _num_threads(config: EngineConfig, why: list[tuple[str, str, str]]) -> int:
    if config.num_threads is not None:
        return config.num_threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        why.append(("num_threads", asked, "OMP_NUM_THREADS"))
        return int(asked)
    why.append(("num_threads", str(available_cores()), "the cores this process may run on"))
    return available_cores()


def _num_pages(
    config: EngineConfig, model: ModelSpec, dtype: str, context_length: int, why: list[tuple[str, str, str]]
) -> int:
    page_bytes = model.kv_bytes_per_token(ELEMENT_SIZES[dtype]) * config.page_size
    if config.kv_pool_tokens is not None:
        num_pages = config.kv_pool_tokens // config.page_size
    else:
        pool_bytes = min(CPU_KV_POOL_BYTES, int(CPU_KV_POOL_FRACTION * available_memory()))
        enough = max(config.max_running_requests * context_length, context_length)
        num_pages = min(pool_bytes // page_bytes, -(-min(enough, _GENEROUS_POOL_TOKENS) // config.page_size))
        why.append(
            (
                "kv_pool_tokens",
                str(num_pages * config.page_size),
                "the least of 2 GiB, 25 % of the memory left, and what the slots could ever hold",
            )
        )
    if num_pages < 1:
        raise ConfigError("the KV pool would hold no page; raise kv_pool_tokens or free memory", field="kv_pool_tokens")
    return num_pages + 1
