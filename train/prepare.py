"""Everything before the first step: data, model and caches, new or as a checkpoint left them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import checkpoints_in
from models.device import DeviceError, cuda_device
from models.encoder import Encoder, EncoderError
from models.files import remove_leftovers
from models.head import Head, HeadError
from models.kernels import cpu
from train import checkpoint
from train.compute import compute_on
from train.data import Dataset, Labels
from train.evaluation import sample
from train.grouping import new_order
from train.head import HeadTraining
from train.imprint import imprint
from train.inputs import Inputs, PooledInputs, TextInputs
from train.metrics import inverse_propensities
from train.model import check_fan_in, new_encoder, new_head
from train.runs import Run
from train.settings import Settings, SettingsError
from train.stages import Stages
from train.tokens import Split, label_counts, load_split
from train.trainer import Trainer

_HELDOUT = 256
_PACKAGES = ("fanin", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def prepare(settings: Settings, run: Run) -> Trainer:
    """A trainer at the first step of a new run, or at the last checkpoint of the run that `run` holds.

    Raises DataError, EncoderError, HeadError, CheckpointError, SettingsError; nothing is lost then.
    """
    device = _device(settings.device)
    threads = settings.threads or cpu.default_threads()
    cpu.set_threads(threads)
    torch.set_num_threads(threads)

    stages = Stages(device)
    with stages("reading"):
        data = dataset(settings)
        hashes = data.hashes()
        _check_unchanged(run, hashes)
        labels = data.labels()
    folder = checkpoint.latest(run.checkpoints)
    with stages("model"):
        if folder is None:
            encoder, head, progress = new_encoder(settings, data, labels), None, checkpoint.Progress()
            check_fan_in(settings, encoder.width, len(labels))
        else:
            with _naming_an_older_one(folder):
                encoder, head, progress = checkpoint.load_model(folder)
        encoder.to(device).set_dtype(settings.encoder_dtype)
        if settings.gradient_checkpointing:
            encoder.checkpoint_gradients()

    cache = Path(settings.cache) if settings.cache else run.folder / "cache"
    remove_leftovers(run.folder)
    if not settings.cache:  # else another run may be writing there
        remove_leftovers(cache)
    with stages("tokenization"):
        splits = read_splits(settings, data, labels, hashes, encoder, cache)
        counts = label_counts(splits["train"], labels)
        text_counts, weights = counts_and_weights(settings, splits["train"], counts)
    if head is None:
        with stages("grouping"):
            order = new_order(settings, encoder, splits["train"], labels, cache)
            head = new_head(settings, encoder.width, counts, len(splits["train"]), order)

    with stages("embedding"):
        inputs: dict[str, Inputs] = {
            name: PooledInputs(encoder, split, cache, name) if settings.freeze_encoder else TextInputs(encoder, split)
            for name, split in splits.items()
        }
    if folder is None and settings.head_init == "imprinted":
        with stages("imprinting"):  # what a pretrained encoder made of the texts is in the cache, the grouping needed it
            known = settings.encoder != "small"
            texts = PooledInputs(encoder, splits["train"], cache, "train") if known else inputs["train"]
            imprint(head, texts, counts, choose_shared=known)  # a new one's groups do better with random inputs
    evaluations = {name: each for name, each in inputs.items() if name != "train"}
    positive_weights = weights.astype(np.float32) if settings.weight_positives else None
    steps = settings.steps(len(splits["train"]))
    training = HeadTraining(head, settings, steps, positive_weights, compute_on(device))
    trainer = Trainer(
        settings, encoder, training, inputs["train"], evaluations, text_counts, weights, run.checkpoints, run.log, stages
    )
    if folder is not None:
        with _naming_an_older_one(folder):
            trainer.restore(folder, progress)

    model = _model(head, trainer.moment_bytes)
    print(_shape(model))
    sparse = any(block.connectivity != "dense" for block in head.blocks)
    if sparse and settings.rewire != "off" and settings.rewire_every >= settings.rewired_before(steps):
        print(f"no rewiring: --rewire-every {settings.rewire_every:,} is too long for {steps:,} steps")
    if device.type == "cuda":
        print(f"device: {_hardware(device)}")
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write_labels(labels)
    first = next(iter(evaluations))
    run.write_heldout(_heldout(data, first, labels, len(splits[first])))
    run.log.cut(progress.step, evaluation_due=progress.batch > 0)
    run.write_config(
        {
            "settings": settings.as_json(),
            "data": {"path": str(data.folder.resolve()), "format": data.format, "labels": len(labels), "sha256": hashes}
            | {name: _counts(split) for name, split in splits.items()},
            "model": model | {"embedding_width": encoder.embedding_width},
            "device": _hardware(device),
            "versions": _versions(),
        }
    )
    return trainer


def dataset(settings: Settings) -> Dataset:
    """The data that the settings name. DataError."""
    return Dataset(Path(settings.data), titles_only=settings.titles_only, train_on_names=settings.train_on_names)


def counts_and_weights(settings: Settings, train: Split, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What metrics go by: the texts of each label, its name not among them, int64 [L], and its weight in PSP@k, fp64 [L].

    counts   texts of each label as it is trained on them, its name among them if `train` has names, int64 [L]
    """
    text_counts = counts - (train.names > 0)
    weights = inverse_propensities(text_counts, len(train) - train.names, a=settings.propensity_a, b=settings.propensity_b)
    return text_counts, weights


