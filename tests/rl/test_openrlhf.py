"""OpenRLHF's calls over a real engine. Its own actor, and weights by a group of a trainer, are `tests/frameworks`."""

from __future__ import annotations

import ast
import asyncio
import re
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.multiprocessing.reductions import reduce_tensor

from headrace.rl.demo import POLICY
from headrace.rl.openrlhf import OpenRLHFWorker
from headrace.types.errors import ConfigError, RequestError, WeightUpdateError
from tests.arch.source import ROOT
from tests.free_ports import free_port
from tests.server.vllm_client import stateless_group

TEXT = (ROOT / "docs" / "openrlhf.md").read_text(encoding="utf-8")


def test_what_the_docs_show_works(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    source = block.replace("Qwen/Qwen3-0.6B", str(POLICY)).replace(
        "max_model_len=512", "max_model_len=64, num_threads=1"
    )
    code = compile(source, "docs/openrlhf.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    asyncio.run(eval(code, {"__name__": "example"}))
    assert capsys.readouterr().out.count("[") == 2


async def _by_handles(worker: OpenRLHFWorker, tensors: list[tuple[str, Any]]) -> None:
    """In the steps of `broadcast_to_vllm`."""
    for count, (name, tensor) in enumerate(tensors, 1):
        handles = {"cpu": reduce_tensor(tensor.clone())}
        await worker.update_weight_cuda_ipc(name, tensor.dtype, tensor.shape, handles, count == len(tensors))


async def _by_broadcast(worker: OpenRLHFWorker, tensors: list[tuple[str, Any]]) -> None:
    """As a trainer that begins anew each time: rank 0 of a group that meets as vLLM's does."""
    port = free_port()
    joined = asyncio.create_task(worker.init_process_group("127.0.0.1", port, 1, 2, "openrlhf", "gloo"))
    group = await asyncio.to_thread(stateless_group, port, 2)
    await joined
    for count, (name, tensor) in enumerate(tensors, 1):
        taken = asyncio.create_task(
            worker.update_weight(name, tensor.dtype, tensor.shape, empty_cache=count == len(tensors))
        )
        await asyncio.to_thread(group.broadcast([tensor]).wait)
        await taken


async def _updated_twice() -> None:
    tensors = list(load_file(POLICY / "model.safetensors").items())
    worker = OpenRLHFWorker(str(POLICY), max_model_len=64, num_threads=1, enforce_eager=True, trust_remote_code=True)
    (name, tensor), *rest = tensors
    with pytest.raises(WeightUpdateError, match=re.escape(name)):
        await _by_handles(worker, rest)
    assert worker.engine.version == "default"
    await _by_handles(worker, tensors)
    assert worker.engine.version == "1"
    await _by_broadcast(worker, tensors)
    assert worker.engine.version == "2"
    with pytest.raises(WeightUpdateError, match=re.escape(name)):
        await _by_broadcast(worker, rest)
    assert worker.engine.version == "2"
    with pytest.raises(WeightUpdateError, match="not that of a cpu tensor"):
        await worker.update_weight_cuda_ipc(name, tensor.dtype, tensor.shape, {"cpu": (print, ("called",))})
    with pytest.raises(RequestError, match="enable_sleep_mode"):
        await worker.sleep()
    with pytest.raises(RequestError, match="sync_with_ray"):
        await worker.init_process_group("127.0.0.1", 1, 1, 2, "g", "gloo", use_ray=True)
    await worker.shutdown()


def test_an_update_ends_with_the_tensor_that_is_said_to_be_its_last() -> None:
    asyncio.run(_updated_twice())


def test_settings_of_vllm_that_mean_nothing_here_are_named() -> None:
    with pytest.raises(ConfigError, match="logprobs_mode"):
        OpenRLHFWorker(str(POLICY), logprobs_mode="raw_logits")
    with pytest.raises(ConfigError, match="limit_mm_per_prompt"):
        OpenRLHFWorker(str(POLICY), limit_mm_per_prompt={"image": 1})
