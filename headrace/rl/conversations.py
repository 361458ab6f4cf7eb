"""Conversations as a trainer gets them: token by token what was sampled and what was given, with what the tools said.
Owns the record and its file of JSON lines; knows no engine.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.rl.tools import CallRecord
from headrace.types.errors import ConfigError, ErrorInfo, RequestError
from headrace.types.plain_values import TORN_JSON, as_integer, as_path, as_seconds

Status = Literal["new", "cut", "done", "turns", "length", "deadline", "error"]


class RolloutLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one conversation may take. Raises `ConfigError` naming the limit.

    max_turns              replies of the model
    max_tokens             tokens behind the prompt, sampled and given
    max_run_tokens         tokens sampled in one `run`: a longer tail is cut and handed back (None: none is)
    context_length         prompt and all, for a client; an engine's own is known (None)
    timeout                seconds that it may take, those of earlier runs counted
    tool_timeout           seconds that one call of a tool may take, and the release of the tools at the end
    max_turn_calls         calls of one reply that are run
    max_answer_characters  of a tool's answer that the model sees
    concurrency            conversations that go on at once
    """

    max_turns: int = 8
    max_tokens: int = 4096
    max_run_tokens: int | None = None
    context_length: int | None = None
    timeout: float = 600.0
    tool_timeout: float = 30.0
    max_turn_calls: int = 8
    max_answer_characters: int = 16384
    concurrency: int = 256

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name in ("timeout", "tool_timeout"):
                as_seconds(value, name, ConfigError)
            elif value is not None and as_integer(value, name, ConfigError) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)


class ReplyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One reply of the model: where its tokens are in the conversation's `ids`, its text, the calls in it, and the
    messages that answered it. `finish_reason` is "stop", or why it has no end."""

    start: int
    end: int
    text: str
    finish_reason: str
    seed: int
    calls: list[CallRecord] = []
    answers: list[dict[str, Any]] = []


class Conversation(msgspec.Struct, kw_only=True):
    """One conversation, and one line of JSON. `new_group` makes them; a loop fills them in.

    id, group, index, group_size  its own name, that of the samples it is judged with, its place and their number
    messages      what was given first, as OpenAI's API has it
    data          the caller's own: anything JSON, such as the right answer
    tools_kwargs  what verl's tools are given, by tool
    seed          draws its tokens: the same seed, weights and answers draw the same conversation
    prompt_ids    the first messages as the template writes them
    ids           all that came behind, token by token
    logprobs      the sampled tokens' log-probabilities, as they were drawn; 0.0 for given ones
    loss_mask     1 for a sampled token, 0 for a given one
    spans         ((weight version, number of tokens), ...), summing to len(ids); None for given ones
    turns         the replies that have ended
    open_turn     where in `ids` a reply begins that was cut, to be continued
    status        "new" | "cut": to be (continued) by the next run; over: "done" (a reply without a call, and no more to
                  say to it), "turns", "length" (no room for more tokens), "deadline", "error"
    error         what kept it from going on, or a tool from ending; with "cut", it may be tried again
    seconds       how long it took, in all runs
    num_resumes   how often a reply went on that an abort or an update had cut, and that a run had
    reward        what the loop's `reward` said; None: nothing
    tool_rewards  what `calc_reward` of verl's tools said, by tool
    """

    id: str
    group: str
    index: int = 0
    group_size: int = 1
    messages: list[dict[str, Any]]
    data: Any = None
    tools_kwargs: dict[str, dict[str, Any]] = {}
    seed: int
    prompt_ids: list[int] = []
    ids: list[int] = []
    logprobs: list[float] = []
    loss_mask: list[int] = []
    spans: list[tuple[str | None, int]] = []
    turns: list[ReplyRecord] = []
    open_turn: int | None = None
    status: Status = "new"
    error: ErrorInfo | None = None
    seconds: float = 0.0
    num_resumes: int = 0
    reward: float | None = None
    tool_rewards: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        return self.status not in ("new", "cut")

    @property
    def reply(self) -> str:
        """The text of the last reply."""
        return self.turns[-1].text if self.turns else ""

    @property
    def num_sampled(self) -> int:
        return sum(self.loss_mask)

    def add_sampled(self, ids: Sequence[int], logprobs: Sequence[float], spans: Iterable[tuple[str, int]]) -> None:
        """Tokens of the model, as they were drawn."""
        self.ids += ids
        self.logprobs += logprobs
        self.loss_mask += [1] * len(ids)
        for version, count in spans:
            self._add_span(version, count)

    def add_given(self, ids: Sequence[int]) -> None:
        """Tokens of somebody else."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.loss_mask += [0] * len(ids)
        self._add_span(None, len(ids))

    def _add_span(self, version: str | None, count: int) -> None:
        if self.spans and self.spans[-1][0] == version:
            version, before = self.spans.pop()
            count += before
        if count:
            self.spans.append((version, count))


