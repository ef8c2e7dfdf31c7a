"""The proof that a bundle answers as its checkpoint does, on texts that were not trained on.

Two ways lead from a text to its labels, and they share only the head kernels: the checkpoint's tokenizer, torch encoder and
loaded head; the bundle's tokenizer file, ONNX encoder and mapped head. What must be equal is compared bit for bit (token ids,
the head's buffers, label ids and names), what two runtimes compute within a tolerance (embeddings, scores, the top-k).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from export.bundle import Bundle
from export.encoder import INPUTS, OUTPUT
from export.onnx_runtime import onnxruntime
from export.run import HeldOut
from models import kernels
from models.encoder import Encoder
from models.head import Head
from models.kernels import cpu

TOP_K = 10
# By the encoder's dtype: how far off a number may be, as a share of the largest one. fp32 in two runtimes stays near 1e-6;
# MiniLM in int8 comes to 0.15, a graph that computes something else to 1 and more.
TOLERANCE = {"fp32": 1e-4, "int8": 0.4}
_PRECISION_AT = (1, 3, 5)
_BATCH = 32
_CHUNK = 1 << 12  # groups compared at a time


class ParityError(Exception):
    """The bundle does not answer as its checkpoint does; the message says where."""


@dataclass(frozen=True)
class Parity:
    """What the comparison found. Differences are absolute; each scale is the largest number on the checkpoint's side.

    same_top_k  texts with the same k best labels on both sides; the others differ by a tie within the tolerance
    precision   P@k of checkpoint and bundle, over the texts that have labels
    """

    texts: int
    top_k: int
    same_top_k: int
    embedding_difference: float
    embedding_scale: float
    score_difference: float
    score_scale: float
    precision: dict[str, tuple[float, float]]

    def table(self) -> str:
        """For people, a line per comparison."""
        rows = [
            ("embedding", self.embedding_scale, self.embedding_difference),
            ("score", self.score_scale, self.score_difference),
        ]
        lines = [f"{'':<12}{'largest':>12}{'difference':>12}"]
        lines += [f"{name:<12}{scale:>12.4g}{difference:>12.2g}" for name, scale, difference in rows]
        lines += [f"{'':<12}{'checkpoint':>12}{'bundle':>12}"]
        lines += [f"{name:<12}{before:>12.4f}{after:>12.4f}" for name, (before, after) in self.precision.items()]
        return "\n".join([*lines, f"same top-{self.top_k} on {self.same_top_k} of {self.texts} held-out texts"])


def prove(
    bundle: Bundle,
    *,
    encoder: Encoder,
    trained: Head,
    packed: Head,
    labels: Iterable[tuple[str, str]],
    heldout: Sequence[HeldOut],
    encoder_dtype: str = "fp32",
) -> Parity:
    """Compares `bundle` with the checkpoint's `encoder` and heads; ParityError at the first difference.

    trained   the checkpoint's head, which P@k is reported for
    packed    the head the bundle must hold; `trained` itself unless its values were converted
    labels    (id, name) in label order
    encoder_dtype   of the bundle's encoder, which says how far it may be off
    """
    tolerance = TOLERANCE[encoder_dtype]
    _compare_heads(packed, bundle.head)
    if not np.array_equal(bundle.places, packed.places()):
        raise ParityError("the labels' places are not those in the checkpoint's head")
    _compare_labels(labels, bundle)
    session = _session(bundle)
    _compare_shapes(encoder, session, tolerance)

    texts = [row.text for row in heldout]
    tokens = encoder.tokenize(texts)
    _compare_tokens(tokens, texts, bundle)
    x, bundle_x = _checkpoint_embeddings(encoder, tokens), _bundle_embeddings(session, tokens)
    embedding_scale, embedding_difference = _difference("embeddings of the held-out texts", x, bundle_x, tolerance)

    scores, ranked = _top_k(x, packed)
    bundle_scores, bundle_ranked = _top_k(bundle_x, bundle.head)
    score_scale, score_difference = _difference("scores of the held-out texts", scores, bundle_scores, tolerance)
    same_top_k = _compare_rankings(scores, ranked, bundle_ranked, 2 * tolerance * score_scale)

    trained_ranked = ranked if trained is packed else _top_k(x, trained)[1]
    before, after = (_precision(labels, heldout, bundle) for labels in (trained_ranked, bundle_ranked))
    return Parity(
        texts=len(heldout),
        top_k=ranked.shape[1],
        same_top_k=same_top_k,
        embedding_difference=embedding_difference,
        embedding_scale=embedding_scale,
        score_difference=score_difference,
        score_scale=score_scale,
        precision={name: (before[name], after[name]) for name in before},
    )


def _compare_heads(packed: Head, mapped: Head) -> None:
    for i, (block, other) in enumerate(zip(packed.blocks, mapped.blocks, strict=True)):
        for name, array in block.buffers.items():
            for start in range(0, len(array), _CHUNK):
                part, stored = (each[start : start + _CHUNK].view(np.uint8) for each in (array, other.buffers[name]))
                if not np.array_equal(part, stored):
                    raise ParityError(f"head block {i}: {name} is not what the checkpoint holds")


def _compare_labels(labels: Iterable[tuple[str, str]], bundle: Bundle) -> None:
    stored = ((bundle.labels.id(label), bundle.labels.name(label)) for label in range(len(bundle.labels)))
    for label, (pair, other) in enumerate(zip_longest(labels, stored)):
        if pair != other:
            raise ParityError(f"label {label} is {pair} in the run and {other} in the bundle")


def _compare_shapes(encoder: Encoder, session: onnxruntime.InferenceSession, tolerance: float) -> None:
    """An exported graph may hold a batch or length as a constant without a word, so it runs at other sizes here."""
    longest = encoder.config.max_length
    random = np.random.default_rng(0)
    for batch, length in ((1, 1), (1, 2), (2, 1), (3, min(7, longest)), (33, min(20, longest)), (1, longest)):
        lengths = random.integers(1, length, batch, endpoint=True)
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        ids = random.integers(0, encoder.tokenizer.get_vocab_size(), (batch, length))
        ids = np.where(mask, ids, encoder.pad_id)
        outputs = _run_torch(encoder, ids, mask), _run(session, ids, mask)
        _difference(f"embeddings of a batch [{batch}, {length}]", *outputs, tolerance)


def _compare_tokens(tokens: list[list[int]], texts: Sequence[str], bundle: Bundle) -> None:
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_file))
    for i, (ids, text) in enumerate(zip(tokens, texts, strict=True)):
        if tokenizer.encode(text).ids != ids:
            raise ParityError(
                f"held-out text {i}: {bundle.tokenizer_file.name} gives other tokens than the checkpoint's tokenizer"
            )


def _checkpoint_embeddings(encoder: Encoder, tokens: list[list[int]]) -> np.ndarray:
    """[texts, D], in padded batches."""
    parts = []
    for start in tqdm(range(0, len(tokens), _BATCH), desc="checkpoint", unit=" batches", disable=None, leave=False):
        rows = tokens[start : start + _BATCH]
        length = max(map(len, rows))
        ids = np.array([row + [encoder.pad_id] * (length - len(row)) for row in rows])
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        parts.append(_run_torch(encoder, ids, mask))
    return np.concatenate(parts)


def _bundle_embeddings(session: onnxruntime.InferenceSession, tokens: list[list[int]]) -> np.ndarray:
    """[texts, D], text by text, so that padding is seen to make no difference either."""
    rows = tqdm(tokens, desc="bundle", unit=" texts", disable=None, leave=False)
    return np.concatenate([_run(session, np.array([row]), np.ones((1, len(row)), dtype=np.int64)) for row in rows])


def _difference(what: str, before: np.ndarray, after: np.ndarray, tolerance: float) -> tuple[float, float]:
    """(scale, difference): the largest absolute number of `before` and of the difference; ParityError above the tolerance."""
    if before.shape != after.shape:
        raise ParityError(f"{what} have shape {list(before.shape)} in the checkpoint and {list(after.shape)} in the bundle")
    with np.errstate(invalid="ignore"):
        scale, difference = float(np.abs(before).max()), float(np.abs(before - after).max())
    if not difference <= tolerance * scale:  # NaN and ∞ − ∞ fail too
        raise ParityError(f"{what} differ by {difference:.3g} where the largest is {scale:.3g}")
    return scale, difference


def _compare_rankings(scores: np.ndarray, ranked: np.ndarray, other: np.ndarray, slack: float) -> int:
    """The number of rows with the same labels; a label missing from the `other` side must be a tie with the last one."""
    same = 0
    for row, (best, labels, kept) in enumerate(zip(scores, ranked, other, strict=True)):
        lost = ~np.isin(labels, kept)
        same += not lost.any()
        if lost.any() and best[lost].max() > best[-1] + slack:
            raise ParityError(
                f"held-out text {row}: label {labels[lost][0]} is among the best of the checkpoint, not of the bundle"
            )
    return same


def _top_k(x: np.ndarray, head: Head) -> tuple[np.ndarray, np.ndarray]:
    try:
        return kernels.topk(x, head, TOP_K)
    except (ValueError, OverflowError) as error:
        raise ParityError(f"held-out texts cannot be scored: {error}") from error


def _precision(ranked: np.ndarray, heldout: Sequence[HeldOut], bundle: Bundle) -> dict[str, float]:
    """P@k over the texts that have labels."""
    hits = np.array(
        [
            [bundle.labels.id(label) in row.labels for label in labels]
            for labels, row in zip(ranked, heldout, strict=True)
            if row.labels
        ]
    )
    return {f"P@{k}": float(hits[:, :k].sum() / (k * len(hits))) for k in _PRECISION_AT} if len(hits) else {}


def _session(bundle: Bundle) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu.threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(bundle.encoder_file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own types
        raise ParityError(f"{bundle.encoder_file.name} cannot be loaded: {error}") from error


def _run(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    try:
        embedding: np.ndarray = session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))[0]
    except Exception as error:  # onnxruntime has its own types
        raise ParityError(f"the exported encoder fails on a batch {list(ids.shape)}: {error}") from error
    return embedding


def _run_torch(encoder: Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        embedding: np.ndarray = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return embedding
