"""How many weights each layer keeps: layer sizes and a sparsity in, whole numbers of kept weights out.

Pure functions of numbers. Which weights are kept is decided elsewhere; this module only fixes the exact counts, so that
every caller, on every device and rank, agrees on them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Rational, Real

__all__ = ["check_sparsity", "erk", "global_budget", "keep_count", "uniform"]


def check_sparsity(sparsity: float | Fraction, name: str = "sparsity") -> Fraction:
    """The sparsity as the exact decimal number its author wrote, or an error that names the argument `name`.

    A float goes through its shortest decimal form: the double nearest to 0.95 lies slightly below 0.95, and counts
    computed from the double itself are off by one at some sizes.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"{name} must be a number from 0 to 1, got {sparsity!r} of type {type(sparsity).__name__}")
    # Written so that NaN, for which every comparison is false, is refused too.
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{name} must be a number from 0 (keep all) to 1 (keep none), got {sparsity!r}")
    if isinstance(sparsity, Rational):
        return Fraction(sparsity.numerator, sparsity.denominator)
    # float() first: the repr of a NumPy scalar is not a number's text.
    return Fraction(repr(float(sparsity)))


def keep_count(n: int, sparsity: float | Fraction) -> int:
    """How many of `n` weights stay at `sparsity`: n - round(n * sparsity).

    The product is exact, so 100 weights at 0.95 keep 5. A product that ends in exactly one half is rounded to the even
    number of pruned weights, as Python's `round` does: at sparsity 0.5, 1 weight keeps 1, 3 keep 1, 5 keep 3.
    """
    return _keep(_check_size(n, "n"), check_sparsity(sparsity))


def uniform(sizes: Mapping[str, int], sparsity: float | Fraction, dense: Iterable[str] = ()) -> dict[str, int]:
    """Kept weights per layer when every layer has the same sparsity, in the order of `sizes`.

    Layers named in `dense` keep everything. They are not compensated for: the other layers stay at `sparsity`, so the
    whole is then less sparse than `sparsity`.
    """
    exact = check_sparsity(sparsity)
    # A lone string is a collection of its letters; without this check `dense="fc"` would look for layers "f" and "c".
    if isinstance(dense, str):
        raise TypeError(f"dense must be a collection of layer names, got the single string {dense!r}")
    kept_dense = set(dense)
    unknown = sorted(kept_dense - set(sizes))
    if unknown:
        raise ValueError(f"dense names layers that are not in sizes: {unknown}; allowed are {list(sizes)}")
    counts: dict[str, int] = {}
    for name, size in sizes.items():
        n = _check_size(size, f"sizes[{name!r}]")
        counts[name] = n if name in kept_dense else _keep(n, exact)
    return counts


def erk(
    shapes: Mapping[str, Sequence[int]], sparsity: float | Fraction, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Kept weights per layer in the Erdos-Renyi-Kernel distribution (arXiv 1911.11134; google-research/rigl).

    A layer's density is eps * sum(shape) / product(shape), over all dimensions; eps is such that the whole keeps
    exactly `global_budget`. Layers that would exceed 1 are dense, and eps is solved again for the others until none
    does. Counts are rounded down and what is missing goes to the largest remainders, so they add up exactly. `sizes`
    counts something other than weights, such as blocks of four, at the same densities.
    """
    if sizes is None:
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = global_budget(sizes, sparsity)
    raw = {n: Fraction(sum(shape), math.prod(shape)) for n, shape in shapes.items() if math.prod(shape)}
    counts = dict.fromkeys(shapes, 0)
    while raw:
        eps = Fraction(left) / sum(share * sizes[name] for name, share in raw.items())
        dense = [name for name, share in raw.items() if eps * share >= 1]
        if not dense:
            break
        for name in dense:
            counts[name] = sizes[name]
            left -= sizes[name]
            del raw[name]
    exact = {name: eps * share * sizes[name] for name, share in raw.items()}
    counts.update({name: math.floor(value) for name, value in exact.items()})
    missing = left - sum(math.floor(value) for value in exact.values())
    # Stable, so that equal remainders are served in the order of the layers.
    for name in sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name])[:missing]:
        counts[name] += 1
    return counts


def global_budget(sizes: Mapping[str, int], sparsity: float | Fraction) -> int:
    """Kept weights over all layers together, for a mask chosen globally.

    Rounded once, on the total: the sum of per-layer counts may differ from it by rounding.
    """
    exact = check_sparsity(sparsity)
    return _keep(sum(_check_size(size, f"sizes[{name!r}]") for name, size in sizes.items()), exact)


def _keep(n: int, sparsity: Fraction) -> int:
    return n - round(n * sparsity)


def _check_size(value: int, name: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of weights, got {value!r} of type {type(value).__name__}")
    if size < 0:
        raise ValueError(f"{name} must be 0 or more weights, got {value!r}")
    return size
