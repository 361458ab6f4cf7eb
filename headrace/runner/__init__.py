"""Executes plans: slot table, KV pool, one packed forward, sampling. Ranks execute; they never decide."""

from headrace.runner.runner import Runner

__all__ = ["Runner"]
