"""A trainer in a process of its own, that updates an engine by `headrace.Client`: `python -m tests.faults.trainer`.

It is told to update by a line of JSON (`Order`), says each step before it does it, waits for a line to go on, and tells
at the end what came of it: the update's report, or the error that a trainer would see. Then it takes another order. On
the way it may do one thing wrong, as it was told.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace import Client, HeadraceError, TensorInfo
from tests.free_ports import free_port

CHUNKS = 3
Tensors = dict[str, np.ndarray[Any, Any]]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """An update to the weights of `folder`, with one `wrong` thing done at step `at`, or none. The engine has so many
    `ranks`."""

    road: str
    url: str
    folder: str
    version: str
    mode: str
    timeout: float
    scratch: str
    ranks: int
    wrong: str = ""
    at: str = ""


class Differs(Exception):
    """The engine took the update, and what is live is not what the trainer has."""


class Update:
    """One update: the tensors, and what is done wrong with them."""

    def __init__(self, order: Order, client: Client) -> None:
        self.order, self.client = order, client
        folder = Path(order.folder)
        self.digests: dict[str, str] = json.loads((folder / "digests.json").read_bytes())
        self.tensors = _load(folder / "model.safetensors")
        names = list(self.tensors)
        self.chunks = [names[number::CHUNKS] for number in range(CHUNKS)]
        self.terms: dict[str, Any] = {"mode": order.mode, "in_flight": "keep", "timeout": order.timeout}

    def wrong(self, step: str) -> str:
        """What is done wrong at this step."""
        return self.order.wrong if self.order.at == step else ""

    def manifest(self) -> list[TensorInfo]:
        """All tensors with their digests, so that the engine can tell what arrives from what was meant."""
        entries = [TensorInfo(name, each.shape, "float32", self.digests[name]) for name, each in self.tensors.items()]
        wrong, middle = self.wrong("begin"), len(entries) // 2
        entry = entries[middle]
        if wrong == "corrupt":
            last = "0" if entry.digest[-1] != "0" else "1"
            entries[middle] = msgspec.structs.replace(entry, digest=entry.digest[:-1] + last)
        elif wrong == "drop":
            del entries[middle]
        elif wrong == "double":
            entries.append(entry)
        elif wrong == "rename":
            entries[middle] = msgspec.structs.replace(entry, name=entry.name + "x")
        elif wrong == "reorder":
            entries.reverse()
        return entries

    def chunk(self, number: int) -> list[tuple[str, np.ndarray[Any, Any]]]:
        """The tensors of one call, as they are sent."""
        pairs = [(name, self.tensors[name]) for name in self.chunks[number]]
        wrong = self.wrong(f"chunk{number}")
        at = next(at for at, (name, _) in enumerate(pairs) if self.twin(name))
        name, tensor = pairs[at]
        if wrong == "corrupt":
            broken = tensor.copy()
            broken.view(np.uint8).reshape(-1)[tensor.nbytes // 2] ^= 1
            pairs[at] = name, broken
        elif wrong == "drop":
            del pairs[at]
        elif wrong == "rename":
            pairs[at] = name + "x", tensor
        elif wrong == "reorder":  # two tensors under each other's names
            pairs[at] = name, self.tensors[self.twin(name)]
        return pairs

    def twin(self, name: str) -> str:
        """Another matrix of the same shape, if there is one."""
        shape = self.tensors[name].shape
        same = (each for each in self.tensors if each != name and self.tensors[each].shape == shape)
        return next(same, "") if len(shape) == 2 else ""

    def verify(self) -> None:
        """Hold what is live against what was meant, as `push_weights` does."""
        live = self.client.digest()
        names = [name for name in self.digests if live.get(name) != self.digests[name]]
        if names or len(live) != len(self.digests):
            raise Differs(f"live weights differ in {', '.join(names[:3])}")


def by_session(update: Update) -> Iterator[str]:
    """Begin, stage, commit; tensors lent in shared memory, or sent as bytes."""
    client, order = update.client, update.order
    yield "connect"
    client.status()
    yield "begin"
    session = client.begin_update(order.version, update.manifest(), **update.terms)
    try:
        for number in range(CHUNKS):
            yield f"chunk{number}"
            client.stage(session, update.chunk(number))
            if update.wrong(f"chunk{number}") == "double":
                client.stage(session, update.chunk(number))
        yield "commit"
        client.commit(session)
    except HeadraceError:
        with contextlib.suppress(HeadraceError):
            client.abort_update(session)
        raise


def by_group(update: Update) -> Iterator[str]:
    """Broadcasts over a gloo group, a call for each chunk."""
    from tests.engine.group_trainer import init_custom_process_group

    client, order = update.client, update.order
    group: Any = None
    yield "connect"
    port = free_port()
    size = 1 + order.ranks
    join = _Call(client.init_weights_update_group, "127.0.0.1", port, 1, size, "faults", "gloo", order.timeout)
    try:
        with _as_trainers_do():
            group = init_custom_process_group(port, size, "faults", order.timeout, "gloo")
        join.wait()
        report = None
        for number in range(CHUNKS):
            yield f"chunk{number}"
            report = _broadcast(update, group, number)
            if update.wrong(f"chunk{number}") == "double":
                report = _broadcast(update, group, number)
        if report is None:
            raise Differs("the update is not complete")
        yield "leave"
        client.destroy_weights_update_group("faults")
    finally:
        with contextlib.suppress(HeadraceError):
            client.abort_update()
        with contextlib.suppress(HeadraceError):
            client.destroy_weights_update_group("faults")
        if group is not None:
            import torch.distributed

            with _as_trainers_do(), contextlib.suppress(Exception):
                torch.distributed.destroy_process_group(group)


def _broadcast(update: Update, group: Any, number: int) -> Any:
    import torch
    import torch.distributed

    sent = update.chunk(number)
    announced = [(name, update.tensors.get(name, tensor)) for name, tensor in sent]
    if update.wrong(f"chunk{number}") == "drop":  # announced, and not sent
        name = next(name for name in update.chunks[number] if name not in dict(sent))
        announced.append((name, update.tensors[name]))
    names = [name for name, _ in announced]
    shapes = [list(tensor.shape) for _, tensor in announced]
    call = _Call(
        update.client.update_weights_from_distributed,
        *(names, ["float32"] * len(names), shapes, "faults", None, update.order.version),
        **update.terms,
    )
    with _as_trainers_do():
        for _, tensor in sent:
            torch.distributed.broadcast(torch.from_numpy(tensor.copy()), 0, group=group)
    return call.wait()


def by_buckets(update: Update) -> Iterator[str]:
    """The dialect of SGLang's clients: flattened buckets in shared memory of torch, by HTTP."""
    import httpx
    import torch

    from tests.weights.foreign_payloads import flattened

    order = update.order
    with httpx.Client(base_url=order.url, timeout=order.timeout + 30) as http:

        def post(path: str, **body: Any) -> None:
            reply = http.post(path, json=body)
            if reply.status_code != 200:
                raise Differs(f"{path}: {reply.status_code} {reply.text}")

        yield "connect"
        if http.get("/server_info").status_code != 200:
            raise Differs("no information")
        yield "begin"
        post("/begin_weight_update")
        for number in range(CHUNKS):
            yield f"chunk{number}"
            for _ in range(2 if update.wrong(f"chunk{number}") == "double" else 1):
                tensors = {name: torch.from_numpy(each.copy()) for name, each in update.chunk(number)}
                payloads = [base64.b64encode(flattened(tensors)).decode() for _ in range(order.ranks)]
                post(
                    "/update_weights_from_tensor",
                    serialized_named_tensors=payloads,
                    load_format="flattened_bucket",
                    weight_version=order.version,
                    mode=order.mode,
                    in_flight="keep",
                    timeout_s=order.timeout,
                )
        yield "commit"
        post("/end_weight_update")


