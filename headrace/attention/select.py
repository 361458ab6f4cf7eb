"""Which attention backend can do what, as data, and the choice by name. No backend is imported before it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from headrace.attention.base import AttentionBackend, AttentionShape
from headrace.types.errors import ConfigError

if TYPE_CHECKING:
    from headrace.kernels.paged_kv import KvPool


class Capability(msgspec.Struct, frozen=True):
    """What a backend runs. `head_dim_multiple` divides every head size it accepts."""

    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    numerics: tuple[str, ...]
    max_page_size: int
    head_dim_multiple: int

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
        return None


_ALL_DTYPES = ("float32", "bfloat16", "float16")

CAPABILITIES: dict[str, Capability] = {
    "reference": Capability(("cpu",), _ALL_DTYPES, ("fast",), 64, 1),
    "cpu": Capability(("cpu",), _ALL_DTYPES, ("fast", "invariant"), 64, 1),
}


def refusals(*, device: str, dtype: str, numerics: str, page_size: int, head_dim: int) -> dict[str, str]:
    """Each backend that cannot run this, and why."""
    answers = {
        name: capability.refusal(device=device, dtype=dtype, numerics=numerics, page_size=page_size, head_dim=head_dim)
        for name, capability in CAPABILITIES.items()
    }
    return {name: why for name, why in answers.items() if why is not None}


def build_backend(name: str, numerics: str, shape: AttentionShape, pool: KvPool) -> AttentionBackend:
    """The backend over this pool. Raises `ConfigError` naming why it cannot run it."""
    if name not in CAPABILITIES:
        raise ConfigError(
            f"attention_backend {name!r} is not one of {', '.join(CAPABILITIES)}", field="attention_backend"
        )
    dtype = str(pool.dtype).removeprefix("torch.")
    why = CAPABILITIES[name].refusal(
        device="cpu", dtype=dtype, numerics=numerics, page_size=pool.geometry.page_size, head_dim=shape.head_dim
    )
    if why is not None:
        raise ConfigError(f"attention backend {name!r} {why}", field="attention_backend")
    if name == "reference":
        from headrace.attention.reference import ReferenceAttention

        return ReferenceAttention(shape, pool)
    from headrace.attention.cpu import CpuAttention

    return CpuAttention(shape, pool, invariant=numerics == "invariant")
