"""Building and installing: what is decided, that it is said and recorded, and that nothing goes wrong in silence.

The builds run on a copy of the sources with a pretended compiler, which takes seconds and needs no real one.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMPILER = f"""#!{sys.executable}
# Writes empty objects and true dependency files, logs each source, fails on request.
import os, re, sys
from pathlib import Path

arguments = sys.argv[1:]
if "-o" not in arguments:
    sys.exit(print("pretended 1.0") or os.environ.get("PRETEND_OLD"))
out = Path(arguments[arguments.index("-o") + 1])
out.write_text("")
sources = [a for a in arguments if a.endswith((".cpp", ".cu"))]
for source in map(Path, sources):
    with open(Path(__file__).with_name("log"), "a") as log:
        log.write(source.name + "\\n")
    seen = [source]
    for path in seen:
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            seen += [p for p in [path.parent / name] if p.exists() and p not in seen]
    out.with_suffix(".o.d").write_text(f"{{out}}: {{' '.join(map(str, seen))}}\\n")
    if os.environ.get("PRETEND_ERROR") == source.name:
        sys.exit(f"{{source.name}}:1: pretended error")
"""

NVCC = f"""#!{sys.executable}
# As COMPILER, for kernels.
import os, sys
from pathlib import Path

arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit(print("release " + os.environ.get("PRETEND_CUDA", "13.0") + ", V1"))
if "--list-gpu-code" in arguments:
    sys.exit(print("sm_80 sm_90"))
if os.environ.get("PRETEND_NVCC_ERROR"):
    sys.exit("unsupported GNU version")
out = Path(arguments[arguments.index("-o") + 1])
out.write_text("")
source = Path(arguments[arguments.index("-c") + 1])
if "-MF" in arguments:
    Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{out}}: {{source}} \\\\\\n  csrc/cuda/device.cuh\\n")
    with open(Path(__file__).parents[2] / "log", "a") as log:
        log.write(source.name + "\\n")
