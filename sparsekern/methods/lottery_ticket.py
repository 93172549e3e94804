"""Lottery tickets: a trained model's mask on the weights it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsekern.methods.one_shot import OneShot


class LotteryTicket(OneShot):
    """Lottery-ticket rewinding: the mask of the trained weights on the weights of the start (arXiv 1803.03635).

    `initial` is the model's state dict at the start of its dense training (or at an early step of it), copied then.
    `attach` chooses the mask from the trained weights, loads `initial` and forgets the optimizer's state, so that the
    run begins again as it did. Repeat with a higher sparsity for iterative pruning: what was pruned ranks lowest.
    Raises ValueError, before anything changes, if `initial` does not fit the model.
    """

    def __init__(self, sparsity: float | None = None, *, initial: Mapping[str, Any], **choices: Any):
        if not isinstance(initial, Mapping):
            raise TypeError(f"initial must be a state dict, got {type(initial).__name__}")
        super().__init__(sparsity, **choices)
        self.initial = initial

    def _start(self) -> None:
        own = self.model.state_dict()
        if set(own) != set(self.initial):
            raise ValueError(f"initial must have the keys of the model; they differ in {set(own) ^ set(self.initial)}")
        for key, value in own.items():
            given = self.initial[key]
            if isinstance(value, Tensor) and getattr(given, "shape", None) != value.shape:
                raise ValueError(f"initial[{key!r}] must be of shape {tuple(value.shape)}, got {given!r:.80}")
            if isinstance(given, Tensor) and value.numel() and given.data_ptr() == value.data_ptr():
                raise ValueError(f"initial[{key!r}] is the trained tensor itself: copy the state dict at the start")
        self._choose()
        self.model.load_state_dict(self.initial)
        self.optimizer.state.clear()
        self._hold_zero()
