"""Files and folders that are whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; on success its files are flushed to disk and it is renamed to `target`.

    When another process made `target` meanwhile, its folder stays and this one is dropped.
    """
    temporary = _hidden(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_folder(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file in place of an older one, atomically."""
    temporary = _hidden(path)
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.rename(path)
    flush(path.parent)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that no half of it is ever found under its name."""
    doomed = _hidden(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def flush_folder(path: Path) -> None:
    """Flushes a folder and all that is in it to disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))


def flush(path: Path) -> None:
    """Flushes one file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path) -> list[Path]:
    """What a killed process left half-written in `folder`, which may be absent."""
    return list(folder.glob(".*.????????.tmp"))


def remove_leftovers(folder: Path) -> None:
    """Deletes them. No other process may be writing there."""
    for path in leftovers(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hidden(path: Path) -> Path:
    """A new name beside `path`. Not made from the process's number, which is 1 in every container."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
