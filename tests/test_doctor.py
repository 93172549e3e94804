"""The doctor tells the truth, compiled or not, and the package works in each of these states."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern import _direct, _library, backends, cli, doctor, layer_choices

STEP_AND_DOCTOR = """
import torch, sparsekern as sk
from sparsekern.cli import main
w = torch.ones(3).requires_grad_()
w.sum().backward()
sk.MaskedSGD([w], lr=1.0, masks={w: torch.tensor([True, False, True])}).step()
assert w.tolist() == [0, 0, 0] and sk.ops.topk_mask([torch.tensor([1.0, 3.0, 2.0])], 2)[0].tolist() == [6]
main(["doctor"])
"""
ROOT = Path(sk.__file__).parents[1]
compiled = pytest.mark.skipif(bool(sk.degradation), reason=f"not compiled: {sk.degradation}")


def python(folder, *arguments, **env):
    """Run this Python on the copy of the package in `folder`."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """A folder with a copy of the package in which nothing is compiled."""
    folder = tmp_path_factory.mktemp("unbuilt")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(Path(sk.__file__).parent, folder / "sparsekern", ignore=ignore)
    return folder


def step_and_doctor(folder, **env):
    """The report of a process in which a step and a selection gave the right result."""
    result = python(folder, "-c", STEP_AND_DOCTOR, **env)
    assert result.returncode == 0, result.stderr
    return result


def row(report, name):
    return next(line.split(None, 1)[1] for line in report.splitlines() if line.split()[:1] == [name])


@compiled
def test_names_versions_backends_and_instruction_set(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in row(report, "torch") and sk.__version__ in row(report, "sparsekern")
    gpu = doctor.BACKENDS[backends.chosen("masked_sgd_", "CUDA")]
    assert row(report, "masked_sgd_").startswith(f"CPU: compiled kernel, GPU: {gpu}")
    assert row(report, "topk_mask").startswith("CPU: compiled kernel")
    assert f"kernels use     {torch.ops.sparsekern.cpu_isa()}" in report
    assert "scalar" in row(report, "kernels")
    assert row(report, "CUDA") == _library.build_info()["decisions"]["CUDA"]


def test_extras_are_those_of_the_package_each_with_its_cure(monkeypatch):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer")
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("needs the checkout")
    declared = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split("[>;]", text)[0] for text in texts} - {"tomli"} for extra, texts in declared.items()}
    assert names == {extra: set(modules.values()) for extra, modules in doctor.EXTRAS.items()}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda module: module == "tqdm" or None)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "9.9")
    rows = dict(doctor._extras())
    assert rows["train"] == "tqdm 9.9; without scikit-learn, matplotlib: pip install 'sparsekern[train]'"
    assert rows["vision"] == "without torchvision: pip install 'sparsekern[vision]'"


@compiled
def test_module_agrees_with_the_library():
    module = pytest.importorskip("sparsekern._C", reason="_C was not built: no Python headers or pybind11")
    sets, features = module.build_info()["instruction_sets"], module.cpu_features()
    assert torch.ops.sparsekern.cpu_isa() in sets and module.build_info()["cplusplus"] >= 202002
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa("avx512")
    wide = all(features.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    assert (torch.ops.sparsekern.cpu_isa() == "avx512") == wide
    torch.ops.sparsekern.set_cpu_isa(before)


def test_unbuilt_package_works_and_says_so_once(unbuilt):
    result = step_and_doctor(unbuilt)
    assert row(result.stdout, "masked_sgd_").startswith("CPU: PyTorch reference")
    assert row(result.stdout, "topk_mask").startswith("CPU: PyTorch reference")
    assert "install a C++ compiler and reinstall" in result.stdout.split("degradations")[1]
    assert result.stderr.count("without its compiled kernels") == 1 == result.stderr.count("references are used")


def test_reason_of_the_build_reaches_the_user(unbuilt):
    record = unbuilt / "sparsekern/_build_info.json"
    decisions = {"kernels": "none: the dog ate the compiler", "_C": "none: ditto", "CUDA": "none"}
    record.write_text(json.dumps({"decisions": decisions, "torch": "2.99", "python": "3.99", "sources": "0"}))
    result = python(unbuilt, "-m", "sparsekern", "doctor")
    record.unlink()
    assert "the dog ate the compiler" in result.stderr and "the dog ate" in row(result.stdout, "kernels")


@pytest.mark.skipif(not shutil.which("c++"), reason="needs c++")
def test_library_with_an_unresolved_symbol_degrades_and_names_the_cure(unbuilt, tmp_path):
    source, library = tmp_path / "x.cpp", unbuilt / "sparsekern/_ops.abi3.so"
    source.write_text("void gone_from_torch(); struct S { S() { gone_from_torch(); } } s;")
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    result = step_and_doctor(unbuilt)
    library.unlink()
    for text in (result.stdout.split("degradations")[1], result.stderr):
        assert "gone_from_torch" in text and torch.__version__ in text and "--force-reinstall" in text
    assert result.stderr.count("does not load") == 1


@compiled
def test_library_older_than_the_python_code_is_not_trusted(monkeypatch):
    monkeypatch.setattr(_library, "kernels_loaded", True)
    monkeypatch.setitem(_library.NATIVE, "topk_mask", "cpu_isa")  # has no kernel for the key "CPU"
    assert "older than the Python code, it lacks topk_mask" in _library._load()
    assert not _library.kernels_loaded and not _library.has_kernel("masked_sgd_", "CPU")


@compiled
def test_small_layers_are_called_directly_or_it_is_told_why_not(monkeypatch):
    pytest.importorskip("sparsekern._C", reason="_C was not built: no Python headers or pybind11")
    assert _direct.find and dict(doctor._machine())["small layers"] == "called directly"
    for name in ("find", "run", "obstacle"):
        monkeypatch.setattr(_direct, name, getattr(_direct, name))
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    _direct.connect(next((ROOT / "sparsekern").glob("_ops*.so")))
    assert _direct.find is None and any("lacks DLPack's C functions" in text for text in doctor.degradations())


def test_a_gpu_without_kernels_is_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "cuda_operators", frozenset())
    monkeypatch.setattr(_library, "cuda_obstacle", "the cat ate nvcc")
    monkeypatch.setattr(backends, "why_no_triton", lambda: "the dog ate Triton")
    (line,) = [text for text in doctor.degradations() if "GPU is visible" in text]
    assert "no kernel for masked_" in line and line.endswith("the cat ate nvcc and the dog ate Triton")


@compiled
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_cuda_library_that_does_not_load_leaves_the_others(unbuilt):
    for name in ("_ops", "_cuda"):
        (library,) = (ROOT / "sparsekern").glob(f"{name}*.so") if name == "_ops" else [Path(f"{name}.abi3.so")]
        target = unbuilt / "sparsekern" / library.name
        target.write_bytes(library.read_bytes() if name == "_ops" else b"no library")
    text = "import sparsekern as sk; print(sk._library.cuda_obstacle)"
    result = python(unbuilt, "-c", f"{text}; print(repr(sk.degradation))")
    for library in (unbuilt / "sparsekern").glob("*.so"):
        library.unlink()
    assert "_cuda.abi3.so does not load" in result.stdout and result.stdout.endswith("''\n"), result.stderr


def test_backend_can_be_switched_off_without_a_warning():
    result = step_and_doctor(ROOT, SPARSEKERN_BACKEND="reference")
    assert row(result.stdout, "masked_sgd_").startswith("CPU: PyTorch reference")
    assert "SPARSEKERN_BACKEND=reference" in result.stdout.split("degradations")[1] and not result.stderr


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match="SPARSEKERN_BACKEND: got 'fast', allowed are auto, cuda, triton, reference"):
        _library.backend_setting()


@compiled
def test_instruction_set_is_capped():
    result = step_and_doctor(ROOT, SPARSEKERN_CPU_ISA="scalar")
    assert "kernels use     scalar" in result.stdout
    assert "SPARSEKERN_CPU_ISA=scalar caps" in result.stdout.split("degradations")[1]


@compiled
def test_unknown_instruction_set_is_refused():
    result = python(ROOT, "-c", "import sparsekern", SPARSEKERN_CPU_ISA="sse9")
    assert result.returncode != 0 and "got 'sse9', allowed are scalar, avx2, avx512" in result.stderr


def test_sources_newer_than_the_build_are_told(monkeypatch):
    built = _library.build_info()
    if not built or not (ROOT / "csrc").exists():
        pytest.skip("needs a built checkout")
    assert not any("older than the sources" in text for text in doctor.degradations())
    monkeypatch.setattr(_library, "build_info", lambda: {**built, "sources": "another"})
    assert any("older than the sources" in text for text in doctor.degradations())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_measured_on_demand(monkeypatch, capsys, dtype):
    asked = []

    def speeds(layer, structure, input):
        density = structure.kept / layer.weight.numel()
        training = torch.is_grad_enabled() and input.requires_grad
        asked.append((input.dtype, training, structure.layout, round(density, 2)))
        return sk.nn.Speeds(sparse=density, dense=0.07)

    monkeypatch.setattr(layer_choices, "LAYERS", {"layer": (8, 40, 3, 1, 5)})
    monkeypatch.setattr(sk.nn, "measured_speeds", speeds)
    assert cli.main(["doctor"]) == 0 and not asked
    assert "sparsekern doctor --layers" in row(capsys.readouterr().out, "sparse")
    assert cli.main(["doctor", "--layers", *([dtype] if dtype != "float32" else [])]) == 0
    report = capsys.readouterr().out
    assert re.search("layer unstructured training +dense 100/70 +sparse 50/70 +sparse 20.1/70\n", report), report
    assert "choose=lambda" in report and dtype in report
    layouts = "4x1", "1x4", "unstructured"
    densities, passes = (0.1, 0.05, 0.02), (False, True)
    assert asked == [(getattr(torch, dtype), p, la, d) for la in layouts for d in densities for p in passes]


def test_usage_error_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["surgeon"])
    assert "surgeon" in capsys.readouterr().err
