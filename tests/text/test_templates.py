"""Chat templates that do what transformers does, and hostile ones that harm nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headrace.text import Tokenizer, templates
from headrace.text.templates import TemplateRenderer
from headrace.types.errors import DeadlineError, RequestError, UnavailableError
from tests.arch.source import ROOT
from tests.processes import runs
from tests.text import builders

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "héllo\n"},
    {
        "role": "assistant",
        "content": "",
        "reasoning": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    },
    {"role": "tool", "content": "3", "name": None},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "b": [1, 2.5, None]}}}
]
ALIKE = (
    "{% for m in messages %}{{ m.role }}|{{ m.content }}|{{ m.name is defined }}|{{ m }}\n{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    "{% for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}\n  {{ m.content | trim }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x is defined }}{{ dict(a=1) }}{{ dict.fromkeys([1], 2) }}",
    "{% if add_generation_prompt %}<go>{% endif %}{{ thinking | default('off') }}{{ documents is none }}",
    "{% macro f(m) %}[{{ m.reasoning_content }}{{ m.thinking }}]{% endmacro %}{{ f(messages[2]) }}",
    "{{ strftime_now('%Y') }}{{ range(3) | list }}{{ messages[1]['content'].encode('utf-8') | length }}",
)
REFUSED = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "compiled loop": "{{ (range(99999) | list | string) * 99999 | length }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "string": "{{ 'a' * 10 ** 10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='aa') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for %}",
    "raised": "{{ raise_exception('roles must alternate') }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() | string }}{{ raise_exception('x') }}",
    "globals": "{{ namespace.__init__.__globals__['sys'].exit(1) }}",
    "own names": "{% set ns = namespace(__class__=1) %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "file": "{% include '/etc/passwd' %}",
    "mutation": "{% do messages.append(1) %}{{ messages.append(1) }}",
}


@pytest.fixture(scope="module")
def renderer() -> TemplateRenderer:
    return TemplateRenderer()


def tokenizer_of(template: Any) -> Tokenizer:
    return Tokenizer(builders.byte_level(template))


@pytest.mark.parametrize("template", ALIKE)
def test_the_text_is_that_of_transformers(template: str) -> None:
    backend = builders.byte_level(template)
    ours = Tokenizer(backend)
    for tools in (None, TOOLS):
        for more in (dict[str, Any](), {"thinking": "on", "bos_token": "<b>"}):
            expected = backend.apply_chat_template(
                MESSAGES, tools=tools, add_generation_prompt=True, tokenize=False, **more
            )
            assert ours.render_chat(MESSAGES, tools, True, **more) == expected


def test_one_of_several_templates_is_chosen_as_transformers_does() -> None:
    named = {"default": "plain {{ tools is none }}", "tool_use": "tools {{ tools | length }}"}
    backend = builders.byte_level(None)
    backend.chat_template = named
    ours = Tokenizer(backend)
    assert [ours.render_chat(MESSAGES, tools) for tools in (None, [], TOOLS)] == ["plain True", "plain True", "tools 1"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_template_is_refused_and_the_next_one_renders(
    name: str, renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.4)
    with pytest.raises(RequestError) as raised:
        renderer.render(REFUSED[name], MESSAGES, {})
    assert raised.value.field == "messages" and len(raised.value.message) < 2000
    monkeypatch.setattr(templates, "RENDER_SECONDS", 30.0)
    assert renderer.render("{{ messages[0].role }}", MESSAGES, {}) == "system"


def test_a_slow_one_holds_up_no_other(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 60.0)
    slow = [renderer.submit(REFUSED["loop"], MESSAGES, {}) for _ in range(templates.MAX_PROCESSES - 1)]
    assert renderer.submit("{{ messages | length }}", MESSAGES, {}).result(60) == "4"
    assert not any(each.done() for each in slow)
    while not all(each.done() for each in slow):
        renderer.interrupt()
        time.sleep(0.01)
    assert all(isinstance(each.exception(), RequestError) for each in slow)
    monkeypatch.setattr(templates, "WAIT_SECONDS", 0.0)
    with pytest.raises(DeadlineError):
        renderer.submit("x", MESSAGES, {}).result(60)


def test_what_is_no_json_is_refused_and_what_is_nearly_is_not(renderer: TemplateRenderer) -> None:
    with pytest.raises(RequestError, match="JSON"):
        renderer.render("x", [{"role": "user", "content": object()}], {})
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(RequestError, match="JSON"):
        renderer.render("x", [circle], {})
    numbers = {"big": 1 << 80, "half": 0.5, "text": "\ud800", "tuple": (1, 2)}
    assert renderer.render("{{ big + 1 }}{{ half }}{{ tuple[1] }}", [], numbers) == f"{(1 << 80) + 1}0.52"
    assert tokenizer_of("x").apply_chat_template(MESSAGES, tokenize=False) == "x"


def test_a_process_that_was_killed_is_replaced() -> None:
    own = TemplateRenderer()
    assert own.render("a", [], {}) == "a"
    (process,) = own._idle
    process._process.kill()
    process._process.wait()
    assert own.render("b", [], {}) == "b"


def test_no_process_outlives_its_owner() -> None:
    """Nor its owner's death while it loops."""
    script = """
import sys, threading, time
from headrace.text.templates import TemplateRenderer
renderer = TemplateRenderer()
renderer.render("x", [], {})
print(renderer._idle[0]._process.pid, flush=True)
if sys.argv[1] == "killed":
    sys.stdin.read()
"""
    for word in ("ended", "killed"):
        with subprocess.Popen(
            [sys.executable, "-c", script, word], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline())
            if word == "killed":
                owner.kill()
        while runs(pid):
            time.sleep(0.01)


def test_no_process_to_be_had_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(templates, "_SCRIPT", tmp_path / "none.py")
    with pytest.raises(UnavailableError):
        TemplateRenderer().render("x", [], {})


def test_a_fork_has_processes_of_its_own(renderer: TemplateRenderer) -> None:
    assert renderer.render("a", [], {}) == "a"
    child = os.fork()
    if child == 0:
        os._exit(0 if renderer.render("b", [], {}) == "b" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert renderer.render("c", [], {}) == "c"
