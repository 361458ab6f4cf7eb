from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.cli import main
from headrace.cli.main import parse
from headrace.cli.streams import print_json, watch_streams
from headrace.config import EngineConfig
from tests.cli.surface import surface

ROOT = Path(__file__).resolve().parents[2]
POLICY = str(ROOT / "headrace" / "rl" / "policy")
SMALL = ["--num-threads", "1", "--kv-pool-tokens", "4096"]


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """What a start imports is not what is tested."""


def test_the_command_line_is_the_frozen_one() -> None:
    assert surface() == Path(__file__).with_name("cli_surface.txt").read_text(encoding="utf-8")


def test_every_engine_setting_is_a_flag_of_serve_generate_and_check() -> None:
    lines = surface().splitlines()
    for command in ("serve", "generate", "check"):
        for name in EngineConfig.__struct_fields__:
            flag = "model" if name == "model" else "--" + name.replace("_", "-")
            assert any(line.startswith(f"headrace {command} ") and flag in line.split() for line in lines)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["check", "/does/not/exist"], "/does/not/exist"),
        (["check", POLICY, "--page-size", "65"], "page_size"),
        (["check", POLICY, "--context-length", "999999"], "context_length"),
        (["check", POLICY, "--device", "cuda"], "cuda"),
        (["generate", POLICY, "hello", "--temperature", "-1"], "temperature"),
        (["generate", POLICY, "hello", "--jsonl", "/does/not/exist"], "jsonl"),
        (["generate", POLICY, "--jsonl", "/does/not/exist"], "/does/not/exist"),
        (["serve", POLICY, "--host", "0.0.0.0"], "api_key"),
        (["serve", POLICY, "--port", "70000"], "port"),
        (["serve", "/does/not/exist", "--port", "0"], "/does/not/exist"),
        (["serve", POLICY, "--max-body-bytes", "1"], "max_body_bytes"),
        (["bench", "offline", "--shape", "enormous", "--load-format", "dummy"], "enormous"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"headrace {words[0]}: ") and named in captured.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "/does/not/exist", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bogus"],
        ["check", POLICY, "--pagesize", "4"],
        ["check", POLICY, "extra"],
        ["check", POLICY, "--page-size", "four"],
        ["generate", POLICY, "hello", "--bogus"],
        ["generate", POLICY, "--logit-bias", "[1]"],
        ["bench"],
        ["bench", "overhead", "--batch-sizes", "16,x"],
        ["bench", "overhead", "--batch-sizes", "0"],
        ["bench", "overhead", "--num-waiting", "-5"],
        ["bench", "overhead", "--prompt-length", "0"],
        ["bench", "overhead", "--output-length", "0"],
        ["bench", "overhead", "--seconds", "-1"],
        ["bench", "overhead", "--seconds", "0"],
        ["bench", "overhead", "--seconds", "nan"],
        ["bench", "overhead", "--seconds", "inf"],
        ["bench", "overhead", "--seconds", "soon"],
        ["bench", "overhead", "--http-concurrency", "-1"],
    ],
)
def test_a_wrong_command_line_ends_with_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert "usage: headrace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage", "hint"),
    [
        (["generate", "model", "hi", "--max-tokens", "4"], "headrace generate", "--max-new-tokens"),
        (["serve", "model", "--ports=1"], "headrace serve", "--port"),
        (["bench", "offline", "--batch-sise", "4"], "headrace bench offline", "--batch-sizes"),
        (["check", "model", "--page_size", "4"], "headrace check", "--page-size"),
        (["serve", "model", "--tp", "2"], "headrace serve", "--tp-size"),
        (["generate", "model", "hi", "--tensor-parallel-size=2"], "headrace generate", "--tp-size"),
        (["serve", "model", "--max-model-len", "4096"], "headrace serve", "--context-length"),
    ],
)
def test_a_flag_that_nobody_knows_is_told_with_the_near_one(
    words: list[str], usage: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"usage: {usage} ") and told.endswith(f"(did you mean {hint}?)\n")


def run_on_full_disk(stream: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command with one of its streams on a disk that takes nothing."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        return subprocess.run([sys.executable, "-m", "headrace", *words], text=True, check=False, cwd=ROOT, **streams)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["generate", POLICY, "1+1=", "--max-new-tokens", "2", *SMALL], 0),
        (["serve", POLICY, "--port", "70000"], 2),
        (["check", POLICY, "--bogus"], 2),
    ],
)
def test_standard_error_that_takes_nothing_ends_no_command(words: list[str], code: int) -> None:
    found = run_on_full_disk("stderr", *words)
    assert (found.returncode, bool(found.stdout)) == (code, code == 0)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", POLICY, "1+1=", "--max-new-tokens", "2", *SMALL],
        ["check", POLICY],
        ["check", POLICY, "--json"],
        ["serve", "--help"],
    ],
)
def test_standard_output_that_takes_nothing_is_one_line_and_exit_code_2(words: list[str]) -> None:
    found = run_on_full_disk("stdout", *words)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1 and "standard output cannot be written: No space left" in found.stderr


