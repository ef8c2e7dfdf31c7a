"""Scores of tiles in Triton: maxima of all tiles, all scores, and the scores of chosen tiles.

A tile is GT labels of one group, GT a power of two that divides G, so that no slot of a tile is out of range. Inputs come
transposed, `xt` [D, ldx], with the batch padded to whole tiles of BM rows: then what a group gathers is contiguous.
Products are in x's type, in which the stored numbers are exact, and sums in fp32.

Dimensions: B batch, D width, N groups, K fan-in, G group size; KB inputs, BM rows and GT labels at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(pointers, mask):
    """What is stored there, 0 where the mask says so; the mask may be None."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@triton.jit
def narrow_dot(a, b, acc):
    """acc + a · b where b has few columns; exact products in fp32.

    For sm_100 Triton (3.7) makes tf32 of fp32 products with 64 rows or more, "ieee" or not; hence (bᵀ · aᵀ)ᵀ.
    """
    if a.dtype == tl.float32:
        acc += tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee"))
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def stored(values, at, mask, FP8: tl.constexpr):
    """The stored numbers at these positions; fp8 (e4m3), which sm_80 does not know, as exact fp16."""
    if FP8:
        bits = fetch(values + at, mask).to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        numbers = half * 256.0  # the exponents' biases differ by 8
    else:
        numbers = fetch(values + at, mask)
    return numbers


@triton.jit
def inputs_read(indices, k, mask, DENSE: tl.constexpr):
    """int32: which inputs the connections k of a dense or shared group read; the first where the mask says there is none."""
    if DENSE:  # noqa: SIM108  # the other branch has no indices to read
        inputs = k if mask is None else tl.where(mask, k, 0)
    else:
        inputs = fetch(indices + k, mask).to(tl.int32)
    return inputs


