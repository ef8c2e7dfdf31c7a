"""What a training step does with a tile of scores and a tile of weights: losses, optimizers, stochastic rounding.

`models.kernels.reference` says what each means and `models.kernels.step` defines the random numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.gpu.score import fetch
from models.kernels.step import Optimizer


def rates_of(optimizer: Optimizer, step: int) -> tuple[float, ...]:
    """The numbers of an optimizer's step (from 1) for `updated`."""
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    adam = optimizer.kind == "adam"
    correction1, correction2 = (1 / (1 - beta1**step), 1 / (1 - beta2**step)) if adam else (1.0, 1.0)
    return (
        optimizer.lr, optimizer.lr * optimizer.weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, correction1, correction2,
        optimizer.eps,
    )  # fmt: skip


@triton.jit
def log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1, to fp32's precision, small x included: 2 artanh(r), r = x / (2 + x), by its series."""
    r = x / (2.0 + x)
    t = r * r  # at most 1/9, so that the first term left out is below 2⁻²⁹
    series = ((((((t * (1 / 15) + 1 / 13) * t + 1 / 11) * t + 1 / 9) * t + 1 / 7) * t + 1 / 5) * t + 1 / 3) * t
    return 2.0 * r + 2.0 * r * series


@triton.jit
def tile_loss(z, g, b, first, last, slots, rows, weights, start, target, LOSS: tl.constexpr):
    """Loss and its derivative for each score of a tile of labels g of a group and rows b, one along each side.

    Positives first … last − 1 are the group's, whose slots begin at `start`.
    """
    weight = tl.zeros_like(z) - 1.0  # of positives; negatives keep −1
    for p in tl.range(first, last, num_stages=1):
        hit = (g == (tl.load(slots + p) - start).to(tl.int32)) & (b == tl.load(rows + p))
        weight = tl.where(hit, 1.0 if weights is None else tl.load(weights + p), weight)
    wanted = tl.where(weight >= 0, target, 0.0)
    weight = tl.where(weight >= 0, weight, 1.0)
    if LOSS == "bce":
        small = tl.exp(-tl.abs(z))
        loss = tl.maximum(z, 0.0) + log1p(small) - wanted * z
        grad = tl.where(z >= 0, 1.0, small) / (1.0 + small) - wanted
    else:
        towards, against = tl.maximum(1.0 - z, 0.0), tl.maximum(1.0 + z, 0.0)
        loss = wanted * towards * towards + (1.0 - wanted) * against * against
        grad = 2.0 * ((1.0 - wanted) * against - wanted * towards)
    return weight * loss, weight * grad


@triton.jit
def splitmix(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_bits(key_low, key_high, n, element):
    """16 random bits, uint32, of elements of group n, from a key in two halves."""
    key = (key_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    mixed = splitmix(key + n.to(tl.uint64))
    x = (element.to(tl.uint32) + mixed.to(tl.uint32)) ^ (mixed >> 32).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x >> 16


@triton.jit
def rounded(numbers, bits):
    """fp32 → bf16, stochastically; what is not finite stays."""
    raw = numbers.to(tl.uint32, bitcast=True)
    raw = tl.where((raw & 0x7F800000) == 0x7F800000, raw, raw + bits)
    return (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def updated(
    value, grad, first_moment, second_moment, at, mask, rates, DECAYED: tl.constexpr, OPTIMIZER: tl.constexpr
):  # fmt: skip
    """fp32 weights after the optimizer; moments (at `at`) change in place. `rates` is what rates_of() gives."""
    lr, decay, beta1, beta2, rest1, rest2, correction1, correction2, eps = rates
    if DECAYED:
        value -= decay * value
    if OPTIMIZER == "sgd":
        value -= lr * grad
    elif OPTIMIZER == "momentum":
        m = beta1 * fetch(first_moment + at, mask) + grad
        tl.debug_barrier()  # threads may hold the same numbers: all have read the old ones
        tl.store(first_moment + at, m, mask=mask)
        value -= lr * m
    else:
        m = beta1 * fetch(first_moment + at, mask) + rest1 * grad
        v = beta2 * fetch(second_moment + at, mask) + rest2 * (grad * grad)
        tl.debug_barrier()
        tl.store(first_moment + at, m, mask=mask)
        tl.store(second_moment + at, v, mask=mask)
        value -= tl.div_rn(lr * (m * correction1), tl.sqrt_rn(v * correction2) + eps)
    return value


@triton.jit
def update_values(
    values, old, grad, first_moment, second_moment, n, at, mask, key_low, key_high, rates,
    K: tl.constexpr, G: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """Writes the new values of group n at elements `at` (k · G + g), from the old ones and their gradient."""
    start = n * (K * G)  # moves the pointers, so that the elements' own offsets are of 32 bits
    values += start
    if OPTIMIZER != "sgd":
        first_moment += start
    if OPTIMIZER == "adam":
        second_moment += start
    new = updated(old.to(tl.float32), grad, first_moment, second_moment, at, mask, rates, True, OPTIMIZER)
    if values.dtype.element_ty == tl.bfloat16:
        tl.store(values + at, rounded(new, random_bits(key_low, key_high, n, at)), mask=mask)
    else:
        tl.store(values + at, new.to(values.dtype.element_ty), mask=mask)
