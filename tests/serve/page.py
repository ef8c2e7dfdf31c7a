"""What the tests of the page look at."""

from __future__ import annotations

import os

import pytest

IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(os.environ.get("FANIN_SKIP_BROWSER") == "1", reason="FANIN_SKIP_BROWSER=1"),
]
ANSWERED = "!document.querySelector('#result').hidden && !document.querySelector('#go').ariaDisabled"
NAMES = "[...document.querySelectorAll('#predictions .name')].map((element) => element.textContent)"
PROBLEM = "document.querySelector('#problem').hidden ? '' : document.querySelector('#problem').innerText"
