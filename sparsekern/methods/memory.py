"""Memory that a method with a dense store keeps from step to step.

Fresh memory for a whole model in each step costs more than the arithmetic: the system clears every page of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern._library import zeros_like
from sparsekern.ops.operands import is_dense

# How many tensors (and Python's handles) hold a storage: torch uses it for its own CUDA graphs and does not document
# it. Without it gradients get fresh memory.
_holders = getattr(torch._C, "_storage_Use_Count", None)


def _count(tensor: Tensor) -> int:
    return _holders(tensor.untyped_storage()._cdata)


_ALONE = _count(torch.empty(1)) if _holders else 0


def alike(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Same shape, strides and device, and `a` is of `dtype` (default: that of `b`)."""
    same = a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
    return same and a.dtype == (dtype or b.dtype)


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    with torch.inference_mode(False):  # or autograd could never save it
        return zeros_like(torch.empty_like(like, dtype=dtype))


class Memory:
    """Tensors by the name of a weight, laid out as it is; replaced when it is moved, cast or laid out anew."""

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._shared: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def own(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name. Its contents last until the same is asked for again."""
        found = self._own.get(name)
        if found is None or not alike(found, like, dtype):
            found = self._own[name] = _new(like, dtype)
        return found

    def workspace(self, like: Tensor, number: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor whose memory all weights share, so that much of it stays in the caches; for one formula only.

        Those of another `number` lie elsewhere.
        """
        dtype = dtype or like.dtype
        if not is_dense(like):
            return torch.empty_like(like, dtype=dtype)
        key = like.device, dtype, number
        found = self._shared.get(key)
        if found is None or found.numel() < like.numel():
            found = self._shared[key] = _new(like.new_empty(like.numel()), dtype)
        return found.as_strided(like.shape, like.stride())

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """A tensor to return from a backward pass: the one of the last step, if nobody holds that any more."""
        found = self._gradients.get(name)
        if _holders is None or like.device.type != "cpu":
            return torch.empty_like(like)
        if found is None or not alike(found, like):
            found = self._gradients[name] = _new(like)
        # torch takes over as `.grad` what nobody else holds: this alias. While it lives, the next gradient needs memory
        # of its own.
        return found.detach() if _count(found) == _ALONE else torch.empty_like(like)
