"""How a method shares its sparsity among layers, and the exact top-k masks that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from sparsekern.distributions import check_sparsity, erk, keep_count, uniform
from sparsekern.masks import MaskSet
from sparsekern.methods.n_of_m import check_n_of_m, is_n_of_m
from sparsekern.methods.selection import check_patterns, layer_weights, prunable_weights
from sparsekern.ops import topk_mask, topk_nested
from sparsekern.ops.packing import count_live
from sparsekern.ops.topk_mask import group_count

PATTERNS = ("unstructured", "4x1", "1x4", "block4")
DISTRIBUTIONS = ("global", "uniform", "erk")
PRESETS = ("first", "last", "depthwise")
_STREAM = 0x6D61736B73  # "masks"


@dataclass(frozen=True)
class Budget:
    """How many groups (weights or blocks) are kept: a number for `each` layer, and `pool` over all `pooled` ones.

    `pool` None: those follow an n:m pattern.
    """

    each: dict[str, int]
    pooled: tuple[str, ...] = ()
    pool: int | None = 0


class Allocation:
    """`pattern`, `distribution` and `layer_sparsity` of a method.

    `distribution` is "global" (one ranking), "uniform" (the same sparsity in every layer) or "erk" (see
    `sparsekern.distributions.erk`). `layer_sparsity` maps "first", "last", "depthwise" or a regular expression to a
    sparsity of its own; such layers are outside the distribution, the others get the method's sparsity without them.
    Where several keys fit a layer, the last one counts.

    An n:m pattern fixes the sparsity of every layer; only methods that go from dense to their final sparsity at once
    take one (`n_of_m`), and of `layer_sparsity` it allows dense layers alone.
    """

    def __init__(
        self,
        pattern: str,
        distribution: str,
        layer_sparsity: Mapping[str, float] | None = None,
        distributions: Sequence[str] = DISTRIBUTIONS,
        n_of_m: bool = False,
    ):
        self.fixed: Fraction | None = check_n_of_m(pattern) if n_of_m and is_n_of_m(pattern) else None
        if self.fixed is not None:
            distributions = ("global", "uniform")
        for name, value, allowed in (
            ("pattern", pattern, (*PATTERNS, *(["n:m"] if n_of_m else []))),
            ("distribution", distribution, distributions),
        ):
            if value not in allowed and (name == "distribution" or self.fixed is None):
                raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
        if layer_sparsity is not None and not isinstance(layer_sparsity, Mapping):
            raise TypeError(f"layer_sparsity must map layers to sparsities, got {type(layer_sparsity).__name__}")
        self.pattern, self.distribution, self.layer_sparsity = pattern, distribution, dict(layer_sparsity or {})
        for key, value in self.layer_sparsity.items():
            check_patterns("layer_sparsity", [key])
            if check_sparsity(value, f"layer_sparsity[{key!r}]") and self.fixed is not None:
                raise ValueError(f"layer_sparsity[{key!r}] must be 0 with pattern {pattern!r}, got {value!r}")

    def sparsity(self, given: float | None) -> float:
        """The sparsity `given`, checked, or that of the n:m pattern, which may be left out."""
        if self.fixed is not None:
            return float(check_n_of_m(self.pattern, given))
        check_sparsity(given)
        return given

    def bind(self, model: nn.Module, masks: MaskSet) -> None:
        """Find the layers that `layer_sparsity` names; ValueError for a key without one or a tensor without blocks."""
        self.shapes = {name: tuple(masks.parameter(name).shape) for name in masks}
        self.sizes = {name: group_count(shape, self.pattern) for name, shape in self.shapes.items()}
        self.own: dict[str, float] = {}
        for key, value in self.layer_sparsity.items():
            found = self._named(key, model, masks)
            if not found:
                raise ValueError(f"layer_sparsity: {key!r} matches none of the prunable weights {list(masks)}")
            self.own.update(dict.fromkeys(found, value))

    def _named(self, key: str, model: nn.Module, masks: MaskSet) -> list[str]:
        names = list(masks)
        if key == "depthwise":
            grouped = [m.weight for m in model.modules() if getattr(m, "groups", 1) > 1 and m.weight.shape[1] == 1]
            return [n for n in names if any(masks.parameter(n) is w for w in grouped)]
        if key in PRESETS:
            # Of the whole model: if its first layer is not pruned, no other one takes its place.
            whole = list(layer_weights(model))
            return [n for n in names if n == whole[0 if key == "first" else -1]]
        return [n for n in names if check_patterns("layer_sparsity", [key])[0].search(n)]

    def budget(self, sparsity: float, own: Callable[[float], float] = float) -> Budget:
        """What is kept at `sparsity`; `own` turns a layer's own sparsity into that of the moment."""
        each = {name: keep_count(self.sizes[name], own(value)) for name, value in self.own.items()}
        others = {name: shape for name, shape in self.shapes.items() if name not in each}
        sizes = {name: self.sizes[name] for name in others}
        if self.fixed is not None and sparsity:
            check_n_of_m(self.pattern, sparsity)
            return Budget(each, tuple(others), None)
        if self.distribution == "global":
            return Budget(each, tuple(others), keep_count(sum(sizes.values()), sparsity))
        shared = erk(others, sparsity, sizes) if self.distribution == "erk" else uniform(sizes, sparsity)
        return Budget({name: {**shared, **each}[name] for name in self.shapes})

    @torch.no_grad()
    def select(
        self, masks: MaskSet, budget: Budget, scores: Mapping[str, Tensor] | None = None, nested: bool = False
    ) -> None:
        """Set the masks to the `budget` of highest |score| (default: the weights); `nested` keeps live weights only.

        Scores have the memory layout of their parameters. Nothing is changed if a score is NaN.
        """
        chosen: dict[str, Tensor] = {}
        # Under an n:m pattern what is counted are dense layers.
        counted = self.pattern if self.fixed is None else "unstructured"
        for names, keep, pattern in (
            (list(budget.each), list(budget.each.values()), counted),
            (list(budget.pooled), budget.pool, counted if budget.pool is not None else self.pattern),
        ):
            if not names:
                continue
            ranked = [masks.parameter(n).detach() if scores is None else scores[n] for n in names]
            live = [masks.packed(n) for n in names] if nested else None
            chosen.update(zip(names, topk_mask(ranked, keep, pattern=pattern, candidates=live), strict=True))
        for name, packed in chosen.items():
            masks.set_packed(name, packed)

    @torch.no_grad()
    def select_nested(
        self, targets: Sequence[tuple[MaskSet, Budget]], scores: Mapping[str, Tensor], hint: Tensor | None = None
    ) -> None:
        """`select` for several sets of masks by the same scores, which are read once where one ranking is global.

        `hint` as in `topk_nested`.
        """
        pooled = targets[0][1].pooled
        found: list[list[Tensor]] = [[] for _ in targets]
        if pooled:
            pools = [budget.pool for _, budget in targets]
            found = topk_nested([scores[n] for n in pooled], pools, pattern=self.pattern, hint=hint)
        for (masks, budget), chosen in zip(targets, found, strict=True):
            self.select(masks, Budget(budget.each), scores)
            for name, packed in zip(pooled, chosen, strict=True):
                masks.set_packed(name, packed)

    def live(self, masks: MaskSet, name: str) -> int:
        """How many groups of that weight are live; its blocks are live as a whole."""
        if self.pattern == "unstructured":
            return int(count_live(masks.packed(name)))
        mask = masks.bool(name)
        return int((mask[::4] if self.pattern == "4x1" else mask[:, ::4]).sum())

    def random(self, masks: MaskSet, seed: int, draw: int) -> dict[str, Tensor]:
        """Uniform random scores, equal within a block; the same on every device for one (`seed`, `draw`)."""
        # Not the stream of torch.manual_seed(seed): that has made the weights of many a model, and by the same numbers
        # "random" masks would keep its positive weights.
        generator = torch.Generator().manual_seed((_STREAM + seed * 1_000_003 + draw) % 2**63)
        found = {}
        for name, shape in self.shapes.items():
            blocks = list(shape)
            axis = {"unstructured": None, "4x1": 0}.get(self.pattern, 1)
            if axis is not None:
                blocks[axis] = -(-shape[axis] // 4)
            values = torch.rand(blocks, generator=generator)
            if axis is not None:
                values = values.repeat_interleave(4, axis).narrow(axis, 0, shape[axis])
            found[name] = torch.empty_like(masks.parameter(name), dtype=torch.float32).copy_(values)
        return found


def planned_masks(
    model: nn.Module,
    sparsity: float,
    *,
    pattern: str = "unstructured",
    distribution: str = "global",
    layer_sparsity: Mapping[str, float] | None = None,
    include: Sequence[str] = (".*",),
    exclude: Sequence[str] = (),
) -> MaskSet:
    """The masks that a method would choose by the present weights; the model stays as it is. Arguments as there."""
    allocation = Allocation(pattern, distribution, layer_sparsity)
    masks = MaskSet(prunable_weights(model, include, exclude))
    allocation.bind(model, masks)
    allocation.select(masks, allocation.budget(sparsity))
    return masks
