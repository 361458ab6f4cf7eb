"""One surface, whatever is in between: the same scenario through `Engine`, `Client` and `Runtime`, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headrace
from headrace import AsyncClient, Client, Engine, Generation, HeadraceError, Runtime, SamplingParams, serve
from tests.client.conftest import CONFIG

IDS = [[1 + (7 * position) % 200 for position in range(30)], [5, 6, 7, 8]]
DRAWN: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "seed": 11, "ignore_eos": True}


@contextlib.contextmanager
def over_client(folder: Path, **client: Any) -> Iterator[Client]:
    with Engine(folder, inprocess=True, **CONFIG) as engine, Client(serve(engine).url, **client) as opened:
        yield opened


OPENERS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "engine": lambda folder: Engine(folder, inprocess=True, **CONFIG),
    "client": over_client,
    "client that sends bytes": lambda folder: over_client(folder, shares_memory=False),
    "runtime": lambda folder: Runtime(folder, **CONFIG),
}


def error_of(call: Callable[[], Any]) -> tuple[str, str, str, bool]:
    with pytest.raises(HeadraceError) as caught:
        call()
    error = caught.value
    return type(error).__name__, error.field, error.message, error.retryable


def wrong_calls(door: Any) -> list[Any]:
    """Every kind of refusal, as the caller sees it."""
    session = headrace.UpdateSession(99, "x", "shadow", (), 60.0)
    return [
        error_of(lambda: door.generate(input_ids=[1, 10**6])),
        error_of(lambda: door.generate(input_ids=[[1], [1, 2.5]])),
        error_of(lambda: door.generate(input_ids={1, 2})),
        error_of(lambda: door.generate("a", [1])),
        error_of(lambda: door.generate(["a", 7])),
        error_of(lambda: door.generate(["a", "\ud800"])),
        error_of(lambda: door.generate("b\ud800")),
        error_of(lambda: door.generate(input_ids=[1], sampling_params={"top_p": 2.0})),
        error_of(lambda: door.generate(input_ids=[1], sampling_params={"temperature": math.nan})),
        error_of(lambda: door.generate(input_ids=[1], sampling_params={"max_new_tokens": 10**6})),
        error_of(lambda: door.generate(input_ids=[1], top_logprobs=-1)),
        error_of(lambda: door.generate(input_ids=[1], priority=math.inf))[:2],  # JSON has only words for it
        error_of(lambda: door.generate(input_ids=[1], max_new_tokens=4)),
        error_of(lambda: list(door.stream(input_ids=[1], extra_key=5))),
        error_of(lambda: door.abort()),
        error_of(lambda: door.pause("sideways")),
        error_of(lambda: door.pause(timeout=-1)),
        error_of(lambda: door.begin_update("v", [("model.norm.weight", (3,), "float32")])),
        error_of(lambda: door.begin_update("v", [("model.norm.weight", (32,), "float32")], timeout=0)),
        error_of(lambda: door.begin_update("", [])),
        error_of(lambda: door.weights_checker("dance")),
        error_of(lambda: door.release_memory_occupation(["nothing"])),
        error_of(lambda: door.release_memory_occupation(in_flight="keep")),
        error_of(lambda: door.resume_memory_occupation(restore="nowhere")),
        error_of(lambda: door.init_weights_update_group("", 1, 1, 2)),
        error_of(lambda: door.init_weights_update_group("127.0.0.1", 1, 0, 2, backend="gloo")),
        error_of(lambda: door.destroy_weights_update_group("nobody's")),
        error_of(lambda: door.update_weights_from_distributed(["a"], ["float32"], [[1]], "nobody's")),
        error_of(lambda: door.get_weights_by_name("nobody")),
        error_of(lambda: door.slow_down(-1)),
        error_of(lambda: door.start_profile(activities=["MEM"])),
        error_of(lambda: door.start_profile(num_steps=0)),
        error_of(lambda: door.start_profile(profile_id="../x")),
        error_of(lambda: door.stop_profile()),
        error_of(lambda: door.collective_rpc("generate")),
        error_of(lambda: door.collective_rpc("flush_cache", args=[1])),
        error_of(lambda: door.collective_rpc("weights_checker", kwargs={"action": "dance"})),
        error_of(lambda: door.set_weight_version("x" * 2000)),
        error_of(lambda: door.commit(session))[:2],  # a server says that it is its own
        *unlisted_calls(door),
    ]


def unlisted_calls(door: Any) -> list[Any]:
    """What is refused in a session without a manifest, which goes on."""
    session = door.begin_update("x", None, mode="shadow")
    norm = {"model.norm.weight": torch.ones(32)}
    found: list[Any] = [error_of(lambda: door.stage(session, {**norm, "nobody": torch.ones(3)}))]
    door.stage(session, norm)
    found += [error_of(lambda: door.stage(session, norm)), error_of(lambda: door.commit(session))[:2]]
    door.abort_update(session)
    return found


def scenario(door: Any, folder: Path) -> list[Any]:
    """All that a trainer does, once."""
    old, new = (load_file(each / "model.safetensors") for each in (folder, folder / "newer"))
    seen: list[Any] = [door.digest()]
    seen += door.generate(
        input_ids=IDS,
        sampling_params=[SamplingParams(n=2, **DRAWN), {**DRAWN, "logit_bias": {7: -100.0}, "stop_token_ids": [3]}],
        request_id="first",
        top_logprobs=3,
        logprob_token_ids=[5, 7],
        return_prompt_logprobs=True,
        logprob_start=2,
        logprob_mode="sampled",
    )
    seen += door.generate(
        ["Up", "Down"], sampling_params={**DRAWN, "top_k": 4}, request_id=["a", "b"], return_kept_token_ids=True
    )
    seen += door.generate(input_ids=torch.tensor(IDS[1]), sampling_params=DRAWN, request_id="tensor")
    seen += door.generate(input_ids=[*IDS, [10**6]], request_id="r", sampling_params=DRAWN, return_errors=True)
    refused: Any = [{"temperature": math.nan}, DRAWN]  # JSON has no such number
    samples = door.generate(input_ids=IDS, sampling_params=refused, request_id="nan", return_errors=True)
    half = "half of a pair: \ud800"  # nor such a text
    samples += door.generate(["a", half], sampling_params=DRAWN, request_id="half", return_errors=True)
    seen += [(sample.error and sample.error.field, sample.token_ids) for sample in samples]
    seen += door.score(input_ids=np.array(IDS[:1]), request_id="score", top_logprobs=2)
    pieces = list(door.stream(input_ids=IDS, sampling_params=SamplingParams(n=2, **DRAWN), request_id="stream"))
    seen += [whole(pieces, index) for index in ((0, 0), (0, 1), (1, 0), (1, 1))]
    with pytest.raises(headrace.WeightUpdateError, match="announced"):
        session = door.begin_update(1, [(name, tensor.shape, "float32") for name, tensor in old.items()])
        door.stage(session, {"model.norm.weight": torch.zeros(3)})
    door.abort_update(session)
    for version, weights in (("b", new), ("a", old)):
        report = door.update_weights_from_tensor(weights, version, mode="shadow", in_flight="keep")
        seen.append(msgspec.structs.replace(report, pause_ms=0.0))
        seen += [door.digest(), door.generate(input_ids=IDS, sampling_params=DRAWN, request_id=version)]
    assert seen[0] == seen[-2] != seen[-5], "weights A, then B, then A again"
    session = door.begin_update("listed by stage", None, mode="shadow")
    for part in (list(new.items())[:3], iter(list(new.items())[3:])):
        door.stage(session, part)
    seen += [msgspec.structs.replace(door.commit(session), pause_ms=0.0), session.dtype, door.digest() == seen[-5]]
    report = door.update_weights_from_disk(folder / "newer", "disk")
    seen.append(msgspec.structs.replace(report, pause_ms=0.0))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(door.get_weights_by_name(name), new[name])
    seen += in_buckets(door, list(old.items()))
    door.pause("keep", timeout=30)
    assert door.status().paused == "keep"
    door.resume()
    door.release_memory_occupation(["kv_cache"], timeout=60)
    door.release_memory_occupation(["kv_cache"])
    door.resume_memory_occupation()
    seen += door.generate(input_ids=IDS, sampling_params=DRAWN, request_id="resumed")
    door.set_weight_version("label")
    seen += [
        door.weights_checker("snapshot"),
        door.weights_checker("compare"),
        door.abort("nobody"),
        door.flush_cache(),
    ]
    assert door.slow_down(0.001) is None and door.slow_down() is None and door.freeze_gc() is None
    seen += [door.collective_rpc("digest"), door.collective_rpc("abort", 30.0, ("nobody",), {"prefix": True})]
    door.generate(input_ids=IDS[0], sampling_params=DRAWN, request_id="worth")
    seen += [
        door.give_rewards({"worth": 1.5, "nobody": [1, None]}),
        error_of(lambda: door.give_rewards({"worth": "a lot"})),
    ]
    status = door.status()
    seen += [status.version, status.epoch, status.state, door.metrics()["num_generated_tokens"]]
    return [*seen, *wrong_calls(door)]


def in_buckets(door: Any, tensors: list[tuple[str, torch.Tensor]]) -> list[Any]:
    """An update without begin and commit: one that an error ends, and one in which a tensor comes again."""
    (first, again), rest = tensors[:2], tensors[1:]
    assert door.update_weights_from_bucket(tensors[:9], "never") is None
    seen: list[Any] = [error_of(lambda: door.update_weights_from_bucket([("nobody", torch.ones(3))]))]
    seen.append(error_of(lambda: door.update_weights_from_bucket([first, first])))
    seen.append(error_of(lambda: door.update_weights_from_bucket(tensors, mode="sideways")))
    assert door.update_weights_from_bucket([first, (again[0], torch.zeros_like(again[1]))]) is None
    seen.append(error_of(door.resume)[:2])  # the message has the number of the session
    assert door.update_weights_from_bucket([]) is None
    report = door.update_weights_from_bucket(rest, "in buckets")
    seen += [msgspec.structs.replace(report, pause_ms=0.0), door.digest()]
    return seen


def whole(pieces: list[Generation], sample: tuple[int, int]) -> Generation:
    """The pieces of one sample put together; the spans of a version too."""
    ours = [piece for piece in pieces if (piece.prompt_index, piece.index) == sample]
    assert [piece.finish_reason for piece in ours[:-1]] == [None] * (len(ours) - 1)
    spans = [span for piece in ours for span in piece.version_spans]
    return msgspec.structs.replace(
        ours[-1],
        token_ids=[token for piece in ours for token in piece.token_ids],
        logprobs=[value for piece in ours for value in piece.logprobs],
        text="".join(piece.text for piece in ours),
        version_spans=[(spans[0][0], sum(count for _, count in spans))],
        version_epochs=sorted({epoch for piece in ours for epoch in piece.version_epochs}),
        num_cached_tokens=0,
    )


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[Any]:
    with OPENERS["engine"](model_folder) as door:
        return scenario(door, model_folder)


@pytest.mark.parametrize("kind", [kind for kind in OPENERS if kind != "engine"])
def test_every_door_does_the_same(kind: str, model_folder: Path, expected: list[Any]) -> None:
    with OPENERS[kind](model_folder) as door:
        found = scenario(door, model_folder)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs


def test_an_infinite_logprob_arrives_as_one(model_folder: Path) -> None:
    options: dict[str, Any] = {"logprob_token_ids": list(range(400)), "logprob_mode": "sampled", "request_id": "x"}
    params = {**DRAWN, "top_k": 2}
    with OPENERS["engine"](model_folder) as door, Client(serve(door).url) as client:
        (ours,), (theirs,) = (
            each.generate(input_ids=[1, 2], sampling_params=params, **options) for each in (client, door)
        )
    assert ours.token_ids_logprobs == theirs.token_ids_logprobs
    assert any(math.isinf(value) for row in ours.token_ids_logprobs for value in row.values())


def test_a_body_that_asks_for_too_many_logprobs_is_refused(model_folder: Path) -> None:
    """Of one prompt they are few enough; of all that an answer would hold they are not."""
    with OPENERS["engine"](model_folder) as door, Client(serve(door).url) as client:
        client.generate(input_ids=[[1]] * 2, sampling_params={"max_new_tokens": 2}, top_logprobs=300)
        with pytest.raises(headrace.RequestError) as caught:
            client.generate(input_ids=[[1]] * 200, sampling_params={"max_new_tokens": 500}, top_logprobs=300)
    assert caught.value.field == "top_logprobs"


def test_the_async_client_is_the_same_surface(model_folder: Path, expected: list[Any]) -> None:
    async def talk(url: str) -> None:
        async with AsyncClient(url) as client:
            samples = await client.generate(
                ["Up", "Down"], sampling_params={**DRAWN, "top_k": 4}, request_id=["a", "b"]
            )
            texts = [""] * 2
            async for piece in client.stream(["Up", "Down"], sampling_params={**DRAWN, "top_k": 4}):
                texts[piece.prompt_index] += piece.text
            assert texts == [sample.text for sample in samples]
            weights = load_file(model_folder / "newer" / "model.safetensors")
            report, more = await asyncio.gather(
                client.update_weights_from_tensor(weights, "b", mode="shadow", in_flight="keep"),
                client.generate(input_ids=IDS, sampling_params=DRAWN),
            )
            assert report.version == "b" and len(more) == 2
            assert await client.health() and (await client.status()).version == "b"

    with OPENERS["engine"](model_folder) as door:
        asyncio.run(talk(serve(door).url))


def parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())[1:]


def test_methods_take_what_the_engine_s_take() -> None:
    """But for what only one of them has: a client has health, an address and another dialect, an engine its parts."""
    own = {"url", "close", "health", "asynchronous", "generate_native", "group_address"}
    for name in {name for name in vars(Client) if not name.startswith("_")} - own:
        expected = [each for each in parameters(getattr(Engine, name)) if each.name != "root"]
        assert parameters(getattr(Client, name)) == expected, name
        names = [each.name for each in parameters(getattr(AsyncClient, name))]
        assert names == [each.name for each in expected], name
    missing = {name for name in vars(Engine) if not name.startswith("_")} - set(vars(Client)) - own
    assert missing == {"config", "resolved", "tokenizer", "version", "is_alive", "is_ready", "is_responsive"} | {
        *("wait_ended", "shutdown", "is_leading")
    }
