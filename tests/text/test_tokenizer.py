from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.text import Tokenizer
from headrace.types.errors import ConfigError, RequestError
from tests.text import builders


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(builders.byte_level())


def test_load_from_a_folder_gives_the_same_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer._backend.save_pretrained(str(tmp_path))
    loaded = Tokenizer.load(str(tmp_path))
    text = "héllo 🙂 <|im_end|> wheel"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.eos_token_ids == tokenizer.eos_token_ids == (tokenizer.encode("<|im_end|>")[0],)
    assert loaded.chat_template == builders.HERMES_TEMPLATE


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)) as raised:
        Tokenizer.load(str(tmp_path))
    assert raised.value.field == "tokenizer"


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer._backend.save_pretrained(str(tmp_path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass T: pass\n")
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}')
    with pytest.raises(ConfigError):
        Tokenizer.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_round_trip_and_beginning_of_sequence() -> None:
    tokenizer = Tokenizer(builders.byte_fallback())
    text = "the wheel é 世"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        tokenizer.encode("a\ud800b")


def test_token_text_and_bytes() -> None:
    byte_level = Tokenizer(builders.byte_level())
    first, *rest = byte_level.encode("🙂", add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, [first, *rest])) == "🙂".encode()
    assert byte_level.token_text(first) == "\ufffd" or not rest
    assert byte_level.token_text(byte_level.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert byte_level.token_text(10**6) == ""
    sentence = Tokenizer(builders.byte_fallback())
    ids = sentence.encode("a the")
    assert sentence.token_text(ids[-1]) in ("e", " the")
    assert sentence.token_bytes(3 + 0xE4) == b"\xe4"


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.render_chat(messages)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.render_chat(messages, enable_thinking=True).endswith("<think>")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert '"name": "add"' in tokenizer.render_chat(messages, tools=[tool])


def test_a_chat_template_may_give_its_text(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.render_chat(messages)
    assert tokenizer.apply_chat_template(messages, tokenize=True) == tokenizer.apply_chat_template(messages)
    for name in ("return_tensors", "return_dict", "chat_template"):
        more: dict[str, Any] = {name: True}
        with pytest.raises(RequestError, match=f"{name} may not be set"):
            tokenizer.apply_chat_template(messages, **more)


def test_template_faults_are_the_requests_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="unknown role"):
        tokenizer.render_chat([{"role": "alien", "content": "x"}])
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(builders.byte_fallback()).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="refused"):
        Tokenizer(builders.byte_level(template)).render_chat([{"role": "user", "content": "x"}])


def test_importing_text_does_not_load_torch_or_transformers() -> None:
    code = "import sys, headrace.text; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
