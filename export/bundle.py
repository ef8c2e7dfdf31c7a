"""A bundle: everything that serving needs in one folder, whole or absent. docs/design.md describes the files.

Opening maps the head and the labels from disk, so it takes little time and memory whatever their size. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from export.labels import LABEL_FILES, LabelTable, write_labels
from export.manifest import MANIFEST, BlockLayout, BundleError, FileFacts, Manifest
from models.files import flush, flush_folder, write_array, writing
from models.head import Block, Head, HeadError

__all__ = ["Bundle", "BundleError", "Manifest", "check_target", "open_bundle", "write_bundle"]

ENCODER, TOKENIZER, PLACES = "encoder.onnx", "tokenizer.json", "head/places.npy"
TORCH_ENCODER = "encoder"  # a folder
_REQUIRED = (ENCODER, TOKENIZER, PLACES, *(f"labels/{name}" for name in LABEL_FILES))
_PACKAGES = ("fanin", "numpy", "onnx", "onnxruntime", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, eq=False)
class Bundle:
    """An open bundle. The head's buffers, the labels' places in it (Head.places) and the labels are read-only memory maps."""

    path: Path
    manifest: Manifest
    head: Head
    places: np.ndarray
    labels: LabelTable

    @property
    def encoder_file(self) -> Path:
        """ONNX: input_ids and attention_mask, int64 [B, S] → embedding fp32 [B, D]."""
        return self.path / ENCODER

    @property
    def torch_encoder(self) -> Path | None:
        """The same encoder as models.encoder.Encoder.save writes it; None if the bundle was exported without."""
        return self.path / TORCH_ENCODER if f"{TORCH_ENCODER}/model.safetensors" in self.manifest.files else None

    @property
    def tokenizer_file(self) -> Path:
        """tokenizers' own format; truncates to the model's length and pads to the longest of a batch."""
        return self.path / TOKENIZER

    @property
    def nbytes(self) -> int:
        return sum(self.manifest.component_nbytes.values())

    @property
    def hash(self) -> str:
        """SHA-256 that stands for the whole content."""
        return self.manifest.hash


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Opens the bundle in folder `path`; BundleError names the file and the fault.

    Format, sizes, shapes and types are always checked; with `verify` also the SHA-256 of every file and that no index or label
    of the head is out of range. Verifying reads every file once, about 1 s per GB and core.
    """
    manifest = Manifest.read(path)
    try:
        _check_files(path, manifest.files, verify)
        head = _map_head(path, manifest)
        if verify:
            _check_ranges(head)
        labels = LabelTable(path / "labels", manifest.labels)
        return Bundle(path, manifest, head, _map_places(path, manifest), labels)
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: {error}") from error


def write_bundle(
    path: Path,
    *,
    name: str,
    head: Head,
    labels: Iterable[tuple[str, str]],
    tokenizer: str,
    max_length: int,
    write_encoder: Callable[[Path], None],
    metrics: dict[str, Any],
    prove: Callable[[Bundle], dict[str, Any]] | None = None,
    force: bool = False,
) -> Manifest:
    """Writes a bundle to `path` and returns its manifest; whatever fails, `path` is as it was before.

    labels         (id, name) in label order
    tokenizer      tokenizers' own JSON
    write_encoder  called with the path to write the ONNX encoder to
    prove          called with the finished bundle before it gets its name; what it returns becomes the manifest's "parity",
                   and when it raises, nothing is kept
    force          replaces an older bundle, and nothing but a bundle

    BundleError, HeadError, OSError, and whatever `write_encoder` and `prove` raise.
    """
    with _new_folder(path, force) as folder:
        if not head.n_labels:
            raise BundleError(f"{path}: the head has no labels")
        head.validate()
        layouts = _write_head(folder, head)
        (folder / "labels").mkdir()
        count = write_labels(folder / "labels", labels)
        if count != head.n_labels:
            raise BundleError(f"{path}: {count} labels are named, the head has {head.n_labels}")
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        write_encoder(folder / ENCODER)
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        sizes = {file: (folder / file).stat().st_size for file in files}
        hashes = _hash_files(folder, sizes)
        manifest = Manifest(
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            labels=head.n_labels,
            width=head.width,
            max_length=max_length,
            blocks=layouts,
            files={file: FileFacts(sizes[file], hashes[file]) for file in files},
            metrics=metrics,
            versions=_versions(),
        )
        manifest.write(folder)
        if prove is not None:
            manifest = replace(manifest, parity=prove(open_bundle(folder)))
            manifest.write(folder)
    return manifest


