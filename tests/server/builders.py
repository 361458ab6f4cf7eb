"""What the server's tests run on: two small checkpoints with tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.text import builders

CONTEXT_LENGTH = 1024
VOCAB_SIZE = 416
SETTINGS: dict[str, Any] = {"num_threads": 1, "page_size": 4, "kv_pool_tokens": 1 << 14, "dtype": "float32", "seed": 0}
SCRIPT = ("I will add. ", "<tool_call>", '\n{"name": "add", ', '"arguments": {"a": 1, "b": 2}}\n', "</tool_call>")


def save_random_model(folder: Path, seed: int = 0, *, num_layers: int = 2) -> Path:
    """A random model whose distribution is far from flat, with a byte-level tokenizer; returns the folder."""
    torch.manual_seed(seed)
    Qwen3ForCausalLM(_config(hidden_size=32, num_layers=num_layers)).save_pretrained(folder)
    builders.byte_level().save_pretrained(folder)
    return folder


def save_scripted_model(folder: Path) -> Path:
    """A model that answers every prompt ending in a new line with the texts of `SCRIPT`, then ends.

    Each text is one token. Attention and MLP add nothing, embeddings are one-hot, and the output layer maps each token
    to its successor.
    """
    tokenizer = builders.byte_level()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in SCRIPT])
    return save_chain(folder, tokenizer, ["\u010a", *SCRIPT])  # U+010A is how byte-level vocabularies write a new line


def save_chain(folder: Path, tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> Path:
    """A model after which each of `tokens` is followed by the next one, and the last by the end of sequence."""
    chain = [*map(tokenizer.convert_tokens_to_ids, tokens), tokenizer.eos_token_id]
    assert None not in chain and len(set(chain)) == len(chain)
    model = Qwen3ForCausalLM(_config(hidden_size=VOCAB_SIZE, num_layers=1))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[successor, token] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, as transformers loads it."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _config(hidden_size: int, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT_LENGTH,
        eos_token_id=2,
        bos_token_id=None,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
