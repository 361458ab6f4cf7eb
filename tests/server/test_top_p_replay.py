"""What slime asks where it samples with top_p below 1, and how it reads the tokens that each one could have been."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from headrace import SamplingParams
from tests.in_pieces import in_pieces
from tests.server.conftest import Served
from tests.server.test_generate import events

IDS = [3, 141, 59, 26, 5]
PARAMS: dict[str, Any] = {"temperature": 1.0, "top_p": 0.7, "top_k": -1, "max_new_tokens": 6, "ignore_eos": True}
PARAMS |= {"stop": None, "stop_token_ids": None, "skip_special_tokens": False, "no_stop_trim": True}
PARAMS |= {"spaces_between_special_tokens": False, "sampling_seed": 7}
ASKED = {**PARAMS, "custom_params": {"return_top_p_token_ids": True}}


def rows_of(meta: dict[str, Any]) -> list[list[int]]:
    """As slime's `Sample` takes them, with what it checks."""
    ids, offsets = (
        np.frombuffer(base64.b64decode(meta[name].encode("ascii")), "<i4")
        for name in ("top_p_token_ids", "top_p_token_offsets")
    )
    assert offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[start:end].tolist() for start, end in zip(offsets, offsets[1:], strict=False)]


def expected_of(served: Served) -> tuple[list[list[int]], list[float]]:
    params = SamplingParams(max_new_tokens=6, top_p=0.7, seed=7, ignore_eos=True)
    kept: dict[str, Any] = {"return_kept_token_ids": True, "logprob_mode": "sampled"}
    [found] = served.engine.generate(input_ids=IDS, sampling_params=params, **kept)
    return found.kept_token_ids, found.logprobs


def test_a_whole_answer_has_them_and_log_probabilities_over_them(served: Served) -> None:
    rows, logprobs = expected_of(served)
    meta = served.generate(input_ids=IDS, sampling_params=ASKED, return_logprob=True)["meta_info"]
    assert rows_of(meta) == rows and len(rows) == 6
    assert meta["logprob_mode"] == "sampled"
    assert [logprob for logprob, _, _ in meta["output_token_logprobs"]] == pytest.approx(logprobs, abs=1e-5)
    named = served.generate(input_ids=IDS, sampling_params=ASKED, logprob_mode="raw")["meta_info"]
    assert (rows_of(named), named["logprob_mode"]) == (rows, "raw")


@pytest.mark.parametrize("is_incremental", [True, False])
def test_a_stream_has_those_of_its_tokens(served: Served, is_incremental: bool) -> None:
    """Of what is new, or of all so far: slime's reader tells the two by how many there are."""
    rows, _ = expected_of(served)
    body = {"input_ids": IDS, "sampling_params": ASKED, "incremental_streaming_output": is_incremental}
    found = in_pieces(lambda: events(served, body))
    assert all(len(rows_of(each["meta_info"])) == len(each["output_ids"]) for each in found)
    parts = [row for each in found for row in rows_of(each["meta_info"])] if is_incremental else []
    assert (parts or rows_of(found[-1]["meta_info"])) == rows


def test_each_prompt_of_a_batch_asks_for_itself(served: Served) -> None:
    params = [ASKED, PARAMS, {**ASKED, "n": 2}, {**PARAMS, "custom_params": {"return_top_p_token_ids": False}}]
    params.append({**ASKED, "top_p": 1.0})
    params.append({**ASKED, "custom_params": {"return_top_p_token_ids": True, "other": 3}})
    found = served.generate(input_ids=[IDS] * 6, sampling_params=params, return_errors=True)
    metas = [each["meta_info"] for each in found]
    assert ["top_p_token_ids" in meta for meta in metas[:5]] == [True, False, True, True, False]
    assert rows_of(metas[0]) == rows_of(metas[2]) == expected_of(served)[0] != rows_of(metas[3])
    assert [meta["finish_reason"].get("param") for meta in metas[5:]] == [
        "sampling_params.custom_params.return_top_p_token_ids",
        "sampling_params[5].custom_params.other",
    ]
