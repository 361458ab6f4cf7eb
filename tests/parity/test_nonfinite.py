"""Weights that are not finite: kept out, or let in, and then a typed end for exactly the requests that they spoil."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from headrace import Engine, Generation, SamplingParams, serve
from headrace.types.errors import CheckpointError, HeadraceError, NonFiniteError, WeightUpdateError
from tests.parity.models import make_model, save_model
from tests.parity.test_device_path import SETTINGS, SIZES

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
BAD_TOKEN = 77
GOOD, BAD = [5, 6, 7, 8, 9], [5, 6, BAD_TOKEN, 8]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
Starter = Callable[..., Engine]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3", num_hidden_layers=1, **SIZES)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    started: list[Engine] = []

    def start_engine(path: Path = folder, **settings: Any) -> Engine:
        started.append(Engine(path, **{**SETTINGS, **settings}))
        return started[-1]

    yield start_engine
    for engine in started:
        engine.shutdown()


def spoiled(model: PreTrainedModel, name: str, value: float) -> dict[str, torch.Tensor]:
    """The model's weights; of the embedding the row of one token is not finite, of another tensor the first one."""
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors[name][BAD_TOKEN if name == EMBEDDING else 0] = value
    return tensors


def together(engine: Engine, calls: list[dict[str, Any]]) -> list[Generation | HeadraceError]:
    """What became of requests that ran at the same time."""
    found: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        try:
            (found[number],) = engine.generate(**{"sampling_params": GREEDY, **calls[number]})
        except HeadraceError as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "invariant": {"numerics": "invariant"},
    "reference": {"attention_backend": "reference"},
    "triton": {"attention_backend": "triton", "overlap_depth": 1},
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_whose_logits_are_not_finite_end_with_a_typed_error(
    start: Starter, model: PreTrainedModel, backend: str
) -> None:
    """Those beside them go on as if they had been alone, and after a good update everything is as before."""
    engine = start(check_finite=False, kv_pool_tokens=64, **BACKENDS[backend])
    (before,) = engine.generate(input_ids=GOOD, sampling_params=GREEDY)
    engine.update_weights_from_tensor(spoiled(model, EMBEDDING, float("nan")), "spoiled")
    calls = [{"input_ids": ids} for ids in (GOOD, BAD, GOOD, BAD)]
    found = together(engine, calls)
    for number in (1, 3):
        error = found[number]
        assert isinstance(error, NonFiniteError) and error.status == 500 and "NaN or infinite" in error.message
    for number in (0, 2):
        good = found[number]
        assert isinstance(good, Generation) and good.token_ids == before.token_ids
        assert good.logprobs == pytest.approx(before.logprobs, abs=1e-5)
    metrics = engine.metrics()
    assert (metrics["num_nonfinite"], metrics["num_failed"], metrics["num_running"]) == (2, 2, 0)
    worse = dict(model.state_dict()) | {EMBEDDING: torch.full_like(model.state_dict()[EMBEDDING], torch.nan)}
    engine.update_weights_from_tensor(worse, "worse")
    assert all(isinstance(each, NonFiniteError) for each in together(engine, calls))
    engine.update_weights_from_tensor(dict(model.state_dict()), "good")
    assert engine.metrics()["num_cached_pages"] == 0
    for each in together(engine, [{"input_ids": GOOD}] * 4):  # over pages that hold NaN still
        assert isinstance(each, Generation)
        assert (each.token_ids, each.version_spans) == (before.token_ids, [("good", 2)])
        assert each.logprobs == pytest.approx(before.logprobs, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9},
        {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {3: 5.0}},
        {"temperature": 0.0, "min_new_tokens": 4, "stop_token_ids": (9,)},
        {"n": 3},
        {"max_new_tokens": 0},
    ],
    ids=lambda params: " ".join(params),
)
def test_every_way_to_ask_ends_alike(
    start: Starter, model: PreTrainedModel, params: dict[str, Any], value: float
) -> None:
    engine = start(check_finite=False)
    engine.update_weights_from_tensor(spoiled(model, NORM, value), "spoiled")
    sampling = SamplingParams(**{"max_new_tokens": 4, "ignore_eos": True, **params})
    for mode in ("raw", "temperature", "sampled"):
        for more in ({}, {"top_logprobs": 3}, {"return_prompt_logprobs": True, "prompt_logprob_mode": mode}):
            options: dict[str, Any] = {"logprob_mode": mode, **more}
            if sampling.max_new_tokens == 0 and "return_prompt_logprobs" not in more:
                continue
            with pytest.raises(NonFiniteError):
                engine.generate(input_ids=GOOD, sampling_params=sampling, **options)
    with pytest.raises(NonFiniteError):
        engine.score(input_ids=GOOD)
    if sampling.max_new_tokens:
        with pytest.raises(NonFiniteError):
            list(engine.stream(input_ids=GOOD, sampling_params=sampling))
    assert engine.metrics()["num_nonfinite"] > 0


def test_weights_that_are_not_finite_do_not_get_in(
    start: Starter, model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    engine = start()
    before = engine.digest()
    bad = spoiled(model, NORM, float("nan"))
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(load_file(folder / "model.safetensors") | {NORM: bad[NORM]}, tmp_path / "model.safetensors")
    for update in (
        lambda: engine.update_weights_from_tensor(bad, "bad"),
        lambda: engine.update_weights_from_tensor({NORM: bad[NORM]}, "bad", partial=True),
        lambda: engine.update_weights_from_disk(tmp_path, "bad"),
    ):
        with pytest.raises(WeightUpdateError, match=NORM) as caught:
            update()
        assert caught.value.field == NORM
    assert engine.digest() == before and engine.version == "default" and engine.is_ready
    with pytest.raises(CheckpointError, match=NORM):
        start(tmp_path)
    with pytest.raises(NonFiniteError):
        start(tmp_path, check_finite=False).generate(input_ids=GOOD, sampling_params=GREEDY)


def test_over_http_it_is_a_500_that_says_so(start: Starter, model: PreTrainedModel) -> None:
    engine = start(check_finite=False)
    engine.update_weights_from_tensor(spoiled(model, EMBEDDING, float("nan")), "spoiled")
    handle = serve(engine)
    try:
        with httpx.Client(base_url=handle.url, timeout=60) as client:
            body = {"input_ids": BAD, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
            reply = client.post("/generate", json={**body, "return_logprob": True})
            assert reply.status_code == 500 and "NaN or infinite" in reply.json()["message"]
            streamed = client.post("/generate", json={**body, "stream": True}).text
            assert "NaN or infinite" in streamed and "null" not in streamed.split("NaN or infinite")[0]
            reply = client.post("/v1/completions", json={"model": "default", "prompt": BAD, "max_tokens": 3})
            assert reply.status_code == 500 and "NaN or infinite" in reply.json()["error"]["message"]
            assert client.post("/generate", json={**body, "input_ids": GOOD}).status_code == 200
            assert "num_nonfinite" in client.get("/metrics").text
    finally:
        handle.stop()
