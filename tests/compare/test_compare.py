"""`headrace compare` over real models, real servers and a server that stands for OpenAI's: what it finds is what is
there, and what is wrong with a file or a target is said by name."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace import Engine, serve
from headrace.cli.main import EXIT_REFUSED, main
from headrace.compare.by_engine import score_by_engine
from headrace.compare.by_server import _Refused
from headrace.compare.gaps import by_place, gap_of, table_of
from headrace.compare.scores import ScoredTrajectory
from headrace.compare.trajectories import Trajectory, read_trajectories
from headrace.rl.conversations import Conversation
from headrace.types.errors import ConfigError
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

FLAGS = ["--num-threads", "1", "--page-size", "4", "--kv-pool-tokens", "16384", "--dtype", "float32", "--device", "cpu"]
KEY = "of-the-server"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Weights of seed 0, which are also in the folder."""
    with Engine(save_model(tmp_path_factory.mktemp("model"), seed=0), inprocess=True, **SETTINGS) as shared:
        yield shared


@pytest.fixture(scope="module")
def folder(engine: Engine) -> str:
    return str(engine.config.model)


@pytest.fixture(scope="module")
def log(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories of two versions, of which only "old" are the folder's weights; given tokens between sampled ones."""
    engine.update_weights_from_tensor(named_tensors(model_of(1)), version="new")
    new = _sample(engine, "new")
    engine.update_weights_from_tensor(named_tensors(model_of(0)), version="old")
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in _sample(engine, "old") + new))
    return path


def _sample(engine: Engine, version: str) -> list[dict[str, Any]]:
    prompts = [[65 + number, 66, 67] for number in range(3)]
    params = {"max_new_tokens": 24, "ignore_eos": True}
    lines = []
    for prompt, generation in zip(prompts, engine.generate(input_ids=prompts, sampling_params=params), strict=True):
        assert generation.version_spans == [(version, 24)]
        lines.append(
            {
                "id": f"{version}-{prompt[0]}",
                "prompt_ids": prompt[:2],
                "ids": prompt[2:] + generation.token_ids,
                "logprobs": [0.0, *generation.logprobs],
                "loss_mask": [0] + 24 * [1],
                "spans": [[None, 1], [version, 24]],
            }
        )
    return lines


