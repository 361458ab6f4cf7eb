from __future__ import annotations

import array
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.engine.requests import CallArguments, GenerateItem, GenerateOptions, RequestBuilder
from headrace.engine.seeds import sample_seed
from headrace.text import Tokenizer
from headrace.types.errors import RequestError
from headrace.types.request import unpack_ids
from headrace.types.sampling_params import LogprobOptions, SamplingParams
from tests.engine.builders import byte_tokenizer

VOCAB_SIZE = 300
CONTEXT_LENGTH = 64


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    folder = tmp_path_factory.mktemp("config")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": [256, 5000],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    return resolve(EngineConfig(model=str(folder), seed=3, max_running_requests=8, max_waiting_requests=24), folder)


@pytest.fixture(scope="module")
def builder(resolved: ResolvedConfig) -> RequestBuilder:
    return RequestBuilder(resolved, Tokenizer(byte_tokenizer()))


def expand(builder: RequestBuilder, **arguments: Any) -> list[GenerateItem]:
    prompts, input_ids = arguments.pop("prompts", None), arguments.pop("input_ids", None)
    params = arguments.pop("sampling_params", {"max_new_tokens": 4})
    options: GenerateOptions = arguments  # type: ignore[assignment]
    return builder.expand(CallArguments(prompts, input_ids, params, options))


