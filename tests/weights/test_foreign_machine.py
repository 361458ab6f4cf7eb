"""The machine that runs foreign payloads: opcode by opcode as Python's, and everything else refused."""

from __future__ import annotations

import collections
import pickle
import pickletools

import pytest

from headrace.types.errors import WeightUpdateError
from headrace.weights.foreign import read_payload
from headrace.weights.foreign_machine import Budget, Machine
from headrace.weights.foreign_table import TABLE

PROTOCOLS = (2, 3, 4, 5)
P4 = b"\x80\x04"


def _refused(data: bytes) -> str:
    with pytest.raises(WeightUpdateError) as caught:
        read_payload(data)
    return caught.value.message


def _run(data: bytes) -> object:
    return Machine(data, TABLE, Budget(len(data))).run()


LONG_TEXT = "x" * 300
PROGRAMS = {
    "plain": (None, True, False, 0, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 31, 1 << 62, -(1 << 63), 1.5),
    "texts": ("", "a", "é", LONG_TEXT, LONG_TEXT),
    "bytes": (b"", b"a", bytes(300), b"\xff\xfe"),
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((1,), (2, (3, 4)))),
    "lists": ([], [1], [1, 2], list(range(2000)), [[1], [2, [3]]]),
    "dicts": ({}, {"a": 1}, {"a": 1, "b": [2]}, {str(number): number for number in range(2000)}),
    "memory": [["again"] * 300, [[number] for number in range(300)]],
    "ordered": collections.OrderedDict(a=1, b=2),
    "large": (b"y" * 200_000, "z" * 200_000, b"y" * 70_000, list(range(50_000))),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("is_optimized", [False, True])
def test_values_are_read_as_python_reads_them(name: str, protocol: int, is_optimized: bool) -> None:
    value = PROGRAMS[name]
    data = pickle.dumps(value, protocol)
    data = pickletools.optimize(data) if is_optimized else data
    found = Machine(data, TABLE, Budget(len(data))).run()
    assert found == value and type(found) is (dict if name == "ordered" else type(value))


def test_shared_values_stay_shared() -> None:
    inner = ["a"]
    found = _run(pickle.dumps([inner, inner]))
    assert isinstance(found, list) and found[0] is found[1]


