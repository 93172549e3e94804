"""masked_sgd_: one step of SGD with momentum over a whole model, in which pruned weights stay exactly zero.

For each element, with fma = fused multiply-add rounded once, and pruned elements selected away, never multiplied
(so NaN and Inf in a pruned gradient reach nothing):

    p = p where the mask is 1, else 0;  g = grad / grad_scale where the mask is 1, else 0;  g = -g if maximize
    g = fma(weight_decay, p, g)                                 if weight_decay != 0
    v = fma(1 - dampening, g, mu * v), or v = g if fresh        if mu != 0
    u = fma(mu, v, g) if nesterov, else v (g if mu == 0)
    p = fma(-lr, u, p) where the mask is 1, else 0

The order of operations is that of arXiv 2308.02060 and the optimizer of IST-DASLab/ACDC; the rounding is that of
torch.optim.SGD, with which it agrees bit for bit when nothing is masked (float32 and float64, on a CPU with AVX2).

- `masks[i]` holds packed bits in the storage order of `params[i]` (see `pack_mask`) or is None for a dense parameter.
- `momentum` may be empty if mu is 0. `momentum_policy="mask"` makes pruned momentum exactly 0; `"decay"` lets it
  decay by mu, as the published AC/DC code does.
- `fresh`: uint8, one entry per parameter; 1 marks the first real step of that parameter. The step clears it.
- `found_inf` not zero: nothing changes, `fresh` included. It is read on the device.
- bfloat16 and float16 compute in float32 and round once when they are stored.
- Hyper-parameters are combined in double and rounded once to the compute type. Gradients are only read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.packing import unpack_mask

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reference(
    params, grads, momentum, masks, fresh, *, lr, mu, dampening, weight_decay, nesterov, maximize, momentum_policy,
    grad_scale=None, found_inf=None,
):  # fmt: skip
    real = torch.ones((), dtype=torch.bool, device=fresh.device) if found_inf is None else found_inf.reshape(()) == 0
    for i, param in enumerate(params):
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        keep = torch.ones_like(param, dtype=torch.bool) if masks[i] is None else unpack_mask(masks[i], param)
        p, g = (torch.where(keep, x.to(compute), 0) for x in (param, grads[i]))
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        if maximize:
            g = -g
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        u = g
        if mu != 0:
            old = momentum[i].to(compute)
            v = torch.where(fresh[i].bool(), g, (old * mu).add(g, alpha=1 - dampening))
            v = torch.where(keep, v, 0) if momentum_policy == "mask" else v
            u = g.add(v, alpha=mu) if nesterov else v
            momentum[i].copy_(torch.where(real, v.to(param.dtype), momentum[i]))
        new = torch.where(keep, p.add(u, alpha=-lr), 0).to(param.dtype)
        param.copy_(torch.where(real, new, param))
    fresh.mul_(~real)


def fake(params, grads, momentum, masks, fresh, **hyper):
    torch._check(len(grads) == len(masks) == len(params) == fresh.numel(), lambda: "one entry per parameter is needed")


_op = define(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum, Tensor?[] masks, Tensor(c!) fresh, *,"
    " float lr, float mu, float dampening, float weight_decay, bool nesterov, bool maximize, str momentum_policy,"
    " Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
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
) -> None:
    """Update `params` and `momentum` in place, one call for a whole model; the module docstring is the contract.

    Tensors of one entry share shape, dtype (float32, float64, bfloat16 or float16) and device; any strides.
    Raises ValueError or TypeError, before anything is changed, naming the argument at fault.
    """
    masks = [None] * len(params) if masks is None else list(masks)
    _check(params, grads, momentum, masks, fresh, mu, dampening, nesterov, momentum_policy)
    # The kernel walks storage: an operand with holes or another stride order is brought into the order of its mask.
    dense = [p if _is_dense(p) else p.clone() for p in params]
    grads = [_as_layout(g, p) for g, p in zip(grads, dense, strict=True)]
    buffers = [_as_layout(v, p) for v, p in zip(momentum, dense, strict=True)] if mu != 0 else []
    with torch.no_grad():
        _op(
            dense, grads, buffers, masks, fresh, lr=float(lr), mu=float(mu), dampening=float(dampening),
            weight_decay=float(weight_decay), nesterov=nesterov, maximize=maximize, momentum_policy=momentum_policy,
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        written = [*zip(params, dense, strict=True), *(zip(momentum, buffers, strict=True) if mu != 0 else ())]
        for target, result in written:
            if result is not target:
                target.copy_(result)
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version([t for t, result in written if result is t])


masked_sgd_.reference = reference


def _is_dense(t: Tensor) -> bool:
    return torch.empty_like(t, device="meta").stride() == t.stride()


def _as_layout(t: Tensor, like: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _check(params, grads, momentum, masks, fresh, mu, dampening, nesterov, momentum_policy) -> None:
    lengths = {"grads": grads, "masks": masks, **({"momentum": momentum} if mu != 0 else {})}
    for name, values in lengths.items():
        if len(values) != len(params):
            raise ValueError(f"{name} must have one entry for each of the {len(params)} params, got {len(values)}")
    if fresh.dtype != torch.uint8 or fresh.shape != (len(params),):
        raise ValueError(f"fresh must be uint8 of shape ({len(params)},), got {fresh.dtype} {tuple(fresh.shape)}")
    if momentum_policy not in ("mask", "decay"):
        raise ValueError(f"momentum_policy must be 'mask' or 'decay', got {momentum_policy!r}")
    if nesterov and (mu == 0 or dampening != 0):
        raise ValueError(f"nesterov needs mu > 0 and dampening 0, got mu {mu} and dampening {dampening}")
    for i, param in enumerate(params):
        if param.dtype not in DTYPES:
            raise TypeError(f"params[{i}] must be one of {[str(d) for d in DTYPES]}, got {param.dtype}")
        others = {"grads": grads[i], **({"momentum": momentum[i]} if mu != 0 else {})}
        for name, t in others.items():
            if t.shape != param.shape or t.dtype != param.dtype or t.device != param.device:
                raise ValueError(
                    f"{name}[{i}] must be {param.dtype} of shape {tuple(param.shape)} on {param.device} like its "
                    f"parameter, got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
                )
        if masks[i] is not None and (masks[i].dtype != torch.uint8 or masks[i].shape != ((param.numel() + 7) // 8,)):
            raise ValueError(
                f"masks[{i}] must be uint8 of shape ({(param.numel() + 7) // 8},), "
                f"got {masks[i].dtype} of shape {tuple(masks[i].shape)}"
            )
    _check_overlap({"params": params, "momentum": momentum if mu != 0 else []}, grads)


def _check_overlap(written: dict[str, Sequence[Tensor]], grads: Sequence[Tensor]) -> None:
    """Refuse a written tensor whose span of memory meets that of any other operand."""
    spans = []
    for name, tensors in {**written, "grads": grads}.items():
        for i, t in enumerate(tensors):
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name, i))
    reach, holder = 0, ("", 0)
    for start, stop, name, i in sorted(spans):
        if start < reach and (name != "grads" or holder[0] != "grads"):
            raise ValueError(f"{holder[0]}[{holder[1]}] overlaps the memory of {name}[{i}]; only gradients may overlap")
        if stop > reach:
            reach, holder = stop, (name, i)
