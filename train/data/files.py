"""Finding and reading text files, plain or gzipped, with faults named by file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.contract import DataError

_EVALUATION = ("dev", "test")


def find(folder: Path, *names: str) -> Path | None:
    """The file that has one of the names, or one of them and .gz; None when there is none, DataError when there are two."""
    found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.exists()]
    if len(found) > 1:
        listed = " and ".join(str(path.relative_to(folder)) for path in found)
        raise DataError(f"{folder} has both {listed}; keep one")
    return found[0] if found else None


def require(folder: Path, *names: str) -> Path:
    """As `find`, but a missing file is a DataError."""
    path = find(folder, *names)
    if path is None:
        raise DataError(f"{folder}: no {' or '.join(names)}")
    return path


def find_splits(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """The file of each split in `names`. DataError when "train" is missing, or all of what could be evaluated on."""
    found = {"train": require(folder, *names["train"])}
    found |= {split: path for split in _EVALUATION if split in names and (path := find(folder, *names[split]))}
    if len(found) == 1:
        wanted = " or ".join(name for split in reversed(_EVALUATION) for name in names.get(split, ()))
        raise DataError(f"{folder}: no {wanted}; one is needed for evaluation")
    return found


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without line break) of each line, UTF-8. Lines end with \\n or \\r\\n and with nothing else."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise fault(path, number, f"not UTF-8 at byte {error.start}") from None
    except (EOFError, zlib.error, OSError) as error:
        raise fault(path, number + 1, f"cannot be read: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of a JSON lines file."""
    for number, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise fault(path, number, f"broken JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise fault(path, number, "broken JSON: nested too deeply") from None
        except ValueError as error:  # a number of more than 4300 digits
            raise fault(path, number, f"broken JSON: {error}") from None
        if not isinstance(row, dict):
            raise fault(path, number, f"expected a JSON object, found {type(row).__name__}")
        yield number, row


def two_numbers(path: Path, line: int, text: str, meaning: str) -> tuple[int, int]:
    """Two whole numbers from 0 up, between spaces. DataError says that they should be what `meaning` tells."""
    parts = text.split()
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise fault(path, line, f"expected the numbers of {meaning}, found {text[:40]!r}")
    return int(parts[0]), int(parts[1])


def check_unicode(path: Path, line: int, text: str) -> None:
    """JSON can escape half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise fault(path, line, "holds half a surrogate pair, which is not Unicode text") from None


def fault(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}:{line}: {reason}")


def files_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of a file's bytes; of several files, that of their hashes."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
