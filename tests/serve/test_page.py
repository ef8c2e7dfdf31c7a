"""The page at /, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest

from tests.serve.browser import Browser
from tests.serve.harness import TEXTS, Process

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(os.environ.get("FANIN_SKIP_BROWSER") == "1", reason="FANIN_SKIP_BROWSER=1"),
]
SHOWN = "!document.querySelector('#result').hidden && !document.querySelector('#go').ariaDisabled"
NAMES = "[...document.querySelectorAll('#labels .name')].map((element) => element.textContent)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Browser, server: Process) -> Browser:
    chromium.requests.clear()
    chromium.open(f"{server.url}/")
    chromium.wait_for("document.title === 'topics'")
    return chromium


def best(server: Process, text: str) -> list[dict[str, str]]:
    answer = httpx.post(f"{server.url}/predict", json={"inputs": text}).json()
    rows: list[dict[str, str]] = answer["predictions"][0]["labels"]
    return rows


def test_a_text_is_typed_and_its_labels_appear(page: Browser, server: Process) -> None:
    page.type(TEXTS[0])  # the text box has the focus from the start
    page.press("Enter", ctrl=True)
    page.wait_for(SHOWN)
    expected = best(server, TEXTS[0])
    assert page.run(NAMES) == [row["name"] for row in expected]
    assert page.run("document.querySelector('#labels .id').textContent") == expected[0]["id"]
    scores = page.run("[...document.querySelectorAll('#labels .score')].map((element) => parseFloat(element.textContent))")
    assert scores == pytest.approx([100 * float(row["score"]) for row in expected], abs=0.06)
    page.wait_for("document.getAnimations().length === 0")
    widths = page.run(
        "[...document.querySelectorAll('#labels .bar')].map((bar) => 100 * bar.offsetWidth / bar.parentElement.offsetWidth)"
    )
    assert widths == pytest.approx(scores, abs=0.5)
    assert "500 labels" in page.run("document.querySelector('#facts').textContent")
    assert "the best is " + expected[0]["name"] in page.run("document.querySelector('[role=status]').textContent")


def test_the_time_spent_is_shown_and_adds_up(page: Browser) -> None:
    page.type(TEXTS[1])
    page.press("Enter", ctrl=True)
    page.wait_for(SHOWN)
    terms = page.run("[...document.querySelectorAll('#time-list dt')].map((element) => element.textContent)")
    assert terms == ["tokenizer", "queue", "encoder", "all labels scored", "other", "total"]
    times = page.run("[...document.querySelectorAll('#time-list dd')].map((element) => parseFloat(element.textContent))")
    assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.2)
    shares = page.run("[...document.querySelectorAll('#times span')].map((part) => parseFloat(part.style.width))")
    assert sum(shares) == pytest.approx(100, abs=0.1)


def test_everything_can_be_done_with_the_keyboard(page: Browser, server: Process) -> None:
    visited = []
    page.type(TEXTS[1])
    for _ in range(2):
        page.press("Tab")
        visited.append(page.run("document.activeElement.id"))
    assert visited == ["top-k", "go"]
    page.press("Enter")
    page.wait_for(SHOWN)
    assert page.run(NAMES) == [row["name"] for row in best(server, TEXTS[1])]
    page.run("document.querySelector('#top-k').focus()")
    page.press("ArrowRight")
    page.wait_for("document.querySelectorAll('#labels li').length === 11")
    assert page.run("document.querySelector('#top-k-shown').value") == "11"


def test_every_control_has_a_name_for_screen_readers(page: Browser) -> None:
    controls = page.controls()
    assert ("textbox", "Text") in controls
    assert ("slider", "Labels") in controls
    assert ("button", "Predict") in controls
    assert all(name for _, name in controls)


def test_an_error_is_said_in_words(page: Browser) -> None:
    page.type(" ")
    page.press("Enter", ctrl=True)
    page.wait_for("!document.querySelector('[role=alert]').hidden")
    assert page.run("document.querySelector('[role=alert]').textContent") == "The text is empty."
    page.type(TEXTS[0])
    page.press("Enter", ctrl=True)
    page.wait_for(SHOWN)
    assert page.run("document.querySelector('[role=alert]').hidden")


def test_names_are_text_and_never_markup(page: Browser) -> None:
    labels = "[{id: '<i>', name: '<img src=x onerror=alert(1)>', score: 0.5}]"
    page.run(f"showLabels({{labels: {labels}, tokens: 1, truncated: true}})")
    assert page.run("document.querySelector('#labels img')") is None
    assert page.run(NAMES) == ["<img src=x onerror=alert(1)>"]
    assert "cut off" in page.run("document.querySelector('#read').textContent")


def test_a_link_carries_a_text(chromium: Browser, server: Process) -> None:
    chromium.open(f"{server.url}/?text=parse%20a%20date")
    chromium.wait_for(SHOWN)
    assert chromium.run(NAMES) == [row["name"] for row in best(server, "parse a date")]


def test_it_asks_nobody_but_its_server(page: Browser, server: Process) -> None:
    page.type(TEXTS[0])
    page.press("Enter", ctrl=True)
    page.wait_for(SHOWN)
    assert len(page.requests) >= 3
    assert all(url.startswith((server.url, "data:")) for url in page.requests)


def test_the_description_of_the_api_needs_nobody_else_either(chromium: Browser, server: Process) -> None:
    listen = "window.refused = []; addEventListener('securitypolicyviolation', (event) => refused.push(event.blockedURI))"
    script = chromium.call("Page.addScriptToEvaluateOnNewDocument", source=listen)["identifier"]
    chromium.requests.clear()
    try:
        chromium.open(f"{server.url}/docs")
        chromium.wait_for("document.querySelectorAll('.opblock').length === 7")
        chromium.run("document.querySelector('.opblock-post .opblock-summary-control').click()")
        chromium.wait_for("document.querySelector('.opblock-post .response-col_status') !== null")
        assert chromium.run("refused") == []
    finally:
        chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    assert all(url.startswith((server.url, "data:")) for url in chromium.requests)


def test_an_id_stands_in_one_line_under_its_name(page: Browser) -> None:
    name, label = "What a module of a package is for, in so many words. " * 3, "package.module.function_of_a_name"
    page.run(f"showLabels({{labels: [{{id: '{label}', name: '{name}', score: 0.5}}], tokens: 1, truncated: false}})")
    page.call("Emulation.setDeviceMetricsOverride", width=400, height=640, deviceScaleFactor=1, mobile=True)
    try:
        box = "JSON.parse(JSON.stringify(document.querySelector('#labels .{}').getBoundingClientRect()))"
        above, below = page.run(box.format("name")), page.run(box.format("id"))
        assert below["top"] >= above["bottom"]
        assert below["height"] < 20
        assert page.run("document.documentElement.scrollWidth") <= 400
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_it_fits_a_telephone_and_the_dark(page: Browser) -> None:
    page.type(TEXTS[0])
    page.press("Enter", ctrl=True)
    page.wait_for(SHOWN)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    try:
        assert page.run(background) != light
        assert page.run("document.documentElement.scrollWidth") <= 320
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
        page.call("Emulation.setEmulatedMedia", features=[])
