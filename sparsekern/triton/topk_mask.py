"""topk_mask in Triton: a radix selection that never waits for the device. `sparsekern.ops.topk_mask` is the contract.

1. `_score` writes one 32-bit key per group, in group order: larger keys are better, 0 is no candidate.
2. Three times, `_count` makes the histogram of the next digit of the keys that agree with the digits so far, and
   `_pick` finds the digit in which the last chosen key lies. A segment is what shares a budget: one tensor, or all.
3. `_count_ties` and a cumulative sum tell each block how many of the keys at the threshold come before it; `_choose`
   marks the groups above the threshold and the first of those at it.
4. `_write` packs the marks in the storage order of the scores.

Not here, and left to the reference: n:m patterns, float64, and tensors whose memory is not three nested loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.packing import storage_order
from sparsekern.ops.topk_mask import STATUS_NAN, STATUS_TOO_FEW, check_lists
from sparsekern.triton.launch import EMPTY, INTERPRETED, operator, table_on, wrapped

CONFIGURATIONS = {"score": (1024, 4), "select": (4096, 8), "write": (256, 4)}
"""Kernels -> (groups, or for "write" bytes, per program; warps). A segment is a whole number of "select" blocks."""
if INTERPRETED.value:
    CONFIGURATIONS = dict.fromkeys(CONFIGURATIONS, (1024, 1))  # small inputs must still be several programs
DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width in bits of the digits of a key, first to last."""
_BINS = 2048
_AXIS = {"unstructured": -1, "4x1": 0, "1x4": 1}
_SIGN = tl.constexpr(-(2**31))
_TOO_FEW = tl.constexpr(-1)
"""Of ``left``: the segment has fewer candidates than its budget, and all are chosen."""


