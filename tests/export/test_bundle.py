"""A bundle is whole or absent, opens as it was written, and is refused by name when anything in it is damaged."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import manifest as manifest_module
from export.bundle import Bundle, BundleError, Manifest, open_bundle, write_bundle
from models import dtypes
from models.head import Block, Connectivity, Head, HeadError
from tests.export.conftest import LABELS, WIDTH, mixed_head

ENCODER_BYTES = bytes(range(256)) * 40


def write(path: Path, head: Head, **changes: Any) -> Manifest:
    """A bundle with `head`, its other contents made up."""
    contents: dict[str, Any] = {
        "name": "made up",
        "labels": [(f"id-{i}", f"name {i}") for i in range(head.n_labels)],
        "tokenizer": "{}",
        "max_length": 24,
        "write_encoder": lambda file: file.write_bytes(ENCODER_BYTES),
        "metrics": {"test": {"P@1": 0.5, "PSP@1": None}},
    }
    return write_bundle(path, head=head, **contents | changes)


def on_disk(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return isinstance(base, mmap.mmap)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "bundle"
    write(path, mixed_head())
    return path


@pytest.fixture
def bundle(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, tmp_path / "bundle"))


@pytest.mark.parametrize("dtype", dtypes.STORAGE)
@pytest.mark.parametrize("connectivity", ["dense", "shared", "private"])
def test_buffers_come_back_bit_for_bit_and_mapped(tmp_path: Path, connectivity: Connectivity, dtype: str) -> None:
    ids, rng = np.arange(LABELS, dtype=np.int32), np.random.default_rng(3)
    block = Block.random(ids, width=WIDTH, connectivity=connectivity, fan_in=12, group_size=16, dtype=dtype, rng=rng)
    write(tmp_path / "b", Head(WIDTH, LABELS, (block,)))
    head = open_bundle(tmp_path / "b").head
    (other,) = head.blocks
    assert (head.width, head.n_labels, other.connectivity, other.dtype) == (WIDTH, LABELS, connectivity, dtype)
    assert other.buffers.keys() == block.buffers.keys()
    for name, array in block.buffers.items():
        stored = other.buffers[name]
        assert stored.dtype == array.dtype
        assert stored.tobytes() == array.tobytes()
        assert on_disk(stored)
        assert not stored.flags.writeable


def test_blocks_keep_their_order_and_layout(intact: Path) -> None:
    manifest = open_bundle(intact).manifest
    assert [(b.connectivity, b.dtype, b.groups, b.fan_in, b.group_size) for b in manifest.blocks] == [
        ("dense", "fp32", 2, 48, 16),
        ("shared", "bf16", 11, 12, 16),
        ("private", "fp16", 7, 12, 16),
    ]


def test_an_open_bundle_tells_what_it_holds(intact: Path) -> None:
    bundle = open_bundle(intact)
    assert bundle.manifest.name == "made up"
    assert (bundle.manifest.labels, bundle.manifest.width, bundle.manifest.max_length) == (LABELS, WIDTH, 24)
    assert bundle.manifest.metrics == {"test": {"P@1": 0.5, "PSP@1": None}}
    assert bundle.manifest.versions["numpy"] == np.__version__
    assert bundle.manifest.parity is None
    assert bundle.encoder_file.read_bytes() == ENCODER_BYTES
    assert bundle.tokenizer_file.read_text() == "{}"
    assert (bundle.labels.id(7), bundle.labels.name(7)) == ("id-7", "name 7")
    assert bundle.labels.find(["id-7", "id-300"]).tolist() == [7, -1]
    np.testing.assert_array_equal(bundle.places, mixed_head().places())
    on_disk_bytes = sum(file.stat().st_size for file in intact.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert bundle.nbytes == on_disk_bytes
    assert bundle.manifest.component_nbytes["encoder"] == len(ENCODER_BYTES)


def test_every_file_beside_the_encoder_is_part_of_the_bundle(tmp_path: Path) -> None:
    def with_weights(file: Path) -> None:
        file.write_bytes(b"graph")
        file.with_name("encoder.onnx.data").write_bytes(b"weights")

    write(tmp_path / "b", mixed_head(), write_encoder=with_weights)
    assert open_bundle(tmp_path / "b").manifest.component_nbytes["encoder"] == len(b"graphweights")
    (tmp_path / "b" / "encoder.onnx.data").write_bytes(b"Weights")
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data is altered"):
        open_bundle(tmp_path / "b")


def test_the_hash_stands_for_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a", mixed_head())
    write(tmp_path / "b", mixed_head(), tokenizer="[]")
    a, b = open_bundle(tmp_path / "a"), open_bundle(tmp_path / "b")
    assert a.hash == open_bundle(tmp_path / "a").hash == json.loads((tmp_path / "a" / "manifest.json").read_text())["hash"]
    assert a.hash != b.hash


def test_reading_a_bundle_needs_no_torch(intact: Path) -> None:
    program = (
        "import sys, export.bundle, pathlib\n"
        "export.bundle.open_bundle(pathlib.Path(sys.argv[1])).labels.name(0)\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'onnx') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, intact], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Damage


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FILES = [
    "encoder.onnx", "head/0.bias.npy", "head/0.label_ids.npy", "head/0.values.npy",
    *(f"head/{block}.{name}.npy" for block in (1, 2) for name in ("bias", "indices", "label_ids", "values")),
    "head/places.npy", *(f"labels/{name}.bin" for name in ("folded", "ids", "names")),
    *(f"labels/{name}.npy" for name in ("folded.offsets", "folded.order", "ids.index", "ids.offsets", "names.offsets")),
    "tokenizer.json",
]  # fmt: skip


def test_every_file_is_damaged_below(intact: Path) -> None:
    assert files(intact) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{bundle}: {name} is missing"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"{name} is truncated: it has {len(data) - 1} bytes, the manifest says {len(data)}"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_one_flipped_bit_is_refused_by_name(bundle: Path, name: str, place: float) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is altered: its SHA-256 does not match"):
        open_bundle(bundle)


def test_a_lengthened_file_is_refused_by_name(bundle: Path) -> None:
    with (bundle / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match=r"tokenizer\.json is altered: it has 3 bytes, the manifest says 2"):
        open_bundle(bundle, verify=False)


def test_verification_can_be_switched_off(bundle: Path) -> None:
    (bundle / "encoder.onnx").write_bytes(ENCODER_BYTES[::-1])
    assert open_bundle(bundle, verify=False).manifest.labels == LABELS


def test_every_flipped_bit_of_the_manifest_is_refused(bundle: Path) -> None:
    """A flip may spoil the JSON, a name or a number; the hash over the fields finds those that still parse."""
    path = bundle / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        if not data[at : at + 1].isspace():
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(BundleError, match=r"manifest\.json"):
                open_bundle(bundle, verify=False)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "is not that of a fanin-bundle"),
        (b'{"format": "other"}', "is not that of a fanin-bundle"),
        (b'{"format": "fanin-bundle", "version": 1}', "has format version 1; .* reads version 2: export the model again"),
        (b'{"format": "fanin-bundle"}', "has format version None; this fanin reads version 2"),
        (b'{"format": "fanin-bundle", "version": 2}', 'lacks "hash"'),
        (b'{"format": "fanin-bundle", "version": 2, "hash": "0"}', "is altered: its hash does not match"),
    ],
)
def test_another_manifest_is_refused(bundle: Path, content: bytes, fault: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=rf"{bundle}: manifest\.json {fault}"):
        open_bundle(bundle)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=rf"{path}: not a bundle, manifest\.json is missing"):
            open_bundle(path)


def forge(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest's fields and signs them again, as a faulty or malicious writer would."""
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["hash"]
    change(fields)
    path.write_text(json.dumps(fields | {"hash": manifest_module._hash(fields)}))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m.pop("labels"), 'lacks "labels", or it is not int'),
        (lambda m: m.update(width="48"), 'lacks "width", or it is not int'),
        (lambda m: m.update(max_length=True), 'lacks "max_length", or it is not int'),
        (lambda m: m.update(blocks={}), 'lacks "blocks", or it is not list'),
        (lambda m: m.update(blocks=[7]), 'lacks "connectivity", or it is not str'),
        (lambda m: m.update(blocks=[]), "a head needs at least one block"),
        (lambda m: m.update(files=[]), 'lacks "files", or it is not dict'),
        (lambda m: m["files"].update({"encoder.onnx": 3}), 'lacks "size", or it is not int'),
        (lambda m: m["files"].pop("encoder.onnx"), r"encoder\.onnx is not among the manifest's files"),
        (lambda m: m["files"].pop("labels/ids.bin"), r"labels/ids\.bin is not among the manifest's files"),
        (lambda m: m["files"].pop("head/1.values.npy"), r"head/1\.values\.npy is not among the manifest's files"),
        (lambda m: m["blocks"][1].update(connectivity="ring"), "head block 1: connectivity is 'ring'"),
        (lambda m: m["blocks"][1].update(dtype="fp16"), "head block 1: values is uint16 .*, expected float16"),
        (lambda m: m["blocks"][1].update(groups=12), r"head/1\.values\.npy has shape \[11, 12, 16\], expected \[12, 12, 16\]"),
        (lambda m: m["blocks"][1]["buffers"].pop("values"), "head block 1: .*missing.*'values'"),
        (lambda m: m["blocks"][1]["buffers"].update(bias="tokenizer.json"), r"tokenizer\.json is not an npy file"),
        (lambda m: m["blocks"][1]["buffers"].update(bias=["x"]), "head block 1"),
        (lambda m: m["blocks"][1]["buffers"].update(extra="head/1.bias.npy"), "head block 1: .*extra"),
        (lambda m: m["blocks"][1]["buffers"].update(bias="head/0.bias.npy"), r"head block 1: bias is float32 \[2, 16\]"),
        (lambda m: m.update(width=47), "head block 0: fan-in is 48, must be 1 to the width 47"),
        (lambda m: m.update(labels=LABELS + 1), r"ids\.offsets\.npy is int64 \[301\], expected int64 \[302\]"),
        (lambda m: m.update(labels=LABELS - 1), "head block .*: labels run from -?[0-9]+ to 299, the head has 299"),
        (lambda m: m.update(labels=-1), "labels run from .*, the head has -1"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_its_files_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    forge(bundle, change)
    with pytest.raises(BundleError, match=fault):
        open_bundle(bundle)


@pytest.mark.parametrize("outside", ["../secret", "head/../../secret", "{parent}/secret", "link"])
def test_a_file_outside_the_bundle_is_refused(bundle: Path, outside: str) -> None:
    (bundle.parent / "secret").write_bytes(b"")
    (bundle / "link").symlink_to(bundle.parent / "secret")
    outside = outside.format(parent=bundle.parent)
    forge(bundle, lambda m: m["files"].update({outside: {"size": 0, "sha256": ""}}))
    with pytest.raises(BundleError, match=f"{outside} lies outside the bundle"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize(
    ("buffer", "value", "fault"),
    [
        ("indices", WIDTH, "head block 1: an index is 48, the width is 48"),
        ("label_ids", LABELS, "head block 1: labels run from -1 to 300, the head has 300"),
        ("label_ids", -2, "head block 1: labels run from -2 to 299, the head has 300"),
    ],
)
def test_what_would_read_beyond_memory_is_refused_though_its_hash_is_right(
    bundle: Path, buffer: str, value: int, fault: str
) -> None:
    name = f"head/1.{buffer}.npy"
    array = np.load(bundle / name)
    array[0, 0] = value
    np.save(bundle / name, array)
    digest = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    forge(bundle, lambda m: m["files"][name].update(sha256=digest))
    with pytest.raises(BundleError, match=fault):
        open_bundle(bundle)


def test_places_of_another_shape_are_refused_though_their_hash_is_right(bundle: Path) -> None:
    name = "head/places.npy"
    np.save(bundle / name, np.zeros(LABELS - 1, dtype=np.uint32))
    data = (bundle / name).read_bytes()
    forge(bundle, lambda m: m["files"].update({name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))
    with pytest.raises(BundleError, match=r"head/places\.npy is uint32 \[299\], expected uint32 \[300\]"):
        open_bundle(bundle)


# Writing


def broken(*args: Any) -> Any:
    raise RuntimeError("disk on fire")


def half_of_the_labels() -> Any:
    yield from ((str(i), str(i)) for i in range(LABELS // 2))
    broken()


def invalid_head() -> Head:
    head = mixed_head()
    head.blocks[1].bias[2, 3] = np.nan
    return head


FAILURES = [
    ({"write_encoder": broken}, RuntimeError, "disk on fire"),
    ({"prove": broken}, RuntimeError, "disk on fire"),
    ({"labels": half_of_the_labels()}, RuntimeError, "disk on fire"),
    ({"labels": [("a", "A")]}, BundleError, "1 labels are named, the head has 300"),
    ({"labels": [("a", "\ud800")] * LABELS}, BundleError, "label 0: .* is not Unicode text"),
    ({"metrics": {"P@1": float("nan")}}, BundleError, r"manifest\.json cannot be written"),
    ({"head": invalid_head()}, HeadError, r"block 1: bias\[2, 3\] is not finite"),
]
FAILURE_NAMES = ["encoder", "proof", "labels stop", "label count", "surrogate", "metrics", "head"]


@pytest.mark.parametrize(("changes", "kind", "fault"), FAILURES, ids=FAILURE_NAMES)
def test_a_failed_write_leaves_nothing(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], fault: str) -> None:
    with pytest.raises(kind, match=fault):
        write(tmp_path / "b", **{"head": mixed_head()} | changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_older_bundle(bundle: Path) -> None:
    before = open_bundle(bundle).hash
    with pytest.raises(RuntimeError, match="disk on fire"):
        write(bundle, mixed_head(), prove=broken, force=True)
    assert open_bundle(bundle).hash == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_failed_rename_puts_the_older_bundle_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(bundle).hash
    rename = Path.rename

    def once_broken(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once_broken)
    with pytest.raises(OSError, match="disk on fire"):
        write(bundle, mixed_head(), force=True)
    assert open_bundle(bundle).hash == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_bundle_is_on_disk_before_the_older_one_goes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure right after an export must not leave a name without content."""
    flushed: set[tuple[int, int]] = set()
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        facts = os.fstat(descriptor)
        flushed.add((facts.st_dev, facts.st_ino))
        fsync(descriptor)

    def rename_flushed(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            for path in (self, *self.rglob("*")):
                assert (path.stat().st_dev, path.stat().st_ino) in flushed, path
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", rename_flushed)
    write(bundle, mixed_head(), force=True)
    assert (bundle.parent.stat().st_dev, bundle.parent.stat().st_ino) in flushed


def test_a_bundle_is_replaced_only_by_force(bundle: Path) -> None:
    before = open_bundle(bundle).hash
    with pytest.raises(BundleError, match=f"{bundle} exists; .* --force"):
        write(bundle, mixed_head(), tokenizer="[]")
    assert open_bundle(bundle).hash == before
    mapped = open_bundle(bundle)
    write(bundle, mixed_head(), tokenizer="[]", force=True)
    assert open_bundle(bundle).hash != before
    assert list(bundle.parent.iterdir()) == [bundle]
    assert mapped.labels.name(3) == "name 3"  # one that is being served goes on


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "precious", tmp_path / "file", tmp_path):
        with pytest.raises(BundleError, match="exists"):
            write(path, mixed_head(), force=force)
    assert (tmp_path / "precious" / "file").read_text() == (tmp_path / "file").read_text() == "x"


def test_the_proof_sees_the_finished_bundle_before_it_has_its_name(tmp_path: Path) -> None:
    def prove(bundle: Bundle) -> dict[str, Any]:
        assert not (tmp_path / "b").exists()
        return {"labels": len(bundle.labels), "head": bundle.head.nbytes}

    manifest = write(tmp_path / "b", mixed_head(), prove=prove)
    assert open_bundle(tmp_path / "b").manifest == manifest
    assert manifest.parity == {"labels": LABELS, "head": mixed_head().nbytes}