def test_special_tokens_are_added_to_texts_unless_told_otherwise(
    resolved: ResolvedConfig, caplog: pytest.LogCaptureFixture
) -> None:
    backend = byte_tokenizer()
    backend.bos_token = "<|user|>"
    bos = backend.convert_tokens_to_ids("<|user|>")
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", bos)]
    )
    builder = RequestBuilder(resolved, Tokenizer(backend))
    for text, special, expected in (("a", True, [bos, 97]), ("a", False, [97]), ("<|user|>a", False, [bos, 97])):
        (item,) = expand(builder, prompts=text, add_special_tokens=special)
        assert unpack_ids(item.packed or b"").tolist() == expected
    assert not caplog.records
    for _ in range(2):
        (item,) = expand(builder, prompts="<|user|>a")
        assert unpack_ids(item.packed or b"").tolist() == [bos, bos, 97]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "told once"
    with pytest.raises(RequestError) as raised:
        expand(builder, prompts="a", add_special_tokens="no")
    assert raised.value.field == "add_special_tokens"


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "input_ids"),
    ({"prompts": "a", "input_ids": [1]}, "prompts"),
    ({"prompts": []}, "prompts"),
    ({"prompts": ""}, "prompts"),
    ({"prompts": ["a", ""]}, "prompts[1]"),
    ({"prompts": 5}, "prompts"),
    ({"prompts": ["a", 5]}, "prompts[1]"),
    ({"prompts": b"bytes"}, "prompts"),
    ({"prompts": "\ud800"}, "prompts"),
    ({"prompts": "a" * (CONTEXT_LENGTH + 1)}, "prompts"),
    ({"prompts": "a" * 10_000_000}, "prompts"),
    ({"prompts": "a" * (CONTEXT_LENGTH * 200)}, "prompts"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": [[1], []]}, "input_ids[1]"),
    ({"input_ids": 5}, "input_ids"),
    ({"input_ids": "text"}, "input_ids"),
    ({"input_ids": [1, "2"]}, "input_ids"),
    ({"input_ids": [1, 2.0]}, "input_ids"),
    ({"input_ids": [1, True]}, "input_ids"),
    ({"input_ids": [1, None]}, "input_ids"),
    ({"input_ids": [[1], 2]}, "input_ids[1]"),
    ({"input_ids": [[1], "ab"]}, "input_ids[1]"),
    ({"input_ids": [[[1]]]}, "input_ids"),
    ({"input_ids": [[1], [[2]]]}, "input_ids[1]"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"input_ids": [VOCAB_SIZE]}, "input_ids"),
    ({"input_ids": [[1], [VOCAB_SIZE]]}, "input_ids[1]"),
    ({"input_ids": [10**30]}, "input_ids"),
    ({"input_ids": [1 << 40]}, "input_ids"),
    ({"input_ids": np.array([1.5])}, "input_ids"),
    ({"input_ids": np.array([True])}, "input_ids"),
    ({"input_ids": np.array([], dtype=np.int64)}, "input_ids"),
    ({"input_ids": np.array([[[1]]])}, "input_ids"),
    ({"input_ids": [1] * (CONTEXT_LENGTH + 1)}, "input_ids"),
    ({"input_ids": [1] * CONTEXT_LENGTH}, "sampling_params.max_new_tokens"),
    ({"input_ids": [1] * 61}, "sampling_params.max_new_tokens"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": CONTEXT_LENGTH}}, "sampling_params.max_new_tokens"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": "4"}}, "sampling_params.max_new_tokens"),
    ({"input_ids": [1], "sampling_params": {"tempratur": 1.0}}, "sampling_params.tempratur"),
    ({"input_ids": [1], "sampling_params": {"temperature": float("nan")}}, "sampling_params.temperature"),
    ({"input_ids": [1], "sampling_params": {"n": 10**9}}, "sampling_params.n"),
    ({"input_ids": [1], "sampling_params": {"n": 33, "max_new_tokens": 1}}, "input_ids"),
    ({"input_ids": [1], "sampling_params": "hot"}, "sampling_params"),
    ({"input_ids": [1], "sampling_params": [{}, {}]}, "sampling_params"),
    ({"input_ids": [1], "sampling_params": []}, "sampling_params"),
    ({"input_ids": [[1], [2]], "sampling_params": [{"max_new_tokens": 1}, 5]}, "sampling_params[1]"),
    (
        {"input_ids": [[1], [2]], "sampling_params": [{"max_new_tokens": 1}, {"top_p": 2}]},
        "sampling_params[1].top_p",
    ),
    (
        {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "stop_token_ids": [VOCAB_SIZE]}},
        "sampling_params.stop_token_ids",
    ),
    (
        {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "logit_bias": {VOCAB_SIZE: 1.0}}},
        "sampling_params.logit_bias",
    ),
    ({"input_ids": [1], "request_id": ""}, "request_id"),
    ({"input_ids": [1], "request_id": 5}, "request_id"),
    ({"input_ids": [1], "request_id": "x" * 2000}, "request_id"),
    ({"input_ids": [1], "request_id": "\ud800"}, "request_id"),
    ({"input_ids": [[1], [2]], "request_id": ["a"]}, "request_id"),
    ({"input_ids": [[1], [2]], "request_id": ["a", "a"]}, "request_id"),
    ({"input_ids": [1], "priority": 1.5}, "priority"),
    ({"input_ids": [1], "priority": True}, "priority"),
    ({"input_ids": [1], "priority": 1 << 40}, "priority"),
    ({"input_ids": [1], "priority": (1 << 20) + 1}, "priority"),
    ({"input_ids": [1], "extra_key": 5}, "extra_key"),
    ({"input_ids": [1], "extra_key": "x" * 2000}, "extra_key"),
    ({"input_ids": [1], "extra_key": "\ud800"}, "extra_key"),
    ({"input_ids": [1], "logprob_mode": "rawest"}, "logprob_mode"),
    ({"input_ids": [1], "logprob_mode": np.array([1, 2])}, "logprob_mode"),
    ({"input_ids": [1], "prompt_logprob_mode": torch.tensor([1, 2])}, "prompt_logprob_mode"),
    ({"input_ids": [1], "prompt_logprob_mode": 3}, "prompt_logprob_mode"),
    ({"input_ids": [1], "return_prompt_logprobs": 1}, "return_prompt_logprobs"),
    ({"input_ids": [1], "return_prompt_logprobs": True, "logprob_start": 2}, "logprob_start"),
    ({"input_ids": [1], "logprob_start": -1}, "logprob_start"),
    ({"input_ids": [1], "logprob_start": "0"}, "logprob_start"),
    ({"input_ids": [1], "top_logprobs": -1}, "top_logprobs"),
    ({"input_ids": [1], "top_logprobs": VOCAB_SIZE + 1}, "top_logprobs"),
    ({"input_ids": [1], "top_logprobs": True}, "top_logprobs"),
    ({"input_ids": [1], "logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
    ({"input_ids": [1], "logprob_token_ids": ["a"]}, "logprob_token_ids"),
    ({"input_ids": [1], "logprob_token_ids": 7}, "logprob_token_ids"),
    ({"input_ids": [1], "return_kept_token_ids": 1}, "return_kept_token_ids"),
    ({"input_ids": [1], "return_kept_token_ids": True}, "return_kept_token_ids"),
    ({"input_ids": [1], "logprob_token_ids": [1] * 5000}, "logprob_token_ids"),
    ({"input_ids": [1], "lora_path": "x"}, "lora_path"),
    ({"input_ids": {1, 2}}, "input_ids"),
    ({"input_ids": {1: 2}}, "input_ids"),
    ({"input_ids": torch.tensor([1.0])}, "input_ids"),
    ({"input_ids": torch.tensor(1)}, "input_ids"),
    ({"input_ids": torch.tensor([1.0], dtype=torch.bfloat16)}, "input_ids"),
    ({"input_ids": torch.ones(2, dtype=torch.int64, device="meta")}, "input_ids"),
    ({"input_ids": torch.tensor([True])}, "input_ids"),
    ({"input_ids": np.array(1)}, "input_ids"),
    ({"input_ids": np.array(["1"])}, "input_ids"),
    ({"input_ids": iter([])}, "input_ids"),
    ({"prompts": {"a": 1}}, "prompts"),
    ({"prompts": iter([])}, "prompts"),
    ({"input_ids": [1], "return_errors": "yes"}, "return_errors"),
    ({"input_ids": [1], "clip_to_context": 1}, "clip_to_context"),
    ({"input_ids": [1], "return_prompt_logprobs": "yes"}, "return_prompt_logprobs"),
]


@pytest.mark.parametrize(("arguments", "field"), BAD, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD)])
def test_bad_input_names_its_field(builder: RequestBuilder, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        expand(builder, **arguments)
    assert caught.value.field == field
    assert caught.value.message


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": "a"},
        {"prompts": ["a", "b"]},
        {"prompts": ("a", "b")},
        {"input_ids": [1, VOCAB_SIZE - 1]},
        {"input_ids": (1, 2)},
        {"input_ids": [[1], (2,), np.array([3])]},
        {"input_ids": np.array([1, 2], dtype=np.uint8)},
        {"input_ids": np.array([[1, 2], [3, 4]])},
        {"input_ids": [np.int64(4), 5]},
        {"input_ids": [1] * 60},
        {"input_ids": [1] * CONTEXT_LENGTH, "sampling_params": {"max_new_tokens": 0}},
        {"input_ids": [1], "return_prompt_logprobs": True, "logprob_start": 1},
        {"input_ids": [1], "top_logprobs": VOCAB_SIZE, "logprob_token_ids": np.array([1, 2])},
        {"input_ids": [1], "sampling_params": {"n": 32, "max_new_tokens": 1}},
        {"prompts": iter(["a", "b"])},
        {"prompts": np.array(["a", "b"])},
        {"input_ids": range(1, 9)},
        {"input_ids": iter([1, 2])},
        {"input_ids": [range(3), iter([1, 2]), torch.tensor([3]), np.array([4], dtype=np.uint16)]},
        {"input_ids": torch.tensor([1, 2])},
        {"input_ids": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)},
        {"input_ids": [torch.tensor(1), torch.tensor(2)]},
        {"input_ids": array.array("i", [1, 2])},
        {"input_ids": [1], "priority": np.int64(3), "top_logprobs": np.int32(2), "logprob_token_ids": range(3)},
        {"input_ids": [1], "return_prompt_logprobs": np.bool_(True), "logprob_start": np.int64(0)},
    ],
)
def test_good_input_passes(builder: RequestBuilder, arguments: dict[str, Any]) -> None:
    assert expand(builder, **arguments)


