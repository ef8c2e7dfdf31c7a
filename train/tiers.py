"""Tiers: labels by training frequency, in blocks of different fan-in. Much capacity where the training texts are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tier:
    """A share (0 … 1) of the labels; `fan_in` None means dense: every input."""

    fan_in: int | None
    share: float


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """Tiers from "dense:2%,128:18%,32:80%", the most frequent labels first; ValueError says what is wrong."""
    tiers = []
    for part in text.split(","):
        name, colon, share = part.strip().partition(":")
        number = share.removesuffix("%")
        try:
            fan_in = None if name == "dense" else int(name)
            size = float(number) / (100 if share.endswith("%") else 1)
        except ValueError:
            raise ValueError(f"{part.strip()!r} is not FAN-IN:SHARE, as 128:18%, or dense:SHARE") from None
        if fan_in is not None and fan_in < 1:
            raise ValueError(f"fan-in {fan_in} is not at least 1")
        if not (colon and 0 < size <= 1):
            raise ValueError(f"{share!r} is not a share above 0% and up to 100%")
        tiers.append(Tier(fan_in, size))
    total = sum(tier.share for tier in tiers)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares add up to {100 * total:g}%, not 100%")
    return tuple(tiers)


def split_by_frequency(counts: np.ndarray, tiers: tuple[Tier, ...], group_size: int) -> list[np.ndarray]:
    """The labels of each tier, int32, most frequent first; equal counts keep label order.

    Every tier but the last is rounded up to whole groups, which cost as much memory; the last ones may stay empty.
    """
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    return np.split(order, np.cumsum(tier_sizes(len(order), tiers, group_size))[:-1])


def tier_sizes(n_labels: int, tiers: tuple[Tier, ...], group_size: int) -> list[int]:
    """Labels in each tier, as `split_by_frequency` fills them."""
    ends = np.cumsum([tier.share for tier in tiers]) * n_labels
    bounds = [min(n_labels, int(np.ceil(round(end, 6) / group_size)) * group_size) for end in ends[:-1]]
    return np.diff([0, *bounds, n_labels]).tolist()
