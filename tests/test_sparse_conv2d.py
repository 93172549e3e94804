"""sparse_conv2d against the dense convolution of torch on a weight that the test masks itself."""

from __future__ import annotations

import pytest
import torch
from test_sparse_kernels import block_mask

import sparsekern as sk

OP = torch.ops.sparsekern.sparse_conv2d
PATTERNS = ["unstructured", "1x4", "4x1"]
LAST = torch.channels_last


def run(function, *tensors):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape))
    return [result.detach(), *(t.grad for t in leaves if t is not None)]


# out, in, groups, kernel, size, stride, padding, dilation
CASES = [
    (8, 8, 1, (3, 3), (7, 5), 1, 1, 1),
    (5, 7, 1, (3, 2), (9, 8), (2, 1), (0, 2), 1),
    (8, 16, 2, (3, 3), (9, 9), 2, 1, 2),
    (6, 9, 3, (1, 3), (5, 7), (1, 3), (2, 0), (1, 2)),
    (7, 7, 7, (3, 3), (6, 5), 1, 1, 1),  # depthwise
    (8, 4, 4, (5, 3), (11, 7), 2, (2, 1), 1),  # depthwise, two outputs each: 4x1 blocks cross groups
    (4, 4, 1, (1, 1), (1, 1), 1, 0, 1),
    (16, 3, 1, (7, 7), (13, 13), 2, 3, 1),
    (3, 2, 1, (2, 2), (3, 3), 4, 0, 1),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "sparsity, batch, last", [(0.0, 2, False), (0.6, 2, False), (0.6, 2, True), (1.0, 2, True), (0.6, 0, False)]
)
def test_equals_dense(case, pattern, sparsity, batch, last):
    out, channels, groups, kernel, size, *geometry = case
    shape = (out, channels // groups, *kernel)
    mask = block_mask(shape, pattern, sparsity)
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((batch, channels, *size), shape, (out,)))
    if last:
        x, w = x.to(memory_format=LAST), w.to(memory_format=LAST)
    structure = sk.ops.sparse_structure(mask, pattern, groups=groups)
    assert torch.equal(structure.mask(), mask) and structure.kept == int(mask.sum())
    dirty = torch.where(mask, w, torch.nan)
    for bias in (b, None):
        expected = run(
            lambda x, w, b: torch.nn.functional.conv2d(x, torch.where(mask, w, 0), b, *geometry, groups), x, w, bias
        )
        found = run(lambda x, w, b: sk.ops.sparse_conv2d(x, w, structure, b, *geometry, groups), x, dirty, bias)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
        assert not found[2][~mask].any()
    assert not (last and batch) or found[0].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern):
    s = sk.ops.sparse_structure(block_mask((8, 4, 2, 3), pattern, 0.5), pattern, groups=2)
    x, w, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 8, 4, 5), (8, 4, 2, 3), (8,)))
    assert torch.autograd.gradcheck(lambda x, w, b: sk.ops.sparse_conv2d(x, w, s, b, (2, 1), 1, 1, 2), (x, w, b))


@pytest.mark.parametrize("case", CASES[:6])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(case, last):
    out, channels, groups, kernel, size, *geometry = case
    shape = (out, channels // groups, *kernel)
    s = sk.ops.sparse_structure(block_mask(shape, "1x4", 0.5), "1x4", groups=groups)
    x, w, b = torch.randn(2, channels, *size), torch.randn(shape), torch.randn(out)
    if last:
        x, w = x.to(memory_format=LAST), w.to(memory_format=LAST)
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in geometry]
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    torch.library.opcheck(OP, (x, w, list(s.tensors), s.layout, b, *pairs, groups))
    torch.library.opcheck(OP, (x, w, list(s.tensors), s.layout, None, *pairs, groups))


def test_unbatched_strided_and_empty_operands():
    w, s = torch.randn(4, 4, 3, 3), sk.ops.sparse_structure(torch.ones(4, 4, 3, 3), "4x1")
    x = torch.randn(2, 9, 8, 4).permute(0, 3, 2, 1)[:, :, ::2]
    expected = torch.nn.functional.conv2d(x, w)
    torch.testing.assert_close(sk.ops.sparse_conv2d(x, w, s), expected)
    torch.testing.assert_close(sk.ops.sparse_conv2d(x[0], w, s), expected[0])
    for out, channels in [(0, 4), (3, 0)]:
        w, b = torch.randn(out, channels, 1, 1), torch.randn(out)
        s = sk.ops.sparse_structure(w)
        y, *gradients = run(lambda x, w, b, s=s: sk.ops.sparse_conv2d(x, w, s, b), torch.ones(2, channels, 3, 3), w, b)
        assert torch.equal(y, b.reshape(-1, 1, 1).expand(2, out, 3, 3)) and not gradients[0].any()


def test_layout_falls_back_where_blocks_are_short_or_cross_groups():
    layout = lambda shape, pattern, groups: sk.ops.sparse_structure(torch.ones(shape), pattern, groups=groups).layout  # noqa: E731
    assert layout((8, 4, 3, 3), "4x1", 2) == "4x1" and layout((8, 4, 3, 3), "4x1", 4) == "unstructured"
    assert layout((8, 4, 3, 3), "block4", 4) == "1x4" and layout((8, 6, 3, 3), "1x4", 1) == "unstructured"
    assert layout((6, 4, 3, 3), "4x1", 1) == "unstructured"


def test_hostile_structures_raise():
    x, w = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 1, 1)
    for pointers, indices in [([0, 1, 1, 1, 1], [4]), ([0, 2, 2, 2, 2], [1, 1]), ([0, 3, 1, 1, 1], [0]), ([0, 1], [0])]:
        tensors = [torch.tensor(t, dtype=torch.int32) for t in (pointers, indices)]
        with pytest.raises(ValueError, match="structure"):
            OP(x, w, tensors, "unstructured", None, [1, 1], [0, 0], [1, 1], 1)
        with pytest.raises(ValueError, match="structure"):
            sk.ops.SparseStructure((4, 4, 1, 1), "unstructured", 1, "unstructured", tuple(tensors))
    s = sk.ops.sparse_structure(w)
    for name, geometry in [("stride", ([0, 1], [0, 0], [1, 1])), ("padding", ([1, 1], [-9, 0], [1, 1]))]:
        with pytest.raises(ValueError, match=name):
            OP(x, w, list(s.tensors), s.layout, None, *geometry, 1)


def test_errors_name_the_argument():
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)
    s = sk.ops.sparse_structure(w)
    for error, words, options in [
        (ValueError, "groups=2", {"groups": 2}),
        (ValueError, "stride=0", {"stride": 0}),
        (ValueError, "padding=-1", {"padding": -1}),
        (TypeError, "padding='same'", {"padding": "same"}),
        (ValueError, "dilation=", {"dilation": (1, 1, 1)}),
        (ValueError, "at least 7", {"dilation": 3}),
        (ValueError, "input has shape", {"input": x[:, :3]}),
        (ValueError, "weight has 2", {"weight": w[:, :, 0, 0]}),
        (ValueError, "bias has shape", {"bias": torch.ones(3)}),
        (TypeError, "bias has dtype", {"bias": torch.ones(4).double()}),
        (ValueError, "structure is for", {"structure": sk.ops.sparse_structure(torch.ones(4, 4, 1, 1))}),
    ]:
        with pytest.raises(error, match=words):
            sk.ops.sparse_conv2d(**{"input": x, "weight": w, "structure": s, **options})
