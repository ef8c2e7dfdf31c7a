"""The auxiliary objective: a dense classifier over meta-classes beside the head, thrown away at export.

Early in training a sparse head sends little gradient back, so the encoder starts out blind; a dense layer over a few classes
does not have that fault. Its weight decays to zero, as it does harm when it is kept (Spartex, NeurIPS 2024, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from models.head import Block, Head
from models.kernels import Loss, Optimizer, Positives, rounding_key
from train import tree
from train.compute import Compute

_KEY = 1 << 32  # no block of a head has this number


class Auxiliary:
    """A meta-class is a run of groups of `head`: with similarity grouping, a node of the label tree.

    classes         the classifier as it begins, a head over the meta-classes
    block, moments  its block and the optimizer's moments, where `compute` has them
    """

    def __init__(self, compute: Compute, head: Head, classes: int, weight: float, until: int, seed: int) -> None:
        """About `classes` meta-classes; `weight` falls to zero at step `until` (counted from 0), as half a cosine."""
        self._class_of, count = meta_classes(head, classes)
        self._peak = weight
        self._until = until
        self._seed = seed
        rng = np.random.default_rng([seed, _KEY])
        names = np.arange(count, dtype=np.int32)
        block = Block.random(names, width=head.width, connectivity="dense", fan_in=head.width, rng=rng)
        self._compute = compute
        self.classes = Head(head.width, count, (block,))
        self._located = self.classes.slots()
        (self.block,) = compute.place(self.classes).blocks
        self.moments = compute.moments(Optimizer("adam"), self.block)

    def weight(self, step: int) -> float:
        """The weight of the objective in step `step`, from 0."""
        return self._peak * (1 + math.cos(math.pi * step / self._until)) / 2 if step < self._until else 0.0

    def step(self, x: Tensor, labels: Sequence[np.ndarray], step: int, lr: float, loss: Loss) -> tuple[Tensor, Tensor]:
        """Trains the classifier on x fp32 [B, D] with each row's labels: the weighted loss fp64 [] and its ∂/∂x fp32 [B, D]."""
        weight = self.weight(step)
        classes = [self._class_of[row] for row in labels]
        (positives,) = Positives.of_batch(classes, self._located, self.classes)
        total, grad_x = self._compute.step(
            x, positives, self.block, self.moments, loss=loss, optimizer=Optimizer("adam", lr=lr), step=step + 1,
            key=rounding_key(self._seed, step, _KEY),
        )  # fmt: skip
        return weight * total, weight * grad_x


def meta_classes(head: Head, classes: int) -> tuple[np.ndarray, int]:
    """The meta-class of each label, int32 [L], and how many there are: about `classes`, shared out by the blocks' groups."""
    class_of, count = np.empty(head.n_labels, dtype=np.int32), 0
    groups = sum(block.groups for block in head.blocks)
    for block in head.blocks:
        nodes = tree.level(block.groups, max(1, round(classes * block.groups / groups)))
        real = block.label_ids >= 0
        class_of[block.label_ids[real]] = count + np.broadcast_to(nodes[:, None], real.shape)[real]
        count += int(nodes[-1]) + 1
    return class_of, count
