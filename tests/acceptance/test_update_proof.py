"""Asks 1, 5 and 6, over ranks too: an update changes exactly what was meant and says so, a warm update is a cold load
for every family, and what fails on one rank is nobody's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import Engine, PoisonedError, SamplingParams, WeightUpdateError
from headrace.types.weights import UpdateMode
from headrace.weights.files import Folder
from headrace.weights.saved import read_record
from tests.acceptance.conftest import SETTINGS, named_tensors, tiny_model
from tests.acceptance.test_parity import VARIANTS
from tests.acceptance.test_updates import manifest_of
from tests.parity.models import make_model

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31, 32, 33, 34, 35, 36, 37]]
OLD, NEW = (named_tensors(tiny_model(seed)) for seed in (0, 1))
PLACES = [at for at, (name, _) in enumerate(NEW) if "layers.1." not in name or "q_proj" in name]
"""Every kind of tensor, and both layers."""

RANKS: dict[str, Any] = {"tp_size": 2, "device": "cpu"}
LAYOUTS = [*((family, 1) for family in VARIANTS), *((family, 2) for family in ("llama", "qwen2", "qwen3_moe"))]
Start = Callable[..., Engine]


def outputs(engine: Engine) -> list[tuple[list[int], list[float], list[float | None]]]:
    """Bits: one request at a time, so that no timing has a part in them."""
    found = []
    for prompt in PROMPTS:
        [piece] = engine.generate(input_ids=[prompt], sampling_params=GREEDY, return_prompt_logprobs=True)
        found.append((piece.token_ids, piece.logprobs, piece.prompt_logprobs))
    return found


def hashes(engine: Engine, folder: Path) -> dict[str, str]:
    """The SHA-256 of all parameters of each rank, as they lie in memory."""
    engine.save_sharded_model(folder)
    files = read_record(Folder(folder)).files
    return {name: file.sha256 for name, file in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_after_an_update_every_parameter_of_every_rank_is_that_of_a_cold_load(
    engine_on: Start, tmp_path: Path, num_ranks: int
) -> None:
    settings = RANKS if num_ranks > 1 else {}
    engine, cold = engine_on(0, **settings), engine_on(1, **settings)
    engine.weights_checker("reset_tensors")
    engine.update_weights_from_tensor(NEW, "step-k")
    found, expected = hashes(engine, tmp_path / "warm"), hashes(cold, tmp_path / "cold")
    assert len(found) == num_ranks and found == expected
    assert engine.digest() == cold.digest() and outputs(engine) == outputs(cold)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def engine(folders: list[Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """It ends each test with the weights that it began it with."""
    with Engine(folders[0], **SETTINGS, **(RANKS if request.param > 1 else {})) as started:
        yield started


def test_any_one_tensor_dropped_doubled_or_renamed_is_named(engine: Engine) -> None:
    before = engine.digest(), engine.version
    for at in PLACES:
        name, tensor = NEW[at]
        others = [*NEW[:at], *NEW[at + 1 :]]
        for wrong, named in (
            (others, name),
            ([*NEW, (name, tensor)], name),
            ([*others, (f"{name}x", tensor)], f"{name}x"),
        ):
            with pytest.raises(WeightUpdateError) as caught:
                engine.update_weights_from_tensor(wrong, "wrong")
            assert named in caught.value.message
    assert (engine.digest(), engine.version) == before


@pytest.mark.parametrize(("family", "num_ranks"), LAYOUTS)
def test_there_and_back_again_is_a_cold_load_each_time(
    family: str, num_ranks: int, engine_on: Start, tmp_path: Path
) -> None:
    """A, B, A, B. Tied heads, experts, and on two ranks a padded vocabulary and key-value heads that both hold."""
    settings = RANKS if num_ranks > 1 else {}
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        make_model(family, seed=seed, **VARIANTS[family]).save_pretrained(folder)
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    engine, cold = (engine_on(model=str(folder), **settings) for folder in folders)
    expected = [(each.digest(), outputs(each)) for each in (engine, cold)]
    assert expected[0] != expected[1]
    for number in (1, 0, 1):
        engine.update_weights_from_tensor(tensors[number], f"v{number}")
        assert (engine.digest(), outputs(engine)) == expected[number]
    engine.update_weights_from_disk(folders[0], "disk")
    assert (engine.digest(), outputs(engine)) == expected[0]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("engine", [2], ids=["two ranks"], indirect=True)
def test_a_tensor_that_fails_on_one_rank_leaves_old_bits_or_nothing(engine: Engine, mode: UpdateMode) -> None:
    """Not a number is the last element, which only the second of two ranks looks at, of a tensor that they share."""
    before = engine.digest(), outputs(engine)
    for at in PLACES:
        name, tensor = NEW[at]
        broken = tensor.clone()
        broken.view(-1)[-1] = torch.nan
        session = engine.begin_update("broken", manifest_of(NEW), mode=mode)
        engine.stage(session, NEW[:at])
        with pytest.raises(WeightUpdateError, match="NaN") as caught:
            engine.stage(session, [(name, broken)])
        assert caught.value.field == name
        with pytest.raises(WeightUpdateError, match="not staged"):
            engine.commit(session)
        engine.abort_update(session)
        if mode == "inplace":
            with pytest.raises(PoisonedError):
                outputs(engine)
            engine.update_weights_from_tensor(OLD, "healed")
        assert (engine.digest(), outputs(engine)) == before
