"""Which labels stand beside each other in a block, and the vectors that say which are alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.encoder import Encoder
from train.data import Labels
from train.inputs import embed_texts, pooled_embeddings
from train.labels import LatentSemantics, label_vectors
from train.settings import Settings
from train.tokens import Split
from train.tree import similarity_order

Order = Callable[[np.ndarray], np.ndarray]


def new_order(settings: Settings, encoder: Encoder, split: Split, labels: Labels, cache: Path) -> Order:
    """A function that puts labels int32 [n], given most frequent first, in slot order, as --grouping says.

    `split` are the training texts. Draws come from the seed.
    """
    rng = np.random.default_rng([settings.seed, 1])
    if settings.grouping == "frequency":
        return lambda members: members
    if settings.grouping == "random":
        return lambda members: rng.permutation(members)
    vectors = _vectors(settings, encoder, split, labels, cache)
    return lambda members: members[similarity_order(vectors[members], settings.group_size, rng)]


def _vectors(settings: Settings, encoder: Encoder, split: Split, labels: Labels, cache: Path) -> np.ndarray:
    """Label vectors fp32 [L, d]: from the encoder, or from the texts' words if it is new and knows nothing yet."""
    if settings.encoder != "small":
        pooled = pooled_embeddings(encoder, split, cache, "train")

        def embed(part: slice) -> np.ndarray:
            return pooled[part]

        def embed_names(names: np.ndarray) -> np.ndarray:
            out = np.empty((len(names), encoder.embedding_width), dtype=np.float32)
            embed_texts(encoder, _named(encoder, labels, names), out, "label names")
            return out
    else:
        semantics = LatentSemantics(split.tokens, split.token_starts, encoder.tokenizer.get_vocab_size(), settings.seed)

        def embed(part: slice) -> np.ndarray:
            starts = split.token_starts[part.start : part.stop + 1]
            return semantics.embed(split.tokens[starts[0] : starts[-1]], starts - starts[0])

        def embed_names(names: np.ndarray) -> np.ndarray:
            named = _named(encoder, labels, names)
            return semantics.embed(named.tokens, named.token_starts)

    return label_vectors(split, embed, len(labels), embed_names)


def _named(encoder: Encoder, labels: Labels, chosen: np.ndarray) -> Split:
    """The names of the labels `chosen` as texts without labels."""
    return Split.of_tokens(encoder.tokenize([labels.names[i] for i in chosen]))
