"""A whole core on one thread, driven turn by turn: scripted link, hand-set clock, free executor, real tiny weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from headrace.config import ModelSpec, ResolvedConfig, SettledConfig
from headrace.core.executor import Executor
from headrace.core.fake_executor import FreeExecutor
from headrace.core.loop import CoreLoop
from headrace.ipc import PeerClosed, SharedBuffer
from headrace.types.errors import ErrorInfo
from headrace.types.messages import (
    BeginUpdate,
    Command,
    CoreStatus,
    Deltas,
    ExtendUpdate,
    GetStatus,
    Output,
    Reply,
    Stage,
    Submit,
)
from headrace.types.request import Delta, Finish, Request, pack_ids, unpack_floats, unpack_ids
from headrace.types.weights import BufferEntry, TensorInfo, UpdateBegun, UpdateExtended
from headrace.weights.position_sum import PositionKeys, position_digest
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, WeightMap, whole_rows

VOCAB_SIZE = 101
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_config(**settings: Any) -> ResolvedConfig:
    """Settings of a small replica; keywords override those of `SettledConfig`."""
    sizes = {"max_num_batched_tokens": 2048, "page_size": 4, "max_running_requests": 8, "overlap_depth": 0, "seed": 0}
    engine = SettledConfig(model="tiny", **(sizes | settings))
    return ResolvedConfig(
        engine=engine,
        model=ModelSpec.from_config(TINY),
        folder="",
        device="cpu",
        dtype="float32",
        kv_dtype="float32",
        context_length=256,
        num_pages=(engine.kv_pool_tokens or 4096) // engine.page_size + 1,
        num_threads=1,
        attention_backend="cpu",
        explanations=(),
    )


def tiny_weight_map() -> WeightMap:
    """Three parameters, five tensors, one alias."""
    return WeightMap(
        [ParamSpec("embed", (8, 4)), ParamSpec("qkv", (12, 4)), ParamSpec("norm", (4,))],
        [
            whole_rows("embed.weight", "embed", 0, (8, 4)),
            whole_rows("q.weight", "qkv", 0, (4, 4)),
            whole_rows("k.weight", "qkv", 4, (4, 4)),
            whole_rows("v.weight", "qkv", 8, (4, 4)),
            whole_rows("norm.weight", "norm", 0, (4,)),
        ],
        {"lm_head.weight": "embed.weight"},
    )


def tiny_store() -> WeightStore:
    """A real store, filled."""
    store = WeightStore(tiny_weight_map(), torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.fill_random(1)
    return store


def new_tensors(value: float) -> dict[str, torch.Tensor]:
    """A full set for the tiny map, all elements different from any other `value`'s."""
    rules = tiny_weight_map().rules_by_name.values()
    return {rule.hf_name: torch.full(rule.shape, value + number) for number, rule in enumerate(rules)}


def digest_of(tensor: torch.Tensor) -> str:
    return position_digest(tensor.contiguous().reshape(-1), PositionKeys(tensor.device))


