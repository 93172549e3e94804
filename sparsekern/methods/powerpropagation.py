"""Powerpropagation: weights as powers of what is trained (arXiv 2110.00296; google-deepmind/deepmind-research).

theta = phi |phi|^(alpha - 1), alpha > 1: small weights move slowly and large ones fast, so training itself separates
them. The model's parameter holds phi under its old name, the layer's forward pass gets theta, and pruning ranks
|theta|. `sparsekern.TopKAST(alpha=...)` is the published combination with Top-KAST.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekern.methods.allocation import Allocation
from sparsekern.methods.effective import EffectiveSparsifier
from sparsekern.methods.held import Constant
from sparsekern.methods.layer_calls import combine_layers
from sparsekern.methods.memory import Memory
from sparsekern.phases import Dense, Phase, PhaseSchedule, Sparse


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(phi)
        ctx.alpha = alpha
        return phi * phi.abs() ** (alpha - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Autograd's own formula is 0 * inf at 0 for alpha < 2.
        (phi,) = ctx.saved_tensors
        return gradient * ctx.alpha * phi.abs() ** (ctx.alpha - 1), None


class _PowerOf(torch.autograd.Function):
    """`theta`, computed already, as a power of `phi`; packed `kept` or None: where its gradient goes on."""

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, theta: Tensor, alpha: float, memory: Memory, name: str, kept: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(phi)
        ctx.alpha, ctx.memory, ctx.name, ctx.kept = alpha, memory, name, kept
        return theta.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (phi,) = ctx.saved_tensors
        size = phi
        if ctx.alpha != 2:
            size = torch.abs(phi, out=ctx.memory.workspace(phi)).pow_(ctx.alpha - 1)
        result = ctx.memory.gradient(ctx.name, phi)
        combine_layers([result], [gradient], [size], [ctx.kept], live=(0.0, float(ctx.alpha)))
        return result, None, None, None, None, None


def power_of(phi: Tensor, theta: Tensor, alpha: float, memory: Memory, name: str, kept: Tensor | None = None) -> Tensor:
    """`theta` as it is, with the gradient of `power(phi, alpha)` where the packed mask `kept` has a bit, else 0."""
    return _PowerOf.apply(phi, theta, alpha, memory, name, kept)


def fill_power(
    phis: Sequence[Tensor], alpha: float, outs: Sequence[Tensor], kept: Sequence[Tensor | None]
) -> None:  # fmt: skip
    """Write each `power(phi, alpha)` into its `out`, laid out alike, where the packed mask `kept` has a bit, else 0."""
    sizes = phis if alpha == 2 else [torch.abs(p, out=o).pow_(alpha - 1) for p, o in zip(phis, outs, strict=True)]
    combine_layers(outs, phis, sizes, kept, live=(0.0, 1.0))


def power(phi: Tensor, alpha: float) -> Tensor:
    """theta = phi |phi|^(alpha - 1); its derivative alpha |phi|^(alpha - 1) is 0 at 0."""
    return phi if alpha == 1 else _Power.apply(phi, alpha)


def change_power(phi: Tensor, before: float, after: float) -> Tensor:
    """The phi that gives the same theta with alpha `after` as `phi` with `before`; 0 stays 0."""
    # phi |phi|^(before / after - 1) would be 0 * inf at 0.
    return phi.sign() * phi.abs() ** (before / after)


def check_alpha(alpha: float) -> float:
    """alpha as given, if it is a number of at least 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a number of at least 1, got {alpha!r}")
    if not 1 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number of at least 1, got {alpha!r}")
    return alpha


class Powerpropagation(EffectiveSparsifier):
    """Trains phi; dense, or with the sparse phases of `schedule`, whose masks keep the largest |theta| and are held.

    `schedule` is a PhaseSchedule of Dense and Sparse phases; None trains dense to the end, to be pruned after
    `finalize`, as the published demo does. There the output layer keeps twice the share of the others:
    `layer_sparsity={"last": ...}`. `attach` turns the present weights into phi of the same theta, so call it before
    loading a state dict that was saved while attached. Weight decay acts on phi.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        schedule: PhaseSchedule | None = None,
        *,
        pattern: str = "unstructured",
        distribution: str = "global",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        self.alpha = check_alpha(alpha)
        self.allocation = Allocation(pattern, distribution, layer_sparsity, n_of_m=True)
        if schedule is not None and not isinstance(schedule, PhaseSchedule):
            raise TypeError(f"schedule must be a PhaseSchedule or None, got {type(schedule).__name__}")
        for span in schedule.phases if schedule is not None else ():
            if isinstance(span.phase, Sparse):
                self.allocation.sparsity(span.phase.sparsity)
        super().__init__(Constant(Dense()) if schedule is None else schedule, include=include, exclude=exclude)
        self.phase: Phase = Dense()

    @torch.no_grad()
    def _begin(self) -> None:
        self.phase = Dense()
        self.allocation.bind(self.model, self.masks)
        for name in self.masks:
            weight = self.masks.parameter(name)
            weight.copy_(change_power(weight, 1, self.alpha))

    def needs_dense_gradient(self) -> bool:
        return False  # what is pruned has none

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return torch.where(self.kept(name, weight), power(weight, self.alpha), 0)

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        sparse = isinstance(self.phase, Sparse)
        kept = [self._packed_as(n, w) if sparse else None for n, w in zip(names, weights, strict=True)]
        fill_power(weights, self.alpha, outs, kept)

    def _connect(self, name: str, weight: Tensor, value: Tensor) -> Tensor:
        kept = self.masks.packed(name) if isinstance(self.phase, Sparse) else None
        return power_of(weight, value, self.alpha, self.memory, name, kept)

    def _cause(self, name: str) -> Any:
        return super()._cause(name), self.alpha

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Go on with another alpha and the same theta; momentum of these weights starts anew, in the new coordinate."""
        self._check_attached()
        check_alpha(alpha)
        for name in self.masks:
            weight = self.masks.parameter(name)
            weight.copy_(change_power(weight, self.alpha, alpha))
            for buffer in self.momentum(weight):
                buffer.zero_()
        self.alpha = alpha

    def _due(self) -> bool:
        return self.schedule.at(self.position) != self.phase

    @torch.no_grad()
    def _change(self) -> None:
        phase = self.schedule.at(self.position)
        if isinstance(phase, Sparse):
            scores = {name: power(self.masks.parameter(name).detach(), self.alpha) for name in self.masks}
            self.allocation.select(self.masks, self.allocation.budget(phase.sparsity), scores)
        else:
            for name in self.masks:
                self.masks.set(name, torch.ones_like(self.masks.parameter(name), dtype=torch.bool))
        self.phase = phase
        self._refresh_kept()

    def _extra_state(self) -> dict[str, Any]:
        sparsity = self.phase.sparsity if isinstance(self.phase, Sparse) else None
        return {"alpha": self.alpha, "sparsity": sparsity}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        alpha, sparsity = check_alpha(state["alpha"]), state["sparsity"]
        phase = Dense() if sparsity is None else Sparse(sparsity)

        def install() -> None:
            self.alpha, self.phase = alpha, phase

        return install
