"""What may be read of a folder that a request names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from headrace.server.options import ServerOptions
from headrace.types.errors import ConfigError
from tests.server.builders import save_random_model
from tests.server.conftest import START, Served


def ask(served: Served, folder: Path) -> tuple[int, str]:
    reply = served.http.post("/update_weights_from_disk", json={"model_path": str(folder)})
    return reply.status_code, reply.json()["message"]


def test_files_that_lead_out_of_the_roots_are_refused(start: START, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model")
    outside = save_random_model(tmp_path / "outside", seed=1)
    shutil.copytree(outside, model / "inside")
    (model / "inside" / "model.safetensors").unlink()
    (model / "inside" / "model.safetensors").symlink_to(outside / "model.safetensors")
    served = start(model)
    digest = served.engine.digest()
    status, message = ask(served, model / "inside")
    assert status == 400 and "leads out of" in message
    assert served.engine.digest() == digest
    served.engine.update_weights_from_disk(model / "inside", "1")  # the caller's own path leads where it leads
    assert served.engine.digest() != digest


def test_a_model_of_the_hub_cache_is_served_and_may_be_read_again(start: START, tmp_path: Path) -> None:
    """Its snapshot is links into the repository's blobs."""
    repository = tmp_path / "models--someone--model"
    snapshot = save_random_model(repository / "snapshots" / "0123abcd")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        os.rename(path, repository / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    served = start(snapshot)
    assert ask(served, snapshot)[0] == 200
    other = save_random_model(tmp_path / "models--someone--other", seed=1)
    assert ask(served, other)[0] == 400


def test_a_weight_root_that_is_no_path_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerOptions(weight_roots=("a\0b",))
    assert caught.value.field == "weight_roots"
