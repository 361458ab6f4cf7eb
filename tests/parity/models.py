"""Random small models of every family, made with transformers, and our decoder over their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from headrace import models
from headrace.attention import AttentionShape, Heads, build_backend
from headrace.config import ModelSpec
from headrace.kernels import select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import rope_tables
from headrace.layers.step import ForwardStep
from headrace.runner.batch import build_batch
from headrace.runner.slots import InputTable
from headrace.types.plan import StepPlan
from headrace.weights.store import WeightStore

VOCAB_SIZE = 101
CONTEXT_LENGTH = 256

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
}
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
}
"""What only some families have. A constant must have another value than the one that means nothing, as 1.0 does."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model whose logits are far from flat."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    config = CONFIGS[family](**(settings | OWN_FIELDS.get(family, {}) | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """float32 [len(token_ids), V], by transformers."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint folder as transformers writes it."""
    model.save_pretrained(folder)
    return folder


class Device:
    """What the runner is made of, without sampling: executes a plan and returns the logits of every packed token.

    `spec` and `state` are the model's own unless given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        numerics: str = "fast",
        backend: str = "cpu",
        page_size: int = 16,
        num_pages: int = 300,
        num_slots: int = 40,
        dtype: torch.dtype = torch.float32,
        spec: ModelSpec | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        self.spec = spec = spec or ModelSpec.from_config(config)
        self.store = WeightStore(models.weight_map(spec), dtype, torch.device("cpu"))
        self.store.load((state or model.state_dict()).items())
        kernels = select_kernels("reference" if backend == "reference" else numerics)
        self.decoder = models.build(spec, self.store, kernels=kernels)
        self.pools = [KvPool(KvGeometry.of_group(group, num_pages, page_size), dtype) for group in spec.kv_groups]
        self.attention = [
            build_backend(
                backend,
                numerics,
                Heads(
                    AttentionShape.of_group(group),
                    kernels,
                    rope_tables(group.rope, group.head_dim, CONTEXT_LENGTH, dtype),
                ),
                pool,
            )
            for group, pool in zip(spec.kv_groups, self.pools, strict=True)
        ]
        self.slots = InputTable(num_slots, -(-CONTEXT_LENGTH // page_size))

    def run(self, plan: StepPlan) -> dict[int, Tensor]:
        """Logits [row length, V] by slot."""
        with torch.inference_mode():
            self.slots.apply(plan)
            batch = build_batch(plan, self.slots)
            step = ForwardStep([backend.plan(batch.attention) for backend in self.attention])
            hidden = self.decoder.forward(self.decoder.embed(batch.token_ids), step)
            logits = self.decoder.logits(hidden)
        rows = logits.split([int(length) for length in plan.row_lengths])
        return {int(slot): row for slot, row in zip(plan.row_slots, rows, strict=True)}
