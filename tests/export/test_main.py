"""The command: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export import pack
from export.__main__ import main
from export.bundle import open_bundle
from export.convert import convert_values
from export.encoder import export_encoder
from models import dtypes
from models.checkpoint import load_head, save_head
from models.encoder import Encoder
from models.head import Block, Head
from tests.export.conftest import LABELS, WIDTH, mixed_head
from tests.limits import no_file_beyond

pytestmark = pytest.mark.slow
CHECKPOINT = "checkpoints/step-00000020"


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def quick(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the encoder that was exported before, which is the same one."""
    monkeypatch.setattr(pack, "export_encoder", lambda encoder, file, dtype: shutil.copy(exported / "encoder.onnx", file))


def test_the_bundle_holds_the_checkpoint(exported: Path, run_folder: Path) -> None:
    bundle = open_bundle(exported)
    head = load_head(run_folder / CHECKPOINT / "head.safetensors")
    for block, packed in zip(head.blocks, bundle.head.blocks, strict=True):
        assert {name: array.tobytes() for name, array in block.buffers.items()} == {
            name: array.tobytes() for name, array in packed.buffers.items()
        }
    assert bundle.labels.name(299) == "Näme 299 名前 🎈"
    manifest = bundle.manifest
    assert manifest.name == "tiny"
    assert (manifest.labels, manifest.width, manifest.max_length) == (LABELS, WIDTH, 24)
    assert manifest.metrics == {"dev": {"kind": "eval", "split": "dev", "step": 20, "P@1": 0.2}}  # not what came later
    assert {"python", "numpy", "torch", "onnxruntime", "tokenizers", "transformers"} <= manifest.versions.keys()
    assert manifest.parity is not None
    assert (manifest.parity["texts"], manifest.parity["same_top_k"]) == (26, 26)


@pytest.mark.usefixtures("quick")
def test_it_says_what_it_did(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder), "--out", str(tmp_path / "b"), "--name", "my model"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.name == "my model"
    assert "same top-10 on 26 of 26 held-out texts" in out
    blocks = "dense K=48 G=16 fp32, shared K=12 G=16 bf16, private K=12 G=16 fp16"
    assert f"300 labels × 48 inputs ({blocks})" in out
    assert f"hash {bundle.hash[:12]}" in out


@pytest.mark.usefixtures("quick")
def test_the_latest_or_the_chosen_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / CHECKPOINT, run / "checkpoints/step-00000030")
    for chosen, step in (["--checkpoint", "step-00000020"], 20), ([], 30):
        assert main([str(run), "--out", str(tmp_path / f"{step}"), *chosen]) == 0
        assert open_bundle(tmp_path / f"{step}").manifest.metrics["dev"]["step"] == step


