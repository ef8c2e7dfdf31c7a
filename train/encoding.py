"""The encoder's part of a training step: embeddings for the head, and the way back for the gradient that the head gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from train.batches import cut
from train.inputs import Inputs
from train.randomness import random_state, set_random_state


class Encoding:
    """Embeds batches of `inputs` for the head and leads the head's gradient back into the encoder.

    At most `micro_batch` texts (0: all) pass through the encoder with gradient at once. When there are more, all but the last
    micro-batch are embedded without gradient, and once more with it when the head's gradient is known, on the same random
    numbers, so that dropout repeats (gradient caching: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup", section 3). The head sees the whole batch.
    """

    def __init__(self, inputs: Inputs, micro_batch: int, device: torch.device) -> None:
        """`device` is the encoder's."""
        self._inputs = inputs
        self._device = device
        self._micro_batch = micro_batch
        self._again: list[tuple[np.ndarray, Tensor]] = []  # rows and the random state they were embedded with
        self._graph: Tensor | None = None  # embeddings of the last micro-batch, with gradient

    def embed(self, rows: np.ndarray) -> Tensor:
        """The head's inputs fp32 [B, D] of texts `rows`, without gradient."""
        *earlier, last = cut(rows, self._micro_batch or len(rows))
        self._again, parts = [], []
        with torch.no_grad():
            for part in earlier:
                self._again.append((part, random_state(self._device)))
                parts.append(self._inputs.embed(part))
        self._graph = self._inputs.embed(last)
        return torch.cat([*parts, self._graph.detach()])

    def backward(self, grad_x: Tensor) -> None:
        """Adds to the encoder's gradients what the loss's gradient [B, D] by the last `embed` makes of them. Once for each."""
        assert self._graph is not None
        again, graph, self._again, self._graph = self._again, self._graph, [], None
        *earlier, last = grad_x.split([*(len(rows) for rows, _ in again), len(graph)])
        graph.backward(last)
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            for (rows, state), grad in zip(again, earlier, strict=True):
                set_random_state(self._device, state)
                self._inputs.embed(rows).backward(grad)
