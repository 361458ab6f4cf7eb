"""Models of Megatron-Core itself, on CPUs: what it takes for granted of CUDA is stood in for."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel


class HostMemory:
    """Its global buffer, which is on a device."""

    def get_tensor(self, shape: Any, dtype: torch.dtype, name: str, mem_alloc_context: Any = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


class NoTracker:
    """Its random states, which are of devices."""

    def fork(self, *_: Any) -> Any:
        return contextlib.nullcontext()


def set_up(tensor: int, stages: int, chunks: int, experts: int) -> None:
    """`parallel_state` over all ranks of the default group."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel  # type: ignore[import-not-found]
    from megatron.core.transformer.moe import moe_utils  # type: ignore[import-not-found]

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    parallel_state.get_global_memory_buffer = lambda: HostMemory()
    tensor_parallel.layers.get_global_memory_buffer = lambda: HostMemory()
    tensor_parallel.get_cuda_rng_tracker = tensor_parallel.random.get_cuda_rng_tracker = lambda: NoTracker()
    moe_utils.te_general_gemm = None
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=1 if experts > 1 else tensor,
    )


def build(model: PreTrainedModel, tensor: int, stages: int, chunks: int, experts: int, vocab_size: int) -> list[Any]:
    """This rank's chunks of a `GPTModel` of the same shape, with weights of their own."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # type: ignore[import-not-found]
    from megatron.core.models.gpt.gpt_model import GPTModel  # type: ignore[import-not-found]
    from megatron.core.transformer.transformer_config import TransformerConfig  # type: ignore[import-not-found]

    settings = model.config
    num_experts = getattr(settings, "num_experts", None)
    norms_heads = settings.model_type.startswith("qwen3")
    config = TransformerConfig(
        num_layers=settings.num_hidden_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        num_query_groups=settings.num_key_value_heads,
        kv_channels=getattr(settings, "head_dim", None),
        ffn_hidden_size=settings.intermediate_size,
        layernorm_epsilon=settings.rms_norm_eps,
        qk_layernorm=norms_heads,
        add_qkv_bias=settings.model_type == "qwen2",
        num_moe_experts=num_experts,
        moe_router_topk=getattr(settings, "num_experts_per_tok", 2),
        moe_ffn_hidden_size=getattr(settings, "moe_intermediate_size", None),
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=1 if experts > 1 else tensor,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=norms_heads, normalization="RMSNorm"
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return [
        GPTModel(
            config,
            layer,
            vocab_size=vocab_size,
            max_sequence_length=64,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == stages - 1 and chunk == chunks - 1,
            parallel_output=False,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=settings.rope_parameters["rope_theta"],
            vp_stage=chunk if chunks > 1 else None,
        ).eval()
        for chunk in range(chunks)
    ]


def logits_of(chunks: list[Any], token_ids: list[int]) -> torch.Tensor | None:
    """float32 [len(token_ids), padded vocabulary] where the last chunk is; None elsewhere. All stages call this: what
    comes out of a chunk goes to all, and into the next."""
    from megatron.core import parallel_state

    group, own = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_pipeline_model_parallel_rank()
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    count, hidden_size = len(token_ids), chunks[0].config.hidden_size
    mask = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
    hidden = torch.empty(count, 1, hidden_size)
    for number, chunk in enumerate(chunks):
        for stage in range(num_stages):
            if stage == own:
                if not chunk.pre_process:
                    chunk.set_input_tensor(hidden.clone())
                with torch.no_grad():
                    found: torch.Tensor = chunk(torch.tensor([token_ids]), torch.arange(count)[None], mask)
                if chunk.post_process:
                    return found[0]
                hidden.copy_(found)
            if (number, stage) != (len(chunks) - 1, num_stages - 1):
                distributed.broadcast(hidden, group=group, group_src=stage)
    return None
