"""How long a step takes, and what else a replica costs in time: a few measured numbers per model and device.

Owns the table and the arithmetic; docs/simulation.md says where each number comes from. A step's time is linear in its
work, but for one bend: the products of a step either wait for the weights to be read or for the arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_path, hint


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replica: a model on a device. Times are seconds. Raises `ConfigError` naming a field that makes no sense.

    fixed            of every step: launches, latency of its chain of kernels
    weights          to read all weights once; it hides behind the arithmetic of many tokens
    token            arithmetic of one token's products
    kv_read          to read the KV of one position for one row that decodes
    shared_kv_read   the same where adjacent rows of a group read their prompt's KV together
    attend           of a prompt: one token attends to one position
    update           an update of all weights on one host, from the trainer's memory
    update_pause     of it: generation stands still
    start            from a process's start to its first token
    weight_bytes     of the whole model
    max_running_requests, max_num_batched_tokens, prefill_step_tokens, max_step_ms, kv_pool_tokens, page_size
                     as the engine's settings of these names
    """

    fixed: float
    weights: float = 0.0
    token: float
    kv_read: float = 0.0
    shared_kv_read: float = 0.0
    attend: float = 0.0
    update: float = 0.0
    update_pause: float = 0.0
    start: float = 10.0
    weight_bytes: float = 0.0
    max_running_requests: int = 512
    max_num_batched_tokens: int = 2048
    prefill_step_tokens: int = 0
    max_step_ms: float = 250.0
    kv_pool_tokens: int = 1 << 19
    page_size: int = 16

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) < 1e18:
                raise ConfigError(f"{name} must be from 0 to 1e18, got {getattr(self, name):g}", field=name)
        if not self.fixed and not self.token:
            raise ConfigError("fixed or token must be more than 0: a step takes time", field="fixed")
        for name in ("max_running_requests", "max_num_batched_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", field=name)
        if self.kv_pool_tokens < self.page_size:
            raise ConfigError("kv_pool_tokens must be at least a page", field="kv_pool_tokens")

    @property
    def max_step_cost(self) -> int:
        """Tokens without context that a step of `max_step_ms` computes, as an engine measures it at its start; 0, any,
        where its steps are never larger for prompts."""
        if self.prefill_step_tokens <= self.max_num_batched_tokens:
            return 0
        whole = StepWork(1, 0, self.prefill_step_tokens)
        tokens = self.prefill_step_tokens * self.max_step_ms / 1e3 / self.seconds(whole)
        return max(self.max_num_batched_tokens, int(tokens))

    @property
    def attended_per_token(self) -> int:
        """Positions that a token attends to in the time of its products."""
        return max(1, round(self.token / self.attend)) if self.attend else 1 << 30

    def seconds(self, work: StepWork) -> float:
        """Of `work.num_steps` equal steps that do this work together."""
        num_tokens = work.num_decoded + work.num_prefilled
        products = max(self.weights * work.num_steps, self.token * num_tokens)
        attention = self.kv_read * work.num_read + self.shared_kv_read * work.num_read_together
        return self.fixed * work.num_steps + products + attention + self.attend * work.num_attended


class StepWork(msgspec.Struct, frozen=True):
    """What one or more steps do: tokens decoded and tokens of prompts computed; KV positions that rows read alone and
    with their group (each row's counted); and pairs of a prompt's token and a position that it attends to."""

    num_steps: int
    num_decoded: int
    num_prefilled: int
    num_read: float = 0.0
    num_read_together: float = 0.0
    num_attended: float = 0.0


PROFILES = {
    "qwen3-0.6b-h200": DeviceProfile(
        fixed=0.505e-3,
        weights=0.24e-3,
        token=2.1e-6,
        kv_read=29.4e-9,
        shared_kv_read=8.2e-9,
        attend=0.39e-9,
        update=5e-3,
        update_pause=2.0e-3,
        start=8.4,
        weight_bytes=1.19e9,
        max_num_batched_tokens=2048,
        prefill_step_tokens=8192,
        kv_pool_tokens=1_080_000,
    ),
    "qwen3-8b-h200": DeviceProfile(
        fixed=1.48e-3,
        weights=2.70e-3,
        token=22.2e-6,
        kv_read=36.8e-9,
        shared_kv_read=10.3e-9,
        attend=1.2e-9,
        update=37e-3,
        update_pause=2.0e-3,
        start=12.0,
        weight_bytes=16.4e9,
        max_num_batched_tokens=768,
        prefill_step_tokens=8192,
        kv_pool_tokens=740_000,
    ),
}
"""By name. Of the H200: docs/benchmarks.md, but for the small model's update and the large one's start: guesses."""


def read_profile(name: str) -> DeviceProfile:
    """The profile of that name, or the one that a JSON file of that name holds. Raises `ConfigError`."""
    if name in PROFILES:
        return PROFILES[name]
    path = as_path(name, "profile", ConfigError)
    if not name.endswith(".json"):
        known = ", ".join(PROFILES)
        message = f"there is no profile {name!r}{hint(name, PROFILES)}; there are {known}, and files that end in .json"
        raise ConfigError(message, field="profile")
    return _read_file(path)


def _read_file(path: Path) -> DeviceProfile:
    try:
        return msgspec.json.decode(path.read_bytes(), type=DeviceProfile)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}", field="profile") from None
    except DECODE_ERRORS as error:
        raise ConfigError(f"profile {path}: {error}", field="profile") from None
