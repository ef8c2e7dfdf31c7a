"""A new model from the settings: the encoder, and a head that knows how frequent each label is."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from models.encoder import Encoder, EncoderConfig
from models.head import Block, Head
from models.kernels import Loss
from train.data import Dataset, Labels
from train.grouping import Order
from train.settings import Settings, SettingsError
from train.tiers import split_by_frequency, tier_sizes

_VOCABULARY_TEXTS = 500_000  # more hardly change a vocabulary, and they are held in memory


def new_encoder(settings: Settings, data: Dataset, labels: Labels) -> Encoder:
    """The encoder the settings ask for, its fresh weights drawn from the seed. EncoderError, DataError."""
    config = EncoderConfig(
        pooling=settings.pooling,
        max_length=settings.max_length,
        intermediate=settings.intermediate,
        dropout=settings.dropout,
        intermediate_dropout=settings.intermediate_dropout,
    )
    if settings.encoder != "small":
        torch.manual_seed(settings.seed)  # for the intermediate layer
        return Encoder.pretrained(settings.encoder, config)
    texts = [text for text, _ in islice(data.texts("train", labels), _VOCABULARY_TEXTS)]
    return Encoder.small(
        texts,
        config,
        vocabulary=settings.small_vocabulary,
        width=settings.small_width,
        layers=settings.small_layers,
        heads=settings.small_heads,
        seed=settings.seed,
    )


def check_fan_in(settings: Settings, width: int, n_labels: int) -> None:
    """SettingsError when labels are to read more inputs than the `width` there are."""
    tiers = settings.head_tiers
    sizes = tier_sizes(n_labels, tiers, settings.group_size)
    widest = max(tier.fan_in or 0 for tier, size in zip(tiers, sizes, strict=True) if size)
    if widest > width:
        flag = f"--tiers {settings.tiers}" if settings.tiers else f"--fan-in {widest}"
        source = "the intermediate layer" if settings.intermediate else "the encoder"
        raise SettingsError(f"{flag}: a label cannot read {widest:,} inputs, {source} has {width:,} outputs")


def new_head(settings: Settings, width: int, counts: np.ndarray, n_texts: int, order: Order) -> Head:
    """A head over labels with `counts` int [L] of `n_texts` training texts, a block for each tier; `order` fills the groups.

    Weights and indices are drawn from the seed; each bias starts at its label's prior. HeadError when the fan-in does not fit.
    """
    rng = np.random.default_rng(settings.seed)
    tiers = settings.head_tiers
    blocks = []
    for tier, labels in zip(tiers, split_by_frequency(counts, tiers, settings.group_size), strict=True):
        if len(labels):
            block = Block.random(
                order(labels),
                width=width,
                connectivity="dense" if tier.fan_in is None else settings.connectivity,
                fan_in=tier.fan_in or width,
                group_size=settings.group_size,
                dtype=settings.head_dtype,
                rng=rng,
            )
            real = block.label_ids >= 0
            block.bias[real] = prior_bias(counts[block.label_ids[real]], n_texts, settings.loss)
            blocks.append(block)
    return Head(width, len(counts), tuple(blocks))


def prior_bias(counts: np.ndarray, n_texts: int, loss: Loss) -> np.ndarray:
    """The score, fp32, that has the least loss for a label seen in `counts` of `n_texts` texts, when nothing else is known.

    bce: the log-odds of its frequency. squared_hinge: 2p − 1. Half a text is added to either side, for labels never seen.
    """
    p = (counts + 0.5) / (n_texts + 1)
    return (np.log(p / (1 - p)) if loss == "bce" else 2 * p - 1).astype(np.float32)
