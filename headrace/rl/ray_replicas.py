"""Many replicas of one model as actors of Ray's, and one handle to all of them: generate, update weights, close.

Owns their placement, which of them is asked what, and the fence of an update: once it returns, no replica that serves
has older weights. Where they serve, and what a router knows of them, `ReplicaRoster` owns; what a replica is,
`ReplicaActor`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import secrets
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headrace.config import EngineConfig
from headrace.engine import DEFAULT_UPDATE_TIMEOUT
from headrace.engine.control import terms_of
from headrace.engine.fields import InputIds, Prompts, Sampling, sources
from headrace.engine.tensors import NamedTensors, named_pairs
from headrace.rl.ray_actors import ReplicaActor
from headrace.rl.ray_roster import EnrolledReplica, ReplicaRoster, UpdateOfAll
from headrace.server.options import ServerOptions
from headrace.types.errors import (
    ConfigError,
    DeadlineError,
    EngineDeadError,
    HeadraceError,
    RequestError,
    UnavailableError,
)
from headrace.types.generation import Generation
from headrace.types.plain_values import as_integer, as_number, as_seconds, hint
from headrace.types.weights import InFlight, UpdateMode, UpdateReport

BUCKET_BYTES = 256 << 20
"""Of tensors that are in Ray's object store at a time."""
DEFAULT_GENERATE_TIMEOUT = 3600.0
PLACE_SECONDS = 120.0
START_SECONDS = 120.0
"""For all of a start but the engine's own `start_timeout`: Ray's process, imports, the weights of another replica."""
ROSTER_SECONDS = 60.0
CLOSE_SECONDS = 60.0
MAX_CALLS = 4096
"""That one replica answers at a time."""

logger = logging.getLogger(__name__)


