"""How the encoder is optimized, and the learning rates that it and the head follow."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from optimi import AdamW as KahanAdamW
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models.bag_of_words import BagOfWords
from models.encoder import Encoder
from train.inputs import INTERMEDIATE
from train.row_adam import RowAdam
from train.settings import Settings, SettingsError

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")  # "encoder.layer.3.output.dense.weight": the first number is the layer's


def optimizers(encoder: Encoder, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW over what is trained of the encoder, RowAdam over a bag of words' vectors; none when all is frozen.

    The rest gets no gradient. AdamW decays only matrices. A group's "peak_lr" is its learning rate at the top of the schedule.
    SettingsError when layers are to differ and cannot be told apart.
    """
    names = [name for name, _ in encoder.named_parameters() if not name.startswith(INTERMEDIATE)]
    below = layers_below_top(names) if settings.layer_decay < 1 else dict.fromkeys(names, 0)
    words = encoder.transformer.words if isinstance(encoder.transformer, BagOfWords) else None
    made: list[torch.optim.Optimizer] = []
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        fresh = name.startswith(INTERMEDIATE)
        parameter.requires_grad_(fresh or not settings.freeze_encoder)
        if not parameter.requires_grad:
            continue
        peak_lr = settings.intermediate_lr if fresh else settings.encoder_lr * settings.layer_decay ** below[name]
        if words is not None and parameter is words.weight and parameter.dtype == torch.float32:
            made.append(_row_adam(words, peak_lr))
        else:
            groups.setdefault((peak_lr, settings.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [*made, _adamw(groups, kahan=settings.encoder_dtype == "bf16")] if groups else made


def _row_adam(words: nn.Embedding, peak_lr: float) -> torch.optim.Optimizer:
    """RowAdam over word vectors, whose gradients are sparse from now on: AdamW would take half of a step for them."""
    words.sparse = True
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but torch warns unless it is said
    return RowAdam([{"params": [words.weight], "peak_lr": peak_lr}])


def _adamw(groups: dict[tuple[float, float], list[nn.Parameter]], *, kahan: bool) -> torch.optim.Optimizer:
    """AdamW over parameters by (peak learning rate, weight decay).

    With bf16 weights, what rounding takes from each step is kept and added to the next (Kahan summation; Zamirai et al. 2020,
    "Revisiting BFloat16 Training").
    """
    listed = [
        {"params": parameters, "peak_lr": peak_lr, "weight_decay": weight_decay}
        for (peak_lr, weight_decay), parameters in groups.items()
    ]
    optimizer = (
        # bf16 moments: with the usual 0.999 the second one would never fall, as a thousandth less is rounded away.
        KahanAdamW(listed, lr=0.0, betas=(0.9, 0.99), eps=1e-8) if kahan else torch.optim.AdamW(listed, lr=0.0, fused=True)
    )
    _allocate_state(optimizer)
    return optimizer


def layers_below_top(names: Sequence[str]) -> dict[str, int]:
    """How many layers below the top one each of a transformer's parameters lies, given their names in the model's order.

    Layers are the longest numbered list there is, whatever it is called ("encoder.layer.3.…", "h.3.…", "layers.3.…"). What
    comes before it, or has "emb" in its name, is below the first layer; what else comes after belongs to the top one.
    SettingsError when nothing is numbered.
    """
    places = {name: (match[1], int(match[2])) for name in names if (match := _NUMBERED.match(name))}
    lists = Counter(prefix for prefix, _ in dict.fromkeys(places.values()))
    if not lists:
        raise SettingsError("--layer-decay: this encoder's parameters have no numbered layers; leave it at 1")
    (layers, depth), *_ = lists.most_common(1)
    numbers = sorted({number for prefix, number in places.values() if prefix == layers}, reverse=True)
    below, reached = {}, False
    for name in names:
        prefix, number = places.get(name, ("", 0))
        reached = reached or prefix == layers
        below[name] = numbers.index(number) if prefix == layers else 0 if reached and "emb" not in name else depth
    return below


def state_tensors(optimizers: Sequence[torch.optim.Optimizer], encoder: Encoder) -> dict[str, Tensor]:
    """The optimizers' own memory, "<parameter>.<key>" and "group<n>.<key>"."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owners: dict[str, dict[str, Any]] = {f"group{n}": group for n, group in enumerate(groups)}
    for optimizer in optimizers:
        owners |= {name: optimizer.state[each] for name, each in encoder.named_parameters() if each in optimizer.state}
    return {
        f"{owner}.{key}": value for owner, facts in owners.items() for key, value in facts.items() if isinstance(value, Tensor)
    }


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer make its state, all zero, which it does in its first step: this one, at learning rate 0.

    So a checkpoint can be read into it, whichever optimizer it is.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for owner in (*optimizer.state.values(), *optimizer.param_groups):
        for value in owner.values():
            if isinstance(value, Tensor):
                value.zero_()


def clip(optimizers: Sequence[torch.optim.Optimizer], clip_norm: float) -> Tensor:
    """Scales the gradients down to `clip_norm` (0: leaves them); returns their norm, which tells whether all are finite."""
    trained = [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]
    dense, sparse = [], []
    for parameter in trained:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            sparse.append(parameter.grad.values())
        else:
            dense.append(parameter)
    norm = get_total_norm([*sparse, *(each.grad for each in dense if each.grad is not None)])
    max_norm = clip_norm or math.inf
    clip_grads_with_norm_(dense, max_norm, norm)
    for values in sparse:
        values.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def step(optimizers: Sequence[torch.optim.Optimizer], scale: float) -> None:
    """One step at `scale` times the peak learning rates. The gradients are used up."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """The factor on all learning rates in step `step` (from 0) of `steps`: a rise over the share `warmup`, then decay to 0."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    return left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2
