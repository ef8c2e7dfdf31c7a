"""The baseline of docs/accuracy.md: a tree of linear classifiers on TF-IDF (one-tree Parabel, Prabhu et al. 2018), by omikuji.

    pip install omikuji scikit-learn
    python -m benchmarks.tf_idf_tree --data ../yso-en

Words are scikit-learn's, the tree's settings omikuji's own; P@k and PSP@k are of all of test. It draws
without a seed: on the 1,493 test texts of yso-mini P@1 was .333 to .348 in eleven runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from tqdm import tqdm

from benchmarks import measure
from benchmarks.accuracy import METRICS
from train.data import Dataset
from train.metrics import RANKED, Meter, inverse_propensities
from train.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tf_idf_tree", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--threads", type=measure.count, default=os.cpu_count() or 1, help="default: all (%(default)s)")
    parser.add_argument("--record", action="store_true", help="append the row to benchmarks/results/accuracy.jsonl")
    args = parser.parse_args()
    try:
        import omikuji
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        parser.error(f"{error}; install it: pip install omikuji scikit-learn")

    data = Dataset(args.data)
    labels = data.labels()
    (texts, truth), (test_texts, test_truth) = (zip(*data.texts(split, labels), strict=True) for split in ("train", "test"))
    vectorizer = TfidfVectorizer(dtype=np.float32)
    features, test_features = vectorizer.fit_transform(texts), vectorizer.transform(test_texts)
    started = time.perf_counter()
    settings = omikuji.Model.default_hyper_param()
    settings.n_trees = 1
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        rows = [row for row, found in enumerate(truth) if len(found) and features.indptr[row] < features.indptr[row + 1]]
        file.write(f"{len(rows)} {features.shape[1]} {len(labels)}\n")
        for row in rows:
            words = " ".join(f"{word}:{weight:.6f}" for word, weight in sorted(words_of(features, row)))
            file.write(f"{','.join(map(str, truth[row]))} {words}\n")
        file.flush()
        model = omikuji.Model.train_on_data(file.name, settings, n_threads=args.threads)
    minutes = (time.perf_counter() - started) / 60

    counts = np.bincount(np.concatenate(truth), minlength=len(labels))
    weights = inverse_propensities(counts, len(texts), a=Settings.propensity_a, b=Settings.propensity_b)
    meter = Meter(weights, counts)
    for row in tqdm(range(len(test_texts)), desc="evaluating test", unit=" texts", disable=None):
        best = [label for label, _ in model.predict(words_of(test_features, row), top_k=RANKED)]
        meter.update(np.array([best], dtype=np.int64), [test_truth[row]])
    metrics = meter.result()
    result = {"data": args.data.name, "head": "TF-IDF tree", **{name: round(metrics[name], 4) for name in METRICS}}
    result |= {"test_texts": len(test_texts), "minutes": round(minutes, 1), "threads": args.threads}
    measure.show([result])
    if args.record:
        measure.record("accuracy", [result])


def words_of(features: csr_matrix, row: int) -> list[tuple[int, float]]:
    """(word, weight) pairs of a text."""
    part = slice(features.indptr[row], features.indptr[row + 1])
    return list(zip(features.indices[part].tolist(), features.data[part].tolist(), strict=True))


if __name__ == "__main__":
    main()