def new_group(
    messages: Sequence[Mapping[str, Any]],
    size: int,
    *,
    group: str | None = None,
    seed: int | None = None,
    data: Any = None,
    tools_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Conversation]:
    """`size` conversations that begin alike. `group` None: a fresh name; `seed` None: a fresh one."""
    name = uuid.uuid4().hex if group is None else group
    source = random.Random(seed)
    kwargs = {tool: dict(each) for tool, each in (tools_kwargs or {}).items()}
    return [
        Conversation(
            id=uuid.uuid4().hex,
            group=name,
            index=index,
            group_size=size,
            messages=[dict(message) for message in messages],
            data=data,
            tools_kwargs=kwargs,
            seed=source.getrandbits(64),
        )
        for index in range(size)
    ]


def check_conversations(conversations: Sequence[Conversation], *, are_logged: bool) -> None:
    """Raise `RequestError` (field "conversations") for what no JSON can hold, and is to be told or logged."""
    names = ("messages", "data", "tools_kwargs") if are_logged else ("messages",)
    for number, each in enumerate(conversations):
        for name in names:
            reason = _unwritable(getattr(each, name))
            if reason:
                message = f"conversations[{number}].{name} is not JSON: {reason}"
                raise RequestError(message, field="conversations")


def _unwritable(value: Any) -> str:
    """Why JSON cannot hold it; "" if it can."""
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return str(error)
    return ""


class ConversationLog:
    """A file of conversations, one a line, which grows."""

    def __init__(self, path: str | Path) -> None:
        """`ConfigError` (field "log") for a file that cannot be written."""
        where = as_path(str(path), "log", ConfigError)
        self._where = where
        try:
            self._file = where.open("ab")
            if _ends_in_a_line(where):
                self._file.write(b"\n")  # what comes is not to be lost with it
        except OSError as error:
            raise self._failed(error) from None
        self._encoder = msgspec.json.Encoder()

    def write(self, conversation: Conversation) -> None:
        """Add it. `ConfigError` (field "log") where that fails, or the caller's own part of it is not JSON any more."""
        try:
            line = self._encoder.encode(conversation)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"log: conversation {conversation.id} is not JSON: {error}", field="log") from None
        try:
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(f"log {self._where} cannot be written: {error.strerror}", field="log")

    def close(self) -> None:
        self._file.close()


def _ends_in_a_line(path: Path) -> bool:
    """Whether the last line of a file was not written whole."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations in a log, each as it was last written, in the order of their first lines. A line that was not
    written whole is left out. `ConfigError` (field "path") naming what cannot be read."""
    where = as_path(str(path), "path", ConfigError)
    try:
        lines = where.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"path {where} cannot be read: {error.strerror}", field="path") from None
    found: dict[str, Conversation] = {}
    decoder = msgspec.json.Decoder(Conversation)
    for number, line in enumerate(lines[:-1], 1):
        try:
            conversation = decoder.decode(line)
        except msgspec.DecodeError as error:
            if str(error) == TORN_JSON:
                continue  # whoever wrote it ended, and another one went on
            raise ConfigError(f"path {where}, line {number} is no conversation: {error}", field="path") from None
        except (RecursionError, UnicodeError) as error:
            raise ConfigError(f"path {where}, line {number} is no conversation: {error}", field="path") from None
        found[conversation.id] = conversation
    return list(found.values())
