"""batch_norm and its gradients against torch in float64, on the reference and each instruction set."""

import itertools

import pytest
import torch
from conftest import NATIVE

from sparsekern import _library
from sparsekern.ops import batch_norm as public

OP, BACKWARD = torch.ops.sparsekern.batch_norm, torch.ops.sparsekern.batch_norm_backward
SHAPES = [(4, 3), (6, 5, 1), (3, 4, 7), (2, 3, 5, 7), (1, 2, 3, 3), (3, 70, 7, 7), (2, 3, 4, 16), (2, 3, 2, 3, 5),
          (2, 2, 150, 151), (70, 3, 31)]  # fmt: skip
AFTER = list(itertools.product([False, True], [None, "relu"]))
PARAMETERS = ["weight", "bias"]


@pytest.fixture(params=["reference", *NATIVE])
def backend(request, monkeypatch):
    """These operators have CPU kernels only."""
    before = torch.ops.sparsekern.cpu_isa() if NATIVE else None
    if request.param == "reference":
        monkeypatch.setattr(_library, "kernels_loaded", False)
    else:
        torch.ops.sparsekern.set_cpu_isa(request.param)
    yield request.param
    if before is not None:
        torch.ops.sparsekern.set_cpu_isa(before)


def operands(shape, residual=True, dtype=torch.float32, mean=0.0):
    torch.manual_seed(0)
    x, r, g = (torch.randn(shape) for _ in range(3))
    w, b = torch.randn(shape[1]), torch.randn(shape[1])
    return [t if t is None else t.to(dtype) for t in (x + mean, w, b, r if residual else None)], g.to(dtype)


def plain(x, w, b, r, activation=None, eps=1e-5):
    y = torch.nn.functional.batch_norm(x, None, None, w, b, True, eps=eps)
    y = y if r is None else y + r
    return y.relu() if activation else y


