"""Every benchmark runs at a tiny size and prints one JSON object last. No figure is judged here."""

from __future__ import annotations

import asyncio
import json

import pytest

from headrace.bench.http_streams import StreamConnection
from headrace.cli import main


def _last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_prefix_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefix-cache", "--num-sequences", "60", "--num-tokens", "100", "--json"]) == 0
    result = _last_line(capsys)
    assert result["num_pages"] == 60 * 6
    assert isinstance(result["microseconds_per_page"], float)


def test_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "overhead", "--batch-sizes", "4,8", "--num-waiting", "16", "--prompt-length", "32", "--json"]
    assert main([*words, "--output-length", "16", "--seconds", "0.2", "--http-concurrency", "4"]) == 0
    captured = capsys.readouterr()
    assert "4 running, 16 waiting\n" in captured.err, "what runs is told in lines where there is no terminal"
    result = json.loads(captured.out.splitlines()[-1])
    for field in ("tokens_per_second", "microseconds_per_step", "microseconds_per_token"):
        values = result[field]
        assert isinstance(values, dict) and set(values) == {"4", "8"} and min(values.values()) > 0
    assert isinstance(result["http_tokens_per_second"], int) and result["http_tokens_per_second"] > 0
    assert result["http_front_cpu_microseconds_per_token"] > 0


def test_overhead_streaming_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "overhead", "--batch-sizes", "4", "--num-waiting", "4", "--prompt-length", "32", "--stream"]
    assert main([*words, "--output-length", "16", "--seconds", "0.2", "--http-concurrency", "4", "--json"]) == 0
    assert _last_line(capsys)["http_stream"] is True


def test_offline_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--workload", "B", "--num-divisor", "64", "--length-divisor", "64", "--runs", "1"]
    sizes = ["--shape", "tiny", "--threads", "1", "--batch-sizes", "8", "--concurrencies", "8"]
    assert main([*words, *sizes, "--vs", "transformers", "--json"]) == 0
    result = _last_line(capsys)
    assert result["num_requests"] == 8 and isinstance(result["ratio"], float)
    assert result["rescored"] == 8 and result["num_rescored_tokens"] == result["num_output_tokens"]
    continuous = result["transformers"]["continuous_batching"]  # type: ignore[index]
    assert ("ratio_continuous" in result) == ("tokens_per_second" in continuous) != ("unavailable" in continuous)


def test_continuous_batching_of_another_interface_is_reported_as_unavailable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_interface(self: object, *, block_size: int) -> None:
        raise AssertionError("never called with what it takes")

    monkeypatch.setattr("transformers.ContinuousBatchingConfig.__init__", other_interface)
    words = ["bench", "offline", "--workload", "B", "--num-divisor", "64", "--length-divisor", "64", "--runs", "1"]
    sizes = ["--shape", "tiny", "--threads", "1", "--batch-sizes", "8", "--concurrencies", "8"]
    assert main([*words, *sizes, "--vs", "transformers", "--json"]) == 0
    result = _last_line(capsys)
    reason = result["transformers"]["continuous_batching"]["unavailable"]  # type: ignore[index]
    assert "TypeError" in reason and "page_size" in reason
    assert "ratio_continuous" not in result and isinstance(result["ratio"], float)


def test_offline_of_one_request_reports_its_latency(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--workload", "C", "--length-divisor", "32", "--runs", "1", "--threads", "1"]
    assert main([*words, "--load-format", "dummy", "--json"]) == 0
    result = _last_line(capsys)
    assert result["num_output_tokens"] == 16 and isinstance(result["milliseconds_per_token"], float)
    assert result["rescored"] == 1 and result["versions"]["headrace"] and result["dtype"] == "float32"  # type: ignore[index]


def test_offline_with_truncated_sampling_and_top_logprobs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--workload", "A", "--num-divisor", "64", "--length-divisor", "32", "--runs", "2"]
    truncated = ["--top-p", "0.9", "--top-k", "40", "--top-logprobs", "3", "--rescored", "3", "--dtype", "bfloat16"]
    assert main([*words, *truncated, "--shape", "tiny", "--threads", "1", "--load-format", "dummy", "--json"]) == 0
    result = _last_line(capsys)
    assert (result["top_p"], result["top_k"], result["top_logprobs"], result["rescored"]) == (0.9, 40, 3, 3)
    assert len(result["seconds"]) == 2 and result["dtype"] == "bfloat16"  # type: ignore[arg-type]
    assert result["settings"] == {"num_threads": 1, "load_format": "dummy", "dtype": "bfloat16"}


def test_truncated_probabilities_are_not_rescored(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--shape", "tiny", "--load-format", "dummy", "--logprob-mode", "sampled"]
    assert main([*words, "--top-k", "5", "--quick", "--json"]) == 2
    assert "--rescored 0" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--http"]])
def test_online(capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    words = ["bench", "online", "--shape", "tiny", "--load-format", "dummy", "--threads", "1", "--json", *more]
    assert main([*words, "--num-requests", "9", "--concurrency", "3", "--length-divisor", "32"]) == 0
    result = _last_line(capsys)
    assert (result["num_requests"], result["concurrency"]) == (9, 3)
    assert result["rescored"] == (0 if more else 9)
    longest, between = result["longest_gap_ms"], result["between_tokens_ms"]
    assert isinstance(longest, dict) and longest["max"] == between["max"]  # type: ignore[index]
    assert isinstance(between, dict) and 0 < between["p50"] <= between["p99"] <= between["max"]
    assert isinstance(result["tokens_per_piece"], float) and result["tokens_per_piece"] >= 1


def test_a_stream_that_is_refused_is_not_waited_for() -> None:
    """An answer that is no stream has no end that a stream has."""

    class Transport(asyncio.Transport):
        def write(self, data: object) -> None:
            asyncio.get_running_loop().call_soon(connection.data_received, b"HTTP/1.1 40")
            asyncio.get_running_loop().call_soon(connection.data_received, b"0 Bad Request\r\n\r\ntop_p is 2")

    connection = StreamConnection()
    connection.connection_made(Transport())
    with pytest.raises(RuntimeError, match="400 Bad Request"):
        asyncio.run(asyncio.wait_for(connection.stream(b"GET"), 10.0))


def test_serve_beside_offline(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", "--shape", "tiny", "--load-format", "dummy", "--threads", "1", "--runs", "1", "--json"]
    assert main([*words, "--num-divisor", "64", "--length-divisor", "32", "--rescored", "2"]) == 0
    result = _last_line(capsys)
    assert result["num_requests"] == 4 and result["rescored"] == 4, "two of each way"
    assert isinstance(result["ratio"], float) and result["ratio"] > 0
    assert result["offline_tokens_per_second"] != result["tokens_per_second"]


def test_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", "--shape", "tiny", "--threads", "1", "--runs", "1", "--json"]) == 0
    result = _last_line(capsys)
    assert isinstance(result["cold_seconds"], float) and isinstance(result["cached_seconds"], float)
    assert len(result["seconds"]) == 1  # type: ignore[arg-type]
