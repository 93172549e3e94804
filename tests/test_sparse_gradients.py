"""Gradients of sparse_conv2d on CPU where tiles, strides and the choice of what stays in the cache matter."""

from __future__ import annotations

import pytest
import torch
from test_sparse_kernels import LAST, PATTERNS, assert_close, block_mask

import sparsekern as sk


@pytest.fixture
def cpu(native):
    if native in ("triton", "cuda", "emulated-cuda"):
        pytest.skip("of the CPU kernels: others have tiles of their own, and would take long")


def agrees(threads, which, size, out, kernel, pattern, *geometry):
    """Gradient `which` of (input, weight), in both layouts and on any number of threads, against float64."""
    torch.manual_seed(0)
    x, w = torch.randn(size), torch.randn(out, size[1], kernel, kernel)
    mask = block_mask(w.shape, pattern, 0.8)
    s = sk.ops.sparse_structure(mask, pattern)
    leaves = x.double().requires_grad_(), torch.where(mask, w, 0).double().requires_grad_()
    exact = torch.nn.functional.conv2d(*leaves, None, *geometry)
    grad = torch.randn(exact.shape)
    (want,) = torch.autograd.grad(exact, leaves[which], grad.double())
    want = torch.where(mask, want, 0) if which else want
    for form in (torch.contiguous_format, LAST):
        given = [t.to(memory_format=form).requires_grad_() for t in (x, torch.where(mask, w, torch.nan))]
        results, along = [], grad.to(memory_format=form)
        for count in (1, 3):
            threads(count)
            results += torch.autograd.grad(sk.ops.sparse_conv2d(*given, s, None, *geometry), given[which], along)
        assert torch.equal(*results)
        assert_close(results[0], want, grad[:, 0].numel() if which else mask[:, 0].numel())
        assert not (which and results[0][~mask].any())


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (3, 0)])
def test_input_gradient_beyond_one_tile(cpu, stride, padding, threads):
    """A packed input that is cut into tiles, each computed from all outputs that reach it, and its last pixels."""
    agrees(threads, 0, (2, 40, 101, 92), 8, 3, "4x1", stride, padding)


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (2, 1)])
@pytest.mark.parametrize("size, out", [((24, 24), 8), ((33, 41), 8), ((96, 112), 8), ((24, 24), 64), ((14, 14), 64)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_input_gradient_of_pixels_apart_is_zero_between(cpu, pattern, size, out, stride, threads):
    """Small images, rows off cache lines, results that go past the caches, and images that are not packed."""
    agrees(threads, 0, (5, 44, *size), out, 1, pattern, stride)


# Channels, height, width; outputs; kernel, stride, padding
@pytest.mark.parametrize("size, out, geometry", [
    ((132, 12, 11), 128, (1, 1, 0)),  # both operands where they lie; the last part of the channels is short
    ((42, 9, 11), 132, (3, 2, 1)),  # as many activations as outputs only by the phases of the stride
    ((36, 50, 30), 132, (3, 1, 1)),  # more than one tile, packed one after another
    ((140, 6, 5), 136, (1, 1, 0)),  # images together
])  # fmt: skip
@pytest.mark.parametrize("pattern", PATTERNS)
def test_weight_gradient_whichever_operand_stays(cpu, pattern, size, out, geometry, threads):
    kernel, *geometry = geometry
    agrees(threads, 1, (3, *size), out, kernel, pattern, *geometry)
