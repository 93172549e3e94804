"""Masks at rest: one bit per weight."""

import sys

import torch
from torch import Tensor

from sparsekern import _direct, _library
from sparsekern.ops.operands import is_dense

_to_bits = _library.define_native("_mask_to_bits_cpu(Tensor mask) -> Tensor")
_to_bytes = _library.define_native("_mask_to_bytes_cpu(Tensor(a!) mask, Tensor packed) -> ()")

# Times eight bytes of 0 or 1, read as one integer, their bits stand side by side in its highest byte: no two of the
# products meet, so nothing is carried.
_GATHER = 0x0102040810204080 if sys.byteorder == "little" else 0x8040201008040201 - 2**64
# The eight bytes of each packed one, as one integer.
_BITS = torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
_SPREAD = _BITS.view(torch.int64).view(-1)


def storage_order(like: Tensor) -> Tensor:
    """An uninitialised bool tensor with the shape of `like` and dense strides in the same order as its own."""
    return torch.empty_like(like, dtype=torch.bool, memory_format=torch.preserve_format)


def _flat(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its storage, as a view."""
    return dense.as_strided((dense.numel(),), (1,))


def compiled(*tensors: Tensor) -> bool:
    """Whether functions on masks run compiled code for these tensors."""
    return _library.kernels_loaded and tensors[0].device.type == "cpu" and _direct.plain(*tensors)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor into uint8: bit i of byte j is element 8j + i in the order of the mask's storage.

    The result is 1-d with ceil(numel / 8) bytes; padding bits are zero. A mask that is not dense (a slice, say)
    counts in the order of its strides. Raises TypeError if `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    ready = is_dense(mask) and mask.storage_offset() % 8 == 0
    bits = _flat(mask if ready else storage_order(mask).copy_(mask))
    if compiled(bits):
        return _to_bits(bits)
    if bits.numel() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    return bits.view(torch.int64).mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The bool mask of a packed one, with the shape and stride order of `like`.

    Raises ValueError if `packed` is not 1-d uint8 with ceil(like.numel() / 8) bytes.
    """
    if packed.dtype != torch.uint8 or packed.shape != ((like.numel() + 7) // 8,):
        raise ValueError(
            f"packed must be uint8 of shape ({(like.numel() + 7) // 8},) for a tensor of {like.numel()} elements, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    mask = storage_order(like)
    if mask.device == packed.device and compiled(mask, packed):
        _to_bytes(_flat(mask), packed.contiguous())
        return mask
    table = _SPREAD.to(packed.device)
    _flat(mask).copy_(table.index_select(0, packed.int()).view(torch.bool)[: like.numel()])
    return mask


def count_live(packed: Tensor) -> Tensor:
    """How many bits of a packed mask are set, an int64 scalar."""
    # Summed in pairs, fours and eights of each byte: a bool mask would be eight times as much memory.
    x = packed - ((packed >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum()
