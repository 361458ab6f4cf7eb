"""`headrace serve --config`: what a file says, what wins over it, and how its mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.cli.main import main, parse
from headrace.cli.serve import read_settings
from headrace.types.errors import ConfigError

FILE = """\
# the server of the trainer's node
model: some/model
port: 0
page-size: 8
memory_saver: true
access-log: on
weight-root: [/weights, /more]
dtype: bfloat16
request-timeout: 2.5
"""


@pytest.fixture
def settle(tmp_path: Path) -> Any:
    """The settings of a command line with a file of this text."""

    def read(text: str, *words: str) -> Any:
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return read_settings(parse(["serve", *words, "--config", str(path)]))

    return read


def test_a_file_holds_what_flags_do(settle: Any) -> None:
    process, config, options = settle(FILE)
    assert (process.port, process.host, process.log_level) == (0, "127.0.0.1", "info")
    assert (config.model, config.page_size, config.memory_saver) == ("some/model", 8, True)
    assert (config.dtype, config.request_timeout, config.max_core_restarts) == ("bfloat16", 2.5, 3)
    assert (options.access_log, options.weight_roots) == (True, ("/weights", "/more"))


def test_flags_win(settle: Any) -> None:
    flags = "--port=7", "--page-size=4", "--no-memory-saver", "--no-access-log", "--weight-root=/own"
    process, config, options = settle(FILE, "other", *flags)
    assert (process.port, config.model, config.page_size, config.memory_saver) == (7, "other", 4, False)
    assert (options.access_log, options.weight_roots) == (False, ("/own",))
    _, config, _ = settle("model: m\npage-size: 500\n", "--page-size", "4")
    assert config.page_size == 4, "what does not count is not checked"


WRONG = {
    "max-model-len: 5": "line 2: max-model-len is no flag of this command; context-length is",
    "weight-roots: [/x]": "line 2: weight-roots is no flag of this command; weight-root is",
    "page-size: 500": "line 2: page_size must be in [1, 64], got 500",
    "page-size: four": "line 2: page_size: Expected `int`, got `str`",
    "dtype: float8": "line 2: dtype must be one of auto, float32, bfloat16, float16, not 'float8'",
    "port: high": "line 2: port: Expected `int`, got `str`",
    "log-level: loud": "line 2: log_level must be one of debug, info, warning, error, not 'loud'",
    "max-body-bytes: 1": "line 2: max_body_bytes must be at least 1024",
    "page-size: 4\npage_size: 4": "line 3: page_size is given twice, first in line 2",
    "a: [": "line 3: no YAML: expected the node content, but found '<stream end>'",
    "[1]: 2": "line 2: [1] is no flag of this command",
    "host: 2024-13-45": "line 2: no value of its type: month must be in 1..12; quote it",
    "page-size: !!int four": "line 2: no value of its type: invalid literal for int() with base 10: 'four'; quote it",
    "port: 70000": "line 2: port must be in [0, 65535], got 70000",
    "host: 0.0.0.0": "line 2: host 0.0.0.0 is reachable from outside: set api_key, or insecure to serve everybody",
    "dp-size: two": "line 2: dp_size: Expected `int`, got `str`",
    "policy: round_robin": "line 2: policy is for several replicas: give dp_size, too",
    "dp-size: 2\nwait-timeout: long": "line 3: wait_timeout: Expected `float`, got `str`",
    "dp-size: 2\nmax-attempts: 2.5": "line 3: max_attempts: Expected `int`, got `float`",
    "page-size: !!python/object:os.system 4": "line 2: no YAML: could not determine a constructor for the tag "
    "'tag:yaml.org,2002:python/object:os.system'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_told_with_its_line(line: str, settle: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(f"model: m\n{line}\n")
    assert caught.value.message == f"{tmp_path / 'serve.yaml'}, {WRONG[line]}"


@pytest.mark.parametrize("name", ["api-key", "admin-api-key"])
def test_a_key_in_the_file_and_a_file_of_it_are_refused_wherever_each_is_said(
    name: str, settle: Any, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("one\n")
    key, file, field = f"{name}: two", f"{name}-file: {tmp_path / 'key'}", name.replace("-", "_")
    asks = (key, f"--{name}-file={tmp_path / 'key'}"), (file, f"--{name}=two"), (f"{key}\n{file}",)
    for (line, *words), number in zip(asks, (2, 2, 3), strict=True):
        with pytest.raises(ConfigError) as caught:
            settle(f"model: m\n{line}\n", *words)
        told = f"{tmp_path / 'serve.yaml'}, line {number}: give {field} or {field}_file, not both"
        assert (caught.value.message, caught.value.field) == (told, f"{field}_file")


def test_a_file_of_something_else(settle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="line 1: flags and their values are needed"):
        settle("- model\n")
    with pytest.raises(ConfigError, match="model must name a folder"):
        settle("")
    assert main(["serve", "m", "--config", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"headrace serve: config {tmp_path / 'none'} cannot be read: No such file or " \
        "directory\n"  # fmt: skip
