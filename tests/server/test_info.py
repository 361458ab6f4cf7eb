"""What the looking routes say, field by field."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.telemetry import METRICS
from tests.server.conftest import START, Served


def test_health(served: Served) -> None:
    for path in ("/health", "/health_generate"):
        before = served.engine.metrics()["num_generated_tokens"]
        reply = served.http.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert served.engine.metrics()["num_generated_tokens"] == before
    assert served.http.get("/ready").json() == {"ready": True, "weight_version": "default"}


def test_model_info(served: Served) -> None:
    path = served.engine.config.model
    for alias in ("/model_info", "/get_model_info"):
        assert served.http.get(alias).json() == {
            "weights_state": "ready",
            "model_path": path,
            "tokenizer_path": path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
        }


def test_server_info_has_what_routers_and_trainers_read(served: Served) -> None:
    for alias in ("/server_info", "/get_server_info"):
        info = served.http.get(alias).json()
        sizes = {name: info[name] for name in ("tp_size", "pp_size", "dp_size", "ep_size", "moe_dp_size", "num_gpus")}
        assert set(sizes.values()) == {1}
        assert info["disaggregation_mode"] == "null"
        assert (info["encoder_only"], info["enable_memory_saver"]) == (False, False)
        assert info["random_seed"] == info["seed"] == served.engine.resolved.engine.seed
        assert (info["dtype"], info["device"], info["page_size"]) == ("float32", "cpu", 4)
        assert info["eos_token_ids"] == list(served.engine.resolved.model.eos_token_ids)
        assert "the tokenizer's eos_token" in info["eos_sources"][0]
        assert info["max_total_num_tokens"] == served.engine.resolved.max_total_num_tokens
        assert info["max_req_input_len"] < info["context_length"] == 1024
        assert info["internal_states"][0]["effective_max_running_requests_per_dp"] == info["max_running_requests"]
        assert info["internal_states"][0]["memory_usage"]["token_capacity"] == info["max_total_num_tokens"]


def test_loads(served: Served) -> None:
    served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5})
    (load,) = served.http.get("/get_load").json()
    assert (load["dp_rank"], load["num_reqs"], load["num_waiting_reqs"], load["num_tokens"]) == (0, 0, 0, 0)
    reply = served.http.get("/v1/loads?include=core&dp_rank=0").json()
    (load,) = reply["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_used_tokens"]) == (0, 0, 0)
    assert load["max_total_num_tokens"] == served.engine.resolved.max_total_num_tokens
    assert load["max_running_requests"] == served.engine.resolved.engine.max_running_requests
    assert 0 <= load["cache_hit_rate"] <= 1 and load["token_usage"] == 0 and load["gen_throughput"] >= 0
    assert reply["timestamp"] and reply["version"]
    text = served.http.get("/v1/loads?format=prometheus").text
    assert {family.name for family in text_string_to_metric_families(text)} >= {"headrace_load_num_running_reqs"}
    assert served.http.get("/v1/loads?dp_rank=3").status_code == 400
    assert served.http.get("/v1/loads?format=xml").status_code == 400


def test_metrics_are_the_engines_and_the_servers(served: Served) -> None:
    served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5})
    reply = served.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if not sample.labels.get("le")
    }
    known = served.engine.metrics()
    specs = {spec.name: spec for spec in METRICS}
    assert len(specs) == len(METRICS)
    assert known.keys() <= specs.keys(), "the list tells a counter from a gauge"
    for name in known:
        assert f"headrace_{name}" + ("_total" if specs[name].kind == "counter" else "") in samples
    assert {"headrace_num_updates_total", "headrace_staged_steps_total"} <= samples.keys()
    assert samples["headrace_num_generated_tokens_total"] == known["num_generated_tokens"]
    assert samples["headrace_http_request_seconds_count"] >= 1
    assert samples["headrace_is_ready"] == samples["headrace_is_alive"] == 1


def test_latencies_are_histograms_by_the_names_of_the_dialect(start: START) -> None:
    served = start()
    served.generate(input_ids=[[1, 2, 3]] * 2, sampling_params={"max_new_tokens": 5, "ignore_eos": True})
    served.engine.score(input_ids=[1, 2, 3])
    assert served.http.post("/generate", json={"input_ids": []}).status_code == 400  # which never was one
    families = {each.name: each for each in text_string_to_metric_families(served.http.get("/metrics").text)}
    counts = {
        "sglang:queue_time_seconds": 3,
        "sglang:time_to_first_token_seconds": 2,
        "sglang:inter_token_latency_seconds": 8,
        "sglang:e2e_request_latency_seconds": 3,
        "headrace_update_pause_seconds": 0,
    }
    for name, count in counts.items():
        samples = families[name].samples
        assert families[name].type == "histogram"
        assert all(sample.labels["model_name"] for sample in samples)
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == count, name
        assert [sample.value for sample in samples if sample.name.endswith("_count")] == [count]
    name = min(served.engine.digest())
    tensors = {name: served.engine.get_weights_by_name(name)}
    report = served.engine.update_weights_from_tensor(tensors, "same", partial=True)
    text = served.http.get("/metrics").text
    (total,) = [line.split()[-1] for line in text.splitlines() if line.startswith("headrace_update_pause_seconds_sum")]
    assert float(total) == pytest.approx(report.pause_ms / 1e3)


def test_two_servers_in_one_process_do_not_share_metrics(served: Served, start: START) -> None:
    other = start()
    served.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})
    assert "headrace_http_request_seconds_count" not in other.http.get("/metrics").text


def test_the_served_name(start: START) -> None:
    served = start(settings={"served_model_name": "policy"})
    assert [card["id"] for card in served.http.get("/v1/models").json()["data"]] == ["policy"]
    body = {"prompt": "a", "max_tokens": 1}
    for name in ("policy", "default", served.engine.config.model):
        assert served.http.post("/v1/completions", json={**body, "model": name}).status_code == 200
    assert served.http.post("/v1/completions", json={**body, "model": "default"}).json()["model"] == "policy"
