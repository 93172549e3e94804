"""Optimizers that keep pruned weights at exactly zero, with one kernel call a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern.masked_optimizer import Bucket, MaskedOptimizer, check_hyper
from sparsekern.masks import MaskSet
from sparsekern.ops.masked_adamw import OP as MASKED_ADAMW
from sparsekern.ops.masked_sgd import OP as MASKED_SGD
from sparsekern.ops.masked_sgd import POLICIES


class MaskedSGD(MaskedOptimizer):
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

    _op = staticmethod(MASKED_SGD)
    # On the device: 1 until the first real step. Only the kernel knows whether GradScaler's step was one.
    _count_name, _count_dtype = "fresh", torch.uint8
    _inner: tuple[MaskSet, float, float] | None = None

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
        check_hyper(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {momentum} and {dampening}")
        if momentum_policy not in POLICIES:
            raise ValueError(f"momentum_policy must be one of {POLICIES}, got {momentum_policy!r}")
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, masks)
        self.momentum_policy = momentum_policy

    def set_inner_decay(self, masks: MaskSet | None, inside: float = 0.0, outside: float = 0.0) -> None:
        """Add to the weight decay of parameters of `masks`: `inside` where their masks keep, `outside` elsewhere.

        None ends it. Masks of the optimizer hold as before: what they prune has no weight decay.
        """
        check_hyper(inside=inside, outside=outside)
        self._inner = None if masks is None else (masks, float(inside), float(outside))

    def _forget(self) -> None:
        super()._forget()
        self._fresh: dict[Tensor, Tensor] = {}  # the flags of buckets that are gone, unread

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _counts(self, params: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        new = [state.get("momentum_buffer") is None for state in states]
        fresh = torch.tensor(new, dtype=torch.uint8).to(params[0].device)
        for i, p in enumerate(params):
            # Without momentum there is nothing to be fresh, and the flag waits on.
            flag = self._fresh.pop(p, None) if self._fresh and states[i] is self.state.get(p) else None
            if flag is not None and not new[i]:
                fresh[i] = flag
        return fresh

    def _retired(self, bucket: Bucket) -> None:
        if bucket.names and not bucket.surely_stepped:
            self._fresh.update(zip(bucket.params, bucket.counts.unbind(), strict=True))

    def _hyper(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        return dict(
            lr=float(group["lr"]), mu=float(group["momentum"]), dampening=float(group["dampening"]),
            nesterov=group["nesterov"], weight_decay=float(group["weight_decay"]), maximize=group["maximize"],
            momentum_policy=self.momentum_policy, **self._inner_decay(params, group),
        )  # fmt: skip

    def _inner_decay(self, params: list[Tensor], group: dict[str, Any]) -> dict[str, Any]:
        if self._inner is None:
            return {"inner": []}
        masks, inside, outside = self._inner
        decay = float(group["weight_decay"])
        packed = [masks.packed_for(p) for p in params]
        return {"inner": packed, "inner_decay": decay + inside, "outer_decay": decay + outside}

    def _keeps_zero(self) -> bool:
        return self.momentum_policy == "mask"

    def _operands(self, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
        return buffers or [[]]

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

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "momentum_policy": self.momentum_policy, "_inner": self._inner}


class MaskedAdamW(MaskedOptimizer):
    """torch.optim.AdamW whose pruned weights and moments stay exactly zero.

    Masks, dense parameters, `foreach`, `fused`, GradScaler and writes from outside are as in MaskedSGD. Without masks
    this is torch.optim.AdamW(fused=True) bit for bit (all four number types, on a CPU with AVX2) but for the last few
    elements of a tensor, and its default to rounding: `sparsekern.ops.masked_adamw` says how. `state_dict` loads into
    torch.optim.AdamW and from it.
    A weight that a new mask revives starts from zero moments at its parameter's step count.

    Raises ValueError for a hyper-parameter out of range, for `differentiable`, `capturable` or `amsgrad` (also in a
    group or a checkpoint), for a mask that fits no parameter; RuntimeError for a sparse gradient.
    """

    _op = staticmethod(MASKED_ADAMW)
    _count_name, _count_dtype = "steps", torch.float32

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: MaskSet | Mapping[Tensor, Tensor] | None = None,
    ):
        check_hyper(lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True,
        )  # fmt: skip
        super().__init__(params, defaults, masks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; ValueError for an option that this optimizer lacks."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        for name in ("amsgrad", "capturable"):
            if group[name]:
                raise ValueError(f"{name} must be False: masked_adamw_ does not have it")
        for i, beta in enumerate(group["betas"]):
            if not 0 <= float(beta) < 1:
                raise ValueError(f"betas[{i}] must be at least 0 and less than 1, got {beta}")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _counts(self, params: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        return torch.stack([torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu() for state in states])

    def _place_counts(self, bucket: Bucket) -> None:
        # Views, so that the state shows what the kernel counts.
        for state, step in zip(bucket.states, bucket.counts.unbind(), strict=True):
            state["step"] = step

    def _hyper(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        self._check_group(group)
        beta1, beta2 = group["betas"]
        return dict(
            lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2), eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]), maximize=group["maximize"],
        )  # fmt: skip