def test_a_sequence_that_the_pool_could_never_hold_is_refused(resolved: ResolvedConfig) -> None:
    small = msgspec.structs.replace(resolved, num_pages=3)
    builder = RequestBuilder(small, None)
    assert small.max_total_num_tokens == 32
    assert expand(builder, input_ids=[1] * 30, sampling_params={"max_new_tokens": 3})
    with pytest.raises(RequestError, match="KV pool"):
        expand(builder, input_ids=[1] * 30, sampling_params={"max_new_tokens": 4})


def test_text_is_encoded_and_ids_are_not_touched(builder: RequestBuilder) -> None:
    [text], [ids] = expand(builder, prompts="hé"), expand(builder, input_ids=[9, 8, 7])
    assert unpack_ids(builder.build(text, 1).prompt).tolist() == list("hé".encode())
    assert unpack_ids(builder.build(ids, 2).prompt).tolist() == [9, 8, 7]


def test_samples_are_prompt_major_with_their_own_seeds(builder: RequestBuilder) -> None:
    params = [{"n": 2, "seed": 5, "max_new_tokens": 1}, {"n": 1, "max_new_tokens": 1}]
    items = expand(builder, input_ids=[[1], [2]], sampling_params=params, request_id="r")
    assert [(i.prompt_index, i.index, i.request_id) for i in items] == [(0, 0, "r_0"), (0, 1, "r_0"), (1, 0, "r_1")]
    assert [item.seed for item in items[:2]] == [5, sample_seed(5, 1)]


