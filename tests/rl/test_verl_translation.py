"""What verl's words mean here, without verl, whose objects are only read: `tests/frameworks/verl` runs it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.engine import Engine
from headrace.rl.verl_plugin.translation import (
    Launch,
    aborted_output,
    asked_of,
    launch_of,
    output_of,
    server_name,
    step_of,
)
from headrace.types.errors import ConfigError, RequestError
from headrace.types.generation import Generation, RoutedExperts

ROLLOUT: dict[str, Any] = {
    **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "data_parallel_size": 1},
    **{"expert_parallel_size": 1, "quantization": None, "quantization_config_file": None},
    **{"enable_rollout_routing_replay": False, "dtype": "bfloat16", "load_format": "dummy", "max_model_len": None},
    **{"skip_tokenizer_init": True, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "enforce_eager": False},
    **{"gpu_memory_utilization": 0.5, "free_cache_engine": True, "enable_prefix_caching": True, "seed": 42},
    **{"full_determinism": False, "logprobs_mode": "processed_logprobs", "engine_kwargs": {"vllm": {}}},
    **{"prompt_length": 10, "response_length": 6},
}
"""The defaults of verl's `RolloutConfig`, as far as they are read."""


def launch(mode: str = "hybrid", replica_rank: int = 0, **changes: Any) -> Launch:
    return launch_of(SimpleNamespace(**{**ROLLOUT, **changes}), "/model", mode, replica_rank)


def test_a_rollout_config_is_settings() -> None:
    found = launch(replica_rank=3, engine_kwargs={"headrace": {"seed": 7, "page_size": 8, "api_key": "k" * 16}})
    assert found.engine == {
        **{"model": "/model", "tp_size": 2, "pp_size": 1, "dtype": "bfloat16", "load_format": "dummy", "seed": 7},
        **{"skip_tokenizer_init": True, "context_length": None, "max_running_requests": 256, "page_size": 8},
        **{"max_num_batched_tokens": 8192, "memory_fraction": 0.5, "memory_saver": True, "prefix_cache": True},
        **{"cuda_graphs": True, "numerics": "fast", "logprob_mode": "sampled"},
        "keep_routed_experts": False,
    }
    assert found.server == {"host": "127.0.0.4", "api_key": "k" * 16}
    assert [launch(replica_rank=rank).engine["seed"] for rank in (0, 1)] == [42, 43]
    assert launch(full_determinism=True).engine["numerics"] == "invariant"
    assert launch(logprobs_mode="raw_logprobs").engine["logprob_mode"] == "raw"


@pytest.mark.parametrize(
    ("mode", "load_format", "expected"),
    [
        ("hybrid", "dummy", (True, False, False)),
        ("hybrid", "auto", (False, False, False)),
        ("standalone", "dummy", (True, True, False)),
        ("colocated", "auto", (False, False, True)),
    ],
)
def test_where_weights_come_from(mode: str, load_format: str, expected: tuple[bool, bool, bool]) -> None:
    found = launch(mode, load_format=load_format)
    assert (found.awaits_weights, found.keeps_weights, found.restores_weights) == expected
    assert msgspec.json.decode(msgspec.json.encode(found), type=Launch) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_parallel_size", 2),
        ("quantization", "fp8"),
        ("logprobs_mode", "x"),
    ],
)
def test_what_is_not_there_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"rollout.{field}=") as caught:
        launch(**{field: value})
    assert caught.value.field == field


