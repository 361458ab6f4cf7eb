"""What the parameters of Megatron-Core's ranks are, written down once more, straight from how it makes and splits them:
an oracle that shares no code with `headrace.rl.megatron_layout`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from headrace.config import ModelSpec
from headrace.models import weight_map
from headrace.rl import hf_named_tensors
from headrace.rl.megatron_layout import MegatronPlace
from headrace.weights.shard import Shard
from headrace.weights.store import WeightStore

State = dict[str, torch.Tensor]


class Mesh(NamedTuple):
    """Sizes of a mesh, and one rank of it."""

    tensor: int = 1
    stages: int = 1
    chunks: int = 1
    experts: int = 1
    expert_tensor: int = 1
    tensor_rank: int = 0
    stage: int = 0
    expert_rank: int = 0
    expert_tensor_rank: int = 0


class Naming(NamedTuple):
    """Choices of a layer spec."""

    fuses_norms: bool = True
    numbers_experts: bool = True
    vocabulary_multiple: int = 1


def rank_chunks(model: PreTrainedModel, mesh: Mesh, naming: Naming) -> list[tuple[State, int]]:
    """The parameters of each chunk of one rank, under its local names, and the chunk's first layer."""
    state, config = dict(model.state_dict()), model.config
    per_chunk = config.num_hidden_layers // (mesh.stages * mesh.chunks)
    found = []
    for chunk in range(mesh.chunks):
        first = (chunk * mesh.stages + mesh.stage) * per_chunk
        params: State = {}
        is_first = mesh.stage == 0 and chunk == 0
        is_last = mesh.stage == mesh.stages - 1 and chunk == mesh.chunks - 1
        if is_first:
            embedding = state["model.embed_tokens.weight"]
            params["embedding.word_embeddings.weight"] = _vocabulary(embedding, mesh, naming)
        for local in range(per_chunk):
            layer = _layer(state, f"model.layers.{first + local}", config, mesh, naming)
            params |= {f"decoder.layers.{local}.{name}": tensor for name, tensor in layer.items()}
        if is_last:
            params["decoder.final_layernorm.weight"] = state["model.norm.weight"]
            params["output_layer.weight"] = _vocabulary(state["lm_head.weight"], mesh, naming)
        found.append((params, first))
    return found


def _vocabulary(tensor: torch.Tensor, mesh: Mesh, naming: Naming) -> torch.Tensor:
    """`VocabParallelEmbedding`: padded to a multiple of make-vocab-size-divisible-by times the ranks, split evenly."""
    multiple = naming.vocabulary_multiple * mesh.tensor
    padded = -(-tensor.shape[0] // multiple) * multiple
    rest = torch.full((padded - tensor.shape[0], tensor.shape[1]), 7.0, dtype=tensor.dtype)
    return torch.cat([tensor, rest]).chunk(mesh.tensor)[mesh.tensor_rank]


def _layer(state: State, prefix: str, config: Any, mesh: Mesh, naming: Naming) -> State:
    def of(name: str) -> torch.Tensor:
        return state[f"{prefix}.{name}"]

    def share(tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return tensor.chunk(mesh.tensor, dim=axis)[mesh.tensor_rank]

    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    names = norms if naming.fuses_norms else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    has_experts = f"{prefix}.mlp.gate.weight" in state
    found = {
        names[0]: of("input_layernorm.weight"),
        (names[1] if not has_experts else "pre_mlp_layernorm.weight"): of("post_attention_layernorm.weight"),
        "self_attention.linear_proj.weight": share(of("self_attn.o_proj.weight"), 1),
    }
    groups = config.num_key_value_heads
    for kind in ("weight", "bias"):
        if f"{prefix}.self_attn.q_proj.{kind}" in state:
            q, k, v = (of(f"self_attn.{each}_proj.{kind}").chunk(groups) for each in "qkv")
            fused = torch.cat([part for group in zip(q, k, v, strict=True) for part in group])
            found[f"self_attention.linear_qkv.{kind}"] = share(fused)
    if f"{prefix}.self_attn.q_norm.weight" in state:
        found["self_attention.q_layernorm.weight"] = of("self_attn.q_norm.weight")
        found["self_attention.k_layernorm.weight"] = of("self_attn.k_norm.weight")
    if has_experts:
        return found | {"mlp.router.weight": of("mlp.gate.weight")} | _experts(state, prefix, mesh, naming)
    found["mlp.linear_fc1.weight"] = torch.cat([share(of("mlp.gate_proj.weight")), share(of("mlp.up_proj.weight"))])
    found["mlp.linear_fc2.weight"] = share(of("mlp.down_proj.weight"), 1)
    return found


def _experts(state: State, prefix: str, mesh: Mesh, naming: Naming) -> State:
    """Each rank's experts, numbered from 0 there. The state dicts of transformers have all in two tensors."""
    gate_up, down = state[f"{prefix}.mlp.experts.gate_up_proj"], state[f"{prefix}.mlp.experts.down_proj"]
    per_rank = gate_up.shape[0] // mesh.experts
    found: State = {}
    for local in range(per_rank):
        expert = mesh.expert_rank * per_rank + local
        gate, up = gate_up[expert].chunk(2)
        fc1 = torch.cat([each.chunk(mesh.expert_tensor)[mesh.expert_tensor_rank] for each in (gate, up)])
        fc2 = down[expert].chunk(mesh.expert_tensor, dim=1)[mesh.expert_tensor_rank]
        if naming.numbers_experts:
            found |= {f"mlp.experts.linear_fc1.weight{local}": fc1, f"mlp.experts.linear_fc2.weight{local}": fc2}
        else:
            stem = f"mlp.experts.local_experts.{local}"
            found |= {f"{stem}.linear_fc1.weight": fc1, f"{stem}.linear_fc2.weight": fc2}
    return found


def place_of(mesh: Mesh) -> MegatronPlace:
    return MegatronPlace(
        Shard(mesh.tensor_rank, mesh.tensor),
        Shard(mesh.expert_rank, mesh.experts),
        Shard(mesh.expert_tensor_rank, mesh.expert_tensor),
    )


def file_tensors(model: PreTrainedModel) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint of this model."""
    spec = ModelSpec.from_config(model.config.to_dict())
    store = WeightStore(weight_map(spec), torch.float32, torch.device("cpu"))
    store.load(hf_named_tensors(model, keep_tied_head=not spec.tie_word_embeddings))
    regions = {name: store._region(name) for name in store.weight_map.rules_by_name}
    return spec, {
        name: region.read(slice(0, region.num_elements)).view(region.shape).clone() for name, region in regions.items()
    }
