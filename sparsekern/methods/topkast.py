"""Top-KAST: a sparse forward set inside a larger set that trains (arXiv 2106.03517).

The forward pass uses A, the largest weights. Gradients move B, a superset of A, so that weights outside A can grow into
it; everything outside B is frozen. An exploration penalty pulls on B, harder on B without A, where only weights that
gain survive. The paper prints the densities the wrong way round; here the backward set must be the larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.distributions import check_sparsity
from sparsekern.masks import MaskSet
from sparsekern.methods.allocation import Allocation
from sparsekern.methods.effective import EffectiveSparsifier, straight_through
from sparsekern.methods.held import Constant
from sparsekern.methods.powerpropagation import change_power, check_alpha, fill_power, power, power_of
from sparsekern.methods.repeated import Repeated
from sparsekern.phases import Sparse


class TopKAST(Repeated, EffectiveSparsifier):
    """Forward with `sparsity`, training the weights of a mask of `backward_sparsity`; both by magnitude.

    Masks are chosen anew every `every` steps (published: 1; 100 reported as fine). `penalty` is the factor of the
    exploration penalty 1/2 |w|^2, with weight 1 on A, 1 / (1 - sparsity) on B without A and 0 elsewhere. It is part of
    the loss and so of the gradient; neuralmagic/sparseml applies it outside momentum. MaskedSGD adds it in its own
    step, so that `.grad` never shows it. It stands in for weight decay, which, if the optimizer has one, acts on B.
    `alpha` above 1 trains powers of weights (see `sparsekern.Powerpropagation`), ranked by |theta|. Momentum outside B
    is zero. arXiv 2308.02060 runs it with the layer rules of Extended GMP,
    `layer_sparsity={"first": 0.0, "last": 0.8}`; the densities of its backward sets are not known.
    `pattern`, `distribution` and `layer_sparsity` as in `sparsekern.methods.allocation.Allocation`; a layer with a
    sparsity of its own has that in both sets.
    """

    def __init__(
        self,
        sparsity: float,
        backward_sparsity: float,
        *,
        every: int = 1,
        penalty: float = 1e-4,
        alpha: float = 1.0,
        pattern: str = "unstructured",
        distribution: str = "global",
        layer_sparsity: Mapping[str, float] | None = None,
        include: Sequence[str] = (".*",),
        exclude: Sequence[str] = (),
    ):
        forward, backward = check_sparsity(sparsity), check_sparsity(backward_sparsity, "backward_sparsity")
        if not backward < forward < 1:
            raise ValueError(
                "backward_sparsity must be below sparsity and sparsity below 1: the backward set holds the forward set "
                f"(the inequality printed in the paper is the other way round), got sparsity={sparsity!r} and "
                f"backward_sparsity={backward_sparsity!r}"
            )
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty must be a finite number of at least 0, got {penalty!r}")
        self.every = self._check_every(every)
        self.alpha, self.penalty = check_alpha(alpha), penalty
        self.sparsity, self.backward_sparsity = sparsity, backward_sparsity
        self.phase = Sparse(sparsity)
        self.allocation = Allocation(pattern, distribution, layer_sparsity)
        super().__init__(Constant(self.phase), include=include, exclude=exclude)

    @torch.no_grad()
    def _begin(self) -> None:
        self.updated = 0
        self._hint = torch.zeros(2, 2, dtype=torch.int64)
        self.allocation.bind(self.model, self.masks)
        self.backward_masks = MaskSet({name: self.masks.parameter(name) for name in self.masks})
        for name in self.masks if self.alpha != 1 else ():
            weight = self.masks.parameter(name)
            weight.copy_(change_power(weight, 1, self.alpha))
        self._update()

    def _register(self) -> None:
        super()._register()
        # MaskedSGD freezes and penalises by itself. For other optimizers gradients get the penalty before the step, and
        # weights are put back after it.
        self._freezes = self._decay_in_step(*self._penalties())
        if self._freezes:
            self._policy, self.optimizer.momentum_policy = self.optimizer.momentum_policy, "freeze"
            self.optimizer.set_masks(self.backward_masks)

    def _penalties(self) -> tuple[float, float]:
        """The factors of weights in A, which count 1, and in B without A, which count 1 / D."""
        return self.penalty, self.penalty / (1 - self.sparsity)

    def finalize(self) -> nn.Module:
        model = super().finalize()
        if self._freezes:
            self.optimizer.momentum_policy = self._policy
            self.optimizer.set_masks({})
        return model

    def timeline(self) -> str:
        return f"{super().timeline()}, {Sparse(self.backward_sparsity)} backward, masks every {self.every} steps"

    @torch.no_grad()
    def _update(self) -> None:
        scores = {name: self._theta(name) for name in self.masks}
        sets = (self.masks, self.sparsity), (self.backward_masks, self.backward_sparsity)
        self.allocation.select_nested([(masks, self.allocation.budget(s)) for masks, s in sets], scores, self._hint)
        self._refresh_kept()

    def _theta(self, name: str) -> Tensor:
        """What weights are ranked by; good until the next step of the optimizer, which needs the memory."""
        weight = self.masks.parameter(name).detach()
        if self.alpha == 1 or self.allocation.pattern == "unstructured":
            return weight  # |theta| of single weights is ordered as |phi|
        theta = self.memory.own(f"{name} before", weight)
        fill_power([weight], self.alpha, [theta], [None])
        return theta

    def effective(self, name: str, weight: Tensor) -> Tensor:
        theta = power(weight, self.alpha)
        return straight_through(theta, torch.where(self.kept(name, weight), theta.detach(), 0))

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        if self.alpha == 1:
            return self._fill_masked(names, weights, outs)
        fill_power(weights, self.alpha, outs, list(map(self._packed_as, names, weights)))

    def _connect(self, name: str, weight: Tensor, value: Tensor) -> Tensor:
        if self.alpha == 1:
            return straight_through(weight, value)
        return power_of(weight, value, self.alpha, self.memory, name)

    @torch.no_grad()
    def _before_step(self) -> bool:
        if self._freezes:
            return False
        names, weights, gradients = self._gradients()
        inside, outside = self._penalties()
        self._combine(
            gradients, gradients, weights, self.masks, names, scaled=True, within=self.backward_masks,
            live=(1.0, inside), pruned=(1.0, outside),
        )  # fmt: skip
        self._moving = names, weights
        self._frozen = [self.memory.own(f"{n} before", w).copy_(w) for n, w in zip(names, weights, strict=True)]
        return False

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._freezes:
            return
        # Weight decay and old momentum would move what is frozen; copying it back is exact for any optimizer.
        names, weights = self._moving
        self._combine(weights, weights, self._frozen, self.backward_masks, names, live=(1, 0), pruned=(0, 1))
        buffers = [(n, b) for n, w in zip(names, weights, strict=True) for b in self.momentum(w)]
        moved = [b for _, b in buffers]
        self._combine(moved, moved, [], self.backward_masks, [n for n, _ in buffers], live=(1, 0), pruned=(0, 0))

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "backward_masks": self.backward_masks.state_dict()}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        rest = super()._load_extra_state(state)
        # Into a copy first, so that a bad file changes nothing.
        MaskSet({name: self.masks.parameter(name) for name in self.masks}).load_state_dict(state["backward_masks"])

        def install() -> None:
            rest()
            self.backward_masks.load_state_dict(state["backward_masks"])

        return install
