"""Live weights written to a folder or a store, as a caller asks for it: methods of `AsyncEngine`.

Owns the way of a save: the core digests what is live, and copies it between steps into two shared buffers, while a
thread of this process writes what came before. All tensors are of one version: weights that change meanwhile, by
whatever, fail the save. It holds nobody up: to save certain weights, commit no others until it has returned.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headrace.config.json_files import is_there, read_bytes, read_object
from headrace.engine.calls import outlast
from headrace.engine.client import CoreClient
from headrace.engine.control import folder_of, seconds_of
from headrace.engine.core_host import CONFIG_FILES, TOKENIZER_FILES, model_folder
from headrace.engine.fields import name_of
from headrace.ipc import SharedBuffer
from headrace.text.token_files import MAX_VOCABULARY_BYTES
from headrace.text.tokenizer_files import tokenizer_files
from headrace.types.errors import DeadlineError, RequestError, UnavailableError, UpdateConflictError
from headrace.types.messages import DescribeWeights, GetWeight, WeightPart
from headrace.types.plain_values import as_integer
from headrace.types.weights import SaveReport, TensorInfo, WeightsDescription
from headrace.weights.save_folder import FolderTarget
from headrace.weights.save_store import StoreTarget
from headrace.weights.save_target import NewFile, SaveTarget
from headrace.weights.saved import (
    INDEX,
    Record,
    SavedFile,
    WeightFile,
    check_saved_model,
    hf_files,
    index_of,
    rank_files,
)

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine

DEFAULT_SHARD_BYTES = 5 << 30
DEFAULT_SAVE_TIMEOUT = 3600.0
PART_BYTES = 8 << 20
"""What the core copies for one call: more than it does between two steps."""

_ENDING_SECONDS = 5.0

_CONFIG, _GENERATION = CONFIG_FILES

Result = TypeVar("Result")
SmallFile = tuple[str, bytes]
Layout = Callable[[WeightsDescription, str], list[WeightFile]]
"""Which files to write of weights, with a mark in their names."""


async def save_model(
    self: AsyncEngine,
    path: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    timeout: float = DEFAULT_SAVE_TIMEOUT,
    root: str | Path | None = None,
) -> SaveReport:
    """Write the live weights as a Hugging Face folder: safetensors in the engine's dtype, with the configuration and
    the tokenizer, and `headrace.json`, the digests of it all (`check_saved_model`). Generation goes on meanwhile.

    The folder is replaced as a whole at the end, if it is a save or empty; `RequestError` if it holds anything else. A
    save that was interrupted leaves the old one, and the next one of the same weights there goes on with its files.
    `UpdateConflictError` if other weights become live meanwhile, or another save is written there. With `root` nothing
    outside that folder is written, wherever links lead: for paths of others. `DeadlineError` after `timeout` seconds.
    """
    return await _to_folder(self, path, root, _hf_layout(max_shard_bytes), timeout)


async def save_sharded_model(
    self: AsyncEngine,
    path: str | Path,
    *,
    timeout: float = DEFAULT_SAVE_TIMEOUT,
    root: str | Path | None = None,
) -> SaveReport:
    """As `save_model`, a file for each rank with its parameters as they lie: what an engine of this version, model,
    dtype, `tp_size` and `pp_size` loads fastest, by `load_format="sharded"`, and nobody else can."""
    return await _to_folder(self, path, root, lambda live, _: rank_files(live.parameters), timeout)


async def save_remote_model(
    self: AsyncEngine,
    url: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    timeout: float = DEFAULT_SAVE_TIMEOUT,
) -> SaveReport:
    """As `save_model`, to any store that fsspec knows, as in "s3://bucket/step-100". `ConfigError` without fsspec, or
    what it needs for that store.

    Files have names of their own, and an index says which count: it is written at the end, so that what was there
    before can be read until then. An interrupted save is begun anew.
    """
    place = name_of(url, "url")
    if "://" not in place:
        raise RequestError('url must be one, as in "s3://bucket/name"', field="url")
    return await _save(self, functools.partial(StoreTarget, place), _hf_layout(max_shard_bytes), timeout)


async def verify(folder: str, root: str, seconds: float) -> None:
    """Hold a saved folder against its record. Raises as `check_saved_model`; `DeadlineError` after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().run_in_executor(None, check_saved_model, folder, root)
    except TimeoutError:
        raise DeadlineError(f"the files of {folder} were not read within {seconds:g} s", field="timeout") from None


