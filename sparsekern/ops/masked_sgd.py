"""masked_sgd_: one step of SGD with momentum over a whole model, in which pruned weights stay exactly zero.

For each element, with fma = fused multiply-add rounded once, and pruned elements selected away, never multiplied
(so NaN and Inf in a pruned gradient reach nothing):

    p = p where the mask is 1, else 0;  g = grad / grad_scale where the mask is 1, else 0;  g = -g if maximize
    g = fma(weight_decay, p, g)                                 if weight_decay != 0, or by `inner`
    v = fma(1 - dampening, g, mu * v), or v = g if fresh        if mu != 0
    u = fma(mu, v, g) if nesterov, else v (g if mu == 0)
    p = fma(-lr, u, p) where the mask is 1, else 0

The order of operations is that of arXiv 2308.02060 and the optimizer of IST-DASLab/ACDC; the rounding is that of
torch.optim.SGD, with which it agrees bit for bit when nothing is masked (float32 and float64, on a CPU with AVX2).

- `masks[i]` holds packed bits in the storage order of `params[i]` (see `pack_mask`) or is None for a dense parameter.
- `momentum` may be empty if mu is 0. `momentum_policy="mask"` makes pruned momentum exactly 0; `"decay"` lets it
  decay by mu, as the published AC/DC code does. `"freeze"` is for a mask that says what trains: momentum outside it is
  0, and a weight outside it stays as it is.
- `inner`: empty, or for each parameter packed bits as `masks` has them or None. Where it has bits, `inner_decay` stands
  for `weight_decay` where the bit is 1 and `outer_decay` where it is 0, with the fma whatever they are.
- `fresh`: uint8, one entry per parameter; 1 marks the first real step of that parameter. The step clears it.
- `grad_scale`, `found_inf`: one float32 or float64 on the device of the parameters. `found_inf` not zero: nothing
  changes, `fresh` included. It is read on the device.
- `known_zero`: None, or one bool per parameter by which the caller promises that all its pruned weights and, unless mu
  is 0, their momentum are zero (of either sign) already. Results are the same, but memory in which everything is pruned
  may then be left untouched. Policy `"mask"` only.
- bfloat16 and float16 compute in float32 and round once when they are stored.
- Hyper-parameters are combined in double and rounded once to the compute type. Gradients are only read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import check_lengths, check_operands, launch_any_layout
from sparsekern.ops.packing import unpack_mask

POLICIES = ("mask", "decay", "freeze")


def reference(
    params, grads, momentum, masks, fresh, *, lr, mu, dampening, weight_decay, nesterov, maximize, momentum_policy,
    grad_scale=None, found_inf=None, known_zero=(), inner=(), inner_decay=0.0, outer_decay=0.0,
):  # fmt: skip
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero or None, inner)
    real = torch.ones((), dtype=torch.bool, device=fresh.device) if found_inf is None else found_inf.reshape(()) == 0
    for i, param in enumerate(params):
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        keep = torch.ones_like(param, dtype=torch.bool) if masks[i] is None else unpack_mask(masks[i], param)
        p, g = (torch.where(keep, x.to(compute), 0) for x in (param, grads[i]))
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        if maximize:
            g = -g
        if inner and inner[i] is not None:
            inside = unpack_mask(inner[i], param)
            g = torch.where(inside, g.add(p, alpha=inner_decay), g.add(p, alpha=outer_decay))
        elif weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        u = g
        if mu != 0:
            old = momentum[i].to(compute)
            v = torch.where(fresh[i].bool(), g, (old * mu).add(g, alpha=1 - dampening))
            v = v if momentum_policy == "decay" else torch.where(keep, v, 0)
            u = g.add(v, alpha=mu) if nesterov else v
            momentum[i].copy_(torch.where(real, v.to(param.dtype), momentum[i]))
        held = param.to(compute) if momentum_policy == "freeze" else 0
        new = torch.where(keep, p.add(u, alpha=-lr), held).to(param.dtype)
        param.copy_(torch.where(real, new, param))
    fresh.mul_(~real)


def fake(params, grads, momentum, masks, fresh, *, mu, momentum_policy, known_zero=(), inner=(), **hyper):
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero or None, inner)


def _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero, inner=()) -> None:
    """Raise unless the lists fit each other, for bare calls of the operator too."""
    if momentum_policy not in POLICIES:
        raise ValueError(f"momentum_policy must be one of {POLICIES}, got {momentum_policy!r}")
    lists = {"grads": grads, "masks": masks, **({"momentum": momentum} if mu != 0 else {})}
    lists |= {"inner": inner} if len(inner) else {}
    check_lengths(params, lists, ("fresh", fresh, torch.uint8), known_zero)
    if known_zero is not None and momentum_policy != "mask":
        raise ValueError(f"known_zero must be None under momentum_policy {momentum_policy!r}")


OP = define(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum, Tensor?[] masks, Tensor(c!) fresh, *,"
    " float lr, float mu, float dampening, float weight_decay, bool nesterov, bool maximize, str momentum_policy,"
    " Tensor?[] inner, Tensor? grad_scale=None, Tensor? found_inf=None, int[] known_zero=[], float inner_decay=0.0,"
    " float outer_decay=0.0) -> ()",
    reference,
    fake,
)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    fresh: Tensor,
    *,
    lr: float,
    mu: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    momentum_policy: str = "mask",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    known_zero: Sequence[bool] | None = None,
    inner: Sequence[Tensor | None] = (),
    inner_decay: float = 0.0,
    outer_decay: float = 0.0,
) -> None:
    """Update `params` and `momentum` in place, one call for a whole model; the module docstring is the contract.

    All tensors are on one device; those of one entry share shape and dtype (float32, float64, bfloat16 or float16); any
    strides. Only gradients, masks and the two scalars may share memory, among themselves.
    Raises ValueError or TypeError, before anything is changed, naming the argument at fault.
    """
    params, grads, momentum = list(params), list(grads), list(momentum)
    masks = [None] * len(params) if masks is None else list(masks)
    if nesterov and (mu == 0 or dampening != 0):
        raise ValueError(f"nesterov needs mu > 0 and dampening 0, got mu {mu} and dampening {dampening}")
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero, inner)
    buffers = {"momentum": momentum} if mu != 0 else {}
    check_operands(params, grads, buffers, masks, ("fresh", fresh, torch.uint8), grad_scale, found_inf, inner)
    launch_any_layout(
        OP, params, grads, [momentum if mu != 0 else []], masks, fresh, lr=float(lr), mu=float(mu),
        dampening=float(dampening), weight_decay=float(weight_decay), nesterov=nesterov, maximize=maximize,
        momentum_policy=momentum_policy, grad_scale=grad_scale, found_inf=found_inf,
        known_zero=[int(z) for z in known_zero or ()], inner=list(inner), inner_decay=float(inner_decay),
        outer_decay=float(outer_decay),
    )  # fmt: skip


masked_sgd_.reference = reference