def test_prompts_may_stand_on_both_sides_of_flags() -> None:
    arguments = parse(["generate", "model", "one", "--n", "2", "two", "three"])
    assert (arguments.model, arguments.prompts, arguments.n) == ("model", ["one", "two", "three"], 2)


def test_check_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", POLICY, "--json", "--kv-pool-tokens", "4096", "--max-running-requests", "8"]) == 0
    report = json.loads(capsys.readouterr().out)
    memory = report["memory"]
    assert report["settings"]["kv_pool_tokens"] == 4096 and report["settings"]["max_running_requests"] == 8
    assert memory["total"] == memory["weights"] + memory["kv_pool"] + memory["workspace"]
    assert memory["weights"] == 4 * memory["num_parameters"] > 0
    assert report["attention"]["chosen"] in report["attention"]["available"]


def test_check_says_which_backend_is_refused_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", POLICY, "--numerics", "invariant"]) == 0
    out = capsys.readouterr().out
    assert "refused" in out and "invariant" in out
    assert main(["check", POLICY, "--numerics", "invariant", "--attention-backend", "reference"]) == 2
    captured = capsys.readouterr()
    assert "available" in captured.out, "the report is there all the same"
    assert captured.err == "headrace check: attention backend 'reference' does not offer numerics 'invariant'\n"


def test_generate_prints_one_json_object_per_sample_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"prompt": "1+2=", "sampling_params": {"max_new_tokens": 5}},
        {"input_ids": [1, 2, 3], "request_id": "mine"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    words = ["generate", POLICY, "--jsonl", str(file), "--json", "--n", "2", "--max-new-tokens", "3", "--ignore-eos"]
    assert main([*words, "--top-logprobs", "2", "--prompt-logprobs", *SMALL]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s["num_prompt_tokens"], s["index"], len(s["token_ids"])) for s in samples[2:]] == [(3, 0, 3), (3, 1, 3)]
    assert [len(s["logprobs"]) for s in samples] == [5, 5, 3, 3]
    assert samples[2]["request_id"] == "mine"
    assert all(len(s["top_logprobs"][0]) == 2 and s["prompt_logprobs"][0] is None for s in samples)


def test_generate_reads_standard_input_and_prints_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+34"))
    assert main(["generate", POLICY, "--chat", "--max-new-tokens", "8", "--temperature", "0", *SMALL]) == 0
    assert capsys.readouterr().out.strip()


def test_a_bad_line_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    for text in ('{"prompt": "a"}\nnot json', '{"prompt": "a"}\n{}', '{"prompt": "a"}\n{"promt": "b"}'):
        file.write_text(text, encoding="utf-8")
        assert main(["generate", POLICY, "--jsonl", str(file)]) == 2
        assert "line 2" in capsys.readouterr().err


NESTED = b'{"prompt": "a", "sampling_params": {"stop": ' + b"[" * 5000 + b"]" * 5000 + b"}}"


