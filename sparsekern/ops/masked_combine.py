"""masked_combine_: of each element one of two weighted sums, as a packed mask says; one call for a whole model.

    output = live[0] * first + live[1] * second * times        where the mask is 1
    output = pruned[0] * first + pruned[1] * second * times    elsewhere
    output = 0                                                 where `within` is 0

With it a method computes the weights of its forward pass, (1, 0) and (0, 0), or powers of them, changes gradients where
a mask is 0 and puts back what was to stay.

- A term with coefficient 0 is left out, never multiplied, so NaN and Inf reach nothing; without terms an element is 0.
- Each product is rounded, from left to right, and then the sum (no fused multiply-add). `scale`, one float32 or float64
  in a tensor on the device of the outputs, is the last factor of the terms of `second`.
- `times` is an empty list where there is no such factor; with `magnitude` the factor is |times|.
- `masks[i]` holds packed bits in the storage order of `outputs[i]` (see `pack_mask`) or is None: all ones. So does
  `within[i]`, which chooses as masks do; an empty list is all ones.
- `second` may be an empty list if both of its coefficients are 0. `outputs[i]` may be `first[i]`, `second[i]` or
  `times[i]` itself.
- bfloat16 and float16 compute in float32 and round once when they are stored. Coefficients are rounded to the compute
  type.

On a GPU the reference serves it, several passes in place of one. No gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._library import define
from sparsekern.ops.operands import (
    as_layout,
    check_entry,
    check_mask,
    check_overlap,
    check_scalar,
    is_dense,
    write_back,
)
from sparsekern.ops.packing import unpack_mask


def reference(
    outputs, first, second, masks, *, live, pruned, scale=None, times=(), magnitude=False, within=()
) -> None:  # fmt: skip
    _check_lists(outputs, first, second, masks, live, pruned, times, within)
    for i, out in enumerate(outputs):
        compute = torch.float64 if out.dtype == torch.float64 else torch.float32
        pair = [t[i].to(compute) if t else None for t in (first, second)]
        factors = [times[i].to(compute).abs() if magnitude else times[i].to(compute)] if times else []
        factors += [] if scale is None else [scale.to(compute)]
        found = _sum(live, pair, factors)
        if masks[i] is not None:
            found = torch.where(unpack_mask(masks[i], out), found, _sum(pruned, pair, factors))
        if within and within[i] is not None:
            found = torch.where(unpack_mask(within[i], out), found, 0)
        out.copy_(found)


def _sum(coefficients, pair, factors) -> Tensor:
    terms = [t * c for t, c in zip(pair, coefficients, strict=True) if c != 0]
    for factor in factors if coefficients[1] != 0 else ():
        terms[-1] = terms[-1] * factor
    return terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else torch.zeros_like(pair[0])


def fake(outputs, first, second, masks, *, live, pruned, scale=None, times=(), magnitude=False, within=()):
    _check_lists(outputs, first, second, masks, live, pruned, times, within)


def _check_lists(outputs, first, second, masks, live, pruned, times, within) -> None:
    """Raise unless the lists fit each other, for bare calls of the operator too."""
    for name, factors in (("live", live), ("pruned", pruned)):
        if len(factors) != 2:
            raise ValueError(f"{name} must be two coefficients, of first and second, got {factors!r}")
    needed = {"first": first, "masks": masks}
    if len(second) or live[1] != 0 or pruned[1] != 0:
        needed["second"] = second
    needed |= {name: values for name, values in (("times", times), ("within", within)) if len(values)}
    for name, values in needed.items():
        if len(values) != len(outputs):
            raise ValueError(f"{name} must have one entry for each of the {len(outputs)} outputs, got {len(values)}")


OP = define(
    "masked_combine_(Tensor(a!)[] outputs, Tensor[] first, Tensor[] second, Tensor?[] masks, *, float[] live,"
    " float[] pruned, Tensor? scale, Tensor[] times, bool magnitude, Tensor?[] within) -> ()",
    reference,
    fake,
)


def masked_combine_(
    outputs: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    *,
    live: tuple[float, float],
    pruned: tuple[float, float],
    scale: Tensor | None = None,
    times: Sequence[Tensor] = (),
    magnitude: bool = False,
    within: Sequence[Tensor | None] = (),
) -> None:
    """Write `outputs` in place; the module docstring is the contract.

    All tensors are on one device; those of one entry share shape and dtype (float32, float64, bfloat16 or float16); any
    strides. But for an output that is an operand itself, no output shares memory with anything else. Raises ValueError
    or TypeError, before anything is changed, naming the argument at fault.
    """
    outputs, masks, within = list(outputs), list(masks), list(within)
    read = {"first": list(first), "second": list(second), "times": list(times)}
    _check_lists(outputs, read["first"], read["second"], masks, live, pruned, read["times"], within)
    for i, out in enumerate(outputs):
        operands = {f"{name}[{i}]": values[i] for name, values in read.items() if values}
        check_entry("outputs", i, out, outputs[0].device, operands, masks[i])
        if within:
            check_mask(f"within[{i}]", within[i], out)
    if scale is not None and outputs:
        check_scalar("scale", scale, outputs[0].device)
    apart = {n: [t for t, o in zip(v, outputs, strict=bool(v)) if t is not o] for n, v in read.items()}
    check_overlap({"outputs": outputs}, {**apart, "masks, within": [m for m in (*masks, *within) if m is not None]})
    launch(
        outputs, *read.values(), masks, live=live, pruned=pruned, scale=scale, magnitude=magnitude, within=within
    )  # fmt: skip


def launch(outputs, first, second, times, masks, *, live, pruned, scale=None, magnitude=False, within=()) -> None:
    """The operator on operands that fit each other, of any strides."""
    # The kernel walks storage.
    dense = [o if is_dense(o) else torch.empty_like(o) for o in outputs]
    first, second, times = ([as_layout(t, o) for t, o in zip(v, dense, strict=bool(v))] for v in (first, second, times))
    with torch.no_grad():
        OP(
            dense, first, second, masks, live=list(map(float, live)), pruned=list(map(float, pruned)), scale=scale,
            times=times, magnitude=magnitude, within=within,
        )  # fmt: skip
        write_back(outputs, dense)
    # The dispatcher does not bump the counters that let autograd detect a stale saved tensor.
    torch.autograd.graph.increment_version(outputs)


masked_combine_.reference = reference
