"""Where the weights of a sparse layer are: compressed rows, built once per mask for `sparse_conv2d`, `sparse_linear`.

A weight has shape (out, in / groups) or (out, in / groups, kh, kw); K is (kh, kw), or nothing for two dims.

Patterns are named out x in, and blocks are aligned to channel 0 of the weight:

- ``"unstructured"``: single weights.
- ``"1x4"``, alias ``"block4"`` (the name in neuralmagic/sparseml): four consecutive INPUT channels at one (out, K).
- ``"4x1"``: four consecutive OUTPUT channels at one (in, K).

The last block of an axis that 4 does not divide is shorter. Built from a bool mask, True is kept and every block must
be kept or pruned as a whole. Built from a weight, a block is kept if any of its weights is not 0 (NaN is not 0).

``layout`` says what the tensors hold. It is the pattern if all blocks are full and lie within one group; otherwise it
is ``"unstructured"``, so a kernel never sees a short block or one that crosses a group border.

``tensors`` is (row pointers, column indices), both int32, 1-d, contiguous and on the weight's device, over the grid

    layout          rows       columns, row-major
    unstructured    out        (in / groups, K)
    1x4             out        (in / groups / 4, K)
    4x1             out / 4    (in / groups, K)

Row r holds the columns ``indices[pointers[r]:pointers[r + 1]]``, strictly ascending. ``pointers`` has rows + 1 entries,
starts at 0, never falls and ends at the length of ``indices``. All of it is checked when the object is built, and again
by every operator before it follows an index, because the operators also accept bare tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops.packing import compiled

_build = _library.define_native("_sparse_structure_cpu(Tensor mask, str layout, bool whole) -> Tensor[]")
_BLOCK_AXIS = {"4x1": 0, "1x4": 1}
_LAYOUTS = ("unstructured", *_BLOCK_AXIS)
_INT32_MAX = 2**31 - 1


def _check_pattern(pattern: object) -> str:
    name = "1x4" if pattern == "block4" else pattern
    if not isinstance(name, str) or name not in _LAYOUTS:
        raise ValueError(f'pattern={pattern!r}: expected "unstructured", "4x1" or "1x4" (alias "block4")')
    return name


def _check_groups(groups: object, shape: Sequence[int]) -> int:
    if isinstance(groups, (bool, Tensor)) or not isinstance(groups, SupportsIndex):
        raise TypeError(f"groups={groups!r} is a {type(groups).__name__}: expected an int")
    count = operator.index(groups)
    if count < 1 or shape[0] % count:
        raise ValueError(f"groups={count}: expected a positive divisor of the {shape[0]} output channels")
    if count > 1 and len(shape) == 2:
        raise ValueError(f"groups={count}: expected 1 for a weight of two dims")
    return count


def _layout(pattern: str, shape: Sequence[int], groups: int) -> str:
    if pattern not in _BLOCK_AXIS:
        return pattern
    per_group = shape[0] // groups if pattern == "4x1" else shape[1]
    return "unstructured" if per_group % 4 else pattern


def _grid(shape: Sequence[int], layout: str) -> list[int]:
    """The shape of the block tensor; rows are its dim 0."""
    return [size // 4 if dim == _BLOCK_AXIS.get(layout) else size for dim, size in enumerate(shape)]


def check_form(tensors: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int = 1) -> None:
    """Raise unless ``tensors`` have the form of a structure of that layout; reads nothing of what they hold."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, _LAYOUTS))}")
    if _layout(layout, shape, groups) != layout:
        raise ValueError(
            f"layout={layout!r}: expected 'unstructured' for a weight of shape {tuple(shape)} with groups={groups}, "
            "whose blocks are not all full and within one group"
        )
    if len(tensors) != 2:
        raise ValueError(f"structure has {len(tensors)} tensor(s): expected 2, row pointers and column indices")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"structure[{i}] is a {type(t).__name__}: expected a tensor")
        if t.dtype != torch.int32:
            raise TypeError(f"structure[{i}] has dtype {t.dtype}: expected torch.int32")
        if t.layout != torch.strided or t.dim() != 1 or not t.is_contiguous():
            raise ValueError(f"structure[{i}] has shape {tuple(t.shape)}: expected a contiguous, dense, 1-d tensor")
        if t.device != tensors[0].device:
            raise ValueError(f"structure[{i}] is on {t.device}: expected {tensors[0].device}, like structure[0]")
    rows = _grid(shape, layout)[0]
    if tensors[0].numel() != rows + 1:
        raise ValueError(f"structure[0] has {tensors[0].numel()} row pointers: expected {rows + 1}")


