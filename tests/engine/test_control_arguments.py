"""What control calls are given: refused by name, before anything happens, in a typed error that is a 400."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from headrace import Engine, SamplingParams, serve
from headrace.config import EngineConfig
from headrace.text import Tokenizer
from headrace.text.chat import normalize_messages, tool_names
from headrace.types.errors import ConfigError, HeadraceError, RequestError
from headrace.types.plain_values import as_path
from headrace.types.weights import TensorInfo
from tests.engine.builders import SETTINGS

TENSOR = [("model.norm.weight", torch.ones(32))]


def push(engine: Engine, **arguments: Any) -> Any:
    return engine.update_weights_from_tensor(TENSOR, **{"version": "x", "partial": True, **arguments})


def begin(engine: Engine, **arguments: Any) -> Any:
    manifest = [("model.norm.weight", (32,), "float32")]
    return engine.begin_update(**{"version": "x", "manifest": manifest, "partial": True, **arguments})


def from_disk(engine: Engine, **arguments: Any) -> Any:
    return engine.update_weights_from_disk(**{"path": ".", "version": "x", **arguments})


BAD_SECONDS: list[Any] = ["5", True, math.nan, math.inf, -1, 0, 1e300, [5], 10**400]
CALLS: list[tuple[Callable[..., Any], str, list[Any]]] = [
    *[(call, "timeout", BAD_SECONDS) for call in (push, begin, from_disk, Engine.status, Engine.pause)],
    *[(call, "partial", ["yes", 1, None, np.array([True])]) for call in (push, begin)],
    *[
        (call, name, ["shadw", 5, ["auto"], None])
        for call in (push, begin, from_disk)
        for name in ("mode", "in_flight")
    ],
    *[(call, "version", ["", None, 1.5, True, "\ud800", "v" * 2000, b"v"]) for call in (push, begin, from_disk)],
    *[
        (call, "session", ["id", 5, [], torch.tensor(1)])
        for call in (Engine.commit, Engine.abort_update, lambda engine, session: engine.stage(session, []))
    ],
    (Engine.commit, "session", [None]),
    (begin, "manifest", [5, "names", {"a": 1}, np.array(2), [5], [("a", torch.empty((), device="meta"), "b")]]),
    (
        lambda engine, named_tensors: engine.update_weights_from_tensor(named_tensors, "x"),
        "named_tensors",
        [None, 5, torch.tensor(1.0), torch.ones(2), np.array(1.0)],
    ),
    (Engine.pause, "mode", ["drian", 5, None, ["abort"]]),
    (Engine.release_memory_occupation, "tags", ["weights", 5, {"weights": 1}, [None], ["kv"], ["\ud800"]]),
    (Engine.release_memory_occupation, "in_flight", ["keep", 5, None]),
    (Engine.resume_memory_occupation, "restore", ["host", 5, None]),
    (Engine.set_weight_version, "version", ["", None, 1.5, True, "\ud800"]),
    (Engine.weights_checker, "action", [5, None, "\ud800"]),
    (Engine.get_weights_by_name, "name", [5, None, "\ud800"]),
    (lambda engine, **rest: engine.abort("nobody", **rest), "prefix", ["yes", 1, None]),
    (Engine.abort, "all", ["yes", 1, None]),
    (lambda engine, **rest: engine.abort("nobody", **rest), "message", [5, None, "\ud800"]),
]


@pytest.mark.parametrize(("call", "field", "values"), CALLS, ids=[f"{i}-{call[1]}" for i, call in enumerate(CALLS)])
def test_a_bad_argument_is_refused_by_name(
    engine: Engine, call: Callable[..., Any], field: str, values: list[Any]
) -> None:
    before = engine.status()
    for value in values:
        with pytest.raises(HeadraceError) as caught:
            call(engine, **{field: value})
        assert (caught.value.field, caught.value.status) == (field, 400), value
    after = engine.status()
    assert (after.version, after.state, after.paused) == (before.version, before.state, before.paused)
    assert engine.is_ready


@pytest.mark.parametrize("value", ["", None, 1.5, "v" * 2000])
def test_what_is_no_version_is_told_what_one_is(engine: Engine, value: Any) -> None:
    with pytest.raises(HeadraceError, match="version must be text of 1 to 1024 characters, or an integer"):
        engine.set_weight_version(value)


def test_plain_values_of_numpy_and_torch_are_taken(engine: Engine) -> None:
    thirty: Any = np.float32(30)
    yes: Any = np.bool_(True)
    assert engine.status(thirty).state == "ready"
    session = begin(engine, version=np.int64(7), timeout=torch.tensor(60), partial=yes)
    engine.abort_update(session)
    assert engine.abort("nobody", prefix=yes) == 0
    settings: dict[str, Any] = {"page_size": np.int64(8), "memory_fraction": np.float32(0.5), "prefix_cache": yes}
    config = EngineConfig(model="x", **settings)
    assert (type(config.page_size), type(config.memory_fraction), config.prefix_cache) == (int, float, True)


class Word(str, enum.Enum):  # noqa: UP042  (`str()` of a `StrEnum` would be its value)
    LABEL = "v7"
    NAME = "model.norm.weight"
    DTYPE = "float32"
    USER = "user"
    SNAPSHOT = "snapshot"
    SHADOW = "shadow"
    KEEP = "keep"
    RAW = "raw"


def text_of_enum(text: str) -> Any:
    known = {word.value: word for word in Word}
    return known.get(text) or enum.Enum("Other", {"OTHER": text}, type=str).OTHER  # type: ignore[attr-defined]


def pause_and_resume(engine: Engine, text: Callable[[str], Any]) -> None:
    engine.pause(text("keep"))
    engine.resume()


TEXT_CALLS: dict[str, Callable[[Engine, Callable[[str], Any]], object]] = {
    "relabel": lambda engine, text: engine.set_weight_version(text("v7")),
    "get_weights_by_name": lambda engine, text: engine.get_weights_by_name(text("model.norm.weight")),
    "tags": lambda engine, text: engine.resume_memory_occupation([text("weights")], restore=text("disk")),
    "weights_checker": lambda engine, text: engine.weights_checker(text("snapshot")),
    "version": lambda engine, text: push(engine, version=text("v7")),
    "modes": lambda engine, text: push(engine, mode=text("shadow"), in_flight=text("keep")),
    "begin": lambda engine, text: engine.abort_update(
        begin(engine, version=text("v7"), mode=text("shadow"), in_flight=text("keep"))
    ),
    "manifest": lambda engine, text: engine.abort_update(
        begin(engine, manifest=[TensorInfo(text("model.norm.weight"), (32,), text("float32"), text("0" * 64))])
    ),
    "manifest of triples": lambda engine, text: engine.abort_update(
        begin(engine, manifest=[(text("model.norm.weight"), (32,), text("float32"))])
    ),
    "tensors": lambda engine, text: engine.update_weights_from_tensor(
        [(text("model.norm.weight"), TENSOR[0][1])], "x", partial=True
    ),
    "disk": lambda engine, text: engine.update_weights_from_disk(
        text(engine.config.model), text("v7"), mode=text("shadow"), in_flight=text("keep"), root=text("/")
    ),
    "pause": pause_and_resume,
    "abort": lambda engine, text: engine.abort(text("v7"), message=text("v7")),
    "request": lambda engine, text: engine.generate(
        input_ids=[1, 2],
        sampling_params={"max_new_tokens": 2},
        request_id=text("v7"),
        extra_key=text("v7"),
        logprob_mode=text("raw"),
        prompt_logprob_mode=text("raw"),
    ),
    "requests": lambda engine, text: engine.generate(
        input_ids=[[1, 2], [3]], sampling_params={"max_new_tokens": 2}, request_id=[text("v7"), text("raw")]
    ),
}


@pytest.fixture(scope="module")
def changed(model_folder: Path) -> Iterator[Engine]:
    """An engine whose weights and labels these tests may change."""
    with Engine(model_folder, inprocess=True, **SETTINGS) as own:
        yield own


@pytest.mark.parametrize("text", [np.str_, text_of_enum])
@pytest.mark.parametrize("call", TEXT_CALLS)
def test_text_of_numpy_or_of_an_enumeration_is_the_text_in_it(
    changed: Engine, call: str, text: Callable[[str], Any]
) -> None:
    TEXT_CALLS[call](changed, text)
    assert type(changed.version) is str
    if call in ("relabel", "version", "disk"):
        assert changed.version == "v7"


@pytest.mark.parametrize("text", [np.str_, text_of_enum])
def test_text_of_an_enumeration_is_the_text_in_it_where_no_engine_is_asked(
    model_folder: Path, text: Callable[[str], Any]
) -> None:
    assert SamplingParams(stop=text("raw")).stop == SamplingParams(stop=[text("raw")]).stop == ("raw",)
    setting = EngineConfig(model=text("raw")).model
    paths = [str(as_path(text("/raw"), "field", ConfigError)), str(as_path(text("~/raw"), "field", ConfigError))]
    said = {"role": text("user"), "content": text("raw")}
    parts = {"role": "user", "content": [{"type": text("text"), "text": text("raw")}]}
    messages = normalize_messages([said, parts])
    (name,) = tool_names([{"type": "function", "function": {"name": text("raw")}}])
    assert messages == [{"role": "user", "content": "raw"}] * 2
    assert (setting, name, *paths) == ("raw", "raw", "/raw", str(Path.home() / "raw"))
    found = [setting, name, *SamplingParams(stop=text("raw")).stop, *messages[0].values(), *messages[1].values()]
    assert set(map(type, found)) == {str}
    assert Tokenizer.load(text(str(model_folder))).eos_token_ids == Tokenizer.load(model_folder).eos_token_ids


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        *[({"port": port}, "port") for port in ("30000", None, 1.5, True, -1, 65536, torch.empty((), device="meta"))],
        *[({"host": host}, "host") for host in (None, 5, b"x", ["127.0.0.1"], "a\0b", "\ud800", "x" * 70 + ".org")],
        *[({name: "\ud800"}, name) for name in ("insecure", "max_body_bytes", "api_key", "allowed_hosts")],
        ({"api_key_file": "a\0b"}, "api_key_file"),
        ({"max_body_bytes": torch.empty((), device="meta")}, "max_body_bytes"),
        ({"weight_roots": [5]}, "weight_roots"),
        ({"insecur": True}, "insecur"),
    ],
)
def test_a_bad_argument_of_serve_is_refused_by_name(engine: Engine, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(engine, **settings)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("executor", ["local ", None, 5, np.array([1, 2])]),
        ("inprocess", ["yes", None, np.array([1, 2])]),
        ("model", [None, 5, b"x", np.array([1, 2])]),
    ],
)
def test_how_an_engine_is_to_run_is_checked_by_name(model_folder: Path, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            Engine(**{"model": model_folder, name: value})
        assert caught.value.field == name


def test_a_tensor_without_a_value_is_no_number(engine: Engine) -> None:
    nothing: Any = torch.empty((), device="meta")
    for name in ("top_logprobs", "priority", "logprob_start", "return_errors", "num_output_ids_in_prompt"):
        with pytest.raises(RequestError) as caught:
            engine.generate("a", **{name: nothing})
        assert caught.value.field == name
    for name in ("max_new_tokens", "temperature", "ignore_eos", "stop_token_ids", "seed"):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: nothing})
        assert caught.value.field.startswith(name)
    with pytest.raises(HeadraceError, match="timeout"):
        engine.pause(timeout=nothing)


def test_a_tokenizer_refuses_by_name_what_is_no_text_and_no_ids(engine: Engine) -> None:
    tokenizer: Any = engine.tokenizer
    for text in (None, 5, b"x", ["a"]):
        with pytest.raises(RequestError) as caught:
            tokenizer.encode(text)
        assert caught.value.field == "text"
    for ids in (5, None, "ab", [None], [-1], [2**70], [1.5]):
        with pytest.raises(RequestError) as caught:
            tokenizer.decode(ids)
        assert caught.value.field == "ids"
    assert tokenizer.decode(np.array([97, 98])) == tokenizer.decode([97, 98]) == "ab"
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": torch.empty(2, device="meta")}])
    assert caught.value.field.startswith("messages")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(each, "\ud800") for each in EngineConfig.__struct_fields__ if each != "model"],
        ("dtype", torch.empty((), device="meta")),
        ("page_size", torch.empty((), device="meta")),
        ("page_size", "16"),
        ("page_size", 16.0),
        ("page_size", True),
        ("prefix_cache", "yes"),
        ("prefix_cache", 1),
        ("control_timeout", "600"),
        ("control_timeout", math.nan),
        ("request_timeout", -1),
        *[(f"{each}_timeout", 0) for each in ("request", "start", "control", "watchdog")],
        *[(each, "") for each in ("tokenizer", "kernel_cache", "served_model_name", "initial_version")],
        ("initial_version", "v" * 1025),
        ("device", "gpu"),
        ("numerics", None),
        ("tokenizer", 5),
        ("seed", 1.5),
    ],
)
def test_a_bad_setting_is_refused_by_name(name: str, value: Any) -> None:
    for make in (EngineConfig.from_dict, lambda values: EngineConfig(**values)):
        with pytest.raises(ConfigError) as caught:
            make({"model": "x", name: value})
        assert caught.value.field == name


def test_a_setting_that_is_none_of_a_few_words_is_told_which() -> None:
    for value, shown in (("int8", "'int8'"), (None, "None"), (torch.float32, "dtype")):
        with pytest.raises(ConfigError, match=f"dtype must be one of auto, float32, bfloat16, float16, not {shown}"):
            EngineConfig(model="x", dtype=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", ["5", True, math.nan, math.inf, -1, 10**400])
def test_a_server_stops_within_a_time_and_nothing_else(engine: Engine, timeout: Any) -> None:
    handle = serve(engine)
    try:
        with pytest.raises(RequestError) as caught:
            handle.stop(timeout)
        assert caught.value.field == "timeout"
        assert httpx.get(f"{handle.url}/health").status_code == 200
    finally:
        handle.stop(0)
