"""Model folders for benchmarks, made on the spot: a `config.json`, and for the small model random weights too.

The public shapes (Qwen3, Qwen2.5-0.5B, Llama-3.1-8B) are written without weights, for `load_format="dummy"`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.types.errors import ConfigError

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def _qwen3(*sizes: int, dtype: str, is_tied: bool, eos_token_id: int) -> dict[str, Any]:
    """A `config.json`; `sizes` are those of `_SIZES`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **dict(zip(_SIZES, sizes, strict=True)),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "tie_word_embeddings": is_tied,
        "eos_token_id": eos_token_id,
    }


_QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **dict(zip(_SIZES, (151936, 896, 4864, 24, 14, 2, 64, 32768), strict=True)),
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}

_LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **dict(zip(_SIZES, (128256, 4096, 14336, 32, 32, 8, 128, 131072), strict=True)),
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

SHAPES: dict[str, dict[str, Any]] = {
    "small": _qwen3(16384, 256, 768, 6, 8, 4, 32, 4096, dtype="float32", is_tied=True, eos_token_id=16383),
    "tiny": _qwen3(512, 64, 128, 2, 4, 2, 16, 4096, dtype="float32", is_tied=True, eos_token_id=511),
    "qwen3-0.6b": _qwen3(
        151936, 1024, 3072, 28, 16, 8, 128, 40960, dtype="bfloat16", is_tied=True, eos_token_id=151645
    ),
    "qwen3-8b": _qwen3(
        151936, 4096, 12288, 36, 32, 8, 128, 40960, dtype="bfloat16", is_tied=False, eos_token_id=151645
    ),
    "qwen3-32b": _qwen3(
        151936, 5120, 25600, 64, 64, 8, 128, 40960, dtype="bfloat16", is_tied=False, eos_token_id=151645
    ),
    "qwen2.5-0.5b": _QWEN2_5_0_5B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
}

WEIGHTLESS_SHAPES = ("qwen3-0.6b", "qwen3-8b", "qwen3-32b", "qwen2.5-0.5b", "llama-3.1-8b")
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
