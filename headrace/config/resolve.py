"""Every "auto" is decided here, once, and explained. Owns `ResolvedConfig`; loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from headrace.config.devices import CudaDevice, Software, cuda_devices, installed_software
from headrace.config.engine_config import EngineConfig, SettledConfig
from headrace.config.machine import available_cores, available_memory
from headrace.config.model_spec import ModelSpec
from headrace.config.sampling_defaults import recommended_sampling
from headrace.config.shares import share_of, stages_of
from headrace.types.errors import ConfigError, encodable
from headrace.types.plain_values import as_path
from headrace.types.weights import ELEMENT_BYTES

Explanation = tuple[str, str, str]

MIN_CAPABILITY = (8, 0)
"""bfloat16 matrix products; what the kernels are written for."""

FP8_CAPABILITY = (8, 9)
"""The first with float8_e4m3fn conversions in hardware, without which Triton has none."""

CUDA_THREADS = 4
CPU_KV_POOL_BYTES = 2 << 30
CPU_KV_POOL_FRACTION = 0.25
_GENEROUS_POOL_TOKENS = 1 << 22
_MOVED_BYTES = 256 << 20
_MODEL_DTYPES = ("float32", "bfloat16", "float16")

STEP_TOKENS = 2048
WIDE_HIDDEN_SIZE = 2048
WIDE_PROMPT_TOKENS = 256
PREFILL_TOKENS = 8192

Value = TypeVar("Value")


class Chosen(NamedTuple, Generic[Value]):
    """What a setting became, and why; "" where it was given."""

    value: Value
    why: str = ""


_SIZES: dict[str, dict[str, Chosen[int]]] = {
    "cuda": {
        "max_running_requests": Chosen(512, "decode gains from every row up to there"),
        "overlap_depth": Chosen(1, "the next step is decided while the device computes"),
    },
    "cpu": {
        "max_running_requests": Chosen(256, "plenty to keep a CPU busy"),
        "overlap_depth": Chosen(0, "a step is computed where it is decided: nothing to overlap"),
    },
}
_BACKENDS = {
    "cuda": Chosen("triton", "the faster one for most steps (docs/benchmarks.md), and it reads shared prompts once"),
    "cpu": Chosen("cpu", "the batched CPU kernels; reference is the slow oracle"),
}
_NO_EXPERTS = "has no kernels for layers of experts yet"


class Takeover(msgspec.Struct, frozen=True):
    """What a core is told of those before it, which died: it must not be taken for one of them.

    version       the label last seen of their weights
    epoch         greater than any that their replies named
    is_current    the checkpoint that it loads is what was live: no update had been committed, no label changed
    """

    version: str
    epoch: int
    is_current: bool


class ResolvedConfig(msgspec.Struct, frozen=True):
    """An `EngineConfig` with nothing left open. `kv_dtype` is a torch dtype's name; `cuda` describes the device in use.

    `num_pages` includes page 0, which no sequence is given; 0 on cuda until the core has measured it, and
    `max_step_cost`, how many tokens without context a step of `max_step_ms` has. `explanations` are (setting, value,
    why) for each setting that was "auto" or was cut. `takeover` is None for an engine's first core.
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
    sampling_defaults: dict[str, float] = {}
    max_step_cost: int = 0

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
    def num_ranks(self) -> int:
        """Processes or devices that hold the model together."""
        return self.engine.tp_size * self.engine.pp_size

    @property
    def num_cohorts(self) -> int:
        """Parts that running sequences make, which take turns: each stage then has another one's step to execute."""
        return self.engine.overlap_depth + 1 if self.engine.pp_size > 1 else 1

    @property
    def share(self) -> ModelSpec:
        """The model as each rank of a stage computes it, with the layers of all stages."""
        return share_of(self.model, self.engine.tp_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, as the rank stores them whose stage has most."""
        element_size = ELEMENT_BYTES[self.kv_dtype]
        stages = stages_of(self.share, self.engine.pp_size)
        return max(stage.of(self.share).kv_bytes_per_token(element_size) for stage in stages)

    @property
    def host_bytes_per_token(self) -> int:
        """The same, as the ranks of a CPU store them together."""
        return self.engine.tp_size * self.share.kv_bytes_per_token(ELEMENT_BYTES[self.kv_dtype])

    def of_rank(self, rank: int) -> ResolvedConfig:
        """What rank `rank` is told: the devices of ranks follow each other."""
        if self.cuda is None:
            return self
        return msgspec.structs.replace(self, cuda=msgspec.structs.replace(self.cuda, index=self.cuda.index + rank))

    @property
    def num_host_pages(self) -> int:
        """KV pages that host memory holds."""
        return self.engine.host_kv_tokens // self.engine.page_size

    @property
    def max_page_moves(self) -> int:
        """Pages that are copied to the host's memory, and from it, beside one step: about 5 ms of a fast bus."""
        return max(1, _MOVED_BYTES // (self.kv_bytes_per_token * self.engine.page_size))

    @property
    def memory_is_kept(self) -> str:
        """Why weights and KV cannot give their memory back; "" where they can."""
        if self.device == "cpu" or self.engine.memory_saver:
            return ""
        return "memory of a CUDA device is released only by an engine that was started with memory_saver=True"

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
    ranks_here: int | None = None,
) -> ResolvedConfig:
    """Decide every open setting of `config` for the checkpoint in `folder`.

    `devices` and `software` are this machine's unless given; `first_device` is the index of the one to use, of
    `ranks_here`, which are a node's part unless given. Raises `ConfigError`, `CheckpointError` or
    `UnsupportedModelError` naming the setting or file.
    """
    if str(folder) != encodable(str(folder)):
        raise ConfigError(f"the folder {folder} has a name that is not Unicode text", field="model")
    model = ModelSpec.from_folder(folder)
    share = share_of(model, config.tp_size)
    stages_of(model, config.pp_size)
    software = installed_software() if software is None else software
    num_here = _ranks_of_node(config) if ranks_here is None else ranks_here
    cuda, why_device = _cuda(config, model, devices, first_device, software, num_here)
    device = "cpu" if cuda is None else "cuda"
    sizes = _sizes(config, device, model)
    engine = _settled(config, {name: size.value for name, size in sizes.items()})
    dtype = _dtype(config, model, device)
    backend = _attention_backend(config, model, device, software)
    kv_dtype = _kv_dtype(config, dtype.value, backend.value, cuda)
    context_length = _context_length(config, model)
    num_threads = _num_threads(config, device)
    page_bytes = share.kv_bytes_per_token(ELEMENT_BYTES[kv_dtype.value]) * config.page_size * config.tp_size
    is_measured = device == "cuda" and backend.value != "reference"
    pool_tokens = _pool_tokens(engine, is_measured, page_bytes, context_length.value)
    _check_host_pages(engine, page_bytes)
    model.check_kept_experts(engine)
    sampling = recommended_sampling(folder) if config.sampling_defaults == "model" else {}
    choices: dict[str, Chosen[Any]] = {
        "device": Chosen(device, why_device),
        **sizes,
        "dtype": dtype,
        "attention_backend": backend,
        "kv_dtype": kv_dtype,
        "context_length": context_length,
        "num_threads": num_threads,
        "kv_pool_tokens": pool_tokens,
        "sampling_defaults": Chosen(sampling, "what generation_config.json recommends" if sampling else ""),
    }
    return ResolvedConfig(
        engine=engine,
        model=model,
        folder=str(folder),
        device=device,
        dtype=dtype.value,
        kv_dtype=kv_dtype.value,
        context_length=context_length.value,
        num_pages=0 if pool_tokens.value is None else pool_tokens.value // engine.page_size + 1,
        num_threads=num_threads.value,
        attention_backend=backend.value,
        explanations=_explanations(choices),
        cuda=cuda,
        sampling_defaults=sampling,
    )


def _ranks_of_node(config: EngineConfig) -> int:
    num_ranks = config.tp_size * config.pp_size
    if num_ranks % config.nnodes:
        raise ConfigError(f"nnodes {config.nnodes} does not divide tp_size times pp_size, {num_ranks}", field="nnodes")
    return num_ranks // config.nnodes


def _check_host_pages(engine: SettledConfig, page_bytes: int) -> None:
    num_bytes, free = engine.host_kv_tokens // engine.page_size * page_bytes, available_memory()
    if num_bytes and not engine.prefix_cache:
        raise ConfigError("host_kv_tokens keeps entries of the prefix cache, which is off", field="host_kv_tokens")
    if engine.host_kv_tokens and not num_bytes:
        raise ConfigError(f"host_kv_tokens is less than a page of {engine.page_size}", field="host_kv_tokens")
    if num_bytes > free:
        message = f"host_kv_tokens takes {num_bytes >> 20} MiB of host memory, and {free >> 20} MiB are free"
        raise ConfigError(message, field="host_kv_tokens")


def _explanations(choices: Mapping[str, Chosen[Any]]) -> tuple[Explanation, ...]:
    found = ((name, choice.value, choice.why) for name, choice in choices.items() if choice.why)
    return tuple((name, "measured at start" if value is None else str(value), why) for name, value, why in found)


def backend_refusal(backend: str, model: ModelSpec, device: str, software: Software) -> str | None:
    """Why what is installed cannot run a model with an attention backend on a device; None when it can."""
    if model.has_experts and backend in ("triton", "flashinfer"):
        return _NO_EXPERTS
    if (backend == "cpu" and device == "cuda") or (backend == "flashinfer" and device == "cpu"):
        return f"does not run on {device}"
    if backend == "flashinfer" and not software.has_flashinfer:
        return "needs flashinfer-python, which is not installed (pip install flashinfer-python)"
    if backend == "triton" and device == "cpu" and not (software.has_triton and software.interprets_triton):
        return "runs on cpu only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
    return None


def _cuda(
    config: EngineConfig,
    model: ModelSpec,
    devices: Sequence[CudaDevice] | None,
    first_device: int,
    software: Software,
    num_here: int,
) -> Chosen[CudaDevice | None]:
    """The device to run on; None for the CPU. Devices are looked for only where one could be used."""
    if config.device == "cpu":
        return Chosen(None)
    found = (cuda_devices() if devices is None else devices)[first_device:]
    missing = _missing_for_cuda(found, software)
    if missing is None and model.has_experts and config.attention_backend != "reference":
        missing = f"{_describe(found[0])} {_NO_EXPERTS} (device='cpu' has; attention_backend='reference' is slow)"
    fit = sum(device.capability >= MIN_CAPABILITY for device in found[:num_here])
    if missing is None and fit < num_here:
        field = "tp_size" if config.pp_size == 1 else "pp_size"
        what = f"{field} {getattr(config, field)}" + (f" of {config.tp_size} ranks each" if config.pp_size > 1 else "")
        there = f"from device {first_device} on there are {fit} of compute capability {_dotted(MIN_CAPABILITY)}"
        raise ConfigError(f"{what} needs {num_here} CUDA devices here; {there}", field=field)
    if missing is None:
        return Chosen(found[0], _describe(found[0]) if config.device == "auto" else "")
    if config.device == "cuda":
        raise ConfigError(f"device 'cuda' cannot be used: {missing}", field="device")
    return Chosen(None, missing)


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


def _sizes(config: EngineConfig, device: str, model: ModelSpec) -> dict[str, Chosen[int]]:
    """The fields of `SettledConfig` that are numbers an `EngineConfig` may leave open."""
    sizes = {name: _given(config, name) or choice for name, choice in _SIZES[device].items()}
    if config.overlap_depth is None and config.pp_size > 1:
        depth = max(sizes["overlap_depth"].value, config.pp_size - 1)
        sizes["overlap_depth"] = Chosen(depth, "each stage executes another step")
    given = _given(config, "max_num_batched_tokens")
    tokens = given or _step_tokens(device, model, sizes["max_running_requests"].value)
    is_large = device == "cuda" and given is None and config.pp_size == 1 and tokens.value < PREFILL_TOKENS
    alone = Chosen(PREFILL_TOKENS, "large products are the most efficient, and few rows wait") if is_large else tokens
    return {
        **sizes,
        "max_num_batched_tokens": tokens,
        "prefill_step_tokens": _given(config, "prefill_step_tokens") or alone,
        "seed": _given(config, "seed") or Chosen(_draw_seed(), "drawn from the system for this start alone"),
    }


def _given(config: EngineConfig, name: str) -> Chosen[int] | None:
    value = getattr(config, name)
    return None if value is None else Chosen(value)


def _step_tokens(device: str, model: ModelSpec, max_rows: int) -> Chosen[int]:
    if device == "cpu" or model.hidden_size < WIDE_HIDDEN_SIZE:
        return Chosen(STEP_TOKENS, "long enough for the products to be efficient")
    return Chosen(max_rows + WIDE_PROMPT_TOKENS, "products this wide are efficient at a few hundred tokens")


def _draw_seed() -> int:
    """Of 53 bits, so that readers of JSON that know only doubles keep all of it."""
    return int.from_bytes(os.urandom(8), "little") >> 11


def _settled(config: EngineConfig, sizes: Mapping[str, int]) -> SettledConfig:
    values = {**msgspec.structs.asdict(config), **sizes}
    if config.kernel_cache is not None:
        values["kernel_cache"] = _kernel_cache(config.kernel_cache)
    return SettledConfig(**values)


def _kernel_cache(name: str) -> str:
    folder = as_path(name, "kernel_cache", ConfigError)
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"kernel_cache {name} is not a folder", field="kernel_cache")
    except OSError as error:
        raise ConfigError(f"kernel_cache {name} cannot be looked at: {error.strerror}", field="kernel_cache") from None
    return str(folder)


