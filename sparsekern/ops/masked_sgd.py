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
from sparsekern.ops.packing import unpack_mask

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reference(
    params, grads, momentum, masks, fresh, *, lr, mu, dampening, weight_decay, nesterov, maximize, momentum_policy,
    grad_scale=None, found_inf=None, known_zero=(),
):  # fmt: skip
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero)
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


def fake(params, grads, momentum, masks, fresh, *, mu, momentum_policy, known_zero=(), **hyper):
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero)


_op = define(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum, Tensor?[] masks, Tensor(c!) fresh, *,"
    " float lr, float mu, float dampening, float weight_decay, bool nesterov, bool maximize, str momentum_policy,"
    " Tensor? grad_scale=None, Tensor? found_inf=None, int[] known_zero=[]) -> ()",
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
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero)
    if known_zero is not None and len(known_zero) != len(params):  # the operator cannot tell None from an empty list
        raise ValueError(f"known_zero must be None or hold {len(params)} bools, got {len(known_zero)}")
    check_tensors(params, grads, momentum, masks, fresh, mu, grad_scale, found_inf)
    # The kernel walks storage: an operand with holes or another stride order is brought into the order of its mask.
    dense = [p if is_dense(p) else p.clone() for p in params]
    grads = [as_layout(g, p) for g, p in zip(grads, dense, strict=True)]
    momentum = momentum if mu != 0 else []  # which nobody reads then
    buffers = [as_layout(v, p) for v, p in zip(momentum, dense[: len(momentum)], strict=True)]
    launch(
        dense, grads, buffers, masks, fresh, lr=float(lr), mu=float(mu), dampening=float(dampening),
        weight_decay=float(weight_decay), nesterov=nesterov, maximize=maximize, momentum_policy=momentum_policy,
        grad_scale=grad_scale, found_inf=found_inf, known_zero=[int(z) for z in known_zero or ()],
    )  # fmt: skip
    with torch.no_grad():
        for target, result in zip([*params, *momentum], [*dense, *buffers], strict=True):
            if result is not target:
                target.copy_(result)


masked_sgd_.reference = reference


def launch(params, grads, momentum, masks, fresh, **hyper) -> None:
    """The operator on operands that `check_tensors` has seen and whose layouts agree."""
    with torch.no_grad():
        _op(params, grads, momentum, masks, fresh, **hyper)
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version([*params, *momentum, fresh])


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without holes, in any order of the dimensions."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def same_layout(t: Tensor, like: Tensor) -> bool:
    """Whether element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing."""
    a, b = t.stride(), like.stride()
    return a == b or all(x == y or n == 1 for x, y, n in zip(a, b, like.shape, strict=True))


def as_layout(t: Tensor, like: Tensor) -> Tensor:
    """`t`, copied into the layout of the dense tensor `like` if it has another."""
    return t if same_layout(t, like) else torch.empty_like(like).copy_(t)


def _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero) -> None:
    """Raise unless each list has one entry per parameter, for bare calls of the operator too."""
    if momentum_policy not in ("mask", "decay"):
        raise ValueError(f"momentum_policy must be 'mask' or 'decay', got {momentum_policy!r}")
    lengths = {"grads": grads, "masks": masks, **({"momentum": momentum} if mu != 0 else {})}
    for name, values in lengths.items():
        if len(values) != len(params):
            raise ValueError(f"{name} must have one entry for each of the {len(params)} params, got {len(values)}")
    if fresh.numel() != len(params):
        raise ValueError(f"fresh must be uint8 of shape ({len(params)},), got {fresh.dtype} {tuple(fresh.shape)}")
    if known_zero and (len(known_zero) != len(params) or momentum_policy != "mask"):
        raise ValueError(
            f"known_zero must be None or hold {len(params)} bools under momentum_policy 'mask', "
            f"got {len(known_zero)} under {momentum_policy!r}"
        )


def check_tensors(params, grads, momentum, masks, fresh, mu, grad_scale=None, found_inf=None) -> None:
    """Raise unless the operands, in lists of the right length, are what the contract asks for."""
    if fresh.dtype != torch.uint8 or fresh.shape != (len(params),) or not fresh.is_contiguous():
        raise ValueError(f"fresh must be uint8 of shape ({len(params)},), got {fresh.dtype} {tuple(fresh.shape)}")
    for i, param in enumerate(params):
        _check_param(i, param, fresh.device)
        others = {"grads": grads[i], **({"momentum": momentum[i]} if mu != 0 else {})}
        for name, t in others.items():
            if t.layout != torch.strided:
                raise ValueError(f"{name}[{i}] must be dense (torch.strided), got layout {t.layout}")
            if t.shape != param.shape or t.dtype != param.dtype or t.device != param.device:
                raise ValueError(
                    f"{name}[{i}] must be {param.dtype} of shape {tuple(param.shape)} on {param.device} like its "
                    f"parameter, got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
                )
        _check_mask(i, masks[i], param)
    for name, t in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.numel() != 1 or t.dtype not in DTYPES[:2] or t.device != fresh.device:
            got = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"{name} must be one float32 or float64 number in a tensor on {fresh.device}, got {got}")
    scalars = [t for t in (grad_scale, found_inf) if t is not None]
    _check_overlap(
        {"params": params, "momentum": momentum if mu != 0 else [], "fresh": [fresh]},
        {"grads": grads, "masks": [m for m in masks if m is not None], "grad_scale, found_inf": scalars},
    )


def _check_param(i: int, param: Tensor, device: torch.device) -> None:
    if param.layout != torch.strided:
        raise ValueError(f"params[{i}] must be dense (torch.strided), got layout {param.layout}")
    if param.dtype not in DTYPES:
        raise TypeError(f"params[{i}] must be one of {[str(d) for d in DTYPES]}, got {param.dtype}")
    if param.device != device:
        raise ValueError(f"params[{i}] must be on {device} like fresh, got {param.device}")
    if any(step == 0 and n > 1 for step, n in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"params[{i}] must have memory for each element, got an expanded tensor")


def _check_mask(i: int, mask: Tensor | None, param: Tensor) -> None:
    size = (param.numel() + 7) // 8
    if mask is None:
        return
    if mask.dtype != torch.uint8 or mask.shape != (size,) or mask.device != param.device or not mask.is_contiguous():
        raise ValueError(
            f"masks[{i}] must be contiguous uint8 of shape ({size},) on {param.device}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )


def _check_overlap(written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]]) -> None:
    """Refuse a written tensor whose span of memory meets that of any other operand."""
    spans = []
    for name, tensors in (*written.items(), *read.items()):
        for i, t in enumerate(tensors):
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name, i))
    reach, holder = 0, ("", 0)  # the furthest end so far
    written_reach, writer = 0, ("", 0)  # and that of a written tensor
    for start, stop, name, i in sorted(spans):
        other, end = (holder, reach) if name in written else (writer, written_reach)
        if start < end:
            raise ValueError(f"{other[0]}[{other[1]}] overlaps the memory of {name}[{i}], and one of them is written")
        if stop > reach:
            reach, holder = stop, (name, i)
        if name in written and stop > written_reach:
            written_reach, writer = stop, (name, i)
