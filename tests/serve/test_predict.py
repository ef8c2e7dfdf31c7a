"""`python -m serve.predict`: a file in, a file out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve import predict as command
from serve.engine import Engine
from serve.predict import predict
from tests.limits import no_file_beyond
from tests.serve.harness import ROOT, TEXTS


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "serve.predict", *map(str, arguments), "--threads", "1"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_line_is_answered_by_the_line_of_the_same_number(bundle_path: Path, engine: Engine, tmp_path: Path) -> None:
    texts = [" ".join(TEXTS[: i % 6 + 1])[: 5 + 3 * i] for i in range(90)]
    source = write(tmp_path / "in.jsonl", [{"text": text, "labels": ["not read"]} for text in texts])
    target = tmp_path / "out.jsonl"
    result = run(bundle_path, "--input", source, "--output", target, "--top-k", "3")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "100%" in result.stderr
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    tokenizer = engine.new_tokenizer()
    for text, answer in zip(texts, answers, strict=True):
        (alone,) = predict(engine, tokenizer, [text], 3)
        assert [row["id"] for row in answer["labels"]] == [row["id"] for row in alone["labels"]]
        assert [row["score"] for row in answer["labels"]] == pytest.approx([row["score"] for row in alone["labels"]], rel=1e-4)
        assert (answer["tokens"], answer["truncated"]) == (alone["tokens"], alone["truncated"])


def test_compressed_files_and_windows(
    bundle_path: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    monkeypatch.setattr(command, "_WINDOW", 7)
    arguments = ["predict", bundle_path, "--input", source, "--output", target, "--scores", "logit", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    assert command.main() == 0
    answers = [json.loads(line) for line in gzip.decompress(target.read_bytes()).splitlines()]
    for answer, expected in zip(answers, predict(engine, engine.new_tokenizer(), texts, 10, "logit"), strict=True):
        assert [row["id"] for row in answer["labels"]] == [row["id"] for row in expected["labels"]]
        assert [row["score"] for row in answer["labels"]] == pytest.approx(
            [row["score"] for row in expected["labels"]], rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2"),
        ('{"text": "a"', "Expecting ',' delimiter: line 1 column 13"),
        ("", "Expecting value: line 1 column 1"),
        ("[1]", "list indices"),
        ('{"title": "a"}', "no field 'text'"),
        ('{"text": 3}', "not a string"),
        ('{"text": " "}', "empty"),
        (r'{"text": "\ud800"}', "surrogates"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_and_leaves_no_output(bundle_path: Path, tmp_path: Path, line: str, reason: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b"}\n' + line + '\n{"text": "c"}\n', encoding="utf-8")
    target.write_text("older")
    result = run(bundle_path, "--input", source, "--output", target)
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()  # it was found before the work began
    assert error.startswith(f"python -m serve.predict: error: {source}:3: ")
    assert reason in error
    assert target.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_truncated_archive_is_named(bundle_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    result = run(bundle_path, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.returncode == 2
    assert str(source) in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_opened_is_named(bundle_path: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    for arguments, name in [
        ((bundle_path, "--input", tmp_path / "absent", "--output", tmp_path / "out"), "absent"),
        ((bundle_path, "--input", source, "--output", tmp_path / "nowhere" / "out"), "nowhere/out: cannot be written: No such"),
        ((bundle_path, "--input", source, "--output", tmp_path), f"{tmp_path}: is a folder"),
        ((tmp_path, "--input", source, "--output", tmp_path / "out"), "manifest.json"),
    ]:
        result = run(*arguments)
        assert result.returncode == 2
        (error,) = result.stderr.splitlines()
        assert error.startswith("python -m serve.predict: error: ")
        assert name in error


def test_a_full_disk_is_named_and_leaves_nothing(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", [{"text": "a"}]), tmp_path / "out"
    words = ["predict", str(bundle_path), "--input", str(source), "--output", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with no_file_beyond(10):
        assert command.main() == 2
    assert capsys.readouterr().err.endswith(f"error: [Errno 27] File too large: '{out}'\n")
    assert list(tmp_path.iterdir()) == [source]


def test_no_text_gives_no_answer(bundle_path: Path, tmp_path: Path) -> None:
    result = run(bundle_path, "--input", write(tmp_path / "in.jsonl", []), "--output", tmp_path / "out.jsonl")
    assert result.returncode == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
