"""Which experts the tokens of a sequence were given to, against transformers' routers: whatever was found computed, cut
into chunks, preempted, given up, or computed by two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from headrace import ConfigError, Engine, Generation, RequestError, SamplingParams
from headrace.engine import bounds
from tests.parity.models import VOCAB_SIZE, make_model

SETTINGS: dict[str, Any] = {"inprocess": True, "skip_tokenizer_init": True, "num_threads": 1, "dtype": "float32"}
SETTINGS |= {"page_size": 4, "kv_pool_tokens": 512, "max_num_batched_tokens": 16, "keep_routed_experts": True}
PROMPT = [(7 * at + 3) % VOCAB_SIZE for at in range(23)]
DRAWN = SamplingParams(max_new_tokens=9, seed=5, ignore_eos=True)


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param, seed=3)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("experts")
    model.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, **SETTINGS) as started:
        yield started


def routed_by(model: PreTrainedModel, ids: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, layers, experts per token] of all but the last; 0 in layers without."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
    config = model.config
    found = np.zeros((len(ids) - 1, config.num_hidden_layers, config.num_experts_per_tok), np.int32)
    dense = getattr(config, "mlp_only_layers", None) or ()
    step = getattr(config, "decoder_sparse_step", 1)
    sparse = [at for at in range(config.num_hidden_layers) if at not in dense and (at + 1) % step == 0]
    for layer, each in zip(sparse, [each for each in logits if each is not None], strict=True):
        found[:, layer] = each.topk(config.num_experts_per_tok, dim=-1).indices.numpy()
    return found


def check(model: PreTrainedModel, prompt: list[int], found: Generation, start: int = 0) -> None:
    assert found.routed_experts is not None and found.routed_experts.start == start
    array, expected = found.routed_experts.array(), routed_by(model, prompt + found.token_ids)[start:]
    assert array.dtype == np.int32 and array.shape == expected.shape
    np.testing.assert_array_equal(array, expected)


def test_of_prompt_and_output_also_where_it_was_found_computed(engine: Engine, model: PreTrainedModel) -> None:
    """By who did not ask, too, and by samples that share a prefill."""
    engine.flush_cache()
    [plain] = engine.generate(input_ids=PROMPT, sampling_params=DRAWN)
    assert plain.routed_experts is None and plain.num_cached_tokens == 0
    [again] = engine.generate(input_ids=PROMPT, sampling_params=DRAWN, return_routed_experts=True)
    assert again.num_cached_tokens >= 16 and again.token_ids == plain.token_ids
    check(model, PROMPT, again)
    several = [PROMPT[:11] + [4] * 9, PROMPT[::-1]]
    params = SamplingParams(max_new_tokens=5, seed=5, n=3, ignore_eos=True)
    found = engine.generate(
        input_ids=several, sampling_params=params, return_routed_experts=True, routed_experts_start=6
    )
    assert sum(each.num_cached_tokens for each in found) > 0
    for each in found:
        check(model, several[each.prompt_index], each, start=6)
    [turn] = engine.generate(input_ids=PROMPT + again.token_ids, sampling_params=DRAWN, return_routed_experts=True)
    assert turn.num_cached_tokens > len(PROMPT)
    check(model, PROMPT + again.token_ids, turn)


def test_without_the_prefix_cache_of_one_token_and_of_none(folder: Path, model: PreTrainedModel) -> None:
    with Engine(folder, **{**SETTINGS, "prefix_cache": False, "overlap_depth": 1, "numerics": "invariant"}) as engine:
        found = engine.generate(
            input_ids=[[5], PROMPT], sampling_params={"max_new_tokens": 1}, return_routed_experts=True
        )
        for each, prompt in zip(found, ([5], PROMPT), strict=True):
            check(model, prompt, each)
        [scored] = engine.score(input_ids=PROMPT, return_routed_experts=True)
        check(model, PROMPT, scored)
        asked: dict[str, Any] = {"return_routed_experts": True, "routed_experts_start": len(PROMPT)}
        for max_new_tokens in (1, 0):  # of what was asked for nothing was computed, which is not the same as None
            params = {"max_new_tokens": max_new_tokens}
            [nothing] = engine.generate(input_ids=PROMPT, sampling_params=params, **asked)
            assert nothing.routed_experts is not None
            assert nothing.routed_experts.array().shape == (0, *engine.resolved.model.experts_shape)


def test_sequences_that_are_preempted_go_on_where_they_were(folder: Path, model: PreTrainedModel) -> None:
    prompts = [[(at * 5 + number) % VOCAB_SIZE for at in range(10)] for number in range(6)]
    params = SamplingParams(max_new_tokens=40, seed=2, stop_token_ids=[VOCAB_SIZE - 1], ignore_eos=True)
    with Engine(folder, **{**SETTINGS, "kv_pool_tokens": 128, "max_running_requests": 6}) as engine:
        found = engine.generate(input_ids=prompts, sampling_params=params, return_routed_experts=True)
    assert sum(each.num_preemptions for each in found) > 0
    for each in found:
        check(model, prompts[each.prompt_index], each)


def test_a_stream_and_one_that_is_given_up(engine: Engine, model: PreTrainedModel) -> None:
    pieces = list(engine.stream(input_ids=PROMPT, sampling_params=DRAWN, return_routed_experts=True))
    assert all(each.routed_experts is None for each in pieces[:-1])
    whole = pieces[-1].routed_experts
    ids = [token for piece in pieces for token in piece.token_ids]
    assert whole is not None and np.array_equal(whole.array(), routed_by(model, PROMPT + ids))
    long = SamplingParams(max_new_tokens=200, seed=5, ignore_eos=True)
    ids = []
    for piece in engine.stream(input_ids=PROMPT, sampling_params=long, return_routed_experts=True, request_id="long"):
        ids += piece.token_ids
        if len(ids) > 2:
            engine.abort("long")
    assert piece.finish_reason == "abort" and piece.routed_experts is not None
    np.testing.assert_array_equal(piece.routed_experts.array(), routed_by(model, PROMPT + ids))


def test_what_is_asked_wrong_and_what_cannot_be_had(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field, options in (
        ("routed_experts_start", {"routed_experts_start": 24}),
        ("routed_experts_start", {"routed_experts_start": -1}),
        ("return_routed_experts", {"return_routed_experts": "yes"}),
    ):
        asked: dict[str, Any] = {"return_routed_experts": True, **options}
        with pytest.raises(RequestError) as caught:
            engine.generate(input_ids=PROMPT, **asked)
        assert caught.value.field == field
    num_layers, num_per_token = engine.resolved.model.experts_shape
    most = 2 * (len(PROMPT) + 9 - 1 - 3) * num_layers * num_per_token
    asked = {"return_routed_experts": True, "routed_experts_start": 3, "sampling_params": {"max_new_tokens": 9, "n": 2}}
    monkeypatch.setattr(bounds, "MAX_ROUTED_EXPERTS", most)
    assert len(engine.generate(input_ids=PROMPT, **asked)) == 2
    monkeypatch.setattr(bounds, "MAX_ROUTED_EXPERTS", most - 1)
    with pytest.raises(RequestError, match=f"up to {most} experts .* at most {most - 1} may be") as refused:
        engine.generate(input_ids=PROMPT, **asked)
    assert refused.value.field == "return_routed_experts"
    with (
        Engine(folder, **{**SETTINGS, "keep_routed_experts": False}) as other,
        pytest.raises(RequestError, match="started with keep_routed_experts"),
    ):
        other.generate(input_ids=PROMPT, return_routed_experts=True)
    make_model("llama").save_pretrained(tmp_path)
    for place, settings, why in (
        (tmp_path, {}, "has no experts"),
        (folder, {"pp_size": 2}, "each stage knows"),
        (folder, {"host_kv_tokens": 64}, "host_kv_tokens brings"),
    ):
        with pytest.raises(ConfigError, match=why) as cannot:
            Engine(place, **{**SETTINGS, **settings})
        assert cannot.value.field == "keep_routed_experts"


def test_two_ranks(folder: Path, model: PreTrainedModel) -> None:
    with Engine(folder, **{**SETTINGS, "inprocess": False, "tp_size": 2}) as ranks:
        for _ in range(2):
            [found] = ranks.generate(input_ids=PROMPT, sampling_params=DRAWN, return_routed_experts=True)
            check(model, PROMPT, found)
            assert Generation.from_json(found.to_json()) == found
