"""An engine that says what a script tells it, token by token, with the calls of `AsyncEngine` that a loop makes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.text import Tokenizer
from headrace.types.errors import HeadraceError
from headrace.types.generation import Generation
from headrace.types.sampling_params import SamplingParams
from tests.text.builders import byte_level

TOKENIZER = Tokenizer(byte_level())
END = "<|im_end|>"
Script = Callable[[str], str]


class ScriptedEngine:
    """`script` maps the text of a conversation up to a reply to that reply. The log-probability of a token is its id,
    negated.

    hold_after  tokens after which a request waits until it is aborted
    failures    errors that the next requests get
    """

    def __init__(self, script: Script, *, hold_after: int | None = None) -> None:
        self.version = "v1"
        self.script = script
        self.hold_after = hold_after
        self.failures: list[HeadraceError] = []
        self.asks: list[dict[str, Any]] = []
        self.live: dict[str, asyncio.Event] = {}

    async def generate(
        self, prompts: Any = None, input_ids: Any = None, sampling_params: Any = None, **options: Any
    ) -> list[Generation]:
        sampling_params = SamplingParams.from_dict(sampling_params)
        self.asks.append({"input_ids": list(input_ids), "params": sampling_params, **options})
        if self.failures:
            raise self.failures.pop(0)
        num_partial = options["num_output_ids_in_prompt"]
        before = TOKENIZER.decode(input_ids[: len(input_ids) - num_partial], skip_special_tokens=False)
        ids = TOKENIZER.encode(self.script(before))
        assert ids[:num_partial] == input_ids[len(input_ids) - num_partial :], "the reply goes on as it began"
        ids = ids[num_partial:]
        reason: Any = "stop"
        if len(ids) > sampling_params.max_new_tokens:
            ids, reason = ids[: sampling_params.max_new_tokens], "length"
        hold_after = self.hold_after
        if hold_after is not None and len(ids) > hold_after:
            aborted = self.live[options["request_id"]] = asyncio.Event()
            await aborted.wait()
            ids, reason = ids[:hold_after], "abort"
        return [
            Generation(
                request_id=options["request_id"],
                token_ids=ids,
                logprobs=[-float(each) for each in ids],
                finish_reason=reason,
                version_spans=[(self.version, len(ids))] if ids else [],
            )
        ]

    async def abort(
        self, request_id: str | None = None, *, prefix: bool = False, all: bool = False, message: str = "Aborted"
    ) -> int:
        chosen = list(self.live) if all else [name for name in self.live if name == request_id]
        for name in chosen:
            self.live.pop(name).set()
        return len(chosen)
