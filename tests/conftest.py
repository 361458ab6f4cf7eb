"""Shared by all tests: an offline, quiet environment, set before any library reads it."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch

from headrace.telemetry.logs import LIBRARIES, LOGGER_NAME
from tests.quick_interpreter import quicken

gc.disable()  # what is imported and collected stays: see pytest_collection_finish

if not torch.cuda.is_available():
    # Triton kernels then run in its interpreter. Read when triton is first imported, which other libraries do too.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """From here on the garbage collector walks what tests make, not the millions of objects that are there."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Libraries report what is left when the interpreter ends: it is to find all."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """A command that runs in a test sends this process's records to a stream that ends with the test."""
    loggers = [logging.getLogger(name) for name in (None, LOGGER_NAME, *LIBRARIES)]
    before = [(list(each.handlers), each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagate, level) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.fixture(autouse=True)
def quick_interpreter() -> None:
    """Kernels that tests interpret take a third of the time."""
    quicken()


@pytest.fixture(scope="session")
def template() -> Iterator[Any]:
    """What warm processes are forked off."""
    from tests.warm import Template  # it looks at the environment, which is complete by now

    made = Template()
    yield made
    made.close()


@pytest.fixture(scope="module")
def warm_processes(template: Any) -> Iterator[None]:
    """Cores, ranks and trainers begin with torch imported."""
    from tests.warm import warm_starts

    with warm_starts(template):
        yield


@pytest.fixture
def cold_processes() -> Iterator[None]:
    """Processes begin as users start them."""
    from tests.warm import cold_starts

    with cold_starts():
        yield


@pytest.fixture
def dot_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of bits: a dot of Triton's interpreter in which a row's bits depend on no other row.

    Its own is the host's BLAS, where on some CPUs they depend on the row's place in the tile.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # type: ignore[import-untyped]

    def create_dot(_: object, a: Any, b: Any, acc: Any, *__: object) -> Any:
        products = a.data.astype(np.float32)[:, None] * b.data.astype(np.float32).T[None]
        return TensorHandle(np.ascontiguousarray(products).sum(-1) + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