def test_sampling_parameters_are_a_request() -> None:
    """As verl 0.9.1 was seen to send them."""
    seen = {"temperature": 1.0, "top_p": 1, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    rest = {name: value for name, value in seen.items() if name != "logprobs"}
    asked = asked_of("r", 10, seen, launch())
    assert asked.sampling == {**rest, "max_new_tokens": 6} and asked.wants_logprobs
    assert asked_of("r", 12, seen, launch()).sampling["max_new_tokens"] == 4
    assert asked_of("r", 17, seen, launch()).sampling["max_new_tokens"] == 0
    assert asked_of("r", 12, {"max_tokens": 9}, launch()).sampling == {"max_new_tokens": 9}
    assert asked_of("r", 12, {"max_new_tokens": 9, "max_tokens": None}, launch()).sampling["max_new_tokens"] == 9
    with pytest.raises(RequestError, match="both given"):
        asked_of("r", 1, {"max_new_tokens": 1, "max_tokens": 2}, launch())
    teacher = asked_of(
        "r", 3, {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 2, "detokenize": False}, launch()
    )
    assert teacher.sampling == {"max_new_tokens": 1, "temperature": 1.0} and teacher.num_prompt_top == 2


def generation(**changes: Any) -> Generation:
    given: dict[str, Any] = {
        **{"request_id": "r", "prompt_index": 0, "index": 0, "token_ids": [5, 6, 7], "logprobs": [-1.0, -2.0, -3.0]},
        **{"finish_reason": "length", "version_spans": [("3", 1), ("4", 2)], "num_cached_tokens": 2},
        "num_preemptions": 1,
    }
    return Generation(**{**given, **changes})


def test_a_generation_is_a_token_output() -> None:
    asked = asked_of("r", 2, {"logprobs": True}, launch())
    assert asked.options["request_id"] == "r"
    assert output_of(generation(), asked, [1, 2], "4") == {
        **{"token_ids": [5, 6, 7], "log_probs": [-1.0, -2.0, -3.0], "stop_reason": "completed", "num_preempted": 1},
        "routed_experts": None,
        "extra_fields": {"global_steps": 4, "min_global_steps": 3, "max_global_steps": 4, "num_cached_tokens": 2},
    }
    partial = output_of(generation(finish_reason="abort"), asked_of("r", 2, {}, launch()), [1, 2], "4")
    assert partial["token_ids"] == [5, 6, 7] and partial["stop_reason"] == "aborted" and partial["log_probs"] is None
    empty = output_of(generation(finish_reason="abort", token_ids=[], version_spans=[]), asked, [1, 2], "9")
    assert empty["extra_fields"]["global_steps"] == 9 == aborted_output("9")["extra_fields"]["global_steps"]
    assert [step_of(label) for label in ("0", "17", "", "default", "-1", "²")] == [0, 17, None, None, None, None]


def test_routing_replay_is_asked_for_and_told() -> None:
    """int32 [tokens, layers, experts per token], which verl lays beside the ids of prompt and response."""
    replayed = launch(enable_rollout_routing_replay=True)
    assert replayed.engine["keep_routed_experts"] is True
    asked = asked_of("r", 2, {}, replayed)
    assert asked.options["return_routed_experts"] is True
    assert "return_routed_experts" not in asked_of("r", 2, {}, launch()).options
    numbers = np.arange(2 * 3 * 2, dtype="<i2")
    found = output_of(generation(routed_experts=RoutedExperts(0, 3, 2, numbers.tobytes())), asked, [1, 2], "4")
    assert found["routed_experts"].dtype == np.int32
    assert found["routed_experts"].tolist() == numbers.reshape(2, 3, 2).tolist()


def test_a_prompt_is_scored_as_a_teacher_of_verl_scores_it(tmp_path: Any) -> None:
    from tests.server.builders import save_random_model

    prompt = [5, 6, 7, 8]
    folder = save_random_model(tmp_path, seed=0)
    settings: dict[str, Any] = {"num_threads": 1, "dtype": "float32", "kv_pool_tokens": 1 << 10}
    with Engine(folder, inprocess=True, numerics="invariant", **settings) as engine:
        outputs = []
        for num_top in (0, 2):
            asked = asked_of("r", len(prompt), {"max_tokens": 1, "prompt_logprobs": num_top}, launch())
            (found,) = engine.generate(input_ids=prompt, sampling_params=asked.sampling, **asked.options)
            outputs.append(output_of(found, asked, prompt, engine.version)["extra_fields"])
        (scored,) = engine.score(input_ids=prompt, top_logprobs=2)
    own, top = outputs
    assert own["prompt_ids"] == [[6], [7], [8], [0]]
    assert own["prompt_logprobs"] == [*([value] for value in scored.prompt_logprobs[1:]), [0.0]]
    assert [len(row) for row in top["prompt_ids"]] == [2] * 4 and top["prompt_ids"][-1] == [0, 0]
    for row, values, expected in zip(
        top["prompt_ids"], top["prompt_logprobs"], [*scored.prompt_top_logprobs[1:], None], strict=True
    ):
        assert expected is None or dict(zip(row, values, strict=True)) == expected
        assert values[0] >= values[1]


def test_servers_have_names_of_their_own() -> None:
    assert server_name(3) == "headrace_server_3" and server_name(0, "teacher", "_t") == "headrace_server_teacher_0_t"
