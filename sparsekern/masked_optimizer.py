"""What optimizers that keep pruned weights at exactly zero share: masks, state, one kernel call a step and device."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern._library import zeros_like
from sparsekern.masks import MaskSet
from sparsekern.ops.operands import as_layout, check_operands, is_dense, launch, launch_any_layout, same_layout


@dataclass
class Bucket:
    """The parameters of one group on one device that have gradients, and all that lasts from step to step."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    names: tuple[str, ...]
    """Keys of the states' tensors that are shaped as the parameters."""
    counts: Tensor
    """On the device, one entry per parameter: what the kernel itself has to count."""
    tensors: list[Tensor] = field(default_factory=list)
    """The parameters, then their state, when all of it was checked; then they lay at `addresses`."""
    addresses: list[int] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    """Of the parameters, likewise."""
    plain: bool = False
    """No parameter has holes in its memory."""
    masks: list[Tensor | None] = field(default_factory=list)
    mask_key: tuple[MaskSet | None, int] = (None, 0)
    watched: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    """Each masked parameter: its index, and it with its state."""
    versions: list[list[int]] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)
    """One flag per parameter: what is pruned of it was zero when the version counters stood at `versions`."""
    surely_stepped: bool = False
    """A step was taken that no found_inf can have stopped."""

    def buffers(self) -> list[list[Tensor]]:
        """The tensors of each name, made where missing."""
        found = []
        for name in self.names:
            each = [state.get(name) for state in self.states]
            for i, buffer in enumerate(each):
                if buffer is None:
                    each[i] = self.states[i][name] = zeros_like(self.params[i])
            found.append(each)
        return found

    def moved(self, tensors: list[Tensor]) -> bool:
        """Whether a parameter or its state was replaced, moved or laid out anew since `settle`."""
        return (
            len(tensors) != len(self.tensors)
            or not all(map(operator.is_, tensors, self.tensors))
            or list(map(Tensor.data_ptr, tensors)) != self.addresses
            or list(map(Tensor.stride, self.params)) != self.strides
        )

    def settle(self, tensors: list[Tensor]) -> None:
        """All operands were checked and lie as they should."""
        self.tensors, self.addresses = tensors, list(map(Tensor.data_ptr, tensors))
        self.strides = list(map(Tensor.stride, self.params))
        self.plain = all(map(is_dense, self.params))

    def align(self) -> list[list[Tensor]]:
        """As `buffers`, with those of parameters that were moved, cast or laid out anew following them."""
        for name in self.names:
            for p, state in zip(self.params, self.states, strict=True):
                buffer = state[name]
                if buffer.shape != p.shape:
                    raise ValueError(
                        f"{name} of a parameter of shape {tuple(p.shape)} must have that shape, "
                        f"got {tuple(buffer.shape)}"
                    )
                if buffer.dtype != p.dtype or buffer.device != p.device or not same_layout(buffer, p):
                    state[name] = torch.empty_like(p).copy_(buffer)
        return self.buffers()

    def follow_masks(self, masks: MaskSet, buffers: list[list[Tensor]], moved: bool) -> None:
        """Fetch the packed masks if they or the parameters' layouts changed; what they leave as it was stays `zero`."""
        if not moved and self.mask_key[0] is masks and self.mask_key[1] == masks.generation:
            return
        before, known = self.masks, [] if moved else self.known_zero()
        self.masks = [masks.packed_for(p) for p in self.params]
        self.zero = [int(z and a is b) for z, a, b in zip(known, before, self.masks, strict=True)] if known else []
        both = zip(self.params, *buffers, strict=True)
        self.watched = [(i, list(own)) for i, own in enumerate(both) if self.masks[i] is not None]
        self.versions, self.mask_key = self._versions(), (masks, masks.generation)

    def known_zero(self) -> list[int]:
        """`zero`, cleared where somebody else wrote since the last step; empty if all are cleared."""
        if not any(self.zero):
            return []
        now = self._versions()
        if now != self.versions:
            for (i, _), a, b in zip(self.watched, now, self.versions, strict=True):
                self.zero[i] &= a == b
        return self.zero

    def note(self, known: list[int], real: bool) -> None:
        """After a step: a real one leaves every pruned entry zero, a skipped one leaves all as it was."""
        self.zero = [int(m is not None) for m in self.masks] if real else known
        self.versions = self._versions()

    def _versions(self) -> list[list[int]]:
        return [[t._version for t in own] for _, own in self.watched]


