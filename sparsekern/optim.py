"""Optimizers that keep pruned weights at exactly zero, with one kernel call a step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekern.masks import MaskSet
from sparsekern.ops import masked_sgd_


class MaskedSGD(torch.optim.Optimizer):
    """torch.optim.SGD whose pruned weights and momentum stay exactly zero.

    `masks` is a MaskSet, which may change between steps, or maps parameters to bool tensors of their shape (True =
    keep); a parameter outside it is updated densely,
    and then this is torch.optim.SGD bit for bit (float32 and float64, on a CPU with AVX2). Masks are kept at one bit
    per weight, outside `state_dict`, which stays dense and loads into torch.optim.SGD.
    `foreach` and `fused` are accepted and ignored. `momentum_policy` is described in `sparsekern.ops.masked_sgd`.

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
        super().__init__(params, defaults)
        self.momentum_policy = momentum_policy
        self.set_masks(masks or {})

    def set_masks(self, masks: MaskSet | Mapping[Tensor, Tensor]) -> None:
        """Replace all masks; pruned weights become zero at the next step that gives them a gradient."""
        known = {p for group in self.param_groups for p in group["params"]}
        if not isinstance(masks, MaskSet):
            for param in masks:
                if param not in known:
                    raise ValueError(f"masks: a tensor of shape {tuple(param.shape)} is no parameter of this optimizer")
            chosen = MaskSet({str(i): param for i, param in enumerate(masks)})
            for i, mask in enumerate(masks.values()):
                chosen.set(str(i), mask)
            masks = chosen
        self.masks = masks

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"gradient of a parameter of shape {tuple(p.shape)} is sparse; use a dense one")
                buckets.setdefault((p.device, p.dtype), []).append(p)
            for (device, _), params in buckets.items():
                self._step_bucket(group, params, device)
        return loss

    def _step_bucket(self, group: dict, params: list[Tensor], device: torch.device) -> None:
        momentum = []
        states = [self.state[p] for p in params]
        fresh = torch.tensor(
            [s.get("momentum_buffer") is None or bool(s.get("fresh", False)) for s in states],
            dtype=torch.uint8,
            device=device,
        )
        if group["momentum"] != 0:
            for p, state in zip(params, states, strict=True):
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum.append(state["momentum_buffer"])
        masked_sgd_(
            params, [p.grad for p in params], momentum, [self.masks.packed_for(p) for p in params], fresh,
            lr=float(group["lr"]), mu=group["momentum"], dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]), nesterov=group["nesterov"], maximize=group["maximize"],
            momentum_policy=self.momentum_policy, grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip
        if group["momentum"] != 0 and getattr(self, "found_inf", None) is not None:
            for state, flag in zip(states, fresh, strict=True):
                state["fresh"] = flag  # a skipped first step leaves the parameter fresh, without a host sync