def test_requests_without_a_seed_get_different_ones_that_repeat_with_the_engine(resolved: ResolvedConfig) -> None:
    def seeds() -> list[int]:
        fresh = RequestBuilder(resolved, None)
        return [fresh.build(item, 0).seed for _ in range(3) for item in expand(fresh, input_ids=[[1], [1]])]

    assert seeds() == seeds()
    assert len(set(seeds())) == 6


def test_stop_ids_are_the_union_with_end_of_sequence(builder: RequestBuilder) -> None:
    def stops(**params: Any) -> tuple[int, ...]:
        [item] = expand(builder, input_ids=[1], sampling_params={"max_new_tokens": 1, **params})
        return builder.build(item, 0).stop_token_ids

    assert stops() == (256, 257), "both files' ids, but none outside the vocabulary"
    assert stops(stop_token_ids=[9, 257]) == (256, 257, 9)
    assert stops(stop_token_ids=[9], ignore_eos=True) == (9,)
    assert stops(ignore_eos=True) == ()


@pytest.mark.parametrize("ignores", [False, True])
def test_where_no_stop_id_may_be_drawn_another_token_is_left(builder: RequestBuilder, ignores: bool) -> None:
    """Whether the caller names all of them or the model's own end-of-sequence ids are the rest."""
    every = [token for token in range(VOCAB_SIZE) if ignores or token not in (256, 257)]
    params: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 1, "ignore_eos": ignores, "stop_token_ids": every}
    full = [1] * CONTEXT_LENGTH
    with pytest.raises(RequestError, match=r"^sampling_params\.min_new_tokens .* every token") as caught:
        expand(builder, input_ids=[1], sampling_params=params)
    assert caught.value.field == "sampling_params.min_new_tokens"
    with pytest.raises(RequestError, match="every token"):
        builder.build(GenerateItem(input_ids=[1], params=SamplingParams(**params)), 0)
    (item,) = expand(builder, input_ids=[1], sampling_params=params, return_errors=True)
    assert item.refusal is not None and item.refusal.field == "sampling_params.min_new_tokens"
    expand(builder, input_ids=[1], sampling_params={**params, "min_new_tokens": 0})
    expand(builder, input_ids=[1], sampling_params={**params, "stop_token_ids": [*every[1:], every[1]]})
    expand(builder, input_ids=full, sampling_params=params, clip_to_context=True)  # nothing is drawn


