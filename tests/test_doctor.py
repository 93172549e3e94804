"""The doctor tells the truth, compiled or not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import sparsekern as sk


def run(folder, **env):
    return subprocess.run(
        [sys.executable, "-m", "sparsekern", "doctor"],
        cwd=folder, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip


def test_names_backend_and_instruction_set():
    result = run(Path(sk.__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    if not sk.degradation:
        assert (
            torch.ops.sparsekern.cpu_isa() in result.stdout and "masked_sgd_    CPU: compiled kernel" in result.stdout
        )


def test_unbuilt_package_works_and_says_so(tmp_path):
    source = Path(sk.__file__).parent
    shutil.copytree(source, tmp_path / "sparsekern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = run(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "masked_sgd_    CPU: PyTorch reference" in result.stdout and "degraded: " in result.stdout
    assert result.stderr.count("without its compiled kernels") == 1
    code = "import torch, sparsekern as sk; w = torch.ones(3).requires_grad_(); w.sum().backward();"
    code += "sk.MaskedSGD([w], lr=1.0, masks={w: torch.tensor([True, False, True])}).step(); print(w.tolist())"
    step = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert step.stdout.strip() == "[0.0, 0.0, 0.0]", step.stderr


def test_unknown_instruction_set_is_refused():
    if not sk.degradation:
        result = run(Path(sk.__file__).parents[1], SPARSEKERN_CPU_ISA="sse9")
        assert result.returncode != 0 and "got 'sse9', allowed are scalar, avx2, avx512" in result.stderr
