"""Payloads with a few bytes changed, and what must be true of whatever comes of them.

python -m tests.weights.foreign_mutations 1000000 [seed]
"""

from __future__ import annotations

import pickletools
import random
import re
import sys
import time
from collections import Counter
from unittest import mock

import msgspec
import torch

from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import ForeignTensor, Payload, SharedFile
from headrace.types.weights import ELEMENT_BYTES
from headrace.weights import foreign, foreign_machine
from headrace.weights.foreign import read_nccl_id, read_payload
from tests.weights.foreign_payloads import cuda_call, flattened, local, nccl_id, patched_cuda, serialized

OPCODES_PER_BYTE = 5
"""Each byte is an opcode at most, and what is nested is read four times at most."""

UNDERSTOOD = {"accepted", "an NCCL id"}

TELLING = bytes.fromhex("80959493528162282e74855d61657d7573") + b"KMJN\x88\x89\x8aX\x8c\x8dCB\x8ehjqrcR\x00\x01\x7f\xff"


NUMBERS = [
    b"K\x00",
    b"K\x01",
    b"K\x02",
    b"K\x04",
    b"K\x0c",
    b"K\x18",
    b"K\x30",
    b"M\xff\xff",
    b"J\xff\xff\xff\xff",
    b"N",
]
NUMBERS += [
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + bytes(7) + b"\x40",
    b"\x8a\x09" + bytes(7) + b"\x80\x00",
    b"\x88",
    b"]",
    b")",
]