def test_sampling_reaches_the_core_in_its_own_terms(builder: RequestBuilder) -> None:
    def sampling(**params: Any) -> Any:
        item = GenerateItem(input_ids=[1], params=SamplingParams(max_new_tokens=1, **params))
        return builder.build(item, 0).sampling

    assert sampling(temperature=1e-7).temperature == 1e-7  # the samplers know that this is greedy
    assert [sampling(top_k=k).top_k for k in (-1, 0, 5, VOCAB_SIZE, 1 << 30)] == [0, 0, 5, 0, 0]
    assert sampling(logit_bias={3: 1.5}).logit_bias == ((3, 1.5),)


def test_tokens_are_delivered_one_by_one_only_when_somebody_looks(builder: RequestBuilder) -> None:
    def every(stream: bool, **params: Any) -> int:
        item = GenerateItem(input_ids=[1], params=SamplingParams(max_new_tokens=1, **params), stream=stream)
        return builder.build(item, 0).deliver_every

    assert (every(False), every(True), every(False, stop=("x",))) == (0, 1, 1)


def test_prompt_scores_that_cannot_exist_are_not_asked_for(builder: RequestBuilder) -> None:
    def start(position: int) -> int | None:
        item = GenerateItem(input_ids=[1, 2], params=SamplingParams(max_new_tokens=1))
        item = GenerateItem(
            input_ids=item.input_ids, params=item.params, logprobs=LogprobOptions(prompt_start=position)
        )
        return builder.build(item, 0).logprobs.prompt_start

    assert [start(0), start(1), start(2)] == [0, 1, None]


def test_without_a_tokenizer_text_and_stop_strings_are_refused(resolved: ResolvedConfig) -> None:
    builder = RequestBuilder(resolved, None)
    with pytest.raises(RequestError, match="no tokenizer"):
        expand(builder, prompts="a")
    with pytest.raises(RequestError, match="tokenizer") as caught:
        expand(builder, input_ids=[1], sampling_params={"max_new_tokens": 1, "stop": "x"})
    assert caught.value.field == "sampling_params.stop"


def test_numbers_of_numpy_become_plain_ones(builder: RequestBuilder) -> None:
    params = {
        "max_new_tokens": 4,
        "temperature": np.float64(0.7),
        "top_p": np.float64(0.9),
        "logit_bias": {3: np.float64(1)},
    }
    sampling = builder.build(expand(builder, input_ids=[1], sampling_params=params)[0], 1).sampling
    assert (sampling.temperature, sampling.top_p, sampling.logit_bias) == (0.7, 0.9, ((3, 1.0),))
    assert {type(value) for value in (sampling.temperature, sampling.top_p, sampling.logit_bias[0][1])} == {float}


