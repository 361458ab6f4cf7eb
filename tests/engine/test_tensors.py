"""Tensors of a caller: read as they are meant, refused by name where they cannot be, and left as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from headrace import Engine
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.tensors import TensorBytes, describe, named_pairs, tensor_bytes
from headrace.engine.update_session import manifest_of
from headrace.rl import push_weights
from headrace.types.errors import WeightUpdateError
from headrace.types.weights import TensorInfo
from tests.engine.builders import model_of, named_tensors

VALUES = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5


class Plain(torch.Tensor):
    """A subclass with memory of its own."""


class Wrapper(torch.Tensor):
    """A subclass that stands for something else."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


def fake(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def freed_under(tensor: torch.Tensor) -> torch.Tensor:
    view = tensor[1:]
    freed(tensor)
    return view


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


READ: dict[str, Callable[[torch.Tensor], Any]] = {
    "as it is": lambda t: t,
    "parameter": lambda t: torch.nn.Parameter(t),
    "with a graph": lambda t: t.requires_grad_() * 1,
    "transposed": lambda t: t.t().contiguous().t(),
    "cut out": lambda t: torch.cat([t, t], 1)[:, 4:],
    "with gaps": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "negative bit": lambda t: torch.complex(t, -t).conj().imag,
    "subclass": lambda t: t.as_subclass(Plain),
    "inference": lambda t: _inference(t),
    "numpy": lambda t: t.numpy(),
    "numpy, Fortran order": lambda t: np.asfortranarray(t.numpy()),
    "numpy, backwards": lambda t: t.flip(1).numpy()[:, ::-1],
    "numpy, big-endian": lambda t: t.numpy().astype(">f4"),
    "numpy, read-only": lambda t: np.frombuffer(t.numpy().tobytes(), np.float32).reshape(t.shape),
}


def _inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor * 1


@pytest.mark.parametrize("form", READ)
def test_every_form_of_a_tensor_is_read_as_its_values(form: str) -> None:
    tensor = READ[form](VALUES.clone())
    assert describe("w", tensor) == TensorInfo("w", (3, 4), "float32")
    assert bytes(tensor_bytes(tensor)) == VALUES.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_keep_their_bits(dtype: str) -> None:
    tensor = VALUES.to(getattr(torch, dtype))
    assert describe("w", tensor).dtype == dtype
    assert bytes(tensor_bytes(tensor)) == tensor.view(torch.int16).numpy().tobytes()


def test_an_expanded_tensor_and_an_empty_one_are_read() -> None:
    assert bytes(tensor_bytes(torch.ones(1).expand(3, 2))) == np.ones((3, 2), np.float32).tobytes()
    assert bytes(tensor_bytes(torch.empty(0, 4))) == b"" and describe("w", torch.empty(0, 4)).shape == (0, 4)
    assert bytes(tensor_bytes(torch.tensor(2.0))) == np.float32(2).tobytes()
    big = np.arange(3, dtype=">f2")
    assert bytes(tensor_bytes(big)) == big.astype("<f2").tobytes()


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "freed": (freed, "its memory was freed"),
    "freed, a view": (lambda t: freed_under(t), "its memory was freed"),
    "meta": (lambda t: t.to("meta"), "meta device"),
    "zeros": (lambda t: torch._efficientzerotensor(t.shape), "no memory of its own"),
    "a view of zeros": (lambda t: torch._efficientzerotensor(t.shape).t(), "no memory of its own"),
    "sparse": (lambda t: t.to_sparse(), "sparse_coo"),
    "sparse rows": (lambda t: t.to_sparse_csr(), "sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t], layout=torch.jagged), "NestedTensor"),
    "nested, strided": (lambda t: torch.nested.nested_tensor([t]), "nested"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
    "fake": (fake, "FakeTensor"),
    "wrapper": (Wrapper, "Wrapper"),
    "masked array": (lambda t: np.ma.masked_less(t.numpy(), 0), "masked array"),
    "list": (lambda t: t.tolist(), "list"),
    "scalar": (lambda t: np.float32(3), "float32"),
    "nothing": (lambda t: None, "NoneType"),
    "something like a tensor": (lambda t: type("Like", (), {"detach": None, "shape": (3, 4)})(), "Like"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_plain_values_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    for form in (dict, list, iter):
        pairs: Any = {"model.w": make(VALUES.clone())}
        with pytest.raises(WeightUpdateError, match=f"model.w .*{message}") as caught:
            HeldTensors(pairs if form is dict else form(pairs.items()))
        assert caught.value.field == "model.w"


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, 1], object),
        np.zeros(2, [("a", "f4")]),
        np.array(["a"]),
        np.zeros(2, np.longdouble),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.int32),
        np.zeros(2, np.complex64),
    ],
    ids=lambda array: str(array.dtype),
)
def test_the_dtype_of_other_arrays_is_named_as_it_is(array: Any) -> None:
    """The engine takes none of these: its manifest says which it takes."""
    assert describe("w", array).dtype not in ("float32", "bfloat16", "float16")