def check_target(path: Path, force: bool) -> None:
    """BundleError when `write_bundle` would refuse to write to `path`."""
    if path.exists():
        if not force:
            raise BundleError(f"{path} exists; choose another name or replace it with --force")
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} exists and is not a bundle; it will not be replaced")


@contextmanager
def _new_folder(path: Path, force: bool) -> Iterator[Path]:
    """An empty sibling of `path` that takes its name in the end, or is removed when the block raises."""
    check_target(path, force)
    path = path.resolve()
    folder, old = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.{state}") for state in ("partial", "old"))
    try:
        with writing(path, folder):
            folder.mkdir(parents=True)
            yield folder
            flush_folder(folder)
            if path.exists():
                path.rename(old)
                try:
                    folder.rename(path)
                except OSError:
                    old.rename(path)
                    raise
                flush(path.parent)
                shutil.rmtree(old)
            else:
                folder.rename(path)
                flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_head(folder: Path, head: Head) -> tuple[BlockLayout, ...]:
    (folder / "head").mkdir()
    layouts = []
    for i, block in enumerate(head.blocks):
        files = {buffer: f"head/{i}.{buffer}.npy" for buffer in block.buffers}
        for buffer, array in block.buffers.items():
            write_array(folder / files[buffer], array)
        layouts.append(BlockLayout(block.connectivity, block.dtype, block.groups, block.fan_in, block.group_size, files))
    write_array(folder / PLACES, head.places())
    return tuple(layouts)


def _map_head(path: Path, manifest: Manifest) -> Head:
    blocks = []
    for i, layout in enumerate(manifest.blocks):
        try:
            buffers = {name: _map(path, file, manifest) for name, file in layout.buffers.items()}
            block = Block(layout.connectivity, manifest.width, layout.dtype, **buffers)  # type: ignore[arg-type]
        except (HeadError, TypeError) as error:
            raise BundleError(f"head block {i}: {error}") from error
        if block.values.shape != (layout.groups, layout.fan_in, layout.group_size):
            expected = [layout.groups, layout.fan_in, layout.group_size]
            raise BundleError(f"{layout.buffers['values']} has shape {list(block.values.shape)}, expected {expected}")
        blocks.append(block)
    return Head(manifest.width, manifest.labels, tuple(blocks))


def _map_places(path: Path, manifest: Manifest) -> np.ndarray:
    places = _map(path, PLACES, manifest)
    if places.dtype != np.uint32 or places.shape != (manifest.labels,):
        raise BundleError(f"{PLACES} is {places.dtype} {list(places.shape)}, expected uint32 [{manifest.labels}]")
    return places


def _map(path: Path, file: str, manifest: Manifest) -> np.ndarray:
    if file not in manifest.files:
        raise BundleError(f"{file} is not among the manifest's files")
    try:
        return open_memmap(path / file, mode="r")
    except ValueError as error:
        raise BundleError(f"{file} is not an npy file that can be mapped: {error}") from error


def _check_files(path: Path, files: dict[str, FileFacts], verify: bool) -> None:
    root = path.resolve()
    for name in _REQUIRED:
        if name not in files:
            raise BundleError(f"{name} is not among the manifest's files")
    for name, facts in files.items():
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise BundleError(f"{name} lies outside the bundle")
        if not file.is_file():
            raise BundleError(f"{name} is missing")
        size = file.stat().st_size
        if size != facts.size:
            fault = "truncated" if size < facts.size else "altered"
            raise BundleError(f"{name} is {fault}: it has {size} bytes, the manifest says {facts.size}")
    if verify:
        hashes = _hash_files(root, {name: facts.size for name, facts in files.items()})
        for name, facts in files.items():
            if hashes[name] != facts.sha256:
                raise BundleError(f"{name} is altered: its SHA-256 does not match")


def _check_ranges(head: Head) -> None:
    """Kernels do not look at indices and labels again. Head.validate says more, but needs memory and time for every label."""
    for i, block in enumerate(head.blocks):
        if block.indices is not None and block.indices.size and block.indices.max() >= head.width:
            raise BundleError(f"head block {i}: an index is {block.indices.max()}, the width is {head.width}")
        ids = block.label_ids
        if ids.size and not -1 <= ids.min() <= ids.max() < head.n_labels:
            raise BundleError(f"head block {i}: labels run from {ids.min()} to {ids.max()}, the head has {head.n_labels}")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _hash_files(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    """SHA-256 of each file in `sizes`, the largest first so that the threads end together (hashing lets go of the GIL)."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(sizes, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
