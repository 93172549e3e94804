"""MaskSet: which weights of a model are live, at one bit per weight."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.ops import pack_mask, unpack_mask
from sparsekern.ops.packing import count_live

_WRAPPER = re.compile(r"(^|\.)(module|_orig_mod)(?=\.)")


def normalise(name: str) -> str:
    """A parameter's name without the prefixes that DistributedDataParallel and torch.compile add."""
    return _WRAPPER.sub("", name).lstrip(".")


class MaskSet:
    """One packed mask per named parameter, all ones at first.

    Bits follow the storage of the parameter and are repacked when its memory format or device changed; what is saved
    and hashed is in row-major order. Parameters are matched by identity, names without wrapper prefixes. Any leaf
    tensor is accepted. Raises TypeError for what is no tensor, ValueError for two names that become one or two names
    of one tensor.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters[{name!r}] must be a tensor, got {type(parameter).__name__}")
            short = normalise(name)
            if short in self._parameters:
                raise ValueError(f"parameters: {name!r} and an earlier name both become {short!r}")
            if any(parameter is known for known in self._parameters.values()):
                raise ValueError(f"parameters: {name!r} is a tensor that an earlier name holds already")
            self._parameters[short] = parameter
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        # Strides and bits: the strides are those of the parameter when its mask was packed.
        self._packed: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self._versions = dict.fromkeys(self._parameters, 0)
        self.generation = 0
        """Grows whenever any mask is replaced."""
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
        short = self._short(name)
        if short not in self._parameters:
            raise KeyError(f"name: no parameter {name!r}; known are {sorted(self._parameters)}")
        return self._parameters[short]

    def _short(self, name: str) -> str:
        # Asked for many times in a step, nearly always by the short name.
        return name if name in self._parameters else normalise(name)

    def set(self, name: str, mask: Tensor) -> None:
        """Replace one mask by a bool tensor of the parameter's shape; True keeps the weight."""
        parameter = self.parameter(name)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a bool tensor for {name!r}, got {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(
                f"mask must be bool of shape {tuple(parameter.shape)} for {name!r}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        self._store(name, pack_mask(torch.empty_like(parameter, dtype=torch.bool).copy_(mask)))
        self._count(name)

    def set_packed(self, name: str, packed: Tensor) -> None:
        """Replace one mask by packed bits in the parameter's present storage order, as `topk_mask` returns them.

        The tensor is kept, not copied: do not write to it afterwards.
        """
        parameter = self.parameter(name)
        size = (parameter.numel() + 7) // 8
        if packed.dtype != torch.uint8 or packed.shape != (size,) or packed.device != parameter.device:
            raise ValueError(
                f"packed must be uint8 of shape ({size},) on {parameter.device} for {name!r}, "
                f"got {packed.dtype} of shape {tuple(packed.shape)} on {packed.device}"
            )
        self._store(name, packed.contiguous())
        self._count(name)

    def _count(self, name: str) -> None:
        self._versions[self._short(name)] += 1
        self.generation += 1

    def _store(self, name: str, packed: Tensor) -> None:
        self._packed[self._short(name)] = (self.parameter(name).stride(), packed)

    def version(self, name: str) -> int:
        """A number that grows whenever that mask is replaced, and stays when it is only repacked."""
        self.parameter(name)  # the error for an unknown name
        return self._versions[self._short(name)]

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter, found by identity; None for one outside the set."""
        return self._names.get(parameter)

    def packed(self, name: str) -> Tensor:
        """Bits in the present storage order of the parameter, on its device."""
        short = self._short(name)
        parameter = self.parameter(short)
        strides, bits = self._packed[short]
        if strides != parameter.stride() or bits.device != parameter.device:
            stored = torch.empty_strided(parameter.shape, strides, dtype=torch.bool, device=bits.device)
            mask = unpack_mask(bits, stored).to(parameter.device)
            self._store(short, pack_mask(torch.empty_like(parameter, dtype=torch.bool).copy_(mask)))
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
        return sum(int(count_live(self.packed(n))) for n in names) / total if total else 1.0

    def overlap(self, other: MaskSet) -> float:
        """Intersection over union of the live weights of two sets over the same parameters; 1.0 if both are empty."""
        self._check_same(other)
        both = sum(int((self.bool(n) & other.bool(n)).sum()) for n in self)
        either = sum(int((self.bool(n) | other.bool(n)).sum()) for n in self)
        return both / either if either else 1.0

    def change(self, other: MaskSet) -> float:
        """The share of weights whose mask bit differs, beyond what a different number of live weights explains.

        Hamming distance minus the difference of the two counts, over the number of weights (IST-DASLab/ACDC); 0 where
        one set of live weights holds the other.
        """
        self._check_same(other)
        pairs = [(self.bool(n), other.bool(n)) for n in self]
        differ = sum(int((a ^ b).sum()) for a, b in pairs)
        more = sum(int(a.sum()) - int(b.sum()) for a, b in pairs)
        return (differ - abs(more)) / max(1, sum(a.numel() for a, _ in pairs))

    def _check_same(self, other: MaskSet) -> None:
        if set(self) != set(other):
            raise ValueError(f"other must mask the same parameters; they differ in {sorted(set(self) ^ set(other))}")

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
        loaded = {name: self._loaded(name, entry) for name, entry in state.items()}
        for name, mask in loaded.items():
            self.set(name, mask)

    def _loaded(self, name: str, entry: Any) -> Tensor:
        """One entry of a state dict as a bool tensor, or the error that says what is wrong with it."""
        shape = tuple(self._parameters[name].shape)
        if not isinstance(entry, Mapping) or set(entry) != {"shape", "bits"}:
            raise ValueError(f"state[{name!r}] must hold 'shape' and 'bits', got {entry!r:.80}")
        if tuple(entry["shape"]) != shape:
            raise ValueError(f"state[{name!r}] must be of shape {shape}, got {tuple(entry['shape'])}")
        bits, like = entry["bits"], torch.empty(shape, dtype=torch.bool)
        size = (like.numel() + 7) // 8
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (size,):
            raise ValueError(f"state[{name!r}]['bits'] must be a uint8 tensor of shape ({size},), got {bits!r:.80}")
        return unpack_mask(bits.cpu(), like)

    def hash(self) -> str:
        """SHA-256 of names, shapes and masks; equal on all ranks when their masks are."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.state_dict().items()):
            digest.update(f"{name}{entry['shape']}".encode())
            digest.update(bytes(entry["bits"].tolist()))
        return digest.hexdigest()