@pytest.mark.parametrize("source", ["file", "-"])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\xff", "malformed"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (NESTED, "nested too deeply"),
        (b'{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "sampling_params": {"temperature": -1}}', "sampling_params.temperature"),
        (b'{"prompt": "a", "sampling_params": {"tempo": 1}}', "sampling_params.tempo"),
    ],
)
def test_a_wrong_line_is_named_before_a_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    line: bytes,
    told: str,
) -> None:
    monkeypatch.setattr("headrace.cli.generate.AsyncEngine", None)
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')  # with a byte order mark
    if source == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="ascii"))
    assert main(["generate", POLICY, "--jsonl", str(file) if source == "file" else "-"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "line 2: " in captured.err and told in captured.err


def test_a_prompt_that_only_the_model_can_refuse_is_named_and_drops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too long, not in the vocabulary, and a name that the call as a whole refuses."""
    lines = [
        {"prompt": "1+1="},
        {"prompt": "1+2=", "sampling_params": {"max_new_tokens": 100000, "n": 2}},
        {"input_ids": [1 << 40]},
        {"prompt": "1+3=", "request_id": ""},
        {"prompt": "1+4="},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ["generate", POLICY, "--jsonl", str(file), "--max-new-tokens", "2", *SMALL]
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    samples = [json.loads(line) for line in captured.out.splitlines()]
    assert [sample["finish_reason"] == "error" for sample in samples] == [False, True, True, True, False]
    assert f"{file}, line 2: " in captured.err and captured.err.endswith("(2 more failed)\n")


def test_an_argument_that_the_model_refuses_is_named_and_drops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", POLICY, "1+1=", "1+2=" * 2000, "1+3=", "--ignore-eos", "--max-new-tokens", "2", *SMALL]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) >= 2 and "headrace generate: prompt 2: " in captured.err


def run_with_encoding(encoding: str, given: bytes, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "headrace", "generate", POLICY, *words]
    return subprocess.run(command, input=given, capture_output=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape"])
def test_output_that_the_terminal_cannot_show_is_no_error(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    name, _, errors = encoding.partition(":")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=name, errors=errors or "strict"))
    watch_streams()
    print("a\u4e00", flush=True)
    print_json(b'{"text":"\xe4\xb8\x80"}')
    assert raw.getvalue() == b'a\\u4e00\n{"text":"\xe4\xb8\x80"}\n'


def test_a_users_own_way_with_what_cannot_be_encoded_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="replace"))
    watch_streams()
    print("a\u4e00", flush=True)
    assert raw.getvalue() == b"a?\n"


def test_standard_input_that_is_no_text_is_refused() -> None:
    found = run_with_encoding("utf-8:strict", b"\xff\n")
    assert found.returncode == 2 and b"standard input cannot be read" in found.stderr


def test_only_line_feeds_end_lines_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in ("a\u2028b\u2029c", "a\u0085b")]
    file.write_bytes("\r\n".join([*lines, "not json"]).encode())
    assert main(["generate", POLICY, "--jsonl", str(file)]) == 2
    assert "line 3" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    script = "import sys; from headrace.cli import main\ntry: main(['bench', 'offline', '--help'])\nfinally: "
    script += "assert not {'torch', 'transformers', 'matplotlib', 'starlette', 'uvicorn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--workload" in done.stdout


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--max-new-tokens", "4", "--", "-5+3"], ["-5+3"]),
        (["a", "--max-new-tokens", "4", "--", "-5+3", "--", "--x"], ["a", "-5+3", "--", "--x"]),
        (["a", "--max-new-tokens", "4", "b"], ["a", "b"]),
    ],
)
def test_prompts_may_begin_with_a_dash_after_two(words: list[str], prompts: list[str]) -> None:
    assert parse(["generate", POLICY, *words]).prompts == prompts
    for wrong in (["generate", POLICY, "--nope", "--", "x"], ["check", POLICY, "--", "x"]):
        with pytest.raises(SystemExit):
            parse(wrong)


@pytest.mark.parametrize(
    "words",
    [
        ["prefix-cache", "--page-size", "0"],
        ["prefix-cache", "--num-tokens", "0"],
        ["prefix-cache", "--num-sequences", "-1"],
        ["offline", "--rescored", "-1"],
    ],
)
def test_sizes_of_a_benchmark_are_checked_first(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["bench", *words])
    assert caught.value.code == 2 and words[1] in capsys.readouterr().err


def test_check_says_by_its_exit_code_that_memory_does_not_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", POLICY, "--device", "cpu", "--json"]) == 0
    assert main(["check", POLICY, "--device", "cpu", "--kv-pool-tokens", str(1 << 32), "--json"]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["memory"]["fits"] for line in captured.out.splitlines()] == [True, False]
    assert captured.err.startswith("headrace check: ") and captured.err.count("\n") == 1


def test_check_has_only_configurations_of_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(model: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return POLICY

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["check", "some-people/some-model", "--device", "cpu"]) == 0
    assert sorted(asked) == ["config.json", "generation_config.json"]


def test_a_core_logs_as_its_server_does(tmp_path: Path) -> None:
    """Here why it cannot start."""
    (tmp_path / "config.json").write_bytes((Path(POLICY) / "config.json").read_bytes())
    command = [sys.executable, "-m", "headrace", "serve", str(tmp_path), "--port", "0", "--device", "cpu"]
    words = ["--skip-tokenizer-init", "--log-json", "--log-level", "error"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "core" in line]
    assert [json.loads(line)["role"] for line in lines if line.startswith("{")] == ["core"]
    assert not any("core:0" in line for line in lines), lines


@pytest.mark.parametrize(
    "words", [["check", POLICY], ["generate", POLICY, "a"], ["serve", POLICY], ["demo"], ["bench", "overhead"]]
)
def test_a_working_directory_that_is_gone_is_refused_before_torch_is_loaded_in_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(words) == 2
    assert "the working directory is gone" in capsys.readouterr().err
