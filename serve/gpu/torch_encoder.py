"""The encoder in torch on a GPU, from the folder that `python -m export --torch-encoder` puts into a bundle.

Dimensions: B batch, S sequence length, D embedding width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from export.bundle import Bundle, BundleError
from models.encoder import Encoder, EncoderError
from serve.gpu.lanes import Graphs, Lane


class TorchEncoder:
    """Token ids → embeddings, in fp32 with products in TF32."""

    def __init__(self, bundle: Bundle, lane: Lane) -> None:
        """BundleError when the bundle has no encoder for torch, or not the head's."""
        folder = bundle.torch_encoder
        if folder is None:
            raise BundleError(
                f"{bundle.path}: has no encoder for torch; export it with --torch-encoder, or use --encoder-runtime onnx"
            )
        try:
            encoder = Encoder.load(folder)
        except EncoderError as error:
            raise BundleError(str(error)) from error
        if encoder.width != bundle.manifest.width:
            raise BundleError(f"{folder}: gives {encoder.width} values, the head reads {bundle.manifest.width}")
        torch.set_float32_matmul_precision("high")
        self._lane = lane
        self._graphs = Graphs(encoder.to(lane.device))

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Tensor:
        """Embeddings fp32 [B, D] from int64 [B, S], inside the lane; gone with the next call."""
        x: Tensor = self._graphs.replay(self._there(input_ids), self._there(attention_mask))
        return x

    def record(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> None:
        """From now on batches of this shape take one launch."""
        self._graphs.record(self._there(input_ids), self._there(attention_mask))

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._lane.device)
