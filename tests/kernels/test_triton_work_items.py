"""The planner against a plain reading of its rules: every token sees each of its positions once, and once only."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.kernels.triton.work_items import ITEM_WORDS, WHOLE, AttentionPlanner, TileSizes, WorkLimits

LIMITS = WorkLimits(max_tokens=600, max_items=2000, max_slots=3000)
PAGE = 16


def random_step(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Table rows, starts, lengths and groups of a step of up to 40 rows."""
    num_rows = int(rng.integers(1, 40))
    starts = np.where(rng.random(num_rows) < 0.3, 0, rng.integers(0, 3000, num_rows))
    lengths = np.where(rng.random(num_rows) < 0.8, 1, rng.integers(1, 40, num_rows))
    groups, row = [], 0
    while row < num_rows:
        size = min(int(rng.integers(1, 12)), num_rows - row)
        if rng.random() < 0.5:
            groups.append((row, size, int(starts[row : row + size].min()) // PAGE))
        row += size
    return rng.permutation(100)[:num_rows], starts, lengths, np.array(groups, np.int32).reshape(-1, 3)


def check(
    buffer: np.ndarray, table_rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, groups: np.ndarray
) -> int:
    """Walk every item as the kernel does; returns how many positions are read less than one row each would read."""
    _, num_narrow, wide_first, num_wide, num_tokens = buffer[:5].tolist()
    assert wide_first == num_narrow and num_tokens == lengths.sum()
    row_of = np.repeat(np.arange(len(starts)), lengths)
    position_of = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    leader = np.arange(len(starts))
    for first, size, _pages in groups.tolist():
        leader[first : first + size] = first
    seen: list[list[tuple[int, int, int]]] = [[] for _ in row_of]
    saved = 0
    items = buffer[LIMITS.items_at :][: ITEM_WORDS * (num_narrow + num_wide)].reshape(-1, ITEM_WORDS).tolist()
    for q_start, num_q, table_row, first, end, part, position, is_wide in items:
        assert is_wide in (0, 1) and num_q >= 1 and first < end
        saved += (num_q - 1) * (end - first)
        for at in range(num_q):
            token = q_start + at
            row = int(row_of[token])
            visible = min(end, position + at + 1, int(position_of[token]) + 1)
            assert visible == min(end, int(position_of[token]) + 1), "sees its item's range up to itself"
            shares = end <= next((pages * PAGE for f, _, pages in groups.tolist() if f == leader[row]), 0)
            assert table_row == table_rows[row] or (shares and table_row == table_rows[leader[row]])
            seen[token].append((part, first, visible))
    slots = np.zeros(LIMITS.max_slots, np.int64)
    for token, parts in enumerate(seen):
        parts.sort()
        num_parts, slot = int(buffer[LIMITS.parts_at + token]), int(buffer[LIMITS.slots_at + token])
        assert [part for part, *_ in parts] == ([WHOLE] if num_parts == 1 else list(range(num_parts)))
        if num_parts > 1:
            slots[slot : slot + num_parts] += 1
        assert parts[0][1] == 0 and max(end for *_, end in parts) == position_of[token] + 1
        for (_, _, end), (_, first, _) in zip(parts, parts[1:], strict=False):
            assert first >= end == min(first, position_of[token] + 1)
    assert slots.max() <= 1, "no slot twice"
    assert not buffer[LIMITS.parts_at + num_tokens : LIMITS.items_at].any(), "no part of an absent token"
    return saved


@pytest.mark.parametrize("fixed", [None, 64, 512])
def test_random_steps(fixed: int | None) -> None:
    rng = np.random.default_rng(0)
    planner = AttentionPlanner(LIMITS, TileSizes(4, 4 if fixed else 16), PAGE, 8, fixed)
    for _ in range(60):
        table_rows, starts, lengths, groups = random_step(rng)
        buffer = rng.integers(0, 99, LIMITS.num_words).astype(np.int32)
        summary = planner.fill(buffer, table_rows, starts, lengths, groups)
        assert summary.num_narrow + summary.num_wide == buffer[1] + buffer[3]
        check(buffer, table_rows, starts, lengths, groups)


def test_a_group_reads_its_shared_pages_once_per_tile() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8)
    rows = np.arange(64)
    groups = np.array([(first, 8, 31) for first in range(0, 64, 8)], np.int32)
    buffer = np.zeros(LIMITS.num_words, np.int32)
    planner.fill(buffer, rows, np.full(64, 900), np.ones(64, np.int64), groups)
    walked = (np.arange(64), np.full(64, 900), np.ones(64, np.int64), groups)
    assert check(buffer, *walked) >= 8 * 7 * 496


def test_longest_items_come_first_in_each_class() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(4, 16), PAGE, 8)
    rng = np.random.default_rng(3)
    buffer = np.zeros(LIMITS.num_words, np.int32)
    lengths = np.where(np.arange(30) % 10 == 0, 30, 1)
    summary = planner.fill(buffer, np.arange(30), rng.integers(0, 3000, 30), lengths, np.zeros((0, 3), np.int32))
    items = buffer[LIMITS.items_at : summary.num_words].reshape(-1, ITEM_WORDS)
    sizes = items[:, 4] - items[:, 3]
    for part in (sizes[: summary.num_narrow], sizes[summary.num_narrow :]):
        assert len(part) and (np.diff(part) <= 0).all()


def test_cutting_gives_way_to_what_fits() -> None:
    lengths, starts = np.ones(64, np.int64), np.full(64, 3000)
    arguments = np.arange(64), starts, lengths, np.zeros((0, 3), np.int32)
    for fixed in (None, 64):
        planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8, fixed)
        buffer = np.zeros(LIMITS.num_words, np.int32)
        assert planner.fill(buffer, *arguments, max_items=130).num_narrow <= 130
        with pytest.raises(ValueError, match="do not fit"):
            planner.fill(buffer, *arguments, max_items=63)


def test_a_step_without_rows() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8)
    empty = np.zeros(0, np.int64)
    buffer = np.ones(LIMITS.num_words, np.int32)
    summary = planner.fill(buffer, empty, empty, empty, np.zeros((0, 3), np.int32))
    assert (summary.num_narrow, summary.num_wide, summary.num_slots) == (0, 0, 0) and not buffer[:5].any()
