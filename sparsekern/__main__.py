"""python -m sparsekern doctor: what runs here, on what, and what to do about each degradation."""

import argparse
import os
import platform
import sys

import torch

import sparsekern as sk
from sparsekern._library import OPS


def doctor() -> str:
    """The report that a user pastes into an issue."""
    cuda = torch.version.cuda or "none"
    lines = [
        f"sparsekern {sk.__version__}, torch {torch.__version__} (CUDA {cuda}), Python {platform.python_version()}",
        f"machine        {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        f"instructions   {'not used' if sk.degradation else torch.ops.sparsekern.cpu_isa()}"
        f" (SPARSEKERN_CPU_ISA={os.environ.get('SPARSEKERN_CPU_ISA', 'unset')})",
        f"GPU            {'visible' if torch.cuda.is_available() else 'none visible'}; no CUDA kernels in this version",
    ]
    for name in sorted(OPS):
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{name}", "CPU")
        lines.append(f"{name:14} CPU: {'compiled kernel' if native else 'PyTorch reference (slow)'}, GPU: reference")
    if sk.degradation:
        lines.append(f"degraded: {sk.degradation}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="sparsekern", description="Sparse training kernels for PyTorch.")
    parser.add_argument("command", choices=["doctor"], help="doctor: versions, backends, degradations")
    parser.parse_args()
    sys.stdout.write(doctor() + "\n")


if __name__ == "__main__":
    main()
