"""Every "auto" is decided here, once, and explained. Owns `ResolvedConfig`; reads the machine, never torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from headrace.config.devices import CudaDevice, Software, cuda_devices, installed_software
from headrace.config.engine_config import EngineConfig, SettledConfig
from headrace.config.model_spec import ModelSpec
from headrace.types.errors import ConfigError, encodable
from headrace.types.plain_values import as_path

Explanation = tuple[str, str, str]

MIN_CAPABILITY = (8, 0)
"""bfloat16 matrix products; what the kernels are written for."""

FP8_CAPABILITY = (8, 9)
"""The first with float8_e4m3fn conversions in hardware, without which Triton has none."""

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
CUDA_THREADS = 4
_SEED_SHIFT = 11
"""A drawn seed has 53 bits, so that readers of JSON that know only doubles keep all of it."""

_CGROUPS = Path("/sys/fs/cgroup")
CPU_KV_POOL_BYTES = 2 << 30
CPU_KV_POOL_FRACTION = 0.25
_GENEROUS_POOL_TOKENS = 1 << 22
_MODEL_DTYPES = ("float32", "bfloat16", "float16")

_SIZES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "cuda": (
        ("max_running_requests", 512, "decode gains from every row up to there"),
        ("overlap_depth", 1, "the next step is decided while the device computes"),
    ),
    "cpu": (
        ("max_running_requests", 256, "plenty to keep a CPU busy"),
        ("overlap_depth", 0, "a step is computed where it is decided: nothing to overlap"),
    ),
}
STEP_TOKENS = 2048
WIDE_HIDDEN_SIZE = 2048
WIDE_PROMPT_TOKENS = 256
_BACKENDS = {
    "cuda": (
        "triton",
        "measured on an H200: 256 rows of 800 tokens in 203 us against FlashInfer's 234, 1 row of 384 in 7.4 us"
        " against 32; rows that share a prompt read it once, which FlashInfer's do not",
    ),
    "cpu": ("cpu", "the batched CPU kernels; reference is the slow oracle"),
}


class Takeover(msgspec.Struct, frozen=True):
    """What a core is told of those before it, which died: it must not be taken for one of them.

    num_deaths    how many there were; its update sessions have ids that none of them gave
    version       the label last seen of their weights
    epoch         greater than any that their replies named
    is_current    the checkpoint that it loads is what was live: no update had been committed, no label changed
    """

    num_deaths: int
    version: str
    epoch: int
    is_current: bool


class ResolvedConfig(msgspec.Struct, frozen=True):
    """An `EngineConfig` with nothing left open. `kv_dtype` is a torch dtype's name; `cuda` describes the device in use.

    `num_pages` includes page 0, which is never given to a sequence; 0 on cuda until the core has measured the pool.
    `explanations` are (setting, value, why) for each setting that was "auto" or was cut. `takeover` is None for an
    engine's first core.
    """

    engine: SettledConfig
    model: ModelSpec
    folder: str
    device: str
    dtype: str
    kv_dtype: str
    context_length: int
    num_pages: int
    num_threads: int
    attention_backend: str
    explanations: tuple[Explanation, ...]
    cuda: CudaDevice | None = None
    takeover: Takeover | None = None

    @property
    def max_total_num_tokens(self) -> int:
        """Tokens the KV pool can hold; 0 while that is not known."""
        return max(0, self.num_pages - 1) * self.engine.page_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that fits context and pool; a last token's KV is never needed."""
        return min(self.context_length, self.max_total_num_tokens + 1)

    @property
    def max_columns(self) -> int:
        """Page-table columns per slot."""
        return -(-self.context_length // self.engine.page_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers, as stored."""
        return self.model.kv_bytes_per_token(ELEMENT_SIZES[self.kv_dtype])

    def with_pool(self, max_total_num_tokens: int, explanations: tuple[Explanation, ...]) -> ResolvedConfig:
        """The same with the pool a core announced, and its explanations of everything."""
        num_pages = max_total_num_tokens // self.engine.page_size + 1
        return msgspec.structs.replace(self, num_pages=num_pages, explanations=explanations)


def resolve(
    config: EngineConfig,
    folder: Path,
    *,
    devices: Sequence[CudaDevice] | None = None,
    software: Software | None = None,
    first_device: int = 0,
) -> ResolvedConfig:
    """Decide every open setting of `config` for the checkpoint in `folder`.

    `devices` and `software` are this machine's unless given; `first_device` is the index of the one to use. Raises
    `ConfigError`, `CheckpointError` or `UnsupportedModelError` naming the setting or file.
    """
    why: list[Explanation] = []
    if str(folder) != encodable(str(folder)):
        raise ConfigError(f"the folder {folder} has a name that is not Unicode text", field="model")
    model = ModelSpec.from_folder(folder)
    software = installed_software() if software is None else software
    cuda = _cuda(config, devices, first_device, software, why)
    device = "cpu" if cuda is None else "cuda"
    engine = _settle(config, device, model, why)
    dtype = _dtype(config, model, device, why)
    backend = _attention_backend(config, device, software, why)
    kv_dtype = _kv_dtype(config, dtype, backend, cuda, why)
    context_length = _context_length(config, model, why)
    num_threads = _num_threads(config, device, why)
    page_bytes = model.kv_bytes_per_token(ELEMENT_SIZES[kv_dtype]) * config.page_size
    return ResolvedConfig(
        engine=engine,
        model=model,
        folder=str(folder),
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        context_length=context_length,
        num_pages=_num_pages(engine, device == "cuda" and backend != "reference", page_bytes, context_length, why),
        num_threads=num_threads,
        attention_backend=backend,
        explanations=tuple(why),
        cuda=cuda,
    )


def backend_refusal(backend: str, device: str, software: Software) -> str | None:
    """Why what is installed cannot run an attention backend on a device; None when it can."""
    if (backend == "cpu" and device == "cuda") or (backend == "flashinfer" and device == "cpu"):
        return f"does not run on {device}"
    if backend == "flashinfer" and not software.has_flashinfer:
        return "needs flashinfer-python, which is not installed (pip install flashinfer-python)"
    if backend == "triton" and device == "cpu" and not (software.has_triton and software.interprets_triton):
        return "runs on cpu only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
    return None


def available_memory() -> int:
    """Bytes this process may still take: the cgroup's remainder or the machine's free memory, whichever is less."""
    amounts = [_meminfo_available()]
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound = (_CGROUPS / limit).read_text().strip()
            used = int((_CGROUPS / usage).read_text())
        except OSError:
            continue
        if bound.isdigit():
            amounts.append(max(0, int(bound) - used + _unused_cache((_CGROUPS / limit).with_name("memory.stat"))))
    return min(amounts)


def _unused_cache(statistics: Path) -> int:
    """Bytes of files read long ago: counted as used, but the kernel drops them before it refuses memory."""
    try:
        values = dict(line.split() for line in statistics.read_text().splitlines())
    except OSError:  # a sandbox that shows the limit alone
        return 0
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def check_working_directory() -> None:
    """Raise `ConfigError` where there is none any more: torch ends the process that imports it there."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory is gone ({error.strerror}); change to another one") from None


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


def _cuda(
    config: EngineConfig,
    devices: Sequence[CudaDevice] | None,
    first_device: int,
    software: Software,
    why: list[Explanation],
) -> CudaDevice | None:
    """The device to run on; None for the CPU. Devices are looked for only where one could be used."""
    if config.device == "cpu":
        return None
    found = (cuda_devices() if devices is None else devices)[first_device:]
    missing = _missing_for_cuda(found, software)
    if missing is None:
        if config.device == "auto":
            why.append(("device", "cuda", _describe(found[0])))
        return found[0]
    if config.device == "cuda":
        raise ConfigError(f"device 'cuda' cannot be used: {missing}", field="device")
    why.append(("device", "cpu", missing))
    return None


def _missing_for_cuda(devices: Sequence[CudaDevice], software: Software) -> str | None:
    if not devices:
        return "the driver shows no CUDA device (CUDA_VISIBLE_DEVICES may hide some)"
    if devices[0].capability < MIN_CAPABILITY:
        return f"{_describe(devices[0])}, below {_dotted(MIN_CAPABILITY)}; CUDA_VISIBLE_DEVICES chooses another"
    if software.torch_cuda is None:
        return "torch is a CPU build"
    return None if software.has_triton else "triton is not installed"


def _describe(device: CudaDevice) -> str:
    return f"{device.name} of compute capability {_dotted(device.capability)}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _settle(config: EngineConfig, device: str, model: ModelSpec, why: list[Explanation]) -> SettledConfig:
    values = {name: getattr(config, name) for name in EngineConfig.__struct_fields__}
    for name, value, reason in _SIZES[device]:
        if values[name] is None:
            values[name] = value
            why.append((name, str(value), reason))
    if values["max_num_batched_tokens"] is None:
        num_tokens, reason = _step_tokens(device, model, values["max_running_requests"])
        values["max_num_batched_tokens"] = num_tokens
        why.append(("max_num_batched_tokens", str(num_tokens), reason))
    if values["seed"] is None:
        values["seed"] = int.from_bytes(os.urandom(8), "little") >> _SEED_SHIFT
        why.append(("seed", str(values["seed"]), "drawn from the system for this start alone"))
    if config.kernel_cache is not None:
        values["kernel_cache"] = _kernel_cache(config.kernel_cache)
    return SettledConfig(**values)


def _step_tokens(device: str, model: ModelSpec, max_rows: int) -> tuple[int, str]:
    if device == "cpu" or model.hidden_size < WIDE_HIDDEN_SIZE:
        return STEP_TOKENS, "long enough for the products to be efficient"
    reason = (
        f"a chunk of {WIDE_PROMPT_TOKENS} beside all rows: products this wide are efficient at a few hundred tokens,"
        " and prompts then ride along with decode steps"
    )
    return max_rows + WIDE_PROMPT_TOKENS, reason


def _kernel_cache(name: str) -> str:
    folder = as_path(name, "kernel_cache", ConfigError)
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"kernel_cache {name} is not a folder", field="kernel_cache")
    except OSError as error:
        raise ConfigError(f"kernel_cache {name} cannot be looked at: {error.strerror}", field="kernel_cache") from None
    return str(folder)


def _dtype(config: EngineConfig, model: ModelSpec, device: str, why: list[Explanation]) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        dtype, reason = "float32", "CPU kernels are fastest and exact in float32"
    elif model.dtype in _MODEL_DTYPES:
        dtype, reason = model.dtype, "the checkpoint's"
    else:
        dtype, reason = "bfloat16", f"the checkpoint's {model.dtype} has no kernels"
    why.append(("dtype", dtype, reason))
    return dtype


def _attention_backend(config: EngineConfig, device: str, software: Software, why: list[Explanation]) -> str:
    backend = config.attention_backend
    if backend == "auto":
        chosen, reason = _BACKENDS[device]
        why.append(("attention_backend", chosen, reason))
        return chosen
    refusal = backend_refusal(backend, device, software)
    if refusal is not None:
        raise ConfigError(f"attention_backend {backend!r} {refusal}", field="attention_backend")
    return backend


def _kv_dtype(config: EngineConfig, dtype: str, backend: str, cuda: CudaDevice | None, why: list[Explanation]) -> str:
    if config.kv_dtype == "auto":
        why.append(("kv_dtype", dtype, "as dtype"))
        return dtype
    if backend not in ("triton", "flashinfer"):
        message = f"kv_dtype {config.kv_dtype!r} needs attention_backend triton or flashinfer, not {backend}"
        raise ConfigError(message, field="kv_dtype")
    if cuda is not None and cuda.capability < FP8_CAPABILITY:
        message = f"kv_dtype {config.kv_dtype!r} needs compute capability {_dotted(FP8_CAPABILITY)}: {_describe(cuda)}"
        raise ConfigError(message, field="kv_dtype")
    return "float8_e4m3fn"


def _context_length(config: EngineConfig, model: ModelSpec, why: list[Explanation]) -> int:
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


def _num_threads(config: EngineConfig, device: str, why: list[Explanation]) -> int:
    if config.num_threads is not None:
        return config.num_threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        num_threads, reason = int(asked), "OMP_NUM_THREADS"
    elif device == "cuda":
        num_threads, reason = min(CUDA_THREADS, available_cores()), "the device computes; loading weights uses a few"
    else:
        num_threads, reason = available_cores(), "the cores this process may run on"
    why.append(("num_threads", str(num_threads), reason))
    return num_threads


def _num_pages(
    engine: SettledConfig, is_measured: bool, page_bytes: int, context_length: int, why: list[Explanation]
) -> int:
    """Pages of the pool and page 0; 0 where a start on the device measures how many there is room for."""
    if engine.kv_pool_tokens is None and is_measured:
        reason = (
            f"what {engine.memory_fraction:g} of the free device memory leaves beside weights, workspace and graphs"
        )
        why.append(("kv_pool_tokens", "measured at start", reason))
        return 0
    if engine.kv_pool_tokens is not None:
        num_pages = engine.kv_pool_tokens // engine.page_size
    else:
        pool_bytes = min(CPU_KV_POOL_BYTES, int(CPU_KV_POOL_FRACTION * available_memory()))
        enough = min(engine.max_running_requests * context_length, _GENEROUS_POOL_TOKENS)
        num_pages = min(pool_bytes // page_bytes, -(-enough // engine.page_size))
        reason = "the least of 2 GiB, 25 % of the memory left, and what the slots could ever hold"
        why.append(("kv_pool_tokens", str(num_pages * engine.page_size), reason))
    if num_pages < 1:
        raise ConfigError("the KV pool would hold no page; raise kv_pool_tokens or free memory", field="kv_pool_tokens")
    return num_pages + 1
