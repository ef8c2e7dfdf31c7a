"""Checkpoint folders, and the file of a trained head: safetensors whose buffers lie exactly as in memory. No pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.head import Block, Head, HeadError

_LAYOUT = "fanin-head"
# The file says bf16 where numpy can only say uint16, so other readers of safetensors see true numbers.
_AS_TORCH = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, by step, and not what somebody put beside them, such as a copy under another name."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def saving() -> Iterator[None]:
    """Where safetensors writes a file: what the disk refuses is an OSError, where it would raise a type of its own."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"(?:os error |code: )(\d+)", str(error))  # up to safetensors 0.5 it was the latter
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def save_head(head: Head, path: Path) -> None:
    """Writes the head's buffers as "<block>.<buffer>"; the layout stands in the file's metadata."""
    tensors = {}
    for i, block in enumerate(head.blocks):
        for name, array in block.buffers.items():
            tensor = torch.from_numpy(array)
            if name == "values" and block.dtype in _AS_TORCH:
                tensor = tensor.view(_AS_TORCH[block.dtype])
            tensors[f"{i}.{name}"] = tensor
    blocks = [{"connectivity": block.connectivity, "dtype": block.dtype} for block in head.blocks]
    layout = {"width": head.width, "labels": head.n_labels, "blocks": blocks}
    with saving():
        save_file(tensors, path, metadata={_LAYOUT: json.dumps(layout)})


def load_head(path: Path) -> Head:
    """The head in `path`, its buffers writable and validated; HeadError names the file and the fault."""
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads(file.metadata()[_LAYOUT])
            blocks = []
            for i, facts in enumerate(layout["blocks"]):
                names = [key.split(".", 1)[1] for key in file.keys() if key.startswith(f"{i}.")]  # noqa: SIM118
                arrays = {name: file.get_tensor(f"{i}.{name}") for name in names}
                if facts["dtype"] in _AS_TORCH:
                    arrays["values"] = arrays["values"].view({2: torch.uint16, 1: torch.uint8}[arrays["values"].element_size()])
                buffers = {name: tensor.numpy() for name, tensor in arrays.items()}
                blocks.append(Block(facts["connectivity"], layout["width"], facts["dtype"], **buffers))
            head = Head(layout["width"], layout["labels"], tuple(blocks))
        head.validate()
    except (HeadError, KeyError, TypeError, ValueError) as error:
        raise HeadError(f"{path}: {error}") from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise HeadError(f"{path}: not a readable checkpoint ({error})") from error
    return head
