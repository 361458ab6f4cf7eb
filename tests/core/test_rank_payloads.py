"""What another engine's client shares with each of two ranks: each reads its own payload, where there are several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from headrace.core.rank_executor import RankExecutor
from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import CudaHandle, Payload
from headrace.types.messages import AbortUpdate, CommitUpdate, Digest, ExtendUpdate, StagePayload
from headrace.types.weights import UpdateReport
from tests.core.harness import Core
from tests.core.ranks import STAGES, start_two
from tests.core.test_payloads import front as front
from tests.core.test_payloads import is_held, share
from tests.core.test_rank_executor import CORE, NEW, OLD, SETTINGS, Tensors, digests_of, update
from tests.core.test_rank_executor import folder as folder
from tests.weights.foreign_payloads import flattened

HANDLE = CudaHandle(0, bytes(66), 8, 0, "/torch_1_2_3", 0, bytes(64), True)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[RankExecutor]:
    executor = start_two(folder, SETTINGS)
    yield executor
    executor.close()


def begin(core: Core, payload: Payload) -> tuple[int, Payload, tuple[int, ...]]:
    manifest = tuple(payload.manifest())
    session = core.begin_open("shadow")
    core.call(ExtendUpdate, session, manifest, kind=Any)
    return session, payload, tuple(range(len(manifest)))


def pair(tensors: Tensors, other: Tensors) -> Payload:
    return msgspec.structs.replace(share(flattened, tensors), of_ranks=(share(flattened, other),))


def test_each_rank_reads_its_own(ranks: RankExecutor) -> None:
    """As shows where the second has a value that the first has not."""
    core = Core(ranks, **CORE)
    name = "model.layers.1.mlp.up_proj.weight"
    bad = NEW | {name: NEW[name].clone()}
    bad[name][-1, -1] = torch.nan
    refusal = core.refused(StagePayload, *(failed := begin(core, pair(NEW, bad))))
    assert refusal.field == name and "NaN" in refusal.message and "on rank 1" in refusal.message
    core.call(AbortUpdate, failed[0])
    payload = pair(NEW, NEW)
    session = begin(core, payload)
    core.call(StagePayload, *session)
    assert not is_held(payload) and not is_held(payload.of_ranks[0])
    core.call(CommitUpdate, session[0], kind=UpdateReport)
    assert core.call(Digest, kind=dict[str, str]) == digests_of(NEW)
    update(core, OLD, "old")


def test_what_one_rank_cannot_open_is_open_on_none(ranks: RankExecutor) -> None:
    core = Core(ranks, **CORE)
    payload = pair(NEW, NEW)
    gone = msgspec.structs.replace(payload.of_ranks[0], paths=("/dev/shm/none",))
    payload = msgspec.structs.replace(payload, of_ranks=(gone,))
    refusal = core.refused(StagePayload, *(session := begin(core, payload)))
    assert "cannot be opened" in refusal.message and "on rank 1" in refusal.message and not is_held(payload)
    core.call(AbortUpdate, session[0])
    update(core, OLD, "old")
    assert core.call(Digest, kind=dict[str, str]) == digests_of(OLD)


def test_memory_of_devices_is_not_for_several_stages(folder: Path) -> None:
    executor = start_two(folder, SETTINGS | STAGES)
    try:
        (bucket,) = share(flattened, NEW).buckets
        bucket = msgspec.structs.replace(bucket, memory=msgspec.structs.replace(bucket.memory, storage=HANDLE))
        with pytest.raises(WeightUpdateError, match="several stages") as refusal:
            executor.weights.open_payload(Payload(buckets=(bucket,)))
        assert refusal.value.field == "serialized_named_tensors"
    finally:
        executor.close()