async def _to_folder(
    engine: AsyncEngine, path: str | Path, root: str | Path | None, layout: Layout, timeout: float
) -> SaveReport:
    folder, below = Path(folder_of(path)), None if root is None else Path(folder_of(root))
    return await _save(engine, functools.partial(FolderTarget, folder, below), layout, timeout)


def _hf_layout(max_shard_bytes: Any) -> Layout:
    most = as_integer(max_shard_bytes, "max_shard_bytes")
    if most < 1:
        raise RequestError(f"max_shard_bytes must be at least 1, got {most}", field="max_shard_bytes")
    return lambda live, mark: hf_files(live.tensors, most, mark)


async def _save(engine: AsyncEngine, target: Callable[[], SaveTarget], layout: Layout, timeout: Any) -> SaveReport:
    seconds = seconds_of(timeout) or DEFAULT_SAVE_TIMEOUT
    saving = _Saving(engine.runtime.client, seconds)
    try:
        async with asyncio.timeout(seconds):
            return await saving.run(target, layout, functools.partial(_small_files, engine))
    except TimeoutError:
        raise DeadlineError(f"the save was not done within {seconds:g} s", field="timeout") from None
    finally:
        await outlast(saving.end())


class _Saving:
    """One save: the thread that writes, which does one thing after the other, and the buffers between it and the
    core."""

    def __init__(self, client: CoreClient, seconds: float) -> None:
        self._client = client
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-save")
        self._target: SaveTarget | None = None
        self._file: NewFile | None = None
        self._buffers: list[SharedBuffer] = []
        self._num_parts = 0
        self._written: asyncio.Future[None] | None = None  # of the part before

    async def run(
        self, open_target: Callable[[], SaveTarget], layout: Layout, small_files: Callable[[], Iterable[SmallFile]]
    ) -> SaveReport:
        """The whole of it."""
        last = await self._in_thread(lambda: list(small_files()))
        target = await self._in_thread(self._open, open_target)
        live = await self._client.call(DescribeWeights, WeightsDescription, self._seconds)
        files = layout(live, target.mark)
        record = _record_of(live, files)
        found = await self._in_thread(target.begin, record, files)
        saved, num_reused = dict(found), len(found)
        self._take_buffers()
        for file in files:
            if file.name not in saved:
                saved[file.name] = await self._write(target, file, live)
                await self._in_thread(target.note, msgspec.structs.replace(record, files=saved))
        if len(files) > 1 and record.layout == "hf" or target.mark:
            last.append((INDEX, index_of(files)))
        saved |= {name: SavedFile.of(data) for name, data in last}
        record = msgspec.structs.replace(record, files=saved)
        await self._finish(target, record, last)
        sizes = [info.num_bytes for file in files for info in file.tensors]
        counts = len(live.tensors), sum(sizes), len(saved), num_reused
        return SaveReport(target.where, live.version, live.epoch, *counts)

    async def end(self) -> None:
        """Let go of everything, once the thread has come to it: it may hang in a file system."""
        ending = self._loop.run_in_executor(self._thread, self._let_go)
        self._thread.shutdown(wait=False)
        await asyncio.wait([ending], timeout=_ENDING_SECONDS)

    async def _finish(self, target: SaveTarget, record: Record, last: Sequence[SmallFile]) -> None:
        """What makes the save one. Cancelled in it, it goes on if this is done soon: nothing undoes it."""
        finishing = asyncio.ensure_future(self._in_thread(target.finish, record, last))
        try:
            await asyncio.shield(finishing)
        except asyncio.CancelledError:
            await asyncio.wait([finishing], timeout=_ENDING_SECONDS)
            if not finishing.done() or finishing.exception() is not None:
                raise

    async def _write(self, target: SaveTarget, file: WeightFile, live: WeightsDescription) -> SavedFile:
        new = await self._in_thread(self._create, target, file)
        for info in file.tensors:
            await self._copy(info, file.rank, live, new)
        await self._settle()
        return await self._in_thread(self._close)

    async def _copy(self, info: TensorInfo, rank: int | None, live: WeightsDescription, new: NewFile) -> None:
        """Have a tensor written, part by part; the last is on its way when this returns."""
        start = 0
        while start < info.num_bytes:
            buffer = self._buffers[self._num_parts % len(self._buffers)]
            self._num_parts += 1
            command = functools.partial(GetWeight, name=info.name, buffer=buffer.ref, start=start, rank=rank)
            part = await self._client.call(command, WeightPart, self._seconds)
            if part.stamp != live.stamp:
                message = f"the weights of version {live.version!r} were changed while they were saved"
                raise UpdateConflictError(message, field="version")
            await self._settle()
            self._written = self._loop.run_in_executor(self._thread, new.write, buffer.view[: part.num_bytes])
            start += part.num_bytes

    async def _settle(self) -> None:
        """Wait until what was read is written, so that its buffer may be filled again."""
        written, self._written = self._written, None
        if written is not None:
            await written

    def _take_buffers(self) -> None:
        try:
            for _ in range(2):
                self._buffers.append(SharedBuffer.create(PART_BYTES))
        except OSError as error:
            raise UnavailableError(f"no shared memory to read weights in: {error}") from None

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await self._loop.run_in_executor(self._thread, functools.partial(function, *arguments))

    # In the thread. What is open is noted here, so that it is let go of also where nobody waits for it any more.

    def _open(self, open_target: Callable[[], SaveTarget]) -> SaveTarget:
        self._target = open_target()
        return self._target

    def _create(self, target: SaveTarget, file: WeightFile) -> NewFile:
        self._file = target.create(file.name)
        self._file.write(file.head())
        return self._file

    def _close(self) -> SavedFile:
        assert self._file is not None
        file, self._file = self._file, None
        return file.close()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.abandon()
        if self._target is not None:
            self._target.close()
        for buffer in self._buffers:
            buffer.close()


