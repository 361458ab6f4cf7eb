"""`headrace check` of a machine with a GPU, from what such a machine says of itself; nothing here has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace import attention
from headrace.cli.check import build_report
from headrace.cli.check_report import print_report
from headrace.config import CudaDevice, EngineConfig, ResolvedConfig, Software, resolve

POLICY = Path(__file__).resolve().parents[2] / "headrace" / "rl" / "policy"
H200 = CudaDevice("NVIDIA H200", 150_754_820_096, (9, 0), 132)
SOFTWARE = Software(torch_cuda="13.0", has_triton=True)


def on_cuda(device: CudaDevice = H200, **settings: Any) -> ResolvedConfig:
    devices = (device,) * settings.get("tp_size", 1)
    return resolve(EngineConfig(model=str(POLICY), **settings), POLICY, devices=devices, software=SOFTWARE)


def shown(resolved: ResolvedConfig, capsys: pytest.CaptureFixture[str]) -> str:
    print_report(build_report(resolved))
    return " ".join(capsys.readouterr().out.split())


def test_an_unmeasured_pool_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = on_cuda(memory_fraction=0.5)
    report = build_report(resolved)
    memory = report["memory"]
    assert report["settings"]["kv_pool_tokens"] is None and memory["kv_is_estimate"]
    assert memory["total"] == memory["weights"] + memory["kv_pool"] + memory["workspace"]
    page_bytes = 16 * resolved.kv_bytes_per_token
    assert H200.total_bytes // 2 - page_bytes < memory["total"] <= H200.total_bytes // 2
    assert (memory["kv_pages"] + 1) * page_bytes == memory["kv_pool"] and memory["kv_tokens"] == 16 * memory["kv_pages"]
    assert memory["available"] == H200.total_bytes and memory["fits"]
    assert "an estimate" in shown(resolved, capsys)


def test_a_given_pool_is_planned_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = on_cuda(kv_pool_tokens=4096)
    memory = build_report(resolved)["memory"]
    assert (memory["kv_tokens"], memory["kv_is_estimate"]) == (4096, False)
    assert memory["kv_pool"] == (4096 + 16) * resolved.kv_bytes_per_token
    assert "an estimate" not in shown(resolved, capsys)


def test_the_workspace_is_what_a_device_keeps_per_running_row() -> None:
    vocab_size = on_cuda().model.vocab_size
    small, large = (build_report(on_cuda(max_running_requests=n))["memory"]["workspace"] for n in (100, 300))
    assert large - small == 200 * vocab_size * (2 * 4 + 2)


def test_keys_and_values_of_fp8_take_half_the_memory() -> None:
    plans = [
        build_report(on_cuda(dtype="bfloat16", kv_pool_tokens=4096, kv_dtype=kv_dtype))["memory"]
        for kv_dtype in ("auto", "fp8_e4m3")
    ]
    assert plans[0]["kv_pool"] == 2 * plans[1]["kv_pool"] and plans[0]["weights"] == plans[1]["weights"]


def test_ranks_share_what_they_can() -> None:
    """Each device has its share; on a CPU they are all on one machine, with the padding and copies of each."""
    plans = [build_report(on_cuda(kv_pool_tokens=4096, tp_size=num_ranks))["memory"] for num_ranks in (1, 2)]
    assert plans[0]["num_parameters"] == plans[1]["num_parameters"] and plans[0]["kv_pool"] == 2 * plans[1]["kv_pool"]
    assert 0.5 * plans[0]["weights"] <= plans[1]["weights"] < 0.52 * plans[0]["weights"]
    settings: dict[str, Any] = {"model": str(POLICY), "device": "cpu", "kv_pool_tokens": 4096}
    resolved = [resolve(EngineConfig(tp_size=num_ranks, **settings), POLICY) for num_ranks in (1, 2)]
    alone, both = (build_report(each)["memory"] for each in resolved)
    assert both["kv_pool"] == alone["kv_pool"] and alone["weights"] <= both["weights"] < 1.04 * alone["weights"]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = CudaDevice("tiny", 1 << 20, (9, 0), 1)
    for resolved in (on_cuda(tiny), on_cuda(kv_pool_tokens=1 << 30)):
        memory = build_report(resolved)["memory"]
        assert not memory["fits"] and memory["kv_pool"] >= 0
        assert "more memory than there is" in shown(resolved, capsys)


def test_the_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    report = build_report(on_cuda())
    assert report["device"]["name"] == "NVIDIA H200" and tuple(report["device"]["capability"]) == (9, 0)
    assert report["settings"]["device"] == "cuda" and report["settings"]["overlap_depth"] == 1
    assert "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 140.40 GiB" in shown(on_cuda(), capsys)


def test_triton_on_a_cpu_is_there_in_its_interpreter_only() -> None:
    on_cpu = resolve(EngineConfig(model=str(POLICY)), POLICY, devices=())
    compiled, interpreted = (Software(has_triton=True, interprets_triton=flag) for flag in (False, True))
    assert "interpreter" in build_report(on_cpu, compiled)["attention"]["refused"]["triton"]
    assert "triton" in build_report(on_cpu, interpreted)["attention"]["available"]


def test_backends_of_the_other_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    report = build_report(on_cuda())["attention"]
    assert report["chosen"] == "triton" and "cuda" in report["refused"]["cpu"]
    assert "refused" in shown(on_cuda(), capsys)


def test_which_kernel_serves_which_shape_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = (("1 query, 1-16 rows", "triton", "7.4 us against 32"), ("prompts", "triton", "measured"))
    monkeypatch.setattr(attention, "CHOICES", choices, raising=False)
    assert build_report(on_cuda())["attention"]["choices"] == [list(choice) for choice in choices]
    assert "1 query, 1-16 rows" in shown(on_cuda(), capsys)
    on_cpu = resolve(EngineConfig(model=str(POLICY)), POLICY, devices=())
    assert build_report(on_cpu)["attention"]["choices"] == [] and build_report(on_cpu)["device"] is None


def test_experts_are_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 3, "vocab_size": 32}
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    layers = {"num_hidden_layers": 4, "mlp_only_layers": [1], "moe_intermediate_size": 8, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields | sizes | layers))
    resolved = resolve(EngineConfig(model=str(tmp_path), dtype="bfloat16"), tmp_path, devices=())
    report = build_report(resolved)
    (kind,) = report["experts"]
    assert (kind["num_layers"], kind["num_experts"], kind["num_per_token"]) == (3, 6, 3)
    experts, dense, attention = 3 * (6 * 3 * 8 * 16 + 6 * 16), 3 * 64 * 16, 4 * (32 * 16 + 16 * 16 + 2 * 16 + 2 * 8)
    assert report["memory"]["num_parameters"] == experts + dense + attention + 2 * 32 * 16 + 16
    assert report["memory"]["weights"] == 2 * report["memory"]["num_parameters"]
    assert "refused: has no kernels for layers of experts yet" in (text := shown(resolved, capsys))
    assert "experts: 3 of 6 per token, 8 wide, in 3 layers" in text
    assert "experts:" not in shown(on_cuda(), capsys) and build_report(on_cuda())["experts"] == []
    workspaces = []
    for picked in (1, 6):
        (tmp_path / "config.json").write_text(json.dumps(fields | sizes | layers | {"num_experts_per_tok": picked}))
        resolved = resolve(EngineConfig(model=str(tmp_path), dtype="bfloat16"), tmp_path, devices=())
        workspaces.append(build_report(resolved)["memory"]["workspace"])
    assert workspaces[1] > workspaces[0]  # more per token than the dense layer has


def test_stages_take_what_one_does_together() -> None:
    settings: dict[str, Any] = {"model": str(POLICY), "device": "cpu", "kv_pool_tokens": 4096, "num_threads": 1}
    resolved = [resolve(EngineConfig(pp_size=num_stages, **settings), POLICY) for num_stages in (1, 2)]
    assert resolved[0].num_pages == resolved[1].num_pages and resolved[1].num_ranks == resolved[1].num_cohorts == 2
    one, two = (build_report(each)["memory"] for each in resolved)
    assert (one["kv_pool"], one["num_parameters"]) == (two["kv_pool"], two["num_parameters"])
    model = resolved[0].model
    head = model.vocab_size * model.hidden_size * 4 if model.tie_word_embeddings else 0  # both ends have it
    assert two["weights"] == one["weights"] + head
