"""Triton kernels, interpreted, at sizes of several programs in each dimension with a tail. Run by test_triton.py."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from test_masked_sgd import OPTIONS, problem, step
from test_sparse_kernels import block_mask
from topk_oracle import draw, groups_of, same

import sparsekern as sk
from sparsekern.triton import gather, steps, topk_mask

LAST = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_kernels_run_and_nothing_else_does():
    for name in sk.backends.TRITON:
        assert sk.backends.chosen(name, "CPU") == "triton"
    with pytest.warns(RuntimeWarning, match=r"topk_mask has no Triton kernel .* \(scores\[0\] is float64\)"):
        sk.ops.topk_mask([torch.ones(3, dtype=torch.float64)], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.ops.topk_mask([torch.ones(3, dtype=torch.float64)], 1)  # said once
        sk.ops.topk_mask([torch.ones(3)], 1)
        sk.ops.sparse_linear(torch.ones(0, 4), torch.ones(4, 4), sk.ops.sparse_structure(torch.ones(4, 4)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masked_sgd_in_several_programs(dtype):
    block = steps.CONFIGURATIONS[dtype.itemsize][0]
    got = problem(dtype, sizes=[5, 3 * block + 13, 0, 2 * block, 8])
    want = copy.deepcopy(got)
    for i, options in enumerate(OPTIONS):
        options = {"grad_scale": torch.tensor(3.0, dtype=torch.float64), **options} if i % 2 else options
        for operands in (got, want):
            operands[-1].copy_(torch.arange(5) % 2)
        step("triton", *got, **options)
        step("reference", *want, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("shift", [1, 4])
def test_masked_sgd_anywhere_in_memory(shift):
    memory = torch.randn(3, 700)
    got = [[t[shift : shift + 600]] for t in memory.clone()]
    want = [[t[shift : shift + 600].clone()] for t in memory]
    for backend, operands in (("triton", got), ("reference", want)):
        step(backend, *operands, [None], torch.zeros(1, dtype=torch.uint8), mu=0.9)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_masked_sgd_follows_tensors_that_move():
    for _ in range(2 * steps.KEPT_TABLES):
        got, want = problem(torch.float32, sizes=[40, 7]), problem(torch.float32, sizes=[40, 7])
        step("triton", *got, mu=0.9), step("reference", *want, mu=0.9)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(steps.tables) <= steps.KEPT_TABLES


def test_fused_multiply_add_is_rounded_once():
    x = torch.tensor([1 + 2.0**-23, 3.0, -(1 + 2.0**-20), 2.0**64])
    y = torch.tensor([1 - 2.0**-23, 1 / 3, 1 + 2.0**-20, 2.0**63])
    p, g, fresh = [-(x * y)], [y.clone()], torch.zeros(1, dtype=torch.uint8)
    (want,), (u,) = [p[0].clone()], g
    want = want.add(u, alpha=-0.3)
    step("triton", p, g, [], [None], fresh, lr=0.3)
    assert torch.equal(p[0], want)


def agrees(scores, keep, pattern, magnitude=True, candidates=()):
    arguments = scores, keep if isinstance(keep, list) else [keep], not isinstance(keep, list), pattern, magnitude
    (found, status), (want, wanted) = (
        f(*arguments, list(candidates)) for f in (torch.ops.sparsekern.topk_mask, sk.ops.topk_mask.reference)
    )
    assert same(found, want) and status == wanted, (pattern, keep)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
def test_topk_mask_in_several_programs(pattern):
    assert topk_mask.CONFIGURATIONS["select"][0] * 3 < 3 * 5 * 7 * 40
    scores = [draw((45, 70, 3), torch.float32, 0, False), draw((5,) * 4, torch.bfloat16, 1, True)]
    scores += [(draw((26, 41, 3, 3), torch.float16, 2, False) * 4).round().to(memory_format=LAST), torch.zeros(0, 4)]
    totals = [groups_of(s, pattern) for s in scores]
    allowed = [None, None, sk.ops.pack_mask(scores[2] > -3), None]
    for i, keep in enumerate([sum(totals) // 20, sum(totals) - 1, [t // 3 for t in totals], [0, 2, totals[2], 0]]):
        agrees(scores, keep, pattern, magnitude=i % 2 == 0)
    agrees(scores, sum(totals) // 9, pattern, True, allowed)
    agrees(scores, totals[:3] + [0], pattern, False, allowed)  # more than there are candidates


@pytest.mark.parametrize("kind", ["equal", "zeros", "infinite", "denormal", "close", "transposed", "sliced"])
def test_topk_mask_of_special_scores(kind):
    normal = draw((50, 130), torch.float32, 7, False)
    score = {
        "equal": normal * 0 + 2, "zeros": normal.sign() * 0, "denormal": normal * 1e-41, "close": 1 + normal * 1e-5,
        "infinite": torch.where(normal > 1, float("inf"), normal).masked_fill(normal < -1, -float("inf")),
        "transposed": normal.t(), "sliced": normal[::2, 1::2],
    }[kind]  # fmt: skip
    for keep, magnitude in ((1, True), (score.numel() // 3, False), (score.numel() // 2, True)):
        agrees([score], keep, "unstructured", magnitude)


CASES = [
    # out, in, groups, kernel, size, stride, padding, dilation, batch
    (40, 20, 1, (3, 3), (14, 14), 1, 1, 1, 2),
    (40, 20, 1, (1, 1), (15, 17), 2, 0, 1, 6),
    (24, 16, 1, (1, 1), (20, 20), 1, 0, 1, 1),
    (48, 24, 2, (3, 3), (17, 15), 2, 1, 1, 6),
    (64, 64, 1, (3, 3), (14, 14), 1, 1, 1, 1),  # of ResNet-50, its 56 x 56 pixels cropped
]


def results(function, grad, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


@pytest.mark.parametrize(("i", "case"), list(enumerate(CASES)))
def test_convolution_in_several_programs(i, case):
    out, channels, groups, kernel, size, *geometry, batch = case
    shape = (out, channels // groups, *kernel)
    pattern, dtype = list(itertools.product(["4x1", "1x4", "unstructured"], DTYPES))[(4 * i) % 9]
    mask = block_mask(shape, pattern, 0.8)
    torch.manual_seed(0)
    x, w = torch.randn(batch, channels, *size).to(dtype), torch.randn(shape).to(dtype)
    x, w = (t.to(memory_format=LAST) for t in (x, w)) if i % 2 else (x, w)
    s = sk.ops.sparse_structure(mask, pattern, groups=groups)
    run = lambda x, w: sk.ops.sparse_conv2d(x, w, s, None, *geometry, groups)  # noqa: E731
    dense = lambda x, w: torch.nn.functional.conv2d(x, torch.where(mask, w, 0), None, *geometry, groups)  # noqa: E731
    dirty = torch.where(mask, w, torch.nan)
    grad = torch.randn(dense(x, w).shape).to(dtype)
    found, exact = results(run, grad, x, dirty), results(dense, grad.double(), x.double(), w.double())
    for f, e in zip(found, exact, strict=True):
        # Sums in float32 of products without rounding, then rounded to the dtype: half a unit in the last place.
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=0.51 * torch.finfo(dtype).eps, atol=3e-5)
    assert not found[2][~mask].any()


def test_structures_are_checked_at_first_sight_and_again_after_a_change():
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    s = sk.ops.sparse_structure(w)
    sk.ops.sparse_linear(x, w, s)
    s.tensors[1][3] = 99
    with pytest.raises(ValueError, match="structure"):
        sk.ops.sparse_linear(x, w, s)


def test_a_wrong_structure_that_cannot_be_checked_reads_nothing_outside():
    x, w = torch.ones(1, 8, 1, 1), torch.ones(4, 8, 1, 1)
    grid = [[0, 2, 5, 7, 2**31 - 1], [-9, 0, 3, 8, 9]], [[-(2**31), 40, 1, 1, 3], [2**31 - 1, -(2**31), 7]]
    for pointers, indices in grid:
        tensors = [torch.tensor(t, dtype=torch.int32) for t in (pointers, indices)]
        for back in (False, True):
            result = torch.full_like(x if back else x[:, :4], torch.nan)
            source = x[:, :4] if back else x
            gather.convolve(source, w, tensors, "unstructured", None, gather.Geometry(), result, back)
            assert result.isfinite().all() and result.abs().max() <= 8
        gather.weight_gradient(x, x[:, :4], tensors, "unstructured", gather.Geometry(), torch.empty_like(w))
