"""Builds the operator library: host code on libtorch's stable ABI, one object per instruction set without torch.

With no compiler the package installs without it and runs on the plain PyTorch references; that is said aloud.
"""

import os
import platform
import sys

from setuptools import setup

FLAGS = ["-O3", "-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
ISA_FLAGS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


def say(message):
    print(f"sparsekern build: {message}", file=sys.stderr)


def extension():
    """Keyword arguments for setup(), empty when nothing can be compiled."""
    cuda = os.environ.get("SPARSEKERN_CUDA", "auto")
    if cuda not in ("auto", "require", "off"):
        raise SystemExit(f"SPARSEKERN_CUDA: got {cuda!r}, allowed are auto, require, off")
    if cuda == "require":
        raise SystemExit("SPARSEKERN_CUDA=require: this version of sparsekern has no CUDA kernels to build")
    say("CPU kernels only; this version has no CUDA kernels to build")
    import shutil

    import torch.utils.cpp_extension as cpp

    if not shutil.which(os.environ.get("CXX", "c++")):
        say("no C++ compiler found: installing without kernels (slow references); install g++ and reinstall")
        return {}
    libraries = [
        (f"sparsekern_{isa}", {"sources": [f"csrc/cpu/simd/build_{isa}.cpp"], "cflags": FLAGS + flags})
        for isa, flags in ISA_FLAGS.items()
    ]
    library = cpp.CppExtension(
        "sparsekern._ops",
        [
            "csrc/cpu/dispatch.cpp",
            "csrc/cpu/masked_sgd.cpp",
            "csrc/cpu/sparse_conv2d.cpp",
            "csrc/cpu/sparse_gradient.cpp",
            "csrc/cpu/sparse_grid.cpp",
            "csrc/cpu/sparse_product.cpp",
            "csrc/cpu/topk_mask.cpp",
        ],
        extra_compile_args=FLAGS + ["-DTORCH_TARGET_VERSION=0x020a000000000000"],
        libraries=[name for name, _ in libraries],
    )
    return {"ext_modules": [library], "libraries": libraries, "cmdclass": {"build_ext": cpp.BuildExtension}}


setup(**extension())
