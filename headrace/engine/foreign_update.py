"""A bucket of an update as other engines' clients send it: bytes that say in which memory of theirs the tensors are.

Owns the way from the bytes to `JoinedUpdate`, and the files that they name: it takes those over before anything else,
so that whatever becomes of the call and of the core, nothing of them is left. What the bytes mean is
`headrace.weights.foreign`; the memory is read by the core. Must not know HTTP or torch.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Sequence

import msgspec

from headrace.engine.calls import outlast
from headrace.engine.control import UpdateTerms
from headrace.engine.groups import load_format_of
from headrace.engine.joined_update import JoinedUpdate
from headrace.engine.sender import Sender
from headrace.engine.update import Updater
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import HeadraceError, WeightUpdateError
from headrace.types.foreign import FIELD, Payload, SharedFile
from headrace.types.weights import UpdateReport
from headrace.weights.foreign import read_payload
from headrace.weights.foreign_files import TakenFiles
from headrace.weights.weight_map import is_recomputed


async def add_payload(
    joined: JoinedUpdate,
    updater: Updater,
    encoded: Sequence[str],
    load_format: str | None,
    terms: UpdateTerms,
    device: str,
) -> UpdateReport | None:
    """What `JoinedUpdate.add` makes of payloads in base64, for an engine on `device`: one for each of its ranks, in
    order, all with the same whole tensors. Where any is in memory of a CUDA device, each rank reads its own payload;
    else all read the first. Whatever is wrong with it ends the update. Memory that they name is given back in any
    case."""
    taken: list[TakenFiles] = []
    taking = asyncio.get_running_loop().run_in_executor(None, _take, encoded, taken)
    try:
        try:
            await asyncio.wait([taking])
            payload = taking.result()
            _check(payload, load_format, device)
        except BaseException:  # whatever it is, as in `add`
            await joined.end()
            raise

        async def stage(session: UpdateSession, indices: Sequence[int]) -> None:
            await updater.stage_payload(session, payload, indices)

        return await joined.add(payload.manifest(), terms, stage, sender=Sender("payload", _process_of(payload)))
    finally:
        await outlast(_close(taking, taken))


def _take(encoded: Sequence[str], taken: list[TakenFiles]) -> Payload:
    """The first payload, whose files are the first ones of `taken`, with those of further ranks where they are read.
    Whatever is wrong with one, all are given back."""
    problems: list[HeadraceError] = []
    for rank, each in enumerate(encoded):
        try:
            payload = _kept(read_payload(_decoded(each), rank))
        except HeadraceError as error:
            problems.append(error)
            continue
        try:
            taken.append(TakenFiles(payload))
        except HeadraceError as error:
            problems += [error] if rank == 0 else []
    if problems:
        raise problems[0]
    first, *others = [each.payload for each in taken]
    if not any(each.has_cuda_memory for each in (first, *others)):
        return first
    for rank, other in enumerate(others, 1):
        if other.manifest() != first.manifest():
            raise WeightUpdateError(f"the payload of rank {rank} has other tensors than that of rank 0", field=FIELD)
    return msgspec.structs.replace(first, of_ranks=tuple(others))


def _decoded(payload: str) -> bytes:
    try:
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError:
        raise WeightUpdateError("the payload is not base64", field=FIELD) from None


async def _close(taking: asyncio.Future[Payload], taken: list[TakenFiles]) -> None:
    await asyncio.wait([taking])
    for each in taken:
        each.close()
    taking.exception()  # nobody may have asked


def _check(payload: Payload, load_format: str | None, device: str) -> None:
    is_bucket = bool(payload.buckets)
    for rank, each in enumerate(payload.of_ranks, 1):
        if bool(each.buckets) != is_bucket:
            message = f"the payload of rank {rank} is of another kind than that of rank 0"
            raise WeightUpdateError(message, field=FIELD)
    if is_bucket != load_format_of(load_format) and (payload.tensors or is_bucket):
        kinds = "named tensors", "a flattened bucket"
        message = f"the payload is {kinds[is_bucket]}, load_format says {kinds[not is_bucket]}"
        raise WeightUpdateError(message, field="load_format")
    if device == "cpu" and (payload.has_cuda_memory or payload.of_ranks):
        message = "the payload names memory of a CUDA device, and this engine is on a CPU: send tensors of the CPU"
        raise WeightUpdateError(message, field=FIELD)


def _process_of(payload: Payload) -> str:
    """The number of the process that made it, which torch writes into names as "/torch_123_456_0"; "" for none."""
    for storage in payload.storages():
        name = storage.handle if isinstance(storage, SharedFile) else getattr(storage, "ref_counter_handle", "")
        found = re.match(r"/torch_(\d{1,10})_", name, re.ASCII)
        if found:
            return found[1]
    return ""


def _kept(payload: Payload) -> Payload:
    """Without the buffers that every engine recomputes."""
    tensors = tuple(tensor for tensor in payload.tensors if not is_recomputed(tensor.name))
    buckets = tuple(
        msgspec.structs.replace(each, tensors=tuple(part for part in each.tensors if not is_recomputed(part.name)))
        for each in payload.buckets
    )
    return msgspec.structs.replace(payload, tensors=tensors, buckets=buckets)