class RayReplicas:
    """`num_replicas` engines of `model`, each in an actor with an HTTP server. `ray.init` comes first. A context
    manager; the handle may be given to other tasks and actors, but only the one that was made here ends the replicas,
    by `close` or with its process.

    num_cpus, num_gpus   what Ray sets aside for each; `num_gpus` is `tp_size` times `pp_size`, or 0 for CPUs
    strategy             how Ray places them: "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"
    placement_group      one that is there already, of which replica i takes bundle i; it stays when they end
    host                 address that servers listen on. Over several hosts "0.0.0.0", which tells each node's own
    router               address of a `headrace router`, or another that takes SGLang's POST /workers: each replica is
                         registered there once it serves, and taken away when it ends
    router_key           the router's admin key
    max_restarts         how often Ray starts each again whose process has ended; -1: always
    settings             fields of `EngineConfig` and `ServerOptions`. Of a `seed` each replica has its own, plus its
                         number. Without an `api_key` one is made: `api_key`

    Raises `ConfigError` and `CheckpointError` naming the field, and `DeadlineError` where Ray has no room. Nothing is
    left then.
    """

    def __init__(
        self,
        model: str | Path,
        num_replicas: int = 1,
        *,
        num_cpus: float = 1,
        num_gpus: float = 0,
        strategy: str = "PACK",
        placement_group: Any = None,
        host: str = "127.0.0.1",
        router: str = "",
        router_key: str | None = None,
        max_restarts: int = 3,
        **settings: Any,
    ) -> None:
        number = as_integer(num_replicas, "num_replicas", ConfigError)
        if number < 1:
            raise ConfigError(f"num_replicas must be at least 1, got {number}", field="num_replicas")
        engine, options = _split({"model": str(model), "api_key": secrets.token_urlsafe(32), **settings})
        self.api_key: str = options["api_key"]
        ServerOptions.from_dict(options).check_address(host)
        config = EngineConfig.from_dict(engine)
        self._verdict_seconds = config.control_timeout + ROSTER_SECONDS
        bundle = _bundle(num_cpus, num_gpus)
        as_integer(max_restarts, "max_restarts", ConfigError)
        terms = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "max_restarts": max_restarts}
        self._turns = itertools.count()
        own_group = None if placement_group is not None else _placed([bundle] * number, strategy)
        self._roster = (
            ray.remote(ReplicaRoster).options(num_cpus=0, max_concurrency=MAX_CALLS).remote(router, router_key)
        )
        self._actors: list[Any] = []
        self._finalizer: Any = weakref.finalize(self, _end, self._roster, self._actors, own_group)
        try:
            for index in range(number):
                place = PlacementGroupSchedulingStrategy(placement_group or own_group, index)
                seeded = {**engine, "seed": engine["seed"] + index} if engine.get("seed") is not None else engine
                make = ray.remote(ReplicaActor).options(**terms, max_concurrency=MAX_CALLS, scheduling_strategy=place)
                self._actors.append(make.remote(index, self._roster, seeded, options, host))
            _answers([actor.started.remote() for actor in self._actors], config.start_timeout + START_SECONDS, "start")
        except BaseException:  # whatever it is: nobody has these replicas, to close them
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        """Addresses of the replicas that serve now; `api_key` is theirs."""
        return [member.url for member in self._members()]

    def generate(
        self,
        prompts: Prompts = None,
        input_ids: InputIds = None,
        sampling_params: Sampling = None,
        *,
        timeout: float = DEFAULT_GENERATE_TIMEOUT,
        **options: Any,
    ) -> list[Generation]:
        """As `Engine.generate`, with the prompts shared out over all replicas, in runs of equal length. What a replica
        was asked that dies meanwhile is asked of another.

        Raises what `Engine.generate` does; `UnavailableError` if no replica is left to ask, `DeadlineError` after
        `timeout` seconds.
        """
        deadline = time.monotonic() + as_seconds(timeout, "timeout")
        field, given = sources(prompts, input_ids)
        found: dict[int, list[Generation]] = {}
        waiting = list(_shares(field, given, sampling_params, options, len(self._members())))
        for _ in range(len(self._actors) + 1):
            waiting = self._ask(waiting, deadline, found)
            if not waiting:
                return [each for first in sorted(found) for each in found[first]]
        raise UnavailableError(f"{sum(share.num_prompts for share in waiting)} prompts found no replica that lives")

    def update_weights(
        self,
        named_tensors: NamedTensors,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> dict[int, UpdateReport]:
        """Complete new weights for all replicas, from (name, tensor) pairs, torch or numpy; each tensor is copied
        before the next is asked for. Returns the report of each replica that took them, by its number.

        When it returns, no replica that serves has other weights: one that failed to take what others took is ended,
        and Ray starts it again, upon which it takes the weights of another. If none took them the old ones serve on,
        and the error is raised: `WeightUpdateError` naming the tensor, `UpdateConflictError` while another update is
        open, `DeadlineError` after `timeout` seconds.
        """
        terms = terms_of(version, mode, in_flight, timeout)
        options = {"mode": terms.mode, "in_flight": terms.in_flight, "timeout": terms.timeout_s}
        seconds = terms.timeout_s + self._verdict_seconds
        begun: UpdateOfAll = _answer(self._roster.begin_update.remote(seconds), ROSTER_SECONDS, "the roster")
        update = _Update(begun.members, terms.timeout_s, self._verdict_seconds)
        try:
            update.call("begin_update", terms.version, options)
            for bucket in _buckets(named_tensors):
                update.call("stage_update", bucket)
            return update.commit()
        finally:
            for number in update.end():
                _answer(self._roster.dismiss.remote(number), ROSTER_SECONDS, "the roster")
            done = self._roster.end_update.remote(begun.number, bool(update.reports))
            _answer(done, ROSTER_SECONDS, "the roster")

    def versions(self) -> dict[int, str]:
        """Label of the live weights of each replica that serves, by its number."""
        members = self._members()
        found = _answers([member.actor.live.remote() for member in members], ROSTER_SECONDS, "say their versions")
        return {member.number: version for member, (version, _) in zip(members, found, strict=True)}

    def close(self) -> None:
        """End all replicas: what runs is answered with what there is. Idempotent; of a copy of the handle, nothing."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finalizer": None, "_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turns=itertools.count())

    def _ask(self, shares: list[_Share], deadline: float, found: dict[int, list[Generation]]) -> list[_Share]:
        """Ask a replica for each share; samples go to `found`, by their first prompt. Returns what has to be asked of
        another. After an error nothing of the call goes on."""
        members = self._members()
        if not members:
            raise UnavailableError("no replica serves at the moment")
        asked = []
        for share in shares:
            member = members[next(self._turns) % len(members)]
            asked.append((share, member, member.actor.generate.remote(**share.arguments)))
        lost = []
        try:
            for share, member, answer in asked:
                try:
                    pieces = _answer(answer, deadline - time.monotonic(), f"replica {member.number}")
                    found[share.first] = [_moved(each, share.first) for each in pieces]
                except EngineDeadError as error:
                    logger.warning("%d prompts are asked of another replica: %s", share.num_prompts, error)
                    lost.append(share)
        except BaseException:  # whatever it is, nobody waits for the others any more
            for _, _, answer in asked:
                ray.cancel(answer)
            raise
        return lost

    def _members(self) -> list[EnrolledReplica]:
        members: list[EnrolledReplica] = _answer(self._roster.members.remote(), ROSTER_SECONDS, "the roster")
        return members


class _Share(msgspec.Struct, frozen=True):
    """Prompts of a call in a row, from number `first` on, as one replica is asked for them."""

    first: int
    num_prompts: int
    arguments: dict[str, Any]


def _shares(
    field: str, given: list[Any], sampling_params: Any, options: dict[str, Any], num_replicas: int
) -> Iterator[_Share]:
    """A call in parts, one for each replica at most. What is listed per prompt is cut with them."""
    listed = {"sampling_params": sampling_params, **options}
    per_prompt = ("sampling_params", "request_id", "num_output_ids_in_prompt")
    for name in per_prompt:
        value = listed.get(name)
        if isinstance(value, (list, tuple)) and len(value) != len(given):
            raise RequestError(f"{name} holds {len(value)} values for {len(given)} prompts", field=name)
    if isinstance(request_id := listed.get("request_id"), str) and len(given) > 1:
        listed["request_id"] = [f"{request_id}_{index}" for index in range(len(given))]
    size = math.ceil(len(given) / max(1, num_replicas))
    for first in range(0, len(given), size):
        end = min(first + size, len(given))
        cut = {
            name: value[first:end] if name in per_prompt and isinstance(value, (list, tuple)) else value
            for name, value in listed.items()
        }
        yield _Share(first, end - first, {field: given[first:end], **cut})


def _moved(piece: Generation, first: int) -> Generation:
    """It by the number that its prompt has in the whole call."""
    return msgspec.structs.replace(piece, prompt_index=piece.prompt_index + first)


class _Silent(DeadlineError):
    """An actor did not answer: nobody knows what it did."""


class _Update:
    """One update on its way to members. Owns who of them still has all of it; those who do not are left behind."""

    def __init__(self, members: Iterable[EnrolledReplica], seconds: float, verdict_seconds: float) -> None:
        """Members have `seconds` for all up to the commit, which they answer within `verdict_seconds`."""
        self.reports: dict[int, UpdateReport] = {}
        self._members = list(members)
        self._failed: dict[int, HeadraceError] = {}
        self._deadline = time.monotonic() + seconds
        self._verdict_seconds = verdict_seconds

    def call(self, method: str, *args: Any) -> dict[int, Any]:
        """Have all that are left do this; their answers by number. Raises the first error if none is left."""
        left = [member for member in self._members if member.number not in self._failed]
        answers = [(member.number, getattr(member.actor, method).remote(*args)) for member in left]
        found = {}
        for number, answer in answers:
            try:
                found[number] = _answer(answer, self._deadline - time.monotonic(), f"replica {number}")
            except HeadraceError as error:
                self._failed[number] = error
        if not found:
            raise next(iter(self._failed.values()), UnavailableError("no replica serves at the moment"))
        return found

    def commit(self) -> dict[int, UpdateReport]:
        """Make it live. Late is what an engine calls late, and has aborted then: its verdict is waited for."""
        self._deadline = time.monotonic() + self._verdict_seconds
        self.reports = self.call("commit_update")
        return self.reports

    def end(self) -> list[int]:
        """Leave nothing open; returns the numbers of those that are to serve no more. They have other weights than
        those that took the update, or nobody knows which: they are started again, if they are not dead already."""
        behind = [member for member in self._members if member.number not in self.reports]
        ended = []
        for member in behind:
            error = self._failed.get(member.number)
            if isinstance(error, EngineDeadError):
                ended.append(member.number)
            elif self.reports or isinstance(error, _Silent):
                logger.error("replica %d is started again: it did not take an update: %s", member.number, error)
                ray.kill(member.actor, no_restart=False)
                ended.append(member.number)
            else:
                with contextlib.suppress(HeadraceError):  # its session is over, or it dies just now
                    _answer(member.actor.abort_update.remote(), ROSTER_SECONDS, f"replica {member.number}")
        return ended


def _buckets(named_tensors: NamedTensors) -> Iterator[list[tuple[str, Any]]]:
    """(name, reference to the tensor) pairs, in lists of up to `BUCKET_BYTES`. Each is copied to Ray's object store
    before the next is asked for, and is there as long as its list is."""
    bucket: list[tuple[str, Any]] = []
    num_bytes = 0
    for name, tensor in named_pairs(named_tensors):
        plain = tensor.detach().cpu() if hasattr(tensor, "detach") else tensor
        if bucket and num_bytes + plain.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, ray.put(plain)))
        num_bytes += plain.nbytes
    if bucket:
        yield bucket


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engine's settings and the server's. `ConfigError` names one of neither."""
    engine, options = EngineConfig.__struct_fields__, ServerOptions.__struct_fields__
    for name in settings:
        if name not in engine and name not in options:
            message = f"{name} is no setting of replicas, an engine or a server{hint(name, (*engine, *options))}"
            raise ConfigError(message, field=name)
    return (
        {name: value for name, value in settings.items() if name in engine},
        {name: value for name, value in settings.items() if name in options},
    )


def _bundle(num_cpus: Any, num_gpus: Any) -> dict[str, float]:
    """What a replica needs, in the words of a placement group, which has no zeros."""
    given = {"CPU": ("num_cpus", num_cpus), "GPU": ("num_gpus", num_gpus)}
    needs = {kind: as_number(value, name, ConfigError) for kind, (name, value) in given.items()}
    bundle = {kind: need for kind, need in needs.items() if need > 0}
    if not bundle or min(needs.values()) < 0:
        raise ConfigError(f"num_cpus {num_cpus} and num_gpus {num_gpus} are no place for a replica", field="num_cpus")
    return bundle


def _placed(bundles: list[dict[str, float]], strategy: str) -> Any:
    """A placement group that Ray has room for."""
    try:
        group = ray.util.placement_group(bundles, strategy=strategy)
    except ValueError as error:
        raise ConfigError(f"strategy: {error}", field="strategy") from None
    if not group.wait(PLACE_SECONDS):
        ray.util.remove_placement_group(group)
        message = f"Ray had no room for {len(bundles)} replicas of {bundles[0]} within {PLACE_SECONDS:g} s"
        raise DeadlineError(message, field="num_replicas")
    return group


def _answers(references: list[Any], seconds: float, what: str) -> list[Any]:
    deadline = time.monotonic() + seconds
    return [_answer(each, deadline - time.monotonic(), f"{what}: a replica") for each in references]


def _answer(reference: Any, seconds: float, who: str) -> Any:
    """What an actor answers. Its own errors are raised as they are there; `EngineDeadError` if it is gone."""
    try:
        return ray.get(reference, timeout=max(0.0, seconds))
    except GetTimeoutError:
        raise _Silent(f"{who} did not answer in time", field="timeout") from None
    except RayTaskError as error:
        if isinstance(error.cause, HeadraceError):
            raise error.cause from None
        raise
    except RayError as error:
        raise EngineDeadError(f"{who} is gone: {str(error).strip().splitlines()[0]}") from None


def _end(roster: Any, actors: list[Any], group: Any) -> None:
    """End the replicas in order, then their processes. What is gone already is no error."""
    if not ray.is_initialized():
        return  # Ray has ended them with itself
    ends = [roster.close.remote(), *(actor.close.remote() for actor in actors)]
    ray.wait(ends, num_returns=len(ends), timeout=CLOSE_SECONDS)
    for actor in (*actors, roster):
        ray.kill(actor)
    if group is not None:
        ray.util.remove_placement_group(group)
