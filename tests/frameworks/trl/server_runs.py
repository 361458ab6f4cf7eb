"""A TRL trainer with a server at an address, as a process: `python -m tests.frameworks.trl.server_runs KIND URL DIR`,
which prints one line of JSON at the end. The stand-in for vLLM's names has to be on its path.

What TRL needs CUDA for is stood in for here, and nothing else:
server  `VLLMClient.init_communicator` is told "cuda" instead of "cpu", which it refuses (the group is of gloo)
async   `torch.cuda.get_device_name`, asked for a peak of FLOPs, and the varlen attention of FlashAttention-3. TRL's
        worker knows Qwen's chat template, which writes what the policy's own does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_instruct_2507_chat_template
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, packing
from trl.generation.vllm_client import VLLMClient

from headrace import Client
from headrace.rl.trl import WeightTransfer
from tests.frameworks.trl.training import POLICY, SETTINGS, arguments, logged, right, sums


def run_server(url: str, folder: Path) -> dict[str, Any]:
    """`vllm_mode="server"`: TRL's own client against the server."""
    init = VLLMClient.init_communicator
    VLLMClient.init_communicator = lambda self, device: init(self, "cuda")
    address: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    args = arguments(GRPOConfig, folder, max_steps=4, **address)
    trainer = GRPOTrainer(str(POLICY), right, args=args, train_dataset=sums())
    trainer.train()
    client: Any = trainer.vllm_generation.vllm_client
    prompts = [[1, 2, 3], [60, 61]]
    teacher = client.get_sequence_logprobs([[*prompt, 62, 63] for prompt in prompts], [3, 2], top_logprobs=5)
    chat = client.chat([[{"role": "user", "content": "1+2=?"}]], n=2, max_tokens=4, logprobs=2)
    silent = client.generate(prompts, n=2, max_tokens=3, logprobs=None)
    return {
        "differences": logged(trainer, "sampling/sampling_logp_difference/max"),
        "teacher": teacher,
        "chat": chat,
        "silent": silent,
        "top": client.generate(prompts, max_tokens=3, logprobs=4, generation_kwargs={"seed": 1}),
    }


def run_async(url: str, folder: Path) -> dict[str, Any]:
    """AsyncGRPO: TRL's own worker samples from the server; `WeightTransfer` brings the weights there."""
    torch.cuda.get_device_name = lambda device=None: "none"
    packing._flash_attn = lambda: sys.modules[__name__]
    address: dict[str, Any] = {"vllm_server_base_url": url, "max_inflight_tasks": 16, "max_staleness": 1}
    left_out = ("beta", "gradient_checkpointing", "per_device_train_batch_size")
    settings = {name: value for name, value in SETTINGS.items() if name not in left_out}
    args = AsyncGRPOConfig(
        output_dir=str(folder), dtype="float32", max_steps=4, per_device_train_batch_size=16, **{**settings, **address}
    )
    transfer = WeightTransfer(Client(url), verify=True)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = qwen3_instruct_2507_chat_template
    trainer = AsyncGRPOTrainer(str(POLICY), right, args, sums(), processing_class=tokenizer, weight_transfer=transfer)
    trainer.train()
    return {
        "versions": [report.update.version for report in transfer.reports],
        "log": [{name: value for name, value in each.items()} for each in trainer.state.log_history],
    }


def flash_attn_varlen_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    *_: int,
    softmax_scale: float,
    **__: Any,
) -> torch.Tensor:
    """[tokens, heads, size] each; segment by segment, causal towards its last key."""
    parts = []
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2].tolist()), slice(*starts_k[i : i + 2].tolist())
        q, k, v = (each.transpose(0, 1) for each in (query[rows], key[keys], value[keys]))
        ones = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        mask = ones.tril(k.shape[1] - q.shape[1])
        attend = torch.nn.functional.scaled_dot_product_attention
        parts.append(attend(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


if __name__ == "__main__":
    run = {"server": run_server, "async": run_async}[sys.argv[1]]
    print("RESULT" + json.dumps(run(sys.argv[2], Path(sys.argv[3])), default=str))