def check_tensors(tensors: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int = 1) -> None:
    """Raise unless ``tensors`` are a structure of that layout for a weight of that shape; synchronises."""
    check_form(tensors, layout, shape, groups)
    pointers, indices = tensors
    columns = math.prod(_grid(shape, layout)[1:])
    first, last = int(pointers[0]), int(pointers[-1])
    if first != 0 or last != indices.numel():
        raise ValueError(f"structure[0] runs from {first} to {last}: expected 0 to {indices.numel()}, the indices")
    # Compared, not subtracted: a difference of hostile int32 values can wrap around.
    if bool((pointers[1:] < pointers[:-1]).any()):
        raise ValueError("structure[0] has row pointers that fall: expected them never to")
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= columns:
        raise ValueError(f"structure[1] has column indices from {low} to {high}: expected 0 to {columns - 1}")
    flat = _flat_positions(pointers, indices, columns)
    if bool((flat[1:] <= flat[:-1]).any()):
        raise ValueError("structure[1] has column indices out of order: expected strictly ascending ones in each row")


def _flat_positions(pointers: Tensor, indices: Tensor, columns: int) -> Tensor:
    counts = pointers.long().diff()
    rows = torch.arange(counts.numel(), device=pointers.device).repeat_interleave(counts)
    return rows * columns + indices


def _as_blocks(weight: Tensor, layout: str) -> Tensor:
    """(*grid, elements of a block)."""
    axis = _BLOCK_AXIS.get(layout)
    return weight.unsqueeze(-1) if axis is None else weight.unflatten(axis, (-1, 4)).movedim(axis + 1, -1)


def kept_count(tensors: Sequence[Tensor], layout: str) -> int:
    """How many weights a structure keeps."""
    return tensors[1].numel() * (4 if layout in _BLOCK_AXIS else 1)


def check_packed(weight: Tensor, tensors: Sequence[Tensor], layout: str) -> None:
    """Raise ValueError if ``weight`` is packed and not as long as the structure says."""
    kept = kept_count(tensors, layout)
    if weight.dim() < 2 and weight.numel() != kept:
        raise ValueError(f"weight has {weight.numel()} packed values: expected {kept}, as structure keeps")


def weight_shape(weight: Tensor, shape: Sequence[int] | None, dims: int) -> tuple[int, ...]:
    """That of the weight, packed or not."""
    if weight.dim() == 1 and (shape is None or len(shape) != dims):
        raise ValueError(f"shape={shape}: expected the {dims} sizes of the packed weight")
    return tuple(shape) if weight.dim() == 1 else tuple(weight.shape)


def kept_values(weight: Tensor, tensors: Sequence[Tensor], layout: str, shape: Sequence[int]) -> Tensor:
    """The kept weights of checked tensors, 1-d: the packed form of a weight."""
    flat = _flat_positions(*tensors, math.prod(_grid(shape, layout)[1:]))
    return _as_blocks(weight, layout).flatten(0, -2)[flat].flatten()


def selected(
    weight: Tensor, tensors: Sequence[Tensor], layout: str, shape: Sequence[int] | None, groups: int = 1
) -> Tensor:
    """The weight, dense or packed, as a dense one that is 0 where it is not kept; checks the tensors."""
    if weight.dim() > 1:
        return torch.where(mask_from_tensors(tensors, layout, weight.shape, groups), weight, 0)
    if shape is None:
        raise ValueError("shape=None: expected the shape of the packed weight")
    check_tensors(tensors, layout, shape, groups)
    grid, axis = _grid(shape, layout), _BLOCK_AXIS.get(layout)
    flat = _flat_positions(*tensors, math.prod(grid[1:]))
    size = 1 if axis is None else 4
    check_packed(weight, tensors, layout)
    zeros = weight.new_zeros(math.prod(grid), size)
    blocks = zeros.index_put((flat,), weight.reshape(-1, size)).reshape(*grid, size)
    return blocks.squeeze(-1) if axis is None else blocks.movedim(-1, axis + 1).flatten(axis, axis + 1)


