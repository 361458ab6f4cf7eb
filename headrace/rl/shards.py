"""The tensors of an update as the ranks of a trainer have them, brought together on rank 0. Owns what is moved and how.

Every rank names the same tensors in the same order. Of one that all have whole, rank 0's is taken and nothing moves. Of
a DTensor on CPUs whose mesh is inside the engine's, each rank puts its own box into its memory, and rank 0 copies it
from there, once. Any other DTensor is gathered by all ranks of its own mesh, once all have come to it. Torch is loaded
by whoever brings a tensor.

To ask for the next tensor may be a collective of all ranks, as `full_tensor` in a generator is. So they read in rounds
that end at the same tensor everywhere: within one nobody waits for another, between two all wait until rank 0 has
handed on what came, and an error there finds no rank in the middle of a collective.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from headrace.engine.tensors import NamedTensors, TensorBytes, describe, is_in_shards, named_pairs, own_part
from headrace.engine.upload_buffers import aligned
from headrace.rl.frames import Proceed, ShardPart, ShardParts
from headrace.rl.rank_calls import MEMORY_BYTES, FollowingCalls, LeadingCalls, Peer
from headrace.rl.sources import gathered, hf_name
from headrace.types.errors import WeightUpdateError
from headrace.weights.boxes import Box

if TYPE_CHECKING:
    import torch

MAX_PARTS = 1024
"""Of a round."""


def send_shards(calls: FollowingCalls, call: str, ranks: Sequence[int], named_tensors: NamedTensors) -> None:
    """A following rank's share of an update: its boxes, in pieces, each tensor copied before the next is asked for.
    Its memory is written to only once rank 0 is at this call, and so reads it for no other one."""
    calls.wait(call)
    sender, rounds = _Sender(calls, call), _Rounds()
    for name, tensor in _pairs(named_tensors):
        part, local = _part_of(name, tensor, ranks)
        if part.size:
            sender.write(part, TensorBytes(name, local))
        else:
            sender.add(part)
        if rounds.ends_with(part, local):
            sender.flush()
        if part.way == "gathered":
            gathered(name, tensor.detach())
            calls.wait(call)
    sender.flush(is_last=True)


def whole_tensors(
    calls: LeadingCalls, call: str, ranks: Sequence[int], named_tensors: NamedTensors
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rank 0's share: every tensor, whole, in memory that nobody writes to again. `WeightUpdateError` naming a rank
    that has another one in its place."""
    streams = [_Stream(calls, call, peer) for peer in calls.peers]
    own, rounds = list[tuple[ShardPart, Any]](), _Rounds()
    _proceed(streams)
    for name, tensor in _pairs(named_tensors):
        part, local = _part_of(name, tensor, ranks)
        own.append((part, _own_copy(part, local)))
        if rounds.ends_with(part, local):
            yield from _completed(own, streams, calls.rank)
            if part.way == "gathered":
                _proceed(streams)
                yield name, gathered(name, tensor.detach())
            _proceed(streams)
    yield from _completed(own, streams, calls.rank)
    for stream in streams:
        surplus = stream.peek()
        if surplus is not None:
            message = f"{surplus.name} is a tensor of rank {stream.rank}, rank {calls.rank} has none after its last"
            raise WeightUpdateError(message, field=surplus.name)


class _Rounds:
    """Where a round ends: at a tensor that is gathered, and with as many, or as much of them as a rank's memory takes,
    if it had all. Whatever is sent in pieces ends one."""

    def __init__(self) -> None:
        self._num_parts = 0
        self._num_bytes = 0

    def ends_with(self, part: ShardPart, local: Any) -> bool:
        """Whether this tensor, the next, is the last of a round."""
        self._num_parts += 1
        self._num_bytes += aligned(math.prod(part.shape) * local.dtype.itemsize)
        is_end = part.way == "gathered" or self._num_parts >= MAX_PARTS or self._num_bytes >= MEMORY_BYTES
        if is_end:
            self._num_parts = self._num_bytes = 0
        return is_end


class _Sender:
    """A rank's memory while it is filled, and what is in it."""

    def __init__(self, calls: FollowingCalls, call: str) -> None:
        self._calls = calls
        self._call = call
        self._parts: list[ShardPart] = []
        self._num_used = 0

    def add(self, part: ShardPart) -> None:
        """A part without bytes."""
        self._parts.append(part)

    def write(self, part: ShardPart, data: TensorBytes) -> None:
        """A part with all of its bytes, in as many pieces as it takes."""
        start = 0
        while start < len(data):
            offset = aligned(self._num_used)
            piece = data[start : start + MEMORY_BYTES - offset]
            if not len(piece):
                self.flush()
                continue
            piece.copy_into(self._calls.memory.view[offset : offset + len(piece)])
            start += len(piece)
            self._num_used = offset + len(piece)
            more = start < len(data)
            self.add(msgspec.structs.replace(part, offset=offset, num_bytes=len(piece), has_more=more))

    def flush(self, *, is_last: bool = False) -> None:
        """Have rank 0 take what there is."""
        data = b"" if self._calls.shares_memory else bytes(self._calls.memory.view[: self._num_used])
        self._calls.send(ShardParts(self._calls.number, tuple(self._parts), is_last, data), self._call)
        if not is_last:
            self._calls.wait(self._call)
        self._parts, self._num_used = [], 0


