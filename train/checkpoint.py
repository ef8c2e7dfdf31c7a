"""Checkpoints: the trained model and all that training needs to go on as if it had never stopped. No pickle.

    checkpoints/step-00001234/  encoder/  head.safetensors  trainer.safetensors  trainer.json

A checkpoint is written beside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import checkpoints_in, load_head, save_head, saving
from models.encoder import Encoder
from models.files import atomic_folder, remove_folder, remove_leftovers, write_text
from models.head import Head
from train.head import HeadTraining
from train.optimization import state_tensors
from train.randomness import random_state, set_random_state

_RNG, _DEVICE_RNG = "torch.rng", "cuda.rng"


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file."""


@dataclass
class Progress:
    """Where training stands: `step` steps are done; the next batch is number `batch` of `epoch`, both from 0.

    `batch` is the number of batches while the epoch's evaluation is due. `loss_sum` over `loss_steps` is not logged yet.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class State:
    """All that a checkpoint holds. `optimizers` are the encoder's, none if it is frozen."""

    encoder: Encoder
    training: HeadTraining
    optimizers: list[torch.optim.Optimizer]
    progress: Progress


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step, None when there is none. What a killed process left half-written is removed."""
    remove_leftovers(checkpoints)
    return next(reversed(checkpoints_in(checkpoints)), None)


def save(state: State, checkpoints: Path, keep: int) -> Path:
    """Writes the checkpoint of this step, unless it is there, and deletes all but the newest `keep`."""
    target = checkpoints / f"step-{state.progress.step:08d}"
    if not target.is_dir():
        with atomic_folder(target) as folder:
            state.encoder.save(folder / "encoder")
            save_head(state.training.head, folder / "head.safetensors")
            with saving():
                save_file(_tensors(state), folder / "trainer.safetensors")
            _write_progress(state.progress, folder)
    for old in checkpoints_in(checkpoints)[:-keep]:
        remove_folder(old)
    return target


def save_progress(progress: Progress, checkpoints: Path) -> None:
    """Replaces what the checkpoint of this step says of progress: its evaluation is done, its tensors are the same."""
    _write_progress(progress, checkpoints / f"step-{progress.step:08d}")


def load_model(checkpoint: Path) -> tuple[Encoder, Head, Progress]:
    """Encoder, head and progress of a checkpoint; EncoderError, HeadError or CheckpointError names a bad file."""
    path = checkpoint / "trainer.json"
    try:
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        for name, value in asdict(progress).items():
            if type(value) is not type(getattr(Progress, name)) or value < 0:
                raise ValueError(f"{name} is {value!r}")
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Encoder.load(checkpoint / "encoder"), load_head(checkpoint / "head.safetensors"), progress


def restore(state: State, checkpoint: Path) -> None:
    """Sets optimizers, their moments and torch's random state to those of the checkpoint; CheckpointError names a bad file.

    The checkpoint may come from another kind of device: then what only this one has, the state of its dropout, stays as it is.
    """
    path = checkpoint / "trainer.safetensors"
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise CheckpointError(f"{path}: {error}") from error
    device, device_state = state.encoder.device, stored.pop(_DEVICE_RNG, None)
    current = _tensors(state)
    current.pop(_DEVICE_RNG, None)
    if current.keys() != stored.keys() or any(current[name].shape != stored[name].shape for name in current):
        raise CheckpointError(f"{path}: does not fit the encoder and head beside it")
    for name, tensor in current.items():
        tensor.copy_(stored[name])
    torch.set_rng_state(stored[_RNG])
    if device.type == "cuda" and device_state is not None:
        set_random_state(device, device_state)


def _write_progress(progress: Progress, folder: Path) -> None:
    write_text(folder / "trainer.json", json.dumps(asdict(progress), indent=2) + "\n")


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {_RNG: torch.get_rng_state()} | state.training.tensors()
    if state.encoder.device.type == "cuda":
        tensors[_DEVICE_RNG] = random_state(state.encoder.device)
    memory = state_tensors(state.optimizers, state.encoder)
    return tensors | {f"encoder.{name}": tensor for name, tensor in memory.items()}
