"""Tells a fault of the device from one of the work it was given. Owns the words by which the two are known.

After the first kind nothing that the process asks of the device works any more (an illegal access, a device that is
lost): only a new process helps. Knows no torch: an error is judged by its type's name and its text.
"""

from __future__ import annotations

import logging
import re

from headrace.types.errors import InternalError

logger = logging.getLogger(__name__)

FAULTS = (Exception,)
"""What work on a device or a file may raise: an allocation that failed, a refused input, a broken invariant, a warning
where the process has those raised, an exception of a compiler's own. It costs that work; whether more is lost,
`Executor.examine` and the canary find out."""

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


class DeviceLost(BaseException):
    """The device executes nothing any more. No fault among others: it passes every handler up to
    the core's end."""


def is_of_lost_device(fault: BaseException) -> bool:
    """True for an error after which, by what it says, a device executes nothing any more."""
    names = {kind.__name__ for kind in type(fault).__mro__}
    text = str(fault)
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
