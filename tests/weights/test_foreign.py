"""Payloads of other engines' clients: real ones are understood, and nothing else is, by name."""

from __future__ import annotations

import codecs
import collections
import os
import pickle
import pickletools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import CudaHandle, FlatTensor, ForeignTensor, NoMemory, Payload, SharedFile
from headrace.weights import foreign_machine
from headrace.weights.foreign import read_nccl_id, read_payload
from headrace.weights.foreign_machine import Known
from headrace.weights.foreign_table import REF_COUNTERS, TABLE
from tests.weights.foreign_payloads import (
    BUCKET_HOMES,
    CUDA_HOMES,
    LOCAL_HOMES,
    NCCL_HOMES,
    UUID,
    Reduced,
    cuda_call,
    flattened,
    local,
    nccl_id,
    patched_cuda,
    serialized,
    standing_in,
)

PROTOCOLS = (2, 3, 4, 5)
P4 = b"\x80\x04"


def _refused(data: bytes, rank: int = 0) -> str:
    with pytest.raises(WeightUpdateError) as caught:
        read_payload(data, rank)
    assert caught.value.field == "serialized_named_tensors"
    return caught.value.message


def _storage(tensor: ForeignTensor) -> Any:
    return tensor.storage


# What is understood.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_named_tensors_say_where_they_are(protocol: int) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    sent = {
        "whole": base, "turned": base.t(), "part": base[1:3, 2:5], "number": base[2, 3], "empty": base[:0],
        "half": base.to(torch.bfloat16), "parameter": torch.nn.Parameter(base.clone()),
    }  # fmt: skip
    found = read_payload(serialized(list(sent.items()), protocol))
    assert [tensor.name for tensor in found.tensors] == list(sent)
    assert not found.buckets
    for tensor, original in zip(found.tensors, sent.values(), strict=True):
        assert (tensor.shape, tensor.stride) == (tuple(original.shape), original.stride())
        assert (tensor.offset, tensor.dtype) == (original.storage_offset(), str(original.dtype).removeprefix("torch."))
        assert isinstance(tensor.storage, SharedFile)
        assert tensor.storage.num_bytes == original.untyped_storage().nbytes()
        assert tensor.storage.handle.startswith("/torch_") and tensor.storage.manager.endswith("manager.sock")


def test_views_of_one_storage_share_the_file_and_every_sending_counts() -> None:
    base = torch.arange(6, dtype=torch.float32)
    once = read_payload(serialized([("a", base[:3]), ("b", base[3:])]))
    assert once.tensors[0].storage == once.tensors[1].storage
    assert once.files == (once.tensors[0].storage,)
    nested = local({"a": [serialized(base[:3])], "b": [serialized(base[3:])]})
    assert read_payload(nested).files == (once.files[0], once.files[0])


@pytest.mark.parametrize("name", [name for module, name in TABLE if module == "torch" and hasattr(torch, name)])
def test_every_dtype_of_weight_files_is_known(name: str) -> None:
    dtype = getattr(torch, name)
    if isinstance(dtype, torch.dtype):
        (tensor,) = read_payload(serialized([("a", torch.zeros(2, 3, dtype=dtype))])).tensors
        assert tensor.dtype == name


def test_an_empty_tensor_has_no_handle_under_the_other_strategy() -> None:
    (tensor,) = read_payload(serialized([("a", torch.empty(0, 4))], strategy="file_descriptor")).tensors
    assert tensor == ForeignTensor("a", "float32", (0, 4), (4, 1), 0, NoMemory())


