"""A core from its configuration to its end, in a process or a thread. Owns what happens when it fails."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from headrace.config import ResolvedConfig
from headrace.core.begun_ranks import BegunRanks
from headrace.core.executor import Executor, LocalExecutor
from headrace.core.faults import DeviceLost, describe, is_of_lost_device
from headrace.core.imports import quick_imports
from headrace.core.loop import CoreLoop
from headrace.ipc import CoreLink, PeerClosed, Pulse
from headrace.ipc.rank_meeting import Meeting
from headrace.types.errors import ConfigError, DeviceLostError, EngineDeadError, ErrorInfo, HeadraceError, InternalError
from headrace.types.messages import CoreFailed, CoreReady

if TYPE_CHECKING:
    from headrace.core.rank_executor import RankExecutor
    from headrace.parallel import Mesh
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.runner import Runner

logger = logging.getLogger(__name__)

ExecutorKind = Literal["local", "free"] | Meeting
CORE_MODULES = ("headrace.runner",)
FIRST_RANK_MODULES = ("headrace.core.rank_start", *CORE_MODULES)
"""Those that need torch, of a core that is all there is and of the first of several ranks."""

DEVICE_LOST_EXIT_CODE = 4
_PROGRESS_SECONDS = 5.0


def serve_core(
    resolved: ResolvedConfig,
    link: CoreLink,
    executor: ExecutorKind = "local",
    *,
    pulse: Pulse | None = None,
    ranks: BegunRanks | None = None,
    on_begin: Callable[[], object] | None = None,
    on_built: Callable[[], object] | None = None,
    shares_process: bool = False,
) -> int:
    """Build a core, announce it with `CoreReady`, and step it until it is shut down. Returns the exit code.

    `pulse` beats from here to the end; None: nobody feels it. `ranks` are those of this host that have begun; None:
    none has. `on_begin` is called first, and what it raises is a failure to start; `on_built` is called once before the
    announcement.
    `shares_process`: others compute in this process too. Never
    raises: a failure to start is told in `CoreReady.error`, a crash is answered to every live request.
    """
    with pulse or Pulse() as pulse:
        try:
            with contextlib.closing(ranks or BegunRanks(shares_process=shares_process)) as ranks:
                if on_begin is not None:
                    on_begin()
                loop = _build(resolved, link, executor, pulse, ranks, on_built, shares_process)
        except Exception as error:  # process entry point
            return _report_start_failure(link, error)
        return 0 if loop is None else run_core(loop, link)


def load_torch(*modules: str) -> Exception | None:
    """Load the modules that need it: it takes longer than anything else. Returns what kept it from being loaded,
    whatever that is: a failure to start, told once the settings are there. Half loaded, torch would say something else
    if it were imported again.
    """
    try:
        with quick_imports():
            for module in modules:
                importlib.import_module(module)
    except Exception as error:  # process entry point: others than ImportError come of it too
        return error
    return None


def run_core(loop: CoreLoop, link: CoreLink) -> int:
    """Step a core to its end, answer everybody if that is a crash, and let go of everything. Returns the exit code."""
    try:
        loop.run()
        return 0
    except PeerClosed as reason:
        logger.info("core ends: %s", reason)
        return 0
    except DeviceLost as lost:
        logger.error("core ends, its device is lost: %s", lost)
        _answer_all(loop, link, DeviceLostError(f"the device is lost: {lost}").info())
        return DEVICE_LOST_EXIT_CODE
    except Exception as error:  # process entry point
        logger.exception("core crashed")
        _answer_all(loop, link, EngineDeadError(f"the engine core crashed: {type(error).__name__}: {error}").info())
        return 1
    finally:
        _let_go(loop)
        link.close()


def _build(
    resolved: ResolvedConfig,
    link: CoreLink,
    kind: ExecutorKind,
    pulse: Pulse,
    ranks: BegunRanks,
    on_built: Callable[[], object] | None,
    shares_process: bool,
) -> CoreLoop | None:
    """The loop, announced; None when the front went away meanwhile."""
    executor, resolved = build_executor(resolved, kind, ranks, LoadProgress(pulse), shares_process=shares_process)
    loop = CoreLoop(resolved, executor, link, pulse=pulse)
    if on_built is not None:
        on_built()
    devices = executor.weights.device_ids
    ready = CoreReady(
        max_total_num_tokens=resolved.max_total_num_tokens,
        page_size=resolved.engine.page_size,
        num_layers=len(resolved.model.layers),
        explanations=resolved.explanations,
        front=loop.front,
        devices=devices[:1] if shares_process else devices,  # an address is of one device
    )
    try:
        link.send(ready)
    except PeerClosed as reason:
        logger.info("core ends before it was ready: %s", reason)
        executor.close()
        link.close()
        return None
    return loop


def build_executor(
    resolved: ResolvedConfig,
    kind: ExecutorKind,
    ranks: BegunRanks,
    on_progress: LoadProgress | None = None,
    *,
    shares_process: bool = False,
) -> tuple[Executor, ResolvedConfig]:
    """What executes plans: a runner of this process, with other ranks if there are any, which are `ranks` or come to a
    `Meeting` where that is given; or, for "free", nothing at all. And the settings it runs with, where what could only
    be measured is filled in."""
    if kind == "free":
        from headrace.core.fake_executor import FreeExecutor

        return FreeExecutor(resolved.model.vocab_size), resolved
    if resolved.num_ranks > 1:
        meeting = kind if isinstance(kind, Meeting) else None
        of_ranks = _build_ranks(resolved, meeting, ranks, on_progress, shares_process=shares_process)
        return of_ranks, of_ranks.resolved
    with quick_imports(shares_process=shares_process):
        from headrace.runner import build_runner  # torch: the slow import, made in the core only

    executor = LocalExecutor(build_runner(resolved, on_progress, shares_process=shares_process))
    return executor, executor.resolved


def _build_ranks(
    resolved: ResolvedConfig,
    meeting: Meeting | None,
    ranks: BegunRanks,
    on_progress: LoadProgress | None,
    *,
    shares_process: bool,
) -> RankExecutor:
    """Several ranks. Those that have not begun do so before this process loads torch, so that all load it at once."""
    if shares_process and resolved.device == "cuda" and meeting is None:
        raise ConfigError("on cuda several ranks (tp_size) need a core in a process of its own", field="inprocess")
    from headrace.core.rank_node import meet_nodes

    if meeting is None and resolved.engine.nnodes > 1:
        meeting = meet_nodes(resolved)
    num_here = resolved.num_ranks // (meeting.num_guests + 1 if meeting is not None else 1)
    with contextlib.ExitStack() as undo:
        if meeting is not None:
            undo.callback(meeting.close)
        ranks.begin(num_here)
        ranks.settle(resolved)
        with quick_imports(shares_process=shares_process):
            from headrace.core.rank_start import start_ranks
            from headrace.runner import build_runner

        undo.pop_all()

    def build(mesh: Mesh) -> Runner | DeviceRunner:
        return build_runner(resolved, on_progress, shares_process=shares_process, mesh=mesh)

    return start_ranks(resolved, build, ranks.take(), shares_process=shares_process, meeting=meeting)


class LoadProgress:
    """Shows in the pulse how far the start of this core, its first rank, has come; logs it where that takes long."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._next_report: float | None = None

    def __call__(self, stage: str, num_done: int, num_total: int) -> None:
        self._pulse.reach(stage, num_done, num_total)
        now = time.monotonic()
        if self._next_report is None:
            self._next_report = now + _PROGRESS_SECONDS
        if num_total and now >= self._next_report:
            self._next_report = now + _PROGRESS_SECONDS
            logger.info("starting: %d of %d %s", num_done, num_total, "tensors" if stage == "weights" else stage)


