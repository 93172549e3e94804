"""Optimizers that keep pruned weights at exactly zero, with one kernel call a step."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern.masks import MaskSet
from sparsekern.ops.masked_sgd import as_layout, check_tensors, is_dense, launch, masked_sgd_, same_layout


@dataclass
class _Bucket:
    """The parameters of one group on one device that have gradients, and all that lasts from step to step."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    fresh: Tensor
    """On the device: 1 until the first real step. Only the kernel knows whether GradScaler's step was one."""
    maybe_fresh: bool
    layout: list[Any] | None = None
    """What was checked: address, strides and type of each parameter and its momentum."""
    plain: bool = False
    """No parameter has holes in its memory."""
    masks: list[Tensor | None] = field(default_factory=list)
    mask_key: tuple[MaskSet | None, int] = (None, 0)
    versions: list[tuple[int, int]] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)
    """Pruned weights and momentum were zero when version counters stood at `versions`."""

    def momentum(self) -> list[Tensor]:
        """The momentum buffers, made where missing."""
        buffers = []
        for p, state in zip(self.params, self.states, strict=True):
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(buffer)
        return buffers

    def align(self) -> list[Tensor]:
        """As `momentum`, with the buffers of parameters that were moved, cast or laid out anew following them."""
        for p, state in zip(self.params, self.states, strict=True):
            buffer = state["momentum_buffer"]
            if buffer.shape != p.shape:
                raise ValueError(
                    f"momentum_buffer of a parameter of shape {tuple(p.shape)} must have that shape, "
                    f"got {tuple(buffer.shape)}"
                )
            if buffer.dtype != p.dtype or buffer.device != p.device or not same_layout(buffer, p):
                state["momentum_buffer"] = torch.empty_like(p).copy_(buffer)
        return self.momentum()

    def follow_masks(self, masks: MaskSet, moved: bool) -> None:
        """Fetch the packed masks if they or the parameters' layouts changed; what they leave as it was stays `zero`."""
        if not moved and self.mask_key[0] is masks and self.mask_key[1] == masks.generation:
            return
        before, self.masks = self.masks or [None] * len(self.params), [masks.packed_for(p) for p in self.params]
        if self.zero:
            both = zip(self.zero, before, self.masks, strict=True)
            self.zero = [] if moved else [int(z and b is m) for z, b, m in both]
        self.mask_key = masks, masks.generation

    def known_zero(self, momentum: list[Tensor]) -> list[int]:
        """One flag per parameter, cleared where somebody else wrote since the last step; empty if all are cleared."""
        if not any(self.zero):
            return []
        now = self._versions(momentum)
        return [int(z and v == w) for z, v, w in zip(self.zero, self.versions, now, strict=True)]

    def note(self, known: list[int], real: bool, momentum: list[Tensor]) -> None:
        """After a step: a real one leaves every pruned entry zero, a skipped one leaves all as it was."""
        self.zero = [int(m is not None) for m in self.masks] if real else known
        self.versions = self._versions(momentum)

    def _versions(self, momentum: list[Tensor]) -> list[tuple[int, int]]:
        both = zip(self.params, momentum or self.params, strict=True)
        return [(p._version, v._version) if zero else (0, 0) for zero, (p, v) in zip(self.zero, both, strict=False)]


def _layout(params: list[Tensor], momentum: list[Tensor]) -> list[Any]:
    return [(p.data_ptr(), p.stride(), p.dtype) for p in [*params, *momentum]]


