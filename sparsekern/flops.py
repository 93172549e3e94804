"""FLOPs of a model at a sparsity, counted as in RigL (google-research/rigl), and the table of a dry run.

Only convolutions and linear layers count, multiplications and additions each as one. A weight at one output position is
one of both; on top, every output is charged one addition of a bias, one multiplication for its ReLU, and one addition
less than its weights: per output 2 * kept weights + 1. The backward pass costs twice the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.masks import MaskSet, normalise

_COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerCost:
    """One weight tensor: its shape and at how many positions of the output, per sample, each of its weights works."""

    name: str
    shape: tuple[int, ...]
    positions: float

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def flops(self, kept: int) -> float:
        """Forward FLOPs per sample with `kept` weights."""
        return self.positions * (2 * kept + self.shape[0])


@torch.no_grad()
def layer_costs(model: nn.Module, *example: Any) -> list[LayerCost]:
    """The layers of the model in its order, with what they cost in `model(*example)`; one that runs twice costs twice.

    A layer that is not called costs nothing, also where its parent reads its weight, as nn.MultiheadAttention does.

    Nothing is computed: the model runs on meta tensors, which have shapes only, and is left as it was. The first
    dimension of the first tensor in `example` is the batch. Raises ValueError without a tensor or a batch, and
    RuntimeError for a model whose control flow depends on values.
    """
    batch = next((x.shape[0] for x in example if isinstance(x, Tensor) and x.dim()), 0)
    if not batch:
        raise ValueError("example must hold a tensor whose first dimension is a batch of at least 1")
    layers = {m: normalise(f"{n}.weight") for n, m in model.named_modules() if isinstance(m, _COUNTED)}
    first = {}
    for module, name in layers.items():
        first.setdefault(module.weight, name)
    positions = dict.fromkeys(first, 0.0)

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        positions[weights[module]] += output.numel() / (batch * module.weight.shape[0])

    weights = {module: module.weight for module in layers}
    training = [module for module in model.modules() if module.training]
    handles = [module.register_forward_hook(count) for module in layers]
    state = {n: t.to("meta") for n, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        model.eval()
        torch.func.functional_call(model, state, tuple(x.to("meta") if isinstance(x, Tensor) else x for x in example))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return [LayerCost(first[w], tuple(w.shape), p) for w, p in positions.items()]


def forward_flops(costs: Iterable[LayerCost], kept: Mapping[str, int] | None = None) -> float:
    """FLOPs of one forward pass per sample; a layer missing in `kept` has all its weights."""
    kept = kept or {}
    return sum(cost.flops(kept.get(cost.name, cost.weights)) for cost in costs)


def training_flops(spans: Iterable[tuple[int, float]]) -> float:
    """FLOPs of a run, per sample of a batch, from (steps, forward FLOPs) of each part; backward costs twice forward."""
    return sum(3 * steps * forward for steps, forward in spans)


def update_flops(sparse: float, dense: float) -> float:
    """FLOPs per sample of a step whose weight gradient is dense and all else sparse, as google-research/rigl counts."""
    return 2 * sparse + dense


def rigl_training_flops(sparse: float, dense: float, every: int) -> float:
    """FLOPs per sample of an average step of RigL that updates every `every` steps, from the forward FLOPs."""
    return (training_flops([(every, sparse)]) + update_flops(sparse, dense)) / (every + 1)


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found; `str()` is the table."""

    layers: tuple[tuple[LayerCost, int], ...]
    """Each layer with its kept weights."""

    @property
    def dense(self) -> float:
        """Forward FLOPs per sample without masks."""
        return forward_flops(cost for cost, _ in self.layers)

    @property
    def sparse(self) -> float:
        """Forward FLOPs per sample with them."""
        return forward_flops((cost for cost, _ in self.layers), {cost.name: kept for cost, kept in self.layers})

    def __str__(self) -> str:
        total, kept = sum(cost.weights for cost, _ in self.layers), sum(kept for _, kept in self.layers)
        rows = [f"{'layer':40} {'shape':>18} {'density':>8} {'kept':>12} {'FLOPs':>16} {'dense FLOPs':>16}"]
        rows += [
            _row(cost.name, "x".join(map(str, cost.shape)), cost.weights, count, cost.flops(count),
                 cost.flops(cost.weights))
            for cost, count in self.layers
        ]  # fmt: skip
        rows.append(_row("total", f"{total:,}", total, kept, self.sparse, self.dense))
        ratio = self.sparse / self.dense if self.dense else 1.0
        rows.append(f"inference {ratio:.4f} of dense; training at these masks {3 * self.sparse:,.0f} FLOPs a sample")
        return "\n".join(rows)


def _row(name: str, shape: str, weights: int, kept: int, flops: float, dense: float) -> str:
    return f"{name:40} {shape:>18} {kept / max(weights, 1):8.4f} {kept:12,} {flops:16,.0f} {dense:16,.0f}"


def dry_run(model: nn.Module, masks: MaskSet | Mapping[str, int], *example: Any) -> DryRun:
    """Every layer with shape, density, kept weights and FLOPs, for masks or for kept counts by name.

    For the masks of an attached method pass `sparsifier.masks`; the distributions of `sparsekern.distributions` return
    counts. A layer missing in `masks` is dense. Raises ValueError for a name that is no layer of the model.
    """
    costs = layer_costs(model, *example)
    kept = {n: int(masks.bool(n).sum()) for n in masks} if isinstance(masks, MaskSet) else dict(masks)
    unknown = sorted(set(kept) - {normalise(f"{n}.weight") for n, _ in model.named_modules()})
    if unknown:
        raise ValueError(f"masks: {unknown} are no layers of the model; known are {[cost.name for cost in costs]}")
    return DryRun(tuple((cost, kept.get(cost.name, cost.weights)) for cost in costs))