class _Stream:
    """The parts of one following rank, in order."""

    def __init__(self, calls: LeadingCalls, call: str, peer: Peer) -> None:
        self.rank = peer.rank
        self._calls = calls
        self._call = call
        self._peer = peer
        self._parts: deque[ShardPart] = deque()
        self._memory: Any = b""
        self._is_last = False

    def peek(self) -> ShardPart | None:
        """The part that comes next; None after the last."""
        while not self._parts and not self._is_last:
            message = self._calls.receive(self._peer, self._call)
            self._parts.extend(message.parts)
            self._is_last = message.is_last
            own = self._peer.memory
            self._memory = memoryview(message.data) if own is None else own.view
        return self._parts[0] if self._parts else None

    def proceed(self) -> None:
        """What the rank sent was taken: it may go on."""
        self._calls.send(self._peer, Proceed(self._calls.number), self._call)

    def take(self, whole: torch.Tensor) -> None:
        """Take the next part, and copy its box of a tensor to its place."""
        import torch

        part = self._parts.popleft()
        if not part.size:
            return
        box = whole[Box(part.start, part.size).slices]
        flat = box if box.is_contiguous() else torch.empty(part.size, dtype=whole.dtype, device="cpu")
        view, done = flat.view(-1).view(torch.uint8).numpy(), 0
        while True:
            view[done : done + part.num_bytes] = np.frombuffer(self._memory, np.uint8, part.num_bytes, part.offset)
            done += part.num_bytes
            if not part.has_more:
                break
            self.proceed()
            following = self.peek()
            if following is None or following.name != part.name:
                raise WeightUpdateError(f"{part.name} of rank {self.rank} breaks off", field=part.name)
            part = self._parts.popleft()
        if flat is not box:
            box.copy_(flat)


def _proceed(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.proceed()


def _completed(
    own: list[tuple[ShardPart, Any]], streams: Sequence[_Stream], rank: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """What rank 0 has of a round, with what the others have of it; the list is empty then."""
    for part, whole in own:
        for stream in streams:
            _require_same(part, stream.peek(), rank, stream.rank)
            stream.take(whole)
        if part.way != "gathered":
            yield part.name, whole
    own.clear()


def _pairs(named_tensors: NamedTensors) -> Iterator[tuple[str, Any]]:
    """(Hugging Face name, tensor) pairs, checked as they are read; DTensors as they are."""
    for name, tensor in named_pairs(named_tensors, lambda _, tensor: tensor):
        yield hf_name(name), tensor


def _part_of(name: str, tensor: Any, ranks: Sequence[int]) -> tuple[ShardPart, Any]:
    """How a tensor is brought to rank 0, and what this rank holds of it."""
    local = own_part(tensor)
    info = describe(name, local)
    shape = tuple(tensor.shape)
    if not is_in_shards(tensor):
        return ShardPart(name, shape, info.dtype, "whole"), local
    mesh = tensor.device_mesh
    if tensor.device.type != "cpu" or not _is_even(tensor) or not set(mesh.mesh.flatten().tolist()) <= set(ranks):
        return ShardPart(name, shape, info.dtype, "gathered"), local
    box, counts = _box_of(shape, mesh, tensor.placements)
    if box.shape != info.shape:
        message = f"{name} has {list(info.shape)} on this rank, where its placements say {list(box.shape)}"
        raise WeightUpdateError(message, field=name)
    if not counts or not math.prod(box.shape):
        return ShardPart(name, shape, info.dtype, "box"), local
    return ShardPart(name, shape, info.dtype, "box", box.start, box.shape), local


def _is_even(tensor: Any) -> bool:
    """Each rank of its mesh holds a box of it: one of equal ones, but for the last."""
    from torch.distributed.tensor import Shard

    return all(type(place) is Shard or place.is_replicate() for place in tensor.placements)


def _box_of(shape: tuple[int, ...], mesh: Any, placements: Sequence[Any]) -> tuple[Box, bool]:
    """Which box of a tensor this rank has, and whether it is the one that counts of those that have it."""
    start, size, counts = [0] * len(shape), list(shape), True
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Box(tuple(start), (0,) * len(shape)), False
    for axis, place in enumerate(placements):
        if place.is_replicate():
            counts = counts and coordinate[axis] == 0
            continue
        share = -(-size[place.dim] // mesh.size(axis))
        first = min(share * coordinate[axis], size[place.dim])
        start[place.dim] += first
        size[place.dim] = min(share, size[place.dim] - first)
    return Box(tuple(start), tuple(size)), counts


def _own_copy(part: ShardPart, local: Any) -> Any:
    """A tensor in memory that nobody else writes to: all of it, or where there are boxes rank 0's, with room for
    others. None of one that is to be gathered."""
    import torch

    if part.way == "whole":
        return local.copy() if isinstance(local, np.ndarray) else local.detach().clone()
    if part.way == "gathered":
        return None
    whole = torch.empty(part.shape, dtype=local.dtype, device="cpu")
    if part.size:
        whole[Box(part.start, part.size).slices] = local.detach()
    return whole


def _require_same(ours: ShardPart, theirs: ShardPart | None, our_rank: int, their_rank: int) -> None:
    if theirs is None:
        message = f"{ours.name} is a tensor of rank {our_rank}, rank {their_rank} has none after its last"
        raise WeightUpdateError(message, field=ours.name)
    same = (ours.name, ours.shape, ours.dtype, ours.way)
    if same != (theirs.name, theirs.shape, theirs.dtype, theirs.way):
        told = [f"{each.name} {each.dtype} {list(each.shape)} ({each.way})" for each in (ours, theirs)]
        message = f"rank {our_rank} has {told[0]} where rank {their_rank} has {told[1]}"
        raise WeightUpdateError(message, field=ours.name)
