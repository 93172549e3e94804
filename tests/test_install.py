"""Building and installing: what is decided, that it is said and recorded, and that nothing goes wrong in silence.

The builds run on a copy of the sources with a pretended compiler, which takes seconds and needs no real one.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
sources = [a for a in arguments if a.endswith(".cpp")]
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


@pytest.fixture
def toolchain():
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc/toolchain.py")
    module = importlib.util.module_from_spec(spec)
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
    compiler = folder / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return folder


def build(tree, **env):
    """`setup.py build_ext --inplace` with the pretended compiler: the result and the sources that were compiled."""
    log = tree / "log"
    log.unlink(missing_ok=True)
    cxx = str(tree / "compiler")
    tools = {"CXX": cxx, "LDSHARED": cxx, "LDCXXSHARED": cxx, "MAX_JOBS": "2", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
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


def test_cuda_that_is_required_stops_the_build(tree):
    result, compiled = build(tree, SPARSEKERN_CUDA="require")
    assert result.returncode != 0 and not compiled
    assert "SPARSEKERN_CUDA=require: this version has no CUDA kernels" in result.stderr


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


@pytest.mark.parametrize("wish", ["auto", "off", ""])
def test_cuda_decision_names_the_wish(toolchain, monkeypatch, wish):
    monkeypatch.setenv("SPARSEKERN_CUDA", wish) if wish else monkeypatch.delenv("SPARSEKERN_CUDA", raising=False)
    assert f"SPARSEKERN_CUDA={wish or 'auto'}" in toolchain.cuda_decision()


def test_unknown_cuda_wish_is_refused(toolchain, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="got 'yes', allowed are auto, require, off"):
        toolchain.cuda_decision()


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