def test_reading_leaves_the_storage_as_it_was() -> None:
    """Its owner may free it afterwards, as FSDP does."""
    tensor = torch.arange(6.0)
    data = tensor_bytes(tensor)
    assert bytes(data[:8]) == np.arange(2, dtype=np.float32).tobytes()
    with pytest.raises(TypeError):
        data[0] = 1
    del data
    assert tensor.untyped_storage().resizable()
    tensor.untyped_storage().resize_(0)


def sent(data: TensorBytes) -> bytes:
    view = bytearray(len(data))
    data.copy_into(memoryview(view))
    return bytes(view)


def test_bytes_are_sent_whole_or_in_slices() -> None:
    for tensor in (VALUES, VALUES.t(), VALUES.numpy().astype(">f4"), torch.empty(0, 4), np.empty((0, 4), np.float32)):
        data, wanted = TensorBytes("w", tensor), bytes(tensor_bytes(tensor))
        assert sent(data) == wanted and len(data) == len(wanted)
        pieces = [data[start : start + 10] for start in range(0, len(data), 10)]
        assert b"".join(map(sent, pieces)) == wanted and sum(map(len, pieces)) == len(wanted)
        assert sent(data[8:][4:12]) == wanted[12:20]


def test_what_is_freed_or_written_to_while_it_waits_is_refused() -> None:
    tensor = torch.ones(8)
    data = TensorBytes("model.w", tensor)
    sent(data[:16])
    tensor.add_(1)
    with pytest.raises(WeightUpdateError, match="model.w was written to while it was sent"):
        sent(data[16:])
    data = TensorBytes("model.w", tensor)
    copied = TensorBytes("model.w", tensor[::2])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(WeightUpdateError, match="model.w .*its memory was freed"):
        sent(data)
    assert sent(copied) == np.full(4, 2, np.float32).tobytes()


def test_a_copy_lives_as_long_as_its_bytes() -> None:
    data = [tensor_bytes(VALUES.t() + number) for number in range(50)]
    for number, each in enumerate(data):
        assert bytes(each) == (VALUES.t() + number).contiguous().numpy().tobytes()


