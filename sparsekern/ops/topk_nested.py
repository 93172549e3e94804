"""topk_nested: the masks of several global top-k choices among the same scores.

For each count of `keep` it gives what `topk_mask` gives for that count over the whole list, bit for bit; a mask of
fewer groups lies inside those of more. Single weights and blocks; an n:m pattern has no count. On a CPU the scores are
read once. On a GPU, and where nothing is compiled, the reference serves it: one `topk_mask` for each count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.topk_mask import OP as TOPK_MASK
from sparsekern.ops.topk_mask import check_count, check_scores, group_count, parse_pattern, raise_status


def reference(scores: Sequence[Tensor], keep: Sequence[int], pattern: str, magnitude: bool):
    _check(scores, keep, pattern)
    found = [TOPK_MASK(list(scores), [count], True, pattern, magnitude, []) for count in keep]
    return [mask for masks, _ in found for mask in masks], torch.stack([status for _, status in found]).amax()


def fake(scores: Sequence[Tensor], keep: Sequence[int], pattern: str, magnitude: bool):
    _check(scores, keep, pattern)
    masks = [s.new_empty(((s.numel() + 7) // 8,), dtype=torch.uint8) for _ in keep for s in scores]
    return masks, torch.empty((), dtype=torch.int32, device=scores[0].device)


def _check(scores: Sequence[Tensor], keep: Sequence[int], pattern: str) -> None:
    """Raise ValueError or TypeError, naming the argument at fault."""
    name, n, _ = parse_pattern(pattern)
    check_scores(scores, name)
    if n:
        raise ValueError(f"pattern={pattern!r}: expected one with a count, not n:m")
    if not scores or not isinstance(keep, (list, tuple)) or not keep:
        raise ValueError(f"scores and keep must be lists of at least one entry, got {len(scores)} and {keep!r}")
    groups = sum(group_count(score.shape, name) for score in scores)
    for i, count in enumerate(keep):
        check_count(f"keep[{i}]", count, groups)


_op = define(
    "topk_nested(Tensor[] scores, int[] keep, str pattern, bool magnitude) -> (Tensor[] masks, Tensor status)",
    reference,
    fake,
)


def topk_nested(
    scores: Sequence[Tensor], keep: Sequence[int], *, pattern: str = "unstructured", magnitude: bool = True
) -> list[list[Tensor]]:
    """For each count the packed masks, one per tensor; the module docstring is the contract."""
    _check(scores, keep, pattern)
    detached = [score.detach() for score in scores]
    masks, status = _op(detached, list(keep), pattern, bool(magnitude))
    if int(status):
        raise_status(int(status), detached, list(keep), parse_pattern(pattern)[0], bool(magnitude), [])
    return [masks[i : i + len(scores)] for i in range(0, len(masks), len(scores))]


topk_nested.reference = reference  # type: ignore[attr-defined]
