"""topk_nested: the masks of several global top-k choices among the same scores.

For each count of `keep` it gives what `topk_mask` gives for that count over the whole list, bit for bit; a mask of
fewer groups lies inside those of more. Single weights and blocks; an n:m pattern has no count. On a CPU the scores are
read once. On a GPU, and where nothing is compiled, the reference serves it: one `topk_mask` for each count.

`hint` is for scores that move little from call to call. It changes no result, only the time on a CPU: the threshold is
looked for near the last one first, without a sample of the scores. It is None or contiguous int64 of shape
(number of counts, 2) on the CPU, zeros at first; the operator returns the next one (zeros for None), with which the
function overwrites the one given. What it holds is nobody else's business, but any numbers will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.topk_mask import OP as TOPK_MASK
from sparsekern.ops.topk_mask import check_count, check_scores, group_count, parse_pattern, raise_status


def reference(scores: Sequence[Tensor], keep: Sequence[int], pattern: str, magnitude: bool, hint=None):
    _check(scores, keep, pattern, hint)
    found = [TOPK_MASK(list(scores), [count], True, pattern, magnitude, []) for count in keep]
    status = torch.stack([status for _, status in found]).amax()
    return [mask for masks, _ in found for mask in masks], status, torch.zeros(len(keep), 2, dtype=torch.int64)


def fake(scores: Sequence[Tensor], keep: Sequence[int], pattern: str, magnitude: bool, hint=None):
    _check(scores, keep, pattern, hint)
    masks = [s.new_empty(((s.numel() + 7) // 8,), dtype=torch.uint8) for _ in keep for s in scores]
    status = torch.empty((), dtype=torch.int32, device=scores[0].device)
    return masks, status, torch.empty(len(keep), 2, dtype=torch.int64)


def _check(scores: Sequence[Tensor], keep: Sequence[int], pattern: str, hint: Tensor | None) -> None:
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
    if hint is None:
        return
    shape = len(keep), 2
    if hint.dtype != torch.int64 or hint.shape != shape or hint.device.type != "cpu" or not hint.is_contiguous():
        found = f"{hint.dtype} of shape {tuple(hint.shape)} on {hint.device}"
        raise ValueError(f"hint must be None or contiguous torch.int64 of shape {shape} on the CPU, got {found}")


_op = define(
    "topk_nested(Tensor[] scores, int[] keep, str pattern, bool magnitude, Tensor? hint=None)"
    " -> (Tensor[] masks, Tensor status, Tensor hint)",
    reference,
    fake,
)


def topk_nested(
    scores: Sequence[Tensor],
    keep: Sequence[int],
    *,
    pattern: str = "unstructured",
    magnitude: bool = True,
    hint: Tensor | None = None,
) -> list[list[Tensor]]:
    """For each count the packed masks, one per tensor; the module docstring is the contract."""
    _check(scores, keep, pattern, hint)
    detached = [score.detach() for score in scores]
    masks, status, found = _op(detached, list(keep), pattern, bool(magnitude), hint)
    if int(status):
        raise_status(int(status), detached, list(keep), parse_pattern(pattern)[0], bool(magnitude), [])
    if hint is not None:
        hint.copy_(found)
    return [masks[i : i + len(scores)] for i in range(0, len(masks), len(scores))]


topk_nested.reference = reference  # type: ignore[attr-defined]
