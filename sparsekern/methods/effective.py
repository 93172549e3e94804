"""Methods whose forward weight is computed from the stored one: how it gets into the layers, and out again.

A layer's weight stays the same Parameter under the same name and keeps dense values (the store). For the duration of a
layer's forward pass a pre-hook shadows it by the effective weight, which autograd connects to the store; a hook that
also runs after an exception takes the shadow away. So parameters, optimizers, state dicts and shared weights see
nothing of it. `finalize` writes the effective weights into the store and leaves a plain module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.masks import MaskSet
from sparsekern.methods.base import Sparsifier


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(weight: Tensor, value: Tensor) -> Tensor:
    """`value` forward; backward, its gradient goes to `weight` as it is. Both of one shape."""
    return _StraightThrough.apply(weight, value)


class _Swap:
    """The two hooks of one weight of one layer. A copied model shares it, so it runs sparse as the original does."""

    def __init__(self, sparsifier: EffectiveSparsifier, name: str, key: str):
        self.sparsifier, self.name, self.key = sparsifier, name, key

    def enter(self, module: nn.Module, _: Any) -> None:
        # The instance dictionary comes before nn.Module's look-up of parameters and is no part of the state dict.
        module.__dict__[self.key] = self.sparsifier.effective(self.name, module._parameters[self.key])

    def leave(self, module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(self.key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Swap:
        return self

    def __reduce__(self):
        raise TypeError(
            "model: cannot be pickled while a sparsifier is attached that computes its forward weights; save its "
            "state_dict() and the sparsifier's, or call finalize() first"
        )


class EffectiveSparsifier(Sparsifier):
    """A method with a dense store: the forward weight of a layer is `effective(name, stored weight)`.

    Models copied while attached (averages of weights, for example) compute their forward weights by the same masks.
    `masks` says which effective weights are live. Weights and momentum of the others are not zero in the store.

    A subclass implements `effective` and `_begin`. `effective` runs inside torch.compile: what changes from step to
    step must reach it as tensors.
    """

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight that layers use in place of `weight`, connected to it by autograd."""
        raise NotImplementedError

    def needs_dense_gradient(self) -> bool:
        return True

    def _start(self) -> None:
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and self.masks.name_of(module.out_proj.weight):
                raise ValueError(
                    f"exclude: must cover {path}.out_proj.weight, whose layer is never called by torch's "
                    f"MultiheadAttention, so {type(self).__name__} cannot replace its weight"
                )
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
                    swap = _Swap(self, name, key)
                    self._handles.append(module.register_forward_pre_hook(swap.enter, prepend=True))
                    self._handles.append(module.register_forward_hook(swap.leave, prepend=True, always_call=True))

    def _hold_zero(self) -> None:
        """Nothing: the store is dense."""

    def _refresh_kept(self) -> None:
        """Unpack the masks; the forward pass must not look at a MaskSet, whose counters would recompile it."""
        self._kept = {name: self.masks.bool(name) for name in self.masks}

    def kept(self, name: str, weight: Tensor) -> Tensor:
        """The mask of `name` as a bool tensor on the device of `weight`."""
        return to_device(self._kept[name], weight)

    def masked(self, name: str, weight: Tensor) -> Tensor:
        """`weight` with zeros where the mask says so, by selection; its gradient passes straight through."""
        return straight_through(weight, torch.where(self.kept(name, weight), weight.detach(), 0))

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
        return super().finalize()


def to_device(value: Tensor, weight: Tensor) -> Tensor:
    """`value` on the device of `weight`, which may have moved since."""
    return value if value.device == weight.device else value.to(weight.device)


def only_unstructured(pattern: str, why: str) -> None:
    """Refuse every other pattern with the reason."""
    if pattern != "unstructured":
        raise ValueError(f"pattern must be 'unstructured', got {pattern!r}: {why}")
