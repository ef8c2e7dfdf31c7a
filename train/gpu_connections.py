"""The connections of a block on a GPU: what is to change is decided on the host, from strengths and gradients computed here.

Dimensions: B batch, R lists, n groups, D width, K fan-in, G group size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.kernels import Loss, Positives, gpu
from models.kernels.gpu import DeviceBlock, DeviceMoments
from train.connections import Batch, Lists, within


class DeviceLists(Lists):
    """Connections of the groups `part` of a block on a device, with its optimizer's moments."""

    def __init__(self, block: DeviceBlock, moments: DeviceMoments, part: slice) -> None:
        self._block, self._moments = block.part(part), moments.part(part)
        self._part = part
        assert self._block.indices is not None
        assert self._block.label_ids is not None
        super().__init__(self._block.indices.numpy(force=True), self._block.label_ids.numpy(force=True), block.width)

    def strength(self) -> np.ndarray:
        values = self._block.values.float().abs()  # [n, K, G]
        return self._rows(values.numpy(force=True)) if self._private else self._mean(values)

    def gradient(self, batch: Batch, positives: Positives) -> np.ndarray:
        block, x = self._block, batch.x
        z = gpu.scores(x, block)  # [B, n, G]
        target, weight = torch.zeros_like(z), torch.ones_like(z)
        here, slots = within(positives, self._part, block.group_size)
        at = self._there(positives.rows[here]), self._there(slots)
        target.flatten(1)[at] = 1 - batch.smoothing
        if positives.weights is not None:
            weight.flatten(1)[at] = self._there(positives.weights[here])
        grad = gradient_of_scores(z, target, batch.loss) * weight
        grad[:, self._there(~self._real)] = 0
        every = (x.t() @ grad.flatten(1)).abs().view(block.width, *z.shape[1:])  # [D, n, G]
        if self._private:
            return every.flatten(1).t().contiguous().numpy(force=True)
        return self._mean(every.transpose(0, 1))

    def _write(self, indices: np.ndarray, order: np.ndarray, new: np.ndarray, weights: np.ndarray | None) -> None:
        block = self._block
        assert block.indices is not None
        block.indices.copy_(self._there(indices))
        at, fresh = self._there(order).expand(block.values.shape), self._there(new)
        begin = torch.zeros_like(block.values) if weights is None else self._there(weights).to(block.values.dtype)
        block.values.copy_(torch.where(fresh, begin, block.values.gather(1, at)))
        for number, moment in enumerate(self._moments.values):
            kept = moment.gather(1, at).masked_fill_(fresh, 0)
            if number:
                kept = torch.where(fresh, kept.sum(dim=1, keepdim=True) / (~fresh).sum(dim=1, keepdim=True), kept)
            moment.copy_(kept)

    def _mean(self, numbers: Tensor) -> np.ndarray:
        """fp32 [n, …] from [n, …, G], over the labels of each group; padding does not count."""
        real = self._there(self._real.astype(np.float32))
        share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        return (numbers * share[:, None, :]).sum(dim=2).numpy(force=True)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._block.values.device)


def gradient_of_scores(z: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """∂loss/∂z; see models.kernels.reference.loss_and_gradient."""
    if loss == "bce":
        return z.sigmoid() - target
    return 2 * ((1 - target) * (1 + z).relu() - target * (1 - z).relu())