@triton.jit
def _score(
    score_ptr, candidates_ptr, keys_ptr, status_ptr, groups, n0, n1, n2, s0, s1, s2, t0, t1, t2,
    AXIS: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_CANDIDATES: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of the groups of one tensor, seen as (n0, n1, n2) with the strides s of its scores and t of its mask.

    keys has room for whole blocks; beyond the last group it gets 0."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    width = (n1 + 3) // 4 if AXIS == 1 else n1
    i2 = group % n2
    i1 = (group // n2) % width
    i0 = group // n2 // width
    total = tl.zeros((BLOCK,), tl.float32)
    allowed = inside
    members = tl.zeros((BLOCK,), tl.int32)
    for j in tl.static_range(4 if AXIS >= 0 else 1):
        a0 = i0 * 4 + j if AXIS == 0 else i0
        a1 = i1 * 4 + j if AXIS == 1 else i1
        here = inside & (a0 < n0) & (a1 < n1)
        value = tl.load(score_ptr + a0 * s0 + a1 * s1 + i2 * s2, mask=here, other=0.0).to(tl.float32)
        if MAGNITUDE:
            value = tl.abs(value)
        total += value
        members += here.to(tl.int32)
        if HAS_CANDIDATES:
            bit = a0 * t0 + a1 * t1 + i2 * t2
            packed = tl.load(candidates_ptr + bit // 8, mask=here, other=255).to(tl.int32)
            allowed = allowed & (((packed >> (bit % 8).to(tl.int32)) & 1) != 0)
    if AXIS >= 0:
        # Through float64, which cannot change the result: 4s/3 is never half-way between two float32 values.
        mean = (total.to(tl.float64) * 4 / tl.maximum(members, 1).to(tl.float64)).to(tl.float32)
        total = tl.where(members < 4, mean, total)
    is_nan = inside & (total != total)
    tl.atomic_or(status_ptr, tl.max(is_nan.to(tl.int32), 0) * NAN)
    # The order of the bits of positive floats is theirs, that of negative ones the reverse. Adding 0 makes -0 equal 0.
    bits = (total + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) | _SIGN)
    tl.store(keys_ptr + group, tl.where(allowed, key, 0))


@triton.jit
def _digits(keys_ptr, prefix_ptr, segment, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This block's digits, and which of its keys are candidates that agree with the segment's prefix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + at).to(tl.uint32, bitcast=True)
    prefix = tl.load(prefix_ptr + segment).to(tl.uint32, bitcast=True)
    known: tl.constexpr = SHIFT + WIDTH
    agrees = key != 0
    if known < 32:
        agrees = agrees & ((key >> known) == (prefix >> known))
    return ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32), agrees


@triton.jit
def _count(
    keys_ptr, blocks_ptr, prefix_ptr, bins_ptr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds this block to its segment's histogram of one digit."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    digit, agrees = _digits(keys_ptr, prefix_ptr, segment, SHIFT, WIDTH, BLOCK)
    counts = tl.histogram(digit, BINS, mask=agrees)
    tl.atomic_add(bins_ptr + segment * BINS + tl.arange(0, BINS), counts, mask=counts > 0)


@triton.jit
def _pick(
    bins_ptr, prefix_ptr, left_ptr, status_ptr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SHORTAGE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program per segment: appends the last chosen key's digit to prefix, and takes the keys above it off left."""
    segment = tl.program_id(0)
    left = tl.load(left_ptr + segment)
    digit = BINS - 1 - tl.arange(0, BINS)
    counts = tl.load(bins_ptr + segment * BINS + digit)
    seen = tl.cumsum(counts, 0)
    if FIRST:
        total = tl.sum(counts, 0)
        if total < left:
            tl.atomic_or(status_ptr, SHORTAGE)
        left = tl.where(total < left, _TOO_FEW, left)
    chosen = tl.max(tl.where(seen >= left, digit, 0), 0)
    above = tl.sum(tl.where(digit > chosen, counts, 0), 0)
    # No key reaches a threshold of ones, and every candidate's is above one of zeros.
    chosen = tl.where(left == 0, (1 << WIDTH) - 1, chosen)
    chosen = tl.where(left == _TOO_FEW, 0, chosen)
    tl.store(left_ptr + segment, tl.where(left > 0, left - above, left))
    tl.store(prefix_ptr + segment, tl.load(prefix_ptr + segment) | (chosen << SHIFT))


@triton.jit
def _count_ties(keys_ptr, blocks_ptr, prefix_ptr, ties_ptr, BLOCK: tl.constexpr):
    """How many keys of this block are at its segment's threshold."""
    threshold = tl.load(prefix_ptr + tl.load(blocks_ptr + 2 * tl.program_id(0)))
    key = tl.load(keys_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(ties_ptr + tl.program_id(0), tl.sum((key == threshold).to(tl.int32), 0))


@triton.jit
def _choose(keys_ptr, blocks_ptr, prefix_ptr, left_ptr, ties_ptr, before_ptr, BLOCK: tl.constexpr):
    """Turns the keys of a block into marks, 1 where chosen. before holds the ties up to and with each block."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    threshold = tl.load(prefix_ptr + segment)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + at)
    tie = (key == threshold).to(tl.int32)
    # Minus its own ties: a sum that ends before this block, or before the first block of the segment.
    earlier = tl.load(before_ptr + tl.program_id(0)) - tl.load(ties_ptr + tl.program_id(0))
    earlier -= tl.load(before_ptr + first) - tl.load(ties_ptr + first)
    rank = earlier + tl.cumsum(tie, 0)
    above = key.to(tl.uint32, bitcast=True) > threshold.to(tl.uint32, bitcast=True)
    chosen = above | ((tie != 0) & (rank <= tl.load(left_ptr + segment)))
    tl.store(keys_ptr + at, chosen.to(tl.int32))


@triton.jit
def _write(marks_ptr, mask_ptr, size, n0, n1, n2, t0, t1, t2, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Packs the marks of one tensor's groups, a tile of bytes x 8 elements of the mask's storage."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    i0 = (at // t0) % n0
    i1 = (at // t1) % n1
    i2 = (at // t2) % n2
    width = (n1 + 3) // 4 if AXIS == 1 else n1
    group = ((i0 // 4 if AXIS == 0 else i0) * width + (i1 // 4 if AXIS == 1 else i1)) * n2 + i2
    mark = tl.load(marks_ptr + group, mask=at < size, other=0)
    tl.store(mask_ptr + byte, tl.sum(mark << bit[None, :], 1).to(tl.uint8), mask=byte * 8 < size)


def _loops(score: Tensor) -> tuple[list[int], list[int], list[int]] | None:
    """(sizes, strides of the scores, strides of their mask) of three nested loops over a tensor, or None."""
    # Of a twin without memory.
    mask = storage_order(torch.empty_strided(score.shape, score.stride(), device="meta")).stride()
    shape, strides = list(score.shape), [list(score.stride()), list(mask)]
    lead = 2 if score.dim() > 1 else 0
    tail = [i for i in range(lead, score.dim()) if shape[i] != 1]
    for s in strides:
        if any(s[i] != s[j] * shape[j] for i, j in zip(tail, tail[1:], strict=False)):
            return None
    sizes = [*shape[:lead], *[1] * (2 - lead), math.prod(shape[lead:])]
    last = tail[-1] if tail else None
    found = [[*s[:lead], *[1] * (2 - lead), 1 if last is None else s[last]] for s in strides]
    # What a dimension of size 1 is multiplied or divided by does not matter, unless it is 0.
    scores, masks = ([1 if n == 1 else s for n, s in zip(sizes, f, strict=True)] for f in found)
    return sizes, scores, masks


def _groups(sizes: Sequence[int], axis: int) -> int:
    return math.prod(-(-n // 4) if dim == axis else n for dim, n in enumerate(sizes))


def _uncovered(scores: Sequence[Tensor], keep: Sequence[int], global_budget: bool, pattern: str, *rest: Any) -> str:
    """Why the reference must run, or ''."""
    if not scores:
        return EMPTY
    if pattern not in _AXIS:
        return "n:m patterns have no Triton kernel"
    for i, score in enumerate(scores):
        if score.dtype == torch.float64:
            return f"scores[{i}] is float64"
        if score.numel() and _loops(score) is None:
            return f"scores[{i}] has the strides {score.stride()}"
    return ""


def _select(keys: Tensor, blocks: Tensor, left: Tensor, status: Tensor) -> None:
    """Keys into marks, in place: the ``left`` best of each segment."""
    block, warps = CONFIGURATIONS["select"]
    count, segments, device = blocks.shape[0], left.shape[0], keys.device
    bins = torch.zeros((len(DIGITS), segments, _BINS), dtype=torch.int32, device=device)
    prefix = torch.zeros(segments, dtype=torch.int32, device=device)
    for i, (shift, width) in enumerate(DIGITS):
        digit = dict(SHIFT=shift, WIDTH=width, BINS=_BINS, num_warps=warps)
        if count:
            wrapped(_count)[(count,)](keys, blocks, prefix, bins[i], BLOCK=block, **digit)
        wrapped(_pick)[(segments,)](bins[i], prefix, left, status, FIRST=i == 0, SHORTAGE=STATUS_TOO_FEW, **digit)
    if count:
        ties = torch.empty(count, dtype=torch.int32, device=device)
        wrapped(_count_ties)[(count,)](keys, blocks, prefix, ties, BLOCK=block, num_warps=warps)
        before = ties.cumsum(0, dtype=torch.int32)
        wrapped(_choose)[(count,)](keys, blocks, prefix, left, ties, before, BLOCK=block, num_warps=warps)


@operator(_uncovered)
def topk_mask(
    scores: Sequence[Tensor], keep: Sequence[int], global_budget: bool, pattern: str, magnitude: bool,
    candidates: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The operator on GPU tensors that are not `uncovered`."""
    check_lists(scores, keep, global_budget, pattern, candidates)
    axis, device = _AXIS[pattern], scores[0].device
    block = CONFIGURATIONS["select"][0]
    loops = [_loops(s) if s.numel() else None for s in scores]
    groups = [_groups(found[0], axis) if found else 0 for found in loops]
    counts = [triton.cdiv(n, block) for n in groups]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = [(0, 0) if global_budget else (i, starts[i]) for i, n in enumerate(counts) for _ in range(n)]
    blocks = table_on(device, rows, torch.int32).reshape(-1, 2)
    left = table_on(device, [min(k, 2**31 - 1) for k in keep], torch.int32)
    keys = torch.empty(len(rows) * block, dtype=torch.int32, device=device)
    status = torch.zeros((), dtype=torch.int32, device=device)
    own, warps = CONFIGURATIONS["score"]
    for i, found in enumerate(loops):
        if found:
            packed = candidates[i] if candidates else None
            wrapped(_score)[(counts[i] * (block // own),)](
                scores[i].detach(), status if packed is None else packed, keys[starts[i] * block :], status, groups[i],
                *found[0], *found[1], *found[2], AXIS=axis, MAGNITUDE=magnitude, HAS_CANDIDATES=packed is not None,
                NAN=STATUS_NAN, BLOCK=own, num_warps=warps,
            )  # fmt: skip
    _select(keys, blocks, left, status)
    masks = [s.new_empty(((s.numel() + 7) // 8,), dtype=torch.uint8) for s in scores]
    own, warps = CONFIGURATIONS["write"]
    for i, found in enumerate(loops):
        if found:
            wrapped(_write)[(triton.cdiv(masks[i].numel(), own),)](
                keys[starts[i] * block :], masks[i], scores[i].numel(), *found[0], *found[2],
                AXIS=axis, BLOCK=own, num_warps=warps,
            )  # fmt: skip
    return masks, status
