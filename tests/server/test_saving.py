"""Saves over HTTP: below the save roots, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from headrace import Client, ConfigError, HeadraceError, RequestError, check_saved_model
from headrace.server.options import ServerOptions
from tests.server.conftest import START


def test_a_client_saves_below_a_root(start: START, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    roots = str(tmp_path / "root"), "memory://headrace/http"
    served = start(save_roots=roots, weight_roots=roots[:1])
    with Client(served.url) as client:
        report = client.save_model(tmp_path / "root" / "a", max_shard_bytes=50_000)
        assert report.path == str(tmp_path / "root" / "a")
        assert check_saved_model(report.path).digests == client.digest()
        assert client.save_model(tmp_path / "root" / "a").num_files < report.num_files
        report = client.save_sharded_model(tmp_path / "root" / "b" / "c")
        assert check_saved_model(report.path).layout == "sharded"
        assert client.save_remote_model("memory://headrace/http/x").num_tensors == report.num_tensors
        assert client.update_weights_from_disk(tmp_path / "root" / "a", "again", verify=True).version == "again"
        assert fsspec.filesystem("memory").exists("/headrace/http/x/headrace.json")
        with pytest.raises(RequestError) as caught:
            client.save_model(tmp_path / "root" / "a", max_shard_bytes=0)
        assert caught.value.field == "max_shard_bytes"


@pytest.mark.parametrize("path", ["root", "root/../other", "other", "out/x", "root2", "a\0", "x" * 5000, "~nobody/x"])
def test_a_path_outside_is_refused(start: START, tmp_path: Path, path: str) -> None:
    for name in ("root", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "other")
    served = start(save_roots=(str(tmp_path / "root"),))
    with Client(served.url) as client:
        for place in (tmp_path / path, tmp_path / "root" / "out" / "x", served.engine.resolved.folder):
            for save in (client.save_model, client.save_sharded_model):
                with pytest.raises(RequestError) as caught:
                    save(str(place))
                assert caught.value.field == "path"
    assert not os.listdir(tmp_path / "other")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "memory://b/root",
            "memory://b/root/",
            "memory://b/root2/x",
            "memory://b/root/../x",
            "memory://b/root/x/../../y",
        ),
        *("memory://b/root//x", "memory://b/root/./x", "memory://b/root/x::file:///tmp", "memory://b/root/%2e%2e/x"),
        *(
            "simplecache::memory://b/root/x",
            "MEMORY://b/root/x",
            "file:///tmp/x",
            "memory://b/root/x?y",
            "b/root/x",
            "",
        ),
        *("memory://b/root/a\\..\\b", "memory://b/root/a\nb", "memory://b/root/\u212a"),
    ],
)
def test_a_url_outside_is_refused(start: START, url: str) -> None:
    served = start(save_roots=("memory://b/root",))
    with Client(served.url) as client, pytest.raises(HeadraceError) as caught:
        client.save_remote_model(url)
    assert (caught.value.field, caught.value.status) == ("url", 400)


def test_without_roots_nothing_is_saved(start: START, tmp_path: Path) -> None:
    served = start(weight_roots=(str(tmp_path),))
    with Client(served.url) as client:
        for save, place in ((client.save_model, str(tmp_path / "x")), (client.save_remote_model, "memory://x/y")):
            with pytest.raises(RequestError, match="save root"):
                save(place)
    assert not os.listdir(tmp_path)


def test_a_save_root_that_is_no_path_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerOptions(save_roots=("a\0b",))
    assert caught.value.field == "save_roots"
