"""Conversations with tools, many at once, over an engine or a client of one.

Owns the loop: sample a reply, run the tools it calls, put their answers behind it, go on. A token that was sampled is
never decoded and encoded again: the ids of all turns so far are the next prompt. What a conversation is, is
`headrace.rl.conversations`; what a tool is, `headrace.rl.tools`; how messages become tokens, `headrace.rl.turn_text`.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, Unpack

import msgspec

from headrace.engine import AsyncEngine, Engine
from headrace.engine.fields import InputIds, Prompts, Sampling
from headrace.engine.requests import GenerateOptions
from headrace.engine.seeds import sample_seed
from headrace.rl.conversations import (
    Conversation,
    ConversationLog,
    ReplyRecord,
    RolloutLimits,
    Status,
    check_conversations,
    new_group,
    read_conversations,
)
from headrace.rl.tools import CallRecord, FunctionTool, ToolBox, ToolUse
from headrace.rl.turn_text import ReadReply, TurnText
from headrace.text import Tokenizer, ToolCall
from headrace.types.errors import ConfigError, DeadlineError, HeadraceError, RequestError
from headrace.types.generation import Generation
from headrace.types.sampling_params import LogprobMode, SamplingParams

__all__ = ["Conversation", "FunctionTool", "RolloutLimits", "RolloutLoop", "new_group", "read_conversations"]

ABORT_EVERY = 0.5
ABORT_GRACE = 30.0
"""Seconds between two asks to end a reply with what it has, and until it is given up."""

Messages = Sequence[Mapping[str, Any]]
Respond = Callable[[Conversation], Messages | None | Awaitable[Messages | None]]
Reward = Callable[[Conversation], float | Awaitable[float]]
OnGroup = Callable[[list[Conversation]], None | Awaitable[None]]


class SamplingEngine(Protocol):
    """What the loop asks of an engine: `AsyncEngine` and `AsyncClient` have it."""

    async def generate(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    async def abort(
        self, request_id: str | None = None, *, prefix: bool = False, all: bool = False, message: str = "Aborted"
    ) -> int: ...


class RolloutLoop:
    """Runs conversations until each is over. An async context manager: leaving it releases the tools.

    engine              an `AsyncEngine`, an `AsyncClient` (whose `admin_key` may abort) or an `Engine`
    tools               Python callables, `FunctionTool`s, tools of verl's `BaseTool` protocol
    tokenizer           for a client: a `Tokenizer`, or the folder of one (None: the engine's)
    sampling_params     of every reply; `max_new_tokens` bounds one reply, seeds are the conversations' own
    limits              what a conversation may take
    respond             called with a conversation whose reply calls nothing: the messages that answer it, or None
    reward              called with a conversation that is over: its reward
    on_group            called with all conversations of a group, once the last is over
    log                 a file to which every conversation is added, as it is over or cut (`read_conversations`)
    template_arguments  extra variables of the chat template
    logprob_mode        what log-probabilities mean (None: the engine's default)

    The three callbacks may be coroutine functions; what they raise ends the run. What a tool raises does not.
    """

    def __init__(
        self,
        engine: SamplingEngine | Engine,
        tools: Iterable[Any] = (),
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        limits: RolloutLimits | None = None,
        respond: Respond | None = None,
        reward: Reward | None = None,
        on_group: OnGroup | None = None,
        log: str | Path | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        logprob_mode: LogprobMode | None = None,
    ) -> None:
        """Raises `ConfigError` naming the argument, `RequestError` for sampling parameters."""
        self._engine: SamplingEngine = engine.asynchronous if isinstance(engine, Engine) else engine
        if not inspect.iscoroutinefunction(getattr(self._engine, "generate", None)):
            message = f"engine must be an AsyncEngine, an AsyncClient or an Engine, not {type(engine).__name__}"
            raise ConfigError(message, field="engine")
        self._box = ToolBox(tools)
        self._given_tokenizer = tokenizer
        self._params = _params_of(sampling_params)
        whole = isinstance(sampling_params, SamplingParams)
        asked: Any = SamplingParams.__struct_fields__ if whole else sampling_params or ()
        self._asked = {name: getattr(self._params, name) for name in asked if name in SamplingParams.__struct_fields__}
        self._limits = limits or RolloutLimits()
        self._respond, self._reward, self._on_group = respond, reward, on_group
        self._template_arguments = template_arguments or {}
        self._logprob_mode = logprob_mode
        self._log = None if log is None else ConversationLog(log)
        self._text: TurnText | None = None
        self._context_length = self._limits.context_length
        self._uses: dict[str, ToolUse] = {}  # of conversations that are not over, which may be continued
        self._groups: dict[str, dict[str, Conversation]] = {}  # those of each that are over, until all are
        self._run: _Run | None = None
        self._is_running = False

    async def run(self, conversations: Iterable[Conversation], *, enough: int | None = None) -> list[Conversation]:
        """Run those that are not over, all at once, and return all of them, in this order.

        They are changed in place. What is cut comes back with status "cut": given to a later run, it goes on from its
        tokens, under the weights of then. Cut are tails over `max_run_tokens`; once `enough` groups are complete, or
        `cut` is called, everything else; and what met an error that says that it may be tried again. A reply is
        cut where it is, a tool that runs is waited for. What an abort of somebody else or an update cuts is resumed at
        once. Those already over count for their groups. After an error, or when the run is cancelled, conversations
        that were not over are of no more use.
        """
        chosen = list(conversations)
        if self._is_running:
            raise RequestError("another run of this loop is in progress", field="conversations")
        if len({each.id for each in chosen}) < len(chosen):
            raise RequestError("a conversation is given twice", field="conversations")
        check_conversations(chosen, are_logged=self._log is not None)
        self._is_running = True
        try:
            return await self._run_all(chosen, _Run(await self._prepared(), self._limits.concurrency, enough))
        finally:
            self._is_running = False

    async def _run_all(self, chosen: list[Conversation], run: _Run) -> list[Conversation]:
        self._run = run
        try:
            for each in chosen:
                if each.is_over:
                    await self._count(each, run)
            tasks = [asyncio.create_task(self._drive(each, run)) for each in chosen if not each.is_over]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._run = None
            run.close()
        return chosen

    def cut(self) -> None:
        """End the run in progress: what is not over is handed back as it is. To be called on the run's loop."""
        if self._run is not None:
            self._run.stop.set()

    async def close(self) -> None:
        """Release the tools of conversations that are not over, and close the log. Raises the first error of a tool,
        once all are released."""
        uses, self._uses = self._uses, {}
        try:
            ends = await asyncio.gather(*(use.close(self._limits.tool_timeout) for use in uses.values()))
        finally:
            if self._log is not None:
                self._log.close()
        for _, error in ends:
            if error is not None:
                raise error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _prepared(self) -> TurnText:
        if self._text is not None:
            return self._text
        tokenizer = self._given_tokenizer
        if isinstance(self._engine, AsyncEngine):
            await self._engine.start()
            tokenizer = tokenizer or self._engine.tokenizer
            bounds = (self._engine.resolved.max_length, self._context_length)
            self._context_length = min(bound for bound in bounds if bound is not None)
        if tokenizer is None:
            raise ConfigError("tokenizer must be given: the engine has none here", field="tokenizer")
        loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
        self._text = TurnText(loaded, self._box.schemas, self._template_arguments)
        return self._text

    async def _drive(self, conversation: Conversation, run: _Run) -> None:
        """One conversation, to its end or until it is cut."""
        async with run.free:
            use = self._uses.setdefault(conversation.id, ToolUse(self._box, conversation.tools_kwargs))
            started = time.monotonic()
            conversation.error = None
            talk = _Talk(conversation, use, run, started + self._limits.timeout - conversation.seconds)
            try:
                conversation.status = await self._advance(talk)
            except ConfigError:
                raise
            except HeadraceError as error:
                conversation.status = "cut" if error.retryable else "error"
                conversation.error = error.info()
            conversation.seconds += time.monotonic() - started
        if conversation.is_over:
            await self._finish(talk)
        if self._log is not None:
            self._log.write(conversation)
        if conversation.is_over:
            await self._count(conversation, run)

    async def _advance(self, talk: _Talk) -> Status:
        """Reply by reply, until there is a reason to stop."""
        conversation, text = talk.conversation, talk.run.text
        if not conversation.prompt_ids:
            conversation.prompt_ids = await talk.run.prompt_ids(conversation.messages)
        while True:
            status = await self._sample(talk)
            if status is not None:
                return status
            turn, reply = talk.read_turn("stop")
            is_last = len(conversation.turns) + 1 >= self._limits.max_turns
            if is_last:
                conversation.turns.append(turn)
                return "turns" if reply.calls or reply.num_unread or self._respond else "done"
            calls, answers = await self._answer(talk, turn, reply)
            conversation.turns.append(msgspec.structs.replace(turn, calls=calls, answers=answers))
            if not answers:
                return "done"
            ids = await text.answer_ids(conversation.ids[-1], answers)
            if len(ids) >= self._room(conversation):
                return "length"
            conversation.add_given(ids)

    async def _sample(self, talk: _Talk) -> Status | None:
        """Sample until the reply ends: None when it has, else why it goes no further."""
        conversation = talk.conversation
        start = talk.begin_turn()
        while True:
            num_partial = len(conversation.ids) - start
            own_room = min(self._room(conversation), self._params.max_new_tokens - num_partial)
            room = min(own_room, self._run_room(talk))
            seconds = talk.deadline - time.monotonic()
            if own_room <= 0:
                return "length"
            if seconds <= 0:
                return "deadline"
            if room <= 0 or talk.run.stop.is_set():
                return "cut"
            conversation.num_resumes += num_partial > 0
            reply = await self._generate(talk, num_partial, room, seconds)
            conversation.add_sampled(reply.token_ids, reply.logprobs, reply.version_spans)
            talk.num_sampled += len(reply.token_ids)
            if reply.finish_reason == "stop":
                return None
            if reply.finish_reason == "length" and len(reply.token_ids) < room:
                return "length"  # the context of a client's engine is full

    async def _generate(self, talk: _Talk, num_partial: int, room: int, seconds: float) -> Generation:
        """Tokens behind those there are. At the deadline, and when the run is cut, those drawn so far."""
        conversation, run = talk.conversation, talk.run
        params = {
            **self._asked,
            "max_new_tokens": room,
            "min_new_tokens": min(room, max(0, self._params.min_new_tokens - num_partial)),
            "seed": talk.seed,
        }
        request_id = f"rollout-{uuid.uuid4().hex}"
        options: GenerateOptions = {
            "request_id": request_id,
            "num_output_ids_in_prompt": num_partial,
            "clip_to_context": True,
            "logprob_mode": self._logprob_mode,
        }
        ids = conversation.prompt_ids + conversation.ids
        task = asyncio.ensure_future(self._engine.generate(input_ids=ids, sampling_params=params, **options))
        try:
            await asyncio.wait({task, run.stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            given_up = time.monotonic() + ABORT_GRACE
            while not task.done():  # asked again: a client's request may not have arrived yet
                if time.monotonic() > given_up:
                    raise DeadlineError(f"a reply did not end within {ABORT_GRACE:g} s of its abort")
                await self._engine.abort(request_id, message="the rollout ends it")
                await asyncio.wait({task}, timeout=ABORT_EVERY)
            return task.result()[0]
        finally:
            task.cancel()

    async def _answer(
        self, talk: _Talk, turn: ReplyRecord, reply: ReadReply
    ) -> tuple[list[CallRecord], list[dict[str, Any]]]:
        """The calls of a reply, run at once, and the messages that answer it; none when it was the last."""
        text, limit = talk.run.text, self._limits.max_turn_calls
        if reply.calls or reply.num_unread:
            calls = [
                *await asyncio.gather(*(self._call(talk, call) for call in reply.calls[:limit])),
                *(_not_run(call, limit) for call in reply.calls[limit:]),
                *[self._box.refusal()] * min(reply.num_unread, limit),
            ]
            return calls, [text.tool_message(call.name, call.content) for call in calls]
        if self._respond is None:
            return [], []
        talk.conversation.turns.append(turn)  # for the callback to see
        try:
            messages = await _settled(self._respond(talk.conversation))
        finally:
            talk.conversation.turns.pop()
        return [], [dict(message) for message in messages or ()]

    async def _call(self, talk: _Talk, call: ToolCall) -> CallRecord:
        seconds = max(0.0, min(self._limits.tool_timeout, talk.deadline - time.monotonic()))
        return await talk.use.answer(call, seconds, self._limits.max_answer_characters)

    async def _finish(self, talk: _Talk) -> None:
        """What is to be done once a conversation is over."""
        conversation = talk.conversation
        talk.end_turn()
        del self._uses[conversation.id]
        conversation.tool_rewards, error = await talk.use.close(self._limits.tool_timeout)
        if error is not None:
            conversation.status, conversation.error = "error", error.info()
        if self._reward is not None:
            conversation.reward = float(await _settled(self._reward(conversation)))

    async def _count(self, conversation: Conversation, run: _Run) -> None:
        """Tell of its group, if it was the last of it."""
        over = self._groups.setdefault(conversation.group, {})
        over[conversation.id] = conversation
        if len(over) < conversation.group_size:
            return
        del self._groups[conversation.group]
        if self._on_group is not None:
            await _settled(self._on_group(sorted(over.values(), key=lambda each: each.index)))
        run.num_groups += 1
        if run.enough is not None and run.num_groups >= run.enough:
            run.stop.set()

    def _room(self, conversation: Conversation) -> int:
        """Tokens that the conversation may still have."""
        num_ids = len(conversation.ids)
        room = self._limits.max_tokens - num_ids
        if self._context_length is not None:
            room = min(room, self._context_length - len(conversation.prompt_ids) - num_ids)
        return room

    def _run_room(self, talk: _Talk) -> int:
        limit = self._limits.max_run_tokens
        return self._params.max_new_tokens if limit is None else limit - talk.num_sampled


class _Run:
    """What the conversations of one run share. Bound to its event loop."""

    def __init__(self, text: TurnText, concurrency: int, enough: int | None) -> None:
        self.text = text
        self.free = asyncio.Semaphore(concurrency)
        self.stop = asyncio.Event()
        self.stopping = asyncio.ensure_future(self.stop.wait())
        self.enough = enough
        self.num_groups = 0
        self._prompts: dict[bytes, asyncio.Task[list[int]]] = {}

    async def prompt_ids(self, messages: Messages) -> list[int]:
        """Rendered once for all that begin alike."""
        key = msgspec.json.encode(messages)
        if key not in self._prompts:
            self._prompts[key] = asyncio.create_task(self.text.prompt_ids(messages))
        return list(await asyncio.shield(self._prompts[key]))

    def close(self) -> None:
        for task in (self.stopping, *self._prompts.values()):
            task.cancel()


class _Talk:
    """One conversation while a run drives it."""

    def __init__(self, conversation: Conversation, use: ToolUse, run: _Run, deadline: float) -> None:
        self.conversation = conversation
        self.use = use
        self.run = run
        self.deadline = deadline
        self.num_sampled = 0

    @property
    def seed(self) -> int:
        """Of the reply that is next, however often it is cut."""
        return sample_seed(self.conversation.seed, len(self.conversation.turns))

    def begin_turn(self) -> int:
        """Where the reply begins: one that was cut goes on."""
        if self.conversation.open_turn is None:
            self.conversation.open_turn = len(self.conversation.ids)
        return self.conversation.open_turn

    def read_turn(self, finish_reason: str) -> tuple[ReplyRecord, ReadReply]:
        """The reply that has ended."""
        conversation = self.conversation
        assert conversation.open_turn is not None, "a turn has begun"
        start, end = conversation.open_turn, len(conversation.ids)
        before = conversation.ids[:start] if start else conversation.prompt_ids
        reply = self.run.text.read(conversation.ids[start:], before)
        conversation.open_turn = None
        return ReplyRecord(start=start, end=end, text=reply.text, finish_reason=finish_reason, seed=self.seed), reply

    def end_turn(self) -> None:
        """Of a reply that has no end, keep what there is."""
        conversation = self.conversation
        if conversation.open_turn is not None and conversation.open_turn < len(conversation.ids):
            conversation.turns.append(self.read_turn(conversation.status)[0])
        conversation.open_turn = None


def _params_of(given: Any) -> SamplingParams:
    params = SamplingParams() if given is None else given
    params = params if isinstance(params, SamplingParams) else SamplingParams.from_dict(params)
    for name, plain in (("n", 1), ("seed", None)):
        if getattr(params, name) != plain:
            message = f"sampling_params.{name} is the conversations' own: see `new_group`"
            raise RequestError(message, field=f"sampling_params.{name}")
    return params


def _not_run(call: ToolCall, limit: int) -> CallRecord:
    content = f"Error: at most {limit} calls of one reply are run"
    return CallRecord(name=call.name, arguments=call.arguments, content=content, fault="invalid")


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