def read_splits(
    settings: Settings, data: Dataset, labels: Labels, hashes: dict[str, str], encoder: Encoder, cache: Path
) -> dict[str, Split]:
    """All splits of `data` as the encoder's tokens, by name, from `cache` where they are there. `hashes` are the data's."""
    reading = [f"titles only: {settings.titles_only}", f"{settings.max_length} {encoder.tokenizer.to_str()}"]
    sources = {name: [hashes[name], hashes["labels"], *reading] for name in data.splits}
    if settings.train_on_names:
        sources["train"].append("names")
    return {name: load_split(data, name, labels, sources[name], encoder.tokenize, cache) for name in data.splits}


@contextmanager
def _naming_an_older_one(folder: Path) -> Iterator[None]:
    """What is wrong with a checkpoint, and where training can go on without it."""
    try:
        yield
    except (EncoderError, HeadError, checkpoint.CheckpointError) as error:
        *older, _ = checkpoints_in(folder.parent)
        if not older:
            raise
        raise checkpoint.CheckpointError(f"{error}; delete {folder} to go on from {older[-1].name}") from error


def _device(name: str) -> torch.device:
    """The device that --device means."""
    try:
        return torch.device("cpu") if name == "cpu" else cuda_device("cuda")
    except DeviceError as error:
        if name == "auto":
            return torch.device("cpu")
        raise SettingsError(f"--device {error}") from None


def _hardware(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _check_unchanged(run: Run, hashes: dict[str, str]) -> None:
    config = run.config()
    if config is None:
        return
    before = config["data"]["sha256"]
    changed = sorted(name for name in before.keys() | hashes.keys() if before.get(name) != hashes.get(name))
    if changed:
        raise SettingsError(f"cannot resume: the data has changed since the run began ({', '.join(changed)})")


def _heldout(data: Dataset, split: str, labels: Labels, n_texts: int) -> list[dict[str, Any]]:
    chosen = set(sample(n_texts, _HELDOUT).tolist())
    rows = enumerate(data.texts(split, labels))
    return [{"text": text, "labels": [labels.ids[i] for i in positions]} for row, (text, positions) in rows if row in chosen]


def _counts(split: Split) -> dict[str, int]:
    """What config.json says of a split; names are neither texts nor positives there."""
    texts = len(split) - split.names
    return {
        "texts": texts,
        "texts_without_labels": int((np.diff(split.label_starts[: texts + 1]) == 0).sum()),
        "tokens": int(split.token_starts[texts]),
        "positives": int(split.label_starts[texts]),
        "filtered": len(split.filtered),
    } | ({"names": split.names} if split.names else {})


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source folder
            versions[name] = "not installed"
    return versions


def _model(head: Head, moment_bytes: int) -> dict[str, Any]:
    blocks = [
        {
            "connectivity": block.connectivity,
            "labels": int((block.label_ids >= 0).sum()),
            "fan_in": block.fan_in,
            "group_size": block.group_size,
            "dtype": block.dtype,
            "bytes": block.nbytes,
        }
        for block in head.blocks
    ]
    return {
        "width": head.width,
        "labels": head.n_labels,
        "head_bytes": head.nbytes,
        "moment_bytes": moment_bytes,
        "blocks": blocks,
    }


def _shape(model: dict[str, Any]) -> str:
    """The head for people: a line per block, and what they take in all beside a dense layer."""

    def size(nbytes: int) -> str:
        return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"

    lines = [f"head: {model['labels']:,} labels, {model['width']:,} inputs"]
    lines += [
        f"  {block['connectivity']:<8}{block['labels']:>11,} labels   fan-in {block['fan_in']:>6,}"
        f"   {block['dtype']}{size(block['bytes']):>15}"
        for block in model["blocks"]
    ]
    dense_bytes = 4 * model["labels"] * (model["width"] + 1)
    share = model["head_bytes"] / dense_bytes
    return "\n".join([*lines, f"  {size(model['head_bytes'])} in all, {share:.1%} of a dense fp32 layer's {size(dense_bytes)}"])
