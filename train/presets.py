"""Settings under a name: --preset NAME. A flag given beside it wins.

The published ones follow the papers' code and, where that says nothing of a data set, the ranges in the paper; comments mark
what is ours. They were made for a GPU and take days on a CPU: `cpu` is for that.

Spartex: Ullah et al., NeurIPS 2024, "Navigating Extremes". HASTE: Ullah et al., ICML 2026, "Hardware-Aware Dynamic Sparse
Training for Large Output Spaces".
"""

from __future__ import annotations

from typing import Any

_BERT = {
    "encoder": "bert-base-uncased",
    "pooling": "cls",
    "intermediate": 0,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "loss": "bce",
    "head_optimizer": "momentum",
    "head_lr": 0.05,
    "head_weight_decay": 1e-4,
}
_DISTILBERT = _BERT | {
    "encoder": "sentence-transformers/msmarco-distilbert-base-v4",
    "pooling": "mean",
    "encoder_lr": 1e-5,
    "batch_size": 512,
    "dropout": 0.85,
}
_AMAZON = {"propensity_a": 0.6, "propensity_b": 2.6}
_REWIRED = {"rewire": "random", "rewire_until": 0.66, "new_weights": "zero"}
_SPARTEX = _REWIRED | {
    "connectivity": "private",
    "fan_in": 128,
    "dense_labels": 0.0,
    "rewire_share": 0.25,
    "auxiliary": 0.5,
}
_HASTE = _REWIRED | {"connectivity": "shared", "grouping": "similarity", "rewire_share": 0.25, "auxiliary": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Ours. A bag of words learns titles and sentences faster and better on a CPU than a small transformer; measured on
    # tib-titles (docs/LOG.md), where 15 % of the labels have 83 % of the positives and imprinting is worth a tenth of PSP@1.
    "cpu": {
        "encoder": "small", "small_layers": 0, "small_width": 512, "small_vocabulary": 30_000, "max_length": 64,
        "intermediate": 0, "encoder_lr": 1e-2, "head_lr": 1e-3, "dropout": 0.2, "fan_in": 64, "dense_labels": 0.15,
        "head_init": "imprinted", "epochs": 4,
    },
    # Ours, between the published settings. Measured on a CPU only, with MiniLM on yso-mini, where imprinting is worth much
    # (docs/LOG.md); not on a GPU yet.
    "gpu": {
        "device": "cuda",
        "encoder": "bert-base-uncased", "encoder_dtype": "bf16-mixed", "max_length": 128, "intermediate": 0, "batch_size": 128,
        "encoder_lr": 5e-5, "head_lr": 1e-3, "schedule": "cosine", "dropout": 0.3, "fan_in": 128, "dense_labels": 0.02,
        "head_init": "imprinted", "auxiliary": 0.4, "auxiliary_until": 0.15, "rewire_every": 1000, "rewire_share": 0.25,
        "epochs": 20,
    },
    # Spartex, section 4 and appendix: wiki10-31k has the intermediate layer in place of the auxiliary objective.
    "wiki10-31k": _BERT
    | _SPARTEX
    | {"auxiliary": 0.0, "intermediate": 4096, "intermediate_lr": 2e-4, "dropout": 0.5, "encoder_lr": 1e-5}
    | {"max_length": 256, "batch_size": 32, "epochs": 30, "rewire_every": 800, "warmup": 0.05},  # batch and epochs are ours
    "amazon-670k": _BERT
    | _SPARTEX
    | _AMAZON
    | {"max_length": 128, "batch_size": 64, "epochs": 110, "encoder_lr": 3e-5, "dropout": 0.4, "head_lr": 0.06}
    | {"rewire_every": 1000, "auxiliary_until": 0.15, "warmup": 0.006},
    "wiki-500k": _BERT
    | _SPARTEX
    | {"propensity_a": 0.5, "propensity_b": 0.4}
    | {"max_length": 128, "batch_size": 128, "epochs": 60, "encoder_lr": 5e-5, "dropout": 0.35}  # batch and epochs are ours
    | {"rewire_every": 1000, "auxiliary_until": 0.1, "warmup": 0.01},
    "amazon-3m": _BERT
    | _SPARTEX
    | _AMAZON
    | {"max_length": 128, "batch_size": 128, "epochs": 101, "encoder_lr": 5e-5, "dropout": 0.35}
    | {"rewire_every": 1500, "auxiliary_until": 0.1, "warmup": 0.007},
    "lf-amazontitles-131k": _DISTILBERT
    | _SPARTEX
    | _AMAZON
    | {"titles_only": True, "max_length": 32, "epochs": 100, "rewire_share": 0.15, "rewire_every": 1000}
    | {"auxiliary": 0.4, "auxiliary_until": 0.2, "warmup": 0.087},
    "lf-wikiseealso-320k": _DISTILBERT
    | _SPARTEX
    | {"max_length": 128, "batch_size": 128, "epochs": 100, "rewire_share": 0.15, "rewire_every": 1000}  # batch is ours
    | {"auxiliary": 0.4, "auxiliary_until": 0.2, "warmup": 0.02},
    # HASTE, the authors' configuration files. For 670k they give frequent and rare labels inputs of their own; we do not.
    "amazon-670k-shared": _BERT
    | _HASTE
    | _AMAZON
    | {"max_length": 128, "batch_size": 64, "epochs": 110, "encoder_lr": 3e-5, "dropout": 0.4, "head_lr": 0.06}
    | {"dense_labels": 0.1, "group_size": 16, "fan_in": 64, "rewire_every": 5000, "warmup": 0.006},
    "amazon-3m-shared": _BERT
    | _HASTE
    | _AMAZON
    | {"max_length": 128, "batch_size": 128, "epochs": 101, "encoder_lr": 5e-5, "dropout": 0.15}
    | {"dense_labels": 0.02, "group_size": 64, "fan_in": 128, "rewire_every": 1500, "warmup": 0.007},
}  # fmt: skip