def _report_start_failure(link: CoreLink, error: Exception) -> int:
    if isinstance(error, HeadraceError):
        info = error.info()
        logger.error("core cannot start: %s", error)
    elif is_of_lost_device(error):
        info = DeviceLostError(f"the device is lost: {describe(error)}").info()
        logger.exception("core cannot start", exc_info=error)
    else:
        info = InternalError(f"the engine core cannot start: {type(error).__name__}: {error}").info()
        logger.exception("core cannot start", exc_info=error)
    error.__traceback__ = None  # a frame in it that holds the error would keep all that was built
    try:
        link.send(CoreReady(error=info))
    except PeerClosed as reason:
        logger.info("nobody is left to hear it: %s", reason)
    link.close()
    return 1


def _answer_all(loop: CoreLoop, link: CoreLink, error: ErrorInfo) -> None:
    try:
        loop.fail_requests(error)
        link.send(CoreFailed(error))
    except Exception:  # process entry point: what crashed may be what answers; the front answers at end of file
        logger.exception("requests could not be answered")


def _let_go(loop: CoreLoop) -> None:
    """The device first: until it is done with them, shared buffers must stay mapped."""
    try:
        loop.replica.executor.close()
    except Exception:  # process entry point: a device that is lost cannot be closed either
        logger.exception("the device could not be let go")
    loop.replica.update.close()
    loop.replica.groups.close()
    loop.replica.probes.close()
