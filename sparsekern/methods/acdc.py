"""AC/DC: training that alternates between dense and sparse phases (arXiv 2308.02060, section 3; IST-DASLab/ACDC).

A sparse phase starts with the exact top-k magnitude mask of the present weights and holds it; a dense phase starts
with every weight free, the pruned ones from exactly zero, and with momentum reset, since the buffers stem from another
network. AC/DC++ is the same at longer schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.distributions import check_sparsity, keep_count
from sparsekern.methods.base import Sparsifier
from sparsekern.ops import topk_mask
from sparsekern.schedules import AcdcSchedule, Dense, Phase, PhaseSchedule, Sparse


class ACDC(Sparsifier):
    """Drives the phases of one model; `attach` once, then `step` last in every iteration.

    `schedule` is an `acdc_schedule(epochs=...)`, or a PhaseSchedule in optimizer steps whose last phase is sparse at
    `sparsity`. `distribution` is "global" (one ranking over all prunable weights) or "uniform" (the same sparsity in
    every layer). `pattern` is one of `sparsekern.ops.topk_mask` that takes a count. `include` and `exclude` choose
    weights by name (re.search). `reset` says whose momentum a new dense phase clears: "all" (default, as published),
    "pruned" or "none".
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
        if not isinstance(schedule, (AcdcSchedule, PhaseSchedule)):
            raise TypeError(f"schedule must be acdc_schedule(...) or a PhaseSchedule, got {type(schedule).__name__}")
        if isinstance(schedule, PhaseSchedule) and schedule.phases[-1].phase != Sparse(sparsity):
            raise ValueError(f"schedule must end with {Sparse(sparsity)}, got {schedule.phases[-1].phase}")
        super().__init__(schedule, include=include, exclude=exclude)
        self.sparsity, self.pattern, self.distribution, self.reset = sparsity, pattern, distribution, reset
        self.phase: Phase = Dense()

    def _resolve(self, steps_per_epoch: int | None) -> PhaseSchedule:
        self.phase = Dense()
        if isinstance(self._schedule, AcdcSchedule) and steps_per_epoch is not None:
            return self._schedule.resolve(steps_per_epoch, self.sparsity)
        return super()._resolve(steps_per_epoch)

    def _due(self) -> bool:
        return self.schedule.at(self.position) != self.phase

    @torch.no_grad()
    def _change(self) -> None:
        phase = self.schedule.at(self.position)
        if isinstance(phase, Sparse):
            self._prune(phase.sparsity)
        else:
            self._reset_momentum()
            for name in self.masks:
                self.masks.set(name, torch.ones_like(self.masks.parameter(name), dtype=torch.bool))
        self.phase = phase

    def _prune(self, sparsity: float) -> None:
        weights = [self.masks.parameter(name).detach() for name in self.masks]
        groups = [self._groups(w) for w in weights]
        uniform = self.distribution == "uniform"
        keep = [keep_count(g, sparsity) for g in groups] if uniform else keep_count(sum(groups), sparsity)
        for name, packed in zip(self.masks, topk_mask(weights, keep, pattern=self.pattern), strict=True):
            self.masks.set_packed(name, packed)
        self._hold_zero()

    def _groups(self, weight: Tensor) -> int:
        if self.pattern == "unstructured":
            return weight.numel()
        axis = 0 if self.pattern == "4x1" else 1
        return weight.numel() // max(weight.shape[axis], 1) * -(-weight.shape[axis] // 4)

    def _reset_momentum(self) -> None:
        # Whatever the gradients: the published code skips parameters without one, which under
        # zero_grad(set_to_none=True) is all of them.
        if self.reset == "all":
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    for buffer in self.momentum(parameter):
                        buffer.zero_()
        elif self.reset == "pruned":
            for name in self.masks:
                for buffer in self.momentum(self.masks.parameter(name)):
                    buffer.masked_fill_(~self.masks.bool(name), 0)

    def _extra_state(self) -> dict[str, Any]:
        return {"sparsity": self.phase.sparsity if isinstance(self.phase, Sparse) else None}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        sparsity = state["sparsity"]
        if sparsity is not None:
            check_sparsity(sparsity, "state['sparsity']")

        def install() -> None:
            self.phase = Dense() if sparsity is None else Sparse(sparsity)

        return install
