"""Methods whose forward weight is computed from the stored one: how it gets into the layers, and out again.

A layer's weight stays the same Parameter under the same name and keeps dense values (the store). For the duration of a
layer's forward pass a pre-hook shadows it by the effective weight, which autograd connects to the store; a hook that
also runs after an exception takes the shadow away. So parameters, optimizers, state dicts and shared weights see
nothing of it. `finalize` writes the effective weights into the store and leaves a plain module.

The shadow is one tensor per weight, kept from step to step: fresh memory for a whole model in each step would cost as
much as all the arithmetic. It is computed anew in every forward pass, so no way of changing a weight is missed; all
those of a model at once as its pass begins, for one call over them takes two thirds of the time of one call for each
layer. To autograd it is what a parameter is: a backward pass that comes after a change of the weight raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.masks import MaskSet
from sparsekern.methods.base import Sparsifier
from sparsekern.methods.layer_calls import combine_layers
from sparsekern.methods.memory import Memory
from sparsekern.methods.swap import Swap, WholePass
from sparsekern.ops import unpack_mask
from sparsekern.ops.masked_combine import launch as combine
from sparsekern.ops.operands import as_layout, write_back
from sparsekern.optim import MaskedSGD


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(weight: Tensor, value: Tensor) -> Tensor:
    """`value` forward; backward, its gradient goes to `weight` as it is. Both of one shape."""
    return _StraightThrough.apply(weight, value)


@dataclass
class _Shadow:
    """The effective weight of one parameter, in memory of its own."""

    value: Tensor
    """What layers compute with and autograd saves."""
    written: Tensor
    """The same memory with a version counter of its own."""
    cause: Any = None
    """What `value` followed from when its version counter last moved."""


class EffectiveSparsifier(Sparsifier):
    """A method with a dense store: the forward weight of a layer is `effective(name, stored weight)`.

    Models copied while attached (averages of weights, for example) compute their forward weights by the same masks.
    `masks` says which effective weights are live. Weights and momentum of the others are not zero in the store.

    A subclass implements `effective` and `_begin`. `effective` runs inside torch.compile: what changes from step to
    step must reach it as tensors. `_fill` and `_connect` may compute the same in fewer passes, without a graph.
    """

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight that layers use in place of `weight`, connected to it by autograd."""
        raise NotImplementedError

    def _fill(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Write the value of each `effective(name, weight)` into its `out`, laid out as `weight`; no gradients here.

        All are on one device.
        """
        for name, weight, out in zip(names, weights, outs, strict=True):
            out.copy_(self.effective(name, weight))

    def _connect(self, name: str, weight: Tensor, value: Tensor) -> Tensor:
        """`value`, which `_fill` wrote, with the gradient of `effective`."""
        return straight_through(weight, value)

    def _cause(self, name: str) -> Any:
        """What the effective weight follows from beside the weight."""
        return self.masks.generation

    def shadow(self, name: str, weight: Tensor) -> Tensor:
        """As `effective`, in memory that is used again in the next forward pass."""
        of_copy = weight is not self.masks.parameter(name)  # of the model
        if of_copy:
            return self.effective(name, weight)
        found = self._shadows.get(name)
        # What `begin_pass` computed serves the first use in that pass.
        if found is None or self._ready.pop(name, None) != self._seen(name, weight):
            (found,) = self._compute([name], [weight])
        self._used.add(name)
        connected = torch.is_grad_enabled() and weight.requires_grad
        return self._connect(name, weight, found.value) if connected else found.value

    def _seen(self, name: str, weight: Tensor) -> Any:
        """What can be seen of all that the effective weight follows from."""
        return weight._version, weight.data_ptr(), self._cause(name)

    def _compute(self, names: Sequence[str], weights: Sequence[Tensor]) -> list[_Shadow]:
        """Bring the shadows of these parameters, which are on one device, up to date."""
        found = []
        for name, weight in zip(names, weights, strict=True):
            value, known = self.memory.own(name, weight), self._shadows.get(name)
            if known is None or known.value is not value:
                known = self._shadows[name] = _Shadow(value, value.data)
            found.append(known)
        with torch.no_grad():
            self._fill(names, [w.detach() for w in weights], [f.written for f in found])
        causes = list(map(self._seen, names, weights))
        changed = [(f, cause) for f, cause in zip(found, causes, strict=True) if f.cause != cause]
        torch.autograd.graph.increment_version([f.value for f, _ in changed])
        for each, cause in changed:
            each.cause = cause
        return found

    def begin_pass(self) -> None:
        """Compute what the last forward pass of the model used. On a GPU layers do not wait for their own calls."""
        names = [n for n in self.masks if n in self._used and self.masks.parameter(n).device.type == "cpu"]
        weights = [self.masks.parameter(n) for n in names]
        if names:
            self._compute(names, weights)
        self._ready = dict(zip(names, map(self._seen, names, weights), strict=True))
        self._used.clear()

    def end_pass(self) -> None:
        """From now on each layer computes its own again: what it finds could be stale."""
        self._ready.clear()

    def needs_dense_gradient(self) -> bool:
        return True

    def _start(self) -> None:
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and self.masks.name_of(module.out_proj.weight):
                raise ValueError(
                    f"exclude: must cover {path}.out_proj.weight, whose layer is never called by torch's "
                    f"MultiheadAttention, so {type(self).__name__} cannot replace its weight"
                )
        self._shadows: dict[str, _Shadow] = {}
        self._ready: dict[str, Any] = {}  # weights that were computed as this pass began, as `_seen` then
        self._used: set[str] = set()  # since the pass before began
        self.memory = Memory()
        self._begin()
        self._refresh_kept()

    def _begin(self) -> None:
        """Choose the first masks and bring the weights into the form of the store; called by `_start`."""

    def _register(self) -> None:
        self._fused = False  # the optimizer updates the dense store and knows no masks
        super()._register()
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                name = None if parameter is None else self.masks.name_of(parameter)
                if name is not None:
                    self._handles += Swap(self, name, key).register(module, prepend=True)
        # Last, so that it sees what other hooks of the model change.
        self._handles += WholePass(self).register(self.model, prepend=False)

    def _decay_in_step(self, inside: float, outside: float) -> bool:
        """Have the optimizer add to its weight decay: `inside` where `masks` keep, `outside` elsewhere.

        False if it is another than MaskedSGD: then gradients must get it before the step, in a pass of their own.
        """
        if isinstance(self.optimizer, MaskedSGD) and (inside or outside):
            self.optimizer.set_inner_decay(self.masks, inside, outside)
        return isinstance(self.optimizer, MaskedSGD)

    def _hold_zero(self) -> None:
        """Nothing: the store is dense."""

    def _refresh_kept(self) -> None:
        """Fetch the masks; a compiled forward pass must not look at a MaskSet, whose counters would recompile it."""
        self._bits = {name: (self.masks.parameter(name).stride(), self.masks.packed(name)) for name in self.masks}

    def kept(self, name: str, weight: Tensor) -> Tensor:
        """The mask of `name` as a bool tensor on the device of `weight`, for formulas of single layers."""
        strides, packed = self._bits[name]
        stored = torch.empty_strided(weight.shape, strides, dtype=torch.bool, device=packed.device)
        return to_device(unpack_mask(packed, stored), weight)

    def masked(self, name: str, weight: Tensor) -> Tensor:
        """`weight` with zeros where the mask says so, by selection; its gradient passes straight through."""
        return straight_through(weight, torch.where(self.kept(name, weight), weight.detach(), 0))

    def _packed_as(self, name: str, weight: Tensor) -> Tensor:
        """The mask in the order of `weight`, whose layout or device may have changed since the forward pass before."""
        strides, packed = self._bits[name]
        return packed if strides == weight.stride() and packed.device == weight.device else self.masks.packed(name)

    def _fill_masked(self, names: Sequence[str], weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """`_fill` for the value of `masked`."""
        combine_layers(outs, weights, [], list(map(self._packed_as, names, weights)), live=(1.0, 0.0))

    def _sync_masks(self) -> None:
        """Make `masks` agree with the effective weights, for methods in which they follow from them."""

    def forward_masks(self) -> MaskSet:
        self._sync_masks()
        return self.masks

    @torch.no_grad()
    def forward_weights(self) -> dict[str, Tensor]:
        return {name: self.effective(name, weight).detach() for name, weight in super().forward_weights().items()}

    def layers(self) -> str:
        self._sync_masks()
        return super().layers()

    def state_dict(self) -> dict[str, Any]:
        self._check_attached()
        self._sync_masks()
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._refresh_kept()

    def _masked_gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, weight, its gradient) of every prunable weight that has one."""
        for name in self.masks:
            weight = self.masks.parameter(name)
            if weight.grad is not None:
                yield name, weight, weight.grad

    def _gradients(self) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, weights and gradients of every prunable weight that has a gradient."""
        found = list(self._masked_gradients())
        return [n for n, _, _ in found], [w for _, w, _ in found], [g for _, _, g in found]

    def _combine(
        self,
        outputs: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        masks: MaskSet,
        names: Sequence[str],
        scaled: bool = False,
        within: MaskSet | None = None,
        **factors: tuple[float, float],
    ) -> None:
        """masked_combine_ on tensors of the weights `names`; `scaled`: terms of `second` times the loss scale."""
        scale = getattr(self.optimizer, "grad_scale", None) if scaled else None
        by_device: dict[torch.device, list[int]] = {}
        for i, out in enumerate(outputs):
            by_device.setdefault(out.device, []).append(i)
        for device, chosen in by_device.items():
            # A gradient need not lie as its weight does, in whose order the mask is.
            laid = [as_layout(outputs[i], masks.parameter(names[i])) for i in chosen]
            combine(  # unchecked: all of these are made to fit
                laid, laid if first is outputs else [first[i] for i in chosen], [second[i] for i in chosen if second],
                [], [masks.packed(names[i]) for i in chosen], scale=None if scale is None else scale.to(device),
                within=[] if within is None else [within.packed(names[i]) for i in chosen], **factors,
            )  # fmt: skip
            write_back([outputs[i] for i in chosen], laid)

    def _scaled(self, value: Tensor) -> Tensor:
        """`value` times the loss scale, if the optimizer is still to divide its gradients by it."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return value if scale is None else value * scale.to(value.device, value.dtype)

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Write the effective weights into the model and detach; returns the model, plain and sparse."""
        self._check_attached()
        self._sync_masks()
        for name in self.masks:
            parameter = self.masks.parameter(name)
            parameter.copy_(self.effective(name, parameter))
        self._shadows, self._ready, self.memory = {}, {}, Memory()
        if isinstance(self.optimizer, MaskedSGD):
            self.optimizer.set_inner_decay(None)
        return super().finalize()


def to_device(value: Tensor, weight: Tensor) -> Tensor:
    """`value` on the device of `weight`, which may have moved since."""
    return value if value.device == weight.device else value.to(weight.device)


def only_unstructured(pattern: str, why: str) -> None:
    """Refuse every other pattern with the reason."""
    if pattern != "unstructured":
        raise ValueError(f"pattern must be 'unstructured', got {pattern!r}: {why}")
