"""What the masked optimizer steps share: one launch per dtype over all tensors of a model, whose addresses are in a
table on the device. The table is kept as long as the tensors stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.operands import Counts, check_operands, is_dense, same_layout
from sparsekern.triton.launch import INTERPRETED, TYPES, table_on

CONFIGURATIONS = {2: (2048, 4), 4: (1024, 4), 8: (512, 4)}
"""Bytes of an element -> (elements per program, warps): each thread holds 8 elements of each operand, or 16 of the
narrow types, which it reads by two accesses of 16 bytes."""
if INTERPRETED.value:
    CONFIGURATIONS = dict.fromkeys(CONFIGURATIONS, (1 << 14, 1))  # a program costs milliseconds there
KEPT_TABLES = 16
tables: dict[Any, tuple[Tensor, Tensor]] = {}
_COLUMNS = tl.constexpr(8)
"""Of a table: addresses of parameter, gradient, mask (0: none), up to two states and the mask that chooses between two
weight decays (0: none); number of elements; the place of the parameter in the lists."""


@triton.jit
def read_row(table_ptr, blocks_ptr, BLOCK: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of this program's block: pointers to parameter, gradient, mask, two states and the second mask, first element,
    number of elements of the tensor, and its place in the lists."""
    row = table_ptr + tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64) * _COLUMNS
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    p_ptr = tl.load(row).to(tl.pointer_type(TYPE))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(TYPE))
    mask_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    s_ptr = tl.load(row + 3).to(tl.pointer_type(TYPE))
    t_ptr = tl.load(row + 4).to(tl.pointer_type(TYPE))
    inner_ptr = tl.load(row + 5).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        s_ptr, t_ptr = tl.multiple_of(s_ptr, 16), tl.multiple_of(t_ptr, 16)
    return p_ptr, g_ptr, mask_ptr, s_ptr, t_ptr, inner_ptr, start, tl.load(row + 6), tl.load(row + 7)


@triton.jit
def read_mask(mask_ptr, start, n, BLOCK: tl.constexpr):
    """Offsets of a block, a tile of mask bytes x 8 elements, and which of its elements are kept."""
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    at = start + tl.arange(0, BLOCK // 8)[:, None] * 8 + bit[None, :]
    # 0 is the address of no mask: all is kept.
    bits = tl.load(mask_ptr + byte, mask=(byte * 8 < n) & (mask_ptr.to(tl.int64) != 0), other=255)
    return at, ((bits[:, None].to(tl.int32) >> bit[None, :]) & 1) != 0


@triton.jit
def read(ptr, at, n, WHOLE: tl.constexpr):
    """A block of a tensor. Nothing is predicated by the mask, which would split accesses of 16 bytes into single
    elements; and a block that is WHOLE has no predicate at all."""
    return tl.load(ptr + at) if WHOLE else tl.load(ptr + at, mask=at < n, other=0.0)


@triton.jit
def write(ptr, at, value, n, WHOLE: tl.constexpr):
    """The counterpart of `read`."""
    if WHOLE:
        tl.store(ptr + at, value)
    else:
        tl.store(ptr + at, value, mask=at < n)


@dataclass(frozen=True)
class Launch:
    """One launch: over the blocks of all parameters of a dtype. ``options`` are constants that both steps have."""

    table: Tensor
    blocks: Tensor
    options: dict[str, Any]


def launches(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]],
    masks: Sequence[Tensor | None], counts: Counts, grad_scale: Tensor | None, found_inf: Tensor | None,
    inner: Sequence[Tensor | None] = (),
) -> Iterator[Launch]:  # fmt: skip
    """The launches of a step on operands whose lists fit each other. Raises as `check_operands`, and for operands whose
    memory the kernels cannot walk, when the operands are not where they were before."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(params):
        if p.numel():
            by_dtype.setdefault(p.dtype, []).append(i)
    for dtype, chosen in by_dtype.items():
        block, warps = CONFIGURATIONS[dtype.itemsize]
        nothing = [None] * len(params)
        operands = [params, grads, masks, *[*states.values(), nothing, nothing][:2], inner or nothing]
        key = (counts[1].device, block, tuple(chosen), *(tuple(_place(t[i]) for i in chosen) for t in operands))
        if key not in tables:
            check_operands(params, grads, states, masks, counts, grad_scale, found_inf, inner)
            _check_layouts(params, {"grads": grads, **states})
            if len(tables) >= KEPT_TABLES:
                tables.pop(next(iter(tables)))
            tables[key] = _make_table(operands, chosen, block, counts[1].device)
        moving = [params, grads, *states.values()]
        aligned = all(t[i].data_ptr() % 16 == 0 for t in moving for i in chosen)
        options = dict(
            BLOCK=block, TYPE=TYPES[dtype], COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
            HAS_SCALE=grad_scale is not None, HAS_FOUND_INF=found_inf is not None, ALIGNED=aligned, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        yield Launch(*tables[key], options)


def _place(t: Tensor | None) -> tuple[Any, ...]:
    return (0,) if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype)


def _check_layouts(params: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]) -> None:
    for i, p in enumerate(params):
        if not is_dense(p):
            raise RuntimeError(f"params[{i}] must fill its memory without holes, got strides {p.stride()}")
        for name, tensors in others.items():
            if not same_layout(tensors[i], p):
                raise RuntimeError(f"{name}[{i}] must have the strides of params[{i}], got {tensors[i].stride()}")


def _make_table(
    operands: Sequence[Sequence[Tensor | None]], chosen: Sequence[int], block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The table of the ``chosen`` parameters, and of each program: (row of the table, block of that tensor)."""
    rows = [[0 if t[i] is None else t[i].data_ptr() for t in operands] for i in chosen]
    sizes = [operands[0][i].numel() for i in chosen]
    rows = [[*row, n, i] for row, n, i in zip(rows, sizes, chosen, strict=True)]
    blocks = [[r, b] for r, n in enumerate(sizes) for b in range(triton.cdiv(n, block))]
    return table_on(device, rows, torch.int64), table_on(device, blocks, torch.int32)
