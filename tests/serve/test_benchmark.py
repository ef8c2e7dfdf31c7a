"""python -m benchmarks.serve on a bundle that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import measure, serve
from export.bundle import open_bundle
from serve.tokens import TextTokenizer
from tests.serve.harness import MAX_LENGTH


@pytest.mark.parametrize("tokens", ["16", "mixed"])
def test_texts_have_the_lengths_asked_for(bundle_path: Path, tokens: str) -> None:
    bundle = open_bundle(bundle_path)
    texts = serve.make_texts(bundle, tokens, np.random.default_rng(0))
    read = TextTokenizer(bundle.tokenizer_file, MAX_LENGTH)(texts)
    assert not any(text.truncated for text in read)
    lengths = {len(text.ids) for text in read}
    assert lengths == {16} if tokens == "16" else len(lengths) > 10
    assert len(set(texts)) > 1


@pytest.mark.slow
def test_every_phase_of_a_server_of_its_own(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    phases = ["alone", "clients", "open", "overload", "reload", "drain"]
    flags = ["--clients", "4", "--seconds", "1", "--overload-s", "1", "--reloads", "2", "--record"]
    patient = "--threads 1 --max-queue-tokens 512 --max-queue-ms 20000"
    assert serve.main([str(bundle_path), "--only", *phases, *flags, "--serve-flags", patient]) == 0
    rows = {row["phase"]: row for row in map(json.loads, (tmp_path / "serve.jsonl").read_text().splitlines())}
    assert list(rows) == phases
    for row in rows.values():
        assert row["errors"] == {}
        assert row["codes"]["200"]["count"] > 0
        assert 0 < row["rss_first_mb"] <= row["rss_max_mb"]
        assert row["labels"] == 500
    assert rows["alone"]["codes"].keys() == rows["clients"]["codes"].keys() == rows["reload"]["codes"].keys() == {"200"}
    assert rows["open"]["rate"] == pytest.approx(0.7 * rows["clients"]["requests_per_s"], rel=1e-3)
    assert rows["clients"]["encoder_ms"] > 0
    assert rows["reload"]["reloads"] == 2
    assert rows["drain"]["exit_status"] == 0
    assert rows["drain"]["codes"].keys() <= {"200", "503"}
    assert "ended" in capsys.readouterr().out


def test_a_folder_that_is_no_bundle_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks.serve: error: {tmp_path}: not a bundle, manifest.json is missing\n"
