"""An engine of several ranks is one engine: the same tokens as alone, updates on all or on none, and one death."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import (
    Engine,
    Generation,
    NeedsWeightsError,
    SamplingParams,
    WeightUpdateError,
)
from headrace.types.weights import TensorInfo, UpdateMode
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.engine.test_memory import NUM_CYCLES, resident_bytes
from tests.engine.test_restart import pid_of
from tests.parity.models import make_model, save_model
from tests.processes import children_of
from tests.weights.test_shard_reading import num_bytes_read

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1] * 5]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=20, max_new_tokens=12, ignore_eos=True, seed=3)
NAMES = [
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.norm.weight",
]
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)


def rank_pids(engine: Engine) -> list[int]:
    """Processes of the other ranks, by rank; the core's own process is rank 0."""
    return children_of(pid_of(engine), word="headrace.core.rank_process")


def outputs(engine: Engine, params: SamplingParams) -> list[Generation]:
    return engine.generate(input_ids=PROMPTS, sampling_params=params)


def check_equal(found: list[Generation], expected: list[Generation]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


LAYOUTS: dict[str, dict[str, Any]] = {
    "process": {"tp_size": 2},
    "inprocess": {"tp_size": 2, "inprocess": True},
    "stages-inprocess": {"pp_size": 3, "inprocess": True},
    "stages-of-two": {"tp_size": 2, "pp_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=list(LAYOUTS))
def ranks(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, device="cpu", **request.param, **SETTINGS) as started:
        yield started


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_two_ranks_generate_what_one_does(ranks: Engine, engine: Engine, params: SamplingParams) -> None:
    check_equal(outputs(ranks, params), outputs(engine, params))
    found, expected = (each.score(input_ids=PROMPTS[2])[0].prompt_logprobs for each in (ranks, engine))
    assert found is not None and expected is not None
    assert found[1:] == pytest.approx(expected[1:], abs=1e-4)


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_updates_there_and_back_are_on_both_ranks(ranks: Engine, engine: Engine, mode: UpdateMode) -> None:
    first = outputs(ranks, GREEDY)
    old, new = (dict(named_tensors(model_of(seed))) for seed in (0, 1))
    before = ranks.digest()
    assert before == engine.digest()
    report = ranks.update_weights_from_tensor(new.items(), "b", mode=mode)
    assert report.mode == mode
    assert outputs(ranks, GREEDY)[0].token_ids != first[0].token_ids
    assert ranks.digest() != before
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    ):
        np.testing.assert_array_equal(ranks.get_weights_by_name(name), new[name].numpy())
    ranks.update_weights_from_tensor(old.items(), "a", mode=mode)
    assert ranks.digest() == before
    check_equal(outputs(ranks, GREEDY), first)


def test_a_tensor_that_is_not_what_its_digest_says_is_refused_and_the_right_one_taken(ranks: Engine) -> None:
    tensors = dict(named_tensors(model_of(0)))
    digests = ranks.digest()
    name = "model.layers.1.self_attn.o_proj.weight"
    for wrong in (True, False):
        manifest = [
            TensorInfo(key, tuple(each.shape), "float32", digests.get(key, "")) for key, each in tensors.items()
        ]
        given = {**tensors, name: tensors[name] + 1.0} if wrong else tensors
        session = ranks.begin_update("digested", manifest)
        try:
            ranks.stage(session, given.items())
            ranks.commit(session)
        except WeightUpdateError as error:
            assert wrong and error.field == name
            ranks.abort_update(session)
        else:
            assert not wrong
    assert ranks.digest() == digests


def test_weights_from_a_folder_are_read_by_both(ranks: Engine, model_folder: Path, tmp_path: Path) -> None:
    before = ranks.digest()
    model_of(1).save_pretrained(tmp_path)
    ranks.update_weights_from_disk(tmp_path, "disk")
    assert ranks.digest() != before
    ranks.update_weights_from_disk(model_folder, "back")
    assert ranks.digest() == before


def test_cycles_on_both_ranks_move_no_bit(model_folder: Path) -> None:
    """One request at a time, so that no timing has a part in it; what a release gives back, no rank holds then."""
    settings = {**SETTINGS, "kv_pool_tokens": 1 << 16, "keep_weights_copy": True}
    with Engine(model_folder, tp_size=2, device="cpu", **settings) as engine:
        filling = [[number + 1] * 400 for number in range(32)]

        def answers() -> list[tuple[list[int], list[float]]]:
            found = [engine.generate(input_ids=[prompt], sampling_params=GREEDY)[0] for prompt in PROMPTS]
            return [(each.token_ids, each.logprobs) for each in found]

        engine.generate(input_ids=filling, sampling_params={"max_new_tokens": 1})
        expected, digests = answers(), engine.digest()
        num_bytes = 32 * 400 * engine.resolved.kv_bytes_per_token
        for number in range(2 * NUM_CYCLES):
            before = [resident_bytes(pid) for pid in (pid_of(engine), *rank_pids(engine))]
            engine.release_memory_occupation()
            after = [resident_bytes(pid) for pid in (pid_of(engine), *rank_pids(engine))]
            given_back = [one - other for one, other in zip(before, after, strict=True)]
            assert number > 0 or all(each > 0.9 * num_bytes for each in given_back), (given_back, num_bytes)
            engine.resume_memory_occupation(restore=("copy", "disk")[number % 2])
            assert answers() == expected
        assert engine.digest() == digests


def test_memory_goes_and_comes_on_both_ranks(ranks: Engine, model_folder: Path) -> None:
    first, digests = outputs(ranks, GREEDY), ranks.digest()
    ranks.release_memory_occupation()
    ranks.resume_memory_occupation(restore="await")
    with pytest.raises(NeedsWeightsError):
        ranks.digest()
    ranks.update_weights_from_disk(model_folder, "again")
    assert ranks.digest() == digests
    check_equal(outputs(ranks, GREEDY), first)


def test_each_rank_reads_no_more_of_a_folder_than_it_holds(tmp_path: Path) -> None:
    """Of columns, too: what the system has counted, of a model that is mostly its MLPs."""
    folder = save_model(make_model("qwen3", intermediate_size=4096, num_hidden_layers=3), tmp_path)
    num_bytes = (folder / "model.safetensors").stat().st_size
    with Engine(folder, tp_size=2, device="cpu", skip_tokenizer_init=True, **SETTINGS) as started:
        expected = started.digest()
        pids = (pid_of(started), *rank_pids(started))
        before = [num_bytes_read(pid) for pid in pids]
        started.update_weights_from_disk(folder, "again")
        read = [num_bytes_read(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
        assert started.digest() == expected
    assert all(num_bytes // 2 <= each < num_bytes * 0.6 for each in read), (num_bytes, read)
