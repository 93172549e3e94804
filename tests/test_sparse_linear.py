"""sparse_linear against the dense operator of torch on a weight that the test masks itself."""

from __future__ import annotations

import pytest
import torch
from test_sparse_kernels import block_mask

import sparsekern as sk

OP = torch.ops.sparsekern.sparse_linear
PATTERNS = ["unstructured", "1x4", "block4", "4x1"]


def run(function, *tensors):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape))
    return [result.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("outputs, inputs", [(8, 8), (5, 7), (4, 12), (1, 1), (13, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_equals_dense(pattern, sparsity, outputs, inputs, lead):
    mask = block_mask((outputs, inputs), pattern, sparsity)
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((*lead, inputs), (outputs, inputs), (outputs,)))
    structure = sk.ops.sparse_structure(mask, pattern)
    assert torch.equal(structure.mask(), mask) and structure.kept == int(mask.sum())
    for bias in (b, None):
        expected = run(lambda x, w, b: torch.nn.functional.linear(x, torch.where(mask, w, 0), b), x, w, bias)
        dirty = torch.where(mask, w, torch.nan)
        found = run(lambda x, w, b: sk.ops.sparse_linear(x, w, structure, b), x, dirty, bias)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)
        assert not found[2][~mask].any()


@pytest.mark.parametrize("lead", [(3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_float32_gradients_of_some_operands(wanted, lead):
    """The compiled kernels and an operand that needs none, such as the input of the first layer."""
    mask = block_mask((8, 12), "4x1", 0.5)
    structure = sk.ops.sparse_structure(mask, "4x1")
    operands = [torch.randn(*lead, 12), torch.where(mask, torch.randn(8, 12), 0), torch.randn(8)]
    expected = run(lambda x, w, b: torch.nn.functional.linear(x, torch.where(mask, w, 0), b), *operands)[1:]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(operands)]
    result = sk.ops.sparse_linear(leaves[0], leaves[1], structure, leaves[2])
    result.backward(torch.linspace(-1, 1, result.numel()).reshape(result.shape))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(leaf.grad, expected[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    mask = block_mask((8, 12), "1x4", 0.5)
    x, w = torch.randn(3, 12).to(dtype), torch.randn(8, 12).to(dtype)
    found = sk.ops.sparse_linear(x, w, sk.ops.sparse_structure(mask, "1x4"))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.nn.functional.linear(x, torch.where(mask, w, 0)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_and_opcheck(pattern):
    mask = block_mask((8, 12), pattern, 0.5)
    s = sk.ops.sparse_structure(mask, pattern)
    x, w, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 12), (8, 12), (8,)))
    assert torch.autograd.gradcheck(lambda x, w, b: sk.ops.sparse_linear(x, w, s, b), (x, w, b))
    torch.library.opcheck(OP, (x, w, list(s.tensors), s.layout, b))
    torch.library.opcheck(OP, (x.detach().t().contiguous().t(), w, list(s.tensors), s.layout, None))


def test_second_derivatives_are_refused():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    y = sk.ops.sparse_linear(x, w, sk.ops.sparse_structure(torch.ones(2, 4)))
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        g.sum().backward()


@pytest.mark.parametrize(
    "pattern, layout, pointers, indices",
    [
        ("unstructured", "unstructured", [0, 1, 2], [0, 1]),  # too few rows
        ("unstructured", "unstructured", [1, 1, 1, 1, 2], [0, 1]),
        ("unstructured", "unstructured", [0, 1, 1, 1, 3], [0, 1]),
        ("unstructured", "unstructured", [0, 2, 1, 1, 2], [0, 1]),
        ("unstructured", "unstructured", [0, 2**31 - 1, -(2**31), 1, 2], [0, 1]),
        ("unstructured", "unstructured", [0, 2, 2, 2, 2], [1, 0]),
        ("unstructured", "unstructured", [0, 2, 2, 2, 2], [1, 1]),
        ("unstructured", "unstructured", [0, 2, 2, 2, 2], [0, 8]),
        ("unstructured", "unstructured", [0, 2, 2, 2, 2], [-1, 0]),
        ("1x4", "1x4", [0, 1, 1, 1, 1], [2]),
        ("4x1", "4x1", [0, 1], [8]),
        ("1x4", "4x1", [0, 1], [0]),
        ("2:4", "2:4", [0, 1], [0]),
    ],
)
def test_hostile_structures_raise(pattern, layout, pointers, indices):
    tensors = (torch.tensor(pointers, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32))
    with pytest.raises(ValueError, match="structure|layout|pattern"):
        sk.ops.SparseStructure((4, 8), pattern, 1, layout, tensors)
    if pattern == layout and pattern != "2:4":
        with pytest.raises(ValueError, match="structure"):
            OP(torch.randn(2, 8), torch.randn(4, 8), list(tensors), layout, None)


def test_structure_errors_name_the_argument():
    p, i = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([], dtype=torch.int32)
    build = sk.ops.SparseStructure
    for tensors in [(p.long(), i), (p, i.float())]:
        with pytest.raises(TypeError, match="int32"):
            build((1, 4), "unstructured", 1, "unstructured", tensors)
    with pytest.raises(ValueError, match="expected 2"):
        build((1, 4), "unstructured", 1, "unstructured", (p,))
    with pytest.raises(ValueError, match="1-d"):
        build((1, 4), "unstructured", 1, "unstructured", (p.reshape(1, 2), i))
    with pytest.raises(ValueError, match="layout='1x4'"):
        build((1, 6), "1x4", 1, "1x4", (p, i))
    with pytest.raises(ValueError, match="part of a block"):
        sk.ops.sparse_structure(torch.eye(4, dtype=torch.bool), "1x4")
    with pytest.raises(ValueError, match="pattern='2:4'"):
        sk.ops.sparse_structure(torch.ones(4, 4), "2:4")
    with pytest.raises(ValueError, match="groups=2"):
        sk.ops.sparse_structure(torch.ones(4, 4), groups=2)
    with pytest.raises(TypeError, match="int64"):
        sk.ops.sparse_structure(torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(AttributeError):
        sk.ops.sparse_structure(torch.ones(4, 4)).groups = 2


def test_a_weight_keeps_whole_blocks():
    assert sk.ops.sparse_structure(torch.eye(4), "1x4").mask().all()
    s = sk.ops.sparse_structure(torch.tensor([[0.0, torch.nan], [-0.0, 1]]))
    assert s.mask().tolist() == [[False, True], [False, True]]


def test_errors_name_the_argument():
    x, w, s = torch.randn(2, 8), torch.randn(4, 8), sk.ops.sparse_structure(torch.ones(4, 8))
    f = sk.ops.sparse_linear
    for error, words, arguments in [
        (TypeError, "structure is a list", (x, w, [])),
        (TypeError, "weight has dtype", (x, w.double(), s)),
        (TypeError, "input has dtype", (x.int(), w, s)),
        (TypeError, "bias is a int", (x, w, s, 1)),
        (ValueError, "bias has shape", (x, w, s, x[0])),
        (ValueError, "input has shape", (x[:, :7], w, s)),
        (ValueError, "structure is for a weight", (x, w[:3], s)),
        (ValueError, "weight has 8 packed values: expected 32", (x, w[0], s)),
        (ValueError, "weight has 3 dim", (x, w[None], s)),
    ]:
        with pytest.raises(error, match=words):
            f(*arguments)
