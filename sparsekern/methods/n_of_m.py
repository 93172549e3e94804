"""n:m patterns: which methods take them, and the masks."""

from __future__ import annotations

import re
from fractions import Fraction

from sparsekern.distributions import check_sparsity
from sparsekern.masks import MaskSet
from sparsekern.ops import topk_mask


def is_n_of_m(pattern: str) -> bool:
    """Whether `pattern` has the form "2:4"."""
    return isinstance(pattern, str) and re.fullmatch(r"[0-9]+:[0-9]+", pattern) is not None


def check_n_of_m(pattern: str, sparsity: float | None = None) -> Fraction:
    """The sparsity 1 - n/m that the pattern fixes; ValueError for no n:m pattern or another `sparsity`."""
    if not is_n_of_m(pattern):
        raise ValueError(f'pattern must be n:m, such as "2:4", got {pattern!r}')
    n, m = map(int, pattern.split(":"))
    if not 1 <= n <= m:
        raise ValueError(f"pattern must be n:m with 1 <= n <= m, got {pattern!r}")
    fixed = 1 - Fraction(n, m)
    if sparsity is not None and check_sparsity(sparsity) != fixed:
        raise ValueError(f"sparsity must be {float(fixed)} or left out with pattern {pattern!r}, got {sparsity!r}")
    return fixed


def select_n_of_m(masks: MaskSet, pattern: str) -> None:
    """Keep the n largest of every m weights along the input axis."""
    weights = [masks.parameter(name).detach() for name in masks]
    for name, packed in zip(masks, topk_mask(weights, None, pattern=pattern), strict=True):
        masks.set_packed(name, packed)
