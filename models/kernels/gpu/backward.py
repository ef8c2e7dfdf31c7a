"""Gradients for autograd in Triton: by the inputs and by the values, from the gradient of the scores [B, N, G].

Dimensions: B batch, D width, N groups, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.gpu.score import inputs_read


@triton.jit
def by_inputs(
    grad, values, indices, grad_xt, B, ldx, N,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, CONNECTIVITY: tl.constexpr,
):  # fmt: skip
    """Adds ∂/∂x to grad_xt fp32 [D, ldx]: a program takes GT labels, KB inputs and BM rows."""
    slices, parts = tl.cdiv(B, BM), tl.cdiv(K, KB)
    b = (tl.program_id(0) % slices) * BM + tl.arange(0, BM)
    k = (tl.program_id(0) // slices % parts) * KB + tl.arange(0, KB)
    tile = tl.program_id(0) // slices // parts
    n = (tile // (G // GT)).to(tl.int64)
    g = (tile % (G // GT)) * GT + tl.arange(0, GT)
    present = b < B
    rows = (b.to(tl.int64)[None, :] * N + n) * G + g[:, None]
    grad_z = tl.load(grad + rows, mask=present[None, :], other=0)
    at = k[:, None] * G + g[None, :]
    matrix = (k < K)[:, None] & (g < G)[None, :]
    w = tl.load(values + n * (K * G) + at, mask=matrix, other=0).to(grad_z.dtype)
    if CONNECTIVITY == "private":
        inputs = tl.load(indices + n * (K * G) + at, mask=matrix, other=0).to(tl.int32) * ldx
        addend = w.to(tl.float32)[:, :, None] * grad_z.to(tl.float32)[None, :, :]
        to = grad_xt + inputs[:, :, None] + b[None, None, :]
        tl.atomic_add(to, addend, mask=matrix[:, :, None] & present[None, None, :], sem="relaxed")
    else:
        if CONNECTIVITY == "shared":
            indices += n * K
        inputs = inputs_read(indices, k, k < K, CONNECTIVITY == "dense") * ldx
        addend = tl.dot(w, grad_z, input_precision="ieee")
        to = grad_xt + inputs[:, None] + b[None, :]
        tl.atomic_add(to, addend, mask=(k < K)[:, None] & present[None, :], sem="relaxed")


@triton.jit
def by_values(
    xt, grad, indices, out, B, ldx, N,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, CONNECTIVITY: tl.constexpr,
):  # fmt: skip
    """out [N, K, G]: a program takes GT labels and KB of their inputs, and walks the batch."""
    parts = tl.cdiv(K, KB)
    k = (tl.program_id(0) % parts) * KB + tl.arange(0, KB)
    tile = tl.program_id(0) // parts
    n = (tile // (G // GT)).to(tl.int64)
    g = (tile % (G // GT)) * GT + tl.arange(0, GT)
    at = k[:, None] * G + g[None, :]
    matrix = (k < K)[:, None] & (g < G)[None, :]
    if CONNECTIVITY == "private":
        inputs = tl.load(indices + n * (K * G) + at, mask=matrix, other=0).to(tl.int32) * ldx
    else:
        if CONNECTIVITY == "shared":
            indices += n * K
        inputs = inputs_read(indices, k, k < K, CONNECTIVITY == "dense") * ldx
    grad_w = tl.zeros([KB, GT], dtype=tl.float32)
    for start in range(0, B, BM):
        b = start + tl.arange(0, BM)
        rows = (b.to(tl.int64)[None, :] * N + n) * G + g[:, None]
        grad_z = tl.load(grad + rows, mask=(b < B)[None, :], other=0)
        if CONNECTIVITY == "private":
            x = tl.load(xt + inputs[:, :, None] + b[None, None, :]).to(tl.float32)
            grad_w += tl.sum(x * grad_z.to(tl.float32)[None, :, :], axis=2)
        else:
            x = tl.load(xt + inputs[:, None] + b[None, :])
            grad_w = tl.dot(x, tl.trans(grad_z), grad_w, input_precision="ieee")
    tl.store(out + n * (K * G) + at, grad_w.to(out.dtype.element_ty), mask=matrix)
