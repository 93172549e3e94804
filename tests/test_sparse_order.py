"""Flat blocks in the order that the CPU kernels read fastest: whatever it is, results are those of the structure's."""

from __future__ import annotations

import pytest
import torch
from conftest import NATIVE
from test_sparse_kernels import block_mask

import sparsekern as sk

# out, in, kernel, size, stride, padding, dilation, groups: enough for several slices of the tile, also of gradients
CASES = [
    (104, 120, (3, 3), (14, 14), 1, 1, 1, 1),
    (104, 240, (3, 3), (14, 15), 2, 1, 1, 2),  # four phases, each with slices
    (104, 120, (3, 3), (9, 15), 1, 0, 1, 1),  # the last tap begins on a vector: nothing is read behind it
    (96, 200, (2, 5), (9, 33), 1, 2, (3, 2), 1),
    (104, 120, (3, 3), (6, 6), 1, 1, 1, 1),  # tiles of all instruction sets are as wide
]


@pytest.fixture(params=[name for name in NATIVE if name != "scalar"])
def isa(request):
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa(request.param)
    yield request.param
    torch.ops.sparsekern.set_cpu_isa(before)


def operands(case, pattern):
    """Input, weight, bias, mask and geometry."""
    out, channels, kernel, size, *geometry = case
    torch.manual_seed(0)
    shape = out, channels // geometry[-1], *kernel
    mask = block_mask(shape, pattern, 0.4)
    return torch.randn(1, channels, *size), torch.randn(shape), torch.randn(out), mask, geometry


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
def test_sums_of_slices_agree_with_float64(isa, case, pattern, threads):
    x, w, b, mask, geometry = operands(case, pattern)
    s = sk.ops.sparse_structure(mask, pattern, groups=geometry[-1])
    a, kept = x.double().requires_grad_(), torch.where(mask, w, 0).double()
    exact = torch.nn.functional.conv2d(a, kept, b.double(), *geometry)
    grad = torch.randn_like(exact)
    (exact_grad,) = torch.autograd.grad(exact, a, grad)
    residual = torch.randn(exact.shape)
    found = {}
    for n in (1, 3):
        threads(n)
        given = x.detach().requires_grad_()
        result = sk.ops.sparse_conv2d(given, torch.where(mask, w, torch.nan), s, b, *geometry)
        (result_grad,) = torch.autograd.grad(result, given, grad.float())
        with torch.no_grad():
            packed = sk.ops.sparse_conv2d(x, s.pack(w), s, b, *geometry)
            fused = sk.ops.sparse_conv2d(x, s.pack(w), s, b, *geometry, scale=b, residual=residual, activation="relu")
        found[n] = [t.detach() for t in (result, result_grad, packed, fused)]
    assert all(map(torch.equal, found[1], found[3])) and torch.equal(found[1][0], found[1][2])
    steps = (exact - b[:, None, None].double()) * b[:, None, None] + b[:, None, None] + residual
    for got, want in zip(found[1], (exact, exact_grad, exact, steps.relu()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * mask[0].numel() ** 0.5 * 5)


@pytest.mark.skipif(len(NATIVE) < 2, reason="one instruction set")
@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
def test_an_order_is_of_one_instruction_set(pattern):
    x, w, b, mask, geometry = operands(CASES[-1], pattern)
    s = sk.ops.sparse_structure(mask, pattern)
    want = torch.nn.functional.conv2d(x.double(), torch.where(mask, w, 0).double(), b.double(), *geometry)
    before = torch.ops.sparsekern.cpu_isa()
    for isa in (*NATIVE, *reversed(NATIVE)):
        torch.ops.sparsekern.set_cpu_isa(isa)
        found = sk.ops.sparse_conv2d(x, w, s, b, *geometry)
        torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-4)
    torch.ops.sparsekern.set_cpu_isa(before)
