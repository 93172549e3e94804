"""Code compiled for one instruction set cannot win the link, and the library binds to nothing but the stable ABI."""

import bisect
import importlib.util
import platform
import re
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


def library():
    return str(sorted(Path(sk.__file__).parent.glob("_ops*.so"))[0])


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def functions():
    """(first address, address after the last, source file, name) of the library's functions, sorted."""
    found, file = [], ""
    for line in run("readelf", "-sW", library()):
        fields = line.split()
        if len(fields) > 3 and fields[3] == "FILE":
            file = fields[-1]
        elif len(fields) > 7 and fields[3] == "FUNC" and int(fields[1], 16):
            start = int(fields[1], 16)
            found.append((start, start + int(fields[2]), file, fields[7]))
    return sorted(found)


@pytest.mark.skipif(
    bool(sk.degradation) or platform.machine() != "x86_64", reason="needs the library, built for x86-64"
)
@pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("readelf")), reason="needs binutils")
def test_a_cpu_without_avx_meets_no_unknown_instruction():
    """Only the functions of the AVX objects, which dispatch.cpp chooses by what the CPU has, hold AVX instructions."""
    known = functions()
    starts, avx = [start for start, *_ in known], {"build_avx2.cpp": 0, "build_avx512.cpp": 0}
    assert {"build_scalar.cpp", "dispatch.cpp", *avx} <= {file for *_, file, _ in known}
    # In 64-bit code a first byte C4, C5 or 62 begins an AVX or AVX-512 instruction and nothing else; the bytes that may
    # come before it choose a segment or the width of addresses.
    encoded = re.compile(r"^ *([0-9a-f]+):\s(?:(?:26|2e|36|3e|64|65|67) )*(?:c4|c5|62) ")
    for line in run("objdump", "-d", "-w", library()):
        if match := encoded.match(line):
            address = int(match[1], 16)
            _, end, file, name = known[bisect.bisect_right(starts, address) - 1]
            assert address < end and file in avx, f"{name} of {file}: {line}"
            avx[file] += 1
    assert min(avx.values()) > 1000, avx
    # Code that runs when the library is loaded.
    assert not [name for *_, file, name in known if file in avx and name.startswith("_GLOBAL__sub_I")]


@pytest.mark.skipif(bool(sk.degradation) or not shutil.which("nm"), reason="needs the built library and nm")
def test_library_uses_the_stable_abi_only():
    names = [line.split(maxsplit=2)[-1] for line in run("nm", "-DC", library())]
    foreign = [name for name in names if "at::" in name or "c10::" in name or name.startswith(("Py", "_Py"))]
    assert any("aoti_torch_abi_version" in name for name in names) and not foreign, foreign
