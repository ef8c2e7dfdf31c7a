"""What each operation means, in plain numpy, in any precision (fp64 is the truth of the tests).

Same signatures as models.kernels.cpu plus `precision`, the floating-point type of all arithmetic. It walks the groups in
chunks, so it needs no dense weights either, but it is slow: for tests, explanations and small heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from models.dtypes import decode, encode
from models.head import Block, Head
from models.kernels.step import Loss, Moments, Optimizer, Positives, group_keys, random_bits
from models.kernels.subset import Subset

Precision = type[np.floating]
_CHUNK = 1 << 20  # gathered inputs held at once


def scores(x: np.ndarray, block: Block, precision: Precision = np.float64) -> np.ndarray:
    """All scores of a block: x [B, D] → [B, N, G]; padding slots score −inf."""
    x = x.astype(precision)
    out = np.empty((len(x), block.groups, block.group_size), dtype=precision)
    for part in _chunks(block, len(x)):
        out[:, part] = _products(_inputs(x, block, part), _weights(block, part, precision))
        if block.scales is not None:
            out[:, part] *= block.scales[part]
        out[:, part] += block.bias[part]
    out[:, block.label_ids < 0] = -np.inf
    return out


def topk(
    x: np.ndarray,
    head: Head,
    k: int,
    precision: Precision = np.float64,
    *,
    allowed: Sequence[Subset | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best allowed labels of each row: scores [B, k] descending and label ids int32 [B, k].

    A row that may give fewer ends in score −inf and label −1.
    """
    every = np.full((len(x), head.n_labels), -np.inf, dtype=precision)
    for block in head.blocks:
        real = block.label_ids >= 0
        every[:, block.label_ids[real]] = scores(x, block, precision)[:, real]
    taken = np.zeros(every.shape, dtype=bool)
    at_place = np.concatenate([block.label_ids.reshape(-1) for block in head.blocks])
    for row, subset in enumerate(allowed or ()):
        if subset is not None:
            taken[row] = not subset.excluded
            taken[row, at_place[subset.places]] = subset.excluded
    every[taken] = -np.inf
    order = np.argsort(-every, axis=1, kind="stable")[:, :k]
    labels = np.where(np.take_along_axis(taken, order, axis=1), -1, order)
    return np.take_along_axis(every, order, axis=1), labels.astype(np.int32)


def train_step(
    x: np.ndarray,
    positives: Positives,
    block: Block,
    moments: Moments,
    *,
    loss: Loss,
    smoothing: float = 0.0,
    optimizer: Optimizer,
    step: int,
    key: int,
    precision: Precision = np.float64,
) -> tuple[float, np.ndarray]:
    """One step: returns the loss and ∂loss/∂x [B, D]; values, bias and moments of the block change in place.

    See models.kernels.train_step for the loss. `step` counts from 1 (Adam's bias correction);
    `key` seeds the stochastic rounding of bf16 values (Gupta et al. 2015).
    """
    x = x.astype(precision)
    target = np.zeros((len(x), block.groups, block.group_size), dtype=precision)
    target.reshape(len(x), block.bias.size)[positives.rows, positives.slots] = 1 - smoothing
    weight = np.ones(target.shape, dtype=precision)
    if positives.weights is not None:
        weight.reshape(len(x), block.bias.size)[positives.rows, positives.slots] = positives.weights
    z = scores(x, block, precision)
    total, grad_z = loss_and_gradient(z, target, loss)
    total *= weight
    grad_z *= weight / max(1, len(x))
    grad_z[:, block.label_ids < 0] = 0
    grad_x = grad_input(grad_z, block, precision)
    grad_w = grad_values(x, grad_z, block, precision)
    k0, k1 = group_keys(key, np.arange(block.groups))
    element = np.arange(block.fan_in * block.group_size).reshape(1, block.fan_in, block.group_size)
    bits = random_bits(k0[:, None, None], k1[:, None, None], element)
    weights = decode(block.values, block.dtype, precision)
    weights = _update(weights, grad_w, moments.values, optimizer, step, optimizer.weight_decay)
    block.values[...] = round_stochastically(weights, bits) if block.dtype == "bf16" else encode(weights, block.dtype)
    block.bias[...] = _update(block.bias.astype(precision), grad_z.sum(axis=0), moments.bias, optimizer, step, 0.0)
    return float(total[:, block.label_ids >= 0].sum() / max(1, len(x))), grad_x


