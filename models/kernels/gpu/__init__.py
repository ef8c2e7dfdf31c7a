"""The head's operations on a GPU, in Triton, for tensors: see models.kernels for what each means.

x may be fp32, bf16 or fp16. With fp32, products are in fp32 as on the CPU. With the type of the block's values (bf16 or fp16
for int8 and fp8) they run on tensor cores: stored numbers are exact, sums are fp32, and gradients of scores are rounded to x's
type before they are multiplied. Kernels run on torch's current stream and never make the host wait. Contents are not checked,
since that would: x must be finite, and a row whose scores overflow may get label −1.

The first call for each kind of problem compiles its kernels and tries a few tile sizes; `tuning_seconds` says what that took.
Make it before capturing a CUDA graph.
"""

from models.kernels.gpu.head import DeviceBlock, DeviceHead, DeviceMoments, DevicePositives
from models.kernels.gpu.launch import tuning_seconds
from models.kernels.gpu.ops import grad_input, grad_values, scores, topk
from models.kernels.gpu.train import check_sizes, train_step

__all__ = [
    "DeviceBlock", "DeviceHead", "DeviceMoments", "DevicePositives", "check_sizes", "grad_input", "grad_values", "scores",
    "topk", "train_step", "tuning_seconds",
]  # fmt: skip
