"""Control routes: abort, pause, cache and weights, SGLang's dialect. Owns their bodies and replies; decides nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from headrace.engine.control import version_of
from headrace.server.coerce import check_changes, read_control
from headrace.server.errors import FieldNames, error_body, refusal
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.update_body import UPDATE_FIELDS, UpdateBody, check_selector
from headrace.server.wire import json_reply
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.messages import Digest
from headrace.types.weights import PauseMode, TensorInfo, WeightBytes

MAX_READ_ELEMENTS = 1 << 22
PAUSE_MODES: dict[str, PauseMode] = {
    "in_place": "keep",
    "retract": "recompute",
    "wait": "drain",
    **{mode: mode for mode in ("abort", "keep", "recompute", "drain")},
}
_LOAD_FORMATS = (None, "auto", "safetensors", "bin", "pt")


class AbortBody(msgspec.Struct):
    rid: str = ""
    abort_all: bool = False
    abort_message: str | None = None


class PauseBody(msgspec.Struct):
    mode: str = "abort"
    timeout_s: float | None = None


class DiskBody(UpdateBody, kw_only=True):
    model_path: str
    load_format: str | None = None
    manifest: Any = None


class ReleaseBody(msgspec.Struct):
    tags: list[Any] | None = None
    in_flight: str = "abort"
    timeout_s: float | None = None


class ResumeBody(msgspec.Struct):
    tags: list[Any] | None = None
    restore: str = "auto"
    timeout_s: float | None = None


class VersionBody(msgspec.Struct):
    new_version: str | int
    abort_all_requests: bool = True


class NameBody(msgspec.Struct):
    name: str
    truncate_size: int = 100


class CheckerBody(msgspec.Struct):
    """Without quantization there is no error of it to allow. Tensors of `skip_tensor_list` are left out of what is
    told."""

    action: Literal["checksum", "snapshot", "reset_tensors", "compare"] = "checksum"
    allow_quant_error: bool = False
    skip_tensor_list: list[str] = []
    selector: str | None = None


class PostProcessBody(msgspec.Struct):
    restore_weights_before_load: bool = False
    post_process_quantization: bool = False


class AdminFace:
    """The control routes. Without an admin key they take the data key."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders

    def endpoints(self) -> list[Endpoint]:
        post: tuple[str, ...] = ("POST",)
        table = (
            ("/abort_request", self.abort_request, post),
            ("/pause_generation", self.pause_generation, post),
            ("/continue_generation", self.continue_generation, post),
            ("/release_memory_occupation", self.release_memory, post),
            ("/resume_memory_occupation", self.resume_memory, post),
            ("/flush_cache", self.flush_cache, ("GET", "POST")),
            ("/update_weights_from_disk", self.update_weights_from_disk, post),
            ("/abort_weight_update", self.abort_weight_update, post),
            ("/post_process_weights", self.post_process_weights, post),
            ("/update_weight_version", self.update_weight_version, post),
            ("/get_weights_by_name", self.get_weights_by_name, ("GET", "POST")),
            ("/weights_checker", self.weights_checker, ("GET", "POST")),
        )
        return [Endpoint(path, handler, methods, access="admin") for path, handler, methods in table]

    async def abort_request(self, request: Request) -> Response:
        """POST /abort_request: a name aborts every request whose name begins with it."""
        body = await read_control(request, AbortBody)
        message = body.abort_message or "Aborted"
        with FieldNames({"message": "abort_message"}):
            if body.abort_all:
                await self._engine.abort(all=True, message=message)
            elif body.rid:
                await self._engine.abort(body.rid, prefix=True, message=message)
        return Response()

    async def pause_generation(self, request: Request) -> Response:
        body = await read_control(request, PauseBody)
        if body.mode not in PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}", field="mode")
        with FieldNames({"timeout": "timeout_s"}):
            pausing, regret = self._engine.undoable_pause(PAUSE_MODES[body.mode], body.timeout_s)
            await self._state.run(request, pausing, regret)
        return json_reply({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: Request) -> Response:
        await read_control(request, dict[str, Any])
        await self._state.run(request, self._engine.resume())
        return json_reply({"message": "Generation continued successfully.", "status": "ok"})

    async def release_memory(self, request: Request) -> Response:
        """POST /release_memory_occupation: null when the memory is free, the dialect's whole reply."""
        body = await read_control(request, ReleaseBody)
        release: Any = self._engine.release_memory_occupation
        with FieldNames({"timeout": "timeout_s"}):
            await self._state.run(request, release(body.tags, in_flight=body.in_flight, timeout=body.timeout_s))
        return json_reply(None)

    async def resume_memory(self, request: Request) -> Response:
        """POST /resume_memory_occupation: null when the memory is there."""
        body = await read_control(request, ResumeBody)
        resume: Any = self._engine.resume_memory_occupation
        with FieldNames({"timeout": "timeout_s"}):
            await self._state.run(request, resume(body.tags, restore=body.restore, timeout=body.timeout_s))
        return json_reply(None)

    async def flush_cache(self, request: Request) -> Response:
        """GET|POST /flush_cache: never refused, aborts nothing."""
        await request.body()
        num_pages = await self._state.run(request, self._engine.flush_cache())
        return PlainTextResponse(f"Cache flushed: {num_pages} pages freed, the rest will not be matched again.\n")

    async def update_weights_from_disk(self, request: Request) -> Response:
        body = await read_control(request, DiskBody)
        try:
            folder, root = self._folders.allowed(body.model_path, "model_path")
            if body.load_format not in _LOAD_FORMATS:
                raise RequestError(f"load_format {body.load_format!r} is not supported", field="load_format")
            if body.manifest:
                raise RequestError("manifest is not supported by this engine", field="manifest")
            version = self._state.last_version if body.weight_version is None else str(body.weight_version)
            update = self._engine.update_weights_from_disk
            with FieldNames(UPDATE_FIELDS):
                report = await self._state.run(
                    request,
                    update(folder, version, mode=body.mode, in_flight=body.policy, timeout=body.timeout_s, root=root),
                )
        except HeadraceError as error:
            return refusal(error, num_paused_requests=0)
        reply = {"success": True, "message": "Weights updated.", "num_paused_requests": 0}
        return json_reply({**reply, "report": report})

    async def abort_weight_update(self, request: Request) -> Response:
        """POST /abort_weight_update: end the open update, whoever began it. The old weights serve on, unless it had
        begun to write in place: then nothing is served until a complete update lands."""
        await read_control(request, dict[str, Any])
        await self._state.run(request, self._engine.abort_update())
        return json_reply({"success": True, "message": "No weight update is open."})

    async def post_process_weights(self, request: Request) -> Response:
        """POST /post_process_weights: weights that are live are ready to be computed with."""
        await read_control(request, PostProcessBody)
        return json_reply({"success": True, "message": "There is nothing to do."})

    async def update_weight_version(self, request: Request) -> Response:
        """POST /update_weight_version: refused while it can only be the label of an update that has failed."""
        body = await read_control(request, VersionBody)
        with FieldNames({"version": "new_version"}):
            version = version_of(body.new_version)  # before anything is aborted
        try:
            await self._state.run(request, self._engine.runtime.joined.check_label())
            if body.abort_all_requests:
                await self._engine.abort(all=True, message="Aborted by a change of the weight version")
            await self._state.run(request, self._engine.set_weight_version(version))
        except HeadraceError as error:
            return refusal(error, new_version=version)
        return json_reply({"success": True, "message": f"Weight version is {version}.", "new_version": version})

    async def get_weights_by_name(self, request: Request) -> Response:
        """GET|POST /get_weights_by_name: the first `truncate_size` rows, as nested lists of numbers."""
        body = await read_control(request, NameBody)
        if body.truncate_size < 0:
            raise RequestError("truncate_size must not be negative", field="truncate_size")
        num_rows = body.truncate_size
        reading = self._engine.read_weight(body.name, num_rows, lambda info: check_size(info, num_rows))
        return json_reply(leading_rows(await self._state.run(request, reading), num_rows))

    async def weights_checker(self, request: Request) -> Response:
        """GET|POST /weights_checker: a GET only looks."""
        body = await read_control(request, CheckerBody)
        if body.action in ("snapshot", "reset_tensors"):
            check_changes(request, f"action {body.action}", "action")
        check_selector(body.selector)
        if body.skip_tensor_list and body.action == "reset_tensors":
            raise RequestError("reset_tensors resets all of them", field="skip_tensor_list")
        skipped = set(body.skip_tensor_list)
        done = {"success": True, "message": f"{body.action} done."}
        try:
            if body.action == "checksum":
                ranks = await self._state.run(request, self._digest_ranks())
                kept = [{name: each[name] for name in each if name not in skipped} for each in ranks]
                return json_reply({**done, **_checksums(kept, self._engine.resolved.engine.tp_size)})
            found = await self._state.run(request, self._engine.weights_checker(body.action))
        except HeadraceError as error:
            return refusal(error)
        differing = {name: found[name] for name in found if name not in skipped}
        if body.action == "compare" and differing:
            message = f"{len(differing)} tensors differ from the snapshot: {', '.join(sorted(differing)[:20])}"
            failed = {**error_body(400, message, param="action"), "success": False, "differing": differing}
            return json_reply(failed, 400)
        return json_reply(done)

    async def _digest_ranks(self) -> list[dict[str, str]]:
        client = self._engine.runtime.client
        return await client.call(lambda call_id: Digest(call_id, by_rank=True), list[dict[str, str]])


def check_size(info: TensorInfo, num_rows: int) -> None:
    """Refuse to answer with more than MAX_READ_ELEMENTS numbers."""
    num_elements = math.prod(_kept(info, num_rows))
    if num_elements > MAX_READ_ELEMENTS:
        message = f"truncate_size asks for {num_elements} numbers, over {MAX_READ_ELEMENTS}"
        raise RequestError(message, field="truncate_size")


def leading_rows(weight: WeightBytes, num_rows: int) -> Any:
    """The first rows of a tensor (of its first axis) as nested lists of floats."""
    check_size(weight.info, num_rows)
    kept = _kept(weight.info, num_rows)
    return _as_floats(weight.data, weight.info.dtype, math.prod(kept)).reshape(kept).tolist()


def _kept(info: TensorInfo, num_rows: int) -> tuple[int, ...]:
    return (min(num_rows, info.shape[0]), *info.shape[1:]) if info.shape else ()


def _as_floats(data: memoryview, dtype: str, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        halves = np.frombuffer(data, dtype="<u2", count=count)
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype={"float16": "<f2"}.get(dtype, "<f4"), count=count).astype(np.float32)


def _checksums(ranks: Sequence[Mapping[str, str]], tp_size: int) -> dict[str, Any]:
    """The dialect's shape: an entry for each rank with what it holds. Tensors that several ranks hold whole have the
    same checksum on each."""
    entries = []
    for rank, digests in enumerate(ranks):
        lines = "".join(f"{name}={digests[name]}\n" for name in sorted(digests))
        layout = {"rank": rank, "size": len(ranks), "dp_rank": 0, "dp_size": 1}
        layout |= {"tp_rank": rank % tp_size, "tp_size": tp_size}
        layout |= {"pp_rank": rank // tp_size, "pp_size": len(ranks) // tp_size}
        checksum = hashlib.sha256(lines.encode()).hexdigest()
        entries.append({"checksums": digests, "per_gpu_checksum": checksum, "parallelism_info": layout})
    total = "".join(str(entry["per_gpu_checksum"]) for entry in entries)
    return {"ranks": entries, "per_engine_checksum": hashlib.sha256(total.encode()).hexdigest()}
