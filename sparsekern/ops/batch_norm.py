"""Batch normalisation in training, with what follows it in a residual block, in one pass: forward and backward.

This file is the specification of ``torch.ops.sparsekern.batch_norm`` and of its backward; kernels agree with
`reference` to the rounding of a sum taken in another order.

    output = activation(weight * (input - mean) / sqrt(variance + eps) + bias + residual)

- ``input``: (N, C, ...), any strides. ``mean`` and ``variance`` (C,) are those of each channel of this input, the
  latter without Bessel's correction (arXiv 1502.03167). Nothing is changed in place: running statistics are the
  caller's.
- ``weight`` and ``bias``: (C,) or None, which is 1 and 0. ``residual``: of input's shape, or None. ``activation``:
  None or "relu". A skip connection and a ReLU follow a batch-norm in each block of ResNet (arXiv 1512.03385).
- float32, float64, bfloat16 or float16, one dtype for all operands; weight and bias of 16-bit inputs may be float32.
  16-bit types compute in float32 and round once; their statistics are float32.
- Kernels sum the distance from a channel's first number, and then from the mean, in float32: a mean far from 0 costs no
  digits, numbers above 1e18 may overflow.
- NaN or Inf in a channel makes all of its outputs NaN and touches no other. NaN passes ReLU, and its gradient passes
  where output is NaN, as in torch.
- Gradients: of input, weight, bias and residual; mean and variance have none. Second derivatives are those of torch's
  operators, which compute the first ones too where a graph of them is asked for.
- The result and the gradients of input and residual are channels_last if input is channels_last and not contiguous,
  else contiguous. The kernel takes contiguous float32 with more than one number per channel and image, on CPU; the
  reference takes the rest.
- An empty input has NaN for statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern import _library
from sparsekern._direct import plain
from sparsekern.ops.geometry import empty

SCHEMA = (
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps)"
    " -> (Tensor output, Tensor mean, Tensor variance)"
)
BACKWARD_SCHEMA = (
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? output, Tensor mean, Tensor variance,"
    " float eps, bool[] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
_HALVES = (torch.bfloat16, torch.float16)


def _compute(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in _HALVES else t.dtype


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.dim() - 2))


def reference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch."""
    results = fake(input, weight, bias, residual, relu, eps)
    x = input.to(_compute(input))
    dims = [i for i in range(x.dim()) if i != 1]
    mean = x.mean(dims)
    distance = x - _per_channel(mean, x)
    variance = distance.square().mean(dims)
    y = distance * _per_channel((variance + eps).rsqrt(), x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    if residual is not None:
        y = y + residual
    for result, value in zip(results, (y.relu() if relu else y, mean, variance), strict=True):
        result.copy_(value)
    return results


def fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and memory formats only."""
    _check_shapes(input, {"weight": weight, "bias": bias}, {"residual": residual})
    statistics = (torch.empty(input.shape[1], dtype=_compute(input), device=input.device) for _ in range(2))
    return empty(input.shape, input), *statistics


def _check_shapes(input: Tensor, channels: dict[str, Tensor | None], whole: dict[str, Tensor | None]) -> None:
    """Raise unless the shapes fit each other, for bare calls of the operators too."""
    if input.dim() < 2:
        raise ValueError(f"input has shape {tuple(input.shape)}: expected (N, C, ...)")
    for found, wanted in ((channels, input.shape[1:2]), (whole, input.shape)):
        for name, t in found.items():
            if t is not None and t.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(wanted)}")


def backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor | None, output: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight, bias and residual; one that ``needs`` does not ask for has no elements."""
    results = backward_fake(grad, input, weight, output, mean, variance, eps, needs)
    x, g = (t.to(_compute(input)) for t in (input, grad))
    if output is not None:
        g = torch.where(output <= 0, 0, g)
    deviation = _per_channel((variance + eps).rsqrt(), x)
    normal = (x - _per_channel(mean, x)) * deviation
    dims = [i for i in range(x.dim()) if i != 1]
    of_weight, of_bias = (g * normal).sum(dims), g.sum(dims)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    of_input = (g - (_per_channel(of_bias, x) + normal * _per_channel(of_weight, x)) / count) * deviation
    if weight is not None:
        of_input = of_input * _per_channel(weight, x)
    for result, value, need in zip(results, (of_input, of_weight, of_bias, g), needs, strict=True):
        if need:
            result.copy_(value)
    return results


def backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor | None, output: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes and memory formats only. ``output`` is that of a ReLU, None without one."""
    if len(needs) != 4:
        raise ValueError(f"needs has {len(needs)} entries: expected 4")
    _check_shapes(input, {"weight": weight, "mean": mean, "variance": variance}, {"grad": grad, "output": output})
    like = input.new_empty(0) if weight is None else weight
    sizes = [input.shape[1] if need else 0 for need in needs[1:3]]
    whole = [empty(input.shape, input) if needs[i] else input.new_empty(0) for i in (0, 3)]
    return whole[0], *(like.new_empty(n) for n in sizes), whole[1]


_forward_cpu = _library.define_native(
    "_batch_norm_cpu(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps,"
    " Tensor(a!) output, Tensor(b!) mean, Tensor(c!) variance) -> ()"
)
_gradients_cpu = _library.define_native(
    "_batch_norm_backward_cpu(Tensor grad, Tensor input, Tensor? weight, Tensor? output, Tensor mean, Tensor variance,"
    " float eps, Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor(d!) grad_residual) -> ()"
)


def _compiled(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernel takes these operands, which are on CPU."""
    channels = all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in (weight, bias))
    return fits(input) and channels and (residual is None or fits(residual))


