"""What a model's folder recommends to sample with. Owns which fields of `generation_config.json` are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.config.json_files import is_there, read_object
from headrace.config.model_spec import GENERATION_FILE
from headrace.types.errors import CheckpointError, RequestError
from headrace.types.sampling_params import SamplingParams

TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The others are about length, search and caches, or steer what a request has no word for: `do_sample` too."""


def recommended_sampling(folder: Path) -> dict[str, Any]:
    """Those of `TAKEN` that the folder's file gives. Raises `CheckpointError` for a value that no request may have."""
    path = folder / GENERATION_FILE
    fields = read_object(path) if is_there(path) else {}
    found = {name: fields[name] for name in TAKEN if fields.get(name) is not None}
    try:
        SamplingParams.from_dict(found, field=GENERATION_FILE)
    except RequestError as error:
        raise CheckpointError(error.message, field="sampling_defaults") from None
    return found
