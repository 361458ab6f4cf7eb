"""The stack machine that payloads of other engines' clients are written for, without anything that could run.

Such a payload is a program: opcodes that put values on a stack. Python's own reader of it imports what the program
names and calls it. This one knows some thirty opcodes, builds plain values, and of a name knows only what a closed
table says (`Known`): that it is a value of its own, that a function of ours makes a value of its arguments (`build`),
or that it is a class with certain fields (`fields`, `Instance`). Nothing is looked up by a name that is not there.

Every value takes an opcode, and opcodes are counted; strings are cut from the data and never multiplied; so time and
memory are bounded by `MAX_BYTES` and `MAX_OPCODES`, whatever the data says. It raises `Unreadable` and nothing else.

Owns opcodes, frames, stack, memo and their bounds. Must not know what any name means.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

MAX_BYTES = 64 << 20
"""Of a payload, which holds handles and no values: some 300 bytes a tensor."""

MAX_OPCODES = 1 << 22
"""Of a payload and all that it nests, less than ten seconds' worth and half a GB; a tensor takes some 40."""

MAX_MARKS = 32
"""How deep lists, tuples and dicts may be begun inside each other."""

MAX_NAME_BYTES = 256
"""Of a module's or a global's name."""

_MAX_INT_BYTES = 9  # every 64-bit number, signed or not
_TEXT_FACTOR = 4
_PROTOCOLS = range(2, 6)
_SHOWN = 120


class Unreadable(ValueError):
    """What was not understood, in words."""


class Known(msgspec.Struct, frozen=True, eq=False):
    """What a name stands for. `build` makes a value of arguments; `fields` are those of an instance of a class, which
    may have `more`. One of a class that has none, but `num_values`, has its state in a tuple of so many. Instances of
    one that `is_key` may be keys of dicts, each a key of its own whatever it holds."""

    module: str
    name: str
    build: Callable[[tuple[Any, ...]], object] | None = None
    fields: frozenset[str] | None = None
    more: frozenset[str] = frozenset()
    num_values: int = 0
    is_key: bool = False

    def takes(self, state: object) -> bool:
        """It is the state of an instance."""
        if self.num_values:
            return type(state) is tuple and len(state) == self.num_values
        fields = self.fields or frozenset()
        return type(state) is dict and fields <= state.keys() <= fields | self.more


Table = Mapping[tuple[str, str], Known | str]
"""All names by (module, name); a text is a hint about one that is refused."""


class Instance:
    """An instance of a class with fields, which come after it. `state` is None until then."""

    __slots__ = ("known", "state")

    def __init__(self, known: Known) -> None:
        self.known = known
        self.state: Any = None


class Budget:
    """What a payload of so many bytes may still cost, with all that it nests."""

    def __init__(self, num_bytes: int, max_opcodes: int | None = None) -> None:
        """`max_opcodes`: None is MAX_OPCODES."""
        if num_bytes > MAX_BYTES:
            raise Unreadable(f"it has {num_bytes} bytes, at most {MAX_BYTES} may be")
        self.opcodes = self._max_opcodes = MAX_OPCODES if max_opcodes is None else max_opcodes
        self._bytes = _TEXT_FACTOR * num_bytes

    def step(self) -> None:
        """Count an opcode."""
        self.opcodes -= 1
        if self.opcodes < 0:
            raise Unreadable(f"it has more than {self._max_opcodes} opcodes")

    def reread(self, num_bytes: int) -> None:
        """Count bytes that are read, or made into others, once more."""
        self._bytes -= num_bytes
        if self._bytes < 0:
            raise Unreadable("it has the same bytes read again and again")


