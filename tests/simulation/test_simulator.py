"""What holds of every simulated run: nothing is lost or invented, the fence is one, figures mean what they say."""

from __future__ import annotations

import msgspec
import pytest

from bench.simulated_workloads import MEASURED, simulate_workload
from headrace.bench.workloads import Workload, make_workload
from headrace.scheduler import Scheduler
from headrace.simulation import simulator
from headrace.simulation.figures import RunFigures
from headrace.simulation.front_model import FrontCosts
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.replica_model import limits_of
from headrace.simulation.simulator import Simulation
from headrace.simulation.step_times import PROFILES, DeviceProfile, StepWork
from headrace.types.errors import ConfigError
from headrace.types.request import Request, pack_ids

SMALL = SimulationOptions(
    profile="qwen3-0.6b-h200",
    groups_per_replica=3,
    group_size=4,
    prompt_tokens=128,
    median_output_tokens=96,
    max_output_tokens=384,
    grain=16,
)


def simulate(num_replicas: int, **changes: object) -> tuple[Simulation, RunFigures]:
    simulation = Simulation(num_replicas, msgspec.structs.replace(SMALL, **changes))
    return simulation, simulation.run()


def check_books(simulation: Simulation, figures: RunFigures) -> None:
    """Each sample of a batch that was trained on has ended once, in order; times and shares are what they can be."""
    options = simulation.options
    least = options.steps * options.num_groups(len(simulation.replicas)) * options.group_size
    assert figures.num_requests >= least
    ended = [each for each in simulation.rollouts if each.ended == each.ended]
    assert figures.num_output_tokens == options.grain * sum(each.num_output for each in ended)
    for each in ended:
        assert each.sent <= each.started <= each.first_token <= each.ended
        assert each.num_attempts >= 1 and 0 <= each.num_kept < each.num_output
    for group in {id(each.group): each.group for each in simulation.rollouts}.values():
        assert group.num_ended == sum(each.ended == each.ended for each in group.rollouts)
    assert 0 < figures.busy_share <= 1 and 0 <= figures.hit_rate < 1
    if not options.staleness and not figures.num_failures:
        assert figures.hit_rate <= figures.one_cache_hit_rate + 1e-9
    assert len(figures.steps) == options.steps
    assert all(each.epoch == options.steps for each in simulation.replicas if each.is_alive), "older than the fence"


@pytest.mark.parametrize(
    ("profile", "work", "milliseconds"),
    [
        ("qwen3-0.6b-h200", StepWork(1, 256, 0, 256 * 882), 8.02),
        ("qwen3-0.6b-h200", StepWork(1, 512, 0, 512 * 336, 512 * 496), 9.08),
        ("qwen3-0.6b-h200", StepWork(1, 1, 0, 384), 0.745),
        ("qwen3-8b-h200", StepWork(1, 256, 0, 256 * 882), 15.69),
        ("qwen3-8b-h200", StepWork(1, 512, 0, 512 * 336, 512 * 496), 22.24),
        ("qwen3-8b-h200", StepWork(1, 1, 0, 384), 4.19),
    ],
)
def test_steps_take_what_they_were_measured_to_take(profile: str, work: StepWork, milliseconds: float) -> None:
    assert 1e3 * PROFILES[profile].seconds(work) == pytest.approx(milliseconds, rel=0.05)


def test_a_whole_workload_is_predicted() -> None:
    """Of which the profile was not made. docs/simulation.md has all of them, without a grain."""
    found = simulate_workload("qwen3-8b-h200", make_workload("A"), grain=16)
    least, most = MEASURED["qwen3-8b-h200", "A"]
    assert found.tokens_per_second == pytest.approx((least + most) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("profile", "number", "measured"), [("qwen3-8b-h200", 128, 41_126), ("qwen3-0.6b-h200", 512, 338_624)]
)
def test_prompts_come_in_large_steps(profile: str, number: int, measured: int) -> None:
    """As fast as docs/benchmarks.md has them."""
    prompts = [[1 + (7919 * index + at) % 5000 for at in range(2048)] for index in range(number)]
    found = simulate_workload(profile, Workload("A", prompts, [16] * number))
    assert number * 2048 / found.seconds == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("grain", [1, 4])
def test_steps_beside_rows_that_decode_keep_their_bound(grain: int) -> None:
    options = msgspec.structs.replace(
        SMALL, profile="qwen3-8b-h200", prompt_tokens=60_000, max_output_tokens=4096, grain=grain
    )
    limits = limits_of(options)
    scheduler, num_long = Scheduler(limits), 60_000 // grain
    device = ReplicaDevice(options.device, limits, grain, [4 + 400, num_long + 4])
    scheduler.add(Request(0, "0", pack_ids([1] * 4), 400, seed=0), 0.0)
    lengths, alone = [], options.device.prefill_step_tokens
    while (plan := scheduler.plan()) is not None:
        result, seconds = device.execute(plan)
        lengths.append((len(plan.token_ids), seconds / grain))
        scheduler.apply(result)
        if len(lengths) == 2:
            scheduler.add(Request(1, "1", pack_ids([2] * num_long), 4, seed=1), 0.0)
    beside = [each for each in lengths if each[0] > 2]
    assert max(seconds for _, seconds in beside) <= 1.1e-3 * options.device.max_step_ms
    assert beside[1][0] > alone // 2 and beside[-2][0] < beside[1][0] // 2, "pieces follow what they attend to"