@pytest.mark.parametrize("home", BUCKET_HOMES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bucket_is_its_memory_and_what_is_in_it(home: str, protocol: int) -> None:
    sent = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "none": torch.zeros(0, 2)}
    found = read_payload(flattened(sent, home, protocol))
    (bucket,) = found.buckets
    assert not found.tensors
    assert (bucket.memory.dtype, bucket.memory.shape, bucket.memory.stride) == ("uint8", (34,), (1,))
    assert bucket.tensors == (
        FlatTensor("a", (2, 3), "float32", 0, 24),
        FlatTensor("b", (5,), "bfloat16", 24, 34),
        FlatTensor("none", (0, 2), "float32", 34, 34),
    )
    assert found.files == (bucket.memory.storage,)


def test_an_empty_bucket_is_legal() -> None:
    (bucket,) = read_payload(flattened({})).buckets
    assert (bucket.memory.shape, bucket.tensors) == ((0,), ())


@pytest.mark.parametrize("home", LOCAL_HOMES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_rank_reads_its_own(home: str, protocol: int) -> None:
    first, second = (serialized(torch.zeros(2 + rank), protocol) for rank in range(2))
    data = local({"a": [first, second], "b": [second, None]}, home, protocol)
    assert [tensor.shape for tensor in read_payload(data).tensors] == [(2,), (3,)]
    assert "no bytes for rank 1" in _refused(data, rank=1)
    assert "no bytes for rank 2" in _refused(data, rank=2)
    only = local({"a": [None, second]}, home, protocol)
    assert [tensor.shape for tensor in read_payload(only, rank=1).tensors] == [(3,)]


@pytest.mark.parametrize("device", [3, torch.device("cuda", 3)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cuda_memory_is_a_handle(device: object, protocol: int) -> None:
    view = torch.zeros(8, 4)[2:4]
    (tensor,) = read_payload(serialized([("a", cuda_call(view, storage_device=device))], protocol)).tensors
    expected = CudaHandle(3, b"\x02c" + bytes(range(64)), 128, 512, "/torch_77_1234_5", 7, bytes(64), True)
    assert tensor == ForeignTensor("a", "float32", (2, 4), (4, 1), 8, expected)


@pytest.mark.parametrize("home", CUDA_HOMES)
def test_cuda_memory_may_name_its_device_by_uuid(home: str) -> None:
    (tensor,) = read_payload(patched_cuda(torch.zeros(2), home)).tensors
    assert _storage(tensor).device == UUID


def test_cuda_memory_without_elements_has_no_handle() -> None:
    (tensor,) = read_payload(serialized([("a", cuda_call(torch.zeros(0), storage_handle=None))])).tensors
    assert tensor.storage == NoMemory()


def test_an_unpatched_parameter_is_its_tensor() -> None:
    parameter = Reduced(torch._utils._rebuild_parameter, torch.zeros(2), True, collections.OrderedDict())
    (tensor,) = read_payload(serialized([("a", parameter)])).tensors
    assert tensor.shape == (2,)
    hooked = Reduced(torch._utils._rebuild_parameter, torch.zeros(2), True, collections.OrderedDict(a=1))
    assert "hooks" in _refused(serialized([("a", hooked)]))


@pytest.mark.parametrize("home", NCCL_HOMES)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_nccl_id_is_its_128_bytes(home: str, protocol: int) -> None:
    expected = bytes(range(128))
    assert read_nccl_id(nccl_id(expected, home, protocol)) == expected


def test_vllms_nccl_id_has_the_size_that_was_seen() -> None:
    assert len(nccl_id(bytes(128))) == 247


@pytest.mark.parametrize(
    "data",
    [
        nccl_id(bytes(127)), nccl_id(bytes(129)), nccl_id(bytes(128), "elsewhere.pynccl_wrapper"), b"", bytes(128),
        nccl_id(bytes(128)) + b".", nccl_id(bytes(128))[:-1], pickle.dumps(bytes(128))[:-1], pickle.dumps("id"),
        pickle.dumps(Reduced(os.system, "true")), serialized([("a", torch.zeros(1))]),
    ],
)  # fmt: skip
def test_nothing_else_is_an_nccl_id(data: bytes) -> None:
    with pytest.raises(WeightUpdateError) as caught:
        read_nccl_id(data)
    assert caught.value.field == "nccl_unique_id"


# What must never run.


class _Anything:
    def __reduce__(self) -> Any:
        return print, ("called",)


MALICIOUS: dict[str, tuple[object, str]] = {
    "system": (Reduced(os.system, "touch /tmp/called"), f"{os.system.__module__}.system"),
    "evaluate": (Reduced(eval, "1"), "builtins.eval"),
    "execute": (Reduced(exec, "1"), "builtins.exec"),
    "get": (Reduced(getattr, "a", "b"), "builtins.getattr"),
    "import": (Reduced(__import__, "antigravity"), "builtins.__import__"),
    "process": (Reduced(subprocess.Popen, ["true"]), "subprocess.Popen"),
    "print": (_Anything(), "builtins.print"),
    "torch.load": (Reduced(torch.load, "file"), "torch.serialization.load"),
    "load from bytes": (Reduced(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
    "class": (_Anything, "_Anything"),
    "exception": (ValueError("x"), "builtins.ValueError"),
    "set": ({1}, "opcode"),
    "complex": (1j, "builtins.complex"),
    "range": (range(1 << 40), "builtins.range"),
    "encode": (Reduced("".encode, "x"), "builtins.getattr"),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_whatever_else_is_named_is_refused_by_name(
    name: str, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    value, words = MALICIOUS[name]
    data = pickle.dumps([("a", value)], protocol)
    if protocol == 2:  # which spells some names as Python 2 did
        names = [str(found).replace(" ", ".") for code, found, _ in pickletools.genops(data) if code.name == "GLOBAL"]
        words = names[0]
    assert words in _refused(data)
    assert words in _refused(local({"a": [data]}))
    assert not capsys.readouterr().out


def test_a_plain_tensor_and_a_descriptor_are_refused_with_a_hint() -> None:
    assert "_rebuild_tensor_v2" in (message := _refused(pickle.dumps([("a", torch.zeros(2))])))
    assert "headrace.client" in message
    message = _refused(serialized([("a", torch.zeros(2))], strategy="file_descriptor"))
    assert "rebuild_storage_fd" in message and 'set_sharing_strategy("file_system")' in message


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()])
def test_other_kinds_of_tensors_are_refused_by_name(tensor: torch.Tensor) -> None:
    assert "torch.multiprocessing.reductions.rebuild_" in _refused(serialized([("a", tensor)]))


class _Sub(torch.Tensor):
    pass


def test_subclasses_of_tensors_are_refused() -> None:
    data = pickle.dumps([("a", torch.zeros(2).as_subclass(_Sub))])
    assert "_rebuild_from_type_v2" in _refused(data)


def test_nothing_is_imported() -> None:
    """In a process of its own, where neither torch nor what the payload names is loaded: and stays so."""
    payloads = [
        flattened({"a": torch.zeros(2)}), local({"a": [serialized(torch.zeros(2))]}), patched_cuda(torch.zeros(2)),
        nccl_id(bytes(128)), pickle.dumps(Reduced(os.system, "exit 9")), serialized([("a", torch.zeros(2))]),
        b"\x80\x04cantigravity\nfly\n)R.", b"\x80\x04cthis\ns\n.",
    ]  # fmt: skip
    script = f"""
import sys
from headrace.types.errors import WeightUpdateError
from headrace.weights.foreign import read_nccl_id, read_payload
before = set(sys.modules)
outcomes = []
for read in (read_payload, read_nccl_id):
    for data in {payloads!r}:
        try:
            read(data)
            outcomes.append(1)
        except WeightUpdateError:
            outcomes.append(0)
more = set(sys.modules) - before - {{"encodings.latin_1", "encodings.ascii"}}
assert not more, more
assert "torch" not in sys.modules
assert outcomes == [1, 1, 1, 0, 0, 1, 0, 0] + [0, 0, 0, 1, 0, 0, 0, 0], outcomes
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Values that do not fit together.


BYTES = torch.zeros(48, dtype=torch.uint8)
TENSOR_OF_BUCKET: dict[str, object] = {
    "name": "a", "shape": torch.Size([2, 3]), "dtype": torch.float32, "start_idx": 0, "end_idx": 24, "numel": 6,
}  # fmt: skip


def _bucket_of(*states: dict[str, object], memory: object = None) -> bytes:
    """A bucket with these as the fields of its metadata, in 24 bytes each."""
    kind = type("FlattenedTensorMetadata", (), {})
    with standing_in(BUCKET_HOMES[0], kind):
        items = [kind() for _ in states]
        for item, state in zip(items, states, strict=True):
            item.__dict__.update(state)
        memory = torch.zeros(24 * len(states), dtype=torch.uint8) if memory is None else memory
        return serialized({"flattened_tensor": memory, "metadata": items})


def test_numel_counts_elements_or_bytes() -> None:
    assert read_payload(_bucket_of(TENSOR_OF_BUCKET)) and read_payload(_bucket_of(TENSOR_OF_BUCKET | {"numel": 24}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numel": 7}, "numel 7"),
        ({"end_idx": 20}, "bytes 0 to 20"),
        ({"start_idx": -4, "end_idx": 20}, "bytes -4"),
        ({"start_idx": 4, "end_idx": 28}, "ends at byte 28"),
        ({"start_idx": 24, "end_idx": 0}, "bytes 24 to 0"),
        ({"shape": torch.Size([2, 4])}, "of 32 bytes"),
        ({"dtype": torch.bfloat16}, "of 12 bytes"),
        ({"dtype": "float32"}, "a str for a Known"),
        ({"dtype": torch.Tensor}, "torch.Tensor is no dtype"),
        ({"shape": [2, 3]}, "a list for a tuple"),
        ({"shape": (-2, -3)}, "from 0 to 2^63"),
        ({"shape": (True, 3)}, "from 0 to 2^63"),
        ({"shape": (1 << 62, 1 << 62)}, "2^60 elements"),
        ({"shape": (1,) * 9}, "9 dimensions"),
        ({"name": ""}, "0 characters"),
        ({"name": "n" * 1025}, "1025 characters"),
        ({"name": b"a"}, "a bytes for a str"),
        ({"start_idx": None}, "a NoneType for a int"),
        ({"start_idx": False}, "a bool for a int"),
        ({"more": 1}, "other fields"),
    ],
)
def test_a_tensor_that_does_not_fit_its_bucket_is_refused(changes: dict[str, object], words: str) -> None:
    assert words in _refused(_bucket_of(TENSOR_OF_BUCKET | changes))


@pytest.mark.parametrize("memory", [torch.zeros(6), BYTES[::2], BYTES.reshape(2, 24), BYTES.to(torch.int8), b"abc"])
def test_a_bucket_is_contiguous_bytes(memory: object) -> None:
    assert "contiguous tensor of uint8" in _refused(_bucket_of(TENSOR_OF_BUCKET, memory=memory))


def test_tensors_of_a_bucket_share_no_byte_and_no_name() -> None:
    first = TENSOR_OF_BUCKET
    shifted, second = ({"name": "b", "start_idx": start, "end_idx": start + 24} for start in (20, 24))
    assert "begins at byte 20" in _refused(_bucket_of(first, first | shifted))
    assert "tensor a comes twice" in _refused(_bucket_of(first, first | second | {"name": "a"}))
    assert read_payload(_bucket_of(first | second, first))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_size": (8, 4)}, "a tensor needs"),
        ({"tensor_stride": (1 << 62, 1)}, "a tensor needs"),
        ({"tensor_stride": (4,)}, "strides"),
        ({"tensor_stride": (-4, 1)}, "strides"),
        ({"tensor_offset": -1}, "storage_offset"),
        ({"tensor_offset": 1 << 63}, "storage_offset"),
        ({"tensor_offset": 1000}, "a tensor needs"),
        ({"tensor_size": (1 << 60, 0, 4), "tensor_stride": (0, 0, 0), "dtype": "float32"}, "a str for a Known"),
        ({"tensor_cls": torch.Size}, "a tensor is a torch.Size"),
        ({"storage_cls": torch.Tensor}, "no storage"),
        ({"dtype": torch.Tensor}, "no dtype"),
        ({"storage_handle": "x" * 64}, "a handle"),
        ({"storage_handle": b"\x02e" + bytes(64)}, "expandable_segments"),
        ({"event_handle": bytes(65), "event_sync_required": False}, "65 bytes"),
        ({"event_handle": b""}, "event of 0 bytes"),
        ({"storage_handle": bytes(1 << 17)}, "plain allocation"),
        ({"storage_handle": b""}, "plain allocation"),
        ({"storage_size_bytes": -1}, "storage_size_bytes"),
        ({"storage_size_bytes": 4}, "which has 4"),
        ({"storage_offset_bytes": -1}, "storage_offset_bytes"),
        ({"storage_offset_bytes": 1 << 63}, "storage_offset_bytes"),
        ({"ref_counter_handle": b"/etc/passwd"}, "counters"),
        ({"ref_counter_handle": b"/torch_1/../x"}, "counters"),
        ({"ref_counter_handle": b"/torch_1\0"}, "counters"),
        ({"ref_counter_handle": b"\xff"}, "not ascii"),
        ({"ref_counter_offset": -1}, "counts at -1"),
        ({"ref_counter_offset": REF_COUNTERS}, "counts at 10000"),
        ({"event_handle": None}, "a handle"),
        ({"event_sync_required": 1}, "a int for a bool"),
        ({"storage_device": -1}, "device"),
        ({"storage_device": torch.device("cuda")}, "torch.device is not of 2"),
        ({"storage_device": torch.device("cpu", 0)}, "no CUDA device"),
        ({"storage_device": 1 << 15}, "device"),
        ({"storage_device": "x" * 65}, "device"),
        ({"storage_device": None}, "device"),
    ],
)
def test_cuda_memory_that_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    assert words in _refused(serialized([("a", cuda_call(torch.zeros(2, 4), **changes))]))


@pytest.mark.parametrize("handle", [bytes(64), b"\x01c" + bytes(64)])
def test_handles_of_older_and_newer_torch_are_plain(handle: bytes) -> None:
    data = serialized(
        [("a", cuda_call(torch.zeros(2), storage_handle=handle, event_sync_required=False, event_handle=b""))]
    )
    assert _storage(read_payload(data).tensors[0]).handle == handle


def test_the_last_counter_is_one() -> None:
    assert read_payload(serialized([("a", cuda_call(torch.zeros(2), ref_counter_offset=REF_COUNTERS - 1))]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is a NoneType"),
        (1, "is a int"),
        ("abc", "is a str"),
        (b"abc", "is a bytes"),
        (torch.zeros(2), "is a ForeignTensor"),
        ([1], "named tensor"),
        ([("a",)], "named tensor"),
        ([("a", 1)], "the tensor a is a int"),
        ([(1, torch.zeros(2))], "named tensor"),
        ([["a", torch.zeros(2)]], "named tensor"),
        ([("", torch.zeros(2))], "0 characters"),
        ([("n" * 1025, torch.zeros(2))], "1025"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(3))], "tensor a comes twice"),
        ({}, "other keys"),
        ({"flattened_tensor": torch.zeros(2)}, "other keys"),
        ({"flattened_tensor": torch.zeros(2), "metadata": None}, "other keys"),
        ({"flattened_tensor": torch.zeros(2), "metadata": [], "more": 1}, "other keys"),
        ([("a", torch.Tensor)], "is a torch.Tensor"),
        (
            {"flattened_tensor": torch.zeros(2, dtype=torch.uint8), "metadata": [1]},
            "the metadata of a bucket has a int",
        ),
        ([("a", torch.float32)], "is a torch.float32"),
        ([("a", torch.device("cuda", 1))], "is a int"),
    ],
)
def test_a_payload_has_one_of_two_shapes(value: object, words: str) -> None:
    assert words in _refused(serialized(value))


STORAGE = torch.storage.UntypedStorage
FILE = (STORAGE, b"/tmp/manager.sock", b"/torch_1_2_3", 8)


def _over(storage: object) -> object:
    """A tensor of two float32 over what should be a storage."""
    typed = Reduced(reductions.rebuild_typed_storage, storage, torch.float32)
    return Reduced(reductions.rebuild_tensor, torch.Tensor, typed, (0, torch.Size([2]), (1,), False))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Reduced(codecs.encode, "a", "utf-8"), "not of latin1"),
        (Reduced(codecs.encode, "\u0100", "latin1"), "not of latin1"),
        (Reduced(codecs.encode, "a"), "not of 2 values"),
        (Reduced(collections.OrderedDict, [("a", 1)]), "a dict is made of arguments"),
        (_over(Reduced(reductions.rebuild_storage_filename, torch.Tensor, *FILE[1:])), "makes no storage"),
        (
            _over(Reduced(reductions.rebuild_storage_filename, *FILE[:2], b"/torch_" + b"1" * 250, 8)),
            "makes no storage",
        ),
        (_over(Reduced(reductions.rebuild_storage_filename, STORAGE, b"m" * 256, *FILE[2:])), "makes no storage"),
        (_over(Reduced(reductions.rebuild_storage_filename, *FILE[:3], -1)), "size is not a number"),
        (
            _over(Reduced(reductions.rebuild_storage_filename, *FILE[:3], 1 << 62, torch.float32)),
            "size is not a number",
        ),
        (_over(Reduced(reductions.rebuild_storage_filename, *FILE, torch.Tensor)), "no dtype"),
        (_over(Reduced(reductions.rebuild_storage_filename, *FILE, 4)), "a int for a Known"),
        (_over(Reduced(reductions.rebuild_storage_filename, *FILE[:3])), "not of 4 values"),
        (_over(Reduced(reductions.rebuild_storage_empty, torch.Tensor)), "makes no storage"),
        (_over(5), "a int for a storage"),
        (_over(_over(Reduced(reductions.rebuild_storage_filename, *FILE))), "a ForeignTensor for a storage"),
        (_over(Reduced(reductions.rebuild_storage_empty, STORAGE)), "needs 8 bytes of its storage, which has 0"),
    ],
)
def test_functions_of_the_table_check_what_they_are_given(value: object, words: str) -> None:
    assert words in _refused(serialized([("a", value)]))


def test_older_torch_counts_a_typed_storage_in_elements() -> None:
    named = [("a", _over(Reduced(reductions.rebuild_storage_filename, *FILE[:3], 2, torch.float32)))]
    (tensor,) = read_payload(serialized(named)).tensors
    assert tensor.storage == SharedFile("/tmp/manager.sock", "/torch_1_2_3", 8)


def test_bytes_of_protocol_2_are_empty_or_nothing() -> None:
    assert "a bytes is made of arguments" in _refused(b"\x80\x02c__builtin__\nbytes\nK\1\x85R.")


def test_an_empty_list_is_an_empty_payload() -> None:
    assert read_payload(serialized([])) == read_payload(serialized(())) == Payload()


def test_ranks_do_not_nest() -> None:
    inner = local({"a": [serialized(torch.zeros(2))]})
    assert "the tensor a is a list" in _refused(local({"a": [inner]}))
    assert "no bytes for rank 0" in _refused(local({"a": []}))
    assert "no bytes for rank -1" in _refused(local({"a": [serialized(torch.zeros(2))]}), rank=-1)


def test_instances_of_one_class_are_none_of_the_other() -> None:
    local_tensor, metadata = type("LocalSerializedTensor", (), {}), type("FlattenedTensorMetadata", (), {})
    with standing_in(LOCAL_HOMES[0], local_tensor), standing_in(BUCKET_HOMES[0], metadata):
        local_one, entry = local_tensor(), metadata()
        local_one.__dict__["values"] = [serialized(torch.zeros(2))]
        entry.__dict__.update(TENSOR_OF_BUCKET)
        in_bucket = serialized({"flattened_tensor": BYTES, "metadata": [local_one]})
        as_tensor = serialized([("a", entry)])
    assert "the metadata of a bucket has a sglang.srt.model_executor.model_runner.Local" in _refused(in_bucket)
    assert "a FlattenedTensorMetadata has no bytes for rank 0" in _refused(as_tensor)


# What would take forever.


def _strings_multiplied(count: int) -> bytes:
    """One text of 50,000 letters, made into bytes over and over."""
    text = b"X" + (50_000).to_bytes(4, "little") + b"x" * 50_000
    again = b"h\1h\0\x8c\6latin1\x86Ra"
    return b"\x80\x02](" + b"e" + text + b"q\0" + b"a" + b"c_codecs\nencode\nq\1a" + again * count + b"."


def test_text_is_not_multiplied() -> None:
    assert "again and again" in _refused(_strings_multiplied(20))


def test_bytes_of_a_rank_are_not_read_again_and_again() -> None:
    inner = serialized(torch.zeros(2))
    repeated = local({f"t{index}": [inner] for index in range(400)})  # one object, which the program recalls
    assert len(repeated) < 400 * len(inner) // 4
    assert "again and again" in _refused(repeated)


def test_a_billion_laughs_are_one_list() -> None:
    """Each list holds the one before twice: nobody walks them."""
    program = b"]\x94" + b"".join(b"](h" + bytes([index]) + b"h" + bytes([index]) + b"e\x94" for index in range(60))
    assert "more than one value" in _refused(P4 + program + b".")
    assert "named tensor" in _refused(P4 + b"](" + program + b"e.")


def test_a_list_that_holds_itself_is_only_strange() -> None:
    assert "named tensor" in _refused(P4 + b"]\x94h\0a.")


def test_tuples_nested_very_deep_are_only_strange() -> None:
    deep = b")" + b"\x85" * 200_000
    assert "named tensor" in _refused(P4 + deep + b".")
    assert "torch.Size has a tuple" not in _refused(P4 + b"ctorch\nSize\n" + deep + b"R.")
    assert "a tuple as key" in _refused(P4 + b"}" + deep + b"K\1s.")


def test_opcodes_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serialized([("a", torch.zeros(2))])
    count = sum(1 for _ in pickletools.genops(data)) - 1  # the protocol is no step
    monkeypatch.setattr(foreign_machine, "MAX_OPCODES", count)
    assert read_payload(data)
    monkeypatch.setattr(foreign_machine, "MAX_OPCODES", count - 1)
    assert f"more than {count - 1} opcodes" in _refused(data)
    monkeypatch.setattr(foreign_machine, "MAX_BYTES", len(data) - 1)
    assert f"it has {len(data)} bytes" in _refused(data)


def test_errors_quote_little_of_what_they_refuse() -> None:
    name = "m" * 10_000
    data = P4 + b"X" + len(name).to_bytes(4, "little") + name.encode() + b"\x8c\x01x\x93."
    assert len(_refused(data)) < 400


def test_names_of_the_table_are_distinct_and_ours() -> None:
    assert all(isinstance(found, str) or (found.module, found.name) == key for key, found in TABLE.items())
    assert all(
        not isinstance(found, Known) or found.build is None or found.build.__module__.startswith("headrace.")
        for found in TABLE.values()
    )
