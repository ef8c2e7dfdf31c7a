"""What benchmarks.gpu measures: random heads of any size made on the device, and the dense layer they are compared with.

Dimensions: B batch, D width, L labels, K fan-in, G group size, N groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.head import Connectivity
from models.kernels.gpu import DeviceBlock, DevicePositives

_ROWS = 1 << 16  # lists of inputs drawn together


@dataclass(frozen=True)
class Problem:
    """A block and a batch."""

    connectivity: Connectivity
    labels: int
    fan_in: int
    batch: int
    width: int = 768
    group_size: int = 64

    @property
    def facts(self) -> dict[str, object]:
        """The columns of a row that say what was measured."""
        return {
            "labels": self.labels, "width": self.width, "fan_in": self.fan_in, "group_size": self.group_size,
            "batch": self.batch,
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of the block, bf16: what a batch must read at least."""
        groups = -(-self.labels // self.group_size)
        indices = {"dense": 0, "shared": self.fan_in, "private": self.fan_in * self.group_size}[self.connectivity]
        return groups * (2 * self.fan_in * self.group_size + 2 * indices + 8 * self.group_size)


def random_block(problem: Problem, device: torch.device) -> DeviceBlock:
    """A bf16 block on the device with distinct random inputs; the last group is padded."""
    N, K, G = -(-problem.labels // problem.group_size), problem.fan_in, problem.group_size
    values = torch.randn((N, K, G), dtype=torch.bfloat16, device=device).mul_(K**-0.5)
    ids = torch.arange(N * G, dtype=torch.int32, device=device)
    ids[problem.labels :] = -1
    indices = None
    if problem.connectivity == "shared":
        indices = _random_inputs(N, K, problem.width, device)
    elif problem.connectivity == "private":
        indices = torch.empty((N, K, G), dtype=torch.uint16, device=device)
        step = max(1, _ROWS // G)
        for start in range(0, N, step):
            n = min(step, N - start)
            indices[start : start + n] = _random_inputs(n * G, K, problem.width, device).view(n, G, K).transpose(1, 2)
    bias = torch.zeros((N, G), device=device)
    return DeviceBlock(problem.connectivity, problem.width, "bf16", values, bias, ids.view(N, G), indices)


def random_input(problem: Problem, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[B, D]"""
    return torch.randn((problem.batch, problem.width), dtype=dtype, device=device)


def random_positives(problem: Problem, device: torch.device, per_row: int = 5) -> DevicePositives:
    """About `per_row` positives in each row."""
    slots = torch.randint(problem.labels, (problem.batch, per_row), device=device)
    pairs = torch.unique(slots * problem.batch + torch.arange(problem.batch, device=device)[:, None])  # sorted
    return DevicePositives(pairs // problem.batch, (pairs % problem.batch).to(torch.int32))


def as_dense(block: DeviceBlock) -> Tensor:
    """The block's values as a matrix fp32 [N · G, D]."""
    N, K, G = block.values.shape
    values = block.values.float().transpose(1, 2)  # [N, G, K]
    matrix = torch.zeros((N, G, block.width), device=values.device)
    if block.indices is None:
        matrix[...] = values
    else:
        indices = block.indices.to(torch.int64)
        indices = indices[:, None, :].expand(N, G, K) if indices.ndim == 2 else indices.transpose(1, 2)
        matrix.scatter_(2, indices, values)
    return matrix.view(N * G, block.width)


class DenseLayer:
    """torch's dense bf16 layer over the same number of labels."""

    def __init__(
        self, labels: int, width: int, device: torch.device, logit_bytes: int = 8 << 30, step_labels: int = 1 << 16
    ) -> None:
        """`topk` has at most `logit_bytes` of logits at once; `train_step` takes `step_labels`, whose logits stay in L2."""
        self._logit_bytes, self._step_labels = logit_bytes, step_labels
        self.weight = torch.randn((labels, width), dtype=torch.bfloat16, device=device).mul_(width**-0.5)

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Matrix product and torch.topk; in parts, merged, where the logits are too many."""
        step = max(k, self._logit_bytes // (2 * len(x)))
        parts = []
        for start in range(0, len(self.weight), step):
            part = self.weight[start : start + step]
            scores, labels = (x @ part.t()).topk(min(k, len(part)), dim=1)
            parts.append((scores, labels + start))
        if len(parts) == 1:
            return parts[0]
        scores, at = torch.cat([scores for scores, _ in parts], dim=1).topk(k, dim=1)
        return scores, torch.cat([labels for _, labels in parts], dim=1).gather(1, at)

    def places(self, positives: DevicePositives) -> list[Tensor]:
        """Of each part of the labels, where its positives are in its logits, flattened; the host's work, not a step's."""
        part = positives.slots // self._step_labels
        sizes = [len(each) for each in self.weight.split(self._step_labels)]
        at = positives.rows * torch.tensor(sizes, device=part.device)[part] + positives.slots % self._step_labels
        return [at[part == i] for i in range(len(sizes))]

    def train_step(self, x: Tensor, places: list[Tensor], lr: float) -> Tensor:
        """Binary cross-entropy by SGD, labels taken in parts; ∂loss/∂x fp32 [B, D].

        Neither all logits nor any gradient of the weights is in memory: the update is the second product's own accumulation
        (ELMO, ICML 2025, has this idea in kernels of its own). Weights are rounded to nearest, which costs less than
        stochastically. The loss itself is not computed.
        """
        grad_x = torch.zeros(x.shape, device=x.device)
        minus_one = x.new_full((), -1)
        for part, positive in zip(self.weight.split(self._step_labels), places, strict=True):
            grad = (x @ part.t()).sigmoid_()  # times B
            grad.view(-1).scatter_add_(0, positive, minus_one.expand(len(positive)))
            grad_x += grad @ part
            part.addmm_(grad.t(), x, alpha=-lr / len(x))
        return grad_x.div_(len(x))


def _random_inputs(rows: int, K: int, D: int, device: torch.device) -> Tensor:
    """uint16 [rows, K]: distinct, ascending."""
    out = torch.empty((rows, K), dtype=torch.uint16, device=device)
    for start in range(0, rows, _ROWS):
        part = out[start : start + _ROWS]
        part.copy_(torch.rand((len(part), D), device=device).topk(K, dim=1).indices.sort(dim=1).values)
    return out