def test_more_further_logprobs_than_memory_holds_are_refused(resolved: ResolvedConfig) -> None:
    """What is asked beside each token, over all positions and samples of a prompt: 2 ** 24 values."""
    model = msgspec.structs.replace(resolved.model, vocab_size=1 << 20)
    roomy = msgspec.structs.replace(resolved, model=model, context_length=1 << 20).with_pool(1 << 20, ())
    long = RequestBuilder(roomy, None)
    prompt = [1] * 16_000
    for options, params, named in (
        ({"return_prompt_logprobs": True, "top_logprobs": 1024}, {"max_new_tokens": 400}, "top_logprobs"),
        ({"return_prompt_logprobs": True, "top_logprobs": 1024}, {"max_new_tokens": 0, "n": 2}, "top_logprobs"),
        ({"top_logprobs": 1024}, {"max_new_tokens": 16_400}, "top_logprobs"),
        ({"top_logprobs": 1024}, {"max_new_tokens": 1_000, "n": 17}, "top_logprobs"),
        ({"return_prompt_logprobs": True, "logprob_token_ids": range(4000)}, {}, "logprob_token_ids"),
    ):
        with pytest.raises(RequestError) as caught:
            expand(long, input_ids=prompt, sampling_params=params, **options)
        assert caught.value.field == named
    for options in ({"return_prompt_logprobs": True, "top_logprobs": 1024}, {"top_logprobs": 1024}):
        assert expand(long, input_ids=prompt, sampling_params={"max_new_tokens": 360}, **options)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"input_ids": {200, 5, 7}}, "input_ids"),
        ({"input_ids": [{200, 5, 7}]}, "input_ids"),
        ({"input_ids": [[1, 2], frozenset({5, 7})]}, "input_ids[1]"),
        ({"prompts": {"a", "b"}}, "prompts"),
        ({"input_ids": [[1, 2], [3, 4]], "num_output_ids_in_prompt": {0, 1}}, "num_output_ids_in_prompt"),
    ],
)
def test_a_set_is_no_list_where_order_counts(builder: RequestBuilder, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match="must have an order; a set has none") as refused:
        expand(builder, **arguments)
    assert refused.value.field == field


def test_a_set_is_taken_where_order_is_nothing(builder: RequestBuilder) -> None:
    params = {"max_new_tokens": 1, "stop": {"a", "b"}, "stop_token_ids": {3, 4}}
    item = expand(builder, input_ids=[1], sampling_params=params, logprob_token_ids={5, 6})[0]
    assert (set(item.params.stop), set(item.params.stop_token_ids)) == ({"a", "b"}, {3, 4})
    assert set(item.logprobs.token_ids) == {5, 6}


@pytest.mark.parametrize("empty", [[], (), range(0), np.zeros((0, 5), np.int64), torch.zeros(0, 5, dtype=torch.int64)])
def test_no_prompts_at_all_are_refused_in_every_spelling(builder: RequestBuilder, empty: Any) -> None:
    with pytest.raises(RequestError, match="input_ids is empty"):
        expand(builder, input_ids=empty)


@pytest.mark.parametrize("name", [*SamplingParams.__struct_fields__, "sampling_seed"])
def test_a_sampling_parameter_as_an_argument_is_told_its_place(builder: RequestBuilder, name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not an argument of a request; it belongs in sampling_params$"):
        expand(builder, input_ids=[1], **{name: 1})


@pytest.mark.parametrize(("name", "meant"), [("max_tokens", "max_new_tokens"), ("temprature", "temperature")])
def test_so_is_one_by_another_name(builder: RequestBuilder, name: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not an argument of a request; {meant} of sampling_params is$"):
        expand(builder, input_ids=[1], **{name: 1})


@pytest.mark.parametrize("params", [SamplingParams(), {"max_new_tokens": 4}, [SamplingParams()], [{"n": 2}]])
@pytest.mark.parametrize("prompts", ["a", None])
def test_sampling_parameters_in_the_place_of_prompts_are_told_theirs(
    builder: RequestBuilder, params: Any, prompts: str | None
) -> None:
    for field, arguments in (
        ("input_ids", {"prompts": prompts, "input_ids": params}),
        ("prompts", {"prompts": params, "input_ids": None}),
    ):
        with pytest.raises(RequestError, match="as sampling_params") as refused:
            expand(builder, **arguments)
        assert refused.value.field == field


def test_chat_messages_in_the_place_of_prompts_are_not_taken_for_sampling_parameters(builder: RequestBuilder) -> None:
    with pytest.raises(RequestError, match="prompts must be a string or a list of strings"):
        expand(builder, prompts=[{"role": "user", "content": "a"}])
