"""Pushing a trainer's weights into an engine: one transaction, tensor by tensor, and the proof.

Owns the order of a push. How tensors get to an engine is its own `stage`: within this process, by memory shared with it
on this host, as bytes elsewhere, or broadcast (`headrace.rl.group_road`); where they come from is
`headrace.rl.sources`. Knows nothing of optimizers. Loads no torch of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client import Client
from headrace.engine import DEFAULT_UPDATE_TIMEOUT, Engine
from headrace.engine.control import UpdateTerms, terms_of
from headrace.engine.fields import name_of
from headrace.engine.tensors import NamedTensors, describe, named_pairs
from headrace.rl.group_road import ClientRoad, GroupRoad
from headrace.rl.sources import Listed, NamedTensor, WeightSource, Yielded
from headrace.rl.trainer_ranks import TrainerRanks
from headrace.types.errors import HeadraceError, WeightUpdateError
from headrace.types.plain_values import as_choice, as_flag
from headrace.types.weights import InFlight, TensorInfo, UpdateMode, UpdateReport
from headrace.weights.weight_map import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Weights = torch.nn.Module | NamedTensors | WeightSource


class PushReport(msgspec.Struct, frozen=True):
    """What a push did. `seconds` is the caller's whole wait; `update.pause_ms` is how long no step could run."""

    update: UpdateReport
    seconds: float
    is_verified: bool


