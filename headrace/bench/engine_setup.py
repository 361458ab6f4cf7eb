"""Which engine a benchmark runs and on what machine: the model's folder, the settings, and what a report says of both.

Owns what all benchmarks of a whole engine have in common before the clock starts. Loads no torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace import __version__
from headrace.bench.models import WEIGHTLESS_SHAPES, write_config, write_model
from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.engine.core_host import model_folder

_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python")
_GIT_SECONDS = 10.0
_SEED = 0


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark was asked to run. `engine` are engine settings, which win over the benchmark's own.

    `model` is a folder or hub id; None makes a model of `shape` on the spot: with random weights in a file for the
    small shapes, without a file (`load_format="dummy"`) for the public ones.
    """

    model: str | None = None
    shape: str = "small"
    engine: dict[str, Any] = {}


class Prepared(msgspec.Struct, frozen=True):
    """A setup made ready: `settings` are keywords of `Engine(folder, **settings)`, `resolved` what they amount to."""

    folder: Path
    settings: dict[str, Any]
    resolved: ResolvedConfig

    @property
    def is_cpu(self) -> bool:
        """True where workloads have to be scaled down to end today."""
        return self.resolved.device == "cpu"

    def with_defaults(self, **defaults: Any) -> dict[str, Any]:
        """Settings that the benchmark chooses unless the user did."""
        return {**defaults, **self.settings}


def prepare(setup: EngineSetup, scratch: Path, *, needs_file: bool = False, dummy: bool = False) -> Prepared:
    """Make the model's folder below `scratch` and decide the settings, with the same seed every time.

    `needs_file` writes weights whatever the shape, for somebody else who reads them; `dummy` writes none, whatever the
    shape. Raises `ConfigError` and its kin. Torch threads sleep while they wait unless `OMP_WAIT_POLICY` says otherwise
    (threads that spin make figures depend on whatever else runs): set here, before torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = {"skip_tokenizer_init": True, "seed": _SEED, **setup.engine}
    load_format = settings.get("load_format")
    is_weightless = setup.shape in WEIGHTLESS_SHAPES and load_format in (None, "auto")
    if setup.model is not None:
        folder = model_folder(setup.model)
    elif not needs_file and (dummy or load_format == "dummy" or is_weightless):
        folder = write_config(scratch / setup.shape, setup.shape)
        settings["load_format"] = "dummy"
    else:
        folder = write_model(scratch / setup.shape, setup.shape)
    return Prepared(folder, settings, resolve(EngineConfig.from_dict({"model": str(folder), **settings}), folder))


def describe(setup: EngineSetup, prepared: Prepared) -> dict[str, Any]:
    """Of which engine, of what versions, on what machine a figure is."""
    resolved = prepared.resolved
    found: dict[str, Any] = {
        "model": setup.model or setup.shape,
        "device": resolved.device,
        "gpu": resolved.cuda.name if resolved.cuda is not None else None,
        "dtype": resolved.dtype,
        "kv_dtype": resolved.kv_dtype,
        "numerics": resolved.engine.numerics,
        "attention_backend": resolved.attention_backend,
        "num_threads": resolved.num_threads,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"].lower(),
        "settings": dict(setup.engine),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return {name: value for name, value in found.items() if value is not None}


def metric_deltas(before: Mapping[str, float], after: Mapping[str, float], num_runs: int) -> dict[str, float]:
    """What the engine counted, per run; whatever a device also tells of itself, by its own names.

    `num_compiled_after_ready` is the count since start: it has to be 0.
    """

    def per_run(name: str) -> float:
        return (after[name] - before.get(name, 0.0)) / num_runs

    always = ("num_steps", "num_cached_tokens", "num_preemptions", "num_overshoot_tokens", "num_failed_steps")
    found = {name: per_run(name) for name in always if name in after}
    found |= {name: round(per_run(name), 4) for name in ("gpu_busy_s", "gpu_idle_s") if name in after}
    if found.get("gpu_busy_s"):
        found["gpu_idle_share"] = round(found["gpu_idle_s"] / (found["gpu_busy_s"] + found["gpu_idle_s"]), 4)
    absolute = [name for name in after if name == "num_compiled_after_ready" or name.startswith("peak_")]
    return {**found, **{name: after[name] for name in absolute}}


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Engine settings as words of a `headrace` command line."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False:
            words += [f"--no-{flag}"] if defaults[name] is True else []
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def versions() -> dict[str, str]:
    """Versions of what computes, as installed."""
    found = {"headrace": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree this runs from, with "+" if files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