class Machine:
    """One program and its run."""

    def __init__(self, data: bytes, table: Table, budget: Budget) -> None:
        self._data = data
        self._table = table
        self._budget = budget
        self._at = 0
        self._is_in_frame = False
        self._end = len(data)  # of the frame, inside one
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._floor = 0
        self._memo: list[Any] = []

    def run(self) -> object:
        """The value that the program leaves. `Unreadable` for whatever is not understood."""
        if len(self._data) < 2 or self._data[0] != _PROTO or self._data[1] not in _PROTOCOLS:
            raise Unreadable("it does not begin as protocols 2 to 5 do")
        self._at = 2
        while True:
            if self._at == self._end:
                self._is_in_frame, self._end = False, len(self._data)
            (code,) = self.take(1)
            self._budget.step()
            if code == _STOP:
                return self._result()
            step = _STEPS.get(code)
            if step is None:
                raise Unreadable(f"opcode {bytes([code])!r} at byte {self._at - 1} is not one of the few understood")
            step(self)

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        end = self._at + count
        if end > self._end:
            raise Unreadable(f"{count} bytes at byte {self._at} are beyond the end, which is at {self._end}")
        found = self._data[self._at : end]
        self._at = end
        return found

    def number(self, form: struct.Struct) -> Any:
        """The next number of the program."""
        return form.unpack(self.take(form.size))[0]

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the last value from the stack, if there is one since the last mark."""
        if len(self._stack) <= self._floor:
            raise Unreadable(f"the opcode at byte {self._at - 1} wants a value that is not there")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        """The last value of the stack, which stays there and is of this kind."""
        found = self.pop()
        if type(found) is not kind:
            raise Unreadable(f"the opcode at byte {self._at - 1} wants a {kind.__name__}, not a {shown_kind(found)}")
        self.push(found)
        return found

    def mark(self) -> None:
        """Begin a list of values."""
        if len(self._marks) == MAX_MARKS:
            raise Unreadable(f"it nests more than {MAX_MARKS} deep")
        self._floor = len(self._stack)
        self._marks.append(self._floor)

    def pop_mark(self) -> list[Any]:
        """All values since the last mark, which is over."""
        if not self._marks:
            raise Unreadable(f"the opcode at byte {self._at - 1} wants a mark that is not there")
        found = self._stack[self._marks.pop() :]
        del self._stack[self._floor :]
        self._floor = self._marks[-1] if self._marks else 0
        return found

    def line(self) -> str:
        """The next line of the program, a name."""
        end = self._data.find(b"\n", self._at, min(self._end, self._at + MAX_NAME_BYTES))
        if end < 0:
            raise Unreadable(f"the name at byte {self._at} does not end")
        found = self.take(end + 1 - self._at)
        return text_of(found[:-1], "ascii")

    def frame(self) -> None:
        """Begin a frame, which ends between two opcodes."""
        size = self.number(_U64)
        if self._is_in_frame or size > self._end - self._at:
            raise Unreadable(f"the frame of {size} bytes at byte {self._at} does not fit where it is")
        self._is_in_frame, self._end = True, self._at + size

    def memoize(self, index: int | None = None) -> None:
        """Remember the last value under the next number, which the program may say too."""
        if index is not None and index != len(self._memo):
            raise Unreadable(f"it remembers value {index} where {len(self._memo)} is the next")
        value = self.pop()
        self.push(value)
        self._memo.append(value)

    def recall(self, index: int) -> None:
        """Put a remembered value on the stack once more."""
        if index >= len(self._memo):
            raise Unreadable(f"it recalls value {index} of {len(self._memo)}")
        self.push(self._memo[index])

    def resolve(self, module: object, name: object) -> None:
        """Put what a name stands for on the stack."""
        if type(module) is not str or type(name) is not str:
            raise Unreadable(f"the name at byte {self._at} is not of two strings")
        found = self._table.get((module, name))
        if not isinstance(found, Known):
            hint = found or "which is not one of the few names understood; nothing was imported or called"
            raise Unreadable(f"it names {module[:_SHOWN]}.{name[:_SHOWN]}, {hint}")
        self.push(found)

    def reduce(self) -> None:
        """Make a value of arguments."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Known) or function.build is None or type(arguments) is not tuple:
            raise Unreadable(f"it calls a {shown_kind(function)}, which makes nothing")
        self._budget.reread(sum(len(value) for value in arguments if type(value) in (str, bytes)))
        self.push(function.build(arguments))

    def instantiate(self) -> None:
        """Begin an instance of a class with fields."""
        arguments, known = self.pop(), self.pop()
        if not isinstance(known, Known) or known.fields is None or type(arguments) is not tuple or arguments:
            raise Unreadable(f"it makes an instance of a {shown_kind(known)}, which has none")
        self.push(Instance(known))

    def build(self) -> None:
        """Give an instance its fields, once."""
        state = self.pop()
        instance = self.top(Instance)
        if instance.state is not None or not instance.known.takes(state):
            raise Unreadable(f"a {instance.known.name} has other fields than {sorted(instance.known.fields or ())}")
        instance.state = state

    def set_items(self, items: list[Any]) -> None:
        """Fill the dict on the stack."""
        target = self.top(dict)
        if len(items) % 2:
            raise Unreadable("a dict has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (isinstance(key, Instance) and key.known.is_key):
                raise Unreadable(f"a dict has a {shown_kind(key)} as key")
            if key in target:
                raise Unreadable("a key comes twice")
            target[key] = value

    def _result(self) -> object:
        if self._at != len(self._data):
            raise Unreadable(f"{len(self._data) - self._at} bytes follow its end")
        found = self.pop()
        if self._stack or self._marks:
            raise Unreadable("it leaves more than one value")
        return found


def text_of(data: bytes, encoding: str = "utf-8") -> str:
    """The text of these bytes."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"a string is not {encoding}: {error.reason}") from None


def shown_kind(value: object) -> str:
    """What a value is, in a word or two: never the value, which may be anything."""
    if isinstance(value, Instance):
        value = value.known
    return f"{value.module}.{value.name}" if isinstance(value, Known) else type(value).__name__


_PROTO, _STOP = 0x80, ord(".")
_U8, _U16, _U32, _U64 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")

Step = Callable[[Machine], None]


def _constant(value: object) -> Step:
    return lambda machine: machine.push(value)


def _number(form: struct.Struct) -> Step:
    return lambda machine: machine.push(machine.number(form))


def _bytes(form: struct.Struct) -> Step:
    return lambda machine: machine.push(machine.take(machine.number(form)))


def _text(form: struct.Struct) -> Step:
    return lambda machine: machine.push(text_of(machine.take(machine.number(form))))


def _long(machine: Machine) -> None:
    count = machine.number(_U8)
    if count > _MAX_INT_BYTES:
        raise Unreadable(f"an integer has {count} bytes")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _tuple(count: int) -> Step:
    def step(machine: Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return step


def _append(machine: Machine) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _append_all(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.top(list).extend(items)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.resolve(module, name)


_STEPS: dict[int, Step] = {
    0x95: Machine.frame,
    ord("("): Machine.mark,
    ord("N"): _constant(None), 0x88: _constant(True), 0x89: _constant(False),
    ord("K"): _number(_U8), ord("M"): _number(_U16), ord("J"): _number(_I32), 0x8A: _long, ord("G"): _number(_F64),
    0x8C: _text(_U8), ord("X"): _text(_U32), 0x8D: _text(_U64),
    ord("C"): _bytes(_U8), ord("B"): _bytes(_U32), 0x8E: _bytes(_U64),
    ord(")"): _constant(()), 0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3),
    ord("t"): lambda machine: machine.push(tuple(machine.pop_mark())),
    ord("]"): lambda machine: machine.push([]), ord("a"): _append, ord("e"): _append_all,
    ord("}"): lambda machine: machine.push({}), ord("s"): _set_item,
    ord("u"): lambda machine: machine.set_items(machine.pop_mark()),
    0x94: Machine.memoize,
    ord("q"): lambda machine: machine.memoize(machine.number(_U8)),
    ord("r"): lambda machine: machine.memoize(machine.number(_U32)),
    ord("h"): lambda machine: machine.recall(machine.number(_U8)),
    ord("j"): lambda machine: machine.recall(machine.number(_U32)),
    ord("c"): lambda machine: machine.resolve(machine.line(), machine.line()),
    0x93: _stack_global,
    ord("R"): Machine.reduce, 0x81: Machine.instantiate, ord("b"): Machine.build,
}  # fmt: skip
"""What each opcode does. All others are refused: they build what no payload has, or call by other roads."""
