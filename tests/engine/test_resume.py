"""A generation resumed by prompt + partial output goes on as if it had never been cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace import Engine, Generation
from headrace.types.errors import RequestError
from tests.engine.builders import CONTEXT_LENGTH, EOS_ID, LETTERS, VOCAB_SIZE

PROMPT = list(b"the cat sat on the mat")
LENGTH = 24
KINDS: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"repetition_penalty": 1.4, "presence_penalty": -0.5, "frequency_penalty": 0.3},
    {"frequency_penalty": 0.7, "temperature": 0.0},
    {"presence_penalty": 1.0, "min_new_tokens": 15, "stop_token_ids": list(range(ord("a"), ord("f")))},
    {"frequency_penalty": 0.5, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
]


def whole(engine: Engine, **params: Any) -> Generation:
    [sample] = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": LENGTH, **params})
    return sample


def resume(engine: Engine, sample: Generation, cut: int, **params: Any) -> Generation:
    """What comes after the first `cut` tokens of `sample`, which `params` made."""
    rest = {
        "max_new_tokens": params.pop("max_new_tokens", LENGTH) - cut,
        "min_new_tokens": max(0, params.pop("min_new_tokens", 0) - cut),
        "seed": sample.seed,
    }
    ids = PROMPT + sample.token_ids[:cut]
    [found] = engine.generate(input_ids=ids, sampling_params={**params, **rest}, num_output_ids_in_prompt=cut)
    return found


def check_goes_on(found: Generation, sample: Generation, cut: int, *, same_bits: bool) -> None:
    assert sample.token_ids[:cut] + found.token_ids == sample.token_ids
    assert (found.finish_reason, found.matched, found.seed) == (sample.finish_reason, sample.matched, sample.seed)
    assert found.num_prompt_tokens == len(PROMPT) + cut
    if same_bits:
        assert found.logprobs == sample.logprobs[cut:]
    else:
        np.testing.assert_allclose(found.logprobs, sample.logprobs[cut:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_penalties_count_what_was_generated_before_the_cut(start: Callable[..., Engine], numerics: str) -> None:
    engine, source = start(numerics=numerics), random.Random(0)
    num_that_differ_without = 0
    for seed, kind in enumerate(KINDS):
        sample = whole(engine, seed=seed, ignore_eos=True, **kind)
        for cut in source.sample(range(1, len(sample.token_ids)), 2):
            found = resume(engine, sample, cut, ignore_eos=True, **kind)
            check_goes_on(found, sample, cut, same_bits=numerics == "invariant")
            params = {**kind, "max_new_tokens": LENGTH - cut, "min_new_tokens": 0, "seed": seed, "ignore_eos": True}
            [plain] = engine.generate(input_ids=PROMPT + sample.token_ids[:cut], sampling_params=params)
            num_that_differ_without += sample.token_ids[:cut] + plain.token_ids != sample.token_ids
    assert num_that_differ_without > 3, "these penalties would not show the difference"


def test_stop_strings_match_across_the_cut_and_text_begins_behind_it(engine: Engine) -> None:
    source, num_across = random.Random(1), 0
    for seed in range(6):
        free = whole(engine, seed=seed, logit_bias=LETTERS, frequency_penalty=0.4)
        at = source.randrange(4, LENGTH - 4)
        params: dict[str, Any] = {
            "logit_bias": LETTERS,
            "frequency_penalty": 0.4,
            "stop": [free.text[at : at + source.randrange(2, 5)], "~~~"],
            "no_stop_trim": seed % 2 == 0,
        }
        sample = whole(engine, seed=seed, **params)
        for cut in source.sample(range(1, len(sample.token_ids)), 2) + [len(sample.token_ids) - 1]:
            found = resume(engine, sample, cut, **params)
            check_goes_on(found, sample, cut, same_bits=False)
            [first] = engine.generate(input_ids=PROMPT, sampling_params={**params, "seed": seed, "max_new_tokens": cut})
            text = first.text + found.text
            assert text.startswith(sample.text)
            num_shown = len(text) - len(sample.text)  # of a stop string whose beginning was text of the first part
            assert num_shown == (0 if params["no_stop_trim"] else max(0, cut - len(sample.text)))
            num_across += sample.matched is not None and cut > len(sample.token_ids) - len(str(sample.matched))
            pieces = engine.stream(
                input_ids=PROMPT + sample.token_ids[:cut],
                sampling_params={**params, "seed": seed, "max_new_tokens": LENGTH - cut},
                num_output_ids_in_prompt=cut,
            )
            assert "".join(piece.text for piece in pieces) == found.text
    assert num_across > 5


def test_a_stop_string_complete_before_the_cut_is_passed_over(engine: Engine) -> None:
    """Who resumes behind it wants to go on; one that the next token completes counts."""
    params = {"max_new_tokens": 6, "logit_bias": {ord("a"): 100.0}, "stop": ["aa"]}
    [found] = engine.generate(input_ids=list(b"xaa"), sampling_params=params, num_output_ids_in_prompt=2)
    assert (found.token_ids, found.text, found.matched) == (list(b"a"), "", "aa")
    params["stop"] = ["xaa"]
    [found] = engine.generate(input_ids=list(b"yxaa"), sampling_params=params, num_output_ids_in_prompt=3)
    assert (found.text, found.finish_reason) == ("a" * 6, "length")


def test_preempted_and_resumed_sequences_keep_their_counts(start: Callable[..., Engine]) -> None:
    """A pool that holds one and a half of them: sequences are preempted and computed again, the resumed ones too."""
    roomy, tight = start(numerics="invariant"), start(numerics="invariant", kv_pool_tokens=72)
    kind: dict[str, Any] = {"ignore_eos": True, "frequency_penalty": 0.8, "presence_penalty": 0.5}
    samples = [whole(roomy, seed=seed, **kind) for seed in range(6)]
    cuts = [5 + 3 * seed for seed in range(6)]
    found = tight.generate(
        input_ids=[PROMPT + sample.token_ids[:cut] for sample, cut in zip(samples, cuts, strict=True)],
        sampling_params=[{**kind, "seed": seed, "max_new_tokens": LENGTH - cut} for seed, cut in enumerate(cuts)],
        num_output_ids_in_prompt=cuts,
    )
    for each, sample, cut in zip(found, samples, cuts, strict=True):
        check_goes_on(each, sample, cut, same_bits=True)
    assert tight.metrics()["num_preemptions"] > 0


def test_samples_share_the_cut(engine: Engine) -> None:
    params = {"n": 3, "seed": 5, "max_new_tokens": 8, "logit_bias": LETTERS, "presence_penalty": 1.0, "stop": ["ab"]}
    group = engine.generate(input_ids=[*PROMPT, *b"xyz"], sampling_params=params, num_output_ids_in_prompt=3)
    alone = [
        engine.generate(
            input_ids=[*PROMPT, *b"xyz"],
            sampling_params={**params, "n": 1, "seed": sample.seed},
            num_output_ids_in_prompt=3,
        )[0]
        for sample in group
    ]
    assert [each.token_ids for each in group] == [each.token_ids for each in alone]
    assert [each.text for each in group] == [each.text for each in alone]


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": [1, 2], "num_output_ids_in_prompt": 2},
        {"input_ids": [1, 2], "num_output_ids_in_prompt": -1},
        {"input_ids": [1, 2], "num_output_ids_in_prompt": True},
        {"input_ids": [1, 2], "num_output_ids_in_prompt": "1"},
        {"input_ids": [[1, 2], [3]], "num_output_ids_in_prompt": [1]},
        {"input_ids": [[1, 2], [3]], "num_output_ids_in_prompt": 1},
        {"prompts": "some text", "num_output_ids_in_prompt": 1},
    ],
)
def test_what_cannot_be_resumed_is_refused(engine: Engine, arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(sampling_params={"max_new_tokens": 1}, **arguments)
    assert caught.value.field == "num_output_ids_in_prompt"


def test_an_over_long_prompt_is_an_error_of_its_own(engine: Engine) -> None:
    prompts = [[1, 2], [1] * (CONTEXT_LENGTH + 1), [EOS_ID + 100], [3]]
    params = [{"max_new_tokens": 2, "seed": 1, "n": n} for n in (1, 2, 1, 1)]
    params[3]["max_new_tokens"] = CONTEXT_LENGTH
    found = engine.generate(input_ids=prompts, sampling_params=params, return_errors=True)
    assert [each.prompt_index for each in found] == [0, 1, 1, 2, 3]
    assert [each.finish_reason for each in found] == ["length", "error", "error", "error", "error"]
    assert [each.error.field for each in found[1:] if each.error] == [
        "input_ids[1]",
        "input_ids[1]",
        "input_ids[2]",
        "sampling_params.max_new_tokens",
    ]
    assert found[1].error is not None and isinstance(found[1].error.to_exception(), RequestError)
    assert "context" in found[1].finish_message and found[1].token_ids == []
    assert [each.seed for each in found] == [1, None, None, None, None], "nothing was to be drawn"
    pieces = list(engine.stream(input_ids=prompts, sampling_params=params, return_errors=True))
    assert {each.prompt_index for each in pieces if each.finish_reason == "error"} == {1, 2, 3}
    [alone, good] = engine.generate(input_ids=[[1], [2]], sampling_params=[{"top_p": 7}, {}], return_errors=True)
    assert alone.error is not None and alone.error.field == "sampling_params[0].top_p"
    assert good.finish_reason in ("stop", "length") and (alone.seed, good.seed is None) == (None, False)
    with pytest.raises(RequestError):
        engine.generate(input_ids=prompts, sampling_params=params)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop_token_ids": [VOCAB_SIZE]}, "sampling_params.stop_token_ids"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "sampling_params.logit_bias"),
        ({"top_p": 7}, "sampling_params[0].top_p"),
    ],
)
def test_bad_parameters_of_one_prompt_refuse_that_prompt(engine: Engine, params: dict[str, Any], field: str) -> None:
    asked: Any = dict(sampling_params=[{**params, "n": 1}, {"max_new_tokens": 1}], return_errors=True)
    calls = (engine.generate, engine.score, lambda prompts, **rest: list(engine.stream(prompts, **rest)))
    for call in calls:
        bad, good = sorted(call(["a", "b"], **asked), key=lambda each: each.prompt_index)
        assert (bad.error and bad.error.field, good.error) == (field, None)
        assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
        with pytest.raises(RequestError) as caught:
            call(["a", "b"], **{**asked, "return_errors": False})
        assert caught.value.field == field


def test_scoring_reads_the_parameters_of_each_prompt(engine: Engine) -> None:
    shared = {"n": 3, "max_new_tokens": 9, "stop": "x"}
    assert [each.finish_reason for each in engine.score(["ab", "cd"], sampling_params=shared)] == ["length"] * 2
    with pytest.raises(RequestError, match="max_new_tokens"):
        engine.score("ab", sampling_params={"max_new_tokens": "x"})


def test_what_is_no_prompt_refuses_itself(engine: Engine, start: Callable[..., Engine]) -> None:
    params = {"max_new_tokens": 1}
    found = engine.generate(["a", None, "b"], sampling_params=params, return_errors=True)  # type: ignore[list-item]
    assert [each.error and each.error.field for each in found] == [None, "prompts[1]", None]
    rows: Any = [[1], None]
    found = engine.generate(input_ids=rows, sampling_params=params, return_errors=True)
    assert [each.error and each.error.field for each in found] == [None, "input_ids[1]"]
    bare = start(skip_tokenizer_init=True)
    stops: Any = [{**params, "stop": "x"}, params]
    found = bare.generate(input_ids=[[1], [2]], sampling_params=stops, return_errors=True)
    assert [each.error and each.error.field for each in found] == ["sampling_params.stop", None]


def test_a_bad_name_refuses_its_prompt_and_leaves_its_owner_alone(engine: Engine) -> None:
    params = {"max_new_tokens": 1}
    named: Any = dict(sampling_params=params, return_errors=True)
    found = engine.generate(["a", "b"], request_id=["x" * 2000, "\ud800"], **named)
    assert [each.error and each.error.field for each in found] == ["request_id"] * 2
    live = engine.stream("a", sampling_params={"max_new_tokens": 900, "ignore_eos": True}, request_id="taken")
    next(live)
    for _ in range(2):  # the refusal must not make the name free either
        found = engine.generate(["a", "b"], request_id=["taken", "free"], **named)
        assert [each.error and each.error.field for each in found] == ["request_id", None]
        assert found[0].error is not None and "in use" in found[0].error.message and found[0].seed is None
    assert engine.abort("taken") == 1
    list(live)


def test_max_new_tokens_is_clipped_when_asked(engine: Engine) -> None:
    room = 5
    ids = [1 + i % 200 for i in range(CONTEXT_LENGTH - room)]
    params = {"max_new_tokens": 4000, "min_new_tokens": 100, "ignore_eos": True}
    [clipped] = engine.generate(input_ids=ids, sampling_params=params, clip_to_context=True)
    assert (len(clipped.token_ids), clipped.finish_reason) == (room, "length")
    [full] = engine.generate(input_ids=[1] * CONTEXT_LENGTH, sampling_params=params, clip_to_context=True)
    assert (full.token_ids, full.finish_reason) == ([], "length")
    with pytest.raises(RequestError):
        engine.generate(input_ids=ids, sampling_params=params)
