"""Looking into an engine that runs: slowed down, traced, and asked by name; methods of `AsyncEngine`.

Owns their checks, and the closed list of methods that `collective_rpc` calls.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.engine.control import seconds_of
from headrace.engine.fields import name_of
from headrace.types.errors import DeadlineError, RequestError
from headrace.types.messages import FreezeGc, Profile, SlowDown
from headrace.types.plain_values import as_choice, as_flag, as_integer, as_list, as_number, as_path, plain_text
from headrace.types.profile import ACTIVITIES, Activity, ProfileTerms

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine

MAX_SLOW_SECONDS = 10.0
MAX_PROFILED_STEPS = 1 << 20
_PROFILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")

RPC_METHODS = (
    *("abort", "digest", "flush_cache", "freeze_gc", "metrics", "pause", "resume", "set_weight_version", "slow_down"),
    *("status", "stop_profile", "weights_checker", "release_memory_occupation", "resume_memory_occupation"),
    *("init_weights_update_group", "destroy_weights_update_group", "update_weights_from_distributed"),
)
"""What may be called by name: nothing that takes a path, an object, or the place of a session."""


async def slow_down(self: AsyncEngine, forward_sleep_time: float | None = None) -> None:
    """Wait so many seconds before each step, for tests; None or 0: no more."""
    seconds = 0.0 if forward_sleep_time is None else as_number(forward_sleep_time, "forward_sleep_time")
    if not 0 <= seconds <= MAX_SLOW_SECONDS:
        message = f"forward_sleep_time must be from 0 to {MAX_SLOW_SECONDS:g} seconds, not {seconds:g}"
        raise RequestError(message, field="forward_sleep_time")
    await self.runtime.client.call(lambda call_id: SlowDown(call_id, seconds), NoneType)


async def freeze_gc(self: AsyncEngine) -> None:
    """Collect the core's garbage now, and what is left there never again, so that no collection interrupts a step."""
    await self.runtime.client.call(FreezeGc, NoneType)


async def start_profile(
    self: AsyncEngine,
    output_dir: str | None = None,
    num_steps: int | None = None,
    activities: Sequence[Activity] | None = None,
    *,
    with_stack: bool = False,
    record_shapes: bool = False,
    profile_id: str | None = None,
) -> str:
    """Trace what the core computes, with torch's profiler, until `stop_profile` or for `num_steps` steps. Returns the
    file that the trace will be in, in Chrome's format: in `output_dir`, or in a folder of the core's own.

    `activities` are "CPU" and "GPU"; all that there are by default. `UpdateConflictError` while a trace goes on.
    """
    kinds = as_list(activities or (), "activities", "a list of words", len(ACTIVITIES))
    terms = ProfileTerms(
        folder="" if output_dir is None else str(as_path(output_dir, "output_dir", RequestError)),
        name=_profile_name(profile_id),
        activities=tuple(as_choice(kind, ACTIVITIES, "activities") for kind in kinds),
        num_steps=_num_steps(num_steps),
        with_stack=as_flag(with_stack, "with_stack"),
        record_shapes=as_flag(record_shapes, "record_shapes"),
    )
    return await self.runtime.client.call(lambda call_id: Profile(call_id, terms), str)


async def stop_profile(self: AsyncEngine) -> str:
    """End the trace. Returns its file, which is complete; of one that has ended by itself too."""
    return await self.runtime.client.call(lambda call_id: Profile(call_id, None), str)


async def collective_rpc(
    self: AsyncEngine,
    method: str,
    timeout: float | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Call one of `RPC_METHODS` by its name. Returns what it comes to, as plain values, once for each rank: all do the
    same. `DeadlineError` after `timeout` seconds, if it is given."""
    name, given = as_choice(method, RPC_METHODS, "method"), as_list(args, "args", "a list of arguments")
    seconds = seconds_of(timeout)
    if not isinstance(kwargs, Mapping | None):
        raise RequestError("kwargs must be arguments by name", field="kwargs")
    called = getattr(self, name)
    try:
        inspect.signature(called).bind(*given, **(kwargs or {}))
    except TypeError as error:
        raise RequestError(f"{name}: {error}", field="args") from None
    try:
        async with asyncio.timeout(seconds):
            result = msgspec.to_builtins(await called(*given, **(kwargs or {})))
            return [result] * self.resolved.num_ranks
    except TimeoutError:
        raise DeadlineError(f"{name} was not over after {seconds:g} s", field="timeout") from None


def _num_steps(num_steps: Any) -> int:
    if num_steps is None:
        return 0
    count = as_integer(num_steps, "num_steps")
    if not 1 <= count <= MAX_PROFILED_STEPS:
        raise RequestError(f"num_steps must be from 1 to {MAX_PROFILED_STEPS}, not {count}", field="num_steps")
    return count


def _profile_name(profile_id: Any) -> str:
    if profile_id is None:
        return ""
    name = plain_text(name_of(profile_id, "profile_id"))
    if not _PROFILE_NAME.fullmatch(name):
        raise RequestError("profile_id must be letters, digits, '.', '_' and '-', at most 100", field="profile_id")
    return str(name)
