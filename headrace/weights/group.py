"""Weights that arrive over a `torch.distributed` group, of which a trainer is rank 0.

Owns the connection to the other ranks, the one thread that waits for them, and the memory that tensors arrive in. Must
not know sessions, steps or which tensor goes where: it is told what comes and hands it on, in that order.

The thread is the only one that touches the connection, also when it lets go of it: a broadcast of gloo cannot be called
off, so whoever else did would wait with it. A broadcast never waits longer than its call has time. Each connection is
made of a store and a backend alone: nothing is registered with `torch.distributed`, whose groups are the caller's own
where the core is a thread of his process.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from headrace.types.errors import DeadlineError, HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.messages import JoinGroup
from headrace.types.weights import TensorInfo
from headrace.weights.arrival_memory import ArrivalMemory, Buffer
from headrace.weights.device_group import DeviceBuffer, NcclBroadcast, pause_of
from headrace.weights.unique_id import find_unique_id

logger = logging.getLogger(__name__)

FIELD = "group_name"
LONGEST_S = 24 * 3600.0
MOST_RANKS_OF_AN_ID = 128
"""Of more, torch's ranks hand round several ids."""

_LOOK_S = 0.2
_GRACE_S = 1.0  # after a deadline: the thread itself says more

Broadcast = Callable[[torch.Tensor, float], Callable[[], bool] | None]
"""Begin a broadcast from rank 0 into these bytes, and return what looks whether it is over; it takes so many seconds at
most. None: it is over."""


