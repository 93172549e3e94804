"""movement_step_: a step of SGD for the scores of movement pruning, and the gradient that its weights get, in one pass.

    u = grad * weight / grad_scale                             the loss's gradient by the score, straight through
    u = u + penalty * sigmoid(score) * sigmoid(-score)         if the penalty is not 0
    score = score - lr * u
    grad = 0                                                   where the mask is 0

as in arXiv 2005.07683. Each operation is rounded once; the last two sums are fused multiply-adds, and the derivative of
the sigmoid is right to a few units in the last place. One call for a whole model.

- Scores are float32, weights and gradients float32, bfloat16 or float16 of the same shape; all compute in float32.
- `masks[i]` holds packed bits in the storage order of `scores[i]` (see `pack_mask`) or is None: all ones. It selects.
- `penalties` has one number for each entry.
- `grad_scale`, `found_inf`: one float32 or float64 number on the device of the scores. `found_inf` not zero: a scaler
  skips this step, and nothing changes.

On a GPU the reference serves it. No gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import as_layout, check_mask, check_overlap, check_scalar, is_dense, write_back
from sparsekern.ops.packing import unpack_mask

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(scores, grads, weights, masks, *, lr, penalties, grad_scale=None, found_inf=None) -> None:
    _check_lists(scores, grads, weights, masks, penalties)
    for score, grad, weight, mask, penalty in zip(scores, grads, weights, masks, penalties, strict=True):
        u = grad.float() * weight.float()
        if grad_scale is not None:
            u = u / grad_scale.float()
        if penalty != 0:
            u = u + penalty * (score.sigmoid() * (-score).sigmoid())
        new, kept = score.sub(u, alpha=lr), grad if mask is None else torch.where(unpack_mask(mask, score), grad, 0)
        if found_inf is not None:
            real = found_inf.reshape(()) == 0
            new, kept = torch.where(real, new, score), torch.where(real, kept, grad)
        score.copy_(new)
        grad.copy_(kept)


def fake(scores, grads, weights, masks, *, lr, penalties, grad_scale=None, found_inf=None) -> None:
    _check_lists(scores, grads, weights, masks, penalties)


def _check_lists(scores, grads, weights, masks, penalties) -> None:
    for name, values in (("grads", grads), ("weights", weights), ("masks", masks), ("penalties", penalties)):
        if len(values) != len(scores):
            raise ValueError(f"{name} must have one entry for each of the {len(scores)} scores, got {len(values)}")


OP = define(
    "movement_step_(Tensor(a!)[] scores, Tensor(b!)[] grads, Tensor[] weights, Tensor?[] masks, *, float lr,"
    " float[] penalties, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    reference,
    fake,
)


def movement_step_(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    *,
    lr: float,
    penalties: Sequence[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update `scores` and `grads` in place; the module docstring is the contract.

    All tensors are on one device, of any strides; none shares memory with another. Raises ValueError or TypeError,
    before anything is changed, naming the argument at fault.
    """
    scores, grads, weights, masks = list(scores), list(grads), list(weights), list(masks)
    _check_lists(scores, grads, weights, masks, penalties)
    for i, (score, grad, weight) in enumerate(zip(scores, grads, weights, strict=True)):
        for name, t, allowed in (("scores", score, _DTYPES[:1]), ("weights", weight, _DTYPES),
                                 ("grads", grad, (weight.dtype,))):  # fmt: skip
            if t.dtype not in allowed:
                raise TypeError(f"{name}[{i}] must be one of {list(map(str, allowed))}, got {t.dtype}")
            if t.shape != score.shape or t.device != scores[0].device or t.layout != torch.strided:
                raise ValueError(
                    f"{name}[{i}] must be dense, of shape {tuple(score.shape)} and on {scores[0].device}, "
                    f"got {t.layout}, {tuple(t.shape)} and {t.device}"
                )
        check_mask(f"masks[{i}]", masks[i], score)
    for name, t in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if t is not None and scores:
            check_scalar(name, t, scores[0].device)
    check_overlap(
        {"scores": scores, "grads": grads}, {"weights": weights, "masks": [m for m in masks if m is not None]}
    )
    launch(scores, grads, weights, masks, lr=lr, penalties=penalties, grad_scale=grad_scale, found_inf=found_inf)


def launch(scores, grads, weights, masks, *, lr, penalties, grad_scale=None, found_inf=None) -> None:
    """The operator on operands that fit each other, of any strides."""
    # The kernel walks storage, so all of one entry must lie alike.
    dense = [s if is_dense(s) else s.clone() for s in scores]
    ordered = [as_layout(g, s) for g, s in zip(grads, dense, strict=True)]
    with torch.no_grad():
        OP(
            dense, ordered, [as_layout(w, g) for w, g in zip(weights, ordered, strict=True)], masks, lr=float(lr),
            penalties=list(map(float, penalties)), grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        write_back([*scores, *grads], [*dense, *ordered])
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version([*scores, *grads])


movement_step_.reference = reference  # type: ignore[attr-defined]
