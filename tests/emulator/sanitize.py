"""Runs every kernel under a sanitizer of g++: `python -m emulator.sanitize address` or, for races, `thread`.

A further word names what to run: `python -m emulator.sanitize thread topk`.
"""

from __future__ import annotations

import sys

import emulator


def main(sanitizer: str, *words: str) -> int:
    """Print what the kernels and the sanitizer say; 0 if neither has found anything."""
    if reason := emulator.obstacle():
        print(f"skipped: {reason}")
        return 0
    kinds = {"address": "address,undefined", "thread": "thread"}
    flags = ["-O1", "-g", "-fno-sanitize-recover=undefined"] if sanitizer == "address" else ["-O1", "-g"]
    flags += [f"-fsanitize={kinds[sanitizer]}"]
    sources = [*sorted(emulator.HERE.glob("driver*.cpp")), *sorted(emulator.KERNELS.glob("*.cu"))]
    program = emulator.build(f"driver_{sanitizer}", sources, flags, [emulator.ROOT / "csrc/cpu/simd/kernels.h"])
    done = emulator.sanitized([str(program), *words])
    print(done.stdout + done.stderr[-8000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
