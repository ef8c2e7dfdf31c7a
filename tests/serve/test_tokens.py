"""What reading a text takes from the other threads of the server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from export.bundle import open_bundle
from serve.tokens import TextTokenizer


def test_other_threads_run_while_a_long_text_is_read(bundle_path: Path) -> None:
    text = "x" * 300_000
    tokenizer = TextTokenizer(open_bundle(bundle_path, verify=False).tokenizer_file, max_length=len(text))

    def read() -> tuple[float, float]:
        began = time.perf_counter()
        tokenizer([text])
        return began, time.perf_counter()

    awake = []
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        while not reading.done():
            awake.append(time.perf_counter())
            time.sleep(0.001)
    began, ended = reading.result()
    quarter = (ended - began) / 4
    assert any(began + quarter < at < ended - quarter for at in awake)
