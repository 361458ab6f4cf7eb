"""The slow imports of a process of the core."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_imports(*, shares_process: bool = False) -> Iterator[None]:
    """What the block imports stays as long as the process, and its garbage collector never walks it.

    While torch is imported it would walk a growing pile a dozen times, a fifth of the time that the import takes.
    Another twentieth, more where files are slow, would go into the source text of frames, which nobody reads
    (`_SourcelessFrames`). Where others share the process nothing is done: all of this belongs to all of it.
    """
    if shares_process:
        yield
        return
    gc.disable()
    try:
        with _SourcelessFrames():
            yield
    finally:
        gc.freeze()
        gc.enable()


class _SourcelessFrames:
    """A context in which `inspect` says of no frame where its source is, as of one that has none.

    Torch asks for the file and the line of each operator that it registers, and is given the lines around too: for them
    `inspect` looks for every module there is in the file system.
    """

    def __enter__(self) -> None:
        self._find = inspect.findsource
        inspect.findsource = self._refuse_frames  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        inspect.findsource = self._find

    def _refuse_frames(self, thing: Any) -> tuple[list[str], int]:
        if inspect.isframe(thing):
            raise OSError("the source of a frame is not looked for")
        return self._find(thing)