"""


@pytest.fixture
def toolchain():
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc/toolchain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolchain"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what an install reads, without build products, and the pretended compiler beside it."""
    for module in ("setuptools", "ninja"):
        pytest.importorskip(module, reason=f"{module} is needed to build")
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in ("csrc", "sparsekern"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for compiler, text in ((folder / "compiler", COMPILER), (folder / "cuda/bin/nvcc", NVCC)):
        compiler.parent.mkdir(parents=True, exist_ok=True)
        compiler.write_text(text)
        compiler.chmod(0o755)
    return folder


def build(tree, **env):
    """`setup.py build_ext --inplace` with the pretended compiler: the result and the sources that were compiled."""
    log = tree / "log"
    log.unlink(missing_ok=True)
    cxx = str(tree / "compiler")
    tools = {"CXX": cxx, "LDSHARED": cxx, "LDCXXSHARED": cxx, "MAX_JOBS": "2", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    tools |= {"SPARSEKERN_CUDA": "off", "CUDA_HOME": str(tree / "cuda")}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, capture_output=True, text=True, env={**os.environ, **tools, **env},
    )  # fmt: skip
    return result, sorted(log.read_text().split()) if log.exists() else []


def names(tree, pattern):
    return [path.name for path in tree.glob(pattern)]


def test_every_source_is_built_and_a_changed_header_rebuilds_what_includes_it(tree):
    result, compiled = build(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    isas = names(tree, "csrc/cpu/simd/build_*.cpp")
    assert set(names(tree, "csrc/cpu/*.cpp") + isas) <= {*compiled, "build_avx2.cpp", "build_avx512.cpp"}
    assert "build_scalar.cpp" in compiled
    info = json.loads((tree / "sparsekern/_build_info.json").read_text())
    assert "pretended 1.0" in info["decisions"]["kernels"] and (tree / "sparsekern/_ops.abi3.so").exists()
    for piece, decision in info["decisions"].items():
        assert result.stderr.count(f"sparsekern build: {piece}: {decision}") == 1

    (tree / "csrc/cpu/another.cpp").write_text("int another;\n")
    header = tree / "csrc/cpu/simd/masked_sgd.h"
    header.write_text(header.read_text() + "\n// changed\n")
    _, again = build(tree)
    (tree / "csrc/cpu/another.cpp").unlink()
    assert again == sorted(["another.cpp", *(name for name in isas if name in compiled)])


def test_a_compile_error_stops_the_build(tree):
    source = tree / "csrc/cpu/masked_sgd.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    result, _ = build(tree, PRETEND_ERROR="masked_sgd.cpp")
    assert result.returncode != 0 and "pretended error" in result.stdout + result.stderr


needs_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")


@needs_cuda
def test_cuda_that_is_required_stops_the_build(tree):
    result, compiled = build(tree, SPARSEKERN_CUDA="require", CUDA_HOME=str(tree / "nowhere"))
    assert result.returncode != 0 and not compiled
    assert "SPARSEKERN_CUDA=require: no nvcc found (looked in" in result.stderr and "set CUDA_HOME" in result.stderr


@needs_cuda
def test_kernels_are_built_by_nvcc_and_again_when_a_header_changes(tree):
    cuda = {"SPARSEKERN_CUDA": "auto", "PRETEND_CUDA": torch.version.cuda}
    result, compiled = build(tree, **cuda)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = names(tree, "csrc/cuda/*.cu")
    assert kernels and set(kernels + names(tree, "csrc/cuda/*.cpp")) <= set(compiled)
    assert (tree / "sparsekern/_cuda.abi3.so").exists()
    decision = json.loads((tree / "sparsekern/_build_info.json").read_text())["decisions"]["CUDA"]
    assert decision == f"sm_80, sm_90,compute_90; CUDA {torch.version.cuda} in {tree / 'cuda'}"
    assert not [name for name in build(tree, **cuda)[1] if name.endswith(".cu")]
    header = tree / "csrc/cuda/device.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    assert set(kernels) <= set(build(tree, **cuda)[1])
    (tree / "sparsekern/_cuda.abi3.so").unlink()


@needs_cuda
@pytest.mark.parametrize(
    ("pretend", "reason"),
    [
        ({"PRETEND_CUDA": "11.8"}, "but .* has 11.8; point CUDA_HOME"),
        ({"PRETEND_NVCC_ERROR": "1"}, "cannot compile a small kernel \\(unsupported GNU version\\); set CXX"),
    ],
)
def test_an_nvcc_that_does_not_fit_gives_the_cpu_build_and_says_why(toolchain, tree, monkeypatch, pretend, reason):
    monkeypatch.setenv("CUDA_HOME", str(tree / "cuda"))
    for name, value in {"PRETEND_CUDA": torch.version.cuda, **pretend}.items():
        monkeypatch.setenv(name, value)
    found, about = toolchain.cuda_decision(torch.version.cuda, "c++")
    assert found is None and about.startswith("none (SPARSEKERN_CUDA=auto), GPU tensors take slower paths: ")
    assert re.search(reason, about), about


def test_a_torch_for_cpu_gets_no_cuda_kernels(toolchain, monkeypatch):
    monkeypatch.delenv("SPARSEKERN_CUDA", raising=False)
    assert "built for CPU only" in toolchain.cuda_decision(None, "c++")[1]
    monkeypatch.setenv("SPARSEKERN_CUDA", "require")
    with pytest.raises(SystemExit, match="SPARSEKERN_CUDA=require: this torch is built for CPU only"):
        toolchain.cuda_decision(None, "c++")


def test_architectures_are_those_of_torch_or_a_sensible_list(toolchain, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.architecture_flags({75, 80, 86, 90}) == (
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"
    )  # fmt: skip
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert toolchain.architecture_flags({80})[1] == "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: got 'Hopper'"):
        toolchain.architecture_flags({80})


def test_without_a_compiler_it_installs_says_so_and_works(tree, tmp_path):
    env = {**os.environ, "CXX": "none-such"}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(run, check=True, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"cp3{sys.version_info.minor}" in wheel.name and "none-any" not in wheel.name
    files = zipfile.ZipFile(wheel).namelist()
    assert "sparsekern/_build_info.json" in files and "sparsekern/py.typed" in files
    assert not [name for name in files if name.endswith(".so") or name.startswith(("csrc", "tests"))]
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    result = subprocess.run(
        [sys.executable, "-m", "sparsekern", "doctor"],
        cwd=tmp_path, capture_output=True, text=True, env={**env, "PYTHONPATH": str(target)},
    )  # fmt: skip
    assert result.stderr.count("no C++ compiler found (looked for none-such); install g++ and reinstall") == 1
    assert f"in {target}" in result.stdout


def test_wheel_has_the_command_and_every_package(tree):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer")
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["sparsekern"] == "sparsekern.cli:main"
    assert project["dependencies"] == ["torch>=2.10"], "torch is the only core dependency"
    folders = {path.parent for path in (ROOT / "sparsekern").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders), "setuptools would leave a folder out"


def test_cuda_can_be_left_out(toolchain, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CUDA", "off")
    assert toolchain.cuda_decision("13.0", "c++") == (None, "none (SPARSEKERN_CUDA=off)")


def test_unknown_cuda_wish_is_refused(toolchain, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="got 'yes', allowed are auto, require, off"):
        toolchain.cuda_decision("13.0", "c++")


def test_a_compiler_that_is_too_old_stops_the_build(toolchain, tree, monkeypatch):
    monkeypatch.setenv("CXX", str(tree / "compiler"))
    assert toolchain.find_compiler() == (str(tree / "compiler"), "pretended 1.0")
    monkeypatch.setenv("PRETEND_OLD", "error: unrecognized command-line option '-std=c++20'")
    with pytest.raises(SystemExit, match="cannot compile C\\+\\+20.*CXX=none"):
        toolchain.find_compiler()


def test_a_compiler_with_a_prefix_is_understood(toolchain, tree, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} {tree / 'compiler'}")
    assert toolchain.find_compiler()[1] == "pretended 1.0"


def test_compilers_are_looked_for_on_the_path(toolchain, tree, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    command, reason = toolchain.find_compiler()
    assert command == "" and "c++, g++, clang++" in reason
    shutil.copy(tree / "compiler", tmp_path / "clang++")
    assert toolchain.find_compiler()[0] == "clang++"


def test_missing_headers_drop_only_the_module(toolchain, tmp_path, monkeypatch):
    pytest.importorskip("pybind11", reason="pybind11 is needed to build the module")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "apt-get install python3-dev" in toolchain.module_obstacle()
    (tmp_path / "Python.h").write_text("")
    assert toolchain.module_obstacle() == ""
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pip install pybind11" in toolchain.module_obstacle()


def test_jobs_are_capped(toolchain, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= toolchain.jobs() <= os.cpu_count()
    monkeypatch.setattr(toolchain.Path, "read_text", lambda self: "MemAvailable: 1500000 kB")
    assert toolchain.jobs() == 1