class WeightPusher:
    """Pushes a trainer's weights into one engine, as often as they change.

    target   an `Engine` of this process, a `Client` or a `Runtime`; on the ranks of `group` that have none None, or an
             `Engine` of which this process is another rank than the first
    group    the `torch.distributed` ranks that push together, each with its shards, or a mesh of one dimension; all
             construct this, and its rank 0 has the target. None: this process has all of every tensor
    dtype    what tensors are converted to before they are gathered and sent, as "bfloat16"; None: they are sent as they
             are, and the engine converts them

    address  of this process, as a client's server reaches it: then tensors are broadcast over a process group of gloo
             in any case

    Over HTTP a client shares memory with a server on its host. To any other tensors are broadcast over a group of gloo,
    at the address from which the client is connected, which is faster than the bodies of calls; in those they go where
    somebody stands between, or no group can be made: that is found out once, takes 5 s at most, and is logged.

    Raises `WeightUpdateError` naming the argument; what one rank of `group` gives wrong, all raise.
    """

    def __init__(
        self,
        target: Engine | Client | None,
        group: ProcessGroup | DeviceMesh | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        address: str = "",
    ) -> None:
        self._ranks = TrainerRanks(group)
        self._target: Engine | Client | None
        self._road: Engine | ClientRoad | GroupRoad | None
        self._dtype: torch.dtype | None
        (self._target, self._road, self._dtype), _ = self._ranks.attempt(lambda: self._read(target, dtype, address))
        if len({*self._ranks.tell(repr(self._dtype).encode())}) > 1:
            raise WeightUpdateError("the ranks of group give different dtypes", field="dtype")

    def push(
        self,
        weights: Weights,
        version: str | int,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
        verify: bool = False,
    ) -> PushReport:
        """Make `weights` the engine's live weights, labelled `version`. Returns once they serve, on every rank.

        `weights` is a module, a state dict, an iterator of (name, tensor) pairs under Hugging Face names, or a source
        of `headrace.rl.megatron`. Each tensor has been copied when the next is asked for, and no more than one is whole
        in memory at a time. DTensors are gathered tensor by tensor: all ranks of `group` call this, with the same names
        in the same order. What goes wrong on one rank, or in the engine, all raise: where it came from as it is,
        elsewhere as an error that names the rank. The next push may come then. An iterator that gathers by itself has
        to fail on all ranks alike: who waits in a collective of its own is not told.

        `verify` compares the digests of the engine's live memory with those of `weights` in the engine's dtype.
        Raises `WeightUpdateError` naming the tensor when weights cannot be read or the engine refuses them (the old
        ones serve on, unless they were being overwritten in place: see `begin_update`), or, after the fact, when what
        the engine reports or holds is not what was sent.
        """
        started = time.perf_counter()
        flag: Any = verify
        (is_verified, terms), _ = self._ranks.attempt(
            lambda: (as_flag(flag, "verify", WeightUpdateError), terms_of(version, mode, in_flight, timeout))
        )
        engine = self._target if isinstance(self._target, Engine) else None
        is_tied = bool(self._ranks.agree(b"tied" if engine and engine.resolved.model.tie_word_embeddings else b""))
        with contextlib.ExitStack() as undo:

            def open_on_target() -> tuple[_Sending | None, Iterator[NamedTensor]]:
                source = self._source(weights, keep_tied_head=not is_tied)
                pairs, target = iter(source), self._target
                if target is None or self._road is None:
                    return None, pairs
                return undo.enter_context(_Sending(target, self._road, source.manifest, terms, is_verified)), pairs

            (sending, pairs), _ = self._ranks.attempt(open_on_target)
            update, _ = self._ranks.attempt(lambda: self._send(sending, pairs))
            report = update and PushReport(update, time.perf_counter() - started, is_verified)
            return msgspec.msgpack.decode(self._ranks.agree(msgspec.msgpack.encode(report)), type=PushReport)

    def _read(
        self, given: Any, dtype: Any, address: Any
    ) -> tuple[Engine | Client | None, Engine | ClientRoad | GroupRoad | None, torch.dtype | None]:
        """This rank's target, the way to it, and the dtype."""
        if given is not None and not isinstance(given, (Engine, Client)):
            message = f"target must be an Engine, a Client or a Runtime, not {type(given).__name__}"
            raise WeightUpdateError(message, field="target")
        target = None if isinstance(given, Engine) and not given.is_leading else given
        if (target is None) != (self._ranks.rank > 0):
            raise WeightUpdateError("rank 0 of group has the target, and no other rank has one", field="target")
        if name_of(address, "address") and isinstance(target, Engine):
            raise WeightUpdateError("an Engine reads this process's memory, at no address", field="address")
        found = None if dtype is None else float_dtype(dtype)
        if isinstance(target, Client):
            return target, GroupRoad(target, address) if address else ClientRoad(target), found
        return target, target, found

    def _send(self, sending: _Sending | None, pairs: Iterator[NamedTensor]) -> UpdateReport | None:
        try:
            update = None if sending is None else sending.send(pairs)
        except Exception:
            self._drain(pairs)
            raise
        self._drain(pairs)
        return update

    def _drain(self, pairs: Iterator[NamedTensor]) -> None:
        """Of what was not sent others have still to give their parts."""
        if self._ranks.num_ranks > 1:
            for _ in pairs:
                pass

    def _source(self, weights: Any, *, keep_tied_head: bool) -> WeightSource:
        if hasattr(weights, "manifest"):
            source: WeightSource = weights
            return source
        if isinstance(weights, Mapping) or hasattr(weights, "named_parameters"):
            return Listed(weights, self._dtype, self._ranks, keep_tied_head=keep_tied_head)
        return Yielded(weights, self._dtype, self._ranks)