def compare(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> list[dict[str, Any]]:
    """The comparisons that the command prints."""
    assert main(["compare", str(path), *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["comparisons"]
    return found


def check(found: dict[str, Any], num_refused: int = 0) -> None:
    """Tokens of the folder's own weights agree, and those of others do not."""
    assert found["num_trajectories"] == 6 and found["num_refused"] == num_refused
    assert found["by_version"]["old"]["num_tokens"] == 24 * 3 and found["by_version"]["old"]["max_abs"] < 1e-4
    assert found["by_version"]["new"]["mean_abs"] > 0.1 and found["by_version"]["new"]["kl"] > 0.01
    assert {token["version"] for token in found["worst"]} == {"new"}
    places = [(each["first"], each["last"], each["gap"]["num_tokens"]) for each in found["by_place"]]
    assert places == [(1, 1, 6), (2, 3, 12), (4, 7, 24), (8, 15, 48), (16, 31, 54)]


@pytest.fixture(scope="module")
def long_log(log: Path) -> Path:
    """The same, behind one that is over the context."""
    path = log.parent / "long.jsonl"
    path.write_text(json.dumps({"prompt_ids": [65] * 2000, "ids": [66], "logprobs": [-1.0]}) + "\n" + log.read_text())
    return path


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    handle = serve(engine)
    yield handle.url
    handle.stop()


def test_a_folder(folder: str, long_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be scored costs itself."""
    picture = tmp_path / "gaps.png"
    (found,) = compare(capsys, long_log, "--against", folder, *FLAGS, "--plot", str(picture))
    assert found["num_trajectories"] == 7 and found["refused"][0]["line"] == 1
    assert "context" in found["refused"][0]["message"]
    check({**found, "num_trajectories": 6}, num_refused=1)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_table_for_a_person(url: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(log), "--against", url, "--limit", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4 of 4 trajectories")
    assert [line.split()[0] for line in lines[2:]] == ["all", "version", "version", *["places"] * 5, "widest:"]


def test_a_server_of_ours(url: str, long_log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for found in compare(capsys, long_log, "--against", url, "--against", url, "--dialect", "sglang"):
        assert found["refused"][0]["line"] == 1
        assert found["refused"][0]["message"].startswith("HTTP 400: input_ids has ")
        check({**found, "num_trajectories": 6}, num_refused=1)
    assert main(["compare", str(long_log), "--against", url, "--limit", "1"]) == EXIT_REFUSED
    assert "scored no trajectory; line 1" in capsys.readouterr().err


def test_a_key(engine: Engine, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    handle = serve(engine, api_key=KEY)
    try:
        (found,) = compare(capsys, log, "--against", handle.url, "--api-key-file", str(key))
        check(found)
        assert main(["compare", str(log), "--against", handle.url]) == EXIT_REFUSED
        assert "refuses the key" in capsys.readouterr().err
    finally:
        handle.stop()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"object": "error", "message": "over the context", "code": 400}', "over the context"),
        ('{"error": {"message": "no\\n such  model", "code": 404}}', "no such model"),
        ('{"error": "busy"}', "busy"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        ('{"what": 3}', '{"what": 3}'),
        ("[[[[[[[]]]]]]]", "[[[[[[[]]]]]]]"),
        ("<html>gone</html>", "<html>gone</html>"),
        ("", ""),
    ],
)
def test_of_a_refusal_its_words_are_told(text: str, said: str) -> None:
    assert str(_Refused(404, text)) == f"HTTP 404: {said}"


@pytest.mark.parametrize("style", ["echo", "prompt_logprobs"])
def test_a_server_that_speaks_openais_completions(
    engine: Engine, log: Path, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _completions(engine, style)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            (found,) = compare(capsys, log, "--against", f"http://127.0.0.1:{server.server_address[1]}/")
        finally:
            server.shutdown()
    check(found)


def _completions(engine: Engine, style: str) -> type[BaseHTTPRequestHandler]:
    """A server that has `/v1/completions`, which scores prompts in one of the two ways, and no `/generate`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/completions" or body["model"] != "tiny":
                self._reply(404, {"detail": "Not Found"})
            elif ("echo" in body) != (style == "echo"):
                self._reply(400, {"message": f"only {style} is spoken here"})
            else:
                (scored,) = engine.score(input_ids=[body["prompt"]])
                self._reply(200, {"choices": [self._choice(body, scored.prompt_logprobs)]})

        def _choice(self, body: dict[str, Any], logprobs: list[float | None]) -> dict[str, Any]:
            if style == "echo":
                return {"logprobs": {"token_logprobs": logprobs}}
            pairs = zip(body["prompt"], logprobs, strict=True)
            return {"prompt_logprobs": [None if p is None else {str(i): {"logprob": p}} for i, p in pairs]}

        def _reply(self, status: int, told: dict[str, Any]) -> None:
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "http://127.0.0.1:9"], "http://127.0.0.1:9/generate"),
        (["--against", "http://127.0.0.1:9", "--temperature", "0.7"], "temperature"),
        (["--against", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--against", "x", "--limit", "0"], "limit"),
        (["--against", "x", "--plot", "a.bmpx"], "plot a.bmpx must end in"),
        (["--against", "x", "--plot", "/nowhere/a.png"], "plot /nowhere/a.png cannot be written"),
        (["--against", "x", "--dialect", "sglang", "--api-key-file", "/nowhere"], "api_key_file"),
    ],
)
def test_a_target_that_is_none_is_refused(
    log: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(log), *words]) == EXIT_REFUSED
    assert said in capsys.readouterr().err


GOOD = {"prompt_ids": [1], "ids": [2, 3], "logprobs": [-1.0, -2.0]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "Expected `object`"),
        ('{"prompt_ids": [1], "ids": [2]}', "logprobs"),
        (json.dumps({**GOOD, "logprobs": [-1.0]}), "1 entries for 2 ids"),
        (json.dumps({**GOOD, "logprobs": [-1.0, "x"]}), "$.logprobs[1]"),
        (json.dumps({**GOOD, "prompt_ids": []}), "prompt_ids is empty"),
        (json.dumps({**GOOD, "ids": [2, -3]}), "must not be negative"),
        (json.dumps({**GOOD, "loss_mask": [1]}), "loss_mask"),
        (json.dumps({**GOOD, "loss_mask": [1, 2]}), "loss_mask"),
        (json.dumps({**GOOD, "spans": [["a", 1]]}), "spans must sum to 2"),
        (json.dumps({**GOOD, "spans": [["a", 3], ["b", -1]]}), "spans must sum to 2"),
        (json.dumps({**GOOD, "spans": [[1, 2]]}), "$.spans[0][0]"),
        ('{"data": ' + "[" * 100_000, "nested"),
        (b"\xff\xfe", "line 2"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line.encode() if isinstance(line, str) else line, good, b""]))
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_trajectories(path)
    assert caught.value.field == "trajectories" and said in caught.value.message