def fits(t: Tensor) -> bool:
    """Whether the kernel takes a tensor of images such as this."""
    # Without pixels the channels are neighbours, and torch is the faster one.
    large = t.dim() > 2 and t.numel() > t.shape[0] * t.shape[1]
    return _library.kernels_loaded and large and t.dtype == torch.float32 and t.is_contiguous()


def _cpu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU operator: compiled for what `_compiled` says, the reference for the rest."""
    if not _compiled(input, weight, bias, residual):
        return reference(input, weight, bias, residual, relu, eps)
    results = fake(input, weight, bias, residual, relu, eps)
    _forward_cpu(input, weight, bias, residual, relu, eps, *results)
    return results


def _backward_cpu(
    grad: Tensor, input: Tensor, weight: Tensor | None, output: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The CPU gradients; a gradient in another memory format is copied."""
    if not (_compiled(input, weight, None, output) and grad.dtype == torch.float32):
        return backward_reference(grad, input, weight, output, mean, variance, eps, needs)
    results = backward_fake(grad, input, weight, output, mean, variance, eps, needs)
    _gradients_cpu(grad.contiguous(), input, weight, output, mean, variance, eps, *results)
    return results


_op = _library.define(SCHEMA, reference, fake)
_backward_op = _library.define(BACKWARD_SCHEMA, backward_reference, backward_fake)
_library.define_cpu("batch_norm", _forward_cpu, _cpu)
_library.define_cpu("batch_norm_backward", _gradients_cpu, _backward_cpu)


def _setup_context(ctx, inputs, output) -> None:
    input, weight, _, _, relu, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight, output[0] if relu else None, *output[1:])


def _gradients(ctx, grad, *_, run=_backward_op):
    input, weight, output, mean, variance = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    # Without a ReLU the gradient of the sum is that of the residual too.
    if torch.is_grad_enabled():
        return *_differentiable(grad, input, weight, output, ctx.eps, needs), None, None
    wanted = [*needs[:3], needs[3] and output is not None]
    found = run(grad, input, weight, output, mean, variance, ctx.eps, wanted)
    of_residual = found[3] if wanted[3] else grad if needs[3] else None
    return *(t if need else None for t, need in zip(found[:3], wanted, strict=False)), of_residual, None, None


def _differentiable(grad, input, weight, output, eps, needs) -> tuple[Tensor | None, ...]:
    """The gradients as torch's operators compute them, so that they have gradients themselves."""
    g = grad if output is None else torch.where(output <= 0, 0, grad)
    asked = [t for t, need in zip((input, weight), needs, strict=False) if need]
    y = torch.nn.functional.batch_norm(input, None, None, weight, None, True, eps=eps)
    found = iter(torch.autograd.grad(y, asked, g, create_graph=True) if asked else ())
    of_bias = g.sum([i for i in range(g.dim()) if i != 1]) if needs[2] else None
    return *(next(found) if need else None for need in needs[:2]), of_bias, g if needs[3] else None


def _refuse(ctx, *grads):
    raise NotImplementedError("batch_norm_backward has no derivative: differentiate batch_norm twice")


_lib = _library._definitions
torch.library.register_autograd("sparsekern::batch_norm", _gradients, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("sparsekern::batch_norm_backward", _refuse, lib=_lib)


class _Direct(torch.autograd.Function):
    """A call that the kernel takes, past the dispatcher: its layers of Python take as long as a small image."""

    @staticmethod
    def forward(ctx, *operands):
        results = _cpu(*operands)
        _setup_context(ctx, operands, results)
        return results

    @staticmethod
    def backward(ctx, *grads):
        return _gradients(ctx, *grads, run=_backward_cpu)


def batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, variance) of a batch normalised by its own statistics; the head of this file has every rule.

    Raises TypeError or ValueError that names the argument at fault; ValueError, as torch.nn.functional.batch_norm does,
    for an input with one value per channel.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation={activation!r}: expected None or 'relu'")
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is None:
            continue
        if t.device != input.device:
            raise ValueError(f"{name} is on {t.device}: expected {input.device}, the device of input")
        if t.dtype != input.dtype and (name == "residual" or t.dtype != _compute(input)):
            raise TypeError(f"{name} has dtype {t.dtype}: expected {input.dtype}, the dtype of input")
    if not input.dtype.is_floating_point:
        raise TypeError(f"input has dtype {input.dtype}: expected a floating-point type")
    _check_shapes(input, {"weight": weight, "bias": bias}, {"residual": residual})
    if input.numel() == input.shape[1] != 0:
        raise ValueError(f"expected more than 1 value per channel, got input of shape {tuple(input.shape)}")
    direct = input.is_cpu and plain(input, weight, bias, residual) and _compiled(input, weight, bias, residual)
    run = _Direct.apply if direct else _op
    return run(input, weight, bias, residual, activation is not None, eps)


batch_norm.reference = reference  # type: ignore[attr-defined]
