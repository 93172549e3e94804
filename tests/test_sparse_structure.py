"""Structures that compiled code makes: those of plain PyTorch, and none of a mask that keeps part of a block."""

import math

import pytest
import torch
from test_sparse_kernels import block_mask

import sparsekern as sk
from sparsekern.ops.sparse_structure import _tensors, check_tensors, coarsest_structure

SHAPES = [(8, 8), (4, 68), (72, 16, 1, 1), (8, 260, 1, 1), (12, 24, 3, 3), (4, 8, 9, 8), (8, 4, 1, 64), (16, 0), (0, 4)]


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_plain_pytorch(native, shape, pattern, threads):
    for density, count in ((0.0, 1), (0.02, 3), (0.5, 2), (1.0, 1)):
        mask = block_mask(shape, pattern, 1 - density)
        threads(count)
        found = sk.ops.sparse_structure(mask, pattern)
        want = _tensors(mask, pattern, pattern, True)
        assert all(map(torch.equal, found.tensors, want)) and found.layout == pattern
        assert [t.dtype for t in found.tensors] == [torch.int32] * 2
        check_tensors(found.tensors, pattern, shape)
        # Bytes that are neither 0 nor 1 are kept, and so is a block of a weight with a single one.
        odd = (mask * torch.tensor([2, 255, 128, 64], dtype=torch.uint8)[torch.randint(4, shape)]).view(torch.bool)
        assert torch.equal(sk.ops.sparse_structure(odd, pattern).tensors[1], want[1])
        some = torch.where(mask & (torch.rand(shape) < 0.3), math.nan, 0)
        want = _tensors(some != 0, pattern, pattern, False)
        assert all(map(torch.equal, sk.ops.sparse_structure(some, pattern).tensors, want))


@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
@pytest.mark.parametrize("shape", SHAPES[:-2])
def test_each_weight_of_a_block_counts(native, shape, pattern):
    mask = block_mask(shape, pattern, 0.5)
    for at in {0, mask.numel() - 1, *torch.randint(mask.numel(), (12,)).tolist()}:
        mask.view(-1)[at] ^= True
        with pytest.raises(ValueError, match="keeps part of a block"):
            sk.ops.sparse_structure(mask, pattern)
        found = coarsest_structure(mask, 1)
        assert found.layout == "unstructured" and torch.equal(found.mask(), mask)
        mask.view(-1)[at] ^= True
    assert coarsest_structure(mask, 1).pattern == pattern


def test_any_strides_and_groups(native):
    mask = block_mask((8, 8, 3, 3), "4x1", 0.6)
    last, want = mask.to(memory_format=torch.channels_last), sk.ops.sparse_structure(mask, "4x1")
    assert torch.equal(sk.ops.sparse_structure(last, "4x1", groups=2).tensors[1], want.tensors[1])
    assert sk.ops.sparse_structure(mask, "4x1", groups=4).layout == "unstructured"
    assert torch.equal(sk.ops.sparse_structure(mask, "4x1", groups=4).mask(), mask)
