from __future__ import annotations

from pathlib import Path

import pytest

from headrace.bench.http_client import output_lengths, unique_prompt
from headrace.bench.models import SHAPES, write_config
from headrace.bench.workloads import (
    CPU_SCALE,
    FULL_SCALE,
    QUICK_SCALE,
    Scale,
    ScaleChoice,
    WorkloadName,
    make_closed_loop,
    make_workload,
)
from headrace.config import ModelSpec
from headrace.types.errors import ConfigError


def test_workload_a_has_the_published_totals() -> None:
    workload = make_workload("A")
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142_827, 133_966)
    assert workload.max_length <= 2048


def test_workload_b_has_the_published_totals_and_groups() -> None:
    workload = make_workload("B")
    assert (len(workload.prompts), workload.num_prompt_tokens, workload.num_output_tokens) == (512, 262_144, 349_383)
    for first in range(0, 512, 8):
        group = workload.prompts[first : first + 8]
        assert all(prompt == group[0] for prompt in group) and len(group[0]) == 512
    assert workload.prompts[0] != workload.prompts[8]


def test_workload_c_is_one_request() -> None:
    workload = make_workload("C")
    assert (workload.num_prompt_tokens, workload.output_lengths) == (128, [512])


@pytest.mark.parametrize("scale", [CPU_SCALE, QUICK_SCALE])
@pytest.mark.parametrize("name", ["A", "B"])
def test_a_scaled_workload_keeps_its_shape(name: WorkloadName, scale: Scale) -> None:
    full = make_workload(name)
    small = make_workload(name, scale=scale, vocab_size=1000)
    assert 0 < small.num_output_tokens < full.num_output_tokens
    assert small.prompts.count(small.prompts[0]) == full.prompts.count(full.prompts[0])
    assert max(max(prompt) for prompt in small.prompts) < 1000


def test_every_shape_is_a_model_the_engine_knows(tmp_path: Path) -> None:
    for shape in SHAPES:
        spec = ModelSpec.from_folder(write_config(tmp_path / shape, shape))
        assert spec.architecture == SHAPES[shape]["architectures"][0]
    with pytest.raises(ConfigError, match="enormous"):
        write_config(tmp_path, "enormous")


def test_overhead_prompts_share_no_page() -> None:
    prompts = [unique_prompt(number, 64) for number in (0, 1, 15_999, 16_000, 32_001)]
    assert len({tuple(prompt[:2]) for prompt in prompts}) == len(prompts)
    assert all(len(prompt) == 64 and min(prompt) > 0 and max(prompt) < 16_384 for prompt in prompts)


def test_overhead_lengths_average_what_is_asked() -> None:
    lengths = output_lengths(256)
    drawn = [next(lengths) for _ in range(1024)]
    assert 250 <= sum(drawn) / len(drawn) <= 260 and min(drawn) >= 128 and max(drawn) < 384


def test_the_closed_loop_has_the_lengths_of_a() -> None:
    workload = make_closed_loop(vocab_size=151_936)
    lengths = [*map(len, workload.prompts), *workload.output_lengths]
    assert len(workload.prompts) == 2000 and 100 <= min(lengths) < 110 and 1000 < max(lengths) <= 1024
    assert len({tuple(prompt[:16]) for prompt in workload.prompts}) == 2000
    assert max(map(len, make_closed_loop(5, length_divisor=8).prompts)) <= 128


def test_scale_by_device_unless_asked() -> None:
    assert ScaleChoice().on(is_cpu=True) == CPU_SCALE and ScaleChoice().on(is_cpu=False) == FULL_SCALE
    assert ScaleChoice("full").on(is_cpu=True) == FULL_SCALE and ScaleChoice("quick").on(is_cpu=False) == QUICK_SCALE
    assert ScaleChoice(num_divisor=2).on(is_cpu=False) == Scale(2, 1)


@pytest.mark.parametrize("vocab_size", [100, 512, 151_936])
def test_a_warm_up_knows_the_vocabulary_and_shares_nothing(vocab_size: int) -> None:
    workload = make_workload("A", scale=QUICK_SCALE, vocab_size=vocab_size)
    strangers = workload.strangers()
    assert len(strangers) == 8 and max(map(max, strangers)) < vocab_size
    assert all(prompt[0] != stranger[0] for prompt, stranger in zip(workload.prompts, strangers, strict=False))
