"""How the encoder is optimized, and the learning rates that it and the head follow."""

from __future__ import annotations

import math

import torch

from models.encoder import Encoder
from train.inputs import INTERMEDIATE
from train.settings import Settings


def adamw(encoder: Encoder, settings: Settings) -> torch.optim.Optimizer | None:
    """AdamW over what is trained of the encoder; None when that is nothing. Only matrices are decayed.

    The rest gets no gradient. Each group's "peak_lr" is its learning rate at the top of the schedule.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        fresh = name.startswith(INTERMEDIATE)
        parameter.requires_grad_(fresh or not settings.freeze_encoder)
        if parameter.requires_grad:
            groups.setdefault((fresh, parameter.ndim > 1), []).append(parameter)
    if not groups:
        return None
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": settings.intermediate_lr if fresh else settings.encoder_lr,
                "weight_decay": settings.weight_decay if matrix else 0.0,
            }
            for (fresh, matrix), parameters in groups.items()
        ],
        fused=True,
    )


def step(optimizer: torch.optim.Optimizer, scale: float, clip_norm: float) -> bool:
    """One step at `scale` times the peak learning rates, on gradients clipped to `clip_norm` (0: as they are).

    The gradients are used up. False, and nothing is changed, when they are not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    if not torch.isfinite(norm):
        return False
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_lr"]
    optimizer.step()
    optimizer.zero_grad()
    return True


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """The factor on all learning rates in step `step` (from 0) of `steps`: a rise over the share `warmup`, then decay to 0."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    return left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2
