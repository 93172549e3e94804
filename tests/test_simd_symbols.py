"""Code compiled for one instruction set cannot win the link, and the library binds to nothing but the stable ABI."""

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsekern as sk

ROOT = Path(__file__).parents[1]


def build_script():
    spec = importlib.util.spec_from_file_location("sparsekern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(isa):
    """The object that the build made of the present sources, if it is there: compiling it anew takes seconds."""
    folder = ROOT / "csrc/cpu/simd"
    changed = max(path.stat().st_mtime for path in [*folder.iterdir(), ROOT / "setup.py"])
    objects = ROOT.glob(f"build/temp.*/{isa}/csrc/cpu/simd/build_{isa}.o")
    return next((path for path in objects if path.stat().st_mtime > changed), None)


@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs c++ and nm")
@pytest.mark.parametrize("optimise", ["-O0", "-O3"])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_object_defines_one_table_and_nothing_weak(tmp_path, isa, optimise):
    script = build_script()
    if isa not in script.ISA_FLAGS:
        pytest.skip(f"{isa} is not built on {platform.machine()}")
    target = built(isa) if optimise == "-O3" else None
    if target is None:
        target, source = tmp_path / f"{isa}.o", ROOT / f"csrc/cpu/simd/build_{isa}.cpp"
        flags = [*script.FLAGS, *script.ISA_FLAGS[isa], optimise]
        subprocess.run(["c++", *flags, "-c", str(source), "-o", str(target)], check=True, capture_output=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = [line.split()[-2] for line in symbols]
    assert not {"W", "V", "w", "v", "u"} & set(kinds), symbols
    exported = [line for line in symbols if line.split()[-2] in "TDRB"]
    assert len(exported) == 1 and exported[0].endswith(f"kernels_{isa}"), exported


@pytest.mark.skipif(bool(sk.degradation) or not shutil.which("nm"), reason="needs the built library and nm")
def test_library_uses_the_stable_abi_only():
    library = sorted(Path(sk.__file__).parent.glob("_ops*.so"))[0]
    nm = subprocess.run(["nm", "-DC", str(library)], check=True, capture_output=True, text=True).stdout
    names = [line.split(maxsplit=2)[-1] for line in nm.splitlines()]
    foreign = [name for name in names if "at::" in name or "c10::" in name or name.startswith(("Py", "_Py"))]
    assert "aoti_torch_abi_version" in nm and not foreign, foreign