def _dtype(config: EngineConfig, model: ModelSpec, device: str) -> Chosen[str]:
    if config.dtype != "auto":
        return Chosen(config.dtype)
    if device == "cpu":
        return Chosen("float32", "CPU kernels are fastest and exact in float32")
    if model.dtype in _MODEL_DTYPES:
        return Chosen(model.dtype, "the checkpoint's")
    return Chosen("bfloat16", f"the checkpoint's {model.dtype} has no kernels")


def _attention_backend(config: EngineConfig, model: ModelSpec, device: str, software: Software) -> Chosen[str]:
    backend = config.attention_backend
    if backend == "auto":
        return _BACKENDS[device]
    refusal = backend_refusal(backend, model, device, software)
    if refusal is not None:
        raise ConfigError(f"attention_backend {backend!r} {refusal}", field="attention_backend")
    return Chosen(backend)


def _kv_dtype(config: EngineConfig, dtype: str, backend: str, cuda: CudaDevice | None) -> Chosen[str]:
    if config.kv_dtype == "auto":
        return Chosen(dtype, "as dtype")
    if backend not in ("triton", "flashinfer"):
        message = f"kv_dtype {config.kv_dtype!r} needs attention_backend triton or flashinfer, not {backend}"
        raise ConfigError(message, field="kv_dtype")
    if cuda is not None and cuda.capability < FP8_CAPABILITY:
        message = f"kv_dtype {config.kv_dtype!r} needs compute capability {_dotted(FP8_CAPABILITY)}: {_describe(cuda)}"
        raise ConfigError(message, field="kv_dtype")
    return Chosen("float8_e4m3fn")


