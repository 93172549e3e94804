"""Exact top-k masks: choose exactly ``keep`` groups of weights by magnitude and return packed bits.

This file is the specification of ``torch.ops.sparsekern.topk_mask``; every kernel must equal `reference` bit for bit,
whatever the device, the thread count and the memory format.

Groups. ``keep`` counts groups. A tensor's groups form a block tensor; their order is row-major over it, whatever the
memory format of the scores. In a list, tensors follow one another in list order.

- ``"unstructured"``: every weight is a group, for tensors of any rank (a 0-d tensor has one group).
- ``"4x1"``: four consecutive OUTPUT channels (dim 0) at one (in, kh, kw). Needs two dims or more.
- ``"1x4"``, alias ``"block4"``: four consecutive INPUT channels (dim 1) at one (out, kh, kw). Needs two dims or more.
- ``"n:m"`` such as ``"2:4"``, 1 <= n <= m: in every m consecutive input channels (dim 1) the n best weights are kept;
  ``keep`` must be None. A shorter tail group of r weights keeps min(n, r). Needs two dims or more.

Blocks are aligned to channel 0. The last block of an axis that 4 does not divide is shorter (r = 1, 2 or 3 weights).

Score. With ``magnitude`` weights a are ranked by |a|, otherwise by a.

- Single weights (unstructured, n:m) are compared by value without rounding: float16, bfloat16, float32 and float64
  values all are float64 values, so lists may mix types. -0.0 equals 0.0. Infinities are ordinary, extreme values.
- Blocks are scored in float32: each weight is rounded to float32, then ((|a| + |b|) + |c|) + |d| in index order, one
  rounding per addition. A tail of r weights scores that sum of its r weights times 4/r, rounded once (its mean,
  brought to the scale of a full block). Sum and mean rank full blocks alike, as in neuralmagic/sparseml.

Choice. The ``keep`` highest scores win; between equal scores the lower index wins. ``keep`` is one int for the whole
list (one global ranking) or one int per tensor. 0 keeps nothing; the number of groups keeps all.

Candidates. Packed masks; only groups whose weights ALL are candidates can be chosen, so the result is a subset of the
candidates. An entry None, or None for the list, means everything. An n:m group keeps at most as many weights as it has
candidates.

Status. The operator also returns an int32 scalar on the scores' device: 0, or the sum of 1 (a NaN score, candidate or
not; a block that adds inf and -inf scores NaN) and 2 (fewer candidate groups than ``keep``). Status 1 leaves the masks
unspecified, status 2 alone keeps all candidates. The wrapper reads it, one synchronisation, and raises;
``check=False`` does not, and is safe to capture in a graph.

Result. One packed mask per tensor, uint8, ceil(numel / 8) bytes, bit i of byte j is weight 8j + i in the storage order
of the score tensor, padding bits zero (see `sparsekern.ops.packing`). Not differentiable.

The exact-count rule is that of arXiv 2308.02060 and neuralmagic/sparseml, the n:m rule that of aojunzz/NM-sparsity.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.packing import pack_mask, storage_order, unpack_mask

SCHEMA = (
    "topk_mask(Tensor[] scores, int[] keep, bool global_budget, str pattern, bool magnitude, Tensor?[] candidates)"
    " -> (Tensor[] masks, Tensor status)"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATUS_NAN, STATUS_TOO_FEW = 1, 2
_BLOCK_AXIS = {"4x1": 0, "1x4": 1}
_PATTERNS = '"unstructured", "4x1", "1x4" (alias "block4") or "n:m" with 1 <= n <= m, such as "2:4"'


def parse_pattern(pattern: str) -> tuple[str, int, int]:
    """The pattern's canonical name with (n, m); n = m = 0 for patterns that take a ``keep``."""
    if isinstance(pattern, str):
        name = "1x4" if pattern == "block4" else pattern
        if name == "unstructured" or name in _BLOCK_AXIS:
            return name, 0, 0
        # ASCII digits only: \d and int() would also take other scripts.
        found = re.fullmatch(r"([0-9]+):([0-9]+)", name)
        if found and 1 <= int(found[1]) <= int(found[2]):
            return name, int(found[1]), int(found[2])
    raise ValueError(f"pattern={pattern!r}: expected {_PATTERNS}")


