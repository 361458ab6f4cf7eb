"""Keys of other engines' dialects on the OpenAI routes: done, or refused by name; never passed over."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import START, Served
from tests.text import builders

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
REFUSED: list[tuple[str, list[Any], list[Any]]] = [
    ("allowed_token_ids", [[0], [5, 6]], [None, []]),
    ("bad_words", [["x"]], [None, [], [""]]),
    ("logprob_token_ids", [[0]], [None, []]),
    ("prompt_logprobs", [-1, True], [None, 0, 1]),
    ("use_beam_search", [True], [None, False]),
    ("length_penalty", [0.5, 2], [None, 1, 1.0, 0]),
    ("logits_processors", [["a.b"]], [None, []]),
    ("guided_json", [{"type": "object"}, "{}"], [None, {}]),
    ("guided_regex", ["a+"], [None, ""]),
    ("guided_choice", [["a", "b"]], [None, []]),
    ("guided_grammar", ["root"], [None]),
    ("guided_decoding_backend", ["outlines"], [None]),
    ("structured_outputs", [{"regex": "a"}], [None, {}]),
    (
        "response_format",
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
        [None, {"type": "text"}],
    ),
    ("best_of", [2, 5], [None, 0, 1]),
    ("echo", [True], [None, False]),
    ("suffix", ["x"], [None, ""]),
    ("modalities", [["text", "audio"], ["audio"]], [None, [], ["text"]]),
    ("audio", [{"voice": "x"}], [None]),
    ("vllm_xargs", [{"a": 1}], [None, {}]),
    ("kv_transfer_params", [{"a": 1}], [None, {}]),
    ("thinking_token_budget", [5], [None]),
    ("input_ids", [[0], [1]], [None, []]),
    ("lora_path", ["a"], [None, ""]),
]


@pytest.mark.parametrize(("key", "refused", "accepted"), REFUSED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_lacking_is_refused_by_name(
    served: Served, path: str, key: str, refused: list[Any], accepted: list[Any]
) -> None:
    body = {"prompt": "a", "messages": MESSAGES, "max_tokens": 1}
    body.pop("prompt" if "chat" in path else "messages")
    for value in refused:
        reply = served.http.post(path, json={**body, key: value})
        assert (reply.status_code, reply.json().get("param")) == (400, key), value
    for value in accepted:
        reply = served.http.post(path, json={**body, key: value})
        assert reply.status_code == 200, (value, reply.text)
        assert key not in reply.headers.get("x-headrace-warnings", "")


def ids(served: Served, path: str, **body: Any) -> Any:
    content = {"messages": MESSAGES} if "chat" in path else {"prompt": "The wheel"}
    reply = served.http.post(path, json={**content, "max_tokens": 8, "return_token_ids": True, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_seeds_of_either_sign(served: Served, path: str) -> None:
    unseeded = [tuple(ids(served, path, seed=-1, temperature=2.0, max_tokens=20)) for _ in range(3)]
    assert len(set(unseeded)) > 1, "-1 is no seed"
    for seed in (-2, -(1 << 63), (1 << 64) - 1):
        assert ids(served, path, seed=seed) == ids(served, path, seed=seed % (1 << 64))
    refused: list[Any] = [-(1 << 63) - 1, 1 << 64, "-1", True]
    for seed in refused:
        body = {"messages": MESSAGES, "prompt": "a", "seed": seed}
        body.pop("prompt" if "chat" in path else "messages")
        assert served.http.post(path, json=body).json()["param"] == "seed"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_mass_leaves_the_most_probable(served: Served, path: str) -> None:
    assert ids(served, path, top_p=0, seed=3) == ids(served, path, top_p=0.0) == ids(served, path, temperature=0)
    for top_p in (-0.1, 1.1, "0", False):
        body = {"messages": MESSAGES, "prompt": "a", "top_p": top_p}
        body.pop("prompt" if "chat" in path else "messages")
        assert served.http.post(path, json=body).json()["param"] == "top_p"


def test_the_stop_string_may_stay(served: Served) -> None:
    body = {"prompt": "x", "max_tokens": 24, "temperature": 0}
    text = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = text[5:7]
    body |= {"stop": [stop], "include_stop_str_in_output": True}
    assert served.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text[: text.index(stop) + 2]


def test_a_prompt_is_cut_to_its_end(served: Served) -> None:
    def prompt_of(**body: Any) -> Any:
        reply = served.http.post("/v1/completions", json={"max_tokens": 1, "return_token_ids": True, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["prompt_token_ids"]

    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    text = "the wheel is new. " * 2_000
    whole = tokenizer.encode(text)
    assert prompt_of(prompt=text, truncate_prompt_tokens=7) == whole[-7:]
    assert prompt_of(prompt=text, truncate_prompt_tokens=-1, max_tokens=24) == whole[-1000:]
    assert prompt_of(prompt=list(range(20)), truncate_prompt_tokens=3) == [17, 18, 19]
    assert prompt_of(prompt="ab", truncate_prompt_tokens=100) == tokenizer.encode("ab")
    assert prompt_of(prompt=" " * 5_000, truncate_prompt_tokens=4) == tokenizer.encode(" " * 5_000)[-4:]
    for none in (None, 0):
        assert prompt_of(prompt=[1, 2, 3], truncate_prompt_tokens=none) == [1, 2, 3]
    body = {"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": -1, "max_completion_tokens": 24}
    reply = served.http.post("/v1/chat/completions", json={**body, "return_token_ids": True}).json()
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    assert reply["prompt_token_ids"] == rendered[-1000:]
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        refused = served.http.post(path, json={**prompt, "truncate_prompt_tokens": -2})
        assert refused.json()["param"] == "truncate_prompt_tokens"


def test_a_second_beginning_of_sequence_is_warned_of_and_can_be_left_out(start: START, tmp_path: Any) -> None:
    from tokenizers import processors

    from tests.server.builders import save_random_model

    folder = save_random_model(tmp_path)
    tokenizer = builders.byte_level("<|endoftext|>{{ messages[0].content }}")
    (bos,) = tokenizer.encode("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.save_pretrained(folder)
    served = start(folder)
    text = "<|endoftext|>hi"
    plain = tokenizer.encode("hi", add_special_tokens=False)
    for special, expected in ((True, [bos, bos, *plain]), (False, [bos, *plain])):
        more = {"add_special_tokens": special}
        completion = served.http.post(
            "/v1/completions", json={"prompt": text, "max_tokens": 1, "return_token_ids": True, **more}
        )
        assert completion.json()["choices"][0]["prompt_token_ids"] == expected
        chat = served.http.post(
            "/v1/chat/completions",
            json={"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True, **more},
        )
        assert chat.json()["prompt_token_ids"] == expected
        for reply in (completion, chat):
            assert ("add_special_tokens" in reply.headers.get("x-headrace-warnings", "")) == special
        native = served.generate(
            text=[text], sampling_params={"max_new_tokens": 1}, return_prompt_token_ids=True, **more
        )
        assert native[0]["meta_info"]["prompt_token_ids"] == expected
        warnings = native[0]["meta_info"].get("warnings", [])
        assert [warning.startswith("text[0]: the beginning of sequence") for warning in warnings] == [True] * special
        for given in ({"prompt": text}, {"messages": MESSAGES}):
            assert served.http.post("/tokenize", json={**given, **more}).json()["tokens"] == expected
    assert served.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == [bos, *plain]
    assert served.http.post("/tokenize", json={"prompt": "hi"}).json()["tokens"] == [bos, *plain]
    cut = {"prompt": "hi " * 50, "max_tokens": 1, "return_token_ids": True, "truncate_prompt_tokens": 3}
    kept = served.http.post("/v1/completions", json=cut).json()["choices"][0]["prompt_token_ids"]
    assert kept == [bos, *tokenizer.encode("hi " * 50)[-2:]]
    many = {"text": [text] * 3 + ["", text], "sampling_params": {"max_new_tokens": 1}, "return_errors": True}
    assert (
        served.http.post("/generate", json=many).json()[0]["meta_info"]["warnings"][0].startswith("text[0] and 3 more:")
    )
    assert "warnings" not in served.generate(text="hi", sampling_params={"max_new_tokens": 1})["meta_info"]


def test_the_official_client_and_its_odd_but_right_keys(served: Served) -> None:
    messages: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "why"},
    ]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="default",
            messages=messages,
            max_tokens=2,
            seed=-1,
            top_p=0,
            modalities=["text"],
            reasoning_effort="low",
            extra_body={"request_id": "mine", "return_token_ids": True},
        )
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None and reply.id == "mine"
    text = tokenizer.decode(reply.prompt_token_ids, skip_special_tokens=False)  # type: ignore[attr-defined]
    assert text.count("<|im_start|>assistant\n") == 3 and "assistant\nno<|im_end|>" in text