def _context_length(config: EngineConfig, model: ModelSpec) -> Chosen[int]:
    longest = Chosen(model.max_position, "max_position_embeddings")
    if model.sliding_window is not None and model.sliding_window < model.max_position:
        longest = Chosen(model.sliding_window, "the sliding window: beyond it attention would differ")
    if config.context_length is None:
        return longest
    if config.context_length > longest.value:
        message = f"context_length {config.context_length} is over the model's {longest.value} ({longest.why})"
        raise ConfigError(message, field="context_length")
    return Chosen(config.context_length)


def _num_threads(config: EngineConfig, device: str) -> Chosen[int]:
    if config.num_threads is not None:
        return Chosen(config.num_threads)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return Chosen(int(asked), "OMP_NUM_THREADS")
    if device == "cuda":
        return Chosen(min(CUDA_THREADS, available_cores()), "the device computes; loading weights uses a few")
    num_ranks = config.tp_size * config.pp_size
    if num_ranks > 1:
        return Chosen(max(1, available_cores() // num_ranks), "each rank's part of the cores")
    return Chosen(available_cores(), "the cores this process may run on")


def _pool_tokens(
    engine: SettledConfig, is_measured: bool, page_bytes: int, context_length: int
) -> Chosen[int] | Chosen[None]:
    """Tokens that the pool has room for; None where a start on the device measures it."""
    if engine.kv_pool_tokens is None and is_measured:
        share = f"what {engine.memory_fraction:g} of the free device memory leaves"
        return Chosen(None, f"{share} beside weights, workspace and graphs")
    if engine.kv_pool_tokens is not None:
        choice = Chosen(engine.kv_pool_tokens)
    else:
        pool_bytes = min(CPU_KV_POOL_BYTES, int(CPU_KV_POOL_FRACTION * available_memory()))
        enough = min(engine.max_running_requests * context_length, _GENEROUS_POOL_TOKENS)
        num_pages = min(pool_bytes // page_bytes, -(-enough // engine.page_size))
        why = "the least of 2 GiB, 25 % of the memory left, and what the slots could ever hold"
        choice = Chosen(num_pages * engine.page_size, why)
    if choice.value < engine.page_size:
        raise ConfigError("the KV pool would hold no page; raise kv_pool_tokens or free memory", field="kv_pool_tokens")
    return choice
