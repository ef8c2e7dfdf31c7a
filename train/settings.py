"""The settings of a run. One dataclass makes the command line (train/flags.py) and the settings in config.json."""

# ruff: noqa: RUF009  the calls in the dataclass are `dataclasses.field` underneath

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.presets import PRESETS
from train.tiers import Tier, parse_tiers

if TYPE_CHECKING:
    from models.encoder import Dtype, Pooling
    from models.head import Connectivity
    from models.kernels import Loss

# Other defaults with a pretrained encoder: it takes smaller steps, learns a small data set by heart sooner, and a ReLU layer
# spreads its outputs. Behind an encoder that knows nothing yet the units of that layer die (docs/LOG.md).
PRETRAINED = {"encoder_lr": 2e-4, "dropout": 0.4, "intermediate": 2048}


class SettingsError(ValueError):
    """The command line cannot be carried out; the message names the flag."""


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^63")
    return value


def _threads(text: str) -> int:
    value = _whole(text)
    if value > 1024:
        raise argparse.ArgumentTypeError(f"{text} is more than 1,024")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _share(text: str) -> float:
    """A share of a whole: 0.02 or 2%."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1, or from 0% to 100%")
    return value


# argparse puts them into its message when int() or float() fails.
_count.__name__ = _whole.__name__ = _seed.__name__ = _threads.__name__ = "whole number"
_amount.__name__ = _positive.__name__ = "number"
_share.__name__ = "share"


def _setting(
    group: str,
    default: Any,
    help: str,
    parse: Callable[[str], Any] = str,
    *,
    choices: tuple[str, ...] | None = None,
    unit: str | None = None,
    free: bool = False,
) -> Any:
    """A field of Settings. `free` ones may differ when a run is resumed: they do not change what is learnt."""
    return field(
        default=default, metadata={"group": group, "help": help, "parse": parse, "choices": choices, "unit": unit, "free": free}
    )


_files, _encoder, _head, _rewiring, _auxiliary, _learning, _scores, _process = (
    partial(_setting, group)
    for group in ("files", "encoder", "head", "rewiring", "auxiliary objective", "learning", "evaluation", "process")
)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, by the name of its flag (underscores for dashes)."""

    data: str = _files(
        "",
        "folder with train.jsonl, dev.jsonl or test.jsonl, and labels.jsonl, plain or .gz, or in another format of "
        "docs/data.md; 'python -m train.data check DIR' tells what is in it",
        unit="DIR",
        free=True,
    )
    titles_only: bool = _files(False, "label-feature JSON: a text is its title alone, as in the LF-...Titles sets")
    train_on_names: bool = _files(
        False,
        "each label's name is one more text to train on, with that label; where names say what texts of a label are about, "
        "this helps rare labels most",
    )
    out: str = _files("", "run directory to make: settings, metrics, checkpoints", unit="RUN", free=True)
    cache: str | None = _files(
        None, "folder of cached tokens and embeddings, which runs may share (default: RUN/cache)", unit="DIR", free=True
    )

    preset: str | None = _files(
        None,
        "settings under a name: cpu and gpu are ours, -shared HASTE's, the others Spartex's; flags beside it win "
        "(see train/presets.py)",
        choices=tuple(PRESETS),
        unit=None,
    )

    encoder: str = _encoder(
        "small",
        "Hugging Face name or folder of a pretrained encoder; 'small' learns a vocabulary and a transformer from the texts",
        unit="NAME",
    )
    freeze_encoder: bool = _encoder(False, "embed each text once, then train only the intermediate layer and the head")
    pooling: Pooling = _encoder("mean", "how the embeddings of a text's tokens become one", choices=("mean", "cls", "last"))
    max_length: int = _encoder(128, "tokens of a text that are read, the rest is cut off", _count, unit="TOKENS")
    intermediate: int = _encoder(
        0, "units of the ReLU layer that spreads a pretrained encoder's outputs for the head, 0 for none", _whole, unit="D"
    )
    dropout: float = _encoder(0.1, "share of the pooled embedding dropped while training", _share, unit="SHARE")
    intermediate_dropout: float = _encoder(
        0.0, "share of the intermediate layer's outputs dropped while training; for a large fan-in", _share, unit="SHARE"
    )
    encoder_dtype: Dtype = _encoder(
        "fp32",
        "number format of the transformer: fp32; bf16-mixed has fp32 weights, and matrix products in bf16 while training; "
        "bf16 has bf16 weights, moments and steps that carry on what rounding took (weight decay is lost). "
        "For GPUs, and processors with bf16 instructions; others are many times slower with it",
        choices=("fp32", "bf16-mixed", "bf16"),
    )
    gradient_checkpointing: bool = _encoder(
        False, "keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time"
    )
    small_vocabulary: int = _encoder(16_384, "'small': tokens in its vocabulary", _count, unit="TOKENS")
    small_width: int = _encoder(256, "'small': width", _count, unit="UNITS")
    small_layers: int = _encoder(2, "'small': layers; 0 makes it a bag of words", _whole, unit="LAYERS")
    small_heads: int = _encoder(4, "'small': attention heads", _count, unit="HEADS")

    connectivity: Connectivity = _head(
        "shared",
        "inputs of a label: a set that its group shares, a set of its own (private), or all (dense)",
        choices=("shared", "private", "dense"),
    )
    fan_in: int = _head(128, "inputs of a label", _count, unit="K")
    group_size: int = _head(32, "labels in a group, a multiple of 16", _count, unit="G")
    dense_labels: float = _head(
        0.02,
        "share of the labels, the most frequent, that read all inputs, rounded up to whole groups: 0.02 or 2%%",
        _share,
        unit="SHARE",
    )
    tiers: str | None = _head(
        None,
        "blocks of labels by training frequency, the most frequent first, each with a fan-in and a share of the labels, "
        "as dense:2%%,128:18%%,32:80%%; takes the place of --fan-in and --dense-labels",
        unit="TIERS",
    )
    grouping: Literal["similarity", "frequency", "random"] = _head(
        "similarity",
        "which labels of a block stand in a group: those whose training texts are alike, as frequent ones, or any",
        choices=("similarity", "frequency", "random"),
    )
    head_dtype: Literal["bf16", "fp32"] = _head(
        "bf16", "number format of the weights; bf16 is rounded stochastically", choices=("bf16", "fp32")
    )
    head_init: Literal["random", "imprinted"] = _head(
        "random",
        "first weights of a label: random, or what tells its training texts from others by the encoder as it is at first; "
        "private labels, and groups behind a pretrained encoder, then read the inputs that they would miss most",
        choices=("random", "imprinted"),
    )
    loss: Loss = _head("bce", "loss of each label", choices=("bce", "squared_hinge"))
    label_smoothing: float = _head(0.0, "how far below 1 the target of a right label is", _share, unit="SHARE")
    weight_positives: bool = _head(
        False, "count a right label 1/propensity times in the loss, so that rare labels weigh more (see --propensity-a)"
    )

    rewire: Literal["off", "random", "gradient"] = _rewiring(
        "random",
        "while training, let the weakest inputs of each label or group give way to unused ones: drawn at random (SET) or "
        "those with the largest gradient (RigL)",
        choices=("off", "random", "gradient"),
    )
    rewire_every: int = _rewiring(300, "steps from one rewiring to the next", _count, unit="STEPS")
    rewire_until: float = _rewiring(0.66, "share of the steps after which inputs stay as they are", _share, unit="SHARE")
    rewire_share: float = _rewiring(
        0.2, "share of the inputs that give way at first; falls to 0 as a cosine", _share, unit="SHARE"
    )
    rewire_below: float = _rewiring(
        0.0, "instead, those whose mean |weight| is below this at first; falls to 0 as a cosine", _amount, unit="WEIGHT"
    )
    new_weights: Literal["zero", "random"] = _rewiring("zero", "weights of new inputs", choices=("zero", "random"))

    auxiliary: float = _auxiliary(
        0.0,
        "weight of a dense classifier over groups of labels that helps the encoder at first, 0 for none; "
        "the logged loss has it in",
        _amount,
        unit="WEIGHT",
    )
    auxiliary_until: float = _auxiliary(
        0.3, "share of the steps after which it is dropped; its weight falls to 0 as a cosine", _share, unit="SHARE"
    )
    meta_classes: int = _auxiliary(1024, "groups of labels that it tells apart", _count, unit="CLASSES")

    epochs: int = _learning(5, "passes over the training texts", _count)
    batch_size: int = _learning(64, "texts in a step", _count, unit="B")
    micro_batch: int = _learning(
        0,
        "texts that pass through the encoder at once; fewer than a step's take less memory and up to a third more time, "
        "the head sees the whole step (0: all)",
        _whole,
        unit="TEXTS",
    )
    encoder_lr: float = _learning(1e-3, "peak learning rate of the transformer", _amount, unit="LR")
    layer_decay: float = _learning(
        1.0,
        "factor on --encoder-lr from each layer of the transformer to the one below; the embeddings are lowest",
        _share,
        unit="SHARE",
    )
    intermediate_lr: float = _learning(3e-3, "peak learning rate of the intermediate layer", _amount, unit="LR")
    head_lr: float = _learning(1e-3, "peak learning rate of the head", _amount, unit="LR")
    head_optimizer: Literal["adam", "momentum", "sgd"] = _learning(
        "adam",
        "optimizer of the head; beside each weight adam keeps two fp32 moments, momentum one, sgd none",
        choices=("adam", "momentum", "sgd"),
    )
    head_weight_decay: float = _learning(0.0, "decoupled weight decay of the head's weights", _amount, unit="DECAY")
    schedule: Literal["linear", "cosine"] = _learning(
        "linear", "how all learning rates decay to zero after warm-up", choices=("linear", "cosine")
    )
    warmup: float = _learning(0.05, "share of the steps in which learning rates rise from zero", _share, unit="SHARE")
    weight_decay: float = _learning(0.01, "AdamW weight decay of the encoder's matrices, not of a bag's", _amount, unit="DECAY")
    clip_norm: float = _learning(1.0, "largest norm of the encoder's gradient, 0 for no limit", _amount, unit="NORM")
    seed: int = _learning(0, "seed of all random numbers; a run repeats for the same seed and number of threads", _seed)

    eval_every: int = _scores(1, "epochs from one evaluation to the next; the last epoch always has one", _count, unit="EPOCHS")
    limit_eval: int = _scores(0, "evaluate on so many texts, evenly spaced, 0 for all", _whole, unit="TEXTS")
    propensity_a: float = _scores(0.55, "A in the propensities of PSP@k (Jain et al. 2016)", _amount, unit="A")
    propensity_b: float = _scores(1.5, "B in the propensities", _positive, unit="B")

    device: Literal["cpu", "cuda", "auto"] = _process(
        "cpu",
        "where to compute; cuda is the first GPU of CUDA_VISIBLE_DEVICES, auto that GPU if there is one. There, sums of "
        "gradients differ in their last bits from run to run",
        choices=("cpu", "cuda", "auto"),
        free=True,
    )
    threads: int = _process(0, "threads to compute with, 0 for as many as the process may use", _threads, free=True)
    checkpoint_every: int = _process(
        0, "steps between checkpoints beside the one after each epoch, 0 for none", _whole, unit="STEPS", free=True
    )
    keep: int = _process(2, "checkpoints to keep, the newest", _count, unit="CHECKPOINTS", free=True)
    log_every: int = _process(50, "steps between training lines in metrics.jsonl", _count, unit="STEPS")

    @property
    def head_tiers(self) -> tuple[Tier, ...]:
        """The tiers of the head, the most frequent labels first."""
        if self.tiers:
            return parse_tiers(self.tiers)
        if self.connectivity == "dense":
            return (Tier(None, 1.0),)
        return (Tier(None, self.dense_labels), Tier(self.fan_in, 1 - self.dense_labels))

    def steps(self, texts: int) -> int:
        """Steps of a whole run on so many training texts."""
        return self.epochs * -(-texts // self.batch_size)

    def rewired_before(self, steps: int) -> int:
        """The step, from 0, from which on a run of so many steps keeps its connections."""
        return round(self.rewire_until * steps)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def new(given: dict[str, Any]) -> Settings:
    """Settings of a new run; SettingsError when they cannot work together."""
    if "data" not in given:
        raise SettingsError("--data is missing")
    preset = PRESETS[given["preset"]] if "preset" in given else {}
    for name in ("fan_in", "dense_labels"):
        if "tiers" in given and name in given:
            raise SettingsError(f"--tiers takes the place of --{name.replace('_', '-')}; give one of them")
    if "tiers" in given:
        preset = {name: value for name, value in preset.items() if name not in ("fan_in", "dense_labels")}
    pretrained = (preset | given).get("encoder", Settings.encoder) != "small"
    if pretrained != (preset.get("encoder", Settings.encoder) != "small"):  # made for the other kind
        preset = {name: value for name, value in preset.items() if name not in PRETRAINED}
    settings = Settings(**((PRETRAINED if pretrained else {}) | preset | given))
    _check(settings)
    return settings


def resumed(stored: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The settings of a stored run with those `given` that may change; SettingsError names those that may not."""
    known = {spec.name: spec for spec in fields(Settings)}
    if stored.keys() != known.keys():
        odd = ", ".join(sorted(stored.keys() ^ known.keys()))
        raise SettingsError(f"the run was made by another version: settings {odd} do not match")
    for name, spec in known.items():
        kinds = {type(spec.default)} | ({int} if isinstance(spec.default, float) else set())
        if spec.default is not None and type(stored[name]) not in kinds:
            raise SettingsError(f"config.json: {name} is {stored[name]!r}, which no run has")
    changed = [name for name, value in given.items() if value != stored[name] and not known[name].metadata["free"]]
    if changed:
        listed = ", ".join(f"--{name.replace('_', '-')} (was {stored[name]}, now {given[name]})" for name in changed)
        raise SettingsError(f"cannot resume with changed settings: {listed}")
    settings = replace(Settings(**stored), **given)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.tiers:
        _check_tiers(settings)
    if settings.label_smoothing == 1:
        raise SettingsError("--label-smoothing 1 would leave no target")
    if settings.group_size % 16:
        raise SettingsError(f"--group-size {settings.group_size} is not a multiple of 16")
    for flag in ("dropout", "intermediate_dropout"):
        if getattr(settings, flag) == 1:
            raise SettingsError(f"--{flag.replace('_', '-')} 1 would drop every input")
    if not Path(settings.data).is_dir():
        raise SettingsError(f"--data {settings.data}: no such folder")


def _check_tiers(settings: Settings) -> None:
    if settings.connectivity == "dense":
        raise SettingsError("--tiers does not go with --connectivity dense")
    try:
        parse_tiers(settings.tiers or "")
    except ValueError as error:
        raise SettingsError(f"--tiers {settings.tiers}: {error}") from None
