"""A model whose chat template does not end: the chat routes refuse, the others and the end of the server go on."""

from __future__ import annotations

import concurrent.futures
import shutil
import time
from pathlib import Path

import httpx
import pytest

from headrace.text import templates
from tests.server.conftest import START

LOOP = (
    "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}{{ messages[0].content }}"
)
ROUTES = {"/v1/chat/completions": {"max_tokens": 1}, "/tokenize": {}}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(LOOP)
    return tmp_path


def test_a_template_that_loops_stops_nobody(folder: Path, start: START, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1.0)
    served = start(folder)

    def post(path: str, content: str) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **ROUTES[path]}
        return httpx.post(served.url + path, json=body, timeout=60)

    assert all(post(path, "hello").status_code == 200 for path in ROUTES)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        looping = [pool.submit(post, path, "loop") for path in ROUTES]
        while not all(each.done() for each in looping):
            assert served.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})["output_ids"]
            assert post("/v1/chat/completions", "hello").status_code == 200
    for each in looping:
        reply = each.result()
        assert (reply.status_code, reply.json()["param"]) == (400, "messages")
        assert "within 1 s" in reply.json()["message"]


def test_a_server_that_stops_waits_for_no_template(folder: Path, start: START, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1000.0)
    served = start(folder, drain_timeout=0.1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"messages": [{"role": "user", "content": "loop"}]}
        reply = pool.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body, timeout=60)
        renderer = served.engine.asynchronous.tokenizer._renderer  # type: ignore[union-attr]
        while not renderer._busy:
            time.sleep(0.01)
        served.handle.stop()
        assert reply.result().status_code == 400