@pytest.mark.usefixtures("quick")
def test_a_row_that_a_killed_process_was_writing_is_passed_over(run: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ev')
    assert main([str(run), "--out", str(tmp_path / "b")]) == 0
    assert open_bundle(tmp_path / "b").manifest.metrics["dev"]["step"] == 20


@pytest.mark.usefixtures("quick")
def test_numbers_that_are_not_finite_become_null(run: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "split": "test", "step": 20, "PSP@1": NaN}\n')
    assert main([str(run), "--out", str(tmp_path / "b")]) == 0
    assert open_bundle(tmp_path / "b").manifest.metrics["test"]["PSP@1"] is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_values_are_rounded_on_demand(run_folder: Path, tmp_path: Path, dtype: str) -> None:
    assert main([str(run_folder), "--out", str(tmp_path / "b"), "--head-dtype", dtype]) == 0
    for block, packed in zip(mixed_head().blocks, open_bundle(tmp_path / "b").head.blocks, strict=True):
        assert packed.dtype == dtype
        expected = dtypes.encode(dtypes.decode(block.values, block.dtype), dtype)
        assert np.array_equal(packed.values, expected)


@pytest.mark.usefixtures("quick")
def test_int8_values_have_a_scale_per_label_and_go_back_to_what_they_stand_for(run_folder: Path, tmp_path: Path) -> None:
    assert main([str(run_folder), "--out", str(tmp_path / "b"), "--head-dtype", "int8"]) == 0
    packed = open_bundle(tmp_path / "b").head
    for block, small, back in zip(mixed_head().blocks, packed.blocks, convert_values(packed, "fp32").blocks, strict=True):
        assert (small.dtype, back.dtype, back.scales) == ("int8", "fp32", None)
        weights = block.weights(slice(None))
        heaviest = np.abs(weights).max(axis=1)
        assert (np.abs(small.values).max(axis=1)[heaviest > 0] == 127).all()
        assert (np.abs(back.values - weights) <= heaviest[:, None] / 253).all()


def test_values_beyond_the_format_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = mixed_head()
    head.blocks[0].values[1, 2, 3] = 1e6
    save_head(head, run / CHECKPOINT / "head.safetensors")
    assert main([str(run), "--out", str(tmp_path / "b"), "--head-dtype", "fp16"]) == 2
    assert "error: block 0: values[1, 2, 3] is not finite" in capsys.readouterr().err


def test_an_int8_encoder_is_smaller_and_its_difference_is_told(
    exported: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nowhere")  # there need not be room for a model where temporary files go
        assert main([str(run_folder), "--out", str(tmp_path / "b"), "--encoder-dtype", "int8"]) == 0
        assert tempfile.tempdir == "/nowhere"
    out, err = capfd.readouterr()
    assert err == ""
    bundle, whole = open_bundle(tmp_path / "b"), open_bundle(exported)
    assert bundle.manifest.files["encoder.onnx"].size < whole.manifest.files["encoder.onnx"].size
    parity = bundle.manifest.parity
    assert parity is not None
    assert 1e-4 < parity["embedding_difference"] / parity["embedding_scale"] < 0.4
    assert f"same top-10 on {parity['same_top_k']} of 26 held-out texts" in out


def test_a_bundle_that_answers_otherwise_is_not_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unfaithful(encoder: Encoder, file: Path, dtype: str) -> None:
        assert encoder.intermediate is not None
        weight = encoder.intermediate.weight.data
        original = weight.clone()
        weight *= 1.01
        export_encoder(encoder, file)
        weight.copy_(original)

    monkeypatch.setattr(pack, "export_encoder", unfaithful)
    assert main([str(run_folder), "--out", str(tmp_path / "b")]) == 1
    assert "does not answer as the checkpoint does, and is not kept: embeddings of a batch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_the_encoder_for_torch_is_that_of_the_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    assert main([str(run_folder), "--out", str(tmp_path / "with"), "--torch-encoder"]) == 0
    assert main([str(run_folder), "--out", str(tmp_path / "without")]) == 0
    folder = open_bundle(tmp_path / "with").torch_encoder
    assert folder is not None
    trained = Encoder.load(run_folder / CHECKPOINT / "encoder").state_dict()
    packed = Encoder.load(folder).state_dict()
    assert packed.keys() == trained.keys()
    assert all(torch.equal(packed[name], trained[name]) for name in trained)
    assert open_bundle(tmp_path / "without").torch_encoder is None


@pytest.mark.usefixtures("quick")
def test_force_replaces_a_bundle(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    assert main([str(run_folder), "--out", str(out), "--name", "old"]) == 0
    assert main([str(run_folder), "--out", str(out), "--name", "new"]) == 2
    assert f"{out} exists; choose another name or replace it with --force" in capsys.readouterr().err
    assert open_bundle(out).manifest.name == "old"
    assert main([str(run_folder), "--out", str(out), "--name", "new", "--force"]) == 0
    assert open_bundle(out).manifest.name == "new"


@pytest.mark.parametrize("file", ["head/0.values.npy", "encoder.onnx"])
def test_a_full_disk_is_one_clear_error_and_the_older_bundle_stays(
    run_folder: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    command = [str(run_folder), "--out", str(out)]
    assert main(command) == 0
    before, size = open_bundle(out).hash, (out / file).stat().st_size
    capsys.readouterr()
    with no_file_beyond(size - 1):
        assert main([*command, "--force"]) == 2
    assert capsys.readouterr().err == f"python -m export: error: [Errno 27] File too large: '{out}'\n"
    assert open_bundle(out).hash == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_onnx_cut_short_for_the_quantizer_is_an_error(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk onnx writes what fits and says nothing."""

    def cut_short(source: str, target: str) -> None:
        whole = Path(source).read_bytes()
        Path(target).write_bytes(whole[: len(whole) // 2])

    monkeypatch.setattr("onnx.shape_inference.infer_shapes_path", cut_short)
    assert main([str(run_folder), "--out", str(tmp_path / "b"), "--encoder-dtype", "int8"]) == 2
    assert f"cut short; is the disk full?: '{tmp_path / 'b'}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "export_encoder", interrupt)
    assert main([str(run_folder), "--out", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "python -m export: error: stopped; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def narrower_head(run: Path) -> None:
    labels = np.arange(LABELS, dtype=np.int32)
    block = Block.random(labels, width=32, connectivity="shared", fan_in=4, rng=np.random.default_rng(0))
    save_head(Head(32, LABELS, (block,)), run / CHECKPOINT / "head.safetensors")


def append(name: str, line: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        with (run / name).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(line)

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda run: shutil.rmtree(run), "run: no such folder"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "run: no checkpoint in checkpoints/"),
        (lambda run: (run / CHECKPOINT).rename(run / "checkpoints/.step-00000020.tmp"), "run: no checkpoint in checkpoints/"),
        (lambda run: (run / CHECKPOINT / "head.safetensors").unlink(), "head.safetensors: "),
        (lambda run: (run / CHECKPOINT / "head.safetensors").write_bytes(b"x"), "head.safetensors: not a readable checkpoint"),
        (lambda run: (run / CHECKPOINT / "encoder" / "encoder.json").unlink(), "encoder.json: missing"),
        (lambda run: (run / CHECKPOINT / "encoder" / "model.safetensors").write_bytes(b"x"), "model.safetensors: "),
        (narrower_head, "step-00000020: the encoder gives 48 numbers, the head takes 32"),
        (lambda run: (run / "heldout.jsonl").unlink(), "heldout.jsonl: missing"),
        (lambda run: (run / "heldout.jsonl").write_text(""), "heldout.jsonl: holds no text to compare the bundle on"),
        (append("heldout.jsonl", '{"text": 3, "labels": []}\n'), 'heldout.jsonl:27: not a line that train writes: "text"'),
        (append("heldout.jsonl", '{"text": "x"}\n'), "heldout.jsonl:27: not a line that train writes: 'labels'"),
        (append("heldout.jsonl", "[]\n"), "heldout.jsonl:27: not a line that train writes"),
        (lambda run: (run / "labels.jsonl").unlink(), "labels.jsonl: missing"),
        (append("labels.jsonl", '{"id": "\udcff"}'), "labels.jsonl:301: not a line that train writes: 'utf-8' codec"),
        (append("labels.jsonl", '{"id": "x", "name": "half \\ud83c"}\n'), "label 300: 'half \\ud83c' is not Unicode text"),
        (append("labels.jsonl", '{"id": "x", "name": "y"}\n'), "301 labels are named, the head has 300"),
        (append("metrics.jsonl", '{"kind": "ev\n'), "metrics.jsonl:5: not a line that train writes"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: missing"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_exported_is_one_clear_error(
    run: Path, change: Callable[[Path], object], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run)
    (tmp_path / "out").mkdir()
    assert main([str(run), "--out", str(tmp_path / "out" / "b")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m export: error: ")
    assert fault in err
    assert err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_checkpoint_names_those_there_are(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), "--out", str(tmp_path / "b"), "--checkpoint", "step-7"]) == 2
    assert "no checkpoint step-7; there is step-00000020" in capsys.readouterr().err


def test_from_the_command_line(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "export", str(tmp_path / "absent"), "--out", str(tmp_path / "b")]
    done = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"python -m export: error: {tmp_path / 'absent'}: no such folder\n"


def test_help_and_usage_come_at_once() -> None:
    """They load neither torch nor ONNX."""
    program = (
        "import sys, export.__main__\n"
        "for arguments in (['--help'], ['RUN']):\n"
        "    try: export.__main__.main(arguments)\n"
        "    except SystemExit as stop: print('stopped', stop.code, 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("stopped")] == ["stopped 0 False", "stopped 2 False"]
    assert "exit codes: 0 done, 1 the bundle" in done.stdout
    assert "the following arguments are required: --out" in done.stderr


def test_the_manifest_is_json_for_other_readers(exported: Path) -> None:
    fields = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))
    assert (fields["format"], fields["version"], fields["labels"]) == ("fanin-bundle", 2, LABELS)