def real_payloads() -> list[bytes]:
    """One of each kind, in protocols with and without frames, and with frames left out."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    found = [patched_cuda(base), nccl_id(bytes(range(128)))]
    for protocol in (2, 3, 4):
        tensors = {"a": base, "b": base.to(torch.bfloat16).t().contiguous(), "none": base[:0]}
        found += [
            serialized([("w", base), ("b", base.t()[1:]), ("p", torch.nn.Parameter(base))], protocol),
            serialized([("none", torch.empty(0, 4))], protocol, "file_descriptor"),
            serialized(
                [("w", cuda_call(base)), ("v", cuda_call(base[1:], storage_device=torch.device("cuda", 1)))], protocol
            ),
            flattened(tensors, protocol=protocol),
            local({"w": [serialized(base, protocol)], "v": [serialized(base[1:], protocol)]}, protocol=protocol),
        ]
    return found + [_without_frames(data) for data in found if data[1] >= 4]


def _without_frames(data: bytes) -> bytes:
    starts = [at for code, _, at in pickletools.genops(data) if code.name == "FRAME" and at is not None]
    for at in reversed(starts):
        data = data[:at] + data[at + 9 :]
    return data


class Mutants:
    """Changed payloads, one after another: by seed always the same."""

    def __init__(self, seed: int, payloads: list[bytes] | None = None) -> None:
        """`payloads`: real ones, or those of an earlier call, as torch names its files anew each time."""
        self.payloads = payloads or real_payloads()
        self._chance = random.Random(seed)
        self._programs = [_opcodes(data) for data in self.payloads if data[1] < 4 or b"\x95" not in data[:3]]

    def next(self) -> bytes:
        """A payload with one to four changes: of bytes, or of whole opcodes."""
        chance = self._chance
        num_changes = chance.choice((1, 1, 1, 2, 3, 4))
        if chance.random() < 0.5:
            program = list(chance.choice(self._programs))
            for _ in range(num_changes):
                self._change_program(program)
            return b"".join(program)
        data = bytearray(chance.choice(self.payloads))
        for _ in range(num_changes):
            self._change_bytes(data)
        return bytes(data)

    def _change_program(self, program: list[bytes]) -> None:
        chance = self._chance
        at, other = chance.randrange(len(program)), chance.choice(self._programs)
        numbers = [index for index, opcode in enumerate(program) if opcode[:1] in b"KMJ"]
        match chance.randrange(6):
            case 0 | 1 if numbers:
                program[chance.choice(numbers)] = chance.choice(NUMBERS)
            case 2:
                program[at] = chance.choice(other)
            case 3:
                program.insert(at, chance.choice(other))
            case 4:
                del program[at : at + chance.randrange(1, 4)]
            case _:
                end = min(len(program), at + chance.randrange(1, 40))
                program[at:at] = program[at:end] * chance.choice((1, 1, 100))
        if not program:
            program.append(b".")

    def _change_bytes(self, data: bytearray) -> None:
        chance = self._chance
        at, length = chance.randrange(len(data) + 1), int(chance.paretovariate(0.7))
        match chance.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(data):
                data[at] = chance.choice(TELLING)
            case 2:
                data[at:at] = bytes(chance.choice(TELLING) for _ in range(min(length, 16)))
            case 3:
                del data[at : at + length]
            case 4:
                other = chance.choice(self.payloads)
                start = chance.randrange(len(other))
                data[at : at + chance.choice((0, length))] = other[start : start + length]
            case 5:
                data[at:at] = data[at : at + min(length, 64)] * chance.choice((1, 2, 50))
            case _:
                start, end = sorted((at, chance.randrange(len(data) + 1)))
                data[start:end] = data[start : start + length] + data[start:end]


def _opcodes(data: bytes) -> list[bytes]:
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def outcome_of(data: bytes) -> str:
    """What came of these bytes as a payload: "accepted", "an NCCL id", or the beginning of why they were refused. Fails
    where it is nothing that may come of bytes."""
    budgets: list[foreign_machine.Budget] = []

    class Recorded(foreign_machine.Budget):
        def __init__(self, num_bytes: int) -> None:
            super().__init__(num_bytes)
            budgets.append(self)

    with mock.patch.object(foreign, "Budget", Recorded):
        try:
            payload = read_payload(data)
        except WeightUpdateError as error:
            assert error.field == "serialized_named_tensors" and len(error.message) < 4000
            outcome = " ".join(re.findall("[a-z]{2,}", error.message)[5:9])
        else:
            assert_consistent(payload)
            outcome = "accepted"
        try:
            assert len(read_nccl_id(data)) == 128
            outcome = "an NCCL id"
        except WeightUpdateError as error:
            assert error.field == "nccl_unique_id"
    num_opcodes = max(foreign_machine.MAX_OPCODES - budget.opcodes for budget in budgets)
    assert num_opcodes <= OPCODES_PER_BYTE * len(data), f"{num_opcodes} opcodes in {len(data)} bytes"
    return outcome


def assert_consistent(payload: Payload) -> None:
    """Everything that a `Payload` promises."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(payload), type=Payload) == payload
    names = [tensor.name for tensor in payload.tensors]
    tensors = list(payload.tensors)
    for bucket in payload.buckets:
        tensors.append(bucket.memory)
        names += [tensor.name for tensor in bucket.tensors]
        assert (bucket.memory.dtype, bucket.memory.stride, bucket.memory.name) == ("uint8", (1,), "")
        covered: set[range] = set()
        for tensor in bucket.tensors:
            part = range(tensor.start, tensor.end)
            assert 0 <= tensor.start <= tensor.end <= bucket.memory.shape[0]
            assert len(part) == torch.Size(tensor.shape).numel() * ELEMENT_BYTES[tensor.dtype]
            assert all(part.stop <= other.start or other.stop <= part.start for other in covered)
            covered.add(part)
    for foreign_tensor in tensors:
        _assert_inside(foreign_tensor)
    assert all(names) and len(set(names)) == len(names)
    files = {tensor.storage for tensor in tensors if isinstance(tensor.storage, SharedFile)}
    assert set(payload.files) == files and len(payload.files) <= len(tensors)


def _assert_inside(tensor: ForeignTensor) -> None:
    assert len(tensor.shape) == len(tensor.stride) <= 8
    assert all(0 <= size < 1 << 63 for size in (*tensor.shape, *tensor.stride, tensor.offset))
    if 0 not in tensor.shape:
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
        assert (last + 1) * ELEMENT_BYTES[tensor.dtype] <= tensor.storage.num_bytes


def fuzz(count: int, seed: int) -> Counter[str]:
    """Outcomes of so many mutants."""
    mutants = Mutants(seed)
    assert all(outcome_of(data) in UNDERSTOOD for data in mutants.payloads)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        data = mutants.next()
        try:
            outcomes[outcome_of(data)] += 1
        except BaseException:
            print(f"after {outcomes.total()} mutants of seed {seed}: {data!r}", file=sys.stderr)
            raise
    return outcomes


if __name__ == "__main__":
    started = time.perf_counter()
    modules = set(sys.modules)
    outcomes = fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    num_understood = sum(outcomes[outcome] for outcome in UNDERSTOOD)
    num_reasons = len(outcomes.keys() - UNDERSTOOD)
    print(f"{outcomes.total()} mutants: {num_understood} understood, all others refused for {num_reasons} reasons")
    print(f"{time.perf_counter() - started:.0f} s; modules imported meanwhile: {sorted(set(sys.modules) - modules)}")
