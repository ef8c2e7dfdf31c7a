"""A label similarity tree: balanced 2-means from all labels down to groups of G.

Labels whose vectors point the same way come to lie beside each other, so that a group that shares its inputs is about one
thing, and a run of groups is a meta-class. As in Parabel (Prabhu et al. 2018, section 4.1), but split by the median along the
line between the two means, which balances exactly and takes one product per label and level: O(L · d · log(L/G)).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_FIT = 32_768  # vectors that decide a split; the others follow
_ROUNDS = 8


def similarity_order(vectors: np.ndarray, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `vectors` fp32 [L, d] in slot order, int64 [L]: each run of `group_size` is a leaf, the last may be short.

    `vectors` are permuted in place into that order. Beside them the call needs as much memory again.
    """
    order = np.arange(len(vectors))
    stack = [(0, -(-len(vectors) // group_size))]
    while stack:
        first, last = stack.pop()
        if last - first < 2:
            continue
        middle = (first + last) // 2
        node = slice(first * group_size, last * group_size)
        sides = _split(vectors[node], (middle - first) * group_size, rng)
        vectors[node] = vectors[node][sides]
        order[node] = order[node][sides]
        stack += [(first, middle), (middle, last)]
    return order


def level(groups: int, nodes: int) -> np.ndarray:
    """The node of each group, int64 [groups], on the first level of the tree that has at least `nodes` or a node per group."""
    bounds = [0, groups]
    while len(bounds) - 1 < min(nodes, groups):
        middles = [(first + last) // 2 for first, last in pairwise(bounds)]
        bounds = sorted(set(bounds + middles))
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def _split(vectors: np.ndarray, left: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of `vectors` [n, d] that puts the `left` of one cluster first and those of the other after them."""
    n = len(vectors)
    fit = vectors if n <= _FIT else vectors[np.sort(rng.choice(n, _FIT, replace=False))]
    cut, total = round(len(fit) * left / n), fit.sum(axis=0)
    start = fit[rng.integers(len(fit))]
    direction = fit[np.argmin(fit @ start)] - start  # from a random vector to the one least like it
    before = np.empty(0, dtype=np.float32)
    for _ in range(_ROUNDS):
        right = np.zeros(len(fit), dtype=np.float32)
        right[np.argpartition(fit @ direction, cut)[cut:]] = 1
        if np.array_equal(right, before):
            break
        ours = right @ fit
        direction = ours / (len(fit) - cut) - (total - ours) / max(1, cut)
        before = right
    return np.argpartition(vectors @ direction, left)
