"""How every request of a benchmark samples, and what it asks to be told. Owns nothing but the flags' meaning."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.types.sampling_params import SamplingParams


class RequestStyle(msgspec.Struct, frozen=True):
    """Temperature is 1 and nothing ends a request early.

    top_p               keep the most probable tokens up to this mass
    top_k               keep this many most probable tokens
    repetition_penalty  what logits of tokens that a sequence holds are divided by, if they are positive
    top_logprobs        most probable tokens reported per position
    """

    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    top_logprobs: int = 0

    def params(self, num_tokens: int) -> SamplingParams:
        return SamplingParams(**self.sampling(num_tokens))

    def sampling(self, num_tokens: int) -> dict[str, Any]:
        """All sampling parameters, by the names that `SamplingParams` and `/generate` have for them."""
        return {
            "max_new_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        }

    def report(self) -> dict[str, Any]:
        """What differs from plain sampling, for a report."""
        plain = RequestStyle()
        return {
            name: value for name in self.__struct_fields__ if (value := getattr(self, name)) != getattr(plain, name)
        }