def check_hyper(**values: float | Tensor) -> None:
    """ValueError unless each is one number and at least 0."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        if not float(value) >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


class MaskedOptimizer(torch.optim.Optimizer):
    """Base of MaskedSGD and MaskedAdamW: a subclass names its operator, its state and its hyper-parameters."""

    _step_supports_amp_scaling = True  # GradScaler then hands over its scale and found_inf instead of reading them
    _op: Any
    """The operator, called as (params, grads, *buffers, masks, counts, **hyper)."""
    _count_name: str
    _count_dtype: torch.dtype

    def __init__(self, params, defaults: dict[str, Any], masks: MaskSet | Mapping[Tensor, Tensor] | None):
        if defaults["differentiable"]:
            raise ValueError("differentiable must be False: the fused step has no autograd formula")
        self._forget()
        super().__init__(params, defaults)
        self.set_masks({} if masks is None else masks)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Keys of the state that a group's parameters have."""
        raise NotImplementedError

    def _counts(self, params: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        """The bucket's `counts`, from what is known of its parameters."""
        raise NotImplementedError

    def _place_counts(self, bucket: Bucket) -> None:
        """`bucket.counts` is new, or moved to another device."""

    def _hyper(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        """The operator's keyword arguments for these parameters."""
        raise NotImplementedError

    def _keeps_zero(self) -> bool:
        """Whether a step leaves all that is pruned zero."""
        return True

    def _forget(self) -> None:
        # Group index -> (parameters with gradients, names of their state, buckets).
        self._plans: dict[int, tuple[list[Tensor], tuple[str, ...], list[Bucket]]] = {}
        self._seen_state: tuple[Any, int] = (None, 0)

    def set_masks(self, masks: MaskSet | Mapping[Tensor, Tensor]) -> None:
        """Replace all masks; pruned weights become zero at the next step that gives them a gradient."""
        if not isinstance(masks, MaskSet):
            known = {p for group in self.param_groups for p in group["params"]}
            for param in masks:
                if not isinstance(param, Tensor) or param not in known:
                    what = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, Tensor) else repr(param)
                    raise ValueError(f"masks: {what} is no parameter of this optimizer")
            chosen = MaskSet({str(i): param for i, param in enumerate(masks)})
            for i, mask in enumerate(masks.values()):
                chosen.set(str(i), mask)
            masks = chosen
        self.masks = masks
        for _, _, buckets in self._plans.values():
            for bucket in buckets:
                bucket.zero = []

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for bucket in self._buckets(index, group):
                grads = [p.grad for p in bucket.params]
                if any(g.is_sparse for g in grads):
                    shapes = [tuple(p.shape) for p, g in zip(bucket.params, grads, strict=True) if g.is_sparse]
                    raise RuntimeError(f"gradient of a parameter of shape {shapes[0]} is sparse; use a dense one")
                self._step_bucket(group, bucket, grads)
        self._seen_state = (self.state, len(self.state))
        return loss

    def _buckets(self, index: int, group: dict[str, Any]) -> list[Bucket]:
        """The buckets of a group, kept as long as the same parameters have gradients and nobody replaced the state."""
        active = [p for p in group["params"] if p.grad is not None]
        names = self._state_names(group)
        if self._seen_state[0] is not self.state or self._seen_state[1] != len(self.state):
            self._retire()
        plan = self._plans.get(index)
        if (
            plan is None
            or len(plan[0]) != len(active)
            or plan[1] != names
            or not all(map(operator.is_, plan[0], active))
        ):
            self._retire(index)
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in active:
                by_device.setdefault(p.device, []).append(p)
            plan = active, names, [self._bucket(params, names) for params in by_device.values()]
            self._plans[index] = plan
            self._seen_state = (self.state, len(self.state))
        return plan[2]

    def _bucket(self, params: list[Tensor], names: tuple[str, ...]) -> Bucket:
        states = [self.state[p] for p in params] if names else [{} for _ in params]
        bucket = Bucket(params, states, names, self._counts(params, states).to(params[0].device))
        self._place_counts(bucket)
        return bucket

    def _retire(self, index: int | None = None) -> None:
        """Drop the buckets of one group or of all."""
        for i in list(self._plans) if index is None else [index]:
            for bucket in self._plans.pop(i, ([], (), []))[2]:
                self._retired(bucket)

    def _retired(self, bucket: Bucket) -> None:
        """The bucket is dropped; save what only it knows."""

    def _step_bucket(self, group: dict[str, Any], bucket: Bucket, grads: list[Tensor]) -> None:
        params = bucket.params
        hyper = self._hyper(group, params)
        if params[0].device != bucket.counts.device:  # the whole model was moved
            bucket.counts = bucket.counts.to(params[0].device)
            self._place_counts(bucket)
        buffers = bucket.buffers()
        scale, found_inf = (
            None if t is None else t.to(bucket.counts.device)
            for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        moved = bucket.moved([*params, *itertools.chain(*buffers)])
        if moved:
            buffers = bucket.align()
        bucket.follow_masks(self.masks, buffers, moved)
        if moved:
            counts = self._count_name, bucket.counts, self._count_dtype
            named = dict(zip(bucket.names, buffers, strict=True))
            check_operands(params, grads, named, bucket.masks, counts, scale, found_inf)
            bucket.settle([*params, *itertools.chain(*buffers)])
        known = bucket.known_zero() if self._keeps_zero() else []
        hyper |= dict(grad_scale=scale, found_inf=found_inf, known_zero=known)
        # Strides are compared here first, because a call for each gradient would cost as much as the rest.
        if bucket.plain and list(map(Tensor.stride, grads)) != bucket.strides:
            grads = list(map(as_layout, grads, params))
        run = launch if bucket.plain else launch_any_layout
        run(self._op, params, grads, self._operands(buffers), bucket.masks, bucket.counts, **hyper)
        # On a CPU reading found_inf waits for nothing; elsewhere it is left unread and nothing is claimed.
        real = found_inf is None or (found_inf.device.type == "cpu" and not found_inf.item())
        bucket.surely_stepped = bucket.surely_stepped or found_inf is None
        bucket.note(known, real and self._keeps_zero())

    def _operands(self, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
        """`buffers` as the operator takes them."""
        return buffers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; masks are found by parameter, so a MaskSet may hold the new ones already."""
        self._retire()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "masks": self.masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # a checkpoint of an older torch.optim has fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
