"""The public names, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import headrace
from headrace import AsyncEngine, Engine

METHODS = {
    "abort",
    "abort_update",
    "begin_update",
    "chat",
    "collective_rpc",
    "commit",
    "destroy_weights_update_group",
    "digest",
    "flush_cache",
    "freeze_gc",
    "generate",
    "get_weights_by_name",
    "give_rewards",
    "init_weights_update_group",
    "metrics",
    "pause",
    "release_memory_occupation",
    "resume",
    "resume_memory_occupation",
    "save_model",
    "save_remote_model",
    "save_sharded_model",
    "score",
    "set_weight_version",
    "shutdown",
    "slow_down",
    "stage",
    "stage_from_group",
    "start_profile",
    "status",
    "stop_profile",
    "stream",
    "update_weights_from_bucket",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "wait_ended",
    "weights_checker",
}
ATTRIBUTES = {"config", "is_alive", "is_ready", "is_responsive", "resolved", "tokenizer", "version"}


def test_every_public_name_is_there() -> None:
    assert len(set(headrace.__all__)) == len(headrace.__all__)
    for name in headrace.__all__:
        assert hasattr(headrace, name)
    assert {"AsyncEngine", "Engine", "EngineConfig", "Generation", "HeadraceError", "SamplingParams"} <= {
        *headrace.__all__
    }


def test_both_engines_have_the_same_methods_with_the_same_arguments() -> None:
    for name in METHODS:
        blocking, asynchronous = getattr(Engine, name), getattr(AsyncEngine, name)
        assert list(inspect.signature(blocking).parameters) == list(inspect.signature(asynchronous).parameters), name
        assert inspect.getdoc(asynchronous) and inspect.getdoc(blocking), name
        assert not inspect.iscoroutinefunction(blocking), name
        assert inspect.iscoroutinefunction(asynchronous) or inspect.isasyncgenfunction(asynchronous), name


def test_both_engines_have_the_same_attributes(engine: Engine) -> None:
    for name in ATTRIBUTES:
        assert getattr(engine, name) is getattr(engine.asynchronous, name)


def test_public_methods_are_listed_here() -> None:
    public = {name for name, member in vars(Engine).items() if not name.startswith("_") and inspect.isfunction(member)}
    assert public == METHODS


def test_importing_headrace_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "starlette", "uvicorn", "huggingface_hub", "tokenizers", "zmq")
    code = f"import sys, headrace; headrace.Engine; print([name for name in {heavy!r} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
