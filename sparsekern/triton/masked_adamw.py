"""masked_adamw_ in Triton. `sparsekern.ops.masked_adamw` is the contract, `steps.py` how a model's tensors get here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.masked_adamw import _check_lists
from sparsekern.triton.launch import divide, double_bits, fma, number, operator, root, rounded, wrapped
from sparsekern.triton.steps import launches, read, read_mask, read_row, write


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, start, n, scale, rate, correction, beta1, new1, beta2, new2, eps, shrink,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr, COMPUTE: tl.constexpr, HAS_SCALE: tl.constexpr,
    DECAYS: tl.constexpr, MAXIMIZE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    at, keep = read_mask(mask_ptr, start, n, BLOCK)
    p = tl.where(keep, read(p_ptr, at, n, WHOLE).to(COMPUTE), 0.0)
    g = tl.where(keep, read(g_ptr, at, n, WHOLE).to(COMPUTE), 0.0)
    m = tl.where(keep, read(m_ptr, at, n, WHOLE).to(COMPUTE), 0.0)
    v = tl.where(keep, read(v_ptr, at, n, WHOLE).to(COMPUTE), 0.0)
    if HAS_SCALE:
        g = divide(g, scale)
    if MAXIMIZE:
        g = -g
    if DECAYS:
        p = p * shrink
    m = fma(-beta1, g - m, g) if FAST else fma(new1, g - m, m)
    v = fma(new2 * g, g, v * beta2)
    p = p + divide(rate * m, divide(root(v), correction) + eps)
    write(p_ptr, at, rounded(tl.where(keep, p, 0.0), TYPE), n, WHOLE)
    write(m_ptr, at, rounded(tl.where(keep, m, 0.0), TYPE), n, WHOLE)
    write(v_ptr, at, rounded(tl.where(keep, v, 0.0), TYPE), n, WHOLE)


@triton.jit(do_not_specialize=["beta1", "new1", "beta2", "new2", "eps", "shrink"])
def masked_adamw(
    table_ptr, blocks_ptr, corrections_ptr, scale_ptr, found_inf_ptr, beta1, new1, beta2, new2, eps, shrink,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, COMPUTE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, DECAYS: tl.constexpr, MAXIMIZE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program i updates one block of one tensor: row i of blocks says which. Scalars arrive as `double_bits`."""
    p_ptr, g_ptr, mask_ptr, m_ptr, v_ptr, _, start, n, place = read_row(table_ptr, blocks_ptr, BLOCK, TYPE, ALIGNED)
    rate = tl.load(corrections_ptr + 2 * place).to(COMPUTE)
    correction = tl.load(corrections_ptr + 2 * place + 1).to(COMPUTE)
    beta1, new1 = number(beta1, COMPUTE), number(new1, COMPUTE)
    beta2, new2 = number(beta2, COMPUTE), number(new2, COMPUTE)
    eps, shrink = number(eps, COMPUTE), number(shrink, COMPUTE)
    scale = tl.load(scale_ptr).to(COMPUTE) if HAS_SCALE else eps
    if HAS_FOUND_INF:
        # A step that must change nothing is one without elements. NaN counts as found.
        n = tl.where(tl.load(found_inf_ptr) == 0.0, n, 0)
    if start + BLOCK <= n:
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, start, n, scale, rate, correction, beta1, new1, beta2, new2, eps,
            shrink, True, BLOCK, TYPE, COMPUTE, HAS_SCALE, DECAYS, MAXIMIZE, FAST,
        )  # fmt: skip
    else:
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, start, n, scale, rate, correction, beta1, new1, beta2, new2, eps,
            shrink, False, BLOCK, TYPE, COMPUTE, HAS_SCALE, DECAYS, MAXIMIZE, FAST,
        )  # fmt: skip


@operator(lambda *args, **kwargs: "")
def masked_adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    masks: Sequence[Tensor | None], steps: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    known_zero: Sequence[int] = (),
) -> None:  # fmt: skip
    """The operator on GPU tensors; ``known_zero`` is a permission that it does not use."""
    _check_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero or None)
    states, counts = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, ("steps", steps, torch.float32)
    step = steps.double() + 1
    corrections = torch.stack([-(lr / (1 - beta1**step)), (1 - beta2**step).sqrt()], 1)
    hyper = [double_bits(x) for x in (beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay)]
    scalars = [steps if t is None else t for t in (grad_scale, found_inf)]
    for run in launches(params, grads, states, masks, counts, grad_scale, found_inf):
        wrapped(masked_adamw)[(run.blocks.shape[0],)](
            run.table, run.blocks, corrections, *scalars, *hyper, DECAYS=weight_decay != 0, MAXIMIZE=maximize,
            FAST=1 - beta1 >= 0.5, **run.options,
        )  # fmt: skip
    steps.add_(1 if found_inf is None else found_inf.reshape(()) == 0)
