"""Shadow updates whose commit exchanges memory: a store over a driver that maps the host's pages, beside an account of
what its tensors are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.runner.occupation import Occupation
from headrace.types.errors import WeightUpdateError
from headrace.types.weights import UpdateMode
from headrace.weights.boxes import Box
from headrace.weights.shadow import SHADOW_HEADROOM_BYTES
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import Derived, ParamSpec, WeightMap, whole_rows
from tests.rounds import rounds
from tests.runner.mapped_driver import CPU, UNIT, MappedDriver, mapped_driver
from tests.runner.test_twins import EXCHANGE
from tests.weights.tiny import Tensors, as_bytes, live_bits, make_tensors, manifest_of

EMBED, HEAD = "embed.weight", "head.weight"
ENOUGH = SHADOW_HEADROOM_BYTES // UNIT + 8


@pytest.fixture
def driver() -> Iterator[MappedDriver]:
    with mapped_driver() as found:
        yield found


def padded_map() -> WeightMap:
    """Parameters of several tensors, one with padding, one that is tied, and one that is derived."""
    params = [ParamSpec("embed", (8, 4), padding=(Box((6, 0), (2, 4)),)), ParamSpec("qkv", (12, 4))]
    params += [ParamSpec("norm", (4,), dtype="float32"), ParamSpec("down", (40, 12))]
    rules = [whole_rows(EMBED, "embed", 0, (6, 4)), whole_rows("norm.weight", "norm", 0, (4,))]
    rules += [whole_rows(f"{name}.weight", "qkv", 4 * at, (4, 4)) for at, name in enumerate("qkv")]
    rules += [whole_rows("down.weight", "down", 0, (40, 12))]
    derived = Derived(ParamSpec("sum", (4,)), ("qkv",), lambda qkv: qkv.float().sum(0).to(qkv.dtype))
    return WeightMap(params, rules, {HEAD: EMBED}, derived=[derived])


class Copied(TorchDispatchMode):
    """How much is copied meanwhile."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.num_elements += args[0].numel()
        return func(*args, **(kwargs or {}))


class Account:
    """A store over blocks, and what its tensors are by the updates that were made."""

    def __init__(self, driver: MappedDriver, *, memory: int = 1 << 40, dtype: torch.dtype = torch.float32) -> None:
        self.driver, self.dtype = driver, dtype
        self.map = padded_map()
        self.occupation = Occupation(CPU, is_saver=True)
        self.store = WeightStore(self.map, dtype, CPU, memory=lambda: memory, allocate=self.occupation.parameters)
        self.tensors: Tensors = make_tensors(self.map, 0)
        self.store.load(self.tensors.items())
        self.addresses = [each.data_ptr() for each in self.store.live.values()]

    def check(self) -> None:
        plain = WeightStore(self.map, self.dtype, CPU)
        plain.load(self.tensors.items())
        assert live_bits(self.store) == live_bits(plain)
        assert self.store.digest() == plain.digest()
        assert [each.data_ptr() for each in self.store.live.values()] == self.addresses
        assert self.driver.num_memories <= 2

    def begin(self, tensors: Tensors, mode: UpdateMode, *, partial: bool, is_open: bool = False) -> str:
        if not is_open:
            return self.store.begin(manifest_of(tensors), mode, partial)
        manifest, found = manifest_of(tensors), self.store.begin_open(mode, partial)
        for at in range(0, len(manifest), 3):
            self.store.extend(manifest[at : at + 3])
        return found

    def stage(self, tensors: Tensors, index: int) -> None:
        tensor = list(tensors.values())[index]
        assert self.store.stage(index, as_bytes(tensor) if index % 2 else tensor).advance(60.0)

    def update(
        self, tensors: Tensors, mode: UpdateMode = "shadow", *, partial: bool = False, is_open: bool = False
    ) -> str:
        """The mode, or "exchange"."""
        found = self.begin(tensors, mode, partial=partial, is_open=is_open)
        for index in range(len(tensors)):
            self.stage(tensors, index)
        return self.commit(tensors, found)

    def commit(self, tensors: Tensors, mode: str) -> str:
        self.driver.calls.clear()
        with Copied() as copied:
            assert self.store.commit().is_done()
        assert self.driver.calls in ([], EXCHANGE)
        assert not self.driver.calls or copied.num_elements == self.store.live["sum"].numel()
        self.tensors = self.tensors | {EMBED if name == HEAD else name: each for name, each in tensors.items()}
        return "exchange" if self.driver.calls else mode


def test_complete_shadow_updates_are_exchanged_and_others_copied(driver: MappedDriver) -> None:
    account = Account(driver)
    sets = [make_tensors(account.map, seed) for seed in range(1, 5)]
    few = {name: sets[3][name] for name in ("k.weight", "norm.weight")}
    assert account.update(few, partial=True) == "shadow"
    account.check()
    assert driver.num_memories == 1
    for number, tensors in enumerate(sets):
        assert account.update(tensors, "auto" if number % 2 else "shadow", is_open=number > 1) == "exchange"
        account.check()
        assert account.update(few, partial=True, is_open=number > 1) == "shadow"
        account.check()
        assert account.update(tensors, "inplace") == "inplace"
        account.check()
    assert driver.num_memories == 2
    account.store.close()
    account.occupation.close()
    assert driver.num_memories == 0


