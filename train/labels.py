"""Label vectors: what the training texts of a label are about. Similar labels have similar vectors.

Dimensions: n texts, L labels, d width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from train.tokens import Split

_TEXTS_AT_ONCE = 65_536
_SVD_TEXTS = 500_000  # more hardly change the directions
_SVD_WIDTH = 128


def label_vectors(
    split: Split,
    embed: Callable[[slice], np.ndarray],
    n_labels: int,
    embed_names: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Unit vectors of the labels, fp32 [L, d]: the mean direction of their texts, which `embed` gives as fp32 [·, d].

    For labels without a text `embed_names(positions)` gives fp32 [·, d] from their names. Where that is zero too, so is
    the vector.
    """
    vectors = np.zeros((n_labels, embed(slice(0, 1)).shape[1]), dtype=np.float32)
    for start in range(0, len(split), _TEXTS_AT_ONCE):
        stop = min(start + _TEXTS_AT_ONCE, len(split))
        bounds = split.label_starts[start : stop + 1]
        labels = np.array(split.labels[bounds[0] : bounds[-1]])
        shape = (stop - start, n_labels)
        positives = csr_array((np.ones(len(labels), np.float32), labels, bounds - bounds[0]), shape=shape)
        vectors += positives.T @ _unit(embed(slice(start, stop)))
    unseen = np.flatnonzero(~vectors.any(axis=1))
    if len(unseen):
        vectors[unseen] = embed_names(unseen)
    return _unit(vectors)


class LatentSemantics:
    """Vectors of texts from their words alone (Deerwester et al. 1990), for encoders that know no language yet.

    A truncated singular value decomposition of tf-idf over tokens: words that occur in the same texts share directions.
    Texts are given as `tokens` int [T] and `starts` int [n + 1]: text i has tokens[starts[i] : starts[i + 1]].
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, vocabulary: int, seed: int) -> None:
        """Learns the directions from these texts; `vocabulary` is the number of tokens there are."""
        self._vocabulary = vocabulary
        stop = min(len(starts) - 1, _SVD_TEXTS)
        counts = self._presence(tokens[: starts[stop]], starts[: stop + 1])
        frequency = np.bincount(counts.indices, minlength=vocabulary)
        # A token of all texts, as [CLS] is, and one of none say nothing.
        self._weights = np.where(frequency, np.log(stop / np.maximum(frequency, 1)), 0).astype(np.float32)
        matrix = self._weighted(counts)
        width = min(_SVD_WIDTH, min(matrix.shape) - 1)
        if width and matrix.data.any():
            start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
            _, _, directions = svds(matrix, width, v0=start)
        else:  # no word tells the texts apart
            directions = np.zeros((1, vocabulary))
        self._directions = np.ascontiguousarray(directions.T, dtype=np.float32)  # [vocabulary, d]

    def embed(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """fp32 [n, d]; zero for a text of unknown or everyday words only."""
        return self._weighted(self._presence(tokens, starts)) @ self._directions

    def _presence(self, tokens: np.ndarray, starts: np.ndarray) -> csr_array:
        """[n, vocabulary], 1 where a text has a token: titles hardly repeat words."""
        entries = np.ones(len(tokens), np.float32), np.array(tokens), np.array(starts)  # copies: they change in place
        matrix = csr_array(entries, shape=(len(starts) - 1, self._vocabulary))
        matrix.sum_duplicates()
        matrix.data[:] = 1
        return matrix

    def _weighted(self, presence: csr_array) -> csr_array:
        """tf-idf with rows of length 1."""
        matrix = presence * self._weights
        norms = np.sqrt((matrix * matrix).sum(axis=1)).clip(min=1e-12)
        return csr_array(matrix / norms[:, None])


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
