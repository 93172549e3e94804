"""sparse_conv2d and sparse_linear on CUDA, emulated: what only these kernels owe. The rest is in test_sparse_*.py."""

from __future__ import annotations

import warnings

import emulated_cuda
import emulator
import pytest
import torch
from test_sparse_kernels import assert_close, block_mask, gradients

import sparsekern as sk
from sparsekern.ops import sparse_cuda

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(sparse_cuda, "_told", set())


@pytest.fixture
def calls(monkeypatch):
    """Names of the compiled functions that were called, in order."""
    seen = []
    for name in ("product", "input_gradient", "weight_gradient"):
        run = getattr(sparse_cuda, name)
        monkeypatch.setattr(sparse_cuda, name, lambda *a, run=run, name=name: seen.append(name) or run(*a))
    return seen


def problem(shape, pattern, size, batch, sparsity=0.8):
    torch.manual_seed(0)
    mask = block_mask(shape, pattern, sparsity)
    x = torch.randn(batch, shape[1], *size).to(memory_format=LAST)
    w = torch.where(mask, torch.randn(shape), torch.nan).to(memory_format=LAST)
    return x, w, mask, sk.ops.sparse_structure(mask, pattern)


# Out, in, kernel, size, stride, padding, batch: a cropped layer of a ResNet of each kind, with a tail and three blocks
# of threads or more over pixels and images. The third has them along every dimension of every pass's grid, in both
# patterns, and its weight gradient takes tile after tile in a block.
CASES = [
    (36, 36, 3, (9, 10), 1, 1, 9),
    (36, 36, 3, (17, 19), 2, 1, 9),
    (260, 260, 1, (9, 10), 1, 0, 9),
    (132, 36, 1, (9, 10), 2, 0, 9),
]


@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
@pytest.mark.parametrize("case", CASES)
def test_every_order_of_threads_gives_the_same_right_result(calls, case, pattern):
    out, channels, kernel, size, stride, padding, batch = case
    x, w, mask, s = problem((out, channels, kernel, kernel), pattern, size, batch)
    kept = torch.where(mask, w, 0).double()
    exact = torch.nn.functional.conv2d(x.double(), kept, None, stride, padding)
    exact = [exact, *gradients(lambda x, w: torch.nn.functional.conv2d(x, w, None, stride, padding), x.double(), kept)]
    exact[2] = torch.where(mask, exact[2], 0)
    results = []
    for order in (0, 1, 2):
        with emulated_cuda.installed(order):
            run = lambda x, w: sk.ops.sparse_conv2d(x, w, s, None, stride, padding)  # noqa: E731
            results.append([run(x, w), *gradients(run, x, w)])
    assert set(calls) == {"product", "input_gradient", "weight_gradient"}
    for terms, found, wanted in zip((9 * channels, 9 * out, exact[0][:, 0].numel()), results[0], exact, strict=True):
        assert_close(found, wanted, terms)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "unstructured"])