def results(run, given, grad):
    """Output and gradients; None for what is not there."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    y = run(*given)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in given)]


def close(got, want, tolerance=2e-6):
    for found, expected in zip(got, want, strict=True):
        if expected is not None:
            scale = max(float(expected.abs().amax()), 1e-3) if expected.numel() else 1.0
            torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("residual", "activation"), AFTER)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch_in_float64(backend, shape, residual, activation):
    given, grad = operands(shape, residual)
    wide = [None if t is None else t.double() for t in given]
    want = results(lambda *t: plain(*t, activation), wide, grad)
    close(results(lambda *t: public(*t, activation=activation)[0], given, grad), want)
    _, mean, variance = public(*given, activation=activation)
    dims = [i for i in range(len(shape)) if i != 1]
    want = torch.var_mean(wide[0], dims, correction=0)
    torch.testing.assert_close((variance.double(), mean.double()), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("without", "eps"), [(("weight",), 1e-3), (("bias",), 1e-5), (("weight", "bias"), 0.1)])
def test_without_weight_or_bias(backend, without, eps):
    given, grad = operands((3, 4, 5, 6))
    for name in without:
        given[1 + PARAMETERS.index(name)] = None
    want = results(lambda *t: plain(*t, "relu", eps), [None if t is None else t.double() for t in given], grad)
    close(results(lambda *t: public(*t, activation="relu", eps=eps)[0], given, grad), want)


def test_large_mean_costs_no_digits(backend):
    given, grad = operands((4, 3, 33, 31), mean=1e4)
    wide = [t.double() for t in given]
    tolerance = 1e-3 if backend == "reference" else 1e-6
    close([public(*given)[0]], [plain(*wide)], tolerance)
    _, mean, variance = public(*given)
    close((mean, variance), reversed(torch.var_mean(wide[0], (0, 2, 3), correction=0)), 1e-6)
    # The saved mean is a float32: half of its last digit is what the gradients lose.
    want = results(lambda *t: plain(*t), wide, grad)
    close(results(lambda *t: public(*t)[0], given, grad), want, 2e-3)


def test_streamed_results_are_those_of_small_tensors(backend):
    """Results of large tensors go past the caches: the same numbers, whatever is beside them."""
    given, grad = operands((2, 65, 128, 128))
    y, mean, variance = OP(*given, True, 1e-5)
    found = BACKWARD(grad, given[0], given[1], y, mean, variance, 1e-5, [True] * 4)
    part = [t[:, 3:5].contiguous() if t.dim() > 1 else t[3:5] for t in given]
    few = OP(*part, True, 1e-5)
    torch.testing.assert_close(y[:, 3:5], few[0], rtol=0, atol=1e-6 if backend == "reference" else 0)
    few = BACKWARD(grad[:, 3:5].contiguous(), part[0], part[1], *few, 1e-5, [True] * 4)
    tolerance = dict(rtol=1e-5, atol=1e-4) if backend == "reference" else dict(rtol=0, atol=0)
    for i, whole in enumerate(found):
        torch.testing.assert_close(whole[:, 3:5] if i in (0, 3) else whole[3:5], few[i], **tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_behave_as_in_torch(backend, bad):
    given, grad = operands((3, 4, 6, 7))
    given[0][1, 2, 3, 4] = bad
    given[3][0, 1, 0, 0] = bad
    for after in (None, "relu"):
        want = results(lambda *t, a=after: plain(*t, a), given, grad)
        got = results(lambda *t, a=after: public(*t, activation=a)[0], given, grad)
        for found, expected in zip(got, want, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    _, mean, variance = public(*given)
    assert torch.isfinite(mean[[0, 1, 3]]).all() and torch.isfinite(variance[[0, 1, 3]]).all()
    assert torch.isnan(variance[2]) and (torch.isnan(mean[2]) if bad != bad else mean[2] == bad)


def test_constant_channels(backend):
    x, b = torch.full((2, 3, 4, 4), 0.1), torch.tensor([1.0, -1.0, 0.0])
    y, mean, variance = public(x, None, b, activation="relu")
    torch.testing.assert_close(y, b.relu().reshape(-1, 1, 1).expand_as(x), rtol=0, atol=1e-4)
    assert variance.abs().max() < 1e-12 and torch.allclose(mean, torch.tensor(0.1))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3)])
def test_empty(backend, shape):
    given, grad = operands(shape)
    y, mean, variance = public(*given, activation="relu")
    assert y.shape == shape and mean.shape == variance.shape == shape[1:2]
    assert mean.isnan().all() and variance.isnan().all()
    found = results(lambda *t: public(*t)[0], given, grad)
    assert [t.shape for t in found[1:]] == [t.shape for t in given]


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "offset"])
def test_any_memory_format(backend, layout):
    given, grad = operands((2, 4, 6, 8))

    def lay(t):
        if t.dim() != 4:
            return t
        if layout == "channels_last":
            return t.to(memory_format=torch.channels_last)
        if layout == "offset":  # contiguous, no vector on a cache line
            return torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)
        return (
            t.transpose(0, 3).contiguous().transpose(0, 3)
            if layout == "transposed"
            else t.repeat_interleave(2, 1)[:, ::2]
        )

    want = results(lambda *t: plain(*t, "relu"), [t.double() for t in given], grad)
    placed = [lay(t) for t in given]
    last = layout == "channels_last"
    for mixed in (placed, [placed[0], *given[1:]], [given[0], *placed[1:]]):
        found = results(lambda *t: public(*t, activation="relu")[0], mixed, lay(grad))
        close(found, want)
        assert found[0].is_contiguous(memory_format=torch.channels_last) == (last and mixed[0] is placed[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_sixteen_bits_round_once(backend, dtype, wide):
    given, grad = operands((2, 3, 5, 6), dtype=dtype)
    if wide:
        given[1], given[2] = given[1].float(), given[2].float()
    found = results(lambda *t: public(*t, activation="relu")[0], given, grad)
    want = results(lambda *t: plain(*t, "relu"), [t.double() for t in given], grad)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in given] and public(*given)[1].dtype == torch.float32
    close(found, want, 2 * torch.finfo(dtype).eps)


def test_gradients_in_float64():
    given, _ = operands((3, 2, 3, 2), dtype=torch.float64)
    given = [t.requires_grad_() for t in given]
    for after in (None, "relu"):
        assert torch.autograd.gradcheck(lambda *t, a=after: public(*t, activation=a)[0], given)
        assert torch.autograd.gradgradcheck(lambda *t, a=after: public(*t, activation=a)[0], given)
    x, _, b, r = given
    assert torch.autograd.gradgradcheck(lambda x, b: public(x, None, b, r.detach())[0], (x, b))
    y, mean, variance = public(*given)
    with pytest.raises(NotImplementedError, match="differentiate batch_norm twice"):
        BACKWARD(y, x, None, None, mean, variance, 1e-5, [True] * 4)[0].sum().backward()


@pytest.mark.parametrize("needs", [c for c in itertools.product([False, True], repeat=4) if any(c)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_that_nobody_needs_are_not_computed(backend, needs, activation):
    given, grad = operands((2, 3, 5, 5))
    want = results(lambda *t: plain(*t, activation), given, grad)[1:]
    asked = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    output, mean, variance = public(*asked, activation=activation)
    assert not mean.requires_grad and not variance.requires_grad
    output.backward(grad)
    close([t.grad for t, need in zip(asked, needs, strict=True) if need],
          [g for g, need in zip(want, needs, strict=True) if need])  # fmt: skip
    assert all(t.grad is None for t, need in zip(asked, needs, strict=True) if not need)
    found = BACKWARD(grad, given[0], given[1], output.detach() if activation else None, mean, variance, 1e-5, needs)
    assert [bool(t.numel()) for t in found] == list(needs)
    if needs[3]:  # of a bare call; autograd takes grad itself where no ReLU follows
        torch.testing.assert_close(found[3], want[3])


def test_nothing_is_changed_in_place(backend):
    given, grad = operands((2, 3, 5, 5))
    before = [t.clone() for t in given]
    results(lambda *t: public(*t, activation="relu")[0], given, grad)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    y = public(*[t.requires_grad_() for t in given], activation="relu")[0]
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_operator_and_direct_call_agree_bit_for_bit(backend):
    given, grad = operands((3, 5, 6, 7))
    for after in (None, "relu"):
        direct = results(lambda *t, a=after: public(*t, activation=a)[0], given, grad)
        through = results(lambda *t, a=after: OP(*t, a is not None, 1e-5)[0], given, grad)
        assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))


@pytest.mark.parametrize("shape", [(2, 130, 7, 7), (3, 5, 130, 131), (2, 1, 200, 200), (16, 64, 14, 14)], ids=str)
def test_thread_count_does_not_matter(shape):
    given, grad = operands(shape)
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found[threads] = results(lambda *t: public(*t, activation="relu")[0], given, grad)
        finally:
            torch.set_num_threads(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[threads], strict=True))


@pytest.mark.parametrize(("shape", "last"), [((2, 3, 4, 5), False), ((2, 3, 4, 5), True), ((4, 3), False)], ids=str)
def test_opcheck(shape, last):
    given, grad = operands(shape)
    if last:
        given[0] = given[0].to(memory_format=torch.channels_last)
    x, w, b, r = (t.requires_grad_() for t in given)
    for arguments in (
        (x, None, None, None, False),
        (x, w, b, None, True),
        (x, w, None, r, True),
        (x, None, b, r, False),
    ):
        torch.library.opcheck(OP, (*arguments, 1e-5))
    rest = [t.detach() for t in given]
    y, mean, variance = OP(*rest, True, 1e-5)
    torch.library.opcheck(BACKWARD, (grad, rest[0], rest[1], y, mean, variance, 1e-5, [True] * 4))
    torch.library.opcheck(BACKWARD, (grad, rest[0], None, None, mean, variance, 1e-5, [False, True, False, True]))


X, C = torch.ones(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.ones(3),), {}, ValueError, r"input has shape \(3,\): expected \(N, C, ...\)"),
        ((X, torch.ones(4)), {}, ValueError, r"weight has shape \(4,\): expected \(3,\)"),
        ((X, C, torch.ones(1)), {}, ValueError, r"bias has shape \(1,\): expected \(3,\)"),
        ((X, C, C, X[:, :1]), {}, ValueError, r"residual has shape \(2, 1, 4, 4\): expected \(2, 3, 4, 4\)"),
        ((X, C.double()), {}, TypeError, "weight has dtype torch.float64: expected torch.float32"),
        ((X, C, C, X.bfloat16()), {}, TypeError, "residual has dtype torch.bfloat16"),
        ((X.bfloat16(), C, C, X), {}, TypeError, "residual has dtype torch.float32: expected torch.bfloat16"),
        ((X.long(),), {}, TypeError, "input has dtype torch.int64: expected a floating-point type"),
        ((X, C.to("meta")), {}, ValueError, "weight is on meta: expected cpu"),
        ((X,), {"activation": "relu6"}, ValueError, "activation='relu6': expected None or 'relu'"),
        ((torch.ones(1, 3, 1, 1),), {}, ValueError, "expected more than 1 value per channel"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        public(*arguments, **options)
