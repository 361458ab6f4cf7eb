"""Settings of a comparison. Owns their names, defaults and bounds; every field is a flag of `headrace compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.server.options import from_keywords, settle_key
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_choice, as_seconds

Dialect = Literal["auto", "sglang", "openai"]


class CompareOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How trajectories are scored again. Raises `ConfigError` naming the field.

    temperature   at which they were sampled, if their log-probabilities are of that distribution. Servers score at 1
                  only
    limit         trajectories that are looked at, the first ones (None: all)
    dialect       how a server is asked: /generate with logprob_start_len, or /v1/completions with echo or
                  prompt_logprobs; auto: the first, and where there is none the second
    server_model  the model's name at an OpenAI server (None: the first that it lists)
    api_key       bearer key of servers. Prefer the file, or HEADRACE_API_KEY in the environment of `headrace compare`
    api_key_file  file that holds `api_key`
    timeout       seconds that a server has for each answer
    concurrency   requests to a server at once
    """

    temperature: float = 1.0
    limit: int | None = None
    dialect: Dialect = "auto"
    server_model: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    timeout: float = 300.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        settle_key(self, "api_key")
        as_choice(self.dialect, ("auto", "sglang", "openai"), "dialect", ConfigError)
        as_seconds(self.timeout, "timeout", ConfigError)
        if not 1e-3 <= self.temperature <= 100:
            raise ConfigError("temperature must be in [0.001, 100]", field="temperature")
        for name in ("limit", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1", field=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompareOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        return from_keywords(cls, values, "a setting of a comparison")