def manifest_of(tensors: dict[str, torch.Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in tensors.items())


def bucket_of(tensors: Sequence[torch.Tensor]) -> tuple[SharedBuffer, list[int]]:
    """The tensors' bytes one after the other in a shared buffer, and their offsets."""
    data = [tensor.numpy().tobytes() for tensor in tensors]
    offsets = [sum(map(len, data[:number])) for number in range(len(data))]
    buffer = SharedBuffer.create(sum(map(len, data)))
    buffer.view[:] = b"".join(data)
    return buffer, offsets


def request(handle: int, prompt: Sequence[int] = (1, 2, 3, 4, 5), max_new_tokens: int = 10, **fields: Any) -> Request:
    """A request with `handle`; keywords are further `Request` fields."""
    return Request(handle, f"r{handle}", pack_ids(list(prompt)), max_new_tokens, seed=handle, **fields)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ScriptLink:
    """The front's side as lists. Checks on the way that no call is answered twice."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.outputs: list[Output] = []
        self.replies: dict[int, Reply] = {}
        self.deltas: dict[int, list[Delta]] = {}
        self.is_closed = False
        self.is_behind = False

    def poll(self, timeout: float) -> list[Command]:
        if self.is_closed:
            raise PeerClosed("closed by the test")
        commands, self.commands = self.commands, []
        return commands

    def send(self, output: Output) -> None:
        self.outputs.append(output)
        if isinstance(output, Reply):
            assert output.call_id not in self.replies, f"call {output.call_id} was answered twice"
            self.replies[output.call_id] = output
        elif isinstance(output, Deltas):
            for delta in output.deltas:
                self._note(delta)

    def close(self) -> None:
        self.is_closed = True

    def _note(self, delta: Delta) -> None:
        known = self.deltas.setdefault(delta.handle, [])
        assert not known or known[-1].finish is None, f"request {delta.handle} was answered after its end"
        assert len(delta.token_ids) == len(delta.logprobs) == 4 * sum(count for _, count in delta.spans)
        assert len(delta.spans) == len(delta.span_epochs)
        known.append(delta)


class Core:
    """The core under test and what it has answered so far."""

    def __init__(self, executor: Executor | None = None, **settings: Any) -> None:
        self.store = tiny_store()
        self.executor = executor or FreeExecutor(VOCAB_SIZE, weights=self.store)
        self.link = ScriptLink()
        self.clock = Clock()
        self.loop = CoreLoop(tiny_config(**settings), self.executor, self.link, clock=self.clock)
        self.is_busy = True
        self._next_call = 0

    def send(self, *commands: Command) -> None:
        """Queue commands for the next turn."""
        self.link.commands += commands

    def turn(self, count: int = 1) -> None:
        """Run that many turns of the loop."""
        for _ in range(count):
            self.is_busy = self.loop.turn(0.0)

    def settle(self) -> None:
        """Run until a turn finds nothing to do."""
        for _ in _chances():
            self.turn()
            if not self.is_busy and not self.link.commands:
                return
        raise AssertionError("the core never came to rest")

    def until(self, condition: Callable[[], bool]) -> None:
        """Run until the condition holds."""
        for _ in _chances():
            if condition():
                return
            self.turn()
        raise AssertionError("it never happened")

    def submit(self, *requests: Request) -> None:
        """Queue requests."""
        self.send(Submit(requests))

    def start(self, command: Callable[..., Command], *args: Any, **named: Any) -> int:
        """Queue a call; returns its id."""
        self._next_call += 1
        self.send(command(self._next_call, *args, **named))
        return self._next_call

    def answer(self, call_id: int, kind: Any = None) -> Any:
        """The value a call was answered with."""
        reply = self.link.replies[call_id]
        assert reply.error is None, reply.error
        return msgspec.msgpack.decode(reply.payload, type=kind)

    def error(self, call_id: int) -> ErrorInfo:
        """The error a call was answered with."""
        found = self.link.replies[call_id].error
        assert found is not None
        return found

    def call(self, command: Callable[..., Command], *args: Any, kind: Any = None) -> Any:
        """Queue a call, turn until it is answered, and return the value."""
        return self.call_answer(self.start(command, *args), kind)

    def call_answer(self, call_id: int, kind: Any = None) -> Any:
        """Turn until a queued call is answered, and return the value."""
        self.until(lambda: call_id in self.link.replies)
        return self.answer(call_id, kind)

    def refused(self, command: Callable[..., Command], *args: Any) -> ErrorInfo:
        """Queue a call, turn until it is answered, and return the error."""
        call_id = self.start(command, *args)
        self.until(lambda: call_id in self.link.replies)
        return self.error(call_id)

    def status(self) -> CoreStatus:
        """`GetStatus`, answered."""
        found = self.call(GetStatus, kind=CoreStatus)
        assert isinstance(found, CoreStatus)
        return found

    def begin(self, tensors: dict[str, torch.Tensor], version: str = "v1", *, mode: str = "auto", **fields: Any) -> int:
        """Open a session for these tensors; returns its id."""
        self._next_call += 1
        call_id = self._next_call
        self.send(BeginUpdate(call_id, version, manifest_of(tensors), mode, **fields))  # type: ignore[arg-type]
        self.until(lambda: call_id in self.link.replies)
        return int(self.answer(call_id, dict[str, Any])["session_id"])

    def start_stage(self, session_id: int, tensors: dict[str, torch.Tensor], only: Sequence[str] | None = None) -> int:
        """Queue the staging of a session's tensors, or some of them, in one bucket; returns the call id."""
        names = list(tensors) if only is None else list(only)
        buffer, offsets = bucket_of([tensors[name] for name in names])
        entries = [BufferEntry(list(tensors).index(name), offset) for name, offset in zip(names, offsets, strict=True)]
        self.buffer = buffer  # the reference keeps the memory until the next stage
        return self.start(Stage, session_id, buffer.ref, tuple(entries))

    def stage(self, session_id: int, tensors: dict[str, torch.Tensor], only: Sequence[str] | None = None) -> None:
        """Stage and wait for the answer."""
        call_id = self.start_stage(session_id, tensors, only)
        self.until(lambda: call_id in self.link.replies)
        self.answer(call_id)

    def begin_open(self, mode: str = "auto", in_flight: str = "drain", *, partial: bool = False) -> int:
        """Open an open-ended session of 10 s; returns its id."""

        def command(call_id: int) -> BeginUpdate:
            return BeginUpdate(call_id, "v1", (), mode, in_flight, partial, 10.0, is_open=True)  # type: ignore[arg-type]

        return int(self.call(command, kind=UpdateBegun).session_id)

    def extend(self, session_id: int, tensors: dict[str, torch.Tensor]) -> UpdateExtended:
        """Name more tensors of an open-ended session."""
        found = self.call(ExtendUpdate, session_id, manifest_of(tensors), kind=UpdateExtended)
        assert isinstance(found, UpdateExtended)
        return found

    def start_part(self, session_id: int, tensors: dict[str, torch.Tensor]) -> int:
        """Name more tensors, and queue their staging in one bucket; returns the call id."""
        first = self.extend(session_id, tensors).first_index
        buffer, offsets = bucket_of(list(tensors.values()))
        entries = tuple(BufferEntry(first + number, offset) for number, offset in enumerate(offsets))
        self.buffer = buffer
        return self.start(Stage, session_id, buffer.ref, entries)

    def stage_part(self, session_id: int, tensors: dict[str, torch.Tensor]) -> None:
        """Name more tensors, stage them, and wait for the answer."""
        if tensors:
            self.call_answer(self.start_part(session_id, tensors))
        else:
            self.extend(session_id, tensors)

    # What came of a request.

    def finish(self, handle: int) -> Finish | None:
        """How a request ended; None while it has not."""
        known = self.link.deltas.get(handle)
        return known[-1].finish if known else None

    def finish_types(self, *handles: int) -> list[str | None]:
        """The finish types of requests."""
        found = [self.finish(handle) for handle in handles]
        return [finish.type if finish else None for finish in found]

    def tokens(self, handle: int) -> list[int]:
        """All tokens of a request so far."""
        return [int(token) for delta in self.link.deltas.get(handle, []) for token in unpack_ids(delta.token_ids)]

    def logprobs(self, handle: int) -> list[float]:
        """All log-probabilities of a request so far."""
        return [float(value) for delta in self.link.deltas.get(handle, []) for value in unpack_floats(delta.logprobs)]

    def spans(self, handle: int) -> list[tuple[str, int]]:
        """A request's version spans, neighbours of one version merged."""
        merged: list[tuple[str, int]] = []
        for delta in self.link.deltas.get(handle, []):
            for version, count in delta.spans:
                if merged and merged[-1][0] == version:
                    merged[-1] = (version, merged[-1][1] + count)
                else:
                    merged.append((version, count))
        return merged


def _chances() -> Iterator[None]:
    """Many turns, then as many as there is time for: threads and processes beside the core have their share in it."""
    for _ in range(500):
        yield
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        time.sleep(0.001)
        yield
