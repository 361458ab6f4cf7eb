"""What the engine's tests run on: a model, its tokenizer, and weights to push.

Torch and transformers are loaded by what makes a model or a tokenizer: processes that tests start want the settings
only, and would load them for seconds each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

EOS_ID = 256
VOCAB_SIZE = 260
CONTEXT_LENGTH = 1024
LETTERS = {letter: 100.0 for letter in range(ord("a"), ord("z") + 1)}
"""A logit bias under which only lower-case letters are drawn, so that text is easy to reason about."""

SETTINGS: dict[str, Any] = {
    "num_threads": 1,
    "page_size": 4,
    "kv_pool_tokens": 1 << 15,
    "dtype": "float32",
    "seed": 0,
}


def model_of(seed: int) -> Qwen3ForCausalLM:
    """A random model whose distribution is far from flat."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT_LENGTH,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        initializer_range=0.25,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def named_tensors(model: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """What a trainer would push."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def save_model(folder: Path, seed: int) -> Path:
    """A checkpoint with a tokenizer whose ids 0-255 are the bytes; returns the folder."""
    model_of(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, in byte order, then the special tokens."""
    from transformers import PreTrainedTokenizerFast

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    library = Tokenizer(models.BPE(vocab={character[byte]: byte for byte in range(256)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>", "<|user|>"])
    return PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|end|>")


def reference_logprobs(model: Qwen3ForCausalLM, token_ids: list[int], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """log_softmax(logits / temperature) [len, vocab] of the next token after each position."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].double()
    result: np.ndarray[Any, Any] = torch.log_softmax(logits / temperature, dim=-1).numpy()
    return result


def shared_memory() -> set[str]:
    """What is in shared memory under a name, but what other tests beside this one have there: tensors that senders
    share through torch, locks of multiprocessing."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("torch_", "sem.mp-"))}
