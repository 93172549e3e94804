"""Masks at rest: one bit per weight."""

import torch
from torch import Tensor

_SHIFTS = [1, 2, 4, 8, 16, 32, 64, 128]


def storage_order(like: Tensor) -> Tensor:
    """An uninitialised bool tensor with the shape of `like` and dense strides in the same order as its own."""
    return torch.empty_like(like, dtype=torch.bool, memory_format=torch.preserve_format)


def _flat(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its storage, as a view."""
    return dense.as_strided((dense.numel(),), (1,))


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor into uint8: bit i of byte j is element 8j + i in the order of the mask's storage.

    The result is 1-d with ceil(numel / 8) bytes; padding bits are zero. A mask that is not dense (a slice, say)
    counts in the order of its strides. Raises TypeError if `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    bits = _flat(storage_order(mask).copy_(mask)).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits * torch.tensor(_SHIFTS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The bool mask of a packed one, with the shape and stride order of `like`.

    Raises ValueError if `packed` is not 1-d uint8 with ceil(like.numel() / 8) bytes.
    """
    if packed.dtype != torch.uint8 or packed.shape != ((like.numel() + 7) // 8,):
        raise ValueError(
            f"packed must be uint8 of shape ({(like.numel() + 7) // 8},) for a tensor of {like.numel()} elements, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) & shifts).ne(0).view(-1)[: like.numel()]
    mask = storage_order(like)
    _flat(mask).copy_(bits)
    return mask
