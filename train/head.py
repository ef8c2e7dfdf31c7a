"""The head's part of a training step: the fused step of every block, the auxiliary objective, rewiring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.head import Head, HeadError
from models.kernels import Optimizer, Positives, rounding_key
from train.auxiliary import Auxiliary
from train.compute import Compute
from train.connections import Batch
from train.rewiring import Rewiring, Schedule
from train.settings import Settings


class HeadTraining:
    """Trains a head over `steps` steps where `compute` puts it. `moments` are the optimizer's, for each block."""

    def __init__(
        self, head: Head, settings: Settings, steps: int, positive_weights: np.ndarray | None, compute: Compute
    ) -> None:
        """`positive_weights` fp32 [L] weigh each label's positives, None: all 1. HeadError when a batch does not fit."""
        self._head = head
        self._settings = settings
        self._positive_weights = positive_weights
        self._compute = compute
        self._located = head.slots()
        self._optimizer = Optimizer(settings.head_optimizer, weight_decay=settings.head_weight_decay)
        self._placed = compute.place(head)
        self.moments = [compute.moments(self._optimizer, block) for block in self._placed.blocks]
        self._auxiliary = self._new_auxiliary(steps)
        self._rewiring = self._new_rewiring(steps)
        self._check_sizes()

    @property
    def head(self) -> Head:
        """The head as it is now, in host memory."""
        self._compute.store(self._placed, self._head)
        return self._head

    def step(self, x: Tensor, labels: Sequence[np.ndarray], step: int, scale: float) -> tuple[Tensor, Tensor]:
        """Step `step` (from 0) on x fp32 [B, D], each row's labels, at `scale` times the learning rate.

        Returns the loss fp64 [], summed over labels and averaged over rows, and ∂loss/∂x fp32 [B, D], where x is.
        """
        settings = self._settings
        positives = Positives.of_batch(labels, self._located, self._head, self._positive_weights)
        lr = scale * settings.head_lr
        loss, grad_x = torch.zeros((), dtype=torch.float64, device=x.device), torch.zeros_like(x)
        for i, block in enumerate(self._placed.blocks):
            block_loss, block_grad = self._compute.step(
                x, positives[i], block, self.moments[i], loss=settings.loss, smoothing=settings.label_smoothing,
                optimizer=replace(self._optimizer, lr=lr), step=step + 1, key=rounding_key(settings.seed, step, i),
            )  # fmt: skip
            loss += block_loss
            grad_x += block_grad
        if self._auxiliary and self._auxiliary.weight(step):
            more_loss, more_grad = self._auxiliary.step(x, labels, step, lr, settings.loss)
            loss += more_loss
            grad_x += more_grad
        return loss, grad_x

    def topk(self, x: Tensor, k: int) -> np.ndarray:
        """The k best labels int32 [B, k] of x fp32 [B, D]; ValueError or OverflowError when numbers are not finite."""
        return self._compute.topk(x, self._placed, k)

    def rewire(self, x: Tensor, labels: Sequence[np.ndarray], step: int) -> list[dict[str, Any]]:
        """Rewires if step `step` (from 0) is due, before it is taken; returns what happened, a dict per block."""
        if self._rewiring is None or not self._rewiring.due(step):
            return []
        positives = Positives.of_batch(labels, self._located, self._head, self._positive_weights)
        batch = Batch(x, positives, self._settings.loss, self._settings.label_smoothing)
        return self._rewiring.rewire(step, batch)

    def tensors(self) -> dict[str, Tensor]:
        """All memory beside the head's own that training goes on from, by name. It is this object's, not a copy."""
        arrays: dict[str, np.ndarray | Tensor] = {}
        moments = {str(i): each for i, each in enumerate(self.moments)}
        if self._auxiliary:
            moments["auxiliary"] = self._auxiliary.moments
            arrays |= {f"auxiliary.{name}": getattr(self._auxiliary.block, name) for name in ("values", "bias")}
        if self._rewiring:
            arrays |= {f"rewiring.{i}": first for i, first in self._rewiring.first.items()}
        for name, block in moments.items():
            for kind in ("values", "bias"):
                arrays |= {f"head.{name}.{kind}.{n}": array for n, array in enumerate(getattr(block, kind))}
        return {name: torch.from_numpy(each) if isinstance(each, np.ndarray) else each for name, each in arrays.items()}

    def _check_sizes(self) -> None:
        blocks = {f"block {i}": block for i, block in enumerate(self._head.blocks)}
        if self._auxiliary:
            blocks["the auxiliary objective"] = self._auxiliary.classes.blocks[0]
        for name, block in blocks.items():
            try:
                self._compute.check(block, self._settings.batch_size)
            except ValueError as error:
                raise HeadError(f"{name}: {error}; see --batch-size and --fan-in") from None

    def _new_auxiliary(self, steps: int) -> Auxiliary | None:
        settings = self._settings
        until = round(settings.auxiliary_until * steps)
        if not (settings.auxiliary and until):
            return None
        return Auxiliary(self._compute, self._head, settings.meta_classes, settings.auxiliary, until, settings.seed)

    def _new_rewiring(self, steps: int) -> Rewiring | None:
        settings = self._settings
        if settings.rewire == "off":
            return None
        schedule = Schedule(settings.rewire_every, settings.rewired_before(steps), settings.rewire_share, settings.rewire_below)
        at_random = settings.new_weights == "random"
        return Rewiring(self._compute, self._placed.blocks, self.moments, schedule, settings.rewire, at_random, settings.seed)
