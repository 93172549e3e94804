"""The gradient of sparse_conv2d and sparse_linear, as autograd asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern import _library


def differentiate(name: str, backward: Any) -> None:
    """Give operator ``name`` the gradient that operator ``backward`` computes, and refuse second derivatives.

    The operator takes (input, weight, structure, layout, bias, *geometry, shape), ``backward`` (grad, input, weight,
    structure, layout, *geometry, needs, shape).
    """

    def setup_context(ctx, inputs, output) -> None:
        input, weight, structure, ctx.layout, _, *ctx.geometry, ctx.shape = inputs
        ctx.save_for_backward(input, weight, *structure)

    def gradients(ctx, grad: Tensor):
        input, weight, *structure = ctx.saved_tensors
        needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 4)]
        found = backward(grad, input, weight, structure, ctx.layout, *ctx.geometry, needs, ctx.shape)
        g = [t if need else None for t, need in zip(found, needs, strict=True)]
        grads = g[0], g[1], [None] * len(structure), None, g[2], *[None] * len(ctx.geometry), None
        return grads[: len(ctx.needs_input_grad)]  # traced by torch 2.10, a shape left out is no input

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name} has no second derivative")

    operator, lib = f"sparsekern::{name}", _library._definitions
    torch.library.register_autograd(operator, gradients, setup_context=setup_context, lib=lib)
    torch.library.register_autograd(f"{operator}_backward", refuse, lib=lib)
