"""What OpenRLHF asks of its rollout engine, call by call, over an engine of ours: `OpenRLHFWorker`.

Written for OpenRLHF 0.11, whose `RolloutRayActor` makes these calls of `vllm.AsyncLLMEngine` and, through its
`collective_rpc`, of a worker. It imports vLLM by name and has no place for another engine: what stands between is a
change of that actor, as docs/openrlhf.md shows. Owns the label of an update that nobody names, and where it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from headrace.engine import AsyncEngine
from headrace.engine.groups import join_group
from headrace.types.errors import ConfigError, HeadraceError, RequestError, WeightUpdateError
from headrace.types.generation import Generation
from headrace.types.memory import MemoryTag
from headrace.types.plain_values import as_flag
from headrace.types.weights import PauseMode, UpdateReport

if TYPE_CHECKING:
    import torch

JOIN_SECONDS = 600.0
CPU_KEY = "cpu"
"""Under which handles are given for an engine on a CPU, where OpenRLHF has the UUIDs of devices."""

_SETTINGS = {
    "max_model_len": "context_length",
    "enable_prefix_caching": "prefix_cache",
    "tensor_parallel_size": "tp_size",
    "gpu_memory_utilization": "memory_fraction",
}
_OF_VLLM = ("worker_extension_cls", "distributed_executor_backend", "trust_remote_code", "max_logprobs")
"""What says how vLLM does things, and nothing of what is done."""
_SAMPLING = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_LOGPROB_MODES = {"raw_logprobs": "raw", "processed_logprobs": "sampled"}
_PAUSE_MODES: dict[str, PauseMode] = {"keep": "keep", "abort": "abort", "wait": "drain"}


class OpenRLHFWorker:
    """An engine with the calls of OpenRLHF's rollout actor. All of them are coroutines of any loop.

    `model` and the settings that OpenRLHF gives to vLLM (`seed`, `dtype`, `max_model_len`, `tensor_parallel_size`,
    `enable_prefix_caching`, `gpu_memory_utilization`, `enable_sleep_mode`, `enforce_eager`, `logprobs_mode`), or those
    of `EngineConfig`. None is the default. An update's label is its number, "1" first.

    Raises what `AsyncEngine` raises: `ConfigError` naming the setting.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._engine = AsyncEngine(model, **_settings_of(settings))
        self.num_unfinished = 0
        """`generate` calls that wait or run."""
        self._group = ""
        self._num_updates = 0

    async def start(self) -> Self:
        """Wait until it can generate. Raises what keeps it from that."""
        await self._engine.start()
        return self

    @property
    def engine(self) -> AsyncEngine:
        """The engine itself, for what OpenRLHF does not ask."""
        return self._engine

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: Mapping[str, Any], request_id: str | None = None
    ) -> Generation:
        """One sample of a prompt of token ids. `sampling_params` by vLLM's names: `temperature`, `top_p`, `top_k`,
        `max_tokens` (None: to the end of the context), `min_tokens`, `skip_special_tokens`, ...; `logprobs` says
        nothing, as those of the tokens drawn always come.

        Raises `RequestError` naming the field.
        """
        given = {_SAMPLING.get(name, name): value for name, value in sampling_params.items() if name != "logprobs"}
        fills = given.get("max_new_tokens") is None
        if fills:
            given["max_new_tokens"] = self._engine.resolved.context_length
        options: Any = {"request_id": request_id, "clip_to_context": fills}
        self.num_unfinished += 1
        try:
            (sample,) = await self._engine.generate(None, [list(prompt_token_ids)], given, **options)
        finally:
            self.num_unfinished -= 1
        return sample

    async def init_process_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
        use_ray: bool = False,
    ) -> None:
        """Join the group over which rank 0 broadcasts weights, as vLLM's `StatelessProcessGroup` meets: this engine's
        first rank is `rank_offset`. Waits until all `world_size` ranks are there, 600 s at most. "gloo" on a CPU.

        A trainer that begins anew takes the place of the one before. `RequestError` and `WeightUpdateError` name the
        field, `DeadlineError` says that ranks did not come.
        """
        if as_flag(use_ray, "use_ray"):
            message = "a group of ray.util.collective cannot be joined: leave --vllm.sync_with_ray out"
            raise RequestError(message, field="use_ray")
        if self._group:
            left, self._group = self._group, ""
            await self._engine.destroy_weights_update_group(left)
        runtime, place = self._engine.runtime, (master_address, master_port, rank_offset, world_size)
        await runtime.run(join_group(runtime, *place, group_name, backend, JOIN_SECONDS, "vllm"))
        self._group = group_name

    async def update_weight(
        self, name: str, dtype: torch.dtype | str, shape: Sequence[int], empty_cache: bool = False
    ) -> UpdateReport | None:
        """Take one tensor, which rank 0 broadcasts meanwhile, by its Hugging Face name. Those of the calls before it
        are of the same update; `empty_cache` says that it is the last, upon which all are live at once and the report
        is returned.

        Requests that run go on with the cache that they have, as OpenRLHF pauses them ("keep"). An error in a call,
        and a last one before the model has all of its tensors, end the update: the old weights serve on, the calls
        that follow are received, and the one that is said to be the last raises a `WeightUpdateError`.
        """
        described = [name], [str(dtype).removeprefix("torch.")], [list(shape)]
        report = await self._engine.update_weights_from_distributed(
            *described, self._group or "openrlhf", version=self._label, in_flight="keep"
        )
        return await self._ended(report) if empty_cache else report

    async def update_weight_cuda_ipc(
        self,
        name: str,
        dtype: torch.dtype | str,
        shape: Sequence[int],
        ipc_handles: Mapping[str, tuple[Any, tuple[Any, ...]]],
        empty_cache: bool = False,
    ) -> UpdateReport | None:
        """As `update_weight`, of a tensor in memory of a trainer on the same devices. `ipc_handles` has by the UUID of
        each device (or `CPU_KEY`) what `torch.multiprocessing.reductions.reduce_tensor` made of it there, of which
        those two functions of torch that make a tensor again are taken. It may be freed when this returns."""
        try:
            tensor = _rebuilt(name, ipc_handles)
            found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            if found != (str(dtype).removeprefix("torch."), tuple(shape)):
                message = f"{name} is announced as {dtype} {list(shape)}, its handle has {found[0]} {list(found[1])}"
                raise WeightUpdateError(message, field=name)
        except HeadraceError:  # as in `JoinedUpdate.add`
            await self._engine.runtime.run(self._engine.runtime.joined.end())
            raise
        report = await self._engine.update_weights_from_bucket([(name, tensor)], self._label, in_flight="keep")
        return await self._ended(report) if empty_cache else report

    async def reset_prefix_cache(self) -> None:
        """Free cached pages that nothing uses. No update needs it: old prefixes never match new weights."""
        await self._engine.flush_cache()

    async def pause_generation(self, mode: str = "keep") -> None:
        """Stop generating: "keep" holds what runs, "abort" ends it, "wait" lets it finish."""
        if mode not in _PAUSE_MODES:
            raise RequestError(f"mode must be one of {', '.join(_PAUSE_MODES)}", field="mode")
        await self._engine.pause(_PAUSE_MODES[mode])

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`."""
        await self._engine.resume()

    async def sleep(self, level: int = 1) -> None:
        """Give memory back: at level 1 weights come back by themselves (`enable_sleep_mode` keeps a copy of them on the
        host), at level 2 by an update. Requests that run are ended with what they have."""
        if level not in (1, 2):
            raise RequestError("level must be 1 or 2", field="level")
        if level == 1 and not self._engine.resolved.engine.keep_weights_copy:
            raise RequestError("level 1 needs enable_sleep_mode, which keeps a copy of the weights", field="level")
        await self._engine.release_memory_occupation()

    async def wake_up(self, tags: Sequence[MemoryTag] | None = None) -> None:
        """Take memory again: that of "weights", of "kv_cache", or all."""
        # OpenRLHF knows nothing of graphs: they come with whatever comes last.
        await self._engine.resume_memory_occupation([*tags, "cuda_graph"] if tags else None)

    async def is_sleeping(self) -> bool:
        released = (await self._engine.status()).released
        return "weights" in released or "kv_cache" in released

    async def shutdown(self) -> None:
        """End the engine. Idempotent."""
        await self._engine.shutdown()

    @property
    def _label(self) -> str:
        return str(self._num_updates + 1)

    async def _ended(self, report: UpdateReport | None) -> UpdateReport:
        """The last tensor of an update has come: it is live, or lacks something, or an error has ended it."""
        runtime = self._engine.runtime
        if report is None:
            report = await runtime.run(runtime.joined.finish(self._label))
        self._num_updates += 1
        return report


def _settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings by our names."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name in _OF_VLLM or value is None:
            continue
        if name == "enable_sleep_mode":
            settings.update(memory_saver=value, keep_weights_copy=value)
        elif name == "enforce_eager":
            settings["cuda_graphs"] = not as_flag(value, name, ConfigError)
        elif name == "logprobs_mode":
            if value not in _LOGPROB_MODES:
                message = f"logprobs_mode must be one of {', '.join(_LOGPROB_MODES)}"
                raise ConfigError(message, field=name)
            settings["logprob_mode"] = _LOGPROB_MODES[value]
        else:
            settings[_SETTINGS.get(name, name)] = value
    return settings


def _rebuilt(name: str, handles: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> torch.Tensor:
    """The tensor of a handle for this process's device. `WeightUpdateError` where there is none, or no handle of
    torch's."""
    import torch
    from torch.multiprocessing import reductions

    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    key = CPU_KEY if device is None else str(torch.cuda.get_device_properties(device).uuid)
    if key not in handles:
        message = f"{name}: no handle is for this device, {key}, but for {', '.join(map(str, handles))[:200]}"
        raise WeightUpdateError(message, field=name)
    function, arguments = handles[key]
    if function is not (reductions.rebuild_tensor if device is None else reductions.rebuild_cuda_tensor):
        raise WeightUpdateError(f"{name}: its handle is not that of a {key} tensor of torch", field=name)
    placed = list(arguments)
    if device is not None:
        placed[6] = device  # the sender may number devices in another way
    tensor: torch.Tensor = function(*placed)
    return tensor
