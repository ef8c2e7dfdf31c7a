"""The best labels for embeddings on a GPU, all of them or within subsets.

Dimensions: B batch, D embedding width, L labels, k labels per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.head import Head
from models.kernels import Subset, gpu
from models.kernels.gpu import DeviceHead
from serve.gpu.lanes import Graphs

_RECORDED_K = 16  # labels that recorded searches find; for more, the kernels are launched one by one


class Search:
    """A head on `device`. For one thread, inside a lane."""

    def __init__(self, head: Head, device: torch.device) -> None:
        placed = self._head = DeviceHead.of(head, device)
        self._device = device
        # Not self._head: it would be kept by a cycle, and the device's memory with it, when the bundle is replaced.
        self._graphs = Graphs(lambda x: gpu.topk(x, placed, _RECORDED_K))
        self._sizes: list[int] = []  # of recorded batches, ascending

    def record(self, count: int) -> None:
        """Compiles all that a search for `count` rows may need, and makes it one launch. Call it with ascending counts."""
        x = torch.zeros(count, self._head.width, device=self._device)
        for k in (1, 2, _RECORDED_K):  # Triton compiles arguments of 1, and multiples of 16, apart
            gpu.topk(x, self._head, k)
        self._graphs.record(x)
        self._sizes.append(count)

    def __call__(self, x: Tensor, k: int, allowed: Sequence[Subset | None] | None) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, k] descending and labels int32 [B, k] of x fp32 [B, D], fewer if L is; gone with the next call.

        `allowed` is that of Engine.topk. Each subset is one search over all labels, in which those that are not allowed count
        as padding: exact, and as fast as the head is read.
        """
        if allowed is None:
            rows = self._padded(x)
            scores, labels = self._graphs.replay(rows) if k <= _RECORDED_K else gpu.topk(rows, self._head, k)
            return scores[: len(x), :k], labels[: len(x), :k]
        k = min(k, self._head.n_labels)
        scores = x.new_empty((len(x), k))
        labels = torch.empty((len(x), k), dtype=torch.int32, device=x.device)
        together: dict[int, list[int]] = {}  # the texts of a request share its subset
        for row, subset in enumerate(allowed):
            together.setdefault(id(subset), []).append(row)
        for group in together.values():
            subset, at = allowed[group[0]], torch.tensor(group, device=x.device)
            head = self._head if subset is None else self._within(subset)
            best = gpu.topk(self._padded(x[at]), head, k)
            scores[at], labels[at] = (part[: len(group)] for part in best)
        return scores, labels

    def _padded(self, x: Tensor) -> Tensor:
        """x with rows of zeros up to the next recorded size."""
        size = next((size for size in self._sizes if size >= len(x)), len(x))
        return torch.nn.functional.pad(x, (0, 0, 0, size - len(x)))

    def _within(self, subset: Subset) -> DeviceHead:
        blocks, first = [], 0
        for block in self._head.blocks:
            assert block.label_ids is not None
            ids = block.label_ids.flatten()
            start, stop = np.searchsorted(subset.places, [first, first + len(ids)])
            places = torch.from_numpy(subset.places[start:stop] - first).to(self._device)
            kept = ids.clone() if subset.excluded else torch.full_like(ids, -1)
            kept[places] = -1 if subset.excluded else ids[places]
            blocks.append(replace(block, label_ids=kept.view(block.label_ids.shape)))
            first += len(ids)
        return replace(self._head, blocks=tuple(blocks))
