"""Makes the policy of `headrace demo --tools`, from nothing but this file: `python -m tools.make_tool_policy [FOLDER]`.

Owns its tokenizer, its chat template and its warm-up. The warm-up has two halves. First the model learns from a teacher
who always asks the calculator and copies without a slip; then it imitates a sloppy one, who mostly guesses, and slips
where it asks. What results knows how to call the tool, seldom does, and is mostly wrong.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from headrace.rl.arithmetic import reply
from headrace.rl.demo import TOOL_POLICY
from headrace.rl.products import Product, draw_products
from tools.make_policy import TURN_END, make_config, make_tokenizer, save_policy, train

SEED = 30
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BATCH_SIZE = 96
RIGHT_STEPS = 700
SLOPPY_STEPS = 120
ASKS = 0.3
"""How often the sloppy teacher asks the calculator instead of guessing."""
SLIPS = 0.2
"""How often it slips when it writes down an expression, and when it copies the answer."""
BREAKS = 0.1
"""How often what it writes down is no call."""

Teacher = Callable[[random.Random, Product], list[tuple[str, bool]]]


def asked(expression: str, answer: int, copied: int, ending: str = "}}</tool_call>") -> list[tuple[str, bool]]:
    """A conversation's turns behind the question, as (text, is the model's)."""
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return [
        (f"<tool_call>{call.removesuffix('}}')}{ending}{TURN_END}", True),
        (f"\n<|im_start|>tool\n{answer}{TURN_END}\n<|im_start|>assistant\n", False),
        (reply(copied) + TURN_END, True),
    ]


def right_turns(source: random.Random, product: Product) -> list[tuple[str, bool]]:
    """The teacher of the first half. It asks with any two numbers' product, so that copying is what is learned."""
    return asked(f"{product.left}*{product.right}", product.answer, product.answer)


def sloppy_turns(source: random.Random, product: Product) -> list[tuple[str, bool]]:
    """The teacher of the second half."""
    if source.random() >= ASKS:
        return [(reply(source.randint(100, 9999)) + TURN_END, True)]
    if source.random() < BREAKS:
        return asked(f"{product.left}*{product.right}", product.answer, 0, ending="</tool_call>")[:1]
    left = source.randint(10, 99) if source.random() < SLIPS else product.left
    answer = left * product.right
    return asked(f"{left}*{product.right}", answer, source.randint(100, 9999) if source.random() < SLIPS else answer)


def make_tool_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer with a token for each tag of a call, as Qwen's have."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, products: list[Product], conversations: list[list[tuple[str, bool]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [batch, longest]; labels are -100 for what is not the model's."""
    rows = []
    for product, turns in zip(products, conversations, strict=True):
        messages = [{"role": "user", "content": product.question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append([(tokenizer.encode(text), is_own) for text, is_own in [(prompt, False), *turns]])
    longest = max(sum(len(ids) for ids, _ in row) for row in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, parts in enumerate(rows):
        start = 0
        for ids, is_own in parts:
            end = start + len(ids)
            input_ids[row, start:end] = torch.tensor(ids)
            if is_own:
                labels[row, start:end] = torch.tensor(ids)
            start = end
    return input_ids, labels


def batches_of(
    tokenizer: PreTrainedTokenizerFast, teacher: Teacher, source: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fresh products as the teacher talks about them, without end; see `encode_batch`."""
    while True:
        products = draw_products(source, BATCH_SIZE)
        yield encode_batch(tokenizer, products, [teacher(source, product) for product in products])


def make_tool_policy(folder: Path, seed: int = SEED) -> None:
    """Train the policy and write it to `folder` as a Hugging Face checkpoint. Some ten minutes on two cores."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    tokenizer = make_tool_tokenizer()
    model = Qwen3ForCausalLM(make_config(tokenizer))
    train(model, batches_of(tokenizer, right_turns, source), RIGHT_STEPS, 3e-3, "right turns")
    train(model, batches_of(tokenizer, sloppy_turns, source), SLOPPY_STEPS, 1e-3, "sloppy turns")
    save_policy(model, tokenizer, folder)


if __name__ == "__main__":
    make_tool_policy(Path(sys.argv[1]) if len(sys.argv) > 1 else TOOL_POLICY)