def test_where_a_twin_finds_no_room_the_commit_copies(driver: MappedDriver) -> None:
    account = Account(driver)
    driver.num_free = SHADOW_HEADROOM_BYTES // UNIT
    assert account.update(make_tensors(account.map, 1)) == "shadow"
    account.check()
    account.store.close()
    account.occupation.close()
    del account
    tight = Account(driver, memory=0)
    assert tight.update(make_tensors(tight.map, 1), "auto") == "inplace"
    for begin in (tight.store.begin_open, lambda *how: tight.store.begin(manifest_of(tight.tensors), *how)):
        with pytest.raises(WeightUpdateError, match="shadow needs"):
            begin("shadow", False)
    driver.num_free = ENOUGH
    assert tight.update(make_tensors(tight.map, 2), "auto") == "exchange"  # which asks for no other memory
    driver.num_free = 0
    few = {"norm.weight": make_tensors(tight.map, 3)["norm.weight"]}
    assert tight.update(few, "shadow", partial=True) == "shadow"
    assert tight.update(make_tensors(tight.map, 4), "shadow") == "exchange"
    tight.check()


@pytest.mark.parametrize("is_open", [False, True])
def test_an_abort_changes_nothing_and_leaves_the_twin_to_the_next(driver: MappedDriver, is_open: bool) -> None:
    account = Account(driver)
    before, after = account.tensors, make_tensors(account.map, 1)
    account.begin(after, "shadow", partial=False, is_open=is_open)
    left_over = account.store.stage(0, after[EMBED])
    for index in range(1, len(after)):
        account.stage(after, index)
    driver.calls.clear()
    account.store.abort()
    assert driver.calls == []
    with pytest.raises(Exception, match="no longer open"):
        left_over.advance(60.0)
    account.check()
    assert account.update(after) == "exchange" and driver.num_memories == 2
    account.check()
    account.occupation.let_twins_go()
    assert driver.num_memories == 1
    assert account.update(before) == "exchange"
    account.check()


def test_a_reader_goes_on_over_an_exchange(driver: MappedDriver) -> None:
    account = Account(driver)
    reading = account.store.digest_in_slices()
    next(reading)
    assert account.update(make_tensors(account.map, 1)) == "exchange"
    assert len([found for found in reading if found]) == len(account.map.rules_by_name) - 1
    account.check()


def test_a_lost_exchange_is_not_taken_for_an_update(driver: MappedDriver) -> None:
    account = Account(driver)
    tensors = make_tensors(account.map, 1)
    account.begin(tensors, "shadow", partial=False)
    for index in range(len(tensors)):
        account.stage(tensors, index)
    driver.refuses["cuMemMap"] = 2
    with pytest.raises(RuntimeError, match="CUDA driver error"):
        account.store.commit()


@pytest.mark.parametrize("seed", range(rounds(14)))
def test_any_order_of_updates_ends_in_what_was_sent(driver: MappedDriver, seed: int) -> None:
    choose = random.Random(seed)
    account = Account(driver, dtype=choose.choice([torch.float32, torch.bfloat16]))
    seen = set[str]()
    for number in range(40):
        driver.num_free = choose.choice([0, ENOUGH])
        tensors = make_tensors(account.map, 1000 * seed + number, choose.choice([torch.float32, torch.bfloat16]))
        mode: UpdateMode = choose.choice(["auto", "shadow", "inplace"])
        is_open = choose.random() < 0.3
        step = choose.choice(["update", "update", "partial", "abort", "release", "lose"])
        if step == "release":
            list(account.occupation.release(["weights"], keeps_copy=True))
            assert driver.num_memories == 0
            driver.num_free = max(driver.num_free, 4)
            list(account.occupation.resume(["weights"], "copy"))
        elif step == "lose":
            list(account.occupation.release(["weights"], keeps_copy=False))
            driver.num_free = max(driver.num_free, 4)
            list(account.occupation.resume(["weights"], "await"))
            assert not any(each.any() for each in account.store.live.values())
            seen.add(account.update(tensors, mode, is_open=is_open))
        elif step == "update":
            if choose.random() < 0.3:
                tensors[HEAD] = tensors[EMBED]
            seen.add(account.update(tensors, mode, is_open=is_open))
        else:
            partial = step == "partial" or choose.random() < 0.5
            names = choose.sample(list(tensors), choose.randrange(1, len(tensors))) if partial else list(tensors)
            some = {name: tensors[name] for name in names}
            if step == "partial":
                assert account.update(some, mode, partial=True, is_open=is_open) != "exchange"
            else:
                found, count = account.begin(some, mode, partial=partial, is_open=is_open), choose.randrange(len(some))
                for index in range(count):
                    account.stage(some, index)
                account.store.abort()
                if found == "inplace":
                    account.tensors = account.tensors | {name: some[name] for name in names[:count]}
                    account.store._derive()
        account.check()
    assert "exchange" in seen
