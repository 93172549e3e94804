"""STEP: n:m masks learned with Adam in two phases (arXiv 2302.01172).

Straight-through gradients spoil Adam's second moment. So Adam trains dense until the second moment is reliable; then it
is frozen as a fixed preconditioner, and masks are learned under it with the first moment alone.

The statistic that finds the switch, its window and its bounds follow the published description as far as it was
available and are not checked against code of the authors, of which none was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.methods.effective import EffectiveSparsifier
from sparsekern.methods.n_of_m import check_n_of_m, select_n_of_m
from sparsekern.phases import Dense, Phase, PhaseSchedule, PhaseSpan, Sparse


class STEP(EffectiveSparsifier):
    """Dense Adam, then n:m masks with a frozen second moment, in a run of `total_steps` optimizer steps.

    The switch is made after step `switch` if given, else at the first step between `bounds` (shares of the run) at
    which the change of the second moment, mean |v_t - v_(t-1)| averaged over up to 1 / (1 - beta2) steps, is below
    Adam's eps, and at the upper bound at the latest. Until then training is that of the optimizer, bit for bit; after
    it the variance is bit-frozen, the bias correction of v stays that of the switch, and masks follow the weights every
    step. The optimizer must be torch.optim.Adam or AdamW without amsgrad.
    """

    def __init__(
        self,
        total_steps: int,
        sparsity: float | None = None,
        *,
        pattern: str = "2:4",
        switch: int | None = None,
        bounds: tuple[float, float] = (0.1, 0.5),
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        self.sparsity = float(check_n_of_m(pattern, sparsity))
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 2:
            raise ValueError(f"total_steps must be a whole number of at least 2, got {total_steps!r}")
        if switch is not None and (isinstance(switch, bool) or not isinstance(switch, int)):
            raise TypeError(f"switch must be a whole number of steps or None, got {switch!r}")
        if switch is not None and not 1 <= switch < total_steps:
            raise ValueError(f"switch must be from 1 to total_steps - 1 = {total_steps - 1}, got {switch}")
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < 1:
            raise ValueError(f"bounds must be two rising shares of the run from 0 to 1, got {bounds!r}")
        self.pattern, self.switch, self.total_steps = pattern, switch, total_steps
        self.earliest, self.latest = (max(1, math.ceil(b * total_steps)) for b in bounds)
        super().__init__(None, include=include, exclude=exclude)
        self.phase: Phase = Dense()

    def _resolve(self, steps_per_epoch: int | None) -> PhaseSchedule:
        at = self.latest if self.switch is None else self.switch
        return PhaseSchedule((PhaseSpan(0, at, Dense()), PhaseSpan(at, self.total_steps, Sparse(self.sparsity))))

    def timeline(self) -> str:
        if self.switch is not None:
            return super().timeline()
        return (
            f"{super().timeline()}\nthe switch comes earlier, from step {self.earliest} on, once the variance settles"
        )

    def _begin(self) -> None:
        if not isinstance(self.optimizer, torch.optim.Adam):
            raise TypeError(
                f"optimizer must be torch.optim.Adam or AdamW for STEP, which freezes its second moment, "
                f"got {type(self.optimizer).__name__}"
            )
        if any(group["amsgrad"] for group in self.optimizer.param_groups):
            raise ValueError("optimizer: amsgrad must be off, STEP freezes the plain second moment")
        self.phase: Phase = Dense()
        beta2 = float(self.optimizer.param_groups[0]["betas"][1])
        self.window = max(1, min(round(1 / (1 - beta2)) if beta2 < 1 else self.latest, self.latest))
        self.changes = torch.zeros(self.window, dtype=torch.float64)
        self.seen = 0
        self.variance_steps: list[float] = []
        self._variance: list[Tensor] = []

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return self.masked(name, weight)

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        self._fill_masked(names, weights, outs)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _variances(self) -> list[Tensor]:
        states = (self.optimizer.state.get(p, {}) for p in self._parameters())
        return [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]

    @torch.no_grad()
    def _before_step(self) -> bool:
        if isinstance(self.phase, Sparse):
            if not self._overflowed():
                self._preconditioned_step()
            return True
        if self.watching():
            now = self._variances()
            self._variance = [self.memory.own(f"second moment {i}", v).copy_(v) for i, v in enumerate(now)]
        return False

    @torch.no_grad()
    def _after_step(self) -> None:
        if not self.watching():
            return
        now = self._variances()
        if len(now) == len(self._variance) and now:
            pairs = zip(now, self._variance, strict=True)
            moved = sum(torch.sub(a, b, out=b).abs_().sum().double() for a, b in pairs)
            if not self._overflowed():
                self.changes[self.seen % self.window] = float(moved) / sum(v.numel() for v in now)
                self.seen += 1
        self._variance = []

    def watching(self) -> bool:
        """Whether this step is in the first window that may decide about the switch, or after it."""
        return isinstance(self.phase, Dense) and self.switch is None and self.position >= self.earliest - self.window

    def _due(self) -> bool:
        if isinstance(self.phase, Sparse):
            return True
        if self.switch is not None:
            return self.position >= self.switch
        if self.position >= self.latest or self.position < self.earliest or not self.seen:
            return self.position >= self.latest
        return float(self.changes.sum()) / min(self.seen, self.window) < self._eps()

    def _eps(self) -> float:
        return float(self.optimizer.param_groups[0]["eps"])

    def _change(self) -> None:
        if isinstance(self.phase, Dense):
            states = (self.optimizer.state.get(p, {}) for p in self._parameters())
            self.variance_steps = [float(state.get("step", 0)) for state in states]
            self.phase = Sparse(self.sparsity)
        select_n_of_m(self.masks, self.pattern)
        self._refresh_kept()

    @torch.no_grad()
    def _preconditioned_step(self) -> None:
        """Adam's step with momentum and weight decay as usual and the second moment of the switch."""
        scale = getattr(self.optimizer, "grad_scale", None)
        at_switch = dict(zip(self._parameters(), self.variance_steps, strict=False))
        for p in self._parameters():
            if p.grad is not None and not at_switch.get(p):
                raise RuntimeError(
                    f"optimizer: a parameter of shape {tuple(p.shape)} first got a gradient after STEP froze the "
                    "second moment, so it has none; train it before the switch or in an optimizer of its own"
                )
        for group in self.optimizer.param_groups:
            decoupled = group.get("decoupled_weight_decay", isinstance(self.optimizer, torch.optim.AdamW))
            beta1, beta2 = (float(b) for b in group["betas"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.optimizer.state[p]
                g = p.grad if scale is None else p.grad / scale.to(p.grad.device, p.grad.dtype)
                g = -g if group["maximize"] else g
                lr, decay = float(group["lr"]), float(group["weight_decay"])
                if decoupled:
                    p.mul_(1 - lr * decay)
                elif decay:
                    g = g.add(p, alpha=decay)
                state["step"] += 1
                state["exp_avg"].lerp_(g, 1 - beta1)
                second = state["exp_avg_sq"]
                root = torch.div(second, 1 - beta2 ** at_switch[p], out=self.memory.workspace(second))
                root.sqrt_().add_(float(group["eps"]))
                p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1 ** float(state["step"])))

    def _extra_state(self) -> dict[str, Any]:
        return {
            "sparse": isinstance(self.phase, Sparse), "changes": self.changes.clone(), "seen": self.seen,
            "variance_steps": list(self.variance_steps),
        }  # fmt: skip

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        changes = state["changes"]
        if not isinstance(changes, Tensor) or changes.shape != self.changes.shape:
            raise ValueError(f"state['changes'] must be a tensor of {self.window} numbers, got {changes!r:.80}")
        if not isinstance(state["sparse"], bool) or not isinstance(state["seen"], int):
            raise ValueError("state['sparse'] must be a bool and state['seen'] a whole number")
        if not isinstance(state["variance_steps"], list):
            raise ValueError(f"state['variance_steps'] must be a list, got {type(state['variance_steps']).__name__}")

        def install() -> None:
            self.phase = Sparse(self.sparsity) if state["sparse"] else Dense()
            self.changes, self.seen = changes.clone(), state["seen"]
            self.variance_steps = list(state["variance_steps"])

        return install
