"""The engine as a caller sees it: what it can be asked. Its start, its parts and its end are `EngineLifecycle`'s.

Every coroutine may be awaited from any event loop in any thread: the work is done on the engine's own loop.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, Unpack, get_args

from headrace.engine import chat, disk_update, groups, probing, rewards, saving
from headrace.engine.control import (
    DEFAULT_UPDATE_TIMEOUT,
    UpdateTerms,
    seconds_of,
    tags_of,
    terms_of,
    terms_of_part,
    version_of,
)
from headrace.engine.fields import InputIds, Prompts, Sampling, name_of, reading_cost
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.lifecycle import EngineLifecycle
from headrace.engine.reading import read_weight
from headrace.engine.requests import CallArguments, GenerateItem, GenerateOptions
from headrace.engine.runtime import Undoable
from headrace.engine.stream import Stream, StreamGroup, cancel_all, whole_samples
from headrace.engine.tensors import NamedTensors, to_tensor
from headrace.engine.update import Run
from headrace.engine.update_session import Manifest, UpdateSession, manifest_of
from headrace.text import run_sized
from headrace.types.generation import Generation
from headrace.types.memory import MemoryTag, OnRelease, Restore
from headrace.types.messages import (
    CoreStatus,
    Digest,
    FlushCache,
    GetStatus,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SetVersion,
    WeightsChecker,
)
from headrace.types.plain_values import as_choice, as_flag
from headrace.types.weights import InFlight, PauseMode, TensorInfo, UpdateMode, UpdateReport, WeightBytes

if TYPE_CHECKING:
    import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _on_engine_loop(
    method: Callable[Concatenate[AsyncEngine, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[AsyncEngine, Parameters], Coroutine[Any, Any, Result]]:
    """Run a coroutine method on the engine's loop, whatever loop awaits it."""

    @functools.wraps(method)
    async def bridged(self: AsyncEngine, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if self._parts is None:
            await self.start()
        self.runtime.check_open()
        return await self.runtime.run(method(self, *args, **kwargs))

    return bridged


class AsyncEngine(EngineLifecycle):
    """A running engine. The constructor returns once it can generate; on an event loop it returns at once, and
    `async with`, `await engine.start()` and every coroutine wait for the rest.

    `settings` are the fields of `EngineConfig`. `inprocess=True` runs the core in a thread of this process instead of a
    process of its own. `executor="free"` replaces the model by one that costs nothing (benchmarks). `progress=False`:
    no bar on a terminal, neither for the start nor for `generate`.

    Raises `ConfigError`, `UnsupportedModelError`, `CheckpointError`; `DeadlineError` after `start_timeout`;
    `EngineDeadError` when the core dies while it starts.
    """

    async def generate(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Generate from text (`prompts`) or token ids (`input_ids`): one or many, with one `SamplingParams` or dict for
        all or a list with one each. Returns one `Generation` per sample, prompt-major. See `GenerateOptions`.

        Raises `RequestError` naming the field; `UnavailableError` and `DeadlineError` as their classes say. An error of
        one sequence drops the others of the call.
        """
        return await self._generate(CallArguments(prompts, input_ids, sampling_params, options))

    chat = _on_engine_loop(chat.chat)

    async def score(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Log-probabilities of given tokens: `generate` with `max_new_tokens=0` and prompt log-probabilities."""
        options["return_prompt_logprobs"] = True
        return await self._generate(CallArguments(prompts, input_ids, sampling_params, options, scores=True))

    async def stream(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Generation, None]:
        """As `generate`, but yields what is new as it comes; `prompt_index` and `index` say whose it is.

        A sequence's last piece has its `finish_reason`. Leaving the iteration drops what has not ended.
        """
        await self.start()
        opening, regret = self.undoable_stream(prompts, input_ids, sampling_params, options)
        group = await self.runtime.run(opening, regret)
        try:
            while pieces := await self.runtime.run_part(group.next_pieces, group.rest):
                for piece in pieces:
                    yield piece
        finally:
            self.runtime.post(group.cancel)

    def undoable_stream(
        self, prompts: Prompts, input_ids: InputIds, sampling_params: Sampling, options: GenerateOptions
    ) -> Undoable[StreamGroup]:
        """How `stream` starts, and what undoes that: for `EngineLoop.run` and `wait`. The group is bound to the
        engine's loop."""
        self.runtime.check_open()
        return self._open_group(CallArguments(prompts, input_ids, sampling_params, options, stream=True)), _drop

    def prepare(self, item: GenerateItem) -> GenerateItem:
        """`item`, checked and with its prompt packed; cheap to submit, and to copy for further samples of the prompt.

        Raises `RequestError` naming the field.
        """
        return (self._parts or self._running).builder.prepare(item)

    def submit(self, item: GenerateItem) -> Stream:
        """Start one sequence. To be called on the engine's loop; the stream too is bound to it."""
        running = self._parts or self._running
        running.runtime.check_open()
        return running.intake.submit(item)

    async def expand(self, call: CallArguments) -> list[GenerateItem]:
        """One item per sample that a call asks for, prompt-major, checked. To be called on the engine's loop.

        Much text is encoded, and many prompts are read, in another thread, so that streams and heartbeats go on.
        """
        self.runtime.check_open()
        size = reading_cost(call.prompts if call.input_ids is None else call.input_ids)
        return await run_sized(size, functools.partial(self._running.builder.expand, call))

    async def submit_all(self, items: Sequence[GenerateItem]) -> list[Stream]:
        """Start all of them, or none. To be called on the engine's loop; the streams too are bound to it."""
        self.runtime.check_open()
        return await self._running.intake.submit_all(items)

    async def finish_all(self, streams: Sequence[Stream], *, progress: bool = True) -> list[Generation]:
        """Their samples, once all have ended; an error of one drops the others. To be called on the engine's loop."""
        try:
            async with self._call_progress.counting(len(streams), is_wanted=progress) as note_end:
                return await whole_samples(streams, note_end)
        finally:
            cancel_all(streams)

    @_on_engine_loop
    async def abort(
        self, request_id: str | None = None, *, prefix: bool = False, all: bool = False, message: str = "Aborted"
    ) -> int:
        """End live sequences now; their callers get what there is, with finish reason "abort".

        `request_id` matches exactly, or as a prefix. Returns how many sequences matched; none is no error.
        """
        message = name_of(message, "message")
        by_prefix, everything = as_flag(prefix, "prefix"), as_flag(all, "all")
        return self._running.intake.abort(request_id, prefix=by_prefix, everything=everything, message=message)

    async def pause(self, mode: PauseMode = "abort", *, timeout: float | None = None) -> None:
        """Stop generating. "keep" and "recompute" hold running sequences, "abort" ends them, "drain" lets them finish.

        New requests wait until `resume`, at most `pause_timeout` seconds. Returns once nothing runs any more. If that
        takes longer than `timeout` seconds (default `control_timeout`), or the call is cancelled, the pause is undone.
        """
        await self.start()
        pausing, regret = self.undoable_pause(mode, timeout)
        await self.runtime.run(pausing, regret)

    def undoable_pause(self, mode: PauseMode, timeout: float | None) -> Undoable[int]:
        """What `pause` does, and what undoes it: for `EngineLoop.run` and `wait`."""
        mode = as_choice(mode, get_args(PauseMode), "mode")
        seconds = seconds_of(timeout)
        client = self.runtime.client
        self.runtime.check_open()
        return client.pause(mode, seconds), client.give_up

    @_on_engine_loop
    async def resume(self) -> None:
        """Go on after `pause`. `UpdateConflictError`, naming what is missing, while an update in buckets is not
        complete, and while live weights are half written."""
        await self.runtime.client.change_for_good(Resume, NoneType)

    @_on_engine_loop
    async def release_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, *, in_flight: OnRelease = "abort", timeout: float | None = None
    ) -> None:
        """Give memory back to the system: "weights", "kv_cache", "cuda_graph", or all. Returns when it is free; what is
        released already stays so.

        Requests in flight are ended with what they have, or, with "recompute", kept and computed again after the
        resume. Requests that come meanwhile wait, at most `pause_timeout` seconds. With "cuda_graph" alone released
        they go on, more slowly. `UpdateConflictError` while an
        update is open; one in buckets of which no call is in progress is dropped instead.
        """
        given, how, seconds = tags_of(tags), as_choice(in_flight, get_args(OnRelease), "in_flight"), seconds_of(timeout)
        await self.runtime.joined.make_way("memory is released")
        await self.runtime.client.change_for_good(lambda call_id: ReleaseMemory(call_id, given, how), NoneType, seconds)

    @_on_engine_loop
    async def resume_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, *, restore: Restore = "auto", timeout: float | None = None
    ) -> None:
        """Take released memory again, in any order. Generation goes on when weights and KV cache are there. Graphs are
        captured again once nothing is released any more.

        Weights come from the copy that `keep_weights_copy` left ("copy"), from the engine's folder if they were its
        own ("disk"), or from a complete update that follows ("await"), until which requests get a `NeedsWeightsError`.
        "auto": from the copy if there is one. Where there is no room, `UnavailableError`, and all stays released.
        """
        given, source, seconds = tags_of(tags), as_choice(restore, get_args(Restore), "restore"), seconds_of(timeout)
        await self.runtime.client.change_for_good(
            lambda call_id: ResumeMemory(call_id, given, source), NoneType, seconds
        )

    @_on_engine_loop
    async def flush_cache(self) -> int:
        """Free every cached page that nothing uses; returns how many. Aborts nothing and is never needed."""
        return await self.runtime.client.call(FlushCache, int)

    async def begin_update(
        self,
        version: str | int,
        manifest: Manifest | None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateSession:
        """Open a weight update. `manifest` lists every tensor to come, as `TensorInfo` or (name, shape, dtype name).

        The whole of it is checked before anything is touched: `WeightUpdateError` names what is unknown, missing
        (unless `partial`), doubled or misshapen; `UpdateConflictError` if another update is open. `timeout` seconds
        after its last call a session is aborted. None: `stage` checks what comes, `commit` names what is missing.
        """
        await self.start()
        terms = terms_of(version, mode, in_flight, timeout, partial)
        return await self.runtime.run(*self.undoable_begin(manifest, terms))

    def undoable_begin(self, manifest: Manifest | None, terms: UpdateTerms) -> Undoable[UpdateSession]:
        """What `begin_update` does, and what undoes it: for `EngineLoop.run` and `wait`."""
        self.runtime.check_open()
        entries = manifest if manifest is None else manifest_of(manifest)
        return self.runtime.joined.begin_other(entries, terms), self.runtime.updater.abort_quietly

    async def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """Send tensors of the manifest: any iterable of (name, tensor) pairs, torch or numpy.

        Each tensor is copied before the next is asked for. Returns once the core has copied all of them.
        """
        await self.stage_by(self.runtime.run, session, named_tensors)

    async def stage_by(self, run: Run, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """As `stage`, awaiting nothing but what `run` makes of coroutines for the engine's loop."""
        self.runtime.check_open()
        await self.runtime.updater.stage(run, session, named_tensors)

    @_on_engine_loop
    async def commit(self, session: UpdateSession) -> UpdateReport:
        """Make the staged weights live between two steps. `WeightUpdateError` names tensors that were not staged. With
        a `DeadlineError`, and when the call is cancelled before it was done, the session is aborted."""
        return await self.runtime.updater.commit(session)

    @_on_engine_loop
    async def abort_update(self, session: UpdateSession | None = None) -> None:
        """Drop a session; None: whichever is open, whoever opened it, if one is. The old weights serve on, unless an
        in-place update had begun to write: then `PoisonedError` answers every request until a complete update lands."""
        if session is None:
            self.runtime.joined.let_go()
        await self.runtime.updater.abort(session)

    init_weights_update_group = _on_engine_loop(groups.init_weights_update_group)
    destroy_weights_update_group = _on_engine_loop(groups.destroy_weights_update_group)
    stage_from_group = _on_engine_loop(groups.stage_from_group)
    update_weights_from_distributed = _on_engine_loop(groups.update_weights_from_distributed)

    async def update_weights_from_tensor(
        self,
        named_tensors: NamedTensors,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        partial: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport:
        """A whole update from (name, tensor) pairs: begin, stage, commit; an error leaves no session open.

        The pairs are read once before anything is sent, because the manifest comes first: an iterator's tensors are
        all held until the end, and refused by name if two share memory or one is written to meanwhile (a sample of
        its values tells, so a write to a few elements may pass). To stream through one buffer, or to change weights
        for as long as they are yielded, call `begin_update`, `stage` and `commit`.
        """
        await self.start()
        terms = terms_of(version, mode, in_flight, timeout, partial)
        return await self.update_by(self.runtime.run, named_tensors, terms)

    async def update_by(self, run: Run, named_tensors: NamedTensors, terms: UpdateTerms) -> UpdateReport:
        """As `update_weights_from_tensor`, awaiting nothing but what `run` makes of coroutines for the loop."""
        self.runtime.check_open()
        begin = self.runtime.joined.begin_other
        return await self.runtime.updater.update_from_tensors(run, named_tensors, terms, begin)

    async def update_weights_from_bucket(
        self,
        named_tensors: NamedTensors,
        version: str | int | None = None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> UpdateReport | None:
        """Some tensors of an update that comes in several calls, as SGLang's clients send theirs: without begin and
        commit. The call after which the model has all of its tensors makes them live; the others return None.

        A tensor that comes again replaces the first. The version may be given with each call or only with the last; a
        call with another one than those before begins the update anew. `mode`, `in_flight` and `timeout` are those of
        the first call. An error in one ends the whole: begin anew. Until it is complete, `resume` is refused; a
        complete update by another road, a release, and `abort_update` drop it. The cache needs no flush.
        """
        await self.start()
        return await self.add_by(self.runtime.run, named_tensors, version, mode, in_flight, timeout)

    async def add_by(self, run: Run, named_tensors: NamedTensors, *terms_given: Any) -> UpdateReport | None:
        """As `update_weights_from_bucket`, awaiting nothing but what `run` makes of coroutines for the loop."""
        self.runtime.check_open()
        joined, updater = self.runtime.joined, self.runtime.updater
        try:
            terms, held = terms_of_part(*terms_given), HeldTensors(named_tensors)
        except BaseException:  # whatever it is, as in `JoinedUpdate.add`
            await run(joined.end())
            raise
        return await joined.add(held.manifest, terms, lambda session, _: updater.stage(run, session, held), run)

    update_weights_from_disk = _on_engine_loop(disk_update.update_weights_from_disk)

    @_on_engine_loop
    async def set_weight_version(self, version: str | int) -> None:
        """Relabel the live weights without changing them."""
        label = version_of(version)
        await self.runtime.client.change_for_good(lambda call_id: SetVersion(call_id, label), NoneType)

    async def get_weights_by_name(self, name: str) -> torch.Tensor:
        """A live tensor by its Hugging Face name, in its Hugging Face shape and the engine's dtype, on the CPU."""
        return to_tensor(await self.read_weight(name))

    @_on_engine_loop
    async def read_weight(
        self, name: str, max_rows: int | None = None, check: Callable[[TensorInfo], None] | None = None
    ) -> WeightBytes:
        """As `get_weights_by_name`, for callers without torch: the bytes and what they are. Of the first `max_rows`
        rows only, if `check` does not refuse what the tensor turns out to be."""
        name = name_of(name, "name")
        return await read_weight(self.runtime.client, name, max_rows, check)

    @_on_engine_loop
    async def digest(self) -> dict[str, str]:
        """The digest of every live tensor by Hugging Face name, 32 hex digits (`headrace.weights.position_sum`):
        comparable with any engine of the same dtype. Summed between steps and all of one version: an update in
        between begins it again."""
        return await self.runtime.client.call(Digest, dict[str, str])

    save_model = _on_engine_loop(saving.save_model)
    save_sharded_model = _on_engine_loop(saving.save_sharded_model)
    save_remote_model = _on_engine_loop(saving.save_remote_model)

    @_on_engine_loop
    async def weights_checker(self, action: str) -> dict[str, str]:
        """SGLang's checker: "snapshot", "reset_tensors" or "compare"."""
        action = name_of(action, "action")
        return await self.runtime.client.change_for_good(
            lambda call_id: WeightsChecker(call_id, action), dict[str, str]
        )

    give_rewards = _on_engine_loop(rewards.give_rewards)

    slow_down = _on_engine_loop(probing.slow_down)
    freeze_gc = _on_engine_loop(probing.freeze_gc)
    start_profile = _on_engine_loop(probing.start_profile)
    stop_profile = _on_engine_loop(probing.stop_profile)
    collective_rpc = _on_engine_loop(probing.collective_rpc)

    @_on_engine_loop
    async def metrics(self) -> dict[str, float]:
        """Counters and gauges of the core (docs/behaviour.md lists them)."""
        return (await self.runtime.client.ask(GetStatus, CoreStatus)).metrics

    @_on_engine_loop
    async def status(self, timeout: float | None = None) -> CoreStatus:
        """The core's account of itself, now. `DeadlineError` after `timeout` seconds (default `control_timeout`)."""
        return await self.runtime.client.ask(GetStatus, CoreStatus, seconds_of(timeout))

    @_on_engine_loop
    async def _generate(self, call: CallArguments) -> list[Generation]:
        streams = await self.submit_all(await self.expand(call))
        return await self.finish_all(streams, progress=call.options.get("progress", True))

    async def _open_group(self, call: CallArguments) -> StreamGroup:
        return StreamGroup(await self.submit_all(await self.expand(call)))


async def _drop(group: StreamGroup) -> None:
    group.cancel()
