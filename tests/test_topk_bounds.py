"""topk_bounds against sorting, on every backend."""

import math

import pytest
import torch

import sparsekern as sk


def run(backend, scores, keep, *rest):
    return (sk.ops.topk_bounds.reference if backend == "reference" else sk.ops.topk_bounds)(
        scores, keep, *rest
    ).tolist()


def expected(scores, keep, factors=(1.0, 1.0, 1.0)):
    compute = torch.promote_types(torch.float32, scores[0].dtype)
    sizes = [s.to(compute).mul(f).double().abs().flatten() for s, f in zip(scores, factors, strict=False)]
    sizes = torch.cat(sizes).sort(descending=True).values.tolist()
    return [sizes[keep - 1] if keep else math.inf, sizes[keep] if keep < len(sizes) else -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1], [3, 0, 70], [1000, 17]], ids=str)
def test_every_count(backend, dtype, sizes):
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=g).mul(4).round().div(4).to(dtype) for n in sizes]  # with ties
    total = sum(sizes)
    for keep in sorted({0, 1, total // 3, total // 2, total - 1, total}):
        assert run(backend, scores, keep) == expected(scores, keep), keep
        factors = [0.1, 3.0, 0.7][: len(sizes)]
        assert run(backend, scores, keep, factors) == expected(scores, keep, factors), keep


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.999])
def test_many(backend, share, tied):
    """So many that a sample brackets the threshold; tied: half of them share one value on both sides of it."""
    if backend == "emulated-cuda":
        pytest.skip("served by the reference")
    g = torch.Generator().manual_seed(1)
    scores = [torch.randn(300, 500, generator=g), torch.randn(400, 510, generator=g).t(), -torch.rand(7, generator=g)]
    if tied:
        scores[1][::2] = 0.5
    keep = round(share * sum(s.numel() for s in scores))
    for factors in ([1.0] * 3, [0.3, 1.0, 1.1]):
        assert run(backend, scores, keep, factors) == expected(scores, keep, factors)


def test_extremes_and_nan(backend):
    scores = [torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45])]
    for keep in range(6):
        assert run(backend, scores, keep) == expected(scores, keep)
    for keep in (0, 1, 3):
        assert all(math.isnan(x) for x in run(backend, [torch.tensor([1.0, math.nan]), torch.ones(1)], keep))


def test_opcheck():
    torch.library.opcheck(torch.ops.sparsekern.topk_bounds.default, ([torch.randn(5), torch.randn(2, 3)], 4))


def test_bad_input_is_named():
    for scores, keep, error, words in [
        ([], 0, ValueError, "scores must hold at least one"),
        ([torch.ones(3)], 4, ValueError, "keep must be from 0 to 3"),
        ([torch.ones(3)], -1, ValueError, "keep must be from 0 to 3"),
        ([torch.ones(3)], (1, [1.0, 2.0]), ValueError, "factors must be empty or hold 1 numbers"),
        ([torch.ones(3).long()], 1, TypeError, r"scores\[0\] must be"),
    ]:
        with pytest.raises(error, match=words):
            sk.ops.topk_bounds(scores, *(keep if isinstance(keep, tuple) else (keep,)))
