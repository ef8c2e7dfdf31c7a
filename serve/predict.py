"""`python -m serve.predict BUNDLE --input F.jsonl --output OUT.jsonl`: labels for a file of texts, with the server's engine."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from export.bundle import BundleError
from models.extras import missing
from models.files import writing
from serve.answers import Scores, prediction
from serve.tokens import TextTokenizer

if TYPE_CHECKING:
    from serve.engine import Engine

_DESCRIPTION = """\
Predicts the labels of every text in a file. Each line of the input is {"text": …}; other fields do not matter. Line n of the
output belongs to line n of the input, best label first:

  {"labels": [{"id", "name", "score"}, …], "tokens", "truncated"}

Files whose names end in .gz are compressed. Every line is checked first: one that cannot be read ends the command with its
number and status 2. The output appears when it is complete.
"""
_WINDOW = 4096  # lines that are sorted by length together
_BATCH_INPUTS, _BATCH_TOKENS = 32, 2048  # larger ones are no faster


class InputError(ValueError):
    """A line cannot be read, or the output not be written; the message names file, line and reason."""


def predict(
    engine: Engine,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    k: int,
    scores: Scores = "probability",
    progress: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """The k best labels of each text, as the output has them, in order. Texts of similar length share a batch.

    `progress` is called with the number of texts of each batch that is done.
    """
    tokens = tokenizer(texts)
    answers: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i].ids))
    while order:
        longest = engine.padded(len(tokens[order[-1]].ids))
        count = max(1, min(_BATCH_INPUTS, _BATCH_TOKENS // longest))
        batch = order[-count:]
        del order[-count:]
        logits, labels = engine.topk(engine.encode([tokens[i].ids for i in batch]), k)
        for row, i in enumerate(batch):
            answers[i] = prediction(tokens[i], labels[row], logits[row], engine.bundle.labels, scores=scores)
        progress(len(batch))
    return [answers[i] for i in range(len(texts))]


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m serve.predict", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory written by `python -m export`")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON lines to read, plain or .gz")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to write, plain or .gz")
    parser.add_argument("--top-k", type=int, default=10, metavar="K", help="labels per text (default: %(default)s)")
    parser.add_argument(
        "--scores",
        choices=get_args(Scores),
        default="probability",
        help="the head's own score (logit) or its sigmoid; the order is the same (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: the cores this process may use)")
    arguments = parser.parse_args()
    if arguments.top_k < 1 or (arguments.threads is not None and arguments.threads < 1):
        parser.error("--top-k and --threads must be at least 1")
    try:
        from serve.engine import Engine

        engine = Engine.open(arguments.bundle, arguments.threads)
        _run(engine, arguments.input, arguments.output, arguments.top_k, arguments.scores)
    except ImportError as error:
        return _fail(missing(error, "cpu"), 2)
    except (BundleError, InputError, OSError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"python -m serve.predict: error: {message}", file=sys.stderr)
    return code


def _run(engine: Engine, source: Path, target: Path, k: int, scores: Scores) -> None:
    with _replacing(target) as out:
        total = sum(1 for _ in _texts(source))  # finds a bad line before hours of work, not after
        tokenizer, texts = engine.new_tokenizer(), _texts(source)
        with tqdm(total=total, unit=" texts", desc="predict") as bar:
            while window := list(islice(texts, _WINDOW)):
                for answer in predict(engine, tokenizer, window, k, scores, progress=bar.update):
                    out.write(json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _texts(source: Path) -> Iterator[str]:
    number = 1
    try:
        with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as lines:
            for line in lines:
                text = json.loads(line.rstrip(b"\r\n"))["text"]  # or a line cut short would be wrong in a second line
                if not isinstance(text, str):
                    raise TypeError('"text" is not a string')
                if not text or text.isspace():
                    raise ValueError('"text" is empty')
                text.encode()  # fails for half a surrogate pair, which no tokenizer takes
                yield text
                number += 1
    except KeyError as error:
        raise InputError(f"{source}:{number}: no field {error}") from error
    except (ValueError, TypeError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{source}:{number}: {error}") from error


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `target` when the block ends well, and leaves nothing behind when it does not."""
    if target.is_dir():
        raise InputError(f"{target}: is a folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        opened = partial.open("wb")
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with writing(target), opened as file:
            if target.suffix == ".gz":
                with gzip.open(file, "wb", compresslevel=6) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
