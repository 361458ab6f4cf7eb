"""What a model's folder recommends to sample with, at every door: asked for, and not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import CheckpointError, Client, Engine, SamplingParams
from tests.server.builders import SETTINGS
from tests.server.conftest import Served

RECOMMENDED = {"temperature": 0.0, "top_k": 20, "max_new_tokens": 3, "do_sample": True, "top_p": None}
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = shutil.copytree(model_folder, tmp_path_factory.mktemp("recommends") / "model")
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return folder


@pytest.fixture(scope="module")
def recommending(folder: Path) -> Iterator[Served]:
    with Engine(folder, inprocess=True, sampling_defaults="model", **SETTINGS) as engine:
        served = Served(engine)
        yield served
        served.close()


def of_engine(door: Any, seed: int, **more: Any) -> Any:
    params = {"max_new_tokens": 12, "ignore_eos": True, "seed": seed, **more}
    return door.generate(input_ids=IDS, sampling_params=params)[0].token_ids


def of_chat(door: Any, seed: int, **more: Any) -> Any:
    params = {"max_new_tokens": 12, "ignore_eos": True, "seed": seed, **more}
    return door.chat([{"role": "user", "content": "a"}], params)[0].sample.token_ids


def of_route(served: Served, path: str, prompt: dict[str, Any], seed: int, **more: Any) -> Any:
    params = {"max_tokens": 12, "ignore_eos": True, "seed": seed, **more}
    nested = path in ("/generate", "/inference/v1/generate")
    if path == "/generate":
        params["max_new_tokens"] = params.pop("max_tokens")
    body = {**prompt, **({"sampling_params": params} if nested else {**params, "return_token_ids": True})}
    reply = served.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    return answer["output_ids"] if path == "/generate" else answer["choices"][0]["token_ids"]


ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"input_ids": IDS},
    "/v1/completions": {"prompt": IDS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/inference/v1/generate": {"token_ids": IDS},
}


def doors(served: Served, client: Client) -> dict[str, Callable[..., Any]]:
    """How to ask for a sample with a seed, and further parameters, at each door."""
    found: dict[str, Callable[..., Any]] = {}
    for name, door in (("engine", served.engine), ("client", client)):
        found[name] = lambda seed, door=door, **more: of_engine(door, seed, **more)
        found[f"{name}'s chat"] = lambda seed, door=door, **more: of_chat(door, seed, **more)
    for path, prompt in ROUTES.items():
        found[path] = lambda seed, path=path, prompt=prompt, **more: of_route(served, path, prompt, seed, **more)
    return found


def test_every_door_takes_them(recommending: Served) -> None:
    """Greedy as the folder says: seeds draw nothing. What a request gives wins, and so does a `SamplingParams`."""
    assert recommending.engine.resolved.sampling_defaults == {"temperature": 0.0, "top_k": 20}
    with Client(recommending.url) as client:
        for name, ask in doors(recommending, client).items():
            assert ask(1) == ask(2), name
            assert ask(1, temperature=1.5) != ask(2, temperature=1.5), name
        for door in (recommending.engine, client):
            assert len(door.generate(input_ids=IDS)[0].token_ids) > 3, "lengths are not taken"
            given = [SamplingParams(max_new_tokens=12, ignore_eos=True, seed=seed) for seed in (1, 2)]
            first, second = door.generate(input_ids=[IDS, IDS], sampling_params=given)
            assert first.token_ids != second.token_ids


def test_nobody_takes_them_unasked(served: Served) -> None:
    assert served.engine.resolved.sampling_defaults == {}
    assert of_engine(served.engine, 1) != of_engine(served.engine, 2)


def test_it_is_explained(recommending: Served) -> None:
    (found,) = [each for each in recommending.engine.resolved.explanations if each[0] == "sampling_defaults"]
    assert found[1:] == ("{'temperature': 0.0, 'top_k': 20}", "what generation_config.json recommends")


def test_a_value_that_no_request_may_have(folder: Path, tmp_path: Path) -> None:
    bad: Path = shutil.copytree(folder, tmp_path / "bad")
    (bad / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with pytest.raises(CheckpointError, match=r"generation_config.json.top_p must be in \(0, 1\]"):
        Engine(bad, inprocess=True, sampling_defaults="model", **SETTINGS)
    with Engine(bad, inprocess=True, **SETTINGS) as engine:
        assert engine.is_alive, "who does not ask for it does not read it"
