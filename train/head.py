"""The head's part of a training step: the fused step of every block, the auxiliary objective, rewiring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import kernels
from models.head import Head
from models.kernels import Optimizer, Positives, rounding_key
from train.auxiliary import Auxiliary
from train.rewiring import Batch, Rewiring, Schedule
from train.settings import Settings


class HeadTraining:
    """Trains `head` in place over `steps` steps. `moments` are the optimizer's, for each block."""

    def __init__(self, head: Head, settings: Settings, steps: int, positive_weights: np.ndarray | None) -> None:
        """`positive_weights` fp32 [L] weigh each label's positives, None: all 1."""
        self.head = head
        self._settings = settings
        self._positive_weights = positive_weights
        self._located = head.slots()
        self._optimizer = Optimizer(settings.head_optimizer, weight_decay=settings.head_weight_decay)
        self.moments = [self._optimizer.moments(block) for block in head.blocks]
        self._auxiliary = self._new_auxiliary(steps)
        self._rewiring = self._new_rewiring(steps)

    def step(self, x: np.ndarray, labels: Sequence[np.ndarray], step: int, scale: float) -> tuple[float, np.ndarray]:
        """Step `step` (from 0) on x fp32 [B, D], each row's labels, at `scale` times the learning rate.

        Returns the loss, summed over labels and averaged over rows, and ∂loss/∂x fp32 [B, D].
        """
        settings, head = self._settings, self.head
        positives = Positives.of_batch(labels, self._located, head, self._positive_weights)
        lr = scale * settings.head_lr
        loss, grad_x = 0.0, np.zeros_like(x)
        for i, block in enumerate(head.blocks):
            block_loss, block_grad = kernels.train_step(
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

    def rewire(self, x: np.ndarray, labels: Sequence[np.ndarray], step: int) -> list[dict[str, Any]]:
        """Rewires if step `step` (from 0) is due, before it is taken; returns what happened, a dict per block."""
        if self._rewiring is None or not self._rewiring.due(step):
            return []
        positives = Positives.of_batch(labels, self._located, self.head, self._positive_weights)
        batch = Batch(x, positives, self._settings.loss, self._settings.label_smoothing)
        return self._rewiring.rewire(step, batch)

    def tensors(self) -> dict[str, Tensor]:
        """All memory beside the head's own that training goes on from, by name. It is this object's, not a copy."""
        arrays: dict[str, np.ndarray] = {}
        moments = {str(i): each for i, each in enumerate(self.moments)}
        if self._auxiliary:
            moments["auxiliary"] = self._auxiliary.moments
            arrays |= {f"auxiliary.{name}": getattr(self._auxiliary.block, name) for name in ("values", "bias")}
        if self._rewiring:
            arrays |= {f"rewiring.{i}": first for i, first in self._rewiring.first.items()}
        for name, block in moments.items():
            for kind in ("values", "bias"):
                arrays |= {f"head.{name}.{kind}.{n}": array for n, array in enumerate(getattr(block, kind))}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _new_auxiliary(self, steps: int) -> Auxiliary | None:
        settings = self._settings
        until = round(settings.auxiliary_until * steps)
        if not (settings.auxiliary and until):
            return None
        return Auxiliary(self.head, settings.meta_classes, settings.auxiliary, until, settings.seed)

    def _new_rewiring(self, steps: int) -> Rewiring | None:
        settings = self._settings
        if settings.rewire == "off":
            return None
        until = round(settings.rewire_until * steps)
        schedule = Schedule(settings.rewire_every, until, settings.rewire_share, settings.rewire_below)
        return Rewiring(self.head, self.moments, schedule, settings.rewire, settings.new_weights == "random", settings.seed)