def reused(of: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    memory = torch.empty(64)
    for number in range(4):
        view = of(memory, number)
        view.fill_(float(number))
        yield f"layer.{number}", view


@pytest.mark.parametrize(
    "of",
    [
        lambda memory, number: memory[:12].view(3, 4),
        lambda memory, number: memory[: 3 * (number + 1)],
        lambda memory, number: memory.data[number : number + 4],
        lambda memory, number: memory[number % 2 :: 3],
        lambda memory, number: memory.data.view(8, 8)[:, number : number + 2],
    ],
    ids=["one view", "views of other sizes", "sliding", "interleaved", "columns"],
)
def test_an_iterator_that_fills_its_buffer_again_is_refused_naming_both(of: Any) -> None:
    with pytest.raises(WeightUpdateError, match=r"layer\.\d and layer\.\d lie in the same memory") as caught:
        HeldTensors(reused(of))
    assert caught.value.field.startswith("layer.")


def test_a_numpy_buffer_that_is_filled_again_is_refused() -> None:
    memory = np.empty(12, np.float32)

    def pairs() -> Iterator[tuple[str, Any]]:
        for number in range(3):
            memory[:] = number
            yield f"w{number}", torch.from_numpy(memory) if number == 1 else memory.reshape(3, 4)

    with pytest.raises(WeightUpdateError, match="w0 and w1 lie in the same memory"):
        HeldTensors(pairs())


def test_neighbours_in_one_storage_are_no_overlap() -> None:
    """Pieces of a flat parameter, rows and columns of a fused one, every second element."""
    flat = torch.randn(64)
    square = flat.view(8, 8)
    for parts in (
        [flat[:24], flat[24:40], flat[40:]],
        [square[:3], square[3:]],
        [square[:, :3], square[:, 3:5], square[:, 5:]],
        [flat[::2], flat[1::2]],
        [square[:4, :4].t(), square[:4, 4:], square[4:]],
        [torch.empty(0), flat, flat[:0]],
    ):
        pairs = [(f"w{number}", part) for number, part in enumerate(parts)]
        assert [name for name, _ in HeldTensors(pairs)] == [name for name, _ in pairs]


def test_a_tied_head_may_be_the_embedding() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    tied = {"model.embed_tokens.weight": weight, "model.norm.weight": torch.ones(3), "lm_head.weight": weight.detach()}
    assert len(list(HeldTensors(tied))) == 3
    for other in (weight.detach()[1:], weight.detach().view(3, 4)):
        with pytest.raises(WeightUpdateError, match="lie in the same memory"):
            HeldTensors({**tied, "lm_head.weight": other})
    with pytest.raises(WeightUpdateError, match="lie in the same memory"):
        HeldTensors({"a": weight, "b": weight})


def test_a_tensor_written_to_before_it_was_read_is_refused() -> None:
    def one_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        first = torch.ones(3)
        yield "first", first
        first.zero_()
        yield "second", torch.ones(3)

    held = HeldTensors(one_buffer())
    with pytest.raises(WeightUpdateError, match="first was written to after it was handed over"):
        list(held)


def merged_and_unmerged(write: Callable[[torch.Tensor, int], None], rows: slice) -> Iterator[tuple[str, Any]]:
    """Weights with an adapter in them for as long as they are yielded."""
    for number in range(2):
        weight = torch.nn.Parameter(torch.ones(6000, 3))
        write(weight.detach()[rows], 1)
        yield f"w{number}", weight
        write(weight.detach()[rows], -1)


def _through_data(part: torch.Tensor, number: int) -> None:
    part.data += number


def _through_numpy(part: torch.Tensor, number: int) -> None:
    array = part.numpy()
    array += number


UNCOUNTED = {"data": _through_data, "numpy": _through_numpy}


@pytest.mark.parametrize("rows", [slice(None), slice(4321, 4322)], ids=["all", "one row"])
@pytest.mark.parametrize("way", UNCOUNTED)
def test_what_an_iterator_takes_back_behind_torch_is_refused(way: str, rows: slice) -> None:
    for made in (lambda pairs: pairs, lambda pairs: map(tuple, pairs), Lazy):
        held = HeldTensors(made(merged_and_unmerged(UNCOUNTED[way], rows)))
        with pytest.raises(WeightUpdateError, match="w0 was written to after it was handed over"):
            list(held)


class Lazy(dict[str, Any]):
    """A mapping that makes its items when they are asked for."""

    def __init__(self, pairs: Iterator[tuple[str, Any]]) -> None:
        super().__init__()
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs


def test_arrays_and_inference_tensors_that_an_iterator_takes_back_are_refused() -> None:
    def pairs(make: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
        with torch.inference_mode():
            tensor = make()
        yield "w", tensor
        with torch.inference_mode():
            tensor -= 1

    for make in (
        lambda: torch.ones(99, 99),
        lambda: torch.ones(99, 99).t(),
        lambda: torch.ones(99, 99, dtype=torch.bfloat16),
        lambda: np.ones((99, 99), ">f4")[:, ::-1],
        lambda: np.ones((), np.float16),
    ):
        with pytest.raises(WeightUpdateError, match="w was written to after"):
            list(HeldTensors(pairs(make)))


def test_an_iterator_of_any_tensors_that_stay_as_they_are_is_sent() -> None:
    tensors = [VALUES, torch.empty(0, 3), torch.full((200, 300), float("nan")), torch.ones(1).expand(5000, 2)]
    tensors += [torch.tensor(1.0), torch.ones(99, 99).to(torch.float8_e4m3fn), np.array([None], object)]  # type: ignore[list-item]
    assert len(list(HeldTensors((f"w{number}", tensor) for number, tensor in enumerate(tensors)))) == len(tensors)


def test_an_engine_is_not_updated_with_what_an_adapter_left_behind(start: Callable[..., Engine]) -> None:
    engine = start()
    before = engine.digest()

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors(model_of(1)):
            tensor.data += 1
            yield name, tensor
            tensor.data -= 1

    with pytest.raises(WeightUpdateError, match="was written to after it was handed over"):
        engine.update_weights_from_tensor(merged(), "never")
    assert engine.digest() == before and engine.is_ready
    session = engine.begin_update("merged", [describe(name, tensor) for name, tensor in named_tensors(model_of(1))])
    engine.stage(session, merged())
    engine.commit(session)
    name, tensor = named_tensors(model_of(1))[0]
    assert torch.equal(engine.get_weights_by_name(name), tensor + 1)


def under_grad(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    torch.func.grad(lambda traced: (read(traced), traced.sum())[1])(tensor)


def beside_grad(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    torch.func.grad(lambda traced: (read(tensor), traced.sum())[1])(torch.ones(1))


def under_vmap(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    torch.vmap(lambda traced: (read(traced), traced)[1])(tensor[None])


def after_grad(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    left: Any = []
    torch.func.grad(lambda traced: (left.append(traced), traced.sum())[1])(tensor)
    read(left[0])


def functional(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    read(torch._to_functional_tensor(tensor))


def under_fake_mode(read: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        read(tensor)


@pytest.mark.parametrize("make", [under_grad, beside_grad, under_vmap, after_grad, functional, under_fake_mode])
def test_what_torch_traces_or_fakes_is_refused_by_name_on_every_way(engine: Engine, make: Any) -> None:
    before = engine.digest()
    name, tensor = named_tensors(model_of(1))[0]
    manifest = [describe(*pair) for pair in named_tensors(model_of(1))]
    said: list[Any] = []

    def stage(found: torch.Tensor) -> None:
        session = engine.begin_update("never", manifest)
        try:
            engine.stage(session, [(name, found)])
        finally:
            engine.abort_update()

    ways: list[Callable[[torch.Tensor], Any]] = [
        lambda found: engine.update_weights_from_tensor([(name, found)], "never", partial=True),
        lambda found: engine.update_weights_from_tensor(iter([(name, found)]), "never", partial=True),
        lambda found: push_weights(engine, {f"module.{name}": found}, "never"),
        stage,
    ]
    for way in ways:

        def refused(found: torch.Tensor, way: Callable[[torch.Tensor], Any] = way) -> None:
            with pytest.raises(WeightUpdateError, match=f"^{name} (is traced|cannot be read)") as caught:
                way(found)
            said.append(caught.value.field)

        make(refused, tensor)
    assert said == [name] * len(ways) and engine.digest() == before


def test_a_module_is_refused_by_name_under_a_fake_mode(engine: Engine) -> None:
    model = model_of(1)

    def push(_: torch.Tensor) -> None:
        with pytest.raises(WeightUpdateError, match=r"^model\.embed_tokens\.weight cannot be read while"):
            push_weights(engine, model, "never")

    under_fake_mode(push, VALUES)


def test_a_tensor_freed_before_it_was_read_is_refused() -> None:
    tensor = torch.ones(3)
    held = HeldTensors([("w", tensor)])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(WeightUpdateError, match="w needs 12 bytes of its storage"):
        [describe(name, each) for name, each in held]


def test_what_every_engine_recomputes_is_ignored_on_every_way() -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.cos_cached")
    pairs = [("w", VALUES), *((name, torch.ones(2, dtype=torch.int64)) for name in names)]
    assert [name for name, _ in named_pairs(pairs)] == ["w"]
    assert [info.name for info in HeldTensors(pairs).manifest] == ["w"]
    assert [info.name for info in manifest_of([(name, t.shape, str(t.dtype)) for name, t in pairs])] == ["w"]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_engine_is_not_updated_from_one_buffer_unknowingly(engine: Engine, mode: Any) -> None:
    tensors = named_tensors(model_of(1))
    before = engine.digest()

    def one_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        memory = torch.empty(max(tensor.numel() for _, tensor in tensors))
        for name, tensor in tensors:
            yield name, memory.data[: tensor.numel()].view(tensor.shape).copy_(tensor)

    with pytest.raises(WeightUpdateError, match="lie in the same memory"):
        engine.update_weights_from_tensor(one_buffer(), "never", mode=mode)
    assert engine.digest() == before and engine.is_ready


def test_an_engine_ignores_what_it_recomputes_and_reads_any_byte_order(start: Callable[..., Engine]) -> None:
    engine, tensors = start(), named_tensors(model_of(1))
    extra = ("model.rotary_emb.inv_freq", torch.ones(4))
    engine.update_weights_from_tensor(tensors, "plain")
    wanted = engine.digest()
    engine.update_weights_from_tensor(named_tensors(model_of(0)), "other")
    engine.update_weights_from_tensor({name: tensor.numpy().astype(">f4") for name, tensor in tensors}, "big-endian")
    assert engine.digest() == wanted
    assert engine.update_weights_from_tensor([*tensors, extra], "more").num_tensors == len(tensors)
    manifest = [TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in [*tensors, extra]]
    session = engine.begin_update("session", manifest)
    engine.stage(session, [*tensors, extra])
    assert engine.commit(session).num_tensors == len(tensors) and engine.digest() == wanted


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([("w", itertools.repeat(1 << 62), "float32")], "dimensions"),
        ([TensorInfo("w", (1,) * 100_000, "float32")], "dimensions"),
        ([("w", (-1,), "float32")], "2\\^63"),
        ([TensorInfo("w", (10**4000, 2), "float32")], "2\\^63"),
        ([("w", (float("inf"),), "float32")], "entries"),
        ([TensorInfo("w", None, "float32")], "entries"),  # type: ignore[arg-type]
        ([("w" * 2000, (1,), "float32")], "characters"),
        ([("w", (1,), "f" * 2000)], "characters"),
        (itertools.repeat(("w", (1,), "float32")), "at most 262144"),
    ],
    ids=range(9),
)
def test_a_manifest_is_bounded_before_anything_is_multiplied(entries: Any, what: str) -> None:
    with pytest.raises(WeightUpdateError, match=what) as caught:
        manifest_of(entries)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand([1] * 9), np.zeros([1] * 9, np.float32)], ids=["torch", "numpy"]
)
def test_a_tensor_of_too_many_dimensions_is_named(tensor: Any) -> None:
    with pytest.raises(WeightUpdateError, match="w has 9 dimensions"):
        describe("w", tensor)
