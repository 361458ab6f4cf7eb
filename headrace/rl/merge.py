"""A trainer's checkpoint as a Hugging Face folder. Owns the order of it: tensor by tensor, file by file, written as a
save of live weights is: whole or not at all, and going on where an interrupted one left off.

Where a box is stored is `headrace.rl.trainer_folders`, what becomes of it `headrace.rl.merge_plan`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec
import torch

from headrace.config import ModelSpec
from headrace.config.json_files import is_there
from headrace.engine.control import folder_of
from headrace.engine.saving import DEFAULT_SHARD_BYTES, small_files
from headrace.engine.tensors import tensor_bytes
from headrace.rl.merge_plan import MergedTensor, plan_merge
from headrace.rl.push import float_dtype
from headrace.rl.trainer_folders import TrainerFolder, open_trainer_folder
from headrace.types.errors import CheckpointError, ConfigError
from headrace.types.plain_values import as_integer
from headrace.weights.save_folder import FolderTarget
from headrace.weights.save_target import SaveTarget
from headrace.weights.saved import INDEX, Record, SavedFile, WeightFile, hf_files, index_of
from headrace.weights.staging import dtype_name

_HOMES = ("huggingface", "actor/huggingface", "hf", ".")
"""Where trainers put the configuration and the tokenizer, below a checkpoint."""


class MergeReport(msgspec.Struct, frozen=True):
    """What a merge wrote. `num_reused` files were whole already, of one that was interrupted."""

    path: str
    num_tensors: int
    num_bytes: int
    num_files: int
    num_reused: int
    seconds: float


def merge(
    source: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> MergeReport:
    """Write the model of the checkpoint folder `source` as the Hugging Face folder `out`.

    source           what `torch.distributed.checkpoint` has saved (FSDP2, Megatron-Core's `torch_dist`), or the files
                     `model_world_size_N_rank_R.pt` of verl
    out              a new or empty folder, or one that a merge or `save_model` wrote, which is replaced at the end
    model            the folder with `config.json` and tokenizer; None: one inside `source`
    dtype            what tensors are converted to; None: they stay what they are
    max_shard_bytes  of a file, unless one tensor has more

    Nothing that is stored is run. Memory holds one tensor, and up to 1 GiB of the chunks that it came from. Raises
    `CheckpointError` naming the file or tensor that is missing, broken or of another model.
    """
    started = time.perf_counter()
    folder = open_trainer_folder(Path(folder_of(source)))
    home = _home_of(Path(folder_of(source)), model)
    most = as_integer(max_shard_bytes, "max_shard_bytes", ConfigError)
    if most < 1:
        raise ConfigError(f"max_shard_bytes must be at least 1, got {most}", field="max_shard_bytes")
    spec = ModelSpec.from_folder(home)
    planned = _converted(plan_merge(spec, folder.tensors), dtype)
    dtypes = {each.info.dtype for each in planned}
    last = list(small_files(home, home, dtypes.pop() if len(dtypes) == 1 else spec.dtype))
    with contextlib.closing(FolderTarget(Path(folder_of(out)))) as target:
        files = hf_files([each.info for each in planned], most, target.mark)
        record = Record(version=Path(folder_of(source)).name, layout="hf", digests={"": folder.fingerprint()})
        found = target.begin(record, files)
        saved = dict(found)
        by_name = {each.info.name: each for each in planned}
        for file in files:
            if file.name not in saved:
                saved[file.name] = _write(target, file, folder, by_name)
                target.note(msgspec.structs.replace(record, files=saved))
        if len(files) > 1:
            last.append((INDEX, index_of(files)))
        saved |= {name: SavedFile.of(data) for name, data in last}
        target.finish(msgspec.structs.replace(record, files=saved, digests={}), last)
    num_bytes = sum(each.info.num_bytes for each in planned)
    return MergeReport(
        target.where, len(planned), num_bytes, len(saved), len(found), round(time.perf_counter() - started, 3)
    )


def _home_of(source: Path, model: str | Path | None) -> Path:
    """The folder that says what the model is."""
    if model is not None:
        return Path(folder_of(model))
    for name in _HOMES:
        if is_there(source / name / "config.json"):
            return source / name
    message = f"{source} has no config.json, nor has {source / _HOMES[0]}: name the Hugging Face folder it was made of"
    raise ConfigError(message, field="model")


def _converted(planned: list[MergedTensor], dtype: str | None) -> list[MergedTensor]:
    if dtype is None:
        return planned
    name = dtype_name(float_dtype(dtype))
    return [msgspec.structs.replace(each, info=msgspec.structs.replace(each.info, dtype=name)) for each in planned]


def _write(target: SaveTarget, file: WeightFile, folder: TrainerFolder, planned: dict[str, MergedTensor]) -> SavedFile:
    new = target.create(file.name)
    try:
        new.write(file.head())
        for info in file.tensors:
            new.write(tensor_bytes(_whole(folder, planned[info.name])))
        return new.close()
    except BaseException:  # whatever it is
        new.abandon()
        raise


def _whole(folder: TrainerFolder, planned: MergedTensor) -> torch.Tensor:
    """A tensor of its stored boxes. `CheckpointError` where it holds what its dtype has no number for."""
    info = planned.info
    found = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    for part in planned.parts:
        values = folder.read(part.key, part.source)
        values = values.permute(part.axes) if part.axes else values
        found[part.target.slices] = values.reshape(part.target.shape).to(found.dtype)
    if not bool(found.isfinite().all()):
        raise CheckpointError(f"{info.name} holds NaN or infinity in {info.dtype}", field=info.name)
    return found
