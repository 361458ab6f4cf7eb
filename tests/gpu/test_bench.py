"""The benchmarks on a device: its own defaults, the reference on it, and the counters that a report needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.attention import AttentionShape
from headrace.attention.reference import attend
from headrace.cli import main

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_offline_at_full_scale_compiles_nothing_and_is_rescored(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--workload", "A", "--shape", "tiny", "--load-format", "dummy", "--runs", "1"]
    assert main([*words, "--dtype", "bfloat16", "--json"]) == 0
    result = last_line(capsys)
    assert (result["device"], result["num_output_tokens"], result["rescored"]) == ("cuda", 133_966, 16)
    assert result["gpu"] and result["gpu_busy_s"] > 0 and 0 <= result["gpu_idle_share"] < 1
    assert result["num_compiled_after_ready"] == 0 and result["num_failed_steps"] == 0


def test_truncated_sampling_in_float32_is_rescored(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--workload", "B", "--num-divisor", "16", "--length-divisor", "4", "--runs", "1"]
    truncated = ["--top-p", "0.9", "--top-k", "40", "--top-logprobs", "5", "--dtype", "float32"]
    assert main([*words, *truncated, "--shape", "tiny", "--load-format", "dummy", "--json"]) == 0
    result = last_line(capsys)
    assert result["rescored"] == 16 and result["max_logprob_difference"] < 2e-3
    assert result["num_compiled_after_ready"] == 0


def test_online(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "online", "--shape", "tiny", "--load-format", "dummy", "--num-requests", "100"]
    assert main([*words, "--concurrency", "32", "--json"]) == 0
    result = last_line(capsys)
    assert result["rescored"] == 16 and result["num_compiled_after_ready"] == 0
    assert result["between_tokens_ms"]["p50"] > 0


def test_the_breakdown_sees_every_class_of_kernel(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu_breakdown.py", "--shape", "small", "--cases", "b512", "--scale", "4"]
    done = subprocess.run([*command, "--engine", '{"load_format": "dummy"}'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["b512"]
    times = found["us_per_step"]
    assert all(times[name] > 0 for name in ("attention", "GEMM", "norm, rope, store", "sampling"))
    assert times["other"] < 0.5 * sum(times.values())
    assert 0 <= found["idle_share"] < 1 and 0 <= found["profiled_idle_share"] < 1


def test_the_oracle_attends_to_2560_positions_in_bounded_memory_as_on_the_cpu() -> None:
    shape, length = AttentionShape(32, 8, 128), 2560
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(length, 32, 128, generator=generator)
    k, v = torch.randn(2, length, 8, 128, generator=generator)
    q_cuda, k_cuda, v_cuda = (values.cuda() for values in (q, k, v))
    attend(q_cuda, k_cuda, v_cuda, 0, shape)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, start = torch.cuda.memory_allocated(), time.perf_counter()
    found = attend(q_cuda, k_cuda, v_cuda, 0, shape).cpu()
    seconds = time.perf_counter() - start
    assert torch.cuda.max_memory_allocated() - held < 1.5e9
    print(f"{1e3 * seconds:.1f} ms per layer")
    torch.testing.assert_close(found[-64:], attend(q[-64:], k, v, length - 64, shape), atol=2e-5, rtol=0)
