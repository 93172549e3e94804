"""The compiled kernels of sparse_conv2d and sparse_linear on CPU, and the plans that they run on.

A plan is made of a structure for one pass and geometry: its indices checked and turned into addresses. Making it costs
about as much as one pass of a few images, so plans are kept as long as their structure's tensors. They hold nothing of
the weight's values. A plan is a copy: tensors changed in place get a new one, and none can lead a kernel astray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsekern import _library
from sparsekern.ops.epilogue import UNBOUNDED
from sparsekern.ops.sparse_structure import check_form, check_packed, check_tensors

_make_plan = _library.define_native(
    "_sparse_plan_cpu(str kind, Tensor input, Tensor result, Tensor weight, Tensor[] structure, str layout,"
    " int[] shape, int[] geometry, int groups) -> Tensor?"
)
product = _library.define_native(
    "_sparse_product_cpu(Tensor input, Tensor weight, Tensor plan, Tensor? bias, Tensor? scale, Tensor? residual,"
    " float low, float high) -> Tensor?"
)
weight_gradient = _library.define_native(
    "_sparse_weight_gradient_cpu(Tensor(a!) result, Tensor grad, Tensor input, Tensor plan) -> bool"
)
input_gradient = _library.define_native(
    "_sparse_input_gradient_cpu(Tensor(a!) result, Tensor grad, Tensor weight, Tensor plan) -> bool"
)

# Plans of one structure; a layer whose input has more sizes than this makes new ones now and then.
MOST = 24


@dataclass
class _Plans:
    pointers: Tensor
    versions: tuple[int, int]
    found: dict[Any, Any] = field(default_factory=dict)


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def versions(structure: Sequence[Tensor]) -> tuple[int, int]:
    """How often each of the two tensors was changed in place; inference tensors do not count it."""
    first, second = structure
    try:
        return first._version, second._version
    except RuntimeError:
        return 0 if first.is_inference() else first._version, 0 if second.is_inference() else second._version


def remembered(structure: Sequence[Tensor]) -> dict[Any, Any]:
    """The plans of these two tensors as they are now."""
    known, now = _plans.get(structure[1]), versions(structure)
    if known is None or known.pointers is not structure[0] or known.versions != now:
        known = _plans[structure[1]] = _Plans(structure[0], now)
    return known.found


def remember(found: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep one more, and drop the oldest beyond the number that is kept."""
    while len(found) >= MOST:
        found.pop(next(iter(found)), None)
    found[key] = value


@dataclass(frozen=True)
class Weight:
    """A weight of ``shape`` (out, in / groups, kh, kw) or (out, in), dense and without gaps or packed, and its bare
    structure."""

    values: Tensor
    structure: Sequence[Tensor]
    layout: str
    shape: tuple[int, ...]
    groups: int

    def plan(self, kind: str, input: Tensor, result: Tensor, geometry: tuple[int, ...]) -> Tensor:
        """The plan for one kind of pass: "product", "weight" or "input"; ValueError if the structure is not one.

        ``geometry`` is stride, padding, dilation, each vertical and horizontal; of a linear layer it is empty, and
        ``input`` and ``result`` (or its gradient) are contiguous and have at most 4 dims.
        """
        if len(self.structure) != 2:
            check_form(self.structure, self.layout, self.shape, self.groups)
        check_packed(self.values, self.structure, self.layout)
        found = remembered(self.structure)
        key = self._key(kind, input, result, geometry)
        plan = found.get(key)
        if plan is None:
            check_form(self.structure, self.layout, self.shape, self.groups)
            where = self.values, list(self.structure), self.layout, self.shape, geometry, self.groups
            plan = _make_plan(kind, input, result, *where)
            if plan is None:
                check_tensors(self.structure, self.layout, self.shape, self.groups)
            remember(found, key, plan)
        return plan

    def _key(self, kind: str, input: Tensor, result: Tensor, geometry: tuple[int, ...]) -> tuple[Any, ...]:
        strides = input.stride(), result.stride(), self.values.stride()
        return kind, input.dtype, input.shape, strides, self.layout, self.shape, geometry, self.groups

    def run(self, kind: str, input: Tensor, result: Tensor, geometry: tuple[int, ...], call: Any) -> Any:
        """What ``call(plan)`` a kernel answers; once more with a new plan if the kept one is of another instruction
        set."""
        found = call(self.plan(kind, input, result, geometry))
        if found is None or found is False:
            remembered(self.structure).pop(self._key(kind, input, result, geometry))
            found = call(self.plan(kind, input, result, geometry))
            if found is None or found is False:
                raise RuntimeError("sparsekern: a new plan does not fit its kernel")
        return found


def run_product(weight: Weight, input: Tensor, like: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
    """A new tensor that lies as ``like`` does; operands of bfloat16 are summed in float32, and the sums rounded
    once."""
    added = None if bias is None else bias.float().contiguous()
    return weight.run(
        "product",
        input,
        like,
        geometry,
        lambda plan: product(input, weight.values, plan, added, None, None, *UNBOUNDED),
    )


def run_gradients(
    weight: Weight,
    grad: Tensor,
    input: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    geometry: tuple[int, ...],
) -> None:
    """Fill those gradients that have elements; that of a dense weight is laid out like it."""
    if grad_weight.numel():
        weight.run(
            "weight", input, grad, geometry,
            lambda plan: weight_gradient(grad_weight, grad, input, plan),
        )  # fmt: skip
    if grad_input.numel():
        weight.run(
            "input", grad_input, grad, geometry,
            lambda plan: input_gradient(grad_input, grad, weight.values, plan),
        )  # fmt: skip
