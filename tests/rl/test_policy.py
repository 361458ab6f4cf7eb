"""The policy that ships: a checkpoint anyone can load, and the script that made it."""

from __future__ import annotations

import random

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from headrace.rl.arithmetic import Problem, draw_problems, read_reply
from headrace.rl.demo import POLICY
from tools.make_policy import (
    TURN_END,
    batches_of,
    encode_batch,
    make_config,
    make_tokenizer,
    right_answer,
    sloppy_answer,
    train,
)


def test_the_shipped_files_are_those_of_the_script_and_small() -> None:
    files = {path.name: path for path in POLICY.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(path.stat().st_size for path in files.values()) <= 5_000_000
    tokenizer = make_tokenizer()
    shipped = AutoTokenizer.from_pretrained(POLICY)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    model = Qwen3ForCausalLM.from_pretrained(POLICY)
    fresh = Qwen3ForCausalLM(make_config(tokenizer))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())


def test_every_text_comes_back_from_its_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    source = random.Random(0)
    for length in range(64):
        text = "".join(
            chr(source.choice([source.randint(0, 127), source.randint(0xE000, 0x10FFFF)])) for _ in range(length)
        )
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_ids_and_end_the_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    assert tokenizer.encode(TURN_END) == [tokenizer.eos_token_id]
    assert Qwen3ForCausalLM.from_pretrained(POLICY).generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_teachers() -> None:
    source = random.Random(1)
    problems = draw_problems(source, 4000)
    assert all(right_answer(source, problem) == problem.answer for problem in problems)
    answers = [sloppy_answer(source, problem) for problem in problems]
    accuracy = sum(a == p.answer for a, p in zip(answers, problems, strict=True)) / len(problems)
    assert 0.2 < accuracy < 0.3
    assert min(sloppy_answer(source, Problem(0, 0)) for _ in range(200)) == 0


def test_labels_cover_the_reply_alone() -> None:
    tokenizer = make_tokenizer()
    problems = [Problem(1, 2), Problem(30, 99)]
    input_ids, labels = encode_batch(tokenizer, problems, [3, 129])
    for row, reply in enumerate(["<answer>3</answer><|im_end|>", "<answer>129</answer><|im_end|>"]):
        taught = labels[row][labels[row] >= 0]
        assert tokenizer.decode(taught) == reply
        assert torch.equal(taught, input_ids[row][labels[row] >= 0])


def test_the_warm_up_lowers_the_loss() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(make_config(tokenizer))
    input_ids, labels = encode_batch(tokenizer, [Problem(12, 34)] * 2, [46, 46])
    before = model(input_ids=input_ids, labels=labels).loss.item()
    train(model, batches_of(tokenizer, right_answer, random.Random(0)), num_steps=6, rate=3e-3, what="right answers")
    assert model(input_ids=input_ids, labels=labels).loss.item() < before / 1.2


def test_the_policy_is_good_at_format_and_poor_at_the_task() -> None:
    """Sampled with transformers at temperature 1, a reply to each of 256 problems."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(POLICY, padding_side="left")
    model = Qwen3ForCausalLM.from_pretrained(POLICY)
    problems = draw_problems(random.Random(5), 256)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
        )
        for problem in problems
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=24)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    values = [read_reply(text) for text in texts]
    num_right = sum(value == problem.answer for value, problem in zip(values, problems, strict=True))
    assert sum(value is not None for value in values) / len(values) > 0.9
    assert 0.1 < num_right / len(values) < 0.4