OPCODES = {
    "BININT": (b"J\xfe\xff\xff\xff.", -2), "BININT1": (b"K\x07.", 7), "BININT2": (b"M\x07\x01.", 263),
    "LONG1": (b"\x8a\x01\xff.", -1), "BINFLOAT": (b"G?\xf8\0\0\0\0\0\0.", 1.5), "NONE": (b"N.", None),
    "NEWTRUE": (b"\x88.", True), "NEWFALSE": (b"\x89.", False), "SHORT_BINUNICODE": (b"\x8c\x01a.", "a"),
    "BINUNICODE": (b"X\x01\0\0\0a.", "a"), "BINUNICODE8": (b"\x8d\x01" + bytes(7) + b"a.", "a"),
    "SHORT_BINBYTES": (b"C\x01a.", b"a"), "BINBYTES": (b"B\x01\0\0\0a.", b"a"),
    "BINBYTES8": (b"\x8e\x01" + bytes(7) + b"a.", b"a"), "EMPTY_TUPLE": (b").", ()), "TUPLE": (b"(K\1K\2t.", (1, 2)),
    "TUPLE1": (b"K\1\x85.", (1,)), "TUPLE2": (b"K\1K\2\x86.", (1, 2)), "TUPLE3": (b"K\1K\2K\3\x87.", (1, 2, 3)),
    "EMPTY_LIST": (b"].", []), "APPEND": (b"]K\1a.", [1]), "APPENDS": (b"](K\1K\2e.", [1, 2]),
    "EMPTY_DICT": (b"}.", {}), "SETITEM": (b"}\x8c\1aK\1s.", {"a": 1}), "SETITEMS": (b"}(\x8c\1aK\1u.", {"a": 1}),
    "MEMOIZE": (b"K\1\x94h\0\x86.", (1, 1)), "BINPUT": (b"K\1q\0h\0\x86.", (1, 1)),
    "LONG_BINPUT": (b"K\1r\0\0\0\0j\0\0\0\0\x86.", (1, 1)), "FRAME": (b"\x95\x03" + bytes(7) + b"K\1.", 1),
    "frame, then more": (b"\x95\x02" + bytes(7) + b"K\1K\2\x86.", (1, 2)),
    "two frames": (b"\x95\x02" + bytes(7) + b"K\1\x95\x04" + bytes(7) + b"K\2\x86.", (1, 2)),
    "REDUCE": (b"ccollections\nOrderedDict\n)R.", {}),
    "STACK_GLOBAL": (b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R.", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCODES)
def test_each_opcode_does_what_it_does_in_python(name: str) -> None:
    program, expected = OPCODES[name]
    assert _run(P4 + program) == pickle.loads(P4 + program) == expected


REFUSED_PROGRAMS = {
    "nothing": (b"", "does not begin"),
    "text protocol": (b"I1\n.", "does not begin"),
    "protocol 1": (b"\x80\x01K\1.", "does not begin"),
    "protocol 6": (b"\x80\x06K\1.", "does not begin"),
    "no end": (P4 + b"K\1", "beyond the end"),
    "nothing left": (P4 + b".", "not there"),
    "two left": (P4 + b"K\1K\2.", "more than one value"),
    "a mark left": (P4 + b"K\1(.", "not there"),
    "trailing bytes": (P4 + b"K\1.K", "1 bytes follow"),
    "two programs": (2 * (P4 + b"K\1."), "follow its end"),
    "long text": (P4 + b"X\xff\xff\xff\xffab.", "beyond the end"),
    "longest text": (P4 + b"\x8d" + b"\xff" * 8 + b"ab.", "beyond the end"),
    "long bytes": (P4 + b"B\xff\xff\xff\x7fab.", "beyond the end"),
    "longest bytes": (P4 + b"\x8e" + b"\xff" * 8 + b"ab.", "beyond the end"),
    "half a number": (P4 + b"J\1\1", "beyond the end"),
    "bad text": (P4 + b"\x8c\x01\xff.", "not utf-8"),
    "surrogates": (P4 + b"\x8c\x03\xed\xa0\x80.", "not utf-8"),
    "long integer": (P4 + b"\x8a\x0a" + bytes(10) + b".", "integer has 10 bytes"),
    "frame beyond": (P4 + b"\x95\x04" + bytes(7) + b"K\1.", "frame of 4 bytes"),
    "longest frame": (P4 + b"\x95" + b"\xff" * 8 + b"K\1.", "frame of"),
    "frame in frame": (P4 + b"\x95\x0c" + bytes(7) + b"\x95\x03" + bytes(7) + b"K\1.", "frame of 3 bytes"),
    "frame cuts an opcode": (P4 + b"\x95\x01" + bytes(7) + b"K\1.", "beyond the end"),
    "frame cuts a text": (P4 + b"\x95\x03" + bytes(7) + b"\x8c\x05abcde.", "beyond the end"),
    "frame cuts a name": (P4 + b"\x95\x03" + bytes(7) + b"ctorch\nSize\n.", "does not end"),
    "frame goes on": (P4 + b"\x95\x04" + bytes(7) + b"K\1.K", "1 bytes follow"),
    "memo of nothing": (P4 + b"\x94.", "not there"),
    "memo across a mark": (P4 + b"K\1(\x94t.", "not there"),
    "memo out of order": (P4 + b"K\1q\1.", "remembers value 1 where 0"),
    "memo far away": (P4 + b"K\1r\xff\xff\xff\xff.", "remembers value 4294967295"),
    "memo again": (P4 + b"K\1q\0q\0.", "remembers value 0 where 1"),
    "recalls what is not": (P4 + b"h\0.", "recalls value 0 of 0"),
    "recalls far away": (P4 + b"j\xff\xff\xff\xff.", "recalls value 4294967295"),
    "tuple of too few": (P4 + b"K\1\x86.", "not there"),
    "tuple across a mark": (P4 + b"K\1(K\2\x86.", "not there"),
    "no mark": (P4 + b"]K\1e.", "a mark"),
    "append to a number": (P4 + b"K\1K\2a.", "wants a list, not a int"),
    "append to a tuple": (P4 + b")K\2a.", "wants a list, not a tuple"),
    "item of a list": (P4 + b"]K\1K\2s.", "wants a dict, not a list"),
    "half an item": (P4 + b"}(\x8c\1au.", "without a value"),
    "number as key": (P4 + b"}K\1K\2s.", "a int as key"),
    "tuple as key": (P4 + b"})K\2s.", "a tuple as key"),
    "key twice": (P4 + b"}(\x8c\1aK\1\x8c\1aK\2u.", "comes twice"),
    "deep": (P4 + b"(" * 33 + b"t" * 33 + b".", "more than 32 deep"),
    "name of numbers": (P4 + b"K\1K\2\x93.", "not of two strings"),
    "name without end": (P4 + b"c" + b"a" * 100_000, "does not end"),
    "name not ascii": (P4 + b"c\xff\na\n.", "not ascii"),
    "call of a number": (P4 + b"K\1)R.", "calls a int"),
    "call of a text": (P4 + b"\x8c\x05print)R.", "calls a str"),
    "call of a class": (P4 + b"ctorch\nTensor\n)R.", "calls a torch.Tensor"),
    "call of an instance": (P4 + b"csglang.srt.patch_torch\n_rebuild_cuda_tensor_modified\n)R)R.", "not of 15"),
    "arguments as list": (P4 + b"ccollections\nOrderedDict\n]R.", "makes nothing"),
    "instance of a function": (P4 + b"ccollections\nOrderedDict\n)\x81.", "an instance of a collections.OrderedDict"),
    "instance of a number": (P4 + b"K\1)\x81.", "an instance of a int"),
    "state of a dict": (P4 + b"}}b.", "wants a Instance, not a dict"),
    "state of a class": (P4 + b"ctorch\nTensor\n}b.", "not a torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_PROGRAMS)
def test_a_program_that_is_none_is_refused(name: str) -> None:
    program, words = REFUSED_PROGRAMS[name]
    assert words in _refused(program)


FEW = b".\x80\x95(NKMJG\x88\x89\x8a\x8c\x8dXCB\x8e)\x85\x86\x87t]ae}su\x94qrhjc\x93R\x81b"


@pytest.mark.parametrize("code", [code for code in range(256) if code not in FEW])
def test_every_other_opcode_is_refused(code: int) -> None:
    assert "not one of the few understood" in _refused(P4 + bytes([code]) + b"K\1.")


def test_a_protocol_is_said_once() -> None:
    assert "not one of the few understood" in _refused(P4 + P4 + b"K\1.")


LOCAL = b"csglang.srt.model_executor.model_runner\nLocalSerializedTensor\n"


@pytest.mark.parametrize(
    "program",
    [
        b")\x81}b.",
        b")\x81Nb.",
        b")\x81}(\x8c\6values]\x8c\4moreNub.",
        b")\x81}\x8c\6values]sb}\x8c\6values]sbN.",
    ],
)
def test_an_instance_has_its_fields_once_and_no_others(program: bytes) -> None:
    assert "LocalSerializedTensor has other fields" in _refused(P4 + LOCAL + program)


@pytest.mark.parametrize("arguments", [b"N", b"]", b"K\1\x85"])
def test_an_instance_is_made_of_no_arguments(arguments: bytes) -> None:
    assert "makes an instance of a" in _refused(P4 + LOCAL + arguments + b"\x81.")


def test_an_instance_without_fields_is_no_tensor() -> None:
    assert "no bytes for rank 0" in _refused(P4 + b"]\x8c\1a" + LOCAL + b")\x81\x86a.")
