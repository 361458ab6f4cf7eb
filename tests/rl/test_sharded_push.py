"""A trainer of several ranks pushes, over gloo: FSDP2's shards and Megatron's, against what transformers has in one
process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.rl.push import tensor_digests
from tests.parity.models import make_model, save_model
from tests.rl.megatron_reference import file_tensors
from tests.rl.rank_processes import run_ranks
from tests.rl.rank_scenarios import STEP

FSDP: dict[str, dict[str, Any]] = {
    "two ranks": {"mesh_shape": [2], "road": "engine", "dtype": None, "as_iterator": False},
    "two ranks, over a client": {"mesh_shape": [2], "road": "shared memory", "dtype": "bfloat16", "as_iterator": True},
    "four ranks": {"mesh_shape": [4], "road": "bytes", "dtype": None, "as_iterator": True},
    "two by two": {"mesh_shape": [2, 2], "road": "engine", "dtype": "bfloat16", "as_iterator": False},
}
MEGATRON: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor by pipeline": (
        "qwen2",
        {
            "sizes": {"tensor": 2, "stages": 2, "chunks": 2},
            "naming": [True, True, 64],
            "road": "shared memory",
            "dtype": "bfloat16",
        },
    ),
    "experts": (
        "qwen3_moe",
        {"sizes": {"tensor": 2, "experts": 4}, "naming": [False, False, 64], "road": "engine", "dtype": None},
    ),
}


class Folders:
    """Two checkpoints of each family, of one shape."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.of = cache(self._save)

    def _save(self, family: str) -> list[str]:
        overrides: dict[str, Any] = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
        if family == "tied":  # and a vocabulary that four ranks do not share evenly
            family, overrides = "qwen3", {"tie_word_embeddings": True}
        models = [make_model(family, seed=seed, num_hidden_layers=4, **overrides) for seed in (0, 1)]
        folders = (self._scratch / f"{family}{len(overrides)}{number}" for number in range(2))
        return [str(save_model(*each)) for each in zip(models, folders, strict=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


class Answers:
    """What ranks answer. All scenarios of as many ranks run one after the other in the same processes."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self.of = cache(self._run)

    def _run(self, num_ranks: int) -> dict[str, list[Any]]:
        scenarios: dict[str, tuple[str, dict[str, Any]]] = {}

        def add(name: str, function: str, family: str, arguments: dict[str, Any]) -> None:
            old, new = self._folders.of(family)
            scenarios[name] = function, {"old": old, "new": new, **arguments}

        for case, settings in FSDP.items():
            if num_ranks == (2 if settings["mesh_shape"] == [2] else 4):
                add(f"fsdp {case}", "push_fsdp", "tied", settings)
        for case, (family, settings) in MEGATRON.items():
            if num_ranks == 4:
                add(f"megatron {case}", "push_megatron", family, settings)
        if num_ranks == 2:
            for case, frees_memory in TURNS.items():
                add(f"turns {case}", "take_turns", "qwen2", {"frees_memory": frees_memory})
            scenarios["refused"] = "push_refused", {"folder": self._folders.of("tied")[0]}
            for rank in range(2):
                scenarios[f"broken {rank}"] = (
                    "push_broken",
                    {"folder": self._folders.of("qwen2")[0], "broken_rank": rank},
                )
                scenarios[f"refused {rank}"] = (
                    "make_refused",
                    {"folder": self._folders.of("qwen2")[0], "broken_rank": rank},
                )
        return run_ranks(num_ranks, scenarios)


@pytest.fixture(scope="module")
def answers(folders: Folders) -> Answers:
    return Answers(folders)


def file_digests(folder: str, dtype: str | None) -> list[dict[str, str]]:
    """Those of one process that takes the same step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for factor in (1.0, STEP):
        _, tensors = file_tensors(model)
        rounded = [(name, (each * factor).to(getattr(torch, dtype or "float32"))) for name, each in tensors.items()]
        found.append(tensor_digests(rounded, "float32"))
    return found


@pytest.mark.parametrize("case", FSDP)
def test_shards_become_the_weights_of_one_process(folders: Folders, answers: Answers, case: str) -> None:
    settings = FSDP[case]
    found = answers.of(2 if settings["mesh_shape"] == [2] else 4)[f"fsdp {case}"]
    assert all(each["reports"] == [["first", True], ["second", True]] for each in found)
    assert found[0]["digests"] == file_digests(folders.of("tied")[1], settings["dtype"])


@pytest.mark.parametrize("case", MEGATRON)
def test_megatron_ranks_become_the_weights_of_one_process(folders: Folders, answers: Answers, case: str) -> None:
    family, settings = MEGATRON[case]
    found = answers.of(4)[f"megatron {case}"]
    assert all(each["reports"] == [["first", True], ["second", True]] for each in found)
    assert found[0]["digests"] == file_digests(folders.of(family)[1], settings["dtype"])


TURNS = {"it keeps its memory": False, "its memory is given back": True}


@pytest.mark.parametrize("case", TURNS)
def test_an_engine_serves_in_its_turns(folders: Folders, answers: Answers, case: str) -> None:
    found, other = answers.of(2)[f"turns {case}"]
    after = "released" if TURNS[case] else "ready"
    old, new = file_digests(folders.of("qwen2")[1], None)
    wrong = "decoder.final_layernorm.weight"
    assert found == [["1", old], after, ["2", new], after, after, wrong]
    assert other == [wrong]


def test_what_is_wrong_on_one_rank_is_said_on_all(answers: Answers) -> None:
    named = [["WeightUpdateError", "model.norm.weight"], ["WeightUpdateError", "wrong"], ["WeightUpdateError", "wrong"]]
    assert answers.of(2)["refused"] == [[*named, ["taken", ""]]] * 2


BROKEN: dict[str, tuple[str, str, str]] = {
    "fails": ("ValueError", "WeightUpdateError", "ValueError: a trainer's bug"),
    "shorter": ("WeightUpdateError", "WeightUpdateError", "no more"),
    "another order": ("WeightUpdateError", "WeightUpdateError", "the same order"),
    "shorter dictionary": ("WeightUpdateError", "WeightUpdateError", "model."),
    "unreadable": ("MemoryError", "WeightUpdateError", "MemoryError: no room for it"),
    "megatron": ("KeyError", "WeightUpdateError", "KeyError: 'decoder.layers.1.self_attention.linear_proj.weight'"),
    "wrong word": ("RequestError", "RequestError", "mode"),
}
"""What is raised where it goes wrong, and elsewhere, in which words."""


@pytest.mark.parametrize("broken", range(2))
def test_what_goes_wrong_on_one_rank_alone_ends_the_push_on_all_and_the_next_one_lands(
    answers: Answers, broken: int
) -> None:
    for rank, told in enumerate(answers.of(2)[f"broken {broken}"]):
        assert [what for what, _, _ in told] == list(BROKEN)
        for what, kind, message in told:
            here, elsewhere, words = BROKEN[what]
            assert kind == (here if rank == broken else elsewhere), (what, message)
            assert rank == broken or words in message, (what, message)
            assert rank == broken or kind == here or f"rank {broken} of the trainer" in message, message


REFUSED = {
    **{"no target": "target", "wrong place": "target", "address": "address", "dtype": "dtype", "other dtype": "dtype"},
    **{"source of no module": "weights", "source of no model": "weights", "dtype of a source": "dtype"},
}
"""The field of the error that is raised elsewhere."""


@pytest.mark.parametrize("broken", range(2))
def test_what_one_rank_gives_a_constructor_wrong_all_raise(answers: Answers, broken: int) -> None:
    for rank, told in enumerate(answers.of(2)[f"refused {broken}"]):
        refused, groups = told[: len(REFUSED)], told[len(REFUSED) :]
        assert [what for what, *_ in refused] == list(REFUSED)
        for what, kind, field, message in refused:
            is_own = REFUSED[what] != "weights"
            assert rank == broken or kind.endswith("Error") and field == REFUSED[what], (what, kind, field, message)
            assert kind in ("WeightUpdateError", "RequestError") if is_own else kind != "nothing", (what, kind)
            assert is_own or rank == broken or f"rank {broken} of the trainer" in message
        assert [each[:3] for each in groups] == [["group", "WeightUpdateError", "group"]] * 4


@pytest.mark.parametrize("kind", ["fsdp", "megatron"])
def test_a_rank_that_ends_is_a_named_error_and_the_old_weights_stay(folders: Folders, kind: str) -> None:
    old, new = folders.of("qwen2")
    answers = run_ranks(2, {"lost": ("push_and_lose_a_rank", {"old": old, "new": new, "kind": kind})})
    told, ended = answers["lost"]
    assert ended is None and told[1].startswith(("model.", "lm_head."))
    assert told == ["UnavailableError", told[1], True, "alone"]
