"""A tiny random model on disk and engines on it, shared by the acceptance tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from headrace import Engine

VOCAB_SIZE = 96
EOS_ID = 2
SETTINGS: dict[str, Any] = {
    "inprocess": True,
    "skip_tokenizer_init": True,
    "num_threads": 1,
    "page_size": 4,
    "kv_pool_tokens": 16384,
    "seed": 0,
}


def tiny_model(seed: int) -> Qwen3ForCausalLM:
    """A random model with logits far enough apart that its distribution is not flat."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=EOS_ID,
        bos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


def named_tensors(model: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """What a trainer would push."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of three models of one shape and different weights."""
    made = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"tiny{seed}")
        tiny_model(seed).save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture
def engine_on(folders: list[Path]) -> Iterator[Callable[..., Engine]]:
    """Start in-process engines that are shut down at the end of the test."""
    started: list[Engine] = []

    def start(index: int = 0, **config: Any) -> Engine:
        started.append(Engine(**{"model": str(folders[index]), **SETTINGS, **config}))
        return started[-1]

    yield start
    for engine in started:
        engine.shutdown()
