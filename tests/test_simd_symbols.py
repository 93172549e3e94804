"""Code compiled for one instruction set must not be able to win the link: no weak symbols in its objects."""

import shutil
import subprocess
from pathlib import Path

import pytest

SIMD = Path(__file__).parents[1] / "csrc" / "cpu" / "simd"


@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs c++ and nm")
@pytest.mark.parametrize("optimise", ["-O0", "-O3"])
def test_scalar_object_defines_one_table_and_nothing_weak(tmp_path, optimise):
    # The sources differ only in their vector header, so the portable one stands for all and compiles everywhere.
    target = tmp_path / "scalar.o"
    source = SIMD / "build_scalar.cpp"
    subprocess.run(["c++", optimise, "-std=c++20", "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = [line.split()[-2] for line in symbols]
    assert not {"W", "V", "w", "v", "u"} & set(kinds), symbols
    exported = [line for line in symbols if line.split()[-2] in "TDRB"]
    assert len(exported) == 1 and exported[0].endswith("kernels_scalar"), exported