class TorchGroup:
    """One rank of a trainer's group. It joins in its own thread: `is_joined`, or `problem` says what came of it."""

    def __init__(self, terms: JoinGroup, device: torch.device, seconds: float) -> None:
        """Raises `WeightUpdateError` naming the field for what cannot be joined from here. In vLLM's way only the
        rendezvous finds out: it begins alike for all."""
        if terms.backend == "nccl" and terms.rendezvous != "vllm":
            if device.type != "cuda":
                raise _no_transport(terms, device)
            if terms.world_size > MOST_RANKS_OF_AN_ID:
                message = f"a group of torch's over NCCL is joined by {MOST_RANKS_OF_AN_ID} ranks at most"
                raise WeightUpdateError(message, field="world_size")
        self.name = terms.name
        self.is_joined = False
        self._problem: HeadraceError | None = None
        self._terms = terms
        self._device = device
        self._until = time.monotonic() + min(seconds, LONGEST_S)
        self._doing = "joining"
        """What the thread waits for others in, until `_until`; "": nothing."""
        self._line: socket.socket | None = None
        """To the trainer, who says nothing on it: it is cut when his process ends."""
        self._memory = ArrivalMemory(partial(DeviceBuffer, device=device) if terms.backend == "nccl" else None)
        self._queue: queue.SimpleQueue[GroupArrivals | None] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name=f"weight group {terms.name}", daemon=True).start()

    @property
    def counted(self) -> str:
        """Its name where something is late: ranks that count each other otherwise may meet, and then wait in vain."""
        count = f"rank {self._terms.rank} of {self._terms.world_size}"
        return f"weight group {self.name!r} (joined as {count}: the trainer has to count them alike)"

    @property
    def problem(self) -> HeadraceError | None:
        """What made the group unusable, if something has."""
        self._stop_waiting(_GRACE_S)
        return self._problem

    def receive(
        self, tensors: Sequence[TensorInfo], packing: int, seconds: float, skipped: Collection[int] = ()
    ) -> GroupArrivals:
        """What rank 0 broadcasts next, as it comes, without those at the places `skipped`; the call has so many seconds
        for it."""
        until = time.monotonic() + min(seconds, LONGEST_S)
        arrivals = GroupArrivals(self, self._memory, tensors, packing, until, skipped)
        self._queue.put(arrivals)
        return arrivals

    def refusal(self) -> UpdateConflictError | None:
        """Why the group cannot be used any more, as when its rank 0 has ended; None while it can. What its thread waits
        for past a deadline does not come: who asks is not to wait behind it until it says so itself."""
        self._stop_waiting(0.0)
        if self.problem is None and self.is_joined and self._is_cut():
            self.fail("its rank 0 has ended")
        if self.problem is None:
            return None
        rest = "destroy it and init it again"
        return UpdateConflictError(f"{self.problem.message}; the group cannot be used any more: {rest}", field=FIELD)

    def fail(self, reason: str) -> None:
        """Make the group unusable, and its thread end as soon as it can."""
        self._end(WeightUpdateError(f"weight group {self.name!r}: {reason}", field=FIELD))

    def check_open(self) -> None:
        """Raise what made the group unusable, if it is."""
        problem = self.problem
        if problem is not None:
            raise type(problem)(problem.message, field=problem.field)

    def _is_cut(self) -> bool:
        try:
            return self._line is not None and not self._line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _stop_waiting(self, grace_s: float) -> None:
        """Give up what the thread waits for so long after its deadline. It ends its own waits, but not that for a store
        whose keeper stands still: torch asks it without one."""
        doing = self._doing
        if self._problem is None and doing and time.monotonic() >= self._until + grace_s:
            self._end(self._failure(doing, TimeoutError("the trainer does not answer")))

    def _end(self, problem: HeadraceError) -> None:
        self._problem = self._problem or problem
        self._is_closed.set()
        self._queue.put(None)

    def _run(self) -> None:
        broadcast = None
        try:
            broadcast = self._join()
            self.is_joined, self._doing = True, ""
            while (arrivals := self._queue.get()) is not None and not self._is_closed.is_set():
                self._until = arrivals.until
                self._doing = "a broadcast"
                arrivals.fill(broadcast)
                self._doing = ""
        except HeadraceError as error:
            self._end(error)
        except (OSError, OverflowError, RuntimeError, ValueError, MemoryError) as error:  # the last but one are torch's
            self._end(self._failure(self._doing, error))
        finally:
            self.fail("it has ended")
            if isinstance(broadcast, NcclBroadcast):
                broadcast.close()
            if self._line is not None:
                self._line.close()

    def _failure(self, doing: str, error: Exception) -> HeadraceError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if time.monotonic() >= self._until:
            message = f"{self.counted}: {doing} was not over by its deadline: {reason}"
            return DeadlineError(message, field=FIELD)
        return WeightUpdateError(f"weight group {self.name!r}: {doing} failed: {reason}", field=FIELD)

    def _join(self) -> Broadcast:
        """The ranks of a backend find each other in a store at the trainer's address."""
        from torch._C._distributed_c10d import BroadcastOptions, ProcessGroupGloo, TCPStore

        terms = self._terms
        if terms.unique_id:
            return self._join_nccl(lambda: terms.unique_id)
        self._await_listener()
        left = _timer(max(0.1, self._until - time.monotonic()))
        store = TCPStore(terms.address, terms.port, terms.world_size, False, left)
        if terms.backend == "nccl":
            part = store if terms.rendezvous == "vllm" else store_of(store, terms)
            return self._join_nccl(partial(find_unique_id, part, terms.rendezvous))
        group = ProcessGroupGloo(store_of(store, terms), terms.rank, terms.world_size, timeout=left)
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0

        def broadcast(into: torch.Tensor, seconds: float) -> None:
            options.timeout = _timer(max(0.001, seconds))
            group.broadcast([into], options).wait()  # type: ignore[attr-defined]

        self._memory.is_guarded = not _passes_on(terms.rank, terms.world_size)
        return broadcast

    def _join_nccl(self, find_id: Callable[[], bytes | None]) -> NcclBroadcast:
        """A trainer of vLLM's waits for all ranks at once. torch's ranks meet at their first broadcast, so that one
        which is missing shows only then: a trainer that waits for all to have joined would wait for ever otherwise."""
        terms = self._terms
        if self._device.type != "cuda":
            while find_id() is None and time.monotonic() < self._until and not self._is_over():
                self._is_closed.wait(_LOOK_S)
            raise _no_transport(terms, self._device)
        broadcast = NcclBroadcast(find_id, terms.rank, terms.world_size, self._device, self._is_over)
        if terms.rendezvous == "vllm":
            try:
                broadcast.join(self._until)
                broadcast.warm_up(self._until)
            except BaseException:
                broadcast.close()
                raise
        return broadcast

    def _is_over(self) -> bool:
        return self._is_closed.is_set() or self._is_cut()

    def _await_listener(self) -> None:
        """Until somebody listens at the address: unlike torch, quietly, and so that it can be called off."""
        place = self._terms.address, self._terms.port
        while not self._is_closed.is_set():
            try:
                self._line = socket.create_connection(place, max(0.1, min(5.0, self._until - time.monotonic())))
                self._line.setblocking(False)
                return
            except socket.gaierror as error:
                raise ValueError(f"{place[0]} is no address: {error}") from None
            except OSError as error:
                if time.monotonic() >= self._until:
                    raise OSError(f"nobody listens at {place[0]} port {place[1]}: {error}") from None
                self._is_closed.wait(_LOOK_S)
        raise OSError("the group was left")


