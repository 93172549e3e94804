"""Packed weights."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk

PATTERNS = ["unstructured", "1x4", "4x1"]
LAST = torch.channels_last


def layer(pattern, shape=(8, 8, 3, 3), groups=1):
    """A weight, its structure and its mask, of about half of the blocks."""
    torch.manual_seed(0)
    grid = list(shape)
    axis = {"4x1": 0, "1x4": 1}.get(pattern)
    if axis is not None:
        grid[axis] //= 4
    mask = torch.rand(grid) < 0.5
    mask = mask if axis is None else mask.repeat_interleave(4, axis)
    return torch.randn(shape), sk.ops.sparse_structure(mask, pattern, groups=groups), mask


@pytest.mark.parametrize("shape", [(8, 4), (8, 8, 3, 2), (6, 5, 1, 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_and_unpack_are_inverse(pattern, shape):
    w, s, mask = layer("unstructured" if shape[0] == 6 else pattern, shape)
    values = s.pack(w)
    assert values.shape == (s.kept,) == (int(mask.sum()),)
    assert torch.equal(s.unpack(values), torch.where(mask, w, 0))
    with pytest.raises(ValueError, match="weight has shape"):
        s.pack(w[1:])
    with pytest.raises(ValueError, match="packed values"):
        s.unpack(values[1:])


def test_packed_values_are_in_the_order_of_the_structure():
    w = torch.arange(8 * 8).reshape(8, 8).float()
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[0, 5] = keep[0, 2] = keep[3, 1] = True
    assert sk.ops.sparse_structure(keep).pack(w).tolist() == [2, 5, 25]
    wide = torch.zeros(8, 8, dtype=torch.bool)
    wide[2, 4:] = wide[5, :4] = wide[5, 4:] = True
    assert sk.ops.sparse_structure(wide, "1x4").pack(w).tolist() == [*range(20, 24), *range(40, 48)]
    tall = wide.t()
    assert sk.ops.sparse_structure(tall, "4x1").pack(w).tolist() == [5, 13, 21, 29, 34, 42, 50, 58, 37, 45, 53, 61]


@pytest.mark.parametrize("geometry", [(1, 0, 1, 1), (2, 1, 1, 2), ((1, 3), (2, 0), (2, 1), 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("last", [False, True])
def test_packed_conv2d_equals_dense_conv2d(backend, pattern, geometry, last):
    groups = geometry[-1]
    if backend == "emulated-cuda" and groups > 1:
        pytest.skip("takes torch's dense path")
    w, s, _ = layer(pattern, (8, 8 // groups, 3, 3), groups)
    x, b = torch.randn(2, 8, 9, 7, requires_grad=True), torch.randn(8, requires_grad=True)
    form = LAST if last else torch.contiguous_format
    packed = s.pack(w).requires_grad_()
    found = sk.ops.sparse_conv2d(x.to(memory_format=form), packed, s, b, *geometry)
    weight = w.clone().requires_grad_()
    want = sk.ops.sparse_conv2d(x.to(memory_format=form), weight, s, b, *geometry)
    assert torch.equal(found, want) and found.stride() == want.stride()
    grads = torch.autograd.grad(found.square().sum(), (x, packed, b))
    expected = torch.autograd.grad(want.square().sum(), (x, weight, b))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[2], expected[2])
    assert torch.equal(grads[1], s.pack(expected[1]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_linear_equals_dense_linear(backend, pattern):
    w, s, _ = layer(pattern, (12, 16))
    x = torch.randn(3, 5, 16, requires_grad=True)
    packed, weight = s.pack(w).requires_grad_(), w.clone().requires_grad_()
    found, want = sk.ops.sparse_linear(x, packed, s), sk.ops.sparse_linear(x, weight, s)
    assert torch.equal(found, want)
    grads = torch.autograd.grad(found.square().sum(), (x, packed))
    expected = torch.autograd.grad(want.square().sum(), (x, weight))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[1], s.pack(expected[1]))


@pytest.mark.parametrize("dims", [2, 4])
def test_opcheck_and_gradcheck_of_packed_weights(dims):
    w, s, _ = layer("1x4", (4, 8, 2, 2)[:dims])
    x = torch.randn((2, 8, 3, 3) if dims == 4 else (3, 8), dtype=torch.float64, requires_grad=True)
    values = s.pack(w).double().requires_grad_()
    function = sk.ops.sparse_conv2d if dims == 4 else sk.ops.sparse_linear
    assert torch.autograd.gradcheck(lambda x, v: function(x, v, s), (x, values))
    operands = x.detach().float().requires_grad_(), s.pack(w).requires_grad_(), list(s.tensors), s.layout, None
    if dims == 4:
        torch.library.opcheck(torch.ops.sparsekern.sparse_conv2d, (*operands, [1, 1], [0, 0], [1, 1], 1, s.shape))
    else:
        torch.library.opcheck(torch.ops.sparsekern.sparse_linear, (*operands, s.shape))


def test_packed_weights_of_the_wrong_size_raise():
    w, s, _ = layer("4x1")
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="packed values: expected"):
        sk.ops.sparse_conv2d(x, s.pack(w)[4:], s)
    geometry = [1, 1], [0, 0], [1, 1], 1
    op = torch.ops.sparsekern.sparse_conv2d
    with pytest.raises(ValueError, match="shape=None"):
        op(x, s.pack(w), list(s.tensors), s.layout, None, *geometry)
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        op(x, s.pack(w)[4:], list(s.tensors), s.layout, None, *geometry, s.shape)
    op(x, s.pack(w), list(s.tensors), s.layout, None, *geometry, s.shape)
    with pytest.raises((ValueError, RuntimeError), match="packed"):  # with a plan at hand
        op(x, s.pack(w)[4:], list(s.tensors), s.layout, None, *geometry, s.shape)