def test_only_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good, wrong = json.dumps({**GOOD, "more": {"a": {}}}), json.dumps({"prompt_ids": [1], "ids": [2]})
    for end in range(1, len(good)):
        path.write_text(f"{good}\n{good[:end]}")
        assert len(read_trajectories(path)) == 1
    for last in (wrong, good.replace("-1.0", "NaN")):
        path.write_text(f"{good}\n{last}")
        with pytest.raises(ConfigError, match="line 2"):
            read_trajectories(path)


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first, again = {**GOOD, "id": "a", "version": "v1"}, {**GOOD, "id": "a", "loss_mask": [0, 1], "version": "v2"}
    empty: dict[str, Any] = {"prompt_ids": [], "ids": [], "logprobs": []}
    cut = json.dumps(GOOD)[:-4]
    path.write_text("\n".join([json.dumps(first), "", json.dumps(empty), json.dumps(again), json.dumps(GOOD), cut]))
    named, plain = read_trajectories(path)
    assert named.line == 4 and list(named.sampled()) == [(1, "v2")]
    assert plain.line == 5 and [version for _, version in plain.sampled()] == ["unknown", "unknown"]
    assert len(read_trajectories(path, limit=1)) == 1
    for text in ("", json.dumps(empty) + "\n", json.dumps({**GOOD, "loss_mask": [0, 0]}) + "\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no sampled token"):
            read_trajectories(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trajectories(tmp_path / "none")


def test_a_torn_line_inside_a_file_is_passed_over(tmp_path: Path) -> None:
    """Who wrote it was killed, and another one went on behind it."""
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), json.dumps(GOOD)[:-4], json.dumps(GOOD), ""]))
    assert [each.line for each in read_trajectories(path)] == [1, 3]


def test_where_all_are_over_the_context_each_is_said(folder: str) -> None:
    trajectories = [Trajectory([1] * 5000, [2], [-1.0]), Trajectory([1] * 6000, [2], [-1.0])]
    scores = score_by_engine(folder, trajectories, 1.0, {**SETTINGS, "inprocess": True}, lambda num: None)
    assert all("5001" in each.refusal or "6001" in each.refusal for each in scores), scores


def test_the_log_of_rollouts_is_read_as_it_is(tmp_path: Path) -> None:
    conversation = Conversation(id="c", group="g", messages=[], seed=1, prompt_ids=[1, 2])
    conversation.add_sampled([3, 4], [-1.0, -2.0], [("v1", 2)])
    conversation.add_given([5])
    conversation.add_sampled([6], [-0.5], [("v2", 1)])
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(msgspec.json.encode(conversation) + b"\n")
    (found,) = read_trajectories(path)
    assert found.ids == [3, 4, 5, 6] and list(found.sampled()) == [(0, "v1"), (1, "v1"), (3, "v2")]


def test_figures_are_what_they_say() -> None:
    gap = gap_of(np.array([0.1, -0.3, 0.0, 0.2]))
    assert gap.num_tokens == 4 and gap.mean == pytest.approx(0.0) and gap.mean_abs == pytest.approx(0.15)
    assert gap.max_abs == gap.p99_abs == pytest.approx(0.3)
    assert gap.kl == pytest.approx(np.mean([math.exp(g) - 1 - g for g in (0.1, -0.3, 0.0, 0.2)]))
    excluded = gap_of(np.array([0.0, -math.inf]))
    assert excluded.max_abs == excluded.kl == math.inf
    trajectory = Trajectory([1], [2, 3, 4], [-1.0, -1.0, -1.0], [1, 0, 1], version="v")
    table = table_of([ScoredTrajectory(trajectory, [-1.5, -9.0, -1.0]), ScoredTrajectory(trajectory, [], "no")])
    assert table.gaps.tolist() == [-0.5, 0.0] and table.places.tolist() == [0, 2]
    assert [(each.first, each.last) for each in by_place(table)] == [(0, 0), (2, 3)]