def _timer(seconds: float) -> timedelta:
    """For torch, which drops what is no whole millisecond: its timer is not to be over before the deadline, or what was
    late would be said to have failed."""
    return timedelta(milliseconds=math.ceil(seconds * 1e3))


def store_of(store: Any, terms: JoinGroup) -> Any:
    """The part of a trainer's store in which the ranks look for each other: under the name of the group and the kind of
    device, as `init_custom_process_group` of SGLang and its trainers has it, or under the address, as
    `stateless_init_torch_distributed_process_group` of vLLM."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.distributed_c10d import Backend, BackendConfig

    if terms.rendezvous == "vllm":
        host = f"[{terms.address}]" if ":" in terms.address else terms.address
        return PrefixStore(f"tcp://{host}:{terms.port}", store)
    device = next(iter(BackendConfig(Backend(terms.backend)).get_device_backend_map()))  # that torch registers
    return PrefixStore(f"{device}/", PrefixStore(f"{terms.name}/", PrefixStore(terms.name, store)))


def _no_transport(terms: JoinGroup, device: torch.device) -> WeightUpdateError:
    message = f"backend {terms.backend!r} is not for an engine on {device.type}: both sides have to take 'gloo'"
    return WeightUpdateError(message, field="backend")


@dataclass(eq=False)
class _UnderWay:
    """A broadcast that has begun: of which tensors, of how many bytes, into what, and what looks whether it is over."""

    places: range
    size: int
    buffer: Buffer
    is_over: Callable[[], bool] | None = None


class GroupArrivals:
    """The tensors of one call as they come, each with its place in the list. Filled by the group's thread, emptied by
    the core's: `take` some, read them, `free` them."""

    def __init__(
        self,
        group: TorchGroup,
        memory: ArrivalMemory,
        tensors: Sequence[TensorInfo],
        packing: int,
        until: float,
        skipped: Collection[int] = (),
    ) -> None:
        self.until = until
        self._skipped = skipped
        self._group = group
        self._memory = memory
        self._tensors = tensors
        self._packing = packing
        self._num_left = len(tensors)
        self._is_dropped = False
        self._ready: deque[tuple[int, Any, Buffer | None]] = deque()
        self._taken: list[Buffer | None] = []

    @property
    def is_complete(self) -> bool:
        """All of it came, and has been read."""
        return not self._num_left

    def take(self, most: int) -> list[tuple[int, Any]]:
        """Those of the next so many tensors that have come: each one's place in the list, and its bytes or, on a
        device, the tensor, which stays until `free`. None of them: what keeps it from coming, if something does, is
        raised."""
        is_over = self._group.problem is not None  # looked at first: what had come before it is read
        found: list[tuple[int, Any]] = []
        while self._ready and len(found) < most:
            place, data, buffer = self._ready.popleft()
            found.append((place, data))
            self._taken.append(buffer)
        if is_over and not found:
            self._group.check_open()
        return found

    def free(self) -> None:
        """What was taken is not read any more."""
        taken, self._taken = self._taken, []
        with self._memory.lock:
            self._num_left -= len(taken)
        for buffer in taken:
            if buffer is not None:
                self._memory.put(buffer)

    def drop(self) -> None:
        """Nothing of it is read any more; what is still to come is received and forgotten. Idempotent."""
        with self._memory.lock:
            self._is_dropped = True
            left = [*self._taken, *(buffer for _, _, buffer in self._ready)]
            self._ready.clear()
            self._taken = []
        for buffer in left:
            if buffer is not None:
                self._memory.put(buffer)

    def fill(self, broadcast: Broadcast) -> None:
        """Receive all of it, as memory allows: one broadcast may begin before the one ahead is over. The group's thread
        only."""
        under_way = deque[_UnderWay]()
        try:
            for places in self._broadcasts():
                self._group.check_open()
                size = sum(self._tensors[place].num_bytes for place in places)
                buffer = self._room_for(size, under_way)
                under_way.append(_UnderWay(places, size, buffer))
                into = buffer.armed(size, self._num_integer(places))
                under_way[-1].is_over = broadcast(into, self.until - time.monotonic())
                # Many at once: to stage a tensor alone takes the interpreter for longer than it takes to come.
                if under_way[-1].is_over is None or 2 * sum(each.size for each in under_way) > self._memory.most_bytes:
                    self._hand_on_what_came(under_way)
            waits_since = time.monotonic()
            while under_way:
                self._hand_on_next(under_way, waits_since)
        except BaseException:
            for each in under_way:
                self._memory.put(each.buffer)
            raise

    def _room_for(self, size: int, under_way: deque[_UnderWay]) -> Buffer:
        """Memory for so many bytes. What has come meanwhile is handed on, so that some is put back."""
        waits_since = time.monotonic()
        while (buffer := self._memory.take_now(size)) is None and under_way:
            self._hand_on_next(under_way, waits_since)
        return buffer or self._memory.take(size, self.until)

    def _hand_on_next(self, under_way: deque[_UnderWay], waits_since: float) -> None:
        """What has come, or a pause until the next look."""
        if not self._hand_on_what_came(under_way):
            time.sleep(pause_of(time.monotonic() - waits_since))

    def _hand_on_what_came(self, under_way: deque[_UnderWay]) -> bool:
        """In the order in which it was begun; whether there was any."""
        num_begun = len(under_way)
        while under_way and (under_way[0].is_over is None or under_way[0].is_over()):
            oldest = under_way[0]
            self._check(oldest.buffer, oldest.size, oldest.places)
            under_way.popleft()
            self._hand_on(oldest.buffer, oldest.places)
        return len(under_way) < num_begun

    def _broadcasts(self) -> Iterator[range]:
        """The places of the tensors that come in one: until they are over the packing, with the one that makes them."""
        start = num_bytes = 0
        for place, info in enumerate(self._tensors):
            num_bytes += info.num_bytes
            if num_bytes > self._packing:
                yield range(start, place + 1)
                start, num_bytes = place + 1, 0
        if start < len(self._tensors):
            yield range(start, len(self._tensors))

    def _num_integer(self, places: range) -> int:
        """How many of the last bytes of a broadcast are of integers: none that is staged, but any may be announced."""
        last = itertools.takewhile(lambda info: info.is_integer, map(self._tensors.__getitem__, reversed(places)))
        return sum(info.num_bytes for info in last)

    def _check(self, buffer: Buffer, size: int, places: range) -> None:
        problem = buffer.mismatch(size)
        if problem:
            names = self._tensors[places.start].name if len(places) == 1 else f"a bucket of {len(places)} tensors"
            message = f"weight group {self._group.name!r}: {names} was announced with {size} bytes, and {problem} came"
            raise WeightUpdateError(message, field=self._tensors[places.start].name if len(places) == 1 else FIELD)

    def _hand_on(self, buffer: Buffer, places: range) -> None:
        """The buffer goes with the last of its tensors."""
        start = 0
        wanted = [place for place in places if place not in self._skipped]
        found: list[tuple[int, Any, Buffer | None]] = []
        for place in places:
            if place not in self._skipped:
                part = buffer.part(self._tensors[place], start)
                found.append((place, part, buffer if place == wanted[-1] else None))
            start += self._tensors[place].num_bytes
        with self._memory.lock:
            self._num_left -= len(places) - len(found)
            if not self._is_dropped and found:
                self._ready.extend(found)
                return
        self._memory.put(buffer)


def _passes_on(rank: int, world_size: int) -> bool:
    """Whether a rank is no leaf of the tree along which gloo broadcasts from rank 0: it then sends what it receives to
    others, as long as it takes it to be."""
    return rank + (1 << rank.bit_length()) < world_size
