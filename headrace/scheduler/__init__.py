"""Decides each step as a value: which sequences compute which tokens on which pages. No tensors, no text."""

from headrace.scheduler.limits import SchedulerLimits
from headrace.scheduler.scheduler import BREACHES, Scheduler

__all__ = ["BREACHES", "Scheduler", "SchedulerLimits"]
