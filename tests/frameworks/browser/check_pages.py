"""The pages in a headless Chromium: over real servers, behind a key, under their own policy.

`make test-frameworks FRAMEWORKS=browser`. The browser is `HEADRACE_CHROMIUM`, or what the system has (Debian:
`apt-get install chromium`). Pictures are left in the folder `HEADRACE_SCREENSHOTS`, if it is set.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Client, Engine, serve
from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from tests.server.builders import SETTINGS, save_random_model

sync_api: Any = pytest.importorskip("playwright.sync_api")
WAIT_SECONDS = 60.0
KEY = "a key nobody knows"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("HEADRACE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "no Chromium: set HEADRACE_CHROMIUM"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server that has something to show: samples, rewards, two updates."""
    with Engine(folder, inprocess=True, **SETTINGS) as engine:
        served = serve(engine, api_key=KEY)
        with Client(served.url, api_key=KEY) as client:
            fill(client, folder)
        yield served.url


def fill(client: Client, folder: Path, name: str = "group") -> None:
    params = {"n": 4, "max_new_tokens": 24, "ignore_eos": True, "temperature": 1.2}
    for step in range(3):
        client.generate("once upon a time there was a mill. " * 3, sampling_params=params, request_id=f"{name}-{step}")
        client.give_rewards({f"{name}-{step}": [-1.0, 0.0, 0.5, 1.0]})
        client.update_weights_from_disk(folder, f"step-{step}", in_flight="keep")
    client.generate(HOSTILE, sampling_params={"max_new_tokens": 2, "ignore_eos": True}, request_id=HOSTILE)


class Watched:
    """A page in a tab of its own, and what it did."""

    def __init__(self, browser: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.requests: list[Any] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request))

    def give_key(self, key: str) -> None:
        self.page.wait_for_selector("#key-text", state="visible")
        self.page.fill("#key-text", key)
        self.page.click("#key-form button")

    def faults(self) -> list[str]:
        """Errors but those that the browser reports of a refused key."""
        return [error for error in self.errors if "401" not in error]


