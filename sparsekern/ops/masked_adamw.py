"""masked_adamw_: one step of AdamW over a whole model, in which pruned weights stay exactly zero.

For each element, with fma = fused multiply-add rounded once, t = the steps of its parameter with this one, and pruned
elements selected away, never multiplied (so NaN and Inf in a pruned gradient reach nothing):

    p, g, m, v = param, grad / grad_scale, exp_avg, exp_avg_sq where the mask is 1, else 0;  g = -g if maximize
    p = p * (1 - lr * weight_decay)                             if weight_decay != 0
    m = fma(1 - beta1, g - m, m), or g + -beta1 * (g - m) likewise fused where 1 - beta1 >= 0.5
    v = fma((1 - beta2) * g, g, v * beta2)
    p = p + (-lr / (1 - beta1^t) * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    param, exp_avg, exp_avg_sq = p, m, v where the mask is 1, else 0

The rule is that of arXiv 1711.05101, order and rounding those of torch.optim.AdamW(fused=True), with which it agrees
bit for bit when nothing is masked, on a CPU with AVX2, but for the last elements of a tensor that fill no vector: those
torch rounds in another way. torch's default AdamW has the same moments (float32 and float64) and weights that differ
where its square root is one unit in the last place wrong; so does `reference` in float64. There is no amsgrad.

- `masks[i]` holds packed bits in the storage order of `params[i]` (see `pack_mask`) or is None for a dense parameter.
- `steps`: float32, one entry per parameter: the steps taken before this one, which is added.
- `grad_scale`, `found_inf`: one float32 or float64 on the device of the parameters. `found_inf` not zero: nothing
  changes, `steps` included.
- `known_zero`: None, or one bool per parameter by which the caller promises that all its pruned weights and moments are
  zero (of either sign) already. Results are the same, but memory in which everything is pruned may then be left
  untouched.
- bfloat16 and float16 compute in float32 and round once when they are stored.
- Hyper-parameters are combined in double and rounded once to the compute type. Gradients are only read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import check_lengths, check_operands, launch_any_layout
from sparsekern.ops.packing import unpack_mask


def reference(
    params, grads, exp_avg, exp_avg_sq, masks, steps, *, lr, beta1, beta2, eps, weight_decay, maximize,
    grad_scale=None, found_inf=None, known_zero=(),
):  # fmt: skip
    _check_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero or None)
    if found_inf is not None and found_inf.item() != 0:
        return
    steps += 1
    for i, (param, step) in enumerate(zip(params, steps.tolist(), strict=True)):
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        keep = torch.ones_like(param, dtype=torch.bool) if masks[i] is None else unpack_mask(masks[i], param)
        p, g, m, v = (torch.where(keep, x.to(compute), 0) for x in (param, grads[i], exp_avg[i], exp_avg_sq[i]))
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        if maximize:
            g = -g
        if weight_decay != 0:
            p = p * (1 - lr * weight_decay)
        m = m.lerp(g, 1 - beta1)
        v = (v * beta2).addcmul(g, g, value=1 - beta2)
        # Through float64, because torch may leave a float32 root one unit wrong.
        bottom = v.double().sqrt().to(compute) / (1 - beta2**step) ** 0.5 + eps
        p = p.addcdiv(m, bottom, value=-(lr / (1 - beta1**step)))
        for target, value in ((param, p), (exp_avg[i], m), (exp_avg_sq[i], v)):
            target.copy_(torch.where(keep, value, 0))


def fake(params, grads, exp_avg, exp_avg_sq, masks, steps, *, known_zero=(), **hyper):
    _check_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero or None)


def _check_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero) -> None:
    """Raise unless the lists fit each other, for bare calls of the operator too."""
    lists = {"grads": grads, "masks": masks, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_lengths(params, lists, ("steps", steps, torch.float32), known_zero)


OP = define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor?[] masks,"
    " Tensor(d!) steps, *, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize,"
    " Tensor? grad_scale=None, Tensor? found_inf=None, int[] known_zero=[]) -> ()",
    reference,
    fake,
)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    steps: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    known_zero: Sequence[bool] | None = None,
) -> None:
    """Update `params`, both moments and `steps` in place, one call for a whole model; the module docstring is the
    contract.

    All tensors are on one device; those of one entry share shape and dtype (float32, float64, bfloat16 or float16); any
    strides. Only gradients, masks and the two scalars may share memory, among themselves.
    Raises ValueError or TypeError, before anything is changed, naming the argument at fault.
    """
    params, grads = list(params), list(grads)
    buffers = dict(exp_avg=list(exp_avg), exp_avg_sq=list(exp_avg_sq))
    masks = [None] * len(params) if masks is None else list(masks)
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {beta}")
    _check_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero)
    check_operands(params, grads, buffers, masks, ("steps", steps, torch.float32), grad_scale, found_inf)
    launch_any_layout(
        OP, params, grads, list(buffers.values()), masks, steps, lr=float(lr), beta1=float(beta1), beta2=float(beta2),
        eps=float(eps), weight_decay=float(weight_decay), maximize=maximize, grad_scale=grad_scale,
        found_inf=found_inf, known_zero=[int(z) for z in known_zero or ()],
    )  # fmt: skip


masked_adamw_.reference = reference
