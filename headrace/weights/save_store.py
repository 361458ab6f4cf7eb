"""A save to a store that fsspec knows, by a URL. Owns the order in which it becomes what is saved there.

Stores have no exchange of folders. So weight files have names that no other save gave, and the index, which names
them, is written after them and the record last; then what was there before is removed. Whoever is interrupted before
the index leaves what was there; his files are removed by the next save.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from headrace.types.errors import ConfigError, HeadraceError, RequestError, UnavailableError
from headrace.weights.save_target import NewFile, write_whole
from headrace.weights.saved import RECORD, Record, SavedFile, WeightFile, parse_record, shown_record

_MARKED = re.compile(r"model-[0-9a-f]{16}-[0-9]{5}-of-[0-9]{5}\.safetensors")


class StoreTarget:
    """The place that `url` names. A `SaveTarget`, which leaves nothing whole behind for another save to go on with.

    What is there has to be a save with nothing else in it, or nothing: `RequestError` otherwise. `ConfigError` without
    fsspec, or without what it needs for this store.
    """

    def __init__(self, url: str) -> None:
        self.where, self.mark = url, secrets.token_hex(8)
        try:
            library: Any = importlib.import_module("fsspec")
        except ImportError:
            message = "a save to a URL needs fsspec, which Headrace's extra `remote` installs"
            raise ConfigError(message, field="url") from None
        self._created: list[str] = []
        with storing(url):
            self._store, folder = library.core.url_to_fs(url)
            self._folder = str(folder).rstrip("/")
            self._store.invalidate_cache()
            self._old = self._names()
            known = self._known()
        strange = sorted(name for name in self._old if name not in known and not _MARKED.fullmatch(name))
        if strange:
            message = f"{url} holds {strange[0]}, which no save wrote; name another place"
            raise RequestError(message, field="url")

    def begin(self, record: Record, files: Sequence[WeightFile]) -> dict[str, SavedFile]:
        return {}

    def create(self, name: str) -> NewFile:
        place = f"{self._folder}/{name}"
        with storing(self.where):
            self._store.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._created.append(name)
            return NewFile(self._store.open(place, "wb"), partial(storing, self.where))

    def note(self, record: Record) -> None:
        """Nobody goes on with it."""

    def finish(self, record: Record, last: Sequence[tuple[str, bytes]]) -> None:
        for name, data in (*last, (RECORD, shown_record(record))):
            write_whole(self, name, data)
        self._created.clear()
        for name in self._old:
            if name not in (RECORD, *record.files):
                with storing(self.where):
                    self._store.rm_file(f"{self._folder}/{name}")

    def close(self) -> None:
        """Remove what only an unfinished save has a use for."""
        for name in filter(_MARKED.fullmatch, self._created):
            with contextlib.suppress(Exception):  # of the store's library: the next save removes it
                self._store.rm_file(f"{self._folder}/{name}")
        self._created.clear()

    def _names(self) -> list[str]:
        """The files that are there."""
        if not self._store.exists(self._folder):
            return []
        return [str(each)[len(self._folder) + 1 :] for each in self._store.find(self._folder)]

    def _known(self) -> frozenset[str]:
        if RECORD not in self._old:
            return frozenset()
        raw = self._store.cat_file(f"{self._folder}/{RECORD}")
        with contextlib.suppress(ValueError, RecursionError):
            return frozenset((RECORD, *parse_record(raw).files))
        return frozenset()


@contextlib.contextmanager
def storing(url: str) -> Iterator[None]:
    """Whatever a store's library raises inside is a `ConfigError` for a package that it lacks, a `RequestError` for a
    URL that it does not know, else `UnavailableError`."""
    try:
        yield
    except HeadraceError:
        raise
    except ImportError as error:
        raise ConfigError(f"{url} cannot be written: {error}", field="url") from None
    except ValueError as error:
        raise RequestError(f"{url} cannot be written: {error}", field="url") from None
    except Exception as error:  # of classes that nobody lists
        raise UnavailableError(f"{url} cannot be written: {type(error).__name__}: {error}", field="url") from None