def group_count(shape: Sequence[int], pattern: str) -> int:
    """How many groups ``keep`` can choose from in one tensor; n:m patterns count weights."""
    axis, count = _BLOCK_AXIS.get(parse_pattern(pattern)[0]), 1
    for dim, size in enumerate(shape):
        count *= -(-size // 4) if dim == axis else size
    return count


def _split(values: Tensor, axis: int, size: int, fill: float | bool) -> Tensor:
    """Cut ``axis`` into groups of ``size``, the last one filled up; the place inside a group becomes the last dim."""
    moved = values.movedim(axis, -1)
    padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % size), value=fill)
    return padded.unflatten(-1, (padded.shape[-1] // size, size))


def _block_scores(score: Tensor, axis: int, magnitude: bool) -> Tensor:
    values = score.float().abs() if magnitude else score.float()
    a, b, c, d = _split(values, axis, 4, 0.0).unbind(-1)
    sums = ((a + b) + c) + d
    tail = score.shape[axis] % 4
    if tail and sums.numel():
        # Through float64, which cannot change the result: 4s/3 is never half-way between two float32 values. A float32
        # division by a scalar is, on CUDA, a multiplication by the rounded reciprocal.
        last = sums[..., -1].double() * 4 / tail
        sums = torch.cat([sums[..., :-1], last.float().unsqueeze(-1)], -1)
    return sums.movedim(-1, axis)


def _groups(score: Tensor, name: str, magnitude: bool, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and candidacy (bool) of all groups, shaped as the block tensor."""
    allowed = torch.ones_like(score, dtype=torch.bool) if candidates is None else unpack_mask(candidates, score)
    if name in _BLOCK_AXIS:
        axis = _BLOCK_AXIS[name]
        return _block_scores(score, axis, magnitude), _split(allowed, axis, 4, True).all(-1).movedim(-1, axis)
    return score.abs() if magnitude else score, allowed


def _select(keys: Tensor, allowed: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The ``keep`` best of 1-d ``keys`` and whether there were too few candidates, without synchronising."""
    too_few, keep = allowed.sum() < keep, min(keep, keys.numel())
    if keep == 0:
        return torch.zeros_like(allowed), too_few
    # Those not allowed share -inf with true -inf scores, so ties are filtered by candidacy once more.
    ranked = torch.where(allowed, keys if keys.dtype == torch.float64 else keys.float(), float("-inf"))
    threshold = ranked.kthvalue(keys.numel() - keep + 1).values
    above = ranked > threshold
    ties = (ranked == threshold) & allowed
    return above | (ties & (ties.cumsum(0) <= keep - above.sum())), too_few


def _select_n_of_m(keys: Tensor, allowed: Tensor, n: int, m: int) -> Tensor:
    """The ``n`` best of every ``m`` along dim 1."""
    # Adding 0.0 turns -0.0 into 0.0, which a sort by bit pattern would tell apart.
    grouped, open_ = _split(keys + 0.0, 1, m, float("-inf")), _split(allowed, 1, m, False)
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    # Candidates first, each part still by score: a candidate at -inf precedes everything not allowed.
    order = order.gather(-1, open_.gather(-1, order).byte().argsort(dim=-1, descending=True, stable=True))
    chosen = torch.zeros_like(open_).scatter(-1, order[..., :n], True) & open_
    return chosen.flatten(-2).narrow(-1, 0, keys.shape[1]).movedim(-1, 1)


def _spread(chosen: Tensor, score: Tensor, blocks: torch.Size, name: str) -> Tensor:
    """Per-group choice (1-d) to a mask of the weights."""
    chosen = chosen.reshape(blocks)
    if name not in _BLOCK_AXIS:
        return chosen
    axis = _BLOCK_AXIS[name]
    return chosen.repeat_interleave(4, axis).narrow(axis, 0, score.shape[axis])


def _pack(masks: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Packed in the scores' storage order, which the computation above ignores."""
    return [pack_mask(storage_order(s).copy_(m)) for m, s in zip(masks, scores, strict=True)]


def check_lists(
    scores: Sequence[Tensor], keep: Sequence[int], global_budget: bool, pattern: str,
    candidates: Sequence[Tensor | None],
) -> tuple[str, int, int]:  # fmt: skip
    """The pattern, parsed. ``keep`` must have one entry if ``global_budget``, else one per tensor, and none for n:m;
    ``candidates`` none or one per tensor."""
    name, n, m = parse_pattern(pattern)
    wanted = 0 if n else 1 if global_budget else len(scores)
    if len(keep) != wanted or len(candidates) not in (0, len(scores)) or any(k < 0 for k in keep):
        raise ValueError(f"keep={keep} must hold {wanted} counts, candidates 0 or {len(scores)}, got {len(candidates)}")
    return name, n, m


def reference(
    scores: Sequence[Tensor], keep: Sequence[int], global_budget: bool, pattern: str, magnitude: bool,
    candidates: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Plain PyTorch: (packed masks, status); `check_lists` says what the lists hold."""
    name, n, m = check_lists(scores, keep, global_budget, pattern, candidates)
    if not scores:
        return [], torch.zeros((), dtype=torch.int32)
    pairs = [_groups(s, name, magnitude, c) for s, c in zip(scores, candidates or [None] * len(scores), strict=True)]
    nan = torch.stack([keys.isnan().any() for keys, _ in pairs]).any().int() * STATUS_NAN
    if n:
        picked = [_select_n_of_m(keys, allowed, n, m) for keys, allowed in pairs]
        return _pack(picked, scores), nan
    flat_keys, flat_allowed = [k.reshape(-1) for k, _ in pairs], [a.reshape(-1) for _, a in pairs]
    if global_budget:
        dtype = torch.float64 if any(k.dtype == torch.float64 for k in flat_keys) else torch.float32
        # Promotion is exact. A reference may copy everything; the kernels must not.
        chosen, too_few = _select(torch.cat([k.to(dtype) for k in flat_keys]), torch.cat(flat_allowed), keep[0])
        parts = list(chosen.split([k.numel() for k in flat_keys]))
    else:
        results = [_select(k, a, count) for k, a, count in zip(flat_keys, flat_allowed, keep, strict=True)]
        parts, too_few = [r[0] for r in results], torch.stack([r[1] for r in results]).any()
    masks = [_spread(p, s, keys.shape, name) for p, s, (keys, _) in zip(parts, scores, pairs, strict=True)]
    return _pack(masks, scores), nan + too_few.int() * STATUS_TOO_FEW


def fake(
    scores: Sequence[Tensor], keep: Sequence[int], global_budget: bool, pattern: str, magnitude: bool,
    candidates: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Shapes only: they depend on the number of weights and on nothing else."""
    status = torch.empty((), dtype=torch.int32, device=scores[0].device if scores else "cpu")
    return [s.new_empty(((s.numel() + 7) // 8,), dtype=torch.uint8) for s in scores], status


OP = define(SCHEMA, reference, fake)


def check_scores(scores: Sequence[Tensor], name: str) -> None:
    if not isinstance(scores, (list, tuple)):
        raise TypeError(f"scores is a {type(scores).__name__}: expected a list of tensors")
    for i, score in enumerate(scores):
        if not isinstance(score, Tensor):
            raise TypeError(f"scores[{i}] is a {type(score).__name__}: expected a tensor")
        if score.dtype not in DTYPES:
            raise TypeError(f"scores[{i}] has dtype {score.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if score.layout != torch.strided:
            raise ValueError(f"scores[{i}] has layout {score.layout}: expected a dense (torch.strided) tensor")
        if score.device != scores[0].device:
            raise ValueError(f"scores[{i}] is on {score.device}: expected {scores[0].device}, the device of scores[0]")
        if name != "unstructured" and score.dim() < 2:
            raise ValueError(f"scores[{i}] has {score.dim()} dim(s): expected two or more for pattern={name!r}")


def check_count(label: str, value: object, groups: int) -> int:
    # First what is nearly always so: to ask for the protocol takes microseconds.
    if type(value) is not int and (isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex)):
        raise TypeError(f"{label}={value!r} is a {type(value).__name__}: expected an int")
    count = operator.index(value)
    if not 0 <= count <= groups:
        raise ValueError(f"{label}={count}: expected 0 to {groups}, the number of groups")
    return count


def _check_keep(scores: Sequence[Tensor], keep: object, name: str, n: int) -> tuple[list[int], bool]:
    """The operator's ``keep`` and ``global_budget``."""
    if n:
        if keep is not None:
            raise ValueError(f"keep={keep!r}: expected None for pattern={name!r}, which fixes the count itself")
        return [], False
    if keep is None:
        raise ValueError(f"keep=None: expected an int or a list of ints for pattern={name!r}")
    groups = [group_count(score.shape, name) for score in scores]
    if not isinstance(keep, (list, tuple)):
        return [check_count("keep", keep, sum(groups))], True
    if len(keep) != len(scores):
        raise ValueError(f"keep has {len(keep)} entries: expected {len(scores)}, one per tensor of scores")
    return [check_count(f"keep[{i}]", k, g) for i, (k, g) in enumerate(zip(keep, groups, strict=True))], False


def _check_candidates(scores: Sequence[Tensor], candidates: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    if candidates is None:
        return []
    if not isinstance(candidates, (list, tuple)) or len(candidates) != len(scores):
        found = f"{len(candidates)} entries" if isinstance(candidates, (list, tuple)) else type(candidates).__name__
        raise ValueError(f"candidates: expected None or a list of {len(scores)}, one per tensor of scores; got {found}")
    for i, (packed, score) in enumerate(zip(candidates, scores, strict=True)):
        if packed is None:
            continue
        size = (score.numel() + 7) // 8
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
            kind = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
            raise TypeError(f"candidates[{i}] is {kind}: expected None or a packed mask (torch.uint8)")
        if packed.shape != (size,) or packed.device != score.device:
            found = f"shape {tuple(packed.shape)} on {packed.device}"
            raise ValueError(f"candidates[{i}] has {found}: expected ({size},) on {score.device}, as scores[{i}] packs")
    return list(candidates)


def raise_status(
    status: int, scores: list[Tensor], keep: list[int], name: str, magnitude: bool, allowed: list[Tensor | None]
) -> None:
    """Explain a non-zero status. Slow, on the way to an exception only."""
    pairs = [_groups(s, name, magnitude, c) for s, c in zip(scores, allowed or [None] * len(scores), strict=True)]
    if status & STATUS_NAN:
        bad = [f"scores[{i}] ({int(keys.isnan().sum())})" for i, (keys, _) in enumerate(pairs) if keys.isnan().any()]
        raise ValueError(f"scores: NaN in {', '.join(bad)}: expected numbers (NaN groups counted in brackets)")
    counts = [int(a.sum()) for _, a in pairs]
    raise ValueError(f"keep={keep}: expected at most the number of candidate groups, per tensor {counts}")


def topk_mask(
    scores: Sequence[Tensor],
    keep: int | Sequence[int] | None,
    *,
    pattern: str = "unstructured",
    magnitude: bool = True,
    candidates: Sequence[Tensor | None] | None = None,
    check: bool = True,
) -> list[Tensor]:
    """Packed masks that keep exactly ``keep`` groups; see the head of this file for every rule."""
    name, n, _ = parse_pattern(pattern)
    check_scores(scores, name)
    counts, global_budget = _check_keep(scores, keep, name, n)
    allowed = _check_candidates(scores, candidates)
    detached = [score.detach() for score in scores]
    masks, status = OP(detached, counts, global_budget, name, bool(magnitude), allowed)
    if check and (code := int(status)):
        raise_status(code, detached, counts, name, bool(magnitude), allowed)
    return masks


topk_mask.reference = reference  # type: ignore[attr-defined]