def _record_of(live: WeightsDescription, files: Sequence[WeightFile]) -> Record:
    digests = {info.name: info.digest for info in live.tensors}
    if files[0].rank is None:
        return Record(version=live.version, layout="hf", digests=digests)
    return Record(version=live.version, layout="sharded", num_ranks=len(files), digests=digests)


def _small_files(engine: AsyncEngine) -> Iterator[SmallFile]:
    """What a model folder has beside its weights. The configuration names the dtype that they are saved in."""
    folder, tokenizer = Path(engine.resolved.folder), engine.config.tokenizer
    home = model_folder(tokenizer, TOKENIZER_FILES, "tokenizer") if tokenizer else folder
    yield from small_files(folder, home, engine.resolved.dtype)


def small_files(folder: Path, home: Path, dtype: str) -> Iterator[SmallFile]:
    """The configuration of a model folder, for weights of this dtype, and the tokenizer of another."""
    config = read_object(folder / _CONFIG)
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    yield _CONFIG, json.dumps({**config, **dict.fromkeys(names, dtype)}, indent=2).encode() + b"\n"
    if is_there(folder / _GENERATION):
        yield _GENERATION, read_bytes(folder / _GENERATION)
    for path in tokenizer_files(home):
        yield path.relative_to(home).as_posix(), read_bytes(path, MAX_VOCABULARY_BYTES)
