"""A whole training step on a GPU: an encoder of BERT-base's size with random weights, the head's fused step, AdamW.

It does what train.trainer does on a GPU, in torch alone, since it must run where only torch, Triton and numpy are installed.

Dimensions: B batch, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_problems import Problem, random_block, random_positives
from models.kernels import Optimizer, gpu, rounding_key
from models.kernels.gpu import DeviceMoments


@dataclass(frozen=True)
class EncoderShape:
    """BERT-base, unless told otherwise."""

    vocabulary: int = 30_522
    width: int = 768
    layers: int = 12
    heads: int = 12
    positions: int = 512


class Bert(nn.Module):
    """Token ids int64 [B, S] → the first token's embedding fp32 [B, D]; keeps only each layer's input for the backward pass."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(shape.width, shape.heads, 4 * shape.width, 0.1, "gelu", batch_first=True)
            for _ in range(shape.layers)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.norm(self.tokens(input_ids) + self.positions(places))
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden[:, 0].float()


class WholeStep:
    """Encoder in bf16 mixed precision with gradient checkpointing, head in bf16 with SGD. Call it for a step."""

    def __init__(self, problem: Problem, length: int, shape: EncoderShape, device: torch.device) -> None:
        self._device = device
        self._encoder = Bert(shape).to(device)
        self._optimizer = torch.optim.AdamW(self._encoder.parameters(), lr=1e-5, fused=True)
        self._block = random_block(problem, device)
        self._head_optimizer = Optimizer("sgd", lr=1e-3)
        self._moments = DeviceMoments.zeros(self._head_optimizer, self._block)
        self._positives = random_positives(problem, device)
        self._input_ids = torch.randint(shape.vocabulary, (problem.batch, length), device=device)
        self._steps = 0

    def __call__(self) -> None:
        self._steps += 1
        with torch.autocast(self._device.type, torch.bfloat16):
            embedding = self._encoder(self._input_ids)
        x = embedding.detach().to(torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        _, grad_x = gpu.train_step(
            x, self._positives, self._block, self._moments, loss="bce", optimizer=self._head_optimizer, step=self._steps,
            key=rounding_key(0, self._steps, 0),
        )  # fmt: skip
        embedding.backward(grad_x)
        nn.utils.clip_grad_norm_(self._encoder.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def parts_bytes(self) -> dict[str, int]:
        """What is held from step to step."""
        weights = sum(parameter.nbytes for parameter in self._encoder.parameters())
        buffers = (self._block.values, self._block.bias, self._block.label_ids, self._block.indices)
        return {
            "encoder_bytes": weights,
            "encoder_moment_bytes": 2 * weights,
            "head_bytes": sum(each.nbytes for each in buffers if each is not None),
        }