def mask_from_tensors(tensors: Sequence[Tensor], layout: str, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The bool mask, in the weight's shape, that checked tensors stand for."""
    check_tensors(tensors, layout, shape, groups)
    grid = _grid(shape, layout)
    chosen = torch.zeros(math.prod(grid), dtype=torch.bool, device=tensors[0].device)
    chosen[_flat_positions(tensors[0], tensors[1], math.prod(grid[1:]))] = True
    chosen = chosen.reshape(grid)
    return chosen.repeat_interleave(4, _BLOCK_AXIS[layout]) if layout in _BLOCK_AXIS else chosen


@dataclass(frozen=True, eq=False)
class SparseStructure:
    """The place of every kept weight of one layer; see the head of this file. Build it with `sparse_structure`."""

    shape: tuple[int, ...]
    pattern: str
    groups: int
    layout: str
    tensors: tuple[Tensor, Tensor]
    calls: list[Any] = field(default_factory=list, init=False, repr=False)
    """What `sparsekern.ops.sparse_calls` remembers; dropped by copies and pickles."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": []}

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 4):
            raise ValueError(f"shape={tuple(self.shape)}: expected two or four dims")
        if _check_pattern(self.pattern) != self.pattern:
            raise ValueError(f"pattern={self.pattern!r}: expected its canonical name, '1x4'")
        _check_groups(self.groups, self.shape)
        if self.layout not in (self.pattern, "unstructured"):
            raise ValueError(f"layout={self.layout!r}: expected {self.pattern!r} or 'unstructured'")
        check_tensors(self.tensors, self.layout, self.shape, self.groups)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return kept_count(self.tensors, self.layout)

    def mask(self) -> Tensor:
        """The bool mask, row-major, in the weight's shape."""
        return mask_from_tensors(self.tensors, self.layout, self.shape, self.groups)

    def pack(self, weight: Tensor) -> Tensor:
        """The kept weights, 1-d, row after row and block after block; differentiable.

        Operators take it in place of the weight. They need not collect it first then, which on a small image costs
        more than the product, and its gradient is as short.
        """
        if tuple(weight.shape) != tuple(self.shape):
            raise ValueError(f"weight has shape {tuple(weight.shape)}: expected {tuple(self.shape)}")
        return kept_values(weight, self.tensors, self.layout, self.shape)

    def unpack(self, values: Tensor) -> Tensor:
        """The weight, 0 where it is not kept, of packed values; differentiable."""
        if values.dim() != 1:
            raise ValueError(f"values has {values.dim()} dim(s): expected 1")
        return selected(values, self.tensors, self.layout, self.shape, self.groups)


def sparse_structure(weight_or_mask: Tensor, pattern: str = "unstructured", *, groups: int = 1) -> SparseStructure:
    """The structure of a weight (not 0 is kept) or of a bool mask (True is kept); see the head of this file."""
    if not isinstance(weight_or_mask, Tensor):
        raise TypeError(f"weight_or_mask is a {type(weight_or_mask).__name__}: expected a tensor")
    source = weight_or_mask.detach()
    if source.layout != torch.strided:
        raise ValueError(f"weight_or_mask has layout {source.layout}: expected a dense (torch.strided) tensor")
    if source.dtype != torch.bool and not source.is_floating_point():
        raise TypeError(f"weight_or_mask has dtype {source.dtype}: expected torch.bool or a floating-point type")
    if source.dim() not in (2, 4):
        raise ValueError(f"weight_or_mask has {source.dim()} dim(s): expected two (linear) or four (conv2d)")
    name, shape = _check_pattern(pattern), tuple(source.shape)
    groups = _check_groups(groups, shape)
    if math.prod(shape) > _INT32_MAX or shape[0] >= _INT32_MAX:
        raise ValueError(f"weight_or_mask has shape {shape}: expected at most {_INT32_MAX} weights")
    whole = source.dtype == torch.bool
    found = _structure(source if whole else source != 0, name, groups, whole)
    if found is None:
        raise ValueError(f"weight_or_mask keeps part of a block: expected whole blocks for pattern={name!r}")
    return found


def coarsest_structure(mask: Tensor, groups: int) -> SparseStructure:
    """That of a bool mask in the first of the patterns 4x1, 1x4 and unstructured whose blocks it keeps as a whole."""
    mask = mask.contiguous()  # once for all
    found = (_structure(mask, pattern, groups, True) for pattern in (*_BLOCK_AXIS, "unstructured"))
    return next(structure for structure in found if structure is not None)


def _structure(mask: Tensor, pattern: str, groups: int, whole: bool) -> SparseStructure | None:
    """Of a bool mask; None if blocks must be kept as a ``whole`` and are not."""
    shape = tuple(mask.shape)
    layout = _layout(pattern, shape, groups)
    if layout == pattern and compiled(mask):
        tensors = tuple(_build(mask.contiguous(), layout, whole))
    else:
        tensors = _tensors(mask, pattern, layout, whole)
    if not tensors:
        return None
    found = object.__new__(SparseStructure)  # these need no check
    found.__dict__.update(shape=shape, pattern=pattern, groups=groups, layout=layout, tensors=tensors, calls=[])
    return found


def _tensors(mask: Tensor, pattern: str, layout: str, whole: bool) -> tuple[Tensor, Tensor] | tuple[()]:
    """The tensors of a structure in plain PyTorch; () if blocks must be kept as a whole and are not."""
    chosen, shape = mask, mask.shape
    if pattern in _BLOCK_AXIS:
        axis = _BLOCK_AXIS[pattern]
        moved = mask.movedim(axis, -1)
        padded = torch.nn.functional.pad(moved, (0, -shape[axis] % 4))
        blocks = padded.unflatten(-1, (padded.shape[-1] // 4, 4)).any(-1).movedim(-1, axis)
        filled = blocks.repeat_interleave(4, axis).narrow(axis, 0, shape[axis])
        if whole and not torch.equal(filled, mask):
            return ()
        chosen = blocks if layout == pattern else filled
    rows = chosen.reshape(chosen.shape[0], math.prod(chosen.shape[1:]))
    pointers = torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)).int()
    return pointers, rows.nonzero()[:, 1].int().contiguous()