def test_packed_values_take_the_place_of_the_weight(calls, pattern):
    x, w, mask, s = problem((12, 16, 3, 3), pattern, (9, 8), 3)
    with emulated_cuda.installed(1):
        dense = gradients(lambda x, w: sk.ops.sparse_conv2d(x, w, s, None, 2, 1), x, w)
        packed = gradients(lambda x, w: sk.ops.sparse_conv2d(x, s.pack(w), s, None, 2, 1), x, w)
        with pytest.raises(ValueError, match="packed values: expected"):
            structure, shape = list(s.tensors), list(s.shape)
            torch.ops.sparsekern.sparse_conv2d(
                x, s.pack(w)[1:], structure, s.layout, None, [2, 2], [1, 1], [1, 1], 1, shape
            )
    assert len(calls) == 6 and all(torch.equal(a, b) for a, b in zip(dense, packed, strict=True))
    assert not dense[1][~mask].any()


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("pattern", ["4x1", "1x4", "unstructured"])
def test_linear(calls, rows, pattern):
    mask = block_mask((68, 44), pattern, 0.7)
    x, w, b = torch.randn(rows, 44), torch.randn(68, 44), torch.randn(68)
    s = sk.ops.sparse_structure(mask, pattern)
    exact = gradients(lambda x, w: x @ torch.where(mask, w, 0).t(), x.double(), w.double())
    with emulated_cuda.installed(2):
        found = sk.ops.sparse_linear(x, torch.where(mask, w, torch.nan), s, b)
        slopes = gradients(lambda x, w: sk.ops.sparse_linear(x, w, s, b), x, w)
    assert_close(found, x.double() @ torch.where(mask, w, 0).double().t() + b.double(), 44)
    assert_close(slopes[0], exact[0], 68)
    assert_close(slopes[1], exact[1], rows)
    assert calls == ["product", "product", "input_gradient", "weight_gradient"]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("torch.float64: the sparse kernels are float32", dict(dtype=torch.float64)),
        ("groups=2: the sparse kernels are for one group", dict(groups=2)),
        ("too large for shared memory", dict(dilation=40, size=(90, 90))),
    ],
)
def test_what_the_kernels_do_not_take_is_dense_and_said_once(reason, change):
    given = {"dtype": torch.float32, "groups": 1, "dilation": 1, "size": (9, 9), **change}
    groups, dilation = given["groups"], given["dilation"]
    x = torch.randn(2, 4 * groups, *given["size"], dtype=given["dtype"])
    w = torch.randn(8, 4, 3, 3, dtype=given["dtype"])
    s = sk.ops.sparse_structure(w, "4x1", groups=groups)
    with emulated_cuda.installed():
        with pytest.warns(RuntimeWarning, match="runs as a dense operator") as told:
            found = [sk.ops.sparse_conv2d(x, w, s, None, 1, 1, dilation, groups) for _ in range(2)]
        assert len(told) == 1 and reason in str(told[0].message)
    torch.testing.assert_close(found[1], torch.nn.functional.conv2d(x, w, None, 1, 1, dilation, groups))


DOUBLE = "dense: torch.float64: the sparse kernels are float32, and with pattern 4x1 float16 and bfloat16"


@pytest.mark.parametrize(
    ("module", "size", "said"),
    [
        (torch.nn.Conv2d(4, 8, 3, dtype=torch.float64), (9, 9), DOUBLE),
        (torch.nn.Conv2d(8, 8, 3, groups=2), (9, 9), "dense: groups=2: the sparse kernels are for one group"),
        (torch.nn.Conv2d(4, 8, 3, dilation=40), (90, 90), "dense: the window of the convolution is too large"),
        (torch.nn.Conv2d(4, 8, 3, dilation=8), (30, 30), "sparse 4x1, backward dense: the window of the convolution"),
        (torch.nn.Linear(9, 8, dtype=torch.float64), (9,), DOUBLE),
        (torch.nn.Conv2d(4, 8, 3), (9, 9), "sparse 4x1"),
        (torch.nn.Conv2d(4, 8, 3, dtype=torch.half), (9, 9), "sparse 4x1, backward of the input dense: torch.float16"),
    ],
)
def test_the_report_names_the_layer_that_falls_back(module, size, said):
    model = torch.nn.Sequential(module)
    masks = sk.MaskSet({"w": module.weight})
    masks.set("w", block_mask(tuple(module.weight.shape), "4x1", 0.5))
    sk.nn.accelerate(model, masks, choose=lambda *_: True)
    channels = [module.in_channels] if isinstance(module, torch.nn.Conv2d) else []
    x = torch.randn(2, *channels, *size, dtype=module.weight.dtype, requires_grad=True)
    with emulated_cuda.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            model(x).sum().backward()
            ((_, how),) = sk.nn.acceleration_report(model).layers
            assert how.startswith(said) and len(how) < len(said) + 40
    model(x)  # not emulated, and what was noted is gone
    assert sk.nn.acceleration_report(model).layers[0][1] == "sparse 4x1"


def test_the_transposed_structure_is_kept_until_it_changes():
    mask = block_mask((8, 12, 3, 3), "4x1", 0.6)
    s = sk.ops.sparse_structure(mask, "4x1")
    first = sparse_cuda.transposed(s.tensors, "4x1", s.shape)
    turned = sk.ops.sparse_structure(mask.transpose(0, 1), "1x4")
    assert all(torch.equal(a, b) for a, b in zip(first, turned.tensors, strict=False))
    assert sparse_cuda.transposed(s.tensors, "4x1", s.shape) is first
    wider = sparse_cuda.transposed(s.tensors, "4x1", (8, 36, 1, 3))  # the same tensors, another weight
    assert wider[0].numel() == 37 != first[0].numel()
    s.tensors[1].add_(0)
    assert sparse_cuda.transposed(s.tensors, "4x1", s.shape) is not first
