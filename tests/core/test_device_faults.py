"""A device that fails is told from a step that fails: the core ends, and everybody may try again elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headrace.core.fake_executor import FreeExecutor
from headrace.core.faults import StepError, is_of_lost_device
from headrace.core.service import DEVICE_LOST_EXIT_CODE, run_core
from headrace.types.messages import CommitUpdate, CoreFailed, Digest
from headrace.types.plan import PlanRefused, StepPlan, StepResult
from headrace.weights.store import WeightStore
from tests.core.harness import VOCAB_SIZE, Core, new_tensors, request, tiny_store


class AcceleratorError(RuntimeError):
    """Torch's has this name; a CPU build cannot make one."""


class FaultyExecutor(FreeExecutor):
    """Fails as it is told: `strike` sees every plan before it is executed."""

    def __init__(self, strike: Callable[[StepPlan], None]) -> None:
        super().__init__(VOCAB_SIZE, weights=tiny_store())
        self.num_steps = 0
        self.is_closed_badly = False
        self._strike = strike

    def collect(self) -> StepResult:
        self.num_steps += 1
        plan = self._plans[0]
        try:
            self._strike(plan)
        except (RuntimeError, PlanRefused) as fault:
            self._plans.popleft()
            self.examine(fault)
            raise StepError(plan.step_id, fault) from fault
        return super().collect()

    def close(self) -> None:
        if self.is_closed_badly:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")


def run_to_the_end(core: Core) -> int:
    """The exit code; what a core says last is looked at in the link."""
    code = run_core(core.loop, core.link)
    assert core.link.is_closed
    return code


def check_all_may_try_again(core: Core, *handles: int) -> str:
    """Every request was answered with the typed error, or is answered by the front, which is told it."""
    last = core.link.outputs[-1]
    assert isinstance(last, CoreFailed)
    assert (last.error.code, last.error.status, last.error.retryable) == ("DeviceLostError", 503, True)
    for handle in handles:
        finish = core.finish(handle)
        assert finish is None or (finish.error == last.error)
    return last.error.message


@pytest.mark.parametrize(
    "fault",
    [
        AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`"),
        AcceleratorError("HIP error: the operation cannot be performed in the present state"),
    ],
)
@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_a_sticky_error_ends_the_core_at_once(fault: RuntimeError, overlap_depth: int) -> None:
    def strike(plan: StepPlan) -> None:
        if plan.step_id == 4:
            raise fault

    executor = FaultyExecutor(strike)
    executor.is_closed_badly = True
    core = Core(executor, overlap_depth=overlap_depth)
    core.submit(*(request(handle) for handle in range(1, 6)))
    assert run_to_the_end(core) == DEVICE_LOST_EXIT_CODE
    message = check_all_may_try_again(core, *range(1, 6))
    assert str(fault).splitlines()[0] in message and "\n" not in message
    assert executor.num_steps == 5


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "CUDA error: invalid argument",
        "CUDA error: too many resources requested for launch",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "shape '[2, 3]' is invalid for input of size 5",
        "out of resource: shared memory",
    ],
)
def test_an_error_that_leaves_the_device_usable_costs_a_step(message: str) -> None:
    assert not is_of_lost_device(RuntimeError(message))

    def strike(plan: StepPlan) -> None:
        if plan.step_id == 4:
            raise RuntimeError(message)

    core = Core(FaultyExecutor(strike))
    core.submit(*(request(handle) for handle in range(1, 6)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4, 5) == ["length"] * 5


@pytest.mark.parametrize("num_requests", [1, 2, 8])
@pytest.mark.parametrize("overlap_depth", [0, 2])
def test_a_device_that_executes_nothing_is_found_out_by_the_first_request(
    num_requests: int, overlap_depth: int
) -> None:
    """Its error says nothing that anybody knows: nobody is blamed, and the core ends."""
    is_broken = False

    def strike(plan: StepPlan) -> None:
        if is_broken:
            raise RuntimeError("an error nobody has heard of")

    executor = FaultyExecutor(strike)
    core = Core(executor, overlap_depth=overlap_depth)
    core.submit(request(100))
    core.settle()
    is_broken = True
    core.submit(*(request(handle) for handle in range(1, num_requests + 1)))
    assert run_to_the_end(core) == DEVICE_LOST_EXIT_CODE
    assert "nobody has heard of" in check_all_may_try_again(core, *range(1, num_requests + 1))
    assert core.finish_types(100) == ["length"]
    assert executor.num_steps < 40 + 8 * num_requests


@pytest.mark.parametrize("overlap_depth", [0, 2])
def test_many_guilty_requests_one_after_the_other_are_no_fault_of_the_device(overlap_depth: int) -> None:
    """Each fails alone and nothing succeeds in between: the canary does."""

    def strike(plan: StepPlan) -> None:
        if plan.row_slots.size and plan.step_id >= 0:
            raise RuntimeError("a poisoned prompt")

    core = Core(FaultyExecutor(strike), overlap_depth=overlap_depth)
    for handle in range(1, 8):
        core.submit(request(handle))
        core.settle()
        finish = core.finish(handle)
        assert finish is not None and finish.error is not None and finish.error.code == "InternalError"
    assert core.status().metrics["num_isolated_failures"] == 7


def test_a_canary_may_fail_twice() -> None:
    num_failures = 0

    def strike(plan: StepPlan) -> None:
        nonlocal num_failures
        if plan.step_id >= 0 or num_failures < 5:
            num_failures += 1
            raise RuntimeError("now and then")

    core = Core(FaultyExecutor(strike))
    core.submit(request(1))
    core.settle()
    assert core.finish_types(1) == ["error"] and core.status().state == "ready"


@pytest.mark.parametrize("what", ["digest", "stage", "commit"])
def test_a_command_that_meets_a_lost_device_ends_the_core(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(WeightStore, "digest_in_slices" if what == "digest" else what, lost)
    core = Core(FreeExecutor(VOCAB_SIZE, weights=tiny_store()))
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    if what == "digest":
        core.start(Digest)
    else:
        tensors = new_tensors(3.0)
        session_id = core.begin(tensors, in_flight="keep")
        core.start_stage(session_id, tensors)
        if what == "commit":
            core.start(CommitUpdate, session_id)
    assert run_to_the_end(core) == DEVICE_LOST_EXIT_CODE
    check_all_may_try_again(core, 1)


def test_a_plan_that_is_refused_is_nobodys_fault_but_that_of_its_rows() -> None:
    """Whose request has no place in a plan is found as any that fails, and the device is not asked."""

    def strike(plan: StepPlan) -> None:
        if plan.step_id < 0:
            raise AssertionError("nobody doubts the device")
        if any(9 in init.token_ids for init in plan.new_slots):
            raise PlanRefused("a number that is too great")

    core = Core(FaultyExecutor(strike))
    core.submit(request(1, [9, 9]), *(request(handle) for handle in range(2, 5)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4) == ["error", "length", "length", "length"]
    assert core.status().metrics["num_isolated_failures"] == 1
