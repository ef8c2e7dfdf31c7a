"""manifest.json: what a bundle holds, with size and hash of every file. Standard library only.

The field "hash" is the SHA-256 of all other fields as canonical JSON (sorted keys, no spaces). As they include the hash of
every file, it stands for the whole bundle: it names the model version, and it shows an altered manifest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

MANIFEST = "manifest.json"
FORMAT, VERSION = "fanin-bundle", 2
_T = TypeVar("_T")


class BundleError(ValueError):
    """A bundle cannot be written or opened; the message names the bundle, the file in it and the fault."""


@dataclass(frozen=True)
class FileFacts:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class BlockLayout:
    """A block of the head. `buffers` maps each of its buffers (values, indices, …) to the file that holds it."""

    connectivity: str
    dtype: str
    groups: int
    fan_in: int
    group_size: int
    buffers: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The facts in manifest.json.

    name        the model's name
    created     when, ISO 8601 in UTC
    labels      L
    width       D
    max_length  tokens per text, special tokens included
    blocks      the head, in order
    files       every other file of the bundle, by path in the folder
    metrics     the training run's last evaluation
    versions    of the packages that wrote the bundle
    parity      what the comparison with the checkpoint found (export.parity); None if there is none to compare with
    """

    name: str
    created: str
    labels: int
    width: int
    max_length: int
    blocks: tuple[BlockLayout, ...]
    files: dict[str, FileFacts]
    metrics: dict[str, Any]
    versions: dict[str, str]
    parity: dict[str, Any] | None = None

    @property
    def hash(self) -> str:
        return _hash(self._fields())

    @property
    def component_nbytes(self) -> dict[str, int]:
        """Bytes on disk of "encoder", "head", "labels" and "tokenizer"."""
        sizes: dict[str, int] = {}
        for name, facts in sorted(self.files.items()):
            component = name.partition("/")[0].partition(".")[0]  # encoder.onnx, head/…
            sizes[component] = sizes.get(component, 0) + facts.size
        return sizes

    def summary(self) -> str:
        """For people: what the bundle holds and how large it is."""
        blocks = ", ".join(f"{block.connectivity} K={block.fan_in} G={block.group_size} {block.dtype}" for block in self.blocks)
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in self.component_nbytes.items())
        total = sum(self.component_nbytes.values()) / 1e6
        return f"{self.labels:,} labels × {self.width} inputs ({blocks}); {total:,.1f} MB ({parts}); hash {self.hash[:12]}"

    def write(self, folder: Path) -> None:
        """BundleError when a field is not JSON, NaN among them."""
        try:
            text = json.dumps(self._fields() | {"hash": self.hash}, indent=2, ensure_ascii=False, allow_nan=False)
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise BundleError(f"{folder}: {MANIFEST} cannot be written: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a bundle, its format, version, hash and types checked; BundleError."""
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(f"{folder}: not a bundle, {MANIFEST} is missing")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{folder}: {MANIFEST} is not readable JSON: {error}") from error
        try:
            return cls._parse(fields)
        except BundleError as error:
            raise BundleError(f"{folder}: {MANIFEST} {error}") from None

    def _fields(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)

    @classmethod
    def _parse(cls, fields: Any) -> Manifest:
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise BundleError(f"is not that of a {FORMAT}")
        if fields.get("version") != VERSION:
            raise BundleError(
                f"has format version {fields.get('version')!r}; this fanin reads version {VERSION}: export the model again"
            )
        if _take(fields, "hash", str) != _hash({key: value for key, value in fields.items() if key != "hash"}):
            raise BundleError("is altered: its hash does not match")
        blocks = [
            BlockLayout(
                connectivity=_take(block, "connectivity", str),
                dtype=_take(block, "dtype", str),
                groups=_take(block, "groups", int),
                fan_in=_take(block, "fan_in", int),
                group_size=_take(block, "group_size", int),
                buffers=_take(block, "buffers", dict),
            )
            for block in _take(fields, "blocks", list)
        ]
        files = {
            name: FileFacts(_take(facts, "size", int), _take(facts, "sha256", str))
            for name, facts in _take(fields, "files", dict).items()
        }
        return cls(
            name=_take(fields, "name", str),
            created=_take(fields, "created", str),
            labels=_take(fields, "labels", int),
            width=_take(fields, "width", int),
            max_length=_take(fields, "max_length", int),
            blocks=tuple(blocks),
            files=files,
            metrics=_take(fields, "metrics", dict),
            versions=_take(fields, "versions", dict),
            parity=None if fields.get("parity") is None else _take(fields, "parity", dict),
        )


def _hash(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _take(fields: Any, key: str, kind: type[_T]) -> _T:
    value = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError(f'lacks "{key}", or it is not {kind.__name__}')
    return value
