"""MaskSet: which weights of a model are live, at one bit per weight."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.ops import pack_mask, unpack_mask

_WRAPPER = re.compile(r"(^|\.)(module|_orig_mod)(?=\.)")


def normalise(name: str) -> str:
    """A parameter's name without the prefixes that DistributedDataParallel and torch.compile add."""
    return _WRAPPER.sub("", name).lstrip(".")


class MaskSet:
    """One packed mask per named parameter, all ones at first.

    Bits follow the storage of the parameter and are repacked when its memory format or device changed; what is saved
    and hashed is in row-major order. Parameters are matched by identity, names without wrapper prefixes. Any leaf
    tensor is accepted. Raises TypeError for what is no tensor, ValueError for two names that become one.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters[{name!r}] must be a tensor, got {type(parameter).__name__}")
            short = normalise(name)
            if short in self._parameters:
                raise ValueError(f"parameters: {name!r} and an earlier name both become {short!r}")
            self._parameters[short] = parameter
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._packed: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        for name, parameter in self._parameters.items():
            self.set(name, torch.ones_like(parameter, dtype=torch.bool))

    @classmethod
    def from_zeros(cls, model: nn.Module) -> MaskSet:
        """Masks inferred from the exact zeros of every parameter with two or more dimensions."""
        masks = cls({name: p for name, p in model.named_parameters() if p.dim() >= 2})
        for name, parameter in masks._parameters.items():
            masks.set(name, parameter.detach() != 0)
        return masks

    def __iter__(self):
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def parameter(self, name: str) -> Tensor:
        """The parameter of that name; KeyError lists the known names."""
        short = normalise(name)
        if short not in self._parameters:
            raise KeyError(f"name: no parameter {name!r}; known are {sorted(self._parameters)}")
        return self._parameters[short]

    def set(self, name: str, mask: Tensor) -> None:
        """Replace one mask by a bool tensor of the parameter's shape; True keeps the weight."""
        parameter = self.parameter(name)
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(
                f"mask must be bool of shape {tuple(parameter.shape)} for {name!r}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        ordered = torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
        self._packed[normalise(name)] = (ordered.stride(), pack_mask(ordered))

    def set_packed(self, name: str, packed: Tensor) -> None:
        """Replace one mask by packed bits in the parameter's present storage order, as `topk_mask` returns them."""
        self.set(name, unpack_mask(packed, self.parameter(name)))

    def packed(self, name: str) -> Tensor:
        """Bits in the present storage order of the parameter, on its device."""
        parameter, short = self.parameter(name), normalise(name)
        strides, bits = self._packed[short]
        if strides != torch.empty_like(parameter, device="meta").stride() or bits.device != parameter.device:
            stored = torch.empty_strided(parameter.shape, strides, dtype=torch.bool, device=bits.device)
            self.set(short, unpack_mask(bits, stored).to(parameter.device))
        return self._packed[short][1]

    def packed_for(self, parameter: Tensor) -> Tensor | None:
        """As `packed`, by identity; None for a parameter outside the set."""
        name = self._names.get(parameter)
        return None if name is None else self.packed(name)

    def bool(self, name: str) -> Tensor:
        """The mask as a bool tensor with the shape and layout of its parameter."""
        return unpack_mask(self.packed(name), self.parameter(name))

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to zero, also where it is NaN."""
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(~self.bool(name), 0)

    def density(self, name: str | None = None) -> float:
        """Share of live weights of one parameter or of all; 1.0 of nothing."""
        names = self._parameters if name is None else [name]
        total = sum(self.parameter(n).numel() for n in names)
        return sum(int(self.bool(n).sum()) for n in names) / total if total else 1.0

    def overlap(self, other: MaskSet) -> float:
        """Intersection over union of the live weights of two sets over the same parameters; 1.0 if both are empty."""
        if set(self) != set(other):
            raise ValueError(f"other must mask the same parameters; they differ in {sorted(set(self) ^ set(other))}")
        both = sum(int((self.bool(n) & other.bool(n)).sum()) for n in self)
        either = sum(int((self.bool(n) | other.bool(n)).sum()) for n in self)
        return both / either if either else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Name -> {"shape", "bits"}: packed in row-major order, on the CPU, independent of memory formats."""
        return {
            name: {"shape": tuple(p.shape), "bits": pack_mask(self.bool(name).cpu().contiguous())}
            for name, p in self._parameters.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; ValueError, before anything changes, if names or shapes differ."""
        if set(state) != set(self):
            raise ValueError(f"state must hold the parameters of this set; they differ in {set(state) ^ set(self)}")
        loaded = {}
        for name, entry in state.items():
            shape = tuple(self._parameters[name].shape)
            if tuple(entry["shape"]) != shape:
                raise ValueError(f"state[{name!r}] must be of shape {shape}, got {tuple(entry['shape'])}")
            loaded[name] = unpack_mask(entry["bits"], torch.empty(shape, dtype=torch.bool))
        for name, mask in loaded.items():
            self.set(name, mask)

    def hash(self) -> str:
        """SHA-256 of names, shapes and masks; equal on all ranks when their masks are."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.state_dict().items()):
            digest.update(f"{name}{entry['shape']}".encode())
            digest.update(bytes(entry["bits"].tolist()))
        return digest.hexdigest()
