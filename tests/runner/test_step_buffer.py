"""The layout of the array that travels with a step, and the ring of its host copies."""

from __future__ import annotations

import pytest
import torch

from headrace.runner.step_buffer import StepBuffer, StepSizes

SIZES = StepSizes(max_tokens=100, max_rows=10, max_cells=7, record_size=5, metadata_size=33)
NAMES = (
    "cell_count", "token_ids", "table_rows", "positions", "sampled_tokens", "sampled_slots", "sampled_positions",
    "cells", "records", "metadata",
)  # fmt: skip


def test_sections_do_not_overlap_and_the_copy_brings_each_to_its_place() -> None:
    buffer = StepBuffer(SIZES, torch.device("cpu"), 2)
    host = buffer.take()
    for value, name in enumerate(NAMES, 1):
        getattr(host.views, name)[:] = value
    host.send(buffer.words, 20)
    for value, name in enumerate(NAMES, 1):
        section = getattr(buffer.views, name)
        assert section.data_ptr() % 256 == buffer.words.data_ptr() % 256
        expected = [value] * (20 if name == "metadata" else section.numel())
        assert section.flatten().tolist()[: len(expected)] == expected
    assert not (buffer.views.metadata[20:] == len(NAMES)).any(), "what is not in use do not travel"


def test_results_arrive_in_the_copy_that_asked() -> None:
    buffer = StepBuffer(SIZES, torch.device("cpu"), 2)
    host = buffer.take()
    buffer.token_ids.copy_(torch.arange(10, dtype=torch.int32))
    buffer.logprobs.copy_(-torch.arange(10) / 4)
    host.receive(buffer.results)
    buffer.results.zero_()
    assert host.token_ids.tolist() == list(range(10)) and host.logprobs[3] == -0.75


def test_a_copy_is_not_handed_out_twice() -> None:
    buffer = StepBuffer(SIZES, torch.device("cpu"), 2)
    first, second = buffer.take(), buffer.take()
    assert first is not second
    with pytest.raises(AssertionError, match="in flight"):
        buffer.take()
    first.is_free = True
    assert buffer.take() is first


def test_an_untouched_buffer_is_all_padding() -> None:
    buffer = StepBuffer(SIZES, torch.device("cpu"), 1)
    assert (buffer.views.table_rows == -1).all() and (buffer.views.sampled_slots == -1).all()
