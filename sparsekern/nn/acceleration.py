"""Puts the layers of a model on the sparse kernels while their masks are sparse, and takes them off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.masks import MaskSet
from sparsekern.methods.attached import sparsifier_of
from sparsekern.methods.base import Sparsifier
from sparsekern.nn.layers import groups_of, run_sparse, structure_of, supported, why_dense
from sparsekern.nn.normalisation import FastBatchNorm, accelerate_norms
from sparsekern.nn.roofline import predicted_speeds
from sparsekern.nn.swapping import STATE, Swapped, restore, states, swap
from sparsekern.nn.timing import Speeds, measured_speeds
from sparsekern.ops import SparseStructure, fallbacks

Choice = Callable[[nn.Module, SparseStructure, Tensor], bool | Speeds]
"""(layer, structure of its mask, input) -> whether the sparse operator shall run it. Called once per layer, size of
input and mask, so it may take as long as a few runs of the layer."""

# A decision outlives a new mask as long as the number of kept weights moves by less than this share.
_SAME_SIZE = 0.1


@dataclass
class _Layer:
    """What an accelerated module knows beyond what it was before."""

    name: str
    masks: MaskSet
    mask_name: str
    choose: Choice
    sparsifier: Sparsifier | None
    version: int | None = None
    structure: SparseStructure | None = None
    decided_for: tuple[str, int] = ("", 0)
    decisions: dict[tuple[Any, ...], bool | Speeds] = field(default_factory=dict)
    last: str = "dense: not run yet"

    def structure_for(self, module: nn.Module, input: Tensor) -> SparseStructure | None:
        """The structure to run this call with, or None for dense; remembers why."""
        reason = self._why_method_runs_dense(module)
        if reason is None:
            self._follow_mask(module)
            reason = "mask keeps every weight" if self.structure is None else why_dense(module, input)
        decision = self._decide(module, input) if reason is None else False
        speeds = f", {decision}" if isinstance(decision, Speeds) else ""
        if reason is None and not decision:
            reason = f"is as fast or faster{speeds}"
        self.last = f"dense: {reason}" if reason else f"sparse {self.structure.layout}{speeds}"
        if not reason:
            fallbacks.forget(self.structure.tensors)
        return None if reason else self.structure

    def _why_method_runs_dense(self, module: nn.Module) -> str | None:
        if self.sparsifier is None:
            return None
        if not self.sparsifier.masks_are_current():
            return "the method's masks are not those of the forward pass"
        learns = torch.is_grad_enabled() and module.weight.requires_grad
        if learns and self.sparsifier.needs_dense_gradient():
            return "the method reads the gradient of pruned weights"
        return None

    def how(self) -> str:
        """How the last pass ran: what was meant, and what the operators made of it."""
        if not self.last.startswith("sparse"):
            return self.last
        text = self.last
        for name, why in fallbacks.noted(self.structure.tensors).items():
            _, backward, part = name.partition("_backward")
            if not backward:
                return f"dense: {why}"
            text += f", backward{part} dense: {why}"
        return text

    def _follow_mask(self, module: nn.Module) -> None:
        version, device = self.masks.version(self.mask_name), module.weight.device
        moved = self.structure is not None and self.structure.tensors[0].device != device
        if version == self.version and not moved:
            return
        with torch.no_grad():
            mask = self.masks.bool(self.mask_name).to(device)
            self.structure, self.version = structure_of(mask, groups_of(module)), version
        if self.structure is not None:
            layout, kept = self.structure.layout, self.structure.kept
            if moved or layout != self.decided_for[0] or abs(kept - self.decided_for[1]) > _SAME_SIZE * kept:
                self.decided_for = (layout, kept)
                self.decisions.clear()

    def _decide(self, module: nn.Module, input: Tensor) -> bool | Speeds:
        last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        grads = (input.requires_grad, module.weight.requires_grad) if torch.is_grad_enabled() else ()
        # Sizes within a factor of two share a decision, or a model with inputs of many lengths would never stop.
        key = (input.numel().bit_length(), input.dtype, last, grads)
        if key in self.decisions:
            return self.decisions[key]
        decision = self.choose(module, self.structure, input)
        # What was predicted for want of a measurement gives way to the first one.
        if self.choose is not measured_or_predicted or not getattr(decision, "predicted", False):
            self.decisions[key] = decision
        return decision


def measured_or_predicted(module: nn.Module, structure: SparseStructure, input: Tensor) -> bool | Speeds:
    """`measured_speeds`; `predicted_speeds` while a CUDA graph is captured, when nothing can be measured."""
    capturing = input.is_cuda and torch.cuda.is_current_stream_capturing()
    return (predicted_speeds if capturing else measured_speeds)(module, structure, input)


class _Accelerated(Swapped):
    """Mixed into the class of a layer."""

    def forward(self, input: Tensor) -> Tensor:
        # torch.compile sees the dense operator: a choice by measurement and a new mask would each recompile.
        # A meta input asks for shapes, and has nothing to measure.
        dense = torch.compiler.is_compiling() or input.is_meta or STATE not in vars(self)
        structure = None if dense else getattr(self, STATE).structure_for(self, input)
        if structure is None:
            return super().forward(input)
        return run_sparse(self, structure, input, self.weight, self.bias)


def accelerate(model: nn.Module, sparsifier_or_masks: Sparsifier | MaskSet, choose: Choice | None = None) -> nn.Module:
    """Run each masked Conv2d and Linear of `model` by `sparse_conv2d` / `sparse_linear` where that is faster.

    A layer runs sparse, forward and backward, while its mask has zeros and `choose` (default: one measurement per
    layer, size of input and mask; `predicted_speeds` while a CUDA graph is captured) says so; else it runs as before,
    in particular in dense phases, in steps in which the method reads the gradient of pruned weights, under autocast and
    inside torch.compile, under a method whose masks follow from weights that have moved since (STR, ST-3), and after
    its `finalize`. Pruned weights count as zero, which they are under MaskedSGD and every sparsifier, and their
    gradient is zero instead of unused. No second derivatives while a layer runs sparse. The `masks` of an attached
    sparsifier stand for it.

    Each BatchNorm2d in training runs on a compiled kernel where its input is contiguous float32 on CPU and not small,
    in one pass with the ReLU behind it in a Sequential, and with residual and ReLU in torchvision's ResNets.
    It runs as before where hooks want to see what lies between them, inside torch.compile and in torch.func.

    The modules stay the same objects with the same parameters, names and state dict; copies and pickles are plain.
    Layers outside the masks are left alone. `restore` undoes it; a second call replaces the first. Returns `model`.
    Raises TypeError for an argument of the wrong type, ValueError if the masks are of no layer of this model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sparsifier = sparsifier_or_masks if isinstance(sparsifier_or_masks, Sparsifier) else None
    masks = sparsifier_or_masks if sparsifier is None else getattr(sparsifier, "masks", None)
    if not isinstance(masks, MaskSet):
        raise TypeError(
            f"sparsifier_or_masks must be a MaskSet or an attached sparsifier, got {type(sparsifier_or_masks).__name__}"
        )
    chosen = [
        (name, module, masks.name_of(module.weight))
        for name, module in model.named_modules()
        if isinstance(module, _Accelerated) or supported(module)
    ]
    chosen = [entry for entry in chosen if entry[2] is not None]
    if not chosen:
        raise ValueError(f"sparsifier_or_masks must mask a Conv2d or Linear of the model, got masks of {list(masks)}")
    if sparsifier is None:
        owners = (sparsifier_of(masks.parameter(name)) for name in masks)
        sparsifier = next((owner for owner in owners if owner is not None and owner.masks is masks), None)
    restore(model)
    for name, module, mask_name in chosen:
        swap(module, _Accelerated, _Layer(name, masks, mask_name, choose or measured_or_predicted, sparsifier))
    accelerate_norms(model)
    return model


