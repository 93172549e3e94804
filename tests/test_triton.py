"""The Triton kernels without a GPU: operator tests in Triton's interpreter, and the machine code for three chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import census
import pytest
import torch

import sparsekern as sk

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("starts interpreted tests and is none", allow_module_level=True)

FOLDER = Path(__file__).parent
BUDGET = json.loads((FOLDER / "triton_budget.json").read_text())
SUITES = {
    "first": ("test_masked_sgd", "test_masked_adamw", "test_bare_operators", "test_topk_mask", "test_topk_mask_input"),
    "compiled": ("test_triton_compile",),
    "second": ("test_triton_kernels", "test_sparse_kernels", "test_sparse_linear", "test_sparse_conv2d"),
}  # fmt: skip


@pytest.fixture(scope="module")
def suites():
    """The operator tests at work on interpreted kernels, and those of torch.compile, while this process compiles."""
    variables = {**os.environ, "SPARSEKERN_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    interpreted = {**variables, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    started = {
        name: subprocess.Popen(
            [*command, *(str(FOLDER / f"{file}.py") for file in files)], cwd=FOLDER.parent, text=True,
            env=variables if name == "compiled" else interpreted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for name, files in SUITES.items()
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    import triton_aot

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield triton_aot.Recorder(patch)


def _step(dtype, adam=False):
    from sparsekern.triton.masked_adamw import masked_adamw_
    from sparsekern.triton.masked_sgd import masked_sgd_

    p, g, v, m = torch.zeros(4, 4096, dtype=dtype)
    masks = [torch.zeros(512, dtype=torch.uint8)]
    if adam:
        hyper = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False)
        return masked_adamw_([p], [g], [v], [m], masks, torch.zeros(1), **hyper)
    hyper = dict(dampening=0.0, weight_decay=1e-4, nesterov=False, maximize=False, momentum_policy="mask")
    return masked_sgd_([p], [g], [v], masks, torch.zeros(1, dtype=torch.uint8), lr=0.1, mu=0.9, **hyper)


def _select(dtype, pattern):
    from sparsekern.triton.topk_mask import topk_mask

    topk_mask([torch.zeros(64, 64, 3, 3, dtype=dtype)], [1000], True, pattern, True, [])


def _layer(dtype, pattern, kernel, stride, needs=None):
    """Forward or one gradient of a convolution of ResNet-50, channels_last."""
    from sparsekern.triton import sparse_conv2d as triton

    weight = torch.ones(64, 64, kernel, kernel, dtype=dtype).to(memory_format=torch.channels_last)
    image = torch.zeros(2, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    structure = sk.ops.sparse_structure(weight, pattern)
    geometry = [stride, stride], [kernel // 2, kernel // 2], [1, 1], 1
    operands = image, weight, list(structure.tensors), structure.layout
    if needs is None:
        return triton.sparse_conv2d(*operands, None, *geometry)
    return triton.sparse_conv2d_backward(image[:, :, ::stride, ::stride], *operands, *geometry, needs)


INPUT, WEIGHT = [True, False, False], [False, True, False]
COMPILED = {
    "masked_sgd float32": lambda: _step(torch.float32),
    "masked_sgd bfloat16": lambda: _step(torch.bfloat16),
    "masked_adamw float32": lambda: _step(torch.float32, adam=True),
    "topk bfloat16 4x1": lambda: _select(torch.bfloat16, "4x1"),
    "conv float32 4x1 3x3": lambda: _layer(torch.float32, "4x1", 3, 1),
    "conv bfloat16 4x1 3x3": lambda: _layer(torch.bfloat16, "4x1", 3, 1),
    "conv float16 1x4 1x1": lambda: _layer(torch.float16, "1x4", 1, 2),
    "gradient of input bfloat16 4x1 3x3": lambda: _layer(torch.bfloat16, "4x1", 3, 2, INPUT),
    "gradient of weight float32 4x1 3x3": lambda: _layer(torch.float32, "4x1", 3, 1, WEIGHT),
    "gradient of weight bfloat16 4x1 3x3": lambda: _layer(torch.bfloat16, "4x1", 3, 1, WEIGHT),
}
"""What users launch -> a call that launches it."""
ON_ALL_CHIPS = {
    "masked_sgd float32", "conv float32 4x1 3x3", "conv bfloat16 4x1 3x3", "gradient of weight bfloat16 4x1 3x3",
}  # fmt: skip
"""What is compiled for sm_80 and sm_100 too: one of each kind, for compiling takes time."""


@pytest.mark.skipif(bool(census.why_not()), reason=census.why_not())
@pytest.mark.parametrize("arch", [90, 80, 100])
def test_machine_code_is_within_its_budget(arch, recorder, suites):
    import triton_aot

    found = {}
    for name in COMPILED if arch == 90 else ON_ALL_CHIPS:
        launches = recorder.of(COMPILED[name])
        for launch in launches:
            kernel = launch[0].__name__
            found[f"{name} {kernel}" if len(launches) > 1 else name] = triton_aot.compiled(launch, arch)
    print(census.table(found))
    budget = BUDGET if arch == 90 else {name: BUDGET[name] for name in ON_ALL_CHIPS}
    said = census.breaches(found, budget, f"sm_{arch}")
    assert not said, "\n".join(said)


@pytest.mark.parametrize("name", SUITES)
def test_operator_tests_pass(name, suites):
    output = suites[name].communicate()[0]
    assert suites[name].returncode == 0 and " passed" in output, output
