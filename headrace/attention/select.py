"""Which attention backend can do what, as data, and the choice by name. No backend is imported before it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from headrace.attention.base import AttentionBackend, DeviceAttention
from headrace.kernels.products import PLAIN, Products
from headrace.types.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from headrace.attention.heads import Heads
    from headrace.kernels.paged_kv import AttentionShape, KvPool
    from headrace.kernels.rope_tables import RotaryTables


class Capability(msgspec.Struct, frozen=True):
    """What a backend runs. `head_dim_multiple` divides every head size it accepts.

    dtypes      of queries, and of the keys and values they meet
    kv_dtypes   that keys and values may have instead
    head_dims   all it accepts, where they are few
    captures    its steps may be captured in graphs
    """

    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    numerics: tuple[str, ...]
    max_page_size: int
    head_dim_multiple: int
    kv_dtypes: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    captures: bool = True

    def refusal(self, *, device: str, dtype: str, numerics: str, page_size: int, head_dim: int) -> str | None:
        """Why it cannot run this, or None when it can."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not {device}"
        if dtype not in self.dtypes:
            return f"has no {dtype} kernels"
        if numerics not in self.numerics:
            return f"does not offer numerics {numerics!r}"
        if not 1 <= page_size <= self.max_page_size:
            return f"takes pages of 1 to {self.max_page_size} tokens, not {page_size}"
        if head_dim % self.head_dim_multiple:
            return f"takes head sizes that are multiples of {self.head_dim_multiple}, not {head_dim}"
        if self.head_dims and head_dim not in self.head_dims:
            return f"takes heads of {', '.join(map(str, self.head_dims))}, not {head_dim}"
        return None


_ALL_DTYPES = ("float32", "bfloat16", "float16")
_FP8 = ("float8_e4m3fn",)

CAPABILITIES: dict[str, Capability] = {
    "reference": Capability(("cpu", "cuda"), _ALL_DTYPES, ("fast",), 64, 1),
    "cpu": Capability(("cpu",), _ALL_DTYPES, ("fast", "invariant"), 64, 1),
    "triton": Capability(("cuda", "cpu"), _ALL_DTYPES, ("fast", "invariant"), 64, 2, kv_dtypes=_FP8),
    "flashinfer": Capability(
        ("cuda",), ("bfloat16", "float16"), ("fast",), 64, 64, kv_dtypes=_FP8, head_dims=(64, 128, 256), captures=False
    ),
}


class Choice(NamedTuple):
    """What "auto" runs on cuda for a part of a step, and why; docs/benchmarks.md has what was measured."""

    queries: str
    batch_size: str
    kernel: str
    why: str


CHOICES = (
    Choice(
        "1 token per row",
        "few: up to 396 work items x KV heads",
        "triton: decode items, 64 positions at a time by 4 warps",
        "the time of one item decides",
    ),
    Choice("1 token per row", "more", "triton: decode items, 32 positions at a time by 1 warp", "reading decides"),
    Choice(
        "1 token per row, groups that share pages",
        "any",
        "triton: items of several rows over the shared pages, then one per row over the rest",
        "shared pages are read once",
    ),
    Choice(
        "chunks of prompts, heads of 64 or 128 in 16 bits, pages of 16, 32 or 64, compute capability 9.0",
        "any, also beside rows of 1 token",
        "triton: prefill items of 128 query rows by warps that either fetch or multiply",
        "twice as fast as the general kernel",
    ),
    Choice(
        "chunks of prompts, others",
        "any, also beside rows of 1 token",
        "triton: prefill items of 128 query rows",
        "FlashInfer multiplies faster, but without graphs, after planning on the host",
    ),
    Choice(
        "any, numerics invariant",
        "any",
        "triton: every context cut at multiples of 256",
        "the flashinfer backend has no such order of summation",
    ),
)


def refusals(*, device: str, dtype: str, numerics: str, page_size: int, head_dim: int) -> dict[str, str]:
    """Each backend that cannot run this, and why."""
    answers = {
        name: capability.refusal(device=device, dtype=dtype, numerics=numerics, page_size=page_size, head_dim=head_dim)
        for name, capability in CAPABILITIES.items()
    }
    return {name: why for name, why in answers.items() if why is not None}


def build_backend(name: str, numerics: str, heads: Heads, pool: KvPool, products: Products = PLAIN) -> AttentionBackend:
    """The backend over this pool, for a CPU's row operations. Raises `ConfigError` naming why it cannot run it."""
    _check(name, numerics, heads.shape, pool)
    if name == "reference":
        from headrace.attention.reference import ReferenceAttention

        return ReferenceAttention(heads, pool, products)
    from headrace.attention.cpu import CpuAttention

    return CpuAttention(heads, pool, invariant=numerics == "invariant", products=products)


def build_device_backend(
    name: str,
    numerics: str,
    shape: AttentionShape,
    pool: KvPool,
    rotary: RotaryTables,
    dtype: torch.dtype,
    max_tokens: int,
) -> DeviceAttention:
    """The backend over this pool, for steps of at most `max_tokens` fused projections in `dtype`. Raises as above."""
    _check(name, numerics, shape, pool, dtype)
    if name == "flashinfer":
        from headrace.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(shape, pool, rotary, dtype)
    from headrace.attention.triton import TritonAttention

    return TritonAttention(shape, pool, rotary, dtype, max_tokens, invariant=numerics == "invariant")


def _check(name: str, numerics: str, shape: AttentionShape, pool: KvPool, dtype: torch.dtype | None = None) -> None:
    """`dtype` of the queries, where it is known and may differ from the pool's."""
    if name not in CAPABILITIES:
        raise ConfigError(
            f"attention_backend {name!r} is not one of {', '.join(CAPABILITIES)}", field="attention_backend"
        )
    capability, kv_dtype = CAPABILITIES[name], _dtype_name(pool.dtype)
    query_dtype = kv_dtype if dtype is None else _dtype_name(dtype)
    why = capability.refusal(
        device=pool.keys[0].device.type,
        dtype=query_dtype,
        numerics=numerics,
        page_size=pool.geometry.page_size,
        head_dim=shape.head_dim,
    )
    if why is None and kv_dtype != query_dtype and kv_dtype not in capability.kv_dtypes:
        why = f"has no kernels for {query_dtype} over {kv_dtype} keys and values"
    if why is not None:
        raise ConfigError(f"attention backend {name!r} {why}", field="attention_backend")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
