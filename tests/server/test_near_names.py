"""A name that is none of ours, at every door: the one that was meant is told, whoever's it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headrace import Client, Engine, HeadraceError, SamplingParams
from headrace.cli.main import main
from tests.server.conftest import Served

IDS = [5, 6, 7]
Door = Callable[..., Any]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with Client(served.url) as opened:
        yield opened


PYTHON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parameter": (lambda door: door.generate(input_ids=IDS, sampling_params={"max_tokens": 4}), "max_new_tokens is"),
    "of many": (lambda door: door.generate(input_ids=[IDS], sampling_params=[{"temprature": 1}]), "temperature is"),
    "keyword": (lambda door: door.generate(input_ids=IDS, max_tokens=4), "max_new_tokens of sampling_params is"),
    "ours, elsewhere": (lambda door: door.generate(input_ids=IDS, top_p=0.5), "it belongs in sampling_params"),
    "option": (lambda door: door.score(input_ids=IDS, top_logprob=2), "top_logprobs is"),
    "theirs": (lambda door: door.score(input_ids=IDS, token_ids_logprob=[1]), "logprob_token_ids is"),
    "theirs too": (lambda door: door.score(input_ids=IDS, top_logprobs_num=1), "top_logprobs is"),
    "unasked": (
        lambda door: door.generate(input_ids=IDS, return_logprob=True),
        "every sample has the logprobs of its tokens, unasked",
    ),
    "unasked too": (
        lambda door: list(door.stream(input_ids=IDS, logprobs=1)),
        "every sample has the logprobs of its tokens, unasked",
    ),
    "an argument": (lambda door: door.generate(input_ids=IDS, prompt_token_ids=[IDS]), "input_ids is"),
    "the argument itself": (lambda door: door.generate(input_ids=IDS, promts=["a"]), "prompts is"),
    "stream": (lambda door: list(door.stream(input_ids=IDS, return_error=True)), "return_errors is"),
    "chat": (lambda door: door.chat([{"role": "user", "content": "a"}], {"max_tokens": 2}), "max_new_tokens is"),
}


@pytest.mark.parametrize("case", PYTHON)
def test_engines_and_clients(case: str, served: Served, client: Client) -> None:
    call, meant = PYTHON[case]
    for door in (served.engine, client):
        with pytest.raises(HeadraceError) as caught:
            call(door)
        assert caught.value.message.endswith(f"; {meant}")


@pytest.mark.parametrize(
    "call",
    [
        lambda: SamplingParams(allowed_token_ids=[4]),  # type: ignore[call-arg]
        lambda: SamplingParams.from_dict({"length_penalty": 1.5}),
        lambda: Engine("m", dp_size=2),
        lambda: Engine("m", sampling_backend="flashinfer"),
    ],
)
def test_what_there_is_not_is_not_taken_for_what_is_spelled_like_it(call: Callable[[], Any]) -> None:
    with pytest.raises(HeadraceError) as caught:
        call()
    assert "is not" in caught.value.message and caught.value.message.partition(";")[2] == ""


@pytest.mark.parametrize("name", ["return_entropy", "lora_request", "return_prompt_token_ids"])
def test_nor_is_an_option(name: str, served: Served) -> None:
    unknown: dict[str, Any] = {name: True}
    with pytest.raises(HeadraceError) as caught:
        served.engine.generate(input_ids=IDS, **unknown)
    assert caught.value.message == f"{name} is not an argument of a request"


SETTINGS: dict[str, Callable[[], Any]] = {
    "tp_size": lambda: Engine("m", tp=2),
    "context_length": lambda: Engine("m", max_model_len=5),
    "memory_fraction": lambda: Engine("m", gpu_memory_utilization=0.5),
    "cuda_graphs=False": lambda: Engine("m", enforce_eager=True),
    "max_new_tokens": lambda: SamplingParams(max_tokens=4),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("meant", SETTINGS)
def test_settings(meant: str) -> None:
    with pytest.raises(HeadraceError, match=f"; {meant} is$"):
        SETTINGS[meant]()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("serve m --tp 2", "--tp-size"),
        ("serve m --max-model-len 5", "--context-length"),
        ("generate m hi --max-tokens 4", "--max-new-tokens"),
        ("serve m --dp 2", "--dp-size"),
        ("serve m --enforce-eager", "--no-cuda-graphs"),
        ("serve --model-path m", "MODEL"),
        ("check m --mem-fraction-static 0.5", "--memory-fraction"),
        ("router --polcy x", "--policy"),
        ("demo --step 3", "--steps"),
    ],
)
def test_flags(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2 and f"(did you mean {meant}?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/generate", {"input_ids": IDS, "max_new_tokens": 2}, "; it belongs in sampling_params"),
        ("/generate", {"input_ids": IDS, "return_logprobs": True}, "; return_logprob is"),
        ("/v1/completions", {"prompt": IDS, "max_new_tokens": 2, "max_tokens": 1}, "; max_tokens is"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "toolz": 1}, "; tools is"),
        ("/v1/completions", {"prompt": IDS, "max_tokens": 1, "xyzzy": 1}, "'xyzzy' is not known and was ignored"),
    ],
)
def test_bodies(path: str, body: dict[str, Any], said: str, served: Served) -> None:
    """A key that nobody knows is ignored, as the dialects do, and told."""
    reply = served.http.post(path, json=body)
    assert reply.status_code == 200
    told = reply.json()["meta_info"]["warnings"][0] if path == "/generate" else reply.headers["x-headrace-warnings"]
    assert told.endswith(said)


def test_sampling_parameters_of_a_body(served: Served) -> None:
    reply = served.http.post("/generate", json={"input_ids": IDS, "sampling_params": {"max_tokens": 4}})
    assert reply.status_code == 400 and reply.json()["message"].endswith("; max_new_tokens is")
