"""Gathering sparse products in Triton, which `sparse_conv2d` and `sparse_linear` share; a linear layer is a convolution
of one pixel.

A program computes 16 result channels at a tile of pixels. Compressed rows lie one after another, so all kept blocks of
16 channels are one stretch of column indices: for each run of it the kernel gathers the source values of those columns
and multiplies them with a tile of weights that is zero outside the row a column belongs to. That wastes the tensor core
where a block has fewer than 16 rows, but not what counts here, the gathered bytes; and nothing but the mask has to be
prepared when it changes. The gradient of input runs the same kernel on the structure turned around.

An index out of range reads nothing, and a row pointer out of range is cut: where a structure could not be checked, a
wrong one gives a wrong result and never touches memory outside of the operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.triton.launch import EMPTY, INTERPRETED, TYPES, rounded, wrapped
from sparsekern.triton.structures import BLOCKS, transposed

CONFIGURATIONS = {
    ("product", 2): (64, 32, 4, 3), ("product", 4): (64, 32, 4, 3),
    ("weights", 2): (64, 32, 4, 3), ("weights", 4): (32, 32, 4, 3),
}  # fmt: skip
"""(kernel, bytes of an element) -> pixels and gathered values per step, warps, stages of the pipeline."""
if INTERPRETED.value:
    CONFIGURATIONS = dict.fromkeys(CONFIGURATIONS, (128, 256, 1, 1))  # a step costs tens of milliseconds there
PROGRAMS = 1024
"""How many programs the gradient of weight is split into, at least, if there are pixels for so many."""
CHANNELS = 16
"""Result channels per program: the least that a matrix instruction takes."""


@triton.jit
def dot(a, b, sum):
    """a @ b + sum in float32, without rounding operands to tf32."""
    if INTERPRETED:  # multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _pixels(at, height, width):
    """(image, row, column) of flat positions."""
    return (at // (height * width)).to(tl.int64), at // width % height, at % width


@triton.jit
def _columns(
    indices_ptr, entry, last, ends, row0, row_limit, group_rows, group_channels,
    BH: tl.constexpr, BW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of gathered values: whether they are there, row, source channel within the group, group, and place in the kernel.

    ``entry`` counts values, BW for each index."""
    there = entry < last
    column = tl.load(indices_ptr + entry // BW, mask=there, other=0)
    local = tl.sum((entry[:, None] // BW >= ends[None, :]).to(tl.int32), 1)
    local = tl.minimum(local, ROWS - 1)
    group = (row0 + local) // group_rows
    channel = column // (KH * KW) * BW + entry % BW
    there = there & (column >= 0) & (channel < group_channels) & (row0 + local < row_limit)
    return there, local, channel, group, column // KW % KH, column % KW


@triton.jit
def _source(
    there, inside, image, row, column, channel, kh, kw, height, width, xn, xc, xh, xw,
    stride_h, stride_w, pad_h, pad_w, hole_h, hole_w, BACK: tl.constexpr,
):  # fmt: skip
    """Offsets and predicate of the source values: those a forward convolution reads, or going BACK those it feeds.

    The operands broadcast; some are along gathered values, the others along pixels."""
    if BACK:
        y = row + pad_h - kh * hole_h
        x = column + pad_w - kw * hole_w
        fits = (y >= 0) & (x >= 0) & (y % stride_h == 0) & (x % stride_w == 0)
        y = y // stride_h
        x = x // stride_w
    else:
        y = row * stride_h - pad_h + kh * hole_h
        x = column * stride_w - pad_w + kw * hole_w
        fits = (y >= 0) & (x >= 0)
    fits = fits & (y < height) & (x < width) & there & inside
    return image * xn + channel.to(tl.int64) * xc + y.to(tl.int64) * xh + x.to(tl.int64) * xw, fits


@triton.jit
def _stretch(pointers_ptr, row0, rows, count, ROWS: tl.constexpr):
    """First and last entry of ROWS rows from row0, and where each row ends."""
    first = tl.minimum(tl.maximum(tl.load(pointers_ptr + tl.minimum(row0, rows)), 0), count)
    last = tl.minimum(tl.maximum(tl.load(pointers_ptr + tl.minimum(row0 + ROWS, rows)), first), count)
    ends = tl.load(pointers_ptr + tl.minimum(row0 + 1 + tl.arange(0, ROWS), rows))
    return first, last, ends


@triton.jit
def product(
    x_ptr, w_ptr, bias_ptr, y_ptr, pointers_ptr, indices_ptr, count, rows, row_tiles, pixels, group_rows,
    group_channels, out_h, out_w, height, width, xn, xc, xh, xw, yn, yc, yh, yw, wg, wr, wc, wh, ww,
    stride_h, stride_w, pad_h, pad_w, hole_h, hole_w, BH: tl.constexpr, BW: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, BACK: tl.constexpr, HAS_BIAS: tl.constexpr, TYPE: tl.constexpr, PIXELS: tl.constexpr,
    VALUES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pixels x result channels, forward or BACK. Strides of w: of a group, result channel, source channel, kernel."""
    ROWS: tl.constexpr = CHANNELS // BH
    # Neighbours in time share their pixels, which then come from the cache.
    row0 = tl.program_id(0) % row_tiles * ROWS
    at = tl.program_id(0) // row_tiles * PIXELS + tl.arange(0, PIXELS)
    image, row, column = _pixels(at, out_h, out_w)
    first, last, ends = _stretch(pointers_ptr, row0, rows, count, ROWS)
    m = tl.arange(0, CHANNELS)
    result_row = row0 + m // BH
    own_group = result_row // group_rows
    own_w = own_group.to(tl.int64) * wg + ((result_row - own_group * group_rows) * BH + m % BH) * wr
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(first * BW, last * BW, VALUES):
        there, local, channel, group, kh, kw = _columns(
            indices_ptr, start + tl.arange(0, VALUES), last * BW, ends, row0, rows, group_rows, group_channels,
            BH, BW, KH, KW, ROWS,
        )  # fmt: skip
        offset, fits = _source(
            there[None, :], (at < pixels)[:, None], image[:, None], row[:, None], column[:, None],
            (group * group_channels + channel)[None, :], kh[None, :], kw[None, :], height, width, xn, xc, xh, xw,
            stride_h, stride_w, pad_h, pad_w, hole_h, hole_w, BACK,
        )  # fmt: skip
        x = tl.load(x_ptr + offset, mask=fits, other=0.0)
        own = there[:, None] & (local[:, None] == (m // BH)[None, :])
        place = (channel.to(tl.int64) * wc + kh * wh + kw * ww)[:, None] + own_w[None, :]
        w = tl.load(w_ptr + place, mask=own, other=0.0)
        total = dot(x, w, total)
    result = row0 * BH + m
    if HAS_BIAS:
        total += tl.load(bias_ptr + result, mask=result < rows * BH, other=0.0).to(tl.float32)[None, :]
    offset = (image * yn + row.to(tl.int64) * yh + column.to(tl.int64) * yw)[:, None]
    offset += result.to(tl.int64)[None, :] * yc
    tl.store(y_ptr + offset, rounded(total, TYPE), mask=(at < pixels)[:, None] & (result < rows * BH)[None, :])


@triton.jit
def weights(
    x_ptr, g_ptr, part_ptr, pointers_ptr, indices_ptr, count, rows, pixels, size, group_rows, group_channels,
    out_h, out_w, height, width, xn, xc, xh, xw, gn, gc, gh, gw, wg, wr, wc, wh, ww,
    stride_h, stride_w, pad_h, pad_w, hole_h, hole_w, BH: tl.constexpr, BW: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of the kept weights. Program (row tile, i, j) takes each i-th run of columns and each j-th tile of
    pixels, and writes to part j, float32 in the layout of the weight."""
    ROWS: tl.constexpr = CHANNELS // BH
    row0 = tl.program_id(0) * ROWS
    first, last, ends = _stretch(pointers_ptr, row0, rows, count, ROWS)
    m = tl.arange(0, CHANNELS)
    result_row = row0 + m // BH
    own_group = result_row // group_rows
    own_w = own_group.to(tl.int64) * wg + ((result_row - own_group * group_rows) * BH + m % BH) * wr
    for start in range(first * BW + tl.program_id(1) * VALUES, last * BW, tl.num_programs(1) * VALUES):
        there, local, channel, group, kh, kw = _columns(
            indices_ptr, start + tl.arange(0, VALUES), last * BW, ends, row0, rows, group_rows, group_channels,
            BH, BW, KH, KW, ROWS,
        )  # fmt: skip
        total = tl.zeros((VALUES, CHANNELS), tl.float32)
        for tile in range(tl.program_id(2) * PIXELS, pixels, tl.num_programs(2) * PIXELS):
            at = tile + tl.arange(0, PIXELS)
            image, row, column = _pixels(at, out_h, out_w)
            offset, fits = _source(
                there[:, None], (at < pixels)[None, :], image[None, :], row[None, :], column[None, :],
                (group * group_channels + channel)[:, None], kh[:, None], kw[:, None], height, width, xn, xc, xh, xw,
                stride_h, stride_w, pad_h, pad_w, hole_h, hole_w, False,
            )  # fmt: skip
            x = tl.load(x_ptr + offset, mask=fits, other=0.0)
            offset = (image * gn + row.to(tl.int64) * gh + column.to(tl.int64) * gw)[:, None]
            offset += (row0 * BH + m).to(tl.int64)[None, :] * gc
            inside = (at < pixels)[:, None] & (row0 * BH + m < rows * BH)[None, :]
            total = dot(x, tl.load(g_ptr + offset, mask=inside, other=0.0), total)
        own = there[:, None] & (local[:, None] == (m // BH)[None, :])
        place = (channel.to(tl.int64) * wc + kh * wh + kw * ww)[:, None] + own_w[None, :]
        tl.store(part_ptr + tl.program_id(2).to(tl.int64) * size + place, total, mask=own)


def uncovered(operands: dict[str, Tensor | None]) -> str:
    """Why the reference must run, or ''."""
    given = {name: t for name, t in operands.items() if t is not None}
    if given["weight"].dim() == 1:
        return "weight is packed"
    for name, t in given.items():
        if not t.numel():
            return EMPTY
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {t.dtype}"
    return "" if len({t.dtype for t in given.values()}) == 1 else f"{' and '.join(given)} differ in dtype"


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: two of each, vertical and horizontal, and the number of groups."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def numbers(self) -> list[int]:
        """In the order of the kernels' arguments."""
        return [*self.stride, *self.padding, *self.dilation]


def convolve(
    source: Tensor, weight: Tensor, structure: Sequence[Tensor], layout: str, bias: Tensor | None, geometry: Geometry,
    result: Tensor, back: bool,
) -> None:  # fmt: skip
    """Write the convolution of ``source`` to ``result``, or going ``back`` the gradient of input for that of result.

    All of four dims; none is empty. Any strides.
    """
    taps, groups = weight.shape[2:], geometry.groups
    wo, wi, *kernel_strides = weight.stride()
    height, width = BLOCKS[layout]
    if back:
        structure, (height, width) = transposed(structure, layout, weight.shape, groups), (width, height)
    pointers, indices = structure
    rows = pointers.numel() - 1
    strides = [weight.shape[0] // groups * wo, *((wi, wo) if back else (wo, wi)), *kernel_strides]
    pixels, values, warps, stages = CONFIGURATIONS["product", source.element_size()]
    positions = result.numel() // result.shape[1]
    row_tiles = triton.cdiv(rows * height, CHANNELS)
    wrapped(product)[(row_tiles * triton.cdiv(positions, pixels),)](
        source, weight, source if bias is None else bias, result, pointers, indices, indices.numel(), rows, row_tiles,
        positions, rows // groups, source.shape[1] // groups, *result.shape[2:], *source.shape[2:], *source.stride(),
        *result.stride(), *strides, *geometry.numbers(), BH=height, BW=width, KH=taps[0], KW=taps[1], BACK=back,
        HAS_BIAS=bias is not None, TYPE=TYPES[result.dtype], PIXELS=pixels, VALUES=values, CHANNELS=CHANNELS,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def weight_gradient(
    input: Tensor, grad: Tensor, structure: Sequence[Tensor], layout: str, geometry: Geometry, result: Tensor
) -> None:
    """Write the gradient of the kept weights, and 0 elsewhere, to ``result``, which is dense; all of four dims."""
    pointers, indices = structure
    rows, (height, width) = pointers.numel() - 1, BLOCKS[layout]
    pixels, values, warps, stages = CONFIGURATIONS["weights", input.element_size()]
    positions = grad.numel() // grad.shape[1]
    row_tiles = triton.cdiv(rows * height, CHANNELS)
    runs = max(1, min(triton.cdiv(indices.numel() * width, row_tiles * values), 65535))
    splits = max(1, min(triton.cdiv(PROGRAMS, row_tiles * runs), triton.cdiv(positions, 4 * pixels), 65535))
    parts = torch.zeros((splits, result.numel()), dtype=torch.float32, device=result.device)
    wo, wi, *kernel_strides = result.stride()
    wrapped(weights)[(row_tiles, runs, splits)](
        input, grad, parts, pointers, indices, indices.numel(), rows, positions, result.numel(),
        rows // geometry.groups, input.shape[1] // geometry.groups, *grad.shape[2:], *input.shape[2:],
        *input.stride(), *grad.stride(), result.shape[0] // geometry.groups * wo, wo, wi, *kernel_strides,
        *geometry.numbers(), BH=height, BW=width, KH=result.shape[2], KW=result.shape[3], PIXELS=pixels,
        VALUES=values, CHANNELS=CHANNELS, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    result.copy_(parts.sum(0).as_strided(result.shape, result.stride()))
