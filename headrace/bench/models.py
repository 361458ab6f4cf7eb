"""Model folders for benchmarks, made on the spot: a `config.json`, and for the small model random weights too.

The public shapes (Qwen3-0.6B, Qwen3-8B) are written without weights, for `load_format="dummy"`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.types.errors import ConfigError

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        **_QWEN3,
        "vocab_size": 16384,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 16383,
    },
    "tiny": {
        **_QWEN3,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 511,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 151645,
    },
    "qwen3-8b": {
        **_QWEN3,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "eos_token_id": 151645,
    },
}

WEIGHTLESS_SHAPES = ("qwen3-0.6b", "qwen3-8b")
"""Too large to be written to a file on the spot."""


def write_config(folder: Path, shape: str) -> Path:
    """Write `config.json` of a named shape into `folder`; returns `folder`."""
    if shape not in SHAPES:
        raise ConfigError(f"no model shape {shape!r}; there are {', '.join(SHAPES)}", field="shape")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1), encoding="utf-8")
    return folder


def write_model(folder: Path, shape: str = "small", *, seed: int = 0) -> Path:
    """Write `config.json` and random float32 weights (`model.safetensors`) that transformers can load too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_config(folder, shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