@pytest.mark.parametrize("policy", ["cache_aware", "round_robin", "shortest_queue", "fewest_tokens"])
def test_every_sample_ends_once_whatever_the_policy(policy: str) -> None:
    check_books(*simulate(3, policy=policy))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_failures_lose_no_sample(is_resumed: bool) -> None:
    changes = {"mtbf_hours": 0.0001, "restart_seconds": 0.1, "resume": is_resumed, "steps": 3, "known_ends": True}
    simulation, figures = simulate(4, **changes)
    check_books(simulation, figures)
    assert figures.num_failures > 3 and figures.num_asked_again > 0 and figures.num_lost_tokens > 0
    assert (figures.num_void_tokens == 0) == is_resumed


def test_requests_wait_while_every_replica_is_gone() -> None:
    simulation, figures = simulate(1, mtbf_hours=0.00003, restart_seconds=0.1, steps=3, resume=True)
    check_books(simulation, figures)
    assert figures.num_failures > 0


@pytest.mark.parametrize("mtbf_hours", [1e-12, 1e-300])
def test_where_nothing_ever_ends_it_is_said(mtbf_hours: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_MAX_IN_VAIN", 100)
    with pytest.raises(ConfigError, match="before any answer ends") as caught:
        simulate(2, mtbf_hours=mtbf_hours, restart_seconds=0.1)
    assert caught.value.field == "mtbf_hours"


def test_a_batch_ahead_hides_training_and_the_tail() -> None:
    _, in_turn = simulate(2, steps=4, train_seconds=0.5)
    simulation, ahead = simulate(2, steps=4, train_seconds=0.5, staleness=1)
    check_books(simulation, ahead)
    assert ahead.seconds < 0.8 * in_turn.seconds
    assert in_turn.tail_share is not None and ahead.tail_share is None
    for step, (early, late) in enumerate(zip(in_turn.steps, in_turn.steps[1:], strict=False)):
        assert early.taken + 0.5 == pytest.approx(early.push_began), step
        assert early.push_began < early.pushed < late.taken


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    first, again, other = (simulate(2, seed=seed, mtbf_hours=0.01)[1] for seed in (5, 5, 6))
    assert first == again != other


def test_groups_hit_as_in_one_big_cache() -> None:
    """Within 2 %, where samples go by prefix; where they take turns nearly every one computes its prompt again."""
    aware = simulate(8, shared_tokens=64, group_size=8)[1]
    turns = simulate(8, shared_tokens=64, group_size=8, policy="round_robin")[1]
    assert aware.one_cache_hit_rate == turns.one_cache_hit_rate > 0.8
    assert aware.hit_rate > aware.one_cache_hit_rate - 0.02
    assert turns.hit_rate < aware.hit_rate - 0.3


def test_a_grain_moves_throughput_little() -> None:
    exact, coarse = (simulate(2, grain=grain, steps=1)[1] for grain in (1, 16))
    assert coarse.generating_tokens_per_second == pytest.approx(exact.generating_tokens_per_second, rel=0.06)


def test_twice_the_replicas_with_twice_the_work_make_twice_the_tokens_but_for_the_tail() -> None:
    one, two = (simulate(number, groups_per_replica=16)[1] for number in (1, 2))
    assert 1.8 < two.generating_tokens_per_second / one.generating_tokens_per_second <= 2.2


def test_a_front_that_looks_at_too_many_replicas_says_so() -> None:
    one, several = (simulate(32, fronts=fronts, steps=1, groups_per_replica=1) for fronts in (1, 8))
    for simulation, figures in (one, several):
        check_books(simulation, figures)
        per_front = len(simulation.replicas) // simulation.options.fronts
        assert figures.front_look_share == pytest.approx(per_front * FrontCosts().look)
    assert one[1].front_wait_seconds > several[1].front_wait_seconds


def test_a_push_takes_longer_from_one_store_than_by_a_broadcast() -> None:
    changes = {"store_bytes": 10e9, "steps": 1, "groups_per_replica": 1}
    fast, slow = (simulate(16, update_road=road, **changes)[1] for road in ("broadcast", "store"))
    assert slow.update_seconds > 10 * fast.update_seconds


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"policy": "best"}, "policy"),
        ({"profile": "qwen3-8b-h20"}, "profile"),
        ({"profile": "/nowhere/at/all.json"}, "profile"),
        ({"shared_tokens": 1000}, "shared_tokens"),
        ({"grain": 3}, "grain"),
        ({"mtbf_hours": 0.0}, "mtbf_hours"),
        ({"restart_seconds": -1.0}, "restart_seconds"),
        ({"steps": 0}, "steps"),
        ({"groups": 0}, "groups"),
        ({"seeds": 1}, "seeds"),
        ({"group_size": "two"}, "group_size"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SimulationOptions.from_dict(changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("number", "changes", "field"), [(0, {}, "replicas"), (1, {"fronts": 2}, "fronts"), (5000, {}, "fronts")]
)
def test_what_does_not_go_with_so_many_replicas_is_refused(number: int, changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Simulation(number, msgspec.structs.replace(SMALL, **changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes", [{"fixed": -1.0}, {"page_size": 0}, {"fixed": 0.0, "token": 0.0}, {"kv_pool_tokens": 1}]
)
def test_a_profile_that_makes_no_sense_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        DeviceProfile(**{"fixed": 1e-3, "token": 1e-6, **changes})  # type: ignore[arg-type]