class MaskedSGD(torch.optim.Optimizer):
    """torch.optim.SGD whose pruned weights and momentum stay exactly zero.

    `masks` is a MaskSet, which may change between steps, or maps parameters to bool tensors of their shape (True =
    keep); a parameter outside it is updated densely, and then this is torch.optim.SGD bit for bit (float32 and float64,
    on a CPU with AVX2). Masks are kept at one bit per weight, outside `state_dict`, which stays dense and loads into
    torch.optim.SGD and from it. `foreach` and `fused` are accepted and ignored. `momentum_policy` is described in
    `sparsekern.ops.masked_sgd`.

    Once a step has set the pruned entries of a parameter to zero, later steps may leave wholly pruned memory untouched.
    A write that autograd can see (any in-place operation, under no_grad too) ends that; one through `.data` cannot be
    seen: call `set_masks` or `MaskSet.apply` after writing pruned entries that way.

    Raises ValueError for a hyper-parameter out of range, for `differentiable=True`, for a mask that fits no
    parameter; RuntimeError for a sparse gradient.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over its scale and found_inf instead of reading them

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: MaskSet | Mapping[Tensor, Tensor] | None = None,
        momentum_policy: str = "mask",
    ):
        if differentiable:
            raise ValueError("differentiable must be False: the fused step has no autograd formula")
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
            if not float(value) >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {momentum} and {dampening}")
        if momentum_policy not in ("mask", "decay"):
            raise ValueError(f"momentum_policy must be 'mask' or 'decay', got {momentum_policy!r}")
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._forget()
        super().__init__(params, defaults)
        self.momentum_policy = momentum_policy
        self.set_masks({} if masks is None else masks)

    def _forget(self) -> None:
        # Group index -> (parameters with gradients, momentum used, buckets); flags of buckets that are gone.
        self._plans: dict[int, tuple[list[Tensor], bool, list[_Bucket]]] = {}
        self._fresh: dict[Tensor, Tensor] = {}
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
                self._step_bucket(group, bucket)
        self._seen_state = (self.state, len(self.state))
        return loss

    def _buckets(self, index: int, group: dict[str, Any]) -> list[_Bucket]:
        """The buckets of a group, kept as long as the same parameters have gradients and nobody replaced the state."""
        active = [p for p in group["params"] if p.grad is not None]
        buffered = group["momentum"] != 0
        if self._seen_state[0] is not self.state or self._seen_state[1] != len(self.state):
            self._retire()
        plan = self._plans.get(index)
        if (
            plan is None
            or len(plan[0]) != len(active)
            or plan[1] != buffered
            or not all(map(operator.is_, plan[0], active))
        ):
            self._retire(index)
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in active:
                by_device.setdefault(p.device, []).append(p)
            plan = active, buffered, [self._bucket(params, buffered) for params in by_device.values()]
            self._plans[index] = plan
            self._seen_state = (self.state, len(self.state))
        return plan[2]

    def _bucket(self, params: list[Tensor], buffered: bool) -> _Bucket:
        device = params[0].device
        states = [self.state[p] for p in params] if buffered else [{} for _ in params]
        new = [state.get("momentum_buffer") is None for state in states]
        fresh = torch.tensor(new, dtype=torch.uint8).to(device)
        waiting = [self._fresh.pop(p, None) for p in params] if self._fresh and buffered else []
        for i, flag in enumerate(waiting):
            if flag is not None and not new[i]:
                fresh[i] = flag
        return _Bucket(params, states, fresh, any(new) or any(flag is not None for flag in waiting))

    def _retire(self, index: int | None = None) -> None:
        """Drop the buckets of one group or of all; flags that only the device knows are kept, unread."""
        for i in list(self._plans) if index is None else [index]:
            _, buffered, buckets = self._plans.pop(i, (None, False, []))
            for bucket in buckets:
                if buffered and bucket.maybe_fresh:
                    self._fresh.update(zip(bucket.params, bucket.fresh.unbind(), strict=True))

    def _step_bucket(self, group: dict[str, Any], bucket: _Bucket) -> None:
        params, mu, device = bucket.params, group["momentum"], bucket.fresh.device
        if params[0].device != device:  # the whole model was moved
            bucket.fresh = bucket.fresh.to(params[0].device)
        grads = [p.grad for p in params]
        for p, g in zip(params, grads, strict=True):
            if g.is_sparse:
                raise RuntimeError(f"gradient of a parameter of shape {tuple(p.shape)} is sparse; use a dense one")
        momentum = bucket.momentum() if mu != 0 else []
        scale, found_inf = (
            None if t is None else t.to(bucket.fresh.device)
            for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        moved = bucket.layout != _layout(params, momentum)
        if moved and mu != 0:
            momentum = bucket.align()
        bucket.follow_masks(self.masks, moved)
        if moved:
            check_tensors(params, grads, momentum, bucket.masks, bucket.fresh, mu, scale, found_inf)
            bucket.layout, bucket.plain = _layout(params, momentum), all(map(is_dense, params))
        known = bucket.known_zero(momentum) if self.momentum_policy == "mask" else []
        hyper = dict(
            lr=float(group["lr"]), mu=float(mu), dampening=float(group["dampening"]), nesterov=group["nesterov"],
            weight_decay=float(group["weight_decay"]), maximize=group["maximize"],
            momentum_policy=self.momentum_policy, grad_scale=scale, found_inf=found_inf, known_zero=known,
        )  # fmt: skip
        if bucket.plain:
            # Compared here first, because calling a function for each gradient would cost as much as the rest.
            strides = [stride for _, stride, _ in bucket.layout[: len(params)]]
            triples = zip(grads, strides, params, strict=True)
            grads = [g if g.stride() == stride else as_layout(g, p) for g, stride, p in triples]
            launch(params, grads, momentum, bucket.masks, bucket.fresh, **hyper)
        else:
            masked_sgd_(params, grads, momentum, bucket.masks, bucket.fresh, **{**hyper, "known_zero": known or None})
        if found_inf is None:
            bucket.maybe_fresh = False
        # On a CPU reading found_inf waits for nothing; elsewhere it is left unread and nothing is claimed.
        real = found_inf is None or (found_inf.device.type == "cpu" and not found_inf.item())
        bucket.note(known, real and self.momentum_policy == "mask", momentum)

    def _settle(self) -> None:
        """Drop the momentum of parameters whose every step was skipped: torch.optim.SGD has none. Reads the device."""
        self._retire()
        for parameter, flag in self._fresh.items():
            if bool(flag):
                self.state.pop(parameter, None)
        self._fresh = {}

    def state_dict(self) -> dict[str, Any]:
        """As that of torch.optim.SGD: dense momentum of full shape, no masks."""
        self._settle()
        return super().state_dict()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; masks are found by parameter, so a MaskSet may hold the new ones already."""
        self._retire()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "masks": self.masks, "momentum_policy": self.momentum_policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # a checkpoint of an older torch.optim.SGD has fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
