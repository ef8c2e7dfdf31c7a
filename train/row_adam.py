"""Adam without momentum over the rows of a table, for gradients that have few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RowAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) with β₁ = 0, exact on sparse gradients [V, H] fp32: a step costs what its rows cost.

    Without momentum, a row that has no gradient does not move, and its second moment only decays; that is made up for when the
    row has one again. A word seen seldom then moves at once as far as Adam's momentum would carry it over ten steps.
    """

    def __init__(self, groups: list[dict[str, Any]], *, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": 0.0, "beta2": beta2, "eps": eps})
        for group in self.param_groups:
            for table in group["params"]:
                self.state[table] = {
                    "step": torch.zeros((), dtype=torch.int64),
                    "seen": torch.zeros(len(table), dtype=torch.int64, device=table.device),  # the step of its last gradient
                    "exp_avg_sq": torch.zeros_like(table),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all tables that have a gradient, coalesced."""
        assert closure is None
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group["lr"], group["beta2"], group["eps"])

    def _step(self, table: nn.Parameter, lr: float, beta2: float, eps: float) -> None:
        assert table.grad is not None
        state = self.state[table]
        rows, grad = table.grad.indices()[0], table.grad.values()
        state["step"] += 1
        step, seen, exp_avg_sq = int(state["step"]), state["seen"], state["exp_avg_sq"]
        decay = beta2 ** (step - seen[rows]).to(grad.dtype)
        moment: Tensor = exp_avg_sq[rows].mul_(decay[:, None]).addcmul_(grad, grad, value=1 - beta2)
        exp_avg_sq[rows] = moment
        seen[rows] = step
        table.index_add_(0, rows, grad / moment.div(1 - beta2**step).sqrt_().add_(eps), alpha=-lr)
