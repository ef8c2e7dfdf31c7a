"""The training step in Triton: scores, loss, both gradients and the update of a tile of weights in one program.

Each weight is read from device memory once (and soon after again, from L2) and written once; scores and weight gradients stay
on the chip. Three kernels: `step` holds the derivatives of the whole batch and walks the inputs; `step_long`, for long batches,
holds the gradients of all K inputs' weights and walks the batch; `step_private` does so where each label has its own inputs.
∂loss/∂x is added up with atomics in `grad_xt` fp32 [D, ldx], so the order of that sum, and its last bits, are not fixed; the
weights repeat bit for bit.

Dimensions: B batch, D width, N groups, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.gpu.score import fetch, inputs_read, narrow_dot
from models.kernels.gpu.update import tile_loss, update_values, updated

_SAME_CODE = ["key_low", "key_high"]  # whatever number they are


@triton.jit(do_not_specialize=_SAME_CODE)
def step(
    xt, grad_xt, values, bias, label_ids, indices, value_moment1, value_moment2, bias_moment1, bias_moment2,
    firsts, slots, rows, weights, loss, B, ldx, scale, target, key_low, key_high, rates,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, DENSE: tl.constexpr,
    LOSS: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """Dense or shared, BM ≥ B. firsts [N + 1]: each group's first positive; `scale` is 1 / B."""
    n = (tl.program_id(0) // (G // GT)).to(tl.int64)
    g = (tl.program_id(0) % (G // GT)) * GT + tl.arange(0, GT)
    b = tl.arange(0, BM)
    group_bias = tl.load(bias + n * G + g)
    real = tl.load(label_ids + n * G + g) >= 0
    if not DENSE:
        indices += n * K
    z = tl.zeros([BM, GT], dtype=tl.float32)
    for start in range(0, K, KB):
        k = start + tl.arange(0, KB)
        mask = None if K % KB == 0 else k < K
        matrix = None if mask is None else mask[:, None]
        x = tl.load(xt + inputs_read(indices, k, mask, DENSE)[:, None] * ldx + b[None, :])
        w = fetch(values + n * (K * G) + k[:, None] * G + g[None, :], matrix).to(x.dtype)
        z = narrow_dot(tl.trans(x), w, z)
    z += group_bias[None, :]
    first, last = tl.load(firsts + n), tl.load(firsts + n + 1)
    part, grad = tile_loss(z, g[None, :], b[:, None], first, last, slots, rows, weights, n * G, target, LOSS)
    counted = real[None, :] & (b < B)[:, None]
    tl.atomic_add(loss, tl.sum(tl.where(counted, part, 0.0)).to(tl.float64), sem="relaxed")
    grad = tl.where(counted, grad, 0.0)
    grad_bias = tl.sum(grad, axis=0) * scale
    grad = grad.to(xt.dtype.element_ty)
    for start in range(0, K, KB):
        k = start + tl.arange(0, KB)
        mask = None if K % KB == 0 else k < K
        matrix = None if mask is None else mask[:, None]
        inputs = inputs_read(indices, k, mask, DENSE)[:, None] * ldx + b[None, :]
        at = k[:, None] * G + g[None, :]
        x = tl.load(xt + inputs)
        old = fetch(values + n * (K * G) + at, matrix)
        grad_x = tl.dot(old.to(x.dtype), tl.trans(grad), input_precision="ieee") * scale
        tl.atomic_add(
            grad_xt + inputs, grad_x, mask=(b < B)[None, :] if K % KB == 0 else matrix & (b < B)[None, :], sem="relaxed"
        )
        grad_w = tl.dot(x, grad, input_precision="ieee") * scale
        tl.debug_barrier()  # every thread has read the old numbers
        update_values(
            values, old, grad_w, value_moment1, value_moment2, n, at, matrix, key_low, key_high, rates, K, G, OPTIMIZER
        )
    new = updated(group_bias, grad_bias, bias_moment1, bias_moment2, n * G + g, None, rates, False, OPTIMIZER)
    tl.store(bias + n * G + g, new)


@triton.jit(do_not_specialize=_SAME_CODE)
def step_long(
    xt, grad_xt, values, bias, label_ids, indices, value_moment1, value_moment2, bias_moment1, bias_moment2,
    firsts, slots, rows, weights, loss, B, ldx, scale, target, key_low, key_high, rates,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, DENSE: tl.constexpr,
    LOSS: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """Dense or shared, KB ≥ K."""
    n = (tl.program_id(0) // (G // GT)).to(tl.int64)
    g = (tl.program_id(0) % (G // GT)) * GT + tl.arange(0, GT)
    k = tl.arange(0, KB)
    mask = None if K == KB else k < K
    matrix = None if mask is None else mask[:, None]
    at = k[:, None] * G + g[None, :]
    group_bias = tl.load(bias + n * G + g)
    real = tl.load(label_ids + n * G + g) >= 0
    first, last = tl.load(firsts + n), tl.load(firsts + n + 1)
    inputs = inputs_read(indices if DENSE else indices + n * K, k, mask, DENSE) * ldx
    w = fetch(values + n * (K * G) + at, matrix).to(xt.dtype.element_ty)
    grad_w = tl.zeros([KB, GT], dtype=tl.float32)
    grad_bias = tl.zeros([GT], dtype=tl.float32)
    total = tl.zeros([GT], dtype=tl.float32)
    for start in tl.range(0, B, BM):
        b = start + tl.arange(0, BM)
        present = (b < B)[:, None]
        x = tl.load((xt + start) + inputs[:, None] + tl.arange(0, BM)[None, :])
        z = tl.dot(tl.trans(x), w, input_precision="ieee") + group_bias[None, :]
        part, grad = tile_loss(z, g[None, :], b[:, None], first, last, slots, rows, weights, n * G, target, LOSS)
        counted = real[None, :] & present
        total += tl.sum(tl.where(counted, part, 0.0), axis=0)
        grad = tl.where(counted, grad, 0.0)
        grad_bias += tl.sum(grad, axis=0)
        grad = grad.to(x.dtype)
        grad_x = narrow_dot(w, tl.trans(grad), tl.zeros([KB, BM], dtype=tl.float32)) * scale
        to = (grad_xt + start) + inputs[:, None] + tl.arange(0, BM)[None, :]
        tl.atomic_add(to, grad_x, mask=tl.trans(present) if mask is None else tl.trans(present) & matrix, sem="relaxed")
        grad_w = narrow_dot(x, grad, grad_w)
    tl.debug_barrier()  # every thread has read the old numbers
    old = fetch(values + n * (K * G) + at, matrix)  # again, from L2: cheaper than registers
    update_values(
        values, old, grad_w * scale, value_moment1, value_moment2, n, at, matrix, key_low, key_high, rates, K, G, OPTIMIZER
    )
    new = updated(group_bias, grad_bias * scale, bias_moment1, bias_moment2, n * G + g, None, rates, False, OPTIMIZER)
    tl.store(bias + n * G + g, new)
    tl.atomic_add(loss, tl.sum(total, axis=0).to(tl.float64), sem="relaxed")


@triton.jit(do_not_specialize=_SAME_CODE)
def step_private(
    xt, grad_xt, values, bias, label_ids, indices, value_moment1, value_moment2, bias_moment1, bias_moment2,
    firsts, slots, rows, weights, loss, B, ldx, scale, target, key_low, key_high, rates,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr,
    LOSS: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """Private, KB ≥ K: what each label reads is a tile [KB, GT, BM]."""
    n = (tl.program_id(0) // (G // GT)).to(tl.int64)
    g = (tl.program_id(0) % (G // GT)) * GT + tl.arange(0, GT)
    k = tl.arange(0, KB)
    matrix = (k < K)[:, None] & (g < G)[None, :]
    at = k[:, None] * G + g[None, :]
    group_bias = tl.load(bias + n * G + g)
    real = tl.load(label_ids + n * G + g) >= 0
    first, last = tl.load(firsts + n), tl.load(firsts + n + 1)
    inputs = fetch(indices + n * (K * G) + at, matrix).to(tl.int32) * ldx
    old = fetch(values + n * (K * G) + at, matrix)
    w = old.to(tl.float32)
    grad_w = tl.zeros([KB, GT], dtype=tl.float32)
    grad_bias = tl.zeros([GT], dtype=tl.float32)
    total = tl.zeros([GT], dtype=tl.float32)
    for start in tl.range(0, B, BM, num_stages=1):
        b = start + tl.arange(0, BM)
        x = tl.load(xt + inputs[:, :, None] + b[None, None, :]).to(tl.float32)
        z = tl.sum(w[:, :, None] * x, axis=0) + group_bias[:, None]
        part, grad = tile_loss(z, g[:, None], b[None, :], first, last, slots, rows, weights, n * G, target, LOSS)
        counted = real[:, None] & (b < B)[None, :]
        total += tl.sum(tl.where(counted, part, 0.0), axis=1)
        grad = tl.where(counted, grad, 0.0)
        grad_bias += tl.sum(grad, axis=1)
        grad_w += tl.sum(x * grad[None, :, :], axis=2)
        to = grad_xt + inputs[:, :, None] + b[None, None, :]
        addend = w[:, :, None] * (grad * scale)[None, :, :]
        tl.atomic_add(to, addend, mask=matrix[:, :, None] & (b < B)[None, None, :], sem="relaxed")
    tl.debug_barrier()  # every thread has read the old numbers
    update_values(
        values, old, grad_w * scale, value_moment1, value_moment2, n, at, matrix, key_low, key_high, rates, K, G, OPTIMIZER
    )
    new = updated(group_bias, grad_bias * scale, bias_moment1, bias_moment2, n * G + g, None, rates, False, OPTIMIZER)
    tl.store(bias + n * G + g, new)
    tl.atomic_add(loss, tl.sum(total, axis=0).to(tl.float64), sem="relaxed")
