"""`python -m benchmarks.make_bundle`: A servable bundle with a random head of any size around a given encoder, for load tests.

It is written the way `python -m export` writes one, so serving it costs what serving a trained model of that size costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from export.bundle import BundleError, check_target, write_bundle
from export.convert import DTYPES, ENCODER_DTYPES
from export.encoder import export_encoder, export_tokenizer
from models.encoder import Encoder, EncoderConfig, EncoderError
from models.head import Block, Connectivity, Head, HeadError

RANDOM_MINILM = "random-minilm"
_CHUNK = 1 << 14  # labels named at a time


def main(argv: list[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        check_target(given.out, given.force)
        _make(given)
    except (BundleError, EncoderError, HeadError, OSError) as error:
        print(f"python -m benchmarks.make_bundle: error: {error}", file=sys.stderr)
        return 2
    return 0


def label_names(count: int, seed: int) -> Iterator[str]:
    """Made-up names of 3 to 8 words, about 30 characters, as product titles or article names have."""
    rng = np.random.default_rng(seed)
    words = np.array(_words(30_000, rng), dtype=object)
    for start in range(0, count, _CHUNK):
        lengths = rng.integers(3, 8, min(_CHUNK, count - start), endpoint=True)
        for name in np.split(words[rng.integers(0, len(words), lengths.sum())], np.cumsum(lengths)[:-1]):
            yield " ".join(name)


def _make(given: argparse.Namespace) -> None:
    rng = np.random.default_rng(given.seed)
    encoder = load_encoder(given.encoder, given.max_length, given.seed)
    block = Block.random(
        np.arange(given.labels, dtype=np.int32),
        width=encoder.width,
        connectivity=given.connectivity,
        fan_in=given.fan_in,
        group_size=given.group_size,
        dtype=given.dtype,
        rng=rng,
    )
    names = tqdm(label_names(given.labels, given.seed), total=given.labels, unit=" labels", disable=None, leave=False)
    manifest = write_bundle(
        given.out,
        name=given.out.resolve().name,
        head=Head(encoder.width, given.labels, (block,)),
        labels=((f"L{i:09d}", name) for i, name in enumerate(names)),
        tokenizer=export_tokenizer(encoder),
        max_length=encoder.config.max_length,
        write_encoder=lambda path: export_encoder(encoder, path, given.encoder_dtype),
        metrics={},
        force=given.force,
    )
    print(f"{given.out}: {manifest.summary()}")


def load_encoder(name: str, max_length: int, seed: int) -> Encoder:
    """The encoder that --encoder names; EncoderError."""
    config = EncoderConfig("mean", max_length)
    if name == RANDOM_MINILM:
        texts = list(label_names(50_000, seed))
        return Encoder.small(texts, config, vocabulary=30_522, width=384, layers=6, heads=12, seed=seed)
    return Encoder.load(Path(name)) if (Path(name) / "encoder.json").is_file() else Encoder.pretrained(name, config)


def _words(count: int, rng: np.random.Generator) -> list[str]:
    """Made-up words of 1 to 4 syllables."""
    syllables = np.array([consonant + vowel for consonant in "bcdfghjklmnpqrstvwz" for vowel in "aeiou"], dtype=object)
    drawn = syllables[rng.integers(0, len(syllables), (count, 4))]
    return ["".join(word[:size]) for word, size in zip(drawn, rng.integers(1, 4, count, endpoint=True), strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_bundle", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--labels", type=int, required=True, help="number of labels")
    parser.add_argument(
        "--encoder",
        default=RANDOM_MINILM,
        help=f"a checkpoint's encoder folder, a Hugging Face model by name or folder (mean pooling), or {RANDOM_MINILM}: "
        "random weights in MiniLM's shape, 6 layers of width 384 (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder-dtype", choices=ENCODER_DTYPES, default="fp32", help="as for python -m export (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=256, help="tokens per text, but for a checkpoint's encoder (default: 256)"
    )
    parser.add_argument("--connectivity", choices=get_args(Connectivity), default="shared", help="default: %(default)s")
    parser.add_argument("--fan-in", type=int, default=32, help="inputs per label (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=32, help="labels per group, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the head's values (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it is a bundle")
    return parser


if __name__ == "__main__":
    sys.exit(main())