class _Sending:
    """An update that is open on a target; left before its commit, it is aborted."""

    def __init__(
        self,
        target: Engine | Client,
        road: Engine | ClientRoad | GroupRoad,
        manifest: Iterable[TensorInfo] | None,
        terms: UpdateTerms,
        is_verified: bool,
    ) -> None:
        self._target = target
        self._road = road
        options: dict[str, Any] = {"mode": terms.mode, "in_flight": terms.in_flight, "timeout": terms.timeout_s}
        self._session = target.begin_update(terms.version, manifest, **options)
        self._is_over = False
        self._digests = Digests(self._session.dtype) if is_verified else None
        self._num_sent = 0

    def send(self, pairs: Iterable[NamedTensor]) -> UpdateReport:
        """All of them, made live and compared."""
        self._road.stage(self._session, self._noted(pairs))
        report = self._target.commit(self._session)
        self._is_over = True
        label = self._session.version
        if (report.version, report.num_tensors) != (label, self._num_sent):
            sent, got = f"{self._num_sent} as {label}", f"{report.num_tensors} as {report.version}"
            raise WeightUpdateError(f"tensors sent: {sent}; taken by the engine: {got}", field="version")
        if self._digests is not None:
            self._digests.require_live(self._target)
        return report

    def _noted(self, pairs: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in pairs:
            self._num_sent += 1
            if self._digests is not None:
                self._digests.add(name, tensor)
            yield name, tensor

    def __enter__(self) -> _Sending:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_over:
            with contextlib.suppress(HeadraceError):  # it has ended by itself
                self._target.abort_update(self._session)


class Digests:
    """Digests of tensors in one dtype, by name: what `Engine.digest` says of an engine that holds them."""

    def __init__(self, dtype: Any) -> None:
        """`WeightUpdateError` (field "dtype") for one that no engine holds."""
        self._dtype = float_dtype(dtype)
        self._keys: dict[str, Any] = {}  # by device
        self.by_name: dict[str, str] = {}

    def add(self, name: str, tensor: Any) -> None:
        """`WeightUpdateError` naming a tensor that has none."""
        self.by_name[name] = self._of(name, tensor)

    def require_live(self, target: Engine | Client) -> None:
        """`WeightUpdateError` naming what is not live as it is here. What has no digest of its own there, as experts in
        one tensor or a tied head, is read back."""
        live = target.digest()
        for name in self.by_name.keys() - live.keys():
            live[name] = self._of(name, target.get_weights_by_name(name))
        names = sorted(name for name, digest in self.by_name.items() if digest != live[name])
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            message = f"live weights differ from those sent in {len(names)} tensors: {shown}"
            raise WeightUpdateError(message, field=names[0])

    def _of(self, name: str, tensor: Any) -> str:
        import torch

        from headrace.weights.position_sum import PositionKeys, position_digest

        if not isinstance(tensor, torch.Tensor) or describe(name, tensor).dtype not in FLOAT_DTYPES:
            raise WeightUpdateError(f"{name} is no torch tensor of {', '.join(FLOAT_DTYPES)}", field=name)
        plain = tensor.detach().to(self._dtype).resolve_neg().contiguous().view(-1)
        device = str(plain.device)
        keys = self._keys.get(device) or self._keys.setdefault(device, PositionKeys(plain.device))
        return position_digest(plain, keys)


def push_weights(
    target: Engine | Client,
    weights: Weights,
    version: str | int,
    *,
    mode: UpdateMode = "auto",
    in_flight: InFlight = "drain",
    verify: bool = False,
) -> PushReport:
    """One push by one process. See `WeightPusher.push`."""
    return WeightPusher(target).push(weights, version, mode=mode, in_flight=in_flight, verify=verify)


def tensor_digests(pairs: Iterable[tuple[str, torch.Tensor]], dtype: str) -> dict[str, str]:
    """The digest of each tensor in `dtype`: what `Engine.digest` says of an engine that holds it.

    `dtype` is a dtype that an engine may hold, as "float32". Raises `WeightUpdateError` naming the field or the tensor.
    """
    digests = Digests(dtype)
    for name, tensor in named_pairs(pairs):
        digests.add(name, tensor)
    return digests.by_name


def float_dtype(dtype: Any) -> torch.dtype:
    """A dtype that an engine may hold, by its name or itself."""
    import torch

    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    found: torch.dtype = getattr(torch, as_choice(name, FLOAT_DTYPES, "dtype", WeightUpdateError))
    return found
