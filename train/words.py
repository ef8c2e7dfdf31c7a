"""Which tokens a text has, and how much each of them says.

Dimensions: n texts, V tokens of the vocabulary.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from models.bag_of_words import BagOfWords
from train.tokens import Split

SAMPLE_TEXTS = 500_000  # more hardly change frequencies


def weigh(bag: BagOfWords, split: Split) -> None:
    """Makes the fresh word vectors as long as their words' inverse document frequencies in `split`, the training texts.

    A text's embedding is then a random projection of its tf-idf, so similar texts are alike before anything is learnt. The mean
    square over all tokens of the texts stays as it was. Tokens never seen, which are never trained, become zero.
    """
    stop = min(len(split), SAMPLE_TEXTS)
    starts = split.token_starts[: stop + 1]
    texts = presence(split.tokens[: starts[-1]], starts, bag.config.vocab_size)
    weights = inverse_document_frequencies(texts)
    mean_square = np.square(weights)[texts.indices].mean(dtype=np.float64) if texts.nnz else 0
    if mean_square:  # else all texts are alike
        bag.weigh(weights / np.float32(np.sqrt(mean_square)))


def presence(tokens: np.ndarray, starts: np.ndarray, vocabulary: int) -> csr_array:
    """fp32 [n, V], 1 where a text has a token: titles hardly repeat words. Text i has tokens[starts[i] : starts[i + 1]]."""
    entries = np.ones(len(tokens), np.float32), np.array(tokens), np.array(starts)  # copies: they change in place
    matrix = csr_array(entries, shape=(len(starts) - 1, vocabulary))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def inverse_document_frequencies(texts: csr_array) -> np.ndarray:
    """log(n / texts that have the token), fp32 [V], from `presence`; 0 for a token of all texts, as [CLS] is, or of none."""
    frequency = np.bincount(texts.indices, minlength=texts.shape[1])
    return np.where(frequency, np.log(texts.shape[0] / np.maximum(frequency, 1)), 0).astype(np.float32)
