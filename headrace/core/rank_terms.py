"""What has to be the same wherever a replica's ranks run, and what a guest says of the place where its ranks are.

Owns how a model, its files and this package's code are told from others: by digests that take no time.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import msgspec

from headrace.config import ResolvedConfig
from headrace.config.devices import CudaDevice
from headrace.weights.files import WEIGHT_ENDINGS

_EDGE_BYTES = 1 << 16
_NUM_DIGITS = 12
_SIZES = ("nnodes", "tp_size", "pp_size")


class GuestPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a guest's ranks are: the model's folder there, the device of the first of them, and the port by which the
    store is reached."""

    folder: str
    num_threads: int
    store_port: int
    cuda: CudaDevice | None

    @classmethod
    def of(cls, resolved: ResolvedConfig, store_port: int) -> GuestPlace:
        return cls(resolved.folder, resolved.num_threads, store_port, resolved.cuda)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, place: bytes) -> GuestPlace:
        return msgspec.msgpack.decode(place, type=cls)

    def resolved_of(self, ours: ResolvedConfig, number: int) -> ResolvedConfig:
        """What holds for the `number`-th of its ranks: rank 0's settings, and what only the place can say."""
        found = msgspec.structs.replace(ours, folder=self.folder, num_threads=self.num_threads, cuda=self.cuda)
        return found.of_rank(number)


def terms_of(resolved: ResolvedConfig) -> dict[str, str]:
    """What is compared, by the name that an error has."""
    engine = resolved.engine
    return {
        "headrace": code_digest(),
        **{name: str(value) for name, value in msgspec.structs.asdict(engine).items() if name in _SIZES},
        "model": _short(msgspec.msgpack.encode(resolved.model)),
        "weights": "random" if engine.load_format == "dummy" else _files_digest(Path(resolved.folder)),
        "device": resolved.device,
        "dtype": resolved.dtype,
        "attention_backend": resolved.attention_backend,
    }


@functools.cache
def code_digest() -> str:
    """Of this package's source: ranks have to agree on every message and every bit."""
    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:_NUM_DIGITS]


def _files_digest(folder: Path) -> str:
    """Of the names and sizes of weight files, and how each begins and ends: another step of a training shows there."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name.endswith(WEIGHT_ENDINGS):
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_EDGE_BYTES)
                file.seek(max(0, size - _EDGE_BYTES))
                found.update(f"{path.name} {size} ".encode() + head + file.read(_EDGE_BYTES))
    return found.hexdigest()[:_NUM_DIGITS]


def _short(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:_NUM_DIGITS]
