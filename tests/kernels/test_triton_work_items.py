"""The planner against a plain reading of its rules: every token sees each of its positions once, and once only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headrace.kernels.triton.paged_attention import choose_tiles
from headrace.kernels.triton.work_items import (
    ITEM_SIZE,
    WHOLE,
    AttentionPlanner,
    LaunchBounds,
    TileSizes,
    WorkLimits,
)

LIMITS = WorkLimits(max_tokens=600, max_items=2000, max_partials=3000)
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
    buffer: np.ndarray,
    table_rows: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    groups: np.ndarray,
    page: int = PAGE,
    num_merged: int = LIMITS.max_tokens,
) -> int:
    """Walk every item as the kernel does; returns how many positions are read less than one row each would read."""
    _, num_decode, prefill_first, num_prefill, num_tokens = buffer[:5].tolist()
    assert prefill_first == num_decode and num_tokens == lengths.sum()
    row_of = np.repeat(np.arange(len(starts)), lengths)
    position_of = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    leader = np.arange(len(starts))
    for first, size, _pages in groups.tolist():
        leader[first : first + size] = first
    seen: list[list[tuple[int, int, int]]] = [[] for _ in row_of]
    saved = 0
    items = buffer[LIMITS.items_at :][: ITEM_SIZE * (num_decode + num_prefill)].reshape(-1, ITEM_SIZE).tolist()
    for q_start, num_q, table_row, first, end, part, position, is_prefill in items:
        assert is_prefill in (0, 1) and num_q >= 1 and first < end
        saved += (num_q - 1) * (end - first)
        for at in range(num_q):
            token = q_start + at
            row = int(row_of[token])
            visible = min(end, position + at + 1, int(position_of[token]) + 1)
            assert visible == min(end, int(position_of[token]) + 1), "sees its item's range up to itself"
            shares = end <= next((pages * page for f, _, pages in groups.tolist() if f == leader[row]), 0)
            assert table_row == table_rows[row] or (shares and table_row == table_rows[leader[row]])
            seen[token].append((part, first, visible))
    used = np.zeros(LIMITS.max_partials, np.int64)
    for token, parts in enumerate(seen):
        parts.sort()
        num_parts, first = int(buffer[LIMITS.parts_at + token]), int(buffer[LIMITS.partials_at + token])
        assert [part for part, *_ in parts] == ([WHOLE] if num_parts == 1 else list(range(num_parts)))
        if num_parts > 1:
            used[first : first + num_parts] += 1
        assert parts[0][1] == 0 and max(end for *_, end in parts) == position_of[token] + 1
        for (_, _, end), (_, first, _) in zip(parts, parts[1:], strict=False):
            assert first >= end == min(first, position_of[token] + 1)
    assert used.max() <= 1, "no partial result twice"
    assert not buffer[LIMITS.parts_at :][num_tokens:num_merged].any(), "no part of an absent token"
    return saved


@pytest.mark.parametrize("fixed", [None, 64, 512])
def test_random_steps(fixed: int | None) -> None:
    rng = np.random.default_rng(0)
    planner = AttentionPlanner(LIMITS, TileSizes(4, 4 if fixed else 16), PAGE, 8, fixed)
    for _ in range(60):
        table_rows, starts, lengths, groups = random_step(rng)
        buffer = rng.integers(0, 99, LIMITS.size).astype(np.int32)
        summary = planner.fill(buffer, table_rows, starts, lengths, groups)
        assert summary.num_decode + summary.num_prefill == buffer[1] + buffer[3]
        check(buffer, table_rows, starts, lengths, groups)


def test_a_group_reads_its_shared_pages_once_per_tile() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8)
    rows = np.arange(64)
    groups = np.array([(first, 8, 31) for first in range(0, 64, 8)], np.int32)
    buffer = np.zeros(LIMITS.size, np.int32)
    planner.fill(buffer, rows, np.full(64, 900), np.ones(64, np.int64), groups)
    walked = (np.arange(64), np.full(64, 900), np.ones(64, np.int64), groups)
    assert check(buffer, *walked) >= 8 * 7 * 496


def test_longest_items_come_first_in_each_class() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(4, 16), PAGE, 8)
    rng = np.random.default_rng(3)
    buffer = np.zeros(LIMITS.size, np.int32)
    lengths = np.where(np.arange(30) % 10 == 0, 30, 1)
    summary = planner.fill(buffer, np.arange(30), rng.integers(0, 3000, 30), lengths, np.zeros((0, 3), np.int32))
    items = buffer[LIMITS.items_at : summary.size].reshape(-1, ITEM_SIZE)
    sizes = items[:, 4] - items[:, 3]
    for part in (sizes[: summary.num_decode], sizes[summary.num_decode :]):
        assert len(part) and (np.diff(part) <= 0).all()


def plain_items(
    planner_split: int, table_rows: np.ndarray, starts: np.ndarray, groups: list[tuple[int, int, int]], width: int
) -> list[list[int]]:
    """Items of one-token rows by the rules: groups before rows, each in order of position, then the longest first."""
    found: list[list[int]] = []
    shared = dict.fromkeys(range(len(starts)), 0)
    for first, size, pages in groups:
        positions = min(pages * PAGE, *starts[first : first + size].tolist()) // PAGE * PAGE
        if size < 2 or positions < 64:
            continue
        shared.update(dict.fromkeys(range(first, first + size), positions))
        for token in range(first, first + size, width):
            num_q = min(width, first + size - token)
            for part, at in enumerate(range(0, positions, planner_split)):
                end = min(at + planner_split, positions)
                found.append([token, num_q, int(table_rows[first]), at, end, part, positions, 0])
    for row, start in enumerate(starts.tolist()):
        parts = range(shared[row], start + 1, planner_split)
        before = -(-shared[row] // planner_split)
        for part, at in enumerate(parts, before):
            end = min(at + planner_split, start + 1)
            whole = before + len(parts) == 1
            found.append([row, 1, int(table_rows[row]), at, end, WHOLE if whole else part, start, 0])
    return sorted(found, key=lambda item: item[3] - item[4])


def test_the_items_of_decode_rows_are_those_of_the_rules() -> None:
    rng = np.random.default_rng(8)
    planner = AttentionPlanner(LIMITS, TileSizes(4, 16), PAGE, 8)
    for _ in range(40):
        table_rows, starts, lengths, groups = random_step(rng)
        lengths[:] = 1
        buffer = np.zeros(LIMITS.size, np.int32)
        summary = planner.fill(buffer, table_rows, starts, lengths, groups)
        items = buffer[LIMITS.items_at : summary.size].reshape(-1, ITEM_SIZE).tolist()
        assert items == plain_items(summary.split, table_rows, starts, [tuple(group) for group in groups.tolist()], 4)


def test_cutting_gives_way_to_what_fits() -> None:
    lengths, starts = np.ones(64, np.int64), np.full(64, 3000)
    arguments = np.arange(64), starts, lengths, np.zeros((0, 3), np.int32)
    for fixed in (None, 64):
        planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8, fixed)
        buffer = np.zeros(LIMITS.size, np.int32)
        assert 64 <= planner.fill(buffer, *arguments, LaunchBounds(130, 0, 64)).num_decode <= 130
        with pytest.raises(ValueError, match="do not fit"):
            planner.fill(buffer, *arguments, LaunchBounds(63, 0, 64))
        with pytest.raises(ValueError, match="do not fit"):
            planner.fill(buffer, *arguments, LaunchBounds(130, 0, 63))


def step_of(
    rng: np.random.Generator, num_rows: int, num_tokens: int, longest: int, page: int, decode_tile: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Any step of at most so many rows and tokens, the extremes often; every context ends within `longest`."""
    rows = num_rows if rng.random() < 0.5 else int(rng.integers(1, num_rows + 1))
    lengths, room, kind = np.ones(rows, np.int64), num_tokens - rows, rng.integers(4)
    if kind == 0:
        lengths[rng.integers(rows)] += room
    elif kind == 1:  # as many rows as possible that want prefill tiles
        prefill_rows = max(1, min(rows, num_tokens // (decode_tile + 1)))
        lengths[:prefill_rows] = min(decode_tile + 1, 1 + room // prefill_rows)
    elif kind == 2:
        lengths += rng.multinomial(int(rng.integers(room + 1)), np.ones(rows) / rows)
    latest = np.maximum(longest - lengths, 0)
    starts = (latest, rng.integers(0, latest + 1), np.where(rng.random(rows) < 0.5, latest, 0))[rng.integers(3)]
    groups, row = [], 0
    while row < rows:
        size = min(int(rng.integers(1, 20)), rows - row)
        if rng.random() < 0.7:
            groups.append((row, size, int(starts[row : row + size].min()) // page))
        row += size
    return rng.permutation(600)[:rows], starts, lengths, np.array(groups, np.int32).reshape(-1, 3)


@pytest.mark.parametrize("fixed", [None, 64, 256])
def test_bounds_hold_every_step_of_their_size(fixed: int | None) -> None:
    rng = np.random.default_rng(5)
    for turn in range(150):
        limits = WorkLimits(600, 2000, int(rng.choice([64, 3000])))
        group_size, page, longest = (int(rng.choice(sizes)) for sizes in ((1, 2, 7, 16), (1, 16, 64), (64, 900, 40000)))
        walkers, kv = int(rng.choice([0, 132])), int(rng.choice([1, 8]))
        tiles = TileSizes(16 // group_size, 128 // group_size, walkers)
        planner = AttentionPlanner(limits, tiles, page, kv, fixed, longest if turn % 2 else None)
        num_tokens = int(rng.choice([1, 8, 64, 65, 300, 512]))
        num_rows = int(rng.choice([num_tokens, max(1, num_tokens // 7)]))
        is_decode = num_rows == num_tokens and turn % 3 == 0
        bounds = planner.bounds(num_rows, num_tokens, is_decode=is_decode)
        assert bounds.decode + bounds.prefill <= limits.max_items and bounds.merged == num_tokens
        for _ in range(4):
            size = num_rows if is_decode else num_tokens
            step = step_of(rng, num_rows, size, longest, page, tiles.decode)
            if is_decode:
                step[2][:] = 1
            buffer = rng.integers(0, 99, limits.size).astype(np.int32)
            summary = planner.fill(buffer, *step, bounds=bounds)
            assert summary.num_decode <= bounds.decode and summary.num_prefill <= bounds.prefill
            assert summary.num_partials <= limits.max_partials
            if turn % 10 == 0 and limits.max_partials == LIMITS.max_partials:
                check(buffer, *step, page, num_merged=num_tokens)


def test_bounds_are_not_wasteful() -> None:
    planner = AttentionPlanner(WorkLimits(8192, 8192, 16384), TileSizes(8, 64), PAGE, 8)
    for num_rows in (1, 8, 64, 256, 512):
        bounds = planner.bounds(num_rows, num_rows, is_decode=True)
        assert bounds.prefill == 0 and bounds.decode <= max(256, 3 * num_rows)
    assert planner.bounds(1, 1).decode * 8 <= 396, "the variant for few programs"
    assert planner.bounds(3, 8192).decode * 8 <= 1056, "few prompts have prefill items"
    mixed = planner.bounds(512, 2048)
    assert mixed.decode <= 1024 and mixed.prefill <= 256
    assert planner.bounds(1, 1).prefill == planner.bounds(64, 64).prefill == 0
    with_limit = AttentionPlanner(planner.limits, TileSizes(8, 64), PAGE, 8, max_positions=256)
    assert with_limit.bounds(1, 1).decode <= 5


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 7, 8, 12, 16, 32, 71, 128])
def test_every_step_size_that_may_be_set_has_room(group_size: int) -> None:
    """Also thousands of rows, and prompts of 131,072 tokens in one step."""
    for dtype, invariant in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        sizes = choose_tiles(group_size, 128, dtype, invariant=invariant).tokens(group_size)
        if dtype == torch.bfloat16 and not invariant:
            sizes = replace(sizes, walkers=132)  # as on Hopper: room for more items than elsewhere
        for max_tokens in (1, 100, 2048, 4096, 8192, 16384, 1 << 17):
            for kv in (1, 8, 32):
                fixed = 256 if invariant else None
                planner = AttentionPlanner(WorkLimits.of_steps(max_tokens), sizes, PAGE, kv, fixed, max_positions=40960)
                for num_rows in (1, 64, 512, max_tokens):
                    planner.bounds(min(num_rows, max_tokens), max_tokens)
                planner.bounds(max_tokens, max_tokens, is_decode=True)


def test_bounds_say_where_the_limits_are_too_small() -> None:
    planner = AttentionPlanner(WorkLimits(600, 100, 3000), TileSizes(8, 64), PAGE, 8)
    with pytest.raises(ValueError, match="do not fit"):
        planner.bounds(101, 101)
    with pytest.raises(ValueError, match="do not fit"):
        planner.bounds(1, 601)


def test_a_decode_step_keeps_its_cut_in_bounds() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(8, 64), PAGE, 8)
    starts = np.random.default_rng(2).integers(450, 1350, 256)
    arguments = np.arange(256), starts, np.ones(256, np.int64), np.zeros((0, 3), np.int32)
    free, bound = np.zeros(LIMITS.size, np.int32), np.zeros(LIMITS.size, np.int32)
    bounds = planner.bounds(256, 256, is_decode=True)
    assert planner.fill(free, *arguments) == planner.fill(bound, *arguments, bounds)
    assert (free == bound).all()


def test_full_parts_of_a_decode_step_run_at_once() -> None:
    """A device that holds 1,056 programs starts every part of full length together; shorter ones fill the gaps."""
    rng = np.random.default_rng(8)
    for kv in (2, 4, 8):
        planner = AttentionPlanner(WorkLimits(512, 8192, 16384), TileSizes(8, 64), PAGE, kv)
        buffer, num_cut = np.zeros(planner.limits.size, np.int32), 0
        for _ in range(100):
            num_rows = int(rng.integers(133 * 8 // (4 * kv) + 1, 513))
            starts = rng.integers(0, int(rng.choice([300, 3000, 30000])), num_rows)
            bounds = planner.bounds(num_rows, num_rows, is_decode=True)
            ones = np.ones(num_rows, np.int64)
            summary = planner.fill(buffer, np.arange(num_rows), starts, ones, np.zeros((0, 3), np.int32), bounds)
            items = buffer[planner.limits.items_at : summary.size].reshape(-1, ITEM_SIZE)
            lengths = items[:, 4] - items[:, 3]
            assert lengths.sum() == (starts + 1).sum() and (lengths <= summary.split).all()
            assert np.count_nonzero(lengths == summary.split) <= 1056 // kv
            num_cut += summary.num_decode > num_rows
        assert num_cut > 10


@pytest.mark.parametrize(
    ("kv", "contexts"), [(8, [60000] * 8), (8, [60000] * 3), (8, [60000, 41000, 8000, 300]), (2, [60000]), (1, [30000])]
)
def test_few_rows_are_cut_as_evenly_as_their_launch_holds(kv: int, contexts: list[int]) -> None:
    """Their programs all run at once, so the longest decides: no split of whole blocks makes it shorter."""
    planner = AttentionPlanner(LIMITS, TileSizes(8, 64), PAGE, kv)
    buffer, rows = np.zeros(LIMITS.size, np.int32), np.arange(len(contexts))
    bounds = planner.bounds(len(rows), len(rows), is_decode=True)
    none = np.zeros((0, 3), np.int32)
    summary = planner.fill(buffer, rows, np.array(contexts) - 1, np.ones_like(rows), none, bounds)
    shorter = summary.split - 64
    fits = sum(-(-context // shorter) for context in contexts) <= bounds.decode
    assert summary.num_decode <= bounds.decode and (shorter * bounds.decode <= sum(contexts) or not fits)


def walks_of(items: np.ndarray, kv: int, walkers: int) -> np.ndarray:
    """Positions that each walker sees, which go there and back over (item, KV head)."""
    sizes = (items[:, 4] - items[:, 3]).repeat(kv)
    walks = np.zeros(walkers, np.int64)
    for at, size in enumerate(sizes):
        turn, place = divmod(at, walkers)
        walks[place if turn % 2 == 0 else walkers - 1 - place] += size
    return walks


@pytest.mark.parametrize(("kv", "starts", "lengths"), [
    (8, [16384], [2048]), (2, [16384], [2048]), (4, [0], [4096]), (8, [60000], [300]), (1, [20000, 30], [2000, 3000]),
])  # fmt: skip
def test_walkers_end_together(kv: int, starts: list[int], lengths: list[int]) -> None:
    tiles = TileSizes(4, 32, 132)
    planner = AttentionPlanner(WorkLimits(8192, 8192, 16384), tiles, PAGE, kv)
    rows, buffer = np.arange(len(starts)), np.zeros(planner.limits.size, np.int32)
    bounds = planner.bounds(len(starts), sum(lengths))
    summary = planner.fill(buffer, rows, np.array(starts), np.array(lengths), np.zeros((0, 3), np.int32), bounds)
    items = buffer[planner.limits.items_at : summary.size].reshape(-1, ITEM_SIZE)[summary.num_decode :]
    assert not (items[:, 3] % 64).any(), "parts begin at whole pages"
    walks = walks_of(items, kv, 132)
    assert walks.max() < 1.11 * walks.mean(), "of one part each, or of as many as it takes and are worth their cost"


def test_prompts_that_keep_walkers_busy_are_left_whole() -> None:
    planner = AttentionPlanner(WorkLimits(8192, 8192, 16384), TileSizes(4, 32, 132), PAGE, 8)
    buffer = np.zeros(planner.limits.size, np.int32)
    summary = planner.fill(
        buffer, np.arange(1), np.array([16384]), np.array([4096]), np.zeros((0, 3), np.int32), planner.bounds(1, 4096)
    )
    assert (summary.num_prefill, summary.num_partials) == (128, 0)


def test_a_step_without_rows() -> None:
    planner = AttentionPlanner(LIMITS, TileSizes(8, 32), PAGE, 8)
    empty = np.zeros(0, np.int64)
    buffer = np.ones(LIMITS.size, np.int32)
    summary = planner.fill(buffer, empty, empty, empty, np.zeros((0, 3), np.int32))
    assert (summary.num_decode, summary.num_prefill, summary.num_partials) == (0, 0, 0) and not buffer[:5].any()
