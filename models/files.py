"""Files and folders that are whole or absent, whatever moment the process dies at, and errors that say which had no room."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Where `path` is written, as `temporary` until it is whole: an OSError then names `path`.

    Python's own names no file when the disk is full, and numpy's has no reason either.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        if named is None or (temporary is not None and named.is_relative_to(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; on success its files are flushed to disk and it is renamed to `target`.

    When another process made `target` meanwhile, its folder stays and this one is dropped.
    """
    temporary = _hidden(target)
    try:
        with writing(target, temporary):
            temporary.mkdir(parents=True)
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
    try:
        with writing(path, temporary):
            temporary.write_text(text, encoding="utf-8")
            flush(temporary)
            temporary.rename(path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array of one or more dimensions in numpy's format. On a full disk numpy.save may lose the last 4 KiB unsaid."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def reserve(path: Path, size: int) -> None:
    """Makes a file of `size` bytes that has its room on the disk: a mapped page that finds none would kill the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


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
