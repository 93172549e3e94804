"""AC/DC: training that alternates between dense and sparse phases (arXiv 2308.02060, section 3; IST-DASLab/ACDC).

A sparse phase starts with the exact top-k magnitude mask of the present weights and holds it; a dense phase starts
with every weight free, the pruned ones from exactly zero, and with momentum reset, since the buffers stem from another
network. AC/DC++ is the same at longer schedules.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.distributions import check_sparsity, keep_count
from sparsekern.masks import MaskSet
from sparsekern.ops import topk_mask
from sparsekern.optim import MaskedSGD
from sparsekern.schedules import AcdcSchedule, Dense, PhaseSchedule, Sparse

# First moments: what AC/DC calls momentum. Second moments survive a reset.
_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def prunable_weights(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers whose name some `include` and no `exclude` matches (re.search).

    A weight shared between modules counts once, under its first name. Raises ValueError for a pattern that matches
    nothing and if nothing is left.
    """
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and not any(
            module.weight is known for known in weights.values()
        ):
            weights[f"{name}.weight".lstrip(".")] = module.weight
    for label, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in weights):
                raise ValueError(f"{label}: {pattern!r} matches none of the prunable weights {list(weights)}")
    chosen = {
        name: weight
        for name, weight in weights.items()
        if any(re.search(p, name) for p in include) and not any(re.search(p, name) for p in exclude)
    }
    if not chosen:
        raise ValueError(f"include, exclude: leave nothing of the prunable weights {list(weights)}")
    return chosen


