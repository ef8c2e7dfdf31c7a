"""How the tests open the page, and what they look at."""

from __future__ import annotations

import os

import pytest

from tests.serve.browser import Browser

IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(os.environ.get("FANIN_SKIP_BROWSER") == "1", reason="FANIN_SKIP_BROWSER=1"),
]
ANSWERED = "!document.querySelector('#result').hidden && !document.querySelector('#go').ariaDisabled"
NAMES = "[...document.querySelectorAll('#predictions .name')].map((element) => element.textContent)"
PROBLEM = "document.querySelector('#problem').hidden ? '' : document.querySelector('#problem').innerText"


def open_page(tab: Browser, url: str) -> None:
    """Opens the page of the server at `url`, and waits until it knows the model."""
    tab.open(f"{url}/")
    tab.wait_for("document.title === 'topics'")
