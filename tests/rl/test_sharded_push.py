"""A trainer of several ranks pushes: FSDP2's shards over gloo, against what transformers has in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.rl import hf_named_tensors
from headrace.rl.push import tensor_digests
from tests.parity.models import make_model, save_model
from tests.rl.rank_processes import run_ranks
from tests.rl.rank_scenarios import STEP

CASES: dict[str, dict[str, Any]] = {
    "two ranks": {"mesh_shape": [2], "road": "engine", "dtype": None, "as_iterator": False},
    "two ranks, over a client": {"mesh_shape": [2], "road": "shared memory", "dtype": "bfloat16", "as_iterator": True},
    "four ranks": {"mesh_shape": [4], "road": "bytes", "dtype": None, "as_iterator": True},
    "two by two": {"mesh_shape": [2, 2], "road": "engine", "dtype": "bfloat16", "as_iterator": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of one shape: a tied head, and a vocabulary that four ranks do not share evenly."""
    scratch = tmp_path_factory.mktemp("models")
    models = [make_model("qwen3", seed=seed, tie_word_embeddings=True) for seed in (0, 1)]
    return [str(save_model(model, scratch / str(number))) for number, model in enumerate(models)]


def expected_digests(folder: str, dtype: str | None) -> list[dict[str, str]]:
    """Those of one process that takes the same step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for _ in range(2):
        tensors = hf_named_tensors(model)
        rounded = [(name, each.to(getattr(torch, dtype)) if dtype else each) for name, each in tensors]
        found.append(tensor_digests(rounded, "float32"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(STEP)
    return found


@pytest.mark.parametrize("case", CASES)
def test_shards_become_the_weights_of_one_process(folders: list[str], tmp_path: Path, case: str) -> None:
    settings = CASES[case]
    num_ranks = 4 if 4 in settings["mesh_shape"] or len(settings["mesh_shape"]) == 2 else 2
    answers = run_ranks("push_fsdp", num_ranks, tmp_path, old=folders[0], new=folders[1], **settings)
    assert all(answer["reports"] == answers[0]["reports"] for answer in answers)
    assert [report[::2] for report in answers[0]["reports"]] == [["first", True], ["second", True]]
    assert answers[0]["digests"] == expected_digests(folders[1], settings["dtype"])


def test_what_is_wrong_on_one_rank_is_said_on_all(folders: list[str], tmp_path: Path) -> None:
    answers = run_ranks("push_refused", 2, tmp_path, folder=folders[0])
    named = [["WeightUpdateError", "model.norm.weight"], ["WeightUpdateError", "wrong"], ["WeightUpdateError", "wrong"]]
    assert answers == [[*named, ["taken", ""]]] * 2
