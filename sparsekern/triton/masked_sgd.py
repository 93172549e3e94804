"""masked_sgd_ in Triton. `sparsekern.ops.masked_sgd` is the contract, `steps.py` how a model's tensors get here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.masked_sgd import _check_lists
from sparsekern.triton.launch import divide, double_bits, fma, number, operator, rounded, wrapped
from sparsekern.triton.steps import launches, read, read_mask, read_row, write


@triton.jit
def _update(
    p_ptr, g_ptr, v_ptr, mask_ptr, inner_ptr, start, n, is_fresh, scale, lr, mu, kept_share, weight_decay, inner_decay,
    outer_decay,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr, COMPUTE: tl.constexpr, HAS_SCALE: tl.constexpr,
    DECAYS: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    POLICY: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    at, keep = read_mask(mask_ptr, start, n, BLOCK)
    stored = read(p_ptr, at, n, WHOLE).to(COMPUTE)
    p = tl.where(keep, stored, 0.0)
    g = tl.where(keep, read(g_ptr, at, n, WHOLE).to(COMPUTE), 0.0)
    if HAS_SCALE:
        g = divide(g, scale)
    if MAXIMIZE:
        g = -g
    decayed = g
    if DECAYS:
        decayed = fma(weight_decay, p, g)
    if INNER:
        _, inside = read_mask(inner_ptr, start, n, BLOCK)
        split = fma(tl.where(inside, inner_decay, outer_decay), p, g)
        decayed = tl.where(inner_ptr.to(tl.int64) != 0, split, decayed)
    g = decayed
    u = g
    if MOMENTUM:
        v = read(v_ptr, at, n, WHOLE).to(COMPUTE)
        v = tl.where(is_fresh, g, fma(kept_share, g, mu * v))
        if POLICY != "decay":
            v = tl.where(keep, v, 0.0)
        u = fma(mu, v, g) if NESTEROV else v
        write(v_ptr, at, rounded(v, TYPE), n, WHOLE)
    held = stored if POLICY == "freeze" else 0.0
    write(p_ptr, at, rounded(tl.where(keep, fma(-lr, u, p), held), TYPE), n, WHOLE)


@triton.jit(do_not_specialize=["lr", "mu", "kept_share", "weight_decay", "inner_decay", "outer_decay"])
def masked_sgd(
    table_ptr, blocks_ptr, fresh_ptr, scale_ptr, found_inf_ptr, lr, mu, kept_share, weight_decay, inner_decay,
    outer_decay,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, COMPUTE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, DECAYS: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, POLICY: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program i updates one block of one tensor: row i of blocks says which. Scalars arrive as `double_bits`."""
    p_ptr, g_ptr, mask_ptr, v_ptr, _, inner_ptr, start, n, place = read_row(table_ptr, blocks_ptr, BLOCK, TYPE, ALIGNED)
    is_fresh = tl.load(fresh_ptr + place) != 0
    lr, mu = number(lr, COMPUTE), number(mu, COMPUTE)
    kept_share, weight_decay = number(kept_share, COMPUTE), number(weight_decay, COMPUTE)
    inner_decay, outer_decay = number(inner_decay, COMPUTE), number(outer_decay, COMPUTE)
    scale = tl.load(scale_ptr).to(COMPUTE) if HAS_SCALE else lr
    if HAS_FOUND_INF:
        # A step that must change nothing is one without elements. NaN counts as found.
        n = tl.where(tl.load(found_inf_ptr) == 0.0, n, 0)
    if start + BLOCK <= n:
        _update(
            p_ptr, g_ptr, v_ptr, mask_ptr, inner_ptr, start, n, is_fresh, scale, lr, mu, kept_share, weight_decay,
            inner_decay, outer_decay, True, BLOCK, TYPE, COMPUTE, HAS_SCALE, DECAYS, MOMENTUM, NESTEROV, MAXIMIZE,
            POLICY, INNER,
        )  # fmt: skip
    else:
        _update(
            p_ptr, g_ptr, v_ptr, mask_ptr, inner_ptr, start, n, is_fresh, scale, lr, mu, kept_share, weight_decay,
            inner_decay, outer_decay, False, BLOCK, TYPE, COMPUTE, HAS_SCALE, DECAYS, MOMENTUM, NESTEROV, MAXIMIZE,
            POLICY, INNER,
        )  # fmt: skip


@operator(lambda *args, **kwargs: "")
def masked_sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum: Sequence[Tensor], masks: Sequence[Tensor | None],
    fresh: Tensor, *, lr: float, mu: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool,
    momentum_policy: str, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    known_zero: Sequence[int] = (), inner: Sequence[Tensor | None] = (), inner_decay: float = 0.0,
    outer_decay: float = 0.0,
) -> None:  # fmt: skip
    """The operator on GPU tensors; ``known_zero`` is a permission that it does not use."""
    _check_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero or None, inner)
    states = {"momentum": momentum} if mu != 0 else {}
    hyper = [double_bits(x) for x in (lr, mu, 1 - dampening, weight_decay, inner_decay, outer_decay)]
    scalars = [fresh if t is None else t for t in (grad_scale, found_inf)]
    for run in launches(params, grads, states, masks, ("fresh", fresh, torch.uint8), grad_scale, found_inf, inner):
        wrapped(masked_sgd)[(run.blocks.shape[0],)](
            run.table, run.blocks, fresh, *scalars, *hyper, DECAYS=weight_decay != 0, MOMENTUM=mu != 0,
            NESTEROV=nesterov, MAXIMIZE=maximize, POLICY=momentum_policy, INNER=bool(inner), **run.options,
        )  # fmt: skip
    if found_inf is None:
        fresh.zero_()
    else:
        fresh.mul_(~(found_inf.reshape(()) == 0))