@triton.jit
def tile_products(
    xt, ldx, values, indices, n, g, b,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr,
    CONNECTIVITY: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Σ_k values · x of labels g of group n (int64), fp32 [GT, BM], for rows b of the batch."""
    values += n * (K * G)
    z = tl.zeros([GT, BM], dtype=tl.float32)
    if CONNECTIVITY == "private":
        indices += n * (K * G)
        for k in tl.range(0, K, loop_unroll_factor=4):
            w = stored(values, k * G + g, None, FP8).to(tl.float32)
            inputs = tl.load(indices + k * G + g).to(tl.int32)
            z += w[:, None] * tl.load(xt + inputs[:, None] * ldx + b[None, :]).to(tl.float32)
    else:
        if CONNECTIVITY == "shared":
            indices += n * K
        for start in range(0, K, KB):
            k = start + tl.arange(0, KB)
            mask = None if K % KB == 0 else k < K
            inputs = inputs_read(indices, k, mask, CONNECTIVITY == "dense")
            rows = None if mask is None else mask[:, None]
            x = tl.load(xt + inputs[:, None] * ldx + b[None, :])  # connections beyond K have weight 0
            w = stored(values, k[:, None] * G + g[None, :], rows, FP8).to(x.dtype)
            z = tl.dot(tl.trans(w), x, z, input_precision="ieee")
    return z


@triton.jit
def finished(z, n, g, scales, bias, label_ids, G: tl.constexpr):
    """Products [GT, …] as scores: scaled, with bias, −∞ in padding."""
    at = n * G + g
    if scales is not None:
        z *= tl.load(scales + at)[:, None]
    z += tl.load(bias + at)[:, None]
    if label_ids is not None:
        z = tl.where(tl.load(label_ids + at)[:, None] >= 0, z, float("-inf"))
    return z


@triton.jit
def if_allowed(z, place, row, allowed, words, mask):
    """z, or −∞ where the bit of a label's place is not set in its row of `allowed` [B, words]; None allows every label."""
    if allowed is not None:
        bits = fetch(allowed + row.to(tl.int64) * words + (place >> 5), mask)
        z = tl.where((bits >> (place & 31).to(tl.int32)) & 1 != 0, z, float("-inf"))
    return z


@triton.jit
def tile_maxima(
    xt, values, scales, bias, label_ids, indices, allowed, maxima, B, ldx, columns, tiles, words, place,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, SPAN: tl.constexpr,
    CONNECTIVITY: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """maxima[b, tile], a row being `columns` long: the best allowed score of each tile. A program takes SPAN tiles of BM rows.

    The block's slots are the places from `place` on.
    """
    # Programs of the same tiles follow each other, so that weights come from L2 for all but the first.
    slices = tl.cdiv(B, BM)
    b = (tl.program_id(0) % slices) * BM + tl.arange(0, BM)
    first = (tl.program_id(0) // slices) * SPAN
    for tile in range(first, min(first + SPAN, tiles)):
        n = tl.cast(tile // (G // GT), tl.int64)
        g = (tile % (G // GT)) * GT + tl.arange(0, GT)
        z = tile_products(xt, ldx, values, indices, n, g, b, K, G, GT, KB, BM, CONNECTIVITY, FP8)
        z = finished(z, n, g, scales, bias, label_ids, G)
        z = if_allowed(z, (place + n * G + g)[:, None], b[None, :], allowed, words, (b < B)[None, :])
        tl.store(maxima + b.to(tl.int64) * columns + tile, tl.max(z, axis=0), mask=b < B)


@triton.jit
def tile_scores(
    xt, values, scales, bias, label_ids, indices, out, B, ldx, N,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr,
    CONNECTIVITY: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """out [B, N, G]: every score."""
    slices = tl.cdiv(B, BM)
    b = (tl.program_id(0) % slices) * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // slices
    n = (tile // (G // GT)).to(tl.int64)
    g = (tile % (G // GT)) * GT + tl.arange(0, GT)
    z = tile_products(xt, ldx, values, indices, n, g, b, K, G, GT, KB, BM, CONNECTIVITY, FP8)
    z = finished(z, n, g, scales, bias, label_ids, G)
    at = (b.to(tl.int64)[None, :] * N + n) * G + g[:, None]
    tl.store(out + at, z.to(out.dtype.element_ty), mask=(b < B)[None, :])


@triton.jit
def chosen_scores(
    x, chosen, values, scales, bias, label_ids, indices, allowed, out, labels, first, tiles, width, per_row, words, place,
    K: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, KB: tl.constexpr, SLOTS: tl.constexpr,
    CONNECTIVITY: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Scores and label ids of chosen tiles: chosen int64 [B, per_row] → out and labels [B, per_row, SLOTS], GT of them.

    Tiles are counted over all blocks; those of this block are `tiles` from `first` on, and others are left alone. x [B, width].
    """
    at = tl.program_id(0).to(tl.int64)
    tile = tl.load(chosen + at) - first
    if (tile >= 0) & (tile < tiles):
        n = tile // (G // GT)
        g = ((tile % (G // GT)) * GT + tl.arange(0, GT)).to(tl.int32)
        x += at // per_row * width
        values += n * (K * G)
        if CONNECTIVITY != "dense":
            indices += n * (K * G if CONNECTIVITY == "private" else K)
        z = tl.zeros([GT], dtype=tl.float32)
        for start in range(0, K, KB):
            k = start + tl.arange(0, KB)
            mask = k < K
            elements = k[:, None] * G + g[None, :]
            if CONNECTIVITY == "private":
                inputs = fetch(indices + elements, mask[:, None]).to(tl.int32)
            else:
                inputs = inputs_read(indices, k, mask, CONNECTIVITY == "dense")[:, None]
            read = fetch(x + inputs, mask[:, None])
            w = stored(values, elements, mask[:, None], FP8).to(x.dtype.element_ty)
            z += tl.sum(w.to(tl.float32) * read.to(tl.float32), axis=0)
        z = tl.reshape(finished(z[:, None], n, g, scales, bias, label_ids, G), [GT])
        z = if_allowed(z, place + n * G + g, at // per_row, allowed, words, None)
        to = at * SLOTS + tl.arange(0, GT)
        tl.store(out + to, z)
        tl.store(labels + to, tl.load(label_ids + n * G + g))
