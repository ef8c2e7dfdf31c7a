"""What the page says, in a real browser, of a wrong request and of a server that is loading, draining, full, gone or locked."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.serve.browser import Browser
from tests.serve.harness import TEXTS, Process, Serving
from tests.serve.page import ANSWERED, IN_BROWSER, NAMES, PROBLEM, open_page

pytestmark = IN_BROWSER


def test_an_error_names_the_field_and_leads_to_it(page: Browser) -> None:
    page.press("Enter", ctrl=True)
    page.wait_for(PROBLEM)
    assert "Text: the text is empty" in page.run(PROBLEM)
    page.run("document.querySelector('#lines').click()")
    page.run("document.querySelector('#text').value = 'text\\n'.repeat(129)")
    page.run("document.querySelector('#go').click()")
    page.wait_for(f"({PROBLEM}).includes('at most 128')")
    assert "/inputs" in page.run(PROBLEM)
    assert page.run("document.querySelector('#text').ariaInvalid") == "true"
    assert page.run("document.querySelector('#result').hidden")
    assert json.loads(page.run("document.querySelector('#response').textContent"))["status"] == 422
    page.run("document.querySelector('#problem button').click()")
    assert page.run("document.activeElement.id") == "text"
    page.run("document.querySelector('#text').value = 'a text'")
    page.press("Enter", ctrl=True)
    page.wait_for(ANSWERED)
    assert page.run(PROBLEM) == ""
    assert page.run("document.querySelector('#text').ariaInvalid") is None


def test_an_address_with_a_label_that_is_unknown_says_which_filter_is_wrong(tab: Browser, server: Process) -> None:
    tab.open(f"{server.url}/#text=a&allow=t-1&allow=nobody")
    tab.wait_for(PROBLEM)
    assert "Only these labels 2" in tab.run(PROBLEM)
    assert "/labels/allow/1" in tab.run(PROBLEM)


def test_a_server_that_ended_is_said_so(tab: Browser, serving: Serving) -> None:
    with serving() as local:
        open_page(tab, local.url)
    tab.type(TEXTS[0])
    tab.wait_for(PROBLEM)
    assert "cannot be reached" in tab.run(PROBLEM)


def test_it_waits_for_a_server_that_is_loading(tab: Browser, serving: Serving) -> None:
    with serving(load=False) as local:
        tab.open(f"{local.url}/")
        tab.type(TEXTS[0])
        tab.wait_for(f"({PROBLEM}).includes('The server is loading.')")
        assert "Asking again in" in tab.run(PROBLEM)
        local.call(lambda: asyncio.ensure_future(local.service.load()))
        tab.wait_for(ANSWERED)
        assert tab.run(PROBLEM) == ""
        assert tab.run("document.title") == "topics"


def test_a_server_that_drains_is_said_so(tab: Browser, serving: Serving) -> None:
    with serving() as local:
        open_page(tab, local.url)
        local.call(lambda: asyncio.ensure_future(local.service.drain()))
        tab.type(TEXTS[0])
        tab.wait_for(f"({PROBLEM}).includes('The server is draining.')")
        assert "Asking again in" in tab.run(PROBLEM)


def test_it_asks_again_when_the_queue_was_full(tab: Browser, serving: Serving) -> None:
    with serving(max_queue_tokens=1) as local, ThreadPoolExecutor(8) as pool:
        open_page(tab, local.url)
        local.engine.gate.clear()
        full = threading.Event()

        def fill() -> None:
            if httpx.post(f"{local.url}/predict", json={"inputs": TEXTS[1]}, timeout=60).status_code == 429:
                full.set()

        try:
            while not full.wait(0.05):
                pool.submit(fill)
            tab.type(TEXTS[0])
            tab.wait_for(f"({PROBLEM}).includes('The server is busy')")
            assert "Asking again in" in tab.run(PROBLEM)
        finally:
            local.engine.gate.set()
        tab.wait_for(ANSWERED)
        assert tab.run(PROBLEM) == ""


def test_a_key_is_asked_for_and_kept_out_of_the_address(tab: Browser, bundle_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("open-sesame\n")
    file.chmod(0o600)
    process = Process(bundle_path, "--api-keys-file", str(file))
    try:
        tab.open(f"{process.url}/#text=a%20text")
        tab.wait_for("document.activeElement.id === 'key'")
        tab.type("wrong")
        tab.press("Enter")
        tab.wait_for(PROBLEM)
        assert "not known" in tab.run(PROBLEM)
        tab.type("open-sesame")
        tab.press("Enter")
        tab.wait_for(ANSWERED)
        assert tab.run("document.querySelector('#key-form').hidden")
        assert len(tab.run(NAMES)) == 10
        assert not any("sesame" in url for url in [*tab.requests, tab.run("location.href")])
        assert "sesame" not in tab.run("document.querySelector('#curl').textContent")
        assert "Bearer $FANIN_API_KEY" in tab.run("document.querySelector('#curl').textContent")
        assert tab.run("localStorage.length") == 0
        tab.run("document.querySelector('#forget').click()")
        tab.wait_for("document.activeElement?.id === 'key' && !sessionStorage.length")
    finally:
        process.end()
