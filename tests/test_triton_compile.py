"""torch.compile looks through the operators at their Triton kernels. Traced on fake GPU tensors: no GPU is needed.

Run by test_triton.py with SPARSEKERN_BACKEND=triton."""

from __future__ import annotations

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsekern as sk

triton = pytest.importorskip("triton", reason="Triton is not installed")
OPERATORS = torch.ops.sparsekern
GEOMETRY = [1, 1], [1, 1], [1, 1], 1


class Driver:
    """Enough of a GPU's driver for torch to find out which operands a kernel writes."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def trace(monkeypatch):
    """The kernels and operators in the graph of a function of GPU tensors."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())

    def run(function, *tensors):
        with FakeTensorMode(allow_non_fake_inputs=True):
            call = lambda *operands: tuple(function(*operands))  # noqa: E731
            fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
            graph = aot_export_joint_simple(call, tuple(fakes), trace_joint=False).graph
        called = [str(node.target) for node in graph.nodes]
        operators = [name for name in sk.backends.TRITON if f"sparsekern.{name}.default" in called]
        return sum("triton_kernel_wrapper" in target for target in called), operators

    return run


def test_sparse_layers(trace):
    w, x = torch.ones(32, 16), torch.ones(8, 16)
    tensors = sk.ops.sparse_structure(w, "4x1").tensors
    linear = lambda x, w, p, i: [OPERATORS.sparse_linear(x, w, [p, i], "4x1", None)]  # noqa: E731
    assert trace(linear, x, w, *tensors) == (1, [])
    wide = lambda *a: linear(*(t.double() if t.is_floating_point() else t for t in a))  # noqa: E731
    assert trace(wide, x, w, *tensors) == (0, ["sparse_linear"])
    w, x = w[:, :, None, None].repeat(1, 1, 3, 3), torch.ones(2, 16, 6, 6)
    tensors = sk.ops.sparse_structure(w, "1x4").tensors
    conv = lambda x, w, p, i: [OPERATORS.sparse_conv2d(x, w, [p, i], "1x4", None, *GEOMETRY)]  # noqa: E731
    assert trace(conv, x, w, *tensors) == (1, [])
    back = lambda g, x, w, p, i: OPERATORS.sparse_conv2d_backward(  # noqa: E731
        g, x, w, [p, i], "1x4", *GEOMETRY, [True] * 3
    )
    assert trace(back, torch.ones(2, 32, 6, 6), x, w, *tensors) == (0, ["sparse_conv2d_backward"])


def test_other_operators_stay_as_they_are(trace):
    select = lambda a, b: OPERATORS.topk_mask([a, b], [7], True, "4x1", True, [])[0]  # noqa: E731
    assert trace(select, torch.ones(8, 9), torch.ones(8, 3, 3, 3)) == (0, ["topk_mask"])
