"""The digest of live weights, against its definition; it adds up over blocks, boxes and ranks."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch

from headrace import models
from headrace.config import ModelSpec
from headrace.weights import ParamSpec, Shard, WeightMap, live_reading, whole_rows
from headrace.weights import position_sum as module
from headrace.weights.position_sum import PositionKeys, PositionSum, add_digests, position_digest
from headrace.weights.staging import BLOCK_BYTES
from headrace.weights.store import WeightStore
from tests.parity.models import make_model
from tests.weights.tiny import make_store, make_tensors

KEYS = PositionKeys(torch.device("cpu"))
WIDTH = 4096
STREAM = hashlib.shake_256(b"headrace position sum").digest(2 * 4 * WIDTH * 8)


def key(lane: int, digit: int, index: int) -> int:
    at = 8 * ((lane * 4 + digit) * WIDTH + index)
    return int.from_bytes(STREAM[at : at + 8], "little") | 1


def defined(tensor: torch.Tensor, first: int = 0) -> str:
    """As the module's docstring says, of units `first` on."""
    raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    units = [int.from_bytes(raw[at : at + 2], "little", signed=True) for at in range(0, len(raw), 2)]
    lanes = [0, 0]
    for j, unit in enumerate(units, first):
        for lane in (0, 1):
            product = unit
            for digit in range(4):
                product *= key(lane, digit, j // WIDTH**digit % WIDTH)
            lanes[lane] += product
    return "".join(f"{lane % 2**64:016x}" for lane in lanes)


def test_the_test_vector() -> None:
    values = torch.tensor([1.0, -2.0, 0.5])
    assert position_digest(values.bfloat16(), KEYS) == "81eb2f2cad54fb80eccf67489b10e680"
    assert position_digest(values, KEYS) == "b069bebb4168aa8055e42c509d49b980"
    for digest in ("81eb2f2cad54fb80eccf67489b10e680", "b069bebb4168aa8055e42c509d49b980"):
        assert digest in str(module.__doc__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 5, 4095, 4096, 4097, 9001])
def test_it_is_what_it_is_defined_to_be(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert position_digest(tensor, KEYS) == defined(tensor)


def test_blocks_add_up_in_any_order() -> None:
    chance = random.Random(1)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(300_000).to(dtype)
        whole = position_digest(tensor, KEYS)
        for _ in range(20):
            cuts = sorted(chance.sample(range(1, len(tensor)), chance.randint(1, 9)))
            blocks = list(zip([0, *cuts], [*cuts, len(tensor)], strict=True))
            chance.shuffle(blocks)
            total, digests = PositionSum(KEYS), []
            for start, stop in blocks:
                total.add(tensor[start:stop], start)
                alone = PositionSum(KEYS)
                alone.add(tensor[start:stop], start)
                digests.append(alone.hexdigest())
            assert total.hexdigest() == add_digests(*digests) == whole


@pytest.mark.parametrize("start", [WIDTH**2 - 7, WIDTH**2 * 3 - 5000, WIDTH**3 * 2 - 9])
def test_far_positions_have_keys_of_their_own(start: int) -> None:
    tensor = torch.randn(6000).bfloat16()
    total = PositionSum(KEYS)
    total.add(tensor, start)
    assert total.hexdigest() == defined(tensor, start)


def test_any_changed_or_swapped_element_shows() -> None:
    chance = random.Random(2)
    tensor = torch.randn(20_000).bfloat16()
    units, clean = tensor.view(torch.int16), position_digest(tensor, KEYS)
    for _ in range(300):
        at, bit = chance.randrange(20_000), chance.randrange(16)
        before = int(units[at])
        units[at] = before ^ (1 << bit) if bit < 15 else before ^ -(1 << 15)
        dirty = position_digest(tensor, KEYS)
        assert dirty[:16] != clean[:16] and dirty[16:] != clean[16:]
        units[at] = before
        one, other = chance.sample(range(20_000), 2)
        if units[one] != units[other]:
            units[one], units[other] = int(units[other]), int(units[one])
            assert position_digest(tensor, KEYS) != clean
            units[one], units[other] = int(units[other]), int(units[one])
    assert position_digest(tensor, KEYS) == clean


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_digests_of_ranks_add_up_to_that_of_one(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {"num_attention_heads": 12, "num_hidden_layers": 1}
    if num_ranks == 3:
        model = make_model("qwen3", num_key_value_heads=1, intermediate_size=96, **sizes)
    else:
        model = make_model("qwen3", num_key_value_heads=2, vocab_size=103, **sizes)
    spec = ModelSpec.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    stores = []
    for rank in range(num_ranks):
        store = WeightStore(models.weight_map(spec, Shard(rank, num_ranks)), torch.bfloat16, torch.device("cpu"))
        store.load(model.state_dict().items())
        stores.append(store)
    whole = {name: position_digest(each.bfloat16().view(-1), KEYS) for name, each in model.state_dict().items()}
    assert _added(stores) == whole
    check_that_every_copy_counts(stores, whole)
    if num_ranks in (2, 3):  # parts alone, and parts beside copies
        monkeypatch.setattr(live_reading, "_on_host", live_reading._on_device)
        assert _added(stores) == whole


def _added(stores: list[WeightStore]) -> dict[str, str]:
    return _sums([store.digest() for store in stores])


def _sums(found: list[dict[str, str]]) -> dict[str, str]:
    return {name: add_digests(*(digests[name] for digests in found)) for name in found[0]}


def check_that_every_copy_counts(stores: list[WeightStore], whole: dict[str, str]) -> None:
    """A bit that is wrong on one rank alone shows in the sum, and in what that rank holds, whoever counts it."""
    chance, clean = random.Random(len(stores)), [store.digest() for store in stores]
    held = [dict(filter(None, store.digest_in_slices(0))) for store in stores]
    if len(stores) > 1:
        assert all(each["model.norm.weight"] == whole["model.norm.weight"] for each in held)
    for rank, store in enumerate(stores):
        for name in (
            "model.norm.weight",
            *(f"model.layers.0.self_attn.{part}.weight" for part in ("k_proj", "q_proj")),
        ):
            piece = store.weight_map.rules_by_name[name].pieces[0]
            units = store.live[piece.param][piece.target.slices].view(torch.int16).flatten(0, -1)
            assert units.data_ptr() == store.live[piece.param][piece.target.slices].data_ptr(), "no copy"
            at, bit = chance.randrange(len(units)), chance.randrange(15)
            units[at] ^= 1 << bit
            now = _sums([*clean[:rank], store.digest(), *clean[rank + 1 :]])
            now_held = dict(filter(None, store.digest_in_slices(0)))
            assert [each for each in whole if now[each] != whole[each]] == [name]
            assert [each for each in whole if now_held[each] != held[rank][each]] == [name]
            units[at] ^= 1 << bit
    assert _added(stores) == whole


def test_a_large_tensor_is_summed_in_slices() -> None:
    weight_map = WeightMap([ParamSpec("p", (5000, 100))], [whole_rows("big", "p", 0, (5000, 100))])
    store = make_store(weight_map, make_tensors(weight_map, 1))
    assert list(store.digest_in_slices()) == [None] * (-(-5000 * 100 * 4 // BLOCK_BYTES) - 1) + [
        *store.digest().items()
    ]