class ACDC:
    """Drives the phases of one model; `attach` once, then `step` last in every iteration.

    `schedule` is an `acdc_schedule(epochs=...)` or a PhaseSchedule in optimizer steps. `distribution` is "global" (one
    ranking over all prunable weights) or "uniform" (the same sparsity in every layer). `pattern` is one of
    `sparsekern.ops.topk_mask` that takes a count. `reset` says whose momentum a new dense phase clears: "all"
    (default, as published), "pruned" or "none". Works with any torch optimizer; MaskedSGD applies the masks inside its
    own kernel, for the others a hook does it after each step.
    """

    def __init__(
        self,
        sparsity: float,
        schedule: AcdcSchedule | PhaseSchedule,
        *,
        pattern: str = "unstructured",
        distribution: str = "global",
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
        reset: str = "all",
    ):
        check_sparsity(sparsity)
        for name, value, allowed in (
            ("pattern", pattern, ("unstructured", "4x1", "1x4", "block4")),
            ("distribution", distribution, ("global", "uniform")),
            ("reset", reset, ("all", "pruned", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        self.sparsity, self.pattern, self.distribution, self.reset = sparsity, pattern, distribution, reset
        self.include, self.exclude, self._schedule = include, exclude, schedule

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int | None = None,
        verbose: bool = True,
    ) -> ACDC:
        """Bind to a model and its optimizer; prints the timeline and the prunable layers. Returns itself.

        Raises ValueError if the model is attached already, a name pattern matches nothing, or steps_per_epoch is
        missing for a schedule in epochs.
        """
        if model in _attached:
            raise ValueError("model: a sparsifier is attached to it already; call its finalize() first")
        if isinstance(self._schedule, PhaseSchedule):
            self.schedule = self._schedule
        elif steps_per_epoch is None:
            raise ValueError("steps_per_epoch must be given for a schedule in epochs, got None")
        else:
            self.schedule = self._schedule.resolve(steps_per_epoch, self.sparsity)
        self.masks = MaskSet(prunable_weights(model, self.include, self.exclude))
        self.model, self.optimizer = model, optimizer
        if isinstance(optimizer, MaskedSGD):
            optimizer.set_masks(self.masks)
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)
        self.position, self.phase = 0, Dense()
        self._updated, self._found_inf = False, None
        _attached.add(model)
        if self.schedule.at(0) != self.phase:
            self._enter(self.schedule.at(0))
        if verbose:
            print(f"{self.schedule.timeline()}\n\n{self.layers()}")
        return self

    def layers(self) -> str:
        """A table of the prunable weights: name, shape, count, live share."""
        rows = [f"{'prunable weight':40} {'shape':>20} {'weights':>12} {'density':>8}"]
        for name in self.masks:
            p = self.masks.parameter(name)
            rows.append(f"{name:40} {'x'.join(map(str, p.shape)):>20} {p.numel():12,} {self.masks.density(name):8.4f}")
        return "\n".join(rows)

    def step(self) -> None:
        """Advance by one optimizer step; enters the phase that begins there.

        A change that falls on a step which the gradient scaler skipped waits for the next good one.
        """
        self.position += 1
        due = self.schedule.at(min(self.position, self.schedule.total_steps - 1))
        if due != self.phase and self._good_step():
            self._enter(due)
        self._updated = False

    def _good_step(self) -> bool:
        """Whether the optimizer really moved; reads the device, so it is asked only where a change is due."""
        return self._updated and (self._found_inf is None or not float(self._found_inf))

    @torch.no_grad()
    def _enter(self, phase: Dense | Sparse) -> None:
        if isinstance(phase, Sparse):
            self._prune(float(phase.sparsity))
        else:
            self._reset_momentum()
            for name in self.masks:
                self.masks.set(name, torch.ones_like(self.masks.parameter(name), dtype=torch.bool))
        self.phase = phase

    def _prune(self, sparsity: float) -> None:
        names = list(self.masks)
        weights = [self.masks.parameter(n).detach() for n in names]
        groups = [self._groups(w) for w in weights]
        uniform = self.distribution == "uniform"
        keep = [keep_count(g, sparsity) for g in groups] if uniform else keep_count(sum(groups), sparsity)
        for name, packed in zip(names, topk_mask(weights, keep, pattern=self.pattern), strict=True):
            self.masks.set_packed(name, packed)
        self._apply()

    def _groups(self, weight: Tensor) -> int:
        if self.pattern == "unstructured":
            return weight.numel()
        axis = 0 if self.pattern == "4x1" else 1
        return weight.numel() // max(weight.shape[axis], 1) * -(-weight.shape[axis] // 4)

    def _momentum(self, parameter: Tensor) -> list[Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return [state[key] for key in _MOMENTUM_KEYS if state.get(key) is not None]

    @torch.no_grad()
    def _apply(self) -> None:
        """Pruned weights and their momentum become exactly zero."""
        self.masks.apply()
        for name in self.masks:
            for buffer in self._momentum(self.masks.parameter(name)):
                buffer.masked_fill_(~self.masks.bool(name), 0)

    def _reset_momentum(self) -> None:
        # Whatever the gradients: the published code skips parameters without one, which under
        # zero_grad(set_to_none=True) is all of them.
        if self.reset == "all":
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    for buffer in self._momentum(parameter):
                        buffer.zero_()
        elif self.reset == "pruned":
            for name in self.masks:
                for buffer in self._momentum(self.masks.parameter(name)):
                    buffer.masked_fill_(~self.masks.bool(name), 0)

    def _after_optimizer_step(self, *_: Any) -> None:
        self._updated = True
        # GradScaler takes it away again right after the step.
        self._found_inf = getattr(self.optimizer, "found_inf", None)
        if isinstance(self.phase, Sparse) and not isinstance(self.optimizer, MaskedSGD):
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Position, phase and masks; restores exactly, also in the middle of a phase."""
        sparsity = float(self.phase.sparsity) if isinstance(self.phase, Sparse) else None
        return {"position": self.position, "sparsity": sparsity, "masks": self.masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` into an attached sparsifier; ValueError if it belongs to another model."""
        self.masks.load_state_dict(state["masks"])
        self.position = state["position"]
        self.phase = Dense() if state["sparsity"] is None else Sparse(state["sparsity"])

    def finalize(self) -> nn.Module:
        """Detach. The model is a plain module with its zeros in place; returned for convenience."""
        if isinstance(self.phase, Sparse):
            self._apply()
        self._hook.remove()
        _attached.discard(self.model)
        return self.model
