"""The three kinds of faults of whoever executes plans. Owns their types, and the words by which a lost device is known.

    plan refused   `PlanRefused`: it is no plan that could be executed, and nothing of it was. The device is not asked
    step failed    one of `FAULTS` while it was executed: whatever of it is done is in doubt, the device goes on
    device lost    `DeviceLost`: nothing that the process asks of the device works any more (an illegal access, a rank
                   that is gone); only a new process helps

The first two come to who collects the plan, as a `StepError` with the cause; the third passes every handler up to the
core's end. Knows no torch: whether a fault is the device's is judged by its type's name and its text.
"""

from __future__ import annotations

import logging
import re

from headrace.types.errors import InternalError
from headrace.types.plan import PlanRefused, RankLost, StepDisturbed

logger = logging.getLogger(__name__)

FAULTS = (Exception,)
"""What work on a device or a file may raise: an allocation that failed, a refused input, a broken invariant, a warning
where the process has those raised, an exception of a compiler's own. There is no narrower set: whoever writes a kernel
or a reader chooses its classes. It costs that work; whether more is lost, `Executor.examine` and the canary find out.
The places that catch it are listed in a test, as are those of `Exception`."""

_OF_A_DEVICE = re.compile(
    r"\b(cuda|hip)( driver| runtime)? error\b|error \[(cuda|hip)\]|\bcudaError[A-Z]|\bCUDA_ERROR_|device-side assert"
    r"|\bCU(BLAS|DNN|BLASLT)_STATUS_|fallen off the bus|\bGPU is lost\b",
    re.IGNORECASE,
)
_LEAVES_IT_USABLE = re.compile(
    r"out of memory|out of resource|too many resources|MemoryAllocation|LaunchOutOfResources|_ALLOC_FAILED"
    r"|invalid (argument|configuration|device function)|InvalidValue|_INVALID_VALUE|no kernel image|_NOT_SUPPORTED"
    r"|when stream is capturing",
    re.IGNORECASE,
)


class StepError(Exception):
    """A plan was not executed. Nothing is known of its rows' KV; later plans may build on it. `is_refusal`: nothing of
    it was begun. `is_blameless`: neither its rows nor the device are at fault."""

    def __init__(self, step_id: int, cause: BaseException) -> None:
        super().__init__(f"step {step_id} failed: {type(cause).__name__}: {cause}")
        self.step_id = step_id
        self.is_refusal = isinstance(cause, PlanRefused)
        self.is_blameless = isinstance(cause, StepDisturbed)


class DeviceLost(BaseException):
    """The device executes nothing any more. No fault among others: it passes every handler up to the core's end."""


def is_of_lost_device(fault: BaseException) -> bool:
    """True for an error after which, by what it says, a device executes nothing any more."""
    names = {kind.__name__ for kind in type(fault).__mro__}
    text = str(fault)
    if isinstance(fault, RankLost):
        return True
    if _LEAVES_IT_USABLE.search(text) or "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or _OF_A_DEVICE.search(text) is not None


def failure(what: str, fault: BaseException) -> InternalError:
    """What a call is answered with for which something failed. To be asked where the fault is handled: it is logged."""
    logger.exception("%s failed", what)
    return InternalError(f"{what} failed: {describe(fault)}")


def describe(fault: BaseException) -> str:
    """An error in one line: a device's errors go on with advice to whoever debugs kernels."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else ''}"
