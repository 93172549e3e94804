"""What sparse_conv2d and sparse_linear ask of their operands, and which of them the CPU kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern.ops.operands import DTYPES
from sparsekern.ops.sparse_structure import SparseStructure


def check_operands(input: Tensor, weight: Tensor, structure: SparseStructure, bias: Tensor | None, dims: int) -> None:
    """What the two operators ask of their tensors, before any shape that depends on the operator."""
    if not isinstance(structure, SparseStructure):
        raise TypeError(f"structure is a {type(structure).__name__}: expected a SparseStructure, see sparse_structure")
    operands = {"input": input, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, t in operands.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: expected a tensor")
        if t.layout != torch.strided:
            raise ValueError(f"{name} has layout {t.layout}: expected a dense (torch.strided) tensor")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {t.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if t.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}: expected {input.dtype}, the dtype of input")
        if t.device != input.device:
            raise ValueError(f"{name} is on {t.device}: expected {input.device}, the device of input")
    if structure.tensors[0].device != input.device:
        raise ValueError(f"structure is on {structure.tensors[0].device}: expected {input.device}, the device of input")
    if len(structure.shape) != dims or weight.dim() not in (1, dims):
        given = f"{weight.dim()} dim(s) and structure {len(structure.shape)}"
        raise ValueError(f"weight has {given}: expected {dims}, or 1 for packed values")
    if weight.dim() == 1 and weight.numel() != structure.kept:
        raise ValueError(f"weight has {weight.numel()} packed values: expected {structure.kept}, as structure keeps")
    if weight.dim() > 1 and tuple(weight.shape) != tuple(structure.shape):
        raise ValueError(f"structure is for a weight of shape {structure.shape}: expected {tuple(weight.shape)}")
    if bias is not None and bias.shape != structure.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({structure.shape[0]},), the output channels")


def check_dims(
    dims: int, tensors: dict[str, Tensor], weight: Tensor, needs: Sequence[bool] = (False, False, False)
) -> None:
    """What shapes are computed from, for bare calls of the operators: dims of the tensors and of the weight, which may
    be packed, and three ``needs``."""
    for name, t in tensors.items():
        if t.dim() != dims:
            raise ValueError(f"{name} has {t.dim()} dim(s): expected {dims}")
    if weight.dim() not in (1, dims):
        raise ValueError(f"weight has {weight.dim()} dim(s): expected {dims}, or 1 for packed values")
    if len(needs) != 3:
        raise ValueError(f"needs has {len(needs)} entries: expected 3, for input, weight and bias")


def compiled_form(*operands: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels take these operands: all on CPU, of ``dtype`` and with elements."""
    return _library.kernels_loaded and all(
        t is None or (t.dtype == dtype and t.device.type == "cpu" and t.numel() > 0) for t in operands
    )


def compiled_product(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels of the forward pass do: those also take bfloat16, if all operands are."""
    dtype = torch.bfloat16 if input.dtype == torch.bfloat16 else torch.float32
    return compiled_form(input, *others, dtype=dtype)