def from_disk(update: Update) -> Iterator[str]:
    """A folder with a record, as a save writes it."""
    from safetensors.numpy import save_file

    from headrace.weights.saved import INDEX, RECORD, Record, SavedFile, shown_record

    order = update.order
    folder = Path(order.scratch) / order.version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield "connect"
    update.client.status()
    places: dict[str, str] = {}
    files: dict[str, SavedFile] = {}
    for number in range(CHUNKS):
        yield f"chunk{number}"
        pairs, name = dict(update.chunk(number)), f"model-{number + 1:05d}-of-{CHUNKS:05d}.safetensors"
        wrong = update.wrong(f"chunk{number}")
        save_file(pairs, folder / name)
        data = (folder / name).read_bytes()
        files[name] = SavedFile.of(data)
        places |= dict.fromkeys(update.chunks[number], name)
        if wrong == "corrupt":  # on the disk, after it was written well
            (folder / name).write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        elif wrong == "double":
            (folder / f"double-{name}").write_bytes(data)
    index = json.dumps({"weight_map": places}).encode()
    (folder / INDEX).write_bytes(index)
    files[INDEX] = SavedFile.of(index)
    record = Record(version=order.version, layout="hf", digests=update.digests, files=files)
    (folder / RECORD).write_bytes(shown_record(record))
    yield "commit"
    update.client.update_weights_from_disk(folder, order.version, verify=True, **update.terms)


ROADS = {"shared": by_session, "bytes": by_session, "group": by_group, "buckets": by_buckets, "disk": from_disk}


@contextlib.contextmanager
def _as_trainers_do() -> Iterator[None]:
    """What gloo says when its peer is gone is a trainer's own error, of a class of torch's."""
    try:
        yield
    except RuntimeError as error:
        raise Differs(f"the group broke: {str(error).splitlines()[0]}") from None


class _Call:
    """A call in a thread beside what this one does."""

    def __init__(self, call: Any, *arguments: Any, **options: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = call(*arguments, **options)
            except HeadraceError as error:
                self._error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


def _load(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    loaded: Tensors = load_file(path)
    return loaded


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def run(order: Order) -> None:
    """One update, step by step."""
    with Client(order.url, timeout=order.timeout + 30, shares_memory=order.road != "bytes") as client:
        started = time.monotonic()
        try:
            update = Update(order, client)
            for step in ROADS[order.road](update):
                _say(step=step)
                sys.stdin.readline()
                started = time.monotonic()
            _say(step="free")
            sys.stdin.readline()
            update.verify()
        except (HeadraceError, Differs) as error:
            told = {"error": type(error).__name__, "field": getattr(error, "field", ""), "message": str(error)}
            _say(**told, seconds=time.monotonic() - started)
        else:
            _say(done=order.version)


def main() -> None:
    """Serve until the input ends."""
    if "--torch" in sys.argv:
        import torch.distributed  # noqa: F401 (the slow part of a start)
    _say(pid=os.getpid())
    for line in sys.stdin:
        run(msgspec.json.decode(line, type=Order))


if __name__ == "__main__":
    main()
