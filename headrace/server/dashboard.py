"""`/dashboard`: a page that shows what the engine does, what the page reads, and how a trainer gives it rewards.

All of it is read from what the front notes anyway (`engine/lookback.py`): the core is asked nothing. Owns how samples
become text.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.engine.lookback import MAX_IDS
from headrace.server.coerce import read_control
from headrace.server.dashboard_state import (
    DASHBOARD_PATH,
    LOOK_SECONDS,
    REWARDS_PATH,
    STATE_PATH,
    DashboardState,
    read_since,
)
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.web_pages import HTML_TYPE, load_page
from headrace.server.wire import json_reply
from headrace.telemetry import SampleNote
from headrace.text import Tokenizer, run_sized
from headrace.types.errors import HeadraceError
from headrace.types.request import unpack_ids

_GAP = " \u2026 "
_NUMBER = {"type": "number"}
_REWARDS_SCHEMA = {
    "type": "object",
    "additionalProperties": {"anyOf": [_NUMBER, {"type": "array", "items": {"anyOf": [_NUMBER, {"type": "null"}]}}]},
}


class RewardsBody(msgspec.Struct):
    """By request id (`meta_info.id`, `id`) a number, or a list with one for each sample of that id, null for those
    without."""

    rewards: Annotated[Any, msgspec.Meta(extra_json_schema=_REWARDS_SCHEMA)] = None


class DashboardFace:
    """The page, and the two calls behind it."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.engine
        self._page = load_page("dashboard", "Headrace")

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(DASHBOARD_PATH, self.page, access="open"),
            Endpoint(STATE_PATH, self.look),
            Endpoint(REWARDS_PATH, self.give_rewards, ("POST",)),
        ]

    async def page(self, request: Request) -> Response:
        """GET /dashboard: the page, which holds no data."""
        return Response(self._page.body, headers=dict(self._page.headers), media_type=HTML_TYPE)

    async def look(self, request: Request) -> Response:
        """GET /dashboard/state: what is new since the answer whose `history.last` was `since`."""
        since = read_since(request.query_params.get("since", "0"))
        history = self._engine.runtime.lookback.since(since)
        await self._write(history.samples)
        state = DashboardState(
            kind="server",
            version=__version__,
            model=self._state.model_name,
            is_ready=self._state.is_ready,
            look_seconds=LOOK_SECONDS,
            history=history,
        )
        return json_reply(state)

    async def give_rewards(self, request: Request) -> Response:
        """POST /rewards: what samples were worth, by request id, for the page. The engine does nothing with them; the
        answer says how many are of samples that it remembers."""
        body = await read_control(request, RewardsBody)
        return json_reply({"num_known": await self._engine.give_rewards(body.rewards)})

    async def _write(self, samples: list[SampleNote]) -> None:
        """Have the excerpts of samples as text, each once."""
        unread = [note for note in samples if note.excerpt is not None]
        size = MAX_IDS * len(unread)
        await run_sized(size, lambda: _write_all(unread, self._engine.tokenizer))


def _write_all(notes: list[SampleNote], tokenizer: Tokenizer | None) -> None:
    for note in notes:
        _write(note, tokenizer)


def _write(note: SampleNote, tokenizer: Tokenizer | None) -> None:
    excerpt = note.excerpt
    if excerpt is None:
        return  # somebody else wrote it meanwhile
    prompt, head, tail = (unpack_ids(ids).tolist() for ids in (excerpt.prompt, excerpt.head, excerpt.tail))
    is_cut = note.num_tokens > len(head) + len(tail)
    output = f"{_text(head, tokenizer)}{_GAP}{_text(tail, tokenizer)}" if is_cut else _text(head + tail, tokenizer)
    note.prompt = (_GAP if note.num_prompt_tokens > len(prompt) else "") + _text(prompt, tokenizer)
    note.output, note.excerpt = output, None


def _text(ids: list[int], tokenizer: Tokenizer | None) -> str:
    """Special tokens are shown: whoever looks at rollouts wants to see them."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    try:
        return tokenizer.decode(ids, skip_special_tokens=False)
    except HeadraceError:  # ids of which there is no text
        return " ".join(map(str, ids))
