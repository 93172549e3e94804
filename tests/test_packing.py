"""Packed masks: bit order, padding, layouts, bad input."""

import pytest
import torch

import sparsekern as sk
from sparsekern.ops import packing


def test_bit_order_and_padding():
    packed = sk.ops.pack_mask(torch.tensor([True] + [False] * 8 + [True, True]))
    assert packed.tolist() == [1, 6]


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (9,), (3, 5), (6, 4, 3, 5)])
def test_round_trip(shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(sk.ops.unpack_mask(sk.ops.pack_mask(mask), mask), mask)


@pytest.mark.parametrize("count", [63, 64, 65, 200, 70_001])
def test_compiled_code_agrees(native, count, threads, monkeypatch):
    mask = torch.rand(count + 8)[8:] < 0.5  # its bytes do not begin where vectors like it
    odd = (mask.view(torch.uint8) * 254).view(torch.bool)  # as other programs may leave it: not 0 is True
    threads(3)
    packed, again = sk.ops.pack_mask(odd), sk.ops.unpack_mask(sk.ops.pack_mask(mask), mask)
    spaced = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(sk.ops.unpack_mask(spaced, mask), mask)
    monkeypatch.setattr(packing, "compiled", lambda *_: False)
    assert torch.equal(packed, sk.ops.pack_mask(mask)) and torch.equal(again, mask)
    assert torch.equal(again.view(torch.uint8), sk.ops.unpack_mask(packed, mask).view(torch.uint8))


def test_storage_order_of_channels_last():
    mask = (torch.rand(6, 4, 3, 5) < 0.5).to(memory_format=torch.channels_last)
    packed = sk.ops.pack_mask(mask)
    assert torch.equal(packed, sk.ops.pack_mask(mask.permute(0, 2, 3, 1).contiguous()))
    again = sk.ops.unpack_mask(packed, mask)
    assert torch.equal(again, mask) and again.stride() == mask.stride()


def test_bad_input():
    with pytest.raises(TypeError, match="mask must be a bool tensor, got torch.float32"):
        sk.ops.pack_mask(torch.zeros(3))
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \(2,\)"):
        sk.ops.unpack_mask(torch.zeros(1, dtype=torch.uint8), torch.zeros(9))
