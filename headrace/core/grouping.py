"""The trainers' groups that a replica is part of. Owns them by name, and the calls that wait until one is joined.

Knows no tensors: what arrives at a group is staged by whoever asks for it (`headrace.core.staging`). What rank 0 sends
is sent whether it is wanted or not, and broadcasts have no names: one that were left out would be taken for the next.
So all that a call announces is received, also of one that is refused, or the group cannot be used any more.
"""

from __future__ import annotations

import msgspec

from headrace.core.executor import Executor, WeightGroup
from headrace.core.outbox import Outbox
from headrace.types.errors import DeadlineError, HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.messages import Discard, JoinGroup, Receive
from headrace.types.weights import ELEMENT_BYTES, TensorInfo

FIELD = "group_name"
_LEAST_SECONDS = 5.0


class _Joining(msgspec.Struct, frozen=True):
    """A group that is being joined for a call."""

    terms: JoinGroup
    group: WeightGroup


class GroupControl:
    """The groups of one replica."""

    def __init__(self, executor: Executor, outbox: Outbox) -> None:
        self._executor = executor
        self._outbox = outbox
        self._groups: dict[str, WeightGroup] = {}
        self._joined_by: dict[str, int] = {}  # which call
        self.joining: dict[int, _Joining] = {}
        """By call."""

    def join(self, terms: JoinGroup, now: float) -> None:
        """Begin to join; the call is answered by `advance`. A group that cannot be used any more gives way."""
        former = self._groups.get(terms.name)
        if former is not None and former.refusal() is None:
            raise UpdateConflictError(f"weight group {terms.name!r} is joined; destroy it first", field=FIELD)
        if any(each.terms.name == terms.name for each in self.joining.values()):
            raise UpdateConflictError(f"weight group {terms.name!r} is being joined", field=FIELD)
        self.joining[terms.call_id] = _Joining(terms, self._executor.join_group(terms, terms.deadline - now))
        if former is not None:
            del self._groups[terms.name], self._joined_by[terms.name]

    def leave(self, name: str) -> None:
        """Leave a group, joined or not. `WeightUpdateError` if there is none of that name."""
        for each in list(self.joining.values()):
            if each.terms.name == name:
                self._refuse(each, UpdateConflictError(f"weight group {name!r} was destroyed", field=FIELD))
                return
        group = self._groups.pop(name, None)
        if group is None:
            raise _unknown(name)
        del self._joined_by[name]
        group.fail("it was destroyed")

    def require(self, name: str) -> WeightGroup:
        """A group that can be used. `WeightUpdateError` if there is none of that name, `UpdateConflictError` if it
        cannot be used any more."""
        group = self._groups.get(name)
        if group is None:
            raise _unknown(name)
        refusal = group.refusal()
        if refusal is not None:
            raise refusal
        return group

    def skip(self, command: Receive, now: float) -> None:
        """Receive and forget what a refused call announces."""
        seconds = max(_LEAST_SECONDS, command.deadline - now)
        self._skip(command.group, tuple(each.info for each in command.tensors), command.packing, seconds)

    def discard(self, command: Discard) -> None:
        """Receive and forget what is sent, or give the group up where nobody knows what that is."""
        self._skip(command.group, command.tensors, command.packing, command.seconds)

    def _skip(self, name: str, tensors: tuple[TensorInfo, ...] | None, packing: int, seconds: float) -> None:
        group = self._groups.get(name)
        if group is None or group.problem is not None:
            return
        if tensors is None or any(info.dtype not in ELEMENT_BYTES for info in tensors):
            group.fail("a call was refused that does not say how much is sent for it")
        else:
            group.receive(tensors, packing, seconds).drop()

    def advance(self, now: float) -> None:
        """Answer calls whose group is joined, or never will be, or was not by the deadline."""
        for call_id, each in list(self.joining.items()):
            if each.group.problem is not None:
                self._refuse(each, each.group.problem)
            elif each.group.is_joined:
                del self.joining[call_id]
                self._groups[each.terms.name] = each.group
                self._joined_by[each.terms.name] = call_id
                self._outbox.reply(call_id)
            elif now >= each.terms.deadline:
                self._refuse(each, _late(each.terms))

    def give_up(self, call_id: int, error: HeadraceError) -> None:
        """Undo the joining of this call, whether it has come to an end or not."""
        if call_id in self.joining:
            self._refuse(self.joining[call_id], error)
        for name in [name for name, joined_by in self._joined_by.items() if joined_by == call_id]:
            self.leave(name)

    def end(self, error: HeadraceError) -> None:
        """Answer the calls that wait with `error`."""
        for each in list(self.joining.values()):
            self._refuse(each, error)

    def close(self) -> None:
        """Leave all groups, without waiting for their threads."""
        for group in (*self._groups.values(), *(each.group for each in self.joining.values())):
            group.fail("the engine has ended")
        self._groups.clear()
        self._joined_by.clear()
        self.joining.clear()

    def _refuse(self, each: _Joining, error: HeadraceError) -> None:
        del self.joining[each.terms.call_id]
        each.group.fail("it was not joined in time")
        self._outbox.refuse(each.terms.call_id, error.info())


def _unknown(name: str) -> WeightUpdateError:
    return WeightUpdateError(f"there is no weight group {name!r}", field=FIELD)


def _late(terms: JoinGroup) -> DeadlineError:
    ranks = f"its {terms.world_size} ranks were not at {terms.address} port {terms.port} by the deadline"
    return DeadlineError(f"weight group {terms.name!r} was not joined: {ranks}", field=FIELD)