def loss_and_gradient(z: np.ndarray, target: np.ndarray, loss: Loss) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each score and its derivative, target · l₊ + (1 − target) · l₋ for targets from 0 to 1.

    bce: l₊ = log(1 + e⁻ᶻ), l₋ = log(1 + eᶻ). squared_hinge: l₊ = max(0, 1 − z)², l₋ = max(0, 1 + z)².
    """
    z = np.where(np.isneginf(z), 0, z)  # padding; the caller drops it
    target = target.astype(z.dtype)
    if loss == "bce":
        small = np.exp(-np.abs(z))
        sigmoid = np.where(z >= 0, 1, small) / (1 + small)
        return np.maximum(z, 0) + np.log1p(small) - target * z, sigmoid - target
    towards, against = np.maximum(0, 1 - z), np.maximum(0, 1 + z)
    return target * towards**2 + (1 - target) * against**2, 2 * ((1 - target) * against - target * towards)


def grad_input(grad: np.ndarray, block: Block, precision: Precision = np.float64) -> np.ndarray:
    """∂/∂x [B, D] from the gradient of the scores [B, N, G]."""
    grad_x = np.zeros((len(grad), block.width), dtype=precision)
    for part in _chunks(block, len(grad)):
        g = grad[:, part].astype(precision)
        if block.scales is not None:
            g = g * block.scales[part]
        w = _weights(block, part, precision)
        if block.indices is None:
            grad_x += np.einsum("bng,nkg->bk", g, w)
            continue
        products = np.einsum("bng,nkg->bnk", g, w) if block.connectivity == "shared" else g[:, :, None, :] * w
        for row, addends in zip(grad_x, products, strict=True):
            np.add.at(row, block.indices[part], addends)
    return grad_x


def grad_values(x: np.ndarray, grad: np.ndarray, block: Block, precision: Precision = np.float64) -> np.ndarray:
    """∂/∂values [N, K, G] from inputs [B, D] and the gradient of the scores [B, N, G] (scales are constants)."""
    x = x.astype(precision)
    out = np.empty(block.values.shape, dtype=precision)
    for part in _chunks(block, len(x)):
        g = grad[:, part].astype(precision)
        if block.scales is not None:
            g = g * block.scales[part]
        inputs = _inputs(x, block, part)
        if block.connectivity == "dense":
            out[part] = np.einsum("bk,bng->nkg", inputs, g)
        elif block.connectivity == "shared":
            out[part] = np.einsum("bnk,bng->nkg", inputs, g)
        else:
            out[part] = np.einsum("bnkg,bng->nkg", inputs, g)
    return out


def round_stochastically(numbers: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns: each number goes to one of its two bf16 neighbours, the nearer one more often.

    `bits` are 16 random bits: added below the mantissa's last place, they carry with the probability of rounding up in
    magnitude. Numbers that are not finite stay as they are.
    """
    raw = numbers.astype(np.float32).view(np.uint32)
    return np.where((raw & 0x7F800000) == 0x7F800000, raw, raw + bits).__rshift__(16).astype(np.uint16)


def _update(
    w: np.ndarray, grad: np.ndarray, moments: tuple[np.ndarray, ...], optimizer: Optimizer, step: int, decay: float
) -> np.ndarray:
    lr = optimizer.lr
    w = w - lr * decay * w
    if optimizer.kind == "sgd":
        return w - lr * grad
    if optimizer.kind == "momentum":
        first = optimizer.beta1 * moments[0].astype(w.dtype) + grad
        moments[0][...] = first
        return w - lr * first
    first = optimizer.beta1 * moments[0].astype(w.dtype) + (1 - optimizer.beta1) * grad
    second = optimizer.beta2 * moments[1].astype(w.dtype) + (1 - optimizer.beta2) * grad**2
    moments[0][...], moments[1][...] = first, second
    first = first / (1 - optimizer.beta1**step)
    second = second / (1 - optimizer.beta2**step)
    return w - lr * first / (np.sqrt(second) + optimizer.eps)


def _chunks(block: Block, rows: int) -> Iterator[slice]:
    per_group = max(1, rows) * block.fan_in * (block.group_size if block.connectivity == "private" else 1)
    step = max(1, _CHUNK // per_group)
    for start in range(0, block.groups, step):
        yield slice(start, min(start + step, block.groups))


def _weights(block: Block, part: slice, precision: Precision) -> np.ndarray:
    return decode(block.values[part], block.dtype, precision)


def _inputs(x: np.ndarray, block: Block, part: slice) -> np.ndarray:
    """The inputs that groups `part` read: dense [B, K], shared [B, n, K], private [B, n, K, G]."""
    return x if block.indices is None else x[:, block.indices[part]]


def _products(inputs: np.ndarray, w: np.ndarray) -> np.ndarray:
    form = {2: "bk,nkg->bng", 3: "bnk,nkg->bng", 4: "bnkg,nkg->bng"}[inputs.ndim]
    return np.einsum(form, inputs, w)