@pytest.fixture
def tab(browser: Any) -> Iterator[Watched]:
    opened = Watched(browser)
    yield opened
    opened.context.close()


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true; a page's policy keeps Playwright's own way of it out."""
    end = time.monotonic() + WAIT_SECONDS
    while not page.evaluate(holds):
        assert time.monotonic() < end, holds
        page.wait_for_timeout(50)


def leave_picture(page: Any, name: str, tmp_path: Path) -> None:
    target = Path(os.environ.get("HEADRACE_SCREENSHOTS") or tmp_path) / f"{name}.png"
    data = page.screenshot(path=str(target), full_page=True)
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(url: str, tab: Watched, browser: Any) -> None:
    page = tab.page
    page.goto(f"{url}/dashboard")
    assert page.is_hidden("#page")
    tab.give_key("wrong")
    until(page, "document.getElementById('key-message').textContent.includes('does not fit')")
    tab.give_key("schl\u00fcssel")
    until(page, "document.getElementById('key-message').textContent.includes('ASCII')")
    tab.give_key(KEY)
    page.wait_for_selector("#page", state="visible")
    assert page.inner_text("#state") == "ready"
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 1]
    assert all(KEY not in request.url and "key=" not in request.url for request in tab.requests)
    assert tab.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    page.reload()
    page.wait_for_selector("#samples details")
    other = Watched(browser)
    other.page.goto(f"{url}/dashboard")
    other.page.wait_for_selector("#key-text", state="visible")
    other.context.close()
    page.click("#forget")
    page.wait_for_selector("#key-text", state="visible")
    assert page.evaluate("sessionStorage.length") == 0 and page.locator("#samples details").count() == 0
    assert not tab.faults()


def test_the_page_shows_what_happened(url: str, tab: Watched, tmp_path: Path) -> None:
    page = tab.page
    page.goto(f"{url}/dashboard")
    tab.give_key(KEY)
    page.wait_for_selector("#samples details")
    until(page, "document.querySelectorAll('#rate-chart path').length === 2")
    assert page.inner_text("#version") == "step-2"
    assert page.locator("#updates tr").count() == 1 + 3
    assert page.locator("#version-chart rect.fill-b").count() == 3
    assert page.locator("#samples details").count() == 13
    assert "0 running, 0 waiting" in page.inner_text("#requests")
    assert page.is_visible("#reward-card") and "12 in all" in page.inner_text("#reward-count")
    tones = page.evaluate(
        "[...document.querySelectorAll('.sample')].map((e) => [e.querySelector('.reward').textContent,"
        " getComputedStyle(e).borderLeftColor])"
    )
    by_reward = {reward: {tone for each, tone in tones if each == reward} for reward, _ in tones}
    assert all(len(found) == 1 for found in by_reward.values())
    assert len({tone for found in by_reward.values() for tone in found}) == len(by_reward) == 5
    page.locator("#samples details", has_text="group-2").first.locator("summary").click()
    page.wait_for_selector("#samples details[open] pre")
    assert "there was a mill." in page.inner_text("#samples details[open] pre .prompt")
    leave_picture(page, "dashboard", tmp_path)
    assert not tab.faults()


def test_the_page_goes_on_where_it_was(url: str, tab: Watched) -> None:
    """What it was told it does not ask for again; an open sample stays open when another comes."""
    page = tab.page
    page.goto(f"{url}/dashboard")
    tab.give_key(KEY)
    page.wait_for_selector("#samples details")
    page.locator("#samples details summary").first.click()
    name = page.evaluate("document.querySelector('#samples details[open]').dataset.name")
    with Client(url, api_key=KEY) as client:
        client.generate("more", sampling_params={"max_new_tokens": 2, "ignore_eos": True}, request_id="newest")
        until(page, "document.querySelector('#samples details').dataset.name.includes('newest')")
        assert page.evaluate("document.querySelector('#samples details[open]').dataset.name") == name
        client.give_rewards({"newest": 7.0})
        until(page, "document.querySelector('#samples details .reward').textContent === '7'")
    asked = [request.url.partition("since=")[2] for request in tab.requests if "/dashboard/state" in request.url]
    numbers = [int(number) for number in asked if number != "0"]
    assert numbers and numbers == sorted(numbers)
    assert not tab.faults()


def test_text_is_never_markup_and_nothing_else_is_loaded(url: str, tab: Watched) -> None:
    page = tab.page
    page.goto(f"{url}/dashboard")
    tab.give_key(KEY)
    until(page, "document.getElementById('samples').textContent.includes('onerror')")
    assert page.title() == "Headrace" and page.locator("#samples img, #samples script").count() == 0
    assert {request.url.split("/")[2] for request in tab.requests} == {url.split("/")[2]}
    assert not tab.faults()
    blocked = (
        "document.body.innerHTML = '<b>x</b>'",
        "fetch('http://127.0.0.2:1/')",
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))",
    )
    for script in blocked:
        with pytest.raises(sync_api.Error):
            page.evaluate(f"async () => {{ await ({script}) }}")
    assert page.title() == "Headrace"


def test_the_list_of_routes(url: str, tab: Watched, tmp_path: Path) -> None:
    page = tab.page
    page.goto(f"{url}/docs")
    tab.give_key(KEY)
    page.wait_for_selector("details.call")
    num_calls = page.evaluate(
        "fetch('openapi.json', {headers: {authorization: `Bearer ${sessionStorage.getItem('headrace-key')}`}})"
        ".then((reply) => reply.json()).then((found) => Object.values(found.paths).flatMap(Object.keys).length)"
    )
    assert page.locator("details.call").count() == num_calls > 90
    page.locator("details.call", has_text="/generate").first.locator("summary").click()
    page.wait_for_selector("details.call[open] table")
    told = page.inner_text("details.call[open]")
    assert all(word in told for word in ("sampling_params", "lora_path", "SamplingParams", "max_new_tokens"))
    page.fill("#find", "sleep")
    assert 0 < page.locator("details.call:visible").count() < 10
    page.fill("#find", "")
    leave_picture(page, "docs", tmp_path)
    assert not tab.faults()


class RouterThread:
    """A router on a loop of its own."""

    def __init__(self, urls: list[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._router = None
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(urls), self._loop).result(60)

    async def _start(self, urls: list[str]) -> None:
        options = RouterOptions.from_dict({"api_key": KEY})
        self._router = ReplicaRouter(urls, options)  # type: ignore[assignment]
        await self._router.start(self._listener)  # type: ignore[attr-defined]

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._router.stop(0.0), self._loop).result(60)  # type: ignore[attr-defined]
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_a_router_shows_its_replicas(folder: Path, tab: Watched, tmp_path: Path) -> None:
    page = tab.page
    with Engine(folder, inprocess=True, **SETTINGS) as one, Engine(folder, inprocess=True, **SETTINGS) as other:
        urls = [serve(engine, api_key=KEY).url for engine in (one, other)]
        router = RouterThread(urls)
        try:
            for number, url in enumerate(urls):
                with Client(url, api_key=KEY) as client:
                    fill(client, folder, f"at-{number}")
            page.goto(f"{router.url}/dashboard")
            tab.give_key(KEY)
            until(page, "document.querySelectorAll('#replicas .good').length === 2")
            until(page, "document.querySelectorAll('#samples details').length === 26")
            until(page, "document.querySelectorAll('#rate-chart path').length === 2")
            assert page.locator("#updates tr").count() == 1 + 6
            assert "a router of 2 replicas" in page.inner_text("#about")
            assert all(url in page.inner_text("#replicas") for url in urls)
            leave_picture(page, "router", tmp_path)
        finally:
            router.stop()
    assert not tab.faults()
