"""One engine for a group of trainer ranks, each of which makes every call: the pattern of SGLang's `VerlEngine`.

Owns which rank has the engine, and what a call is on rank 0 and on the others. The engine is one of this process, or a
server of its own behind HTTP; what is asked of it is the same. Knows no step of either.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client import Client, Runtime
from headrace.client.asks import native_body
from headrace.config import EngineConfig
from headrace.engine import Engine
from headrace.engine.node import KeptNode
from headrace.engine.tensors import NamedTensors
from headrace.rl.frames import ShardParts
from headrace.rl.meeting import meet
from headrace.rl.rank_calls import FollowingCalls, LeadingCalls
from headrace.rl.shards import send_shards, whole_tensors
from headrace.server.blocking import serve
from headrace.server.native import answer_body
from headrace.types.errors import ConfigError, HeadraceError, WeightUpdateError
from headrace.types.memory import MemoryTag, OnRelease, Restore
from headrace.types.plain_values import as_flag, as_integer, as_seconds
from headrace.types.weights import InFlight, UpdateMode, UpdateReport

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

BUCKET_BYTES = 64 << 20
DEVICE_BUCKET_BYTES = 512 << 20
"""Of tensors that are on a device: each bucket is waited for."""

DEFAULT_RANK_TIMEOUT = 600.0
_NAMES = {
    "model_path": "model",
    "tokenizer_path": "tokenizer",
    "mem_fraction_static": "memory_fraction",
    "enable_memory_saver": "memory_saver",
    "enable_weights_cpu_backup": "keep_weights_copy",
    "random_seed": "seed",
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
}
"""What SGLang calls settings that we have."""

_LOAD_FORMATS = (None, "auto")
_PAUSE_MODES = {"in_place": "keep", "retract": "recompute"}


class VerlEngine:
    """An engine that the ranks of `device_mesh_cpu` share. All of them construct it and make every call, in the same
    order; rank 0's arguments count, but for tensors, and each rank gets the same answer or an error of the same type.

    device_mesh_cpu   a mesh of one dimension; its first rank has the engine
    nnodes            hosts that the engine spans, an equal number of the mesh's ranks on each, in order. The first rank
                      of each starts and ends the engine's processes there; they meet at the setting `dist_init_addr`,
                      and HEADRACE_DIST_SECRET in the environment is the same for all
    launch_server     put the engine behind a server process of its own, `url`
    rank_timeout      seconds that ranks wait for one that does not come to a call: `DeadlineError` names it. One that
                      is gone is named at once, by an `UnavailableError`
    kwargs            the engine's settings, by our names or SGLang's, and with `launch_server` the server's. `tp_size`
                      is what makes as many ranks as the mesh has, unless it is given

    `engine` is the `Engine` or `Runtime` on rank 0, for what only one rank is to ask; None on the others.
    """

    _node: KeptNode | None = None

    def __init__(
        self,
        device_mesh_cpu: DeviceMesh,
        nnodes: int = 1,
        *,
        launch_server: bool = False,
        rank_timeout: float = DEFAULT_RANK_TIMEOUT,
        **kwargs: Any,
    ) -> None:
        self._ranks = _ranks_of(device_mesh_cpu)
        self.engine: Engine | Runtime | None = None
        timeout = DEFAULT_RANK_TIMEOUT
        with contextlib.suppress(ConfigError):  # which all ranks raise, once they have met
            timeout = as_seconds(rank_timeout, "rank_timeout", ConfigError)
        self._calls: LeadingCalls | FollowingCalls = meet(self._ranks, device_mesh_cpu.get_rank(), timeout)

        def check() -> None:
            as_seconds(rank_timeout, "rank_timeout", ConfigError)
            as_flag(launch_server, "launch_server", ConfigError)
            if nnodes != 1:
                self._keep_node(kwargs, nnodes, device_mesh_cpu.get_local_rank())

        def start() -> bytes:
            settings = _settings(kwargs, len(self._ranks), nnodes)
            self.engine = Runtime(**settings) if launch_server else Engine(**settings)
            shown = (self.engine.url, self.engine.api_key) if isinstance(self.engine, Runtime) else ("", "")
            return json.dumps(shown).encode()

        try:
            self._agree("VerlEngine" if nnodes == 1 else "VerlEngine over nodes", check)
            self.url: str
            self.api_key: str
            self.url, self.api_key = json.loads(self._calls.call("VerlEngine", start))
        except BaseException:  # whatever it is: nobody has this engine, to shut it down
            if self._node is not None:
                self._node.leave()
            self.shutdown()
            raise

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: Any = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        token_ids_logprob: Any = None,
        lora_path: Any = None,
        custom_logit_processor: Any = None,
        **options: Any,
    ) -> Any:
        """What SGLang's `/generate` answers: a dict, or a list of dicts for several prompts or samples. `options` are
        further fields of its body (`rid`, `return_text_in_logprobs`, `priority`, ...)."""
        body = {
            **{"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, "image_data": image_data},
            **{"return_logprob": return_logprob, "logprob_start_len": logprob_start_len},
            **{"top_logprobs_num": top_logprobs_num, "token_ids_logprob": token_ids_logprob},
            **{"lora_path": lora_path, "custom_logit_processor": custom_logit_processor, **options},
        }
        return json.loads(self._calls.call("generate", lambda: _generated(self._own, native_body(body))))

    def update_weights_from_tensor(
        self,
        named_tensors: NamedTensors,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | int | None = None,
        *,
        mode: UpdateMode = "auto",
        in_flight: InFlight = "drain",
    ) -> UpdateReport | None:
        """New weights, of which every rank brings the same names in the same order: plain tensors, or its part of
        DTensors. They are read one by one, on all ranks in step: a generator may gather each with a collective of
        them. A call of this engine within it is a `RequestError`.

        One call may bring all or a part; they are live, all at once, with the call after which the model lacks
        nothing, which returns the report; the others return None. A tensor that comes again replaces the first, and an
        error in a call ends the whole: begin anew. Old prefixes never match new weights, whatever `flush_cache` says.
        Raises `WeightUpdateError` naming the tensor, and the rank where ranks disagree.
        """
        name = "update_weights_from_tensor"

        def lead() -> bytes:
            as_flag(flush_cache, "flush_cache", WeightUpdateError)
            if load_format not in _LOAD_FORMATS:
                message = f"load_format {load_format!r} is not supported by this engine; leave it out"
                raise WeightUpdateError(message, field="load_format")
            assert isinstance(self._calls, LeadingCalls), "only rank 0 leads"
            tensors = whole_tensors(self._calls, name, self._ranks, named_tensors)
            terms: dict[str, Any] = {"version": weight_version, "mode": mode, "in_flight": in_flight}
            update = functools.partial(self._own.update_weights_from_bucket, **terms)
            return msgspec.msgpack.encode(_in_buckets(self._own, update, tensors))

        def follow() -> None:
            assert isinstance(self._calls, FollowingCalls), "rank 0 leads"
            send_shards(self._calls, name, self._ranks, named_tensors)

        return msgspec.msgpack.decode(self._calls.call(name, lead, follow, WeightUpdateError), type=UpdateReport | None)

    def release_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, *, in_flight: OnRelease = "abort"
    ) -> None:
        """See `AsyncEngine.release_memory_occupation`."""
        self._do(
            "release_memory_occupation", lambda engine: engine.release_memory_occupation(tags, in_flight=in_flight)
        )

    def resume_memory_occupation(self, tags: Sequence[MemoryTag] | None = None, *, restore: Restore = "auto") -> None:
        """See `AsyncEngine.resume_memory_occupation`."""
        self._do("resume_memory_occupation", lambda engine: engine.resume_memory_occupation(tags, restore=restore))

    def flush_cache(self) -> None:
        """See `AsyncEngine.flush_cache`."""
        self._do("flush_cache", lambda engine: engine.flush_cache())

    def pause_generation(self, mode: str = "abort") -> None:
        """Stop generating, by SGLang's words, "abort", "in_place" or "retract", or ours. See `AsyncEngine.pause`."""
        self._do("pause_generation", lambda engine: engine.pause(_PAUSE_MODES.get(mode, mode)))

    def continue_generation(self) -> None:
        """See `AsyncEngine.resume`."""
        self._do("continue_generation", lambda engine: engine.resume())

    def serve(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        *,
        launch_callback: Callable[[], object] | None = None,
        **options: Any,
    ) -> str:
        """Put HTTP in front of the engine, which goes on being used here: its address, on every rank. It ends with the
        engine. `launch_callback` is rank 0's, called once connections are accepted. See `headrace.serve`."""

        def lead() -> bytes:
            if isinstance(self._own, Runtime):
                raise ConfigError(f"this engine is behind a server already: {self.url}", field="launch_server")
            self.url = serve(self._own, port, host, launch_callback=launch_callback, **options).url
            return self.url.encode()

        self.url = self._calls.call("serve", lead).decode()
        return self.url

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End what runs, at once: on rank 0, from any thread, also while its `generate` waits. Elsewhere it does
        nothing: it is no call that ranks make together."""
        if self.engine is not None and (rid or abort_all):
            self.engine.abort(rid or None, prefix=True, all=abort_all)

    def shutdown(self) -> None:
        """End the engine, on rank 0, and leave the others. Waits for no rank, but the first of another node for rank 0,
        `control_timeout` at most. Idempotent."""
        if isinstance(self.engine, Client):
            self.engine.close()
        elif self.engine is not None:
            self.engine.shutdown()
        self._calls.close()
        if self._node is not None:
            self._node.close()

    def __enter__(self) -> VerlEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def _own(self) -> Any:
        """The engine, on rank 0."""
        assert self.engine is not None, "only rank 0 leads"
        return self.engine

    def _keep_node(self, given: dict[str, Any], nnodes: Any, place: int) -> None:
        """Begin another node's part, on its first rank. `place` is this rank's in the mesh."""
        settings = _settings(given, len(self._ranks), nnodes)
        num_here, surplus = divmod(len(self._ranks), nnodes)
        if surplus or not num_here:
            message = f"{len(self._ranks)} ranks cannot be spread evenly over nnodes {nnodes}"
            raise ConfigError(message, field="nnodes")
        if place and place % num_here == 0:
            of_engine = {name: value for name, value in settings.items() if name in EngineConfig.__struct_fields__}
            self._node = KeptNode(**of_engine, node_rank=place // num_here)

    def _agree(self, name: str, check: Callable[[], None]) -> None:
        """Do this on every rank. What one raises all raise, before the engine waits for it."""

        def lead() -> bytes:
            assert isinstance(self._calls, LeadingCalls), "only rank 0 leads"
            check()
            for peer in self._calls.peers:
                self._calls.receive(peer, name)
            return b""

        def follow() -> None:
            assert isinstance(self._calls, FollowingCalls), "rank 0 leads"
            check()
            self._calls.send(ShardParts(self._calls.number, (), is_last=True), name)  # which are none

        self._calls.call(name, lead, follow, ConfigError)

    def _do(self, name: str, work: Callable[[Any], Any]) -> None:
        """Have rank 0 do this with its engine. What callers give is looked at there: else one rank would wait for
        another whose arguments are refused."""

        def lead() -> bytes:
            work(self._own)
            return b""

        self._calls.call(name, lead)


def _ranks_of(mesh: Any) -> list[int]:
    """Those of a mesh of one dimension that has this process."""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh) and mesh.ndim == 1 and mesh.get_coordinate() is not None:
        ranks: list[int] = mesh.mesh.flatten().tolist()
        return ranks
    shown = f"a mesh of {mesh.ndim}" if isinstance(mesh, DeviceMesh) else f"a {type(mesh).__name__}"
    message = f"device_mesh_cpu must be a DeviceMesh of one dimension with this process in it, not {shown}"
    raise ConfigError(f"{message}; mesh['name'] is a part of one", field="device_mesh_cpu")


def _settings(given: dict[str, Any], num_ranks: int, nnodes: Any) -> dict[str, Any]:
    """The engine's settings by our names."""
    settings: dict[str, Any] = {"nnodes": as_integer(nnodes, "nnodes", ConfigError)}
    if settings["nnodes"] < 1:
        raise ConfigError(f"nnodes must be at least 1, got {nnodes}", field="nnodes")
    for name, value in given.items():
        ours = _NAMES.get(name, name)
        if ours in settings:
            raise ConfigError(f"{name} and another setting are both {ours}", field=name)
        settings[ours] = value
    if "model" not in settings:
        raise ConfigError("model must name a folder or a hub id", field="model")
    num_stages = as_integer(settings.get("pp_size", 1), "pp_size", ConfigError)
    return {"tp_size": max(1, num_ranks // max(1, num_stages)), **settings}


def _generated(engine: Engine | Client, body: bytes) -> bytes:
    """What `/generate` answers to this body."""
    if isinstance(engine, Client):
        return engine.generate_native(body)
    return engine.asynchronous.runtime.wait(answer_body(engine.asynchronous, body))


def _in_buckets(
    engine: Engine | Client,
    update: Callable[[list[tuple[str, torch.Tensor]]], UpdateReport | None],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> UpdateReport | None:
    """Hand over tensors as they come, some at a time; the last of them only when it is known that none follows."""
    report: UpdateReport | None = None
    bucket: list[tuple[str, torch.Tensor]] = []
    num_bytes = 0
    try:
        for name, tensor in tensors:
            limit = BUCKET_BYTES if tensor.device.type == "cpu" else DEVICE_BUCKET_BYTES
            if bucket and num_bytes + tensor.nbytes > limit:
                report = update(bucket) or report
                bucket, num_bytes = [], 0
            bucket.append((name, tensor))
            num_bytes += tensor.nbytes
        return (update(bucket) if bucket else None) or report
    except BaseException:  # whatever it is, the update is over before anybody hears of it
        try:
            engine.abort_update()
        except HeadraceError as error:
            logger.debug("the update was over: %s", error)
        raise
