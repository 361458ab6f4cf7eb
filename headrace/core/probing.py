"""What is done to the steps of a core for whoever looks at it: they are slowed down, or traced.

Owns what stands around a step while that is asked for. While nothing is, nothing does, and the stepper calls the
executor itself.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.executor import Executor
from headrace.core.stepping import Stepper
from headrace.types.errors import HeadraceError, RequestError, UnavailableError, UpdateConflictError
from headrace.types.plan import StepPlan, StepResult
from headrace.types.profile import ProfileTerms

if TYPE_CHECKING:
    from headrace.runner.tracing import Trace

logger = logging.getLogger(__name__)


class Probes:
    """What looks at one replica. `profile` and `stop_profile` return the file of the trace."""

    def __init__(self, stepper: Stepper, executor: Executor) -> None:
        self._stepper = stepper
        self._executor = executor
        self._seconds = 0.0
        self._trace: Trace | None = None
        self._num_left = 0  # steps to trace; 0: until it is stopped
        self._path = ""
        self._problem: HeadraceError | None = None  # of a trace that ended by itself
        self._own_folder = ""

    def slow_down(self, seconds: float) -> None:
        """Wait so long before each step; 0: no more."""
        self._seconds = seconds
        self._stand()

    def profile(self, terms: ProfileTerms) -> str:
        """Trace from now on. `UpdateConflictError` if a trace goes on; raises as `Trace`."""
        from headrace.runner.tracing import Trace  # torch: the core has it, this module's importers need not

        if self._trace is not None:
            raise UpdateConflictError(f"a profile is being taken: {self._path}; stop it first", field="profile")
        path = self._new_file(terms)
        self._trace = Trace(terms)
        self._path, self._problem, self._num_left = path, None, terms.num_steps
        self._stand()
        return path

    def stop_profile(self) -> str:
        """End the trace and write it, unless it has ended by itself. `UpdateConflictError` if there was none."""
        if self._trace is not None:
            self._end()
        elif not self._path:
            raise UpdateConflictError("no profile is being taken", field="profile")
        if self._problem is not None:
            raise self._problem
        return self._path

    def close(self) -> None:
        """Trace no more: the core is ending."""
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.stop()

    def _end(self) -> None:
        trace, self._num_left = self._trace, 0
        self.close()
        self._stand()
        assert trace is not None
        try:
            trace.write(self._path)
        except (OSError, RuntimeError) as error:
            self._problem = UnavailableError(f"the profile could not be written to {self._path}: {error}")
            logger.error("%s", self._problem.message)

    def _new_file(self, terms: ProfileTerms) -> str:
        try:
            if terms.folder:
                os.makedirs(terms.folder, exist_ok=True)
            elif not self._own_folder:
                self._own_folder = tempfile.mkdtemp(prefix="headrace-profile-")
        except OSError as error:
            raise RequestError(f"output_dir: {error}", field="output_dir") from None
        name = terms.name or f"{time.time():.0f}-{secrets.token_hex(4)}"
        path = Path(terms.folder or self._own_folder) / f"{name}-TP-0.trace.json.gz"
        if path.exists():
            raise RequestError(f"profile_id: there is a {path}", field="profile_id")
        return str(path)

    def _stand(self) -> None:
        """Around the steps, where something is asked for."""
        self._stepper.submit = self._submit if self._seconds else self._executor.submit
        self._stepper.collect = self._collect if self._num_left else self._executor.collect

    def _submit(self, plan: StepPlan) -> None:
        time.sleep(self._seconds)
        self._executor.submit(plan)

    def _collect(self) -> StepResult:
        try:
            return self._executor.collect()
        finally:
            self._num_left -= 1
            if not self._num_left:
                self._end()
