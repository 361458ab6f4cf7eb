"""A replica's server: an engine and its HTTP server in a process that Ray owns.

Owns both, and the process's end: when the engine is dead it exits, so that Ray starts it again. What comes after such a
start has no trainer's weights, and says so (`NeedsWeightsError`) until they come.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from verl.utils.fs import copy_to_local
from verl.workers.rollout.replica import TokenOutput

from headrace.engine import Engine
from headrace.rl.verl_plugin.translation import Launch, aborted_output, asked_of, output_of
from headrace.server.blocking import serve
from headrace.types.errors import EngineDeadError, PauseTimeoutError, RequestError
from headrace.types.memory import MemoryTag

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""For the callers of a dead engine to hear of it, before its process ends."""


class RolloutServer:
    """What verl asks a rollout server, as the methods of a Ray actor. Every coroutine may run beside others."""

    def __init__(self, launch: Launch) -> None:
        """Returns when the engine can be asked. Raises what `Engine` and `headrace.serve` raise."""
        self._launch = launch
        self._rejects = False  # what comes while generation is paused
        model = copy_to_local(launch.engine["model"])  # of a remote store; others stay where they are
        self._engine = Engine(progress=False, **{**launch.engine, "model": model})
        options = {"api_key": secrets.token_urlsafe(32), **launch.server}
        self._api_key: str | None = options["api_key"]
        self._admin_key: str | None = options.get("admin_api_key")
        self._server = serve(self._engine, **options)
        was_lost = ray.get_runtime_context().was_current_actor_reconstructed
        if launch.awaits_weights or (was_lost and not launch.restores_weights):
            self._engine.weights_checker("reset_tensors")
        threading.Thread(target=self._exit_with_engine, name="headrace-engine-end", daemon=True).start()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> TokenOutput:
        """One sample of one prompt. What was aborted has the tokens it had (`stop_reason` "aborted"); a request that
        was refused because generation is paused, or that waited for longer than `pause_timeout`, has none.

        Raises `RequestError` naming what is wrong, `NeedsWeightsError` before a trainer has sent weights.
        """
        media = {"image_data": image_data, "video_data": video_data, "audio_data": audio_data}
        for name, value in media.items():
            if value is not None and len(value):
                raise RequestError(f"{name}: this engine reads text only", field=name)
        engine, ids = self._engine.asynchronous, [int(token) for token in prompt_ids]
        asked = asked_of(request_id, len(ids), sampling_params, self._launch)
        if self._rejects:
            return TokenOutput(**aborted_output(engine.version))
        try:
            (generation,) = await engine.generate(None, ids, asked.sampling, **asked.options)
        except PauseTimeoutError:  # verl holds requests back for as long as a pause takes; this one is sent again
            return TokenOutput(**aborted_output(engine.version))
        return TokenOutput(**output_of(generation, asked, ids, engine.version))

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """End what runs, and generate nothing until `resume_generation`. What comes meanwhile waits for that, or with
        `reject_request` is answered at once, as aborted."""
        self._rejects = reject_request
        await self._engine.asynchronous.pause("abort")

    async def resume_generation(self) -> None:
        """Go on after `abort_all_requests`."""
        self._rejects = False
        await self._engine.asynchronous.resume()

    async def sleep(self) -> None:
        """Give memory back: that of the KV cache and of graphs, and, where the trainer has its model, of weights."""
        if self._launch.frees_memory:
            await self._release(["kv_cache"] if self._launch.keeps_weights else None)

    async def wake_up(self) -> None:
        """Take memory again. Weights that a trainer sends have to come before anything is generated."""
        if self._launch.frees_memory:
            restore: Any = "disk" if self._launch.restores_weights else "auto"
            await self._engine.asynchronous.resume_memory_occupation(None, restore=restore)

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take memory of some tags again; that of graphs comes with the KV cache."""
        if self._launch.frees_memory:
            given: list[MemoryTag] = [*tags, "cuda_graph"] if "kv_cache" in tags else [*tags]
            await self._engine.asynchronous.resume_memory_occupation(given)

    async def release_kv_cache(self) -> None:
        """Give the memory of the KV cache back while weights come."""
        if self._launch.frees_memory:
            await self._release(["kv_cache"])

    async def resume_kv_cache(self) -> None:
        """Undo `release_kv_cache`."""
        await self.resume_memory(["kv_cache"])

    async def clear_kv_cache(self) -> None:
        """Free cached prefixes. Never needed: those of old weights do not match."""
        await self._engine.asynchronous.flush_cache()

    async def set_global_steps(self, global_steps: int) -> None:
        """Label the live weights."""
        await self._engine.asynchronous.set_weight_version(global_steps)

    async def start_profile(self, output_dir: str | None = None, **_: Any) -> None:
        """Trace what the engine computes, into a folder; None: one of its own, which the log names."""
        logger.info("profile: %s", await self._engine.asynchronous.start_profile(output_dir))

    async def stop_profile(self) -> None:
        """End the trace."""
        await self._engine.asynchronous.stop_profile()

    async def endpoint(self) -> tuple[str, str | None, str | None, str]:
        """Where weights go, and with which keys: url, key, key of control calls (None: the same); and the label of the
        live weights."""
        return self._server.url, self._api_key, self._admin_key, self._engine.version

    async def address(self) -> str:
        """ "host:port" of the HTTP server, as others reach it: of one on all addresses, at this host's."""
        host, _, port = self._server.url.removeprefix("http://").rpartition(":")
        return f"{ray.util.get_node_ip_address() if host in ('0.0.0.0', '[::]') else host}:{port}"

    async def _release(self, tags: list[MemoryTag] | None) -> None:
        await self._engine.asynchronous.release_memory_occupation(tags)

    def _exit_with_engine(self) -> None:
        error = self._engine.wait_ended()
        if isinstance(error, EngineDeadError):
            logger.error("the engine is dead, and this actor ends with it: %s", error)
            time.sleep(ANSWER_SECONDS)
            os._exit(1)