@dataclass(frozen=True)
class AccelerationReport:
    """What each accelerated layer did in its last forward pass: (name, "sparse 4x1" or "dense: why"), with the speeds
    that decided it if they were measured; and each batch-norm: (name, "compiled + residual + ReLU" or "torch: why")."""

    layers: tuple[tuple[str, str], ...]
    norms: tuple[tuple[str, str], ...] = ()

    @property
    def sparse(self) -> int:
        """How many layers ran sparse."""
        return sum(how.startswith("sparse") for _, how in self.layers)

    @property
    def share(self) -> float:
        """Share of the accelerated layers that ran sparse; 0.0 without any."""
        return self.sparse / len(self.layers) if self.layers else 0.0

    def __str__(self) -> str:
        lines = [f"{name or '(model)':40} {how}" for name, how in self.layers]
        lines.append(f"{self.sparse} of {len(self.layers)} layers ran on the sparse kernels")
        compiled, fused = (sum(word in how for _, how in self.norms) for word in ("compiled", "ReLU"))
        if self.norms:
            lines.append(f"{compiled} of {len(self.norms)} batch-norms ran on the compiled kernel, {fused} with a ReLU")
        return "\n".join(lines)


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """How the layers of an accelerated model ran last; empty for one that is not accelerated."""
    layers, norms = (states(model, mixin) for mixin in (_Accelerated, FastBatchNorm))
    return AccelerationReport(
        tuple((layer.name, layer.how()) for layer in layers), tuple((norm.name, norm.last) for norm in norms)
    )
