"""A save to a folder: whole or not at all, whatever interrupts it, and nobody else's files are lost."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.types.errors import RequestError, UnavailableError, UpdateConflictError
from headrace.weights import save_folder
from headrace.weights.save_folder import FolderTarget
from headrace.weights.saved import RECORD, check_saved_model, hf_files, rank_files
from tests.weights.test_saved import INFOS, RECORDED, save

FILES = hf_files(INFOS, 40)
OLD = msgspec.structs.replace(RECORDED, version="old")
RMTREE = shutil.rmtree
CHANGES = ("open", "mkdir", "rename", "unlink", "fsync")


class Crash(BaseException):
    """The process ends here: nothing that it would still do is done."""


class CrashingSystem:
    """The system up to the `last`-th change of a file, which is not done."""

    def __init__(self, last: int) -> None:
        self.num_changes = 0
        self._last = last

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        return self.crashing(value) if name in CHANGES else value

    def crashing(self, function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.num_changes += 1
            if self.num_changes == self._last and half is not None:
                half(*arguments, **keywords)
            if self.num_changes >= self._last:
                raise Crash
            return function(*arguments, **keywords)

        return call

    def rmtree(self, *arguments: Any, **keywords: Any) -> None:
        """Removes half of it before a crash."""
        self.crashing(RMTREE, remove_half)(*arguments, **keywords)


def remove_half(name: str, dir_fd: int) -> None:
    folder = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
    names = sorted(os.listdir(folder))
    for each in names[: len(names) // 2]:
        os.unlink(each, dir_fd=folder)
    os.close(folder)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_crash_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool, can_exchange: bool
) -> None:
    """And the next save succeeds, goes on with the files that are whole, and leaves nothing else behind."""
    if not can_exchange:
        monkeypatch.setattr(save_folder, "_exchange", lambda *_: False)
    exchange = save_folder._exchange
    num_old = num_new = num_none = num_reused = last = 0
    while True:
        last += 1
        path = tmp_path / str(last) / "model"
        if is_there:
            save(FolderTarget(path), FILES, OLD)
        system = CrashingSystem(last)
        with monkeypatch.context() as patch:
            patch.setattr(save_folder, "os", system)
            patch.setattr(shutil, "rmtree", system.rmtree)
            patch.setattr(save_folder, "_exchange", system.crashing(exchange))
            try:
                save(FolderTarget(path), FILES)
                break
            except Crash:
                pass
        if path.exists():
            version = check_saved_model(path).version
            num_old += version == "old"
            num_new += version == "v1"
        else:
            num_none += 1
        written = save(FolderTarget(path), FILES)
        num_reused += len(FILES) - len(written)
        assert check_saved_model(path).version == "v1"
        assert os.listdir(path.parent) == ["model"]
    assert last > 20 and num_new and num_reused
    assert (num_old > 0) == is_there
    assert num_none <= 1 if is_there else num_none > 10  # only between two renames, where names cannot be exchanged
    assert not (is_there and can_exchange and num_none)


def test_the_old_folder_is_not_gone_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that does not come to its end puts it back, too."""
    path = tmp_path / "model"
    save(FolderTarget(path), FILES, OLD)
    os.rename(path, tmp_path / ".model.headrace-before")
    FolderTarget(path).close()
    assert check_saved_model(path).version == "old"


def test_other_weights_are_written_anew(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        crash_before_the_end(FolderTarget(tmp_path / "model"))
    other = msgspec.structs.replace(RECORDED, digests=dict.fromkeys(RECORDED.digests, "f" * 32))
    assert len(save(FolderTarget(tmp_path / "model"), FILES, other)) == 2


@pytest.mark.parametrize("what", ["flipped", "another cut", "another layout"])
def test_a_rest_that_is_not_as_it_has_to_be_is_written_anew(tmp_path: Path, what: str) -> None:
    target = FolderTarget(tmp_path / "model")
    with pytest.raises(Crash):
        crash_before_the_end(target)
    if what == "flipped":
        path = tmp_path / ".model.headrace-saving" / FILES[0].name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    files = {"flipped": FILES, "another cut": hf_files(INFOS, 102), "another layout": rank_files([INFOS])}[what]
    assert len(files) == (1 if what == "another layout" else 2)
    assert len(save(FolderTarget(tmp_path / "model"), files)) == (2 if what == "another cut" else 1)
    check_saved_model(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def crash_before_the_end(target: FolderTarget) -> None:
    def crash(*_: Any) -> None:
        raise Crash

    target.finish = crash  # type: ignore[assignment,method-assign]
    save(target, FILES)


@pytest.mark.parametrize(
    "content", ["a file", "a save and a file", "a save and a file in a folder", "a save and a link"]
)
def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    if content != "a file":
        save(FolderTarget(path), FILES)
    if content.endswith("in a folder"):
        (path / "sub").mkdir()
        (path / "sub" / "optimizer.pt").write_bytes(b"mine")
    elif content.endswith("link"):
        (path / "latest").symlink_to(tmp_path)
    else:
        (path / "optimizer.pt").write_bytes(b"mine")
    before = sorted(str(each) for each in path.rglob("*"))
    with pytest.raises(RequestError) as caught:
        FolderTarget(path)
    assert caught.value.field == "path"
    assert sorted(str(each) for each in path.rglob("*")) == before
    assert os.listdir(tmp_path) == ["model"]


def test_what_comes_into_the_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    save(FolderTarget(tmp_path / "model"), FILES)
    target = FolderTarget(tmp_path / "model")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"mine")
    with pytest.raises(RequestError):
        save(target, FILES)
    assert (tmp_path / "model" / "optimizer.pt").read_bytes() == b"mine"


def test_two_saves_to_one_place_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    first = FolderTarget(path)
    with pytest.raises(UpdateConflictError) as caught:
        FolderTarget(path)
    assert caught.value.field == "path" and caught.value.retryable
    save(first, FILES)
    save(FolderTarget(path), FILES)


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    save(FolderTarget(tmp_path / "model"), FILES)
    check_saved_model(tmp_path / "model")


@pytest.mark.parametrize("path", ["/", "file/model", "x" * 300, "file"])
def test_a_path_that_can_be_none_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError) as caught:
        FolderTarget(tmp_path / path)
    assert caught.value.field == "path"


def test_a_link_in_the_place_of_a_folder_is_not_followed_below_a_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "out").symlink_to(outside)
    for name in ("model", "deep/model"):
        with pytest.raises(RequestError):
            FolderTarget(root / "out" / name, root)
    with pytest.raises(RequestError):
        FolderTarget(root, root)
    (root / "model").symlink_to(outside)
    with pytest.raises(RequestError):
        FolderTarget(root / "model", root)
    assert not os.listdir(outside)
    save(FolderTarget(root / "deep" / "model", root), FILES)
    check_saved_model(root / "deep" / "model")


def test_a_full_disk_is_named_and_the_old_save_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    save(FolderTarget(path), FILES, OLD)
    num_open = len(os.listdir("/proc/self/fd"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UnavailableError, match="No space left"):
            save(FolderTarget(path), FILES)
    assert check_saved_model(path).version == "old"
    assert len(os.listdir("/proc/self/fd")) == num_open
    save(FolderTarget(path), FILES)
    assert RECORD in os.listdir(path) and os.listdir(tmp_path) == ["model"]
