"""A replica's core: the step loop, its commands, the process it runs in. Imports no torch before it builds a runner."""

from headrace.core.executor import Executor, LocalExecutor
from headrace.core.faults import StepError
from headrace.core.loop import CoreLoop
from headrace.core.service import serve_core

__all__ = ["CoreLoop", "Executor", "LocalExecutor", "StepError", "serve_core"]
