"""Parameters that a method trains beside the model's: thresholds, scores. They are no part of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern.optim import MaskedSGD


class Learnables:
    """One tensor per weight with an SGD of their own, whose rate is `ratio` times that of the model's optimizer.

    Their gradients are computed by the method from those of the weights, so they follow gradient accumulation,
    clipping, averaging over ranks and loss scaling without any care of their own, and a step that overflowed moves
    them no more than it moves the model.
    """

    def __init__(self, values: Mapping[str, Tensor], ratio: float, momentum: float = 0.0, weight_decay: float = 0.0):
        self.values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        self.ratio = ratio
        self.optimizer = MaskedSGD(self.values.values(), lr=0.0, momentum=momentum, weight_decay=weight_decay)

    def rate(self, main: torch.optim.Optimizer, weight: Tensor) -> float:
        """The learning rate; `weight` is the one whose group in `main` gives it."""
        rates = [group["lr"] for group in main.param_groups if any(p is weight for p in group["params"])]
        # A weight outside the optimizer has no rate of its own and follows the first group.
        return self.ratio * float((rates or [main.param_groups[0]["lr"]])[0])

    @torch.no_grad()
    def step(self, main: torch.optim.Optimizer, weight: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """One step with `gradients` by name; `weight` is the one whose group in `main` gives the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.rate(main, weight)
        for name, gradient in gradients.items():
            value = self.values[name]
            if value.device != gradient.device:
                value.data = value.data.to(gradient.device)
            value.grad = gradient
        for name in ("grad_scale", "found_inf"):
            setattr(self.optimizer, name, getattr(main, name, None))
        self.optimizer.step()
        for value in self.values.values():
            value.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": {name: value.detach().clone() for name, value in self.values.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def prepare(self, state: Any) -> Callable[[], None]:
        """Check a `state_dict` and return a function that installs it; ValueError if it does not fit."""
        if not isinstance(state, Mapping) or set(state) != {"values", "optimizer"}:
            raise ValueError(f"state['learned'] must hold 'values' and 'optimizer', got {state!r:.80}")
        given = state["values"]
        if not isinstance(given, Mapping) or set(given) != set(self.values):
            raise ValueError(f"state['learned']['values'] must have the entries {list(self.values)}, got {given!r:.80}")
        for name, value in self.values.items():
            if getattr(given[name], "shape", None) != value.shape:
                raise ValueError(
                    f"state['learned']['values'][{name!r}] must be of shape {tuple(value.shape)}, "
                    f"got {given[name]!r:.80}"
                )

        @torch.no_grad()
        def install() -> None:
            for name, value in self.values.items():
                value.copy_(given[name])
            self.optimizer.load_state_dict(state["optimizer"])

        return install


def check_number(name: str, value: float, least: float = 0.0) -> float:
    """A finite number of at least `least`, or the error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number{'' if least == -float('inf') else f' of at least {least:g}'}")
    return value
