"""A watch over numbers that must stay finite."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = 1 << 62


class NotFiniteError(ArithmeticError):
    """Numbers are no longer finite since `step` (from 0); the message says which."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} is not finite")
        self.step = step


class Watch:
    """Finds the first step with a number that is not finite: at once, or when `lazy` only if asked, so that no step waits."""

    def __init__(self, *, lazy: bool) -> None:
        self._lazy = lazy
        self._first: dict[str, Tensor] = {}  # the first bad step, int64 [], by what is watched

    def see(self, what: str, step: int, numbers: Tensor) -> None:
        """Looks at the numbers of step `step`; NotFiniteError unless lazy."""
        finite = numbers.isfinite().all()
        if not self._lazy:
            if not finite:
                raise NotFiniteError(what, step)
            return
        first = self._first.get(what, torch.full((), _NEVER, device=numbers.device))
        self._first[what] = torch.where(finite, first, first.clamp(max=step))

    def check(self) -> None:
        """NotFiniteError when any step so far had such a number; waits for the device."""
        found = {what: int(first) for what, first in self._first.items()}
        if found and min(found.values()) < _NEVER:
            what = min(found, key=lambda each: found[each])
            raise NotFiniteError(what, found[what])
