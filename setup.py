"""Builds the compiled pieces, all optional: the operators for CPU (`_ops`) and for CUDA (`_cuda`), and `_C`, direct
calls of small layers and build information for the doctor.

`_ops` is host code on libtorch's stable ABI and one object per instruction set without torch; it has no Python symbol.
`_cuda` likewise, with one object per file of kernels.
What is built and why is printed once and recorded in sparsekern/_build_info.json, which `sparsekern doctor` shows.
"""

import json
import os
import platform
import shlex
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import toolchain  # noqa: E402

FLAGS = ["-O3", "-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# -fmad=false: a fused multiply-add is written where it is meant, so that all backends round alike.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]
ISA_FLAGS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # gcc's own AVX-512 header sets it off; clang does not know that warning.
    ISA_FLAGS["avx512"] += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]


def extensions(cpp, torch_cuda, decisions):
    """What can be built here; `decisions` learns what and why."""
    command, about = toolchain.find_compiler()
    cuda, decisions["CUDA"] = toolchain.cuda_decision(torch_cuda, command)
    decisions["kernels"] = f"{', '.join(ISA_FLAGS)}; {about}" if command else f"none, slow PyTorch references: {about}"
    obstacle = toolchain.module_obstacle() if command else about
    decisions["_C"] = f"none, small layers take longer and the doctor shows less: {obstacle}" if obstacle else "built"
    if not command:
        return []
    # The scripts folder: ninja of an environment that is not activated.
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    os.environ.update(CXX=command, MAX_JOBS=str(toolchain.jobs()), PATH=path)
    if not cpp.is_ninja_available():
        raise SystemExit("sparsekern build: ninja is missing; pip install ninja")
    sources = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    flags = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    found = [cpp.CppExtension("sparsekern._ops", sources, py_limited_api=True, extra_compile_args=flags)]
    if cuda:
        found.append(cuda_extension(cpp, cuda, torch_cuda, flags))
    if not obstacle:
        import pybind11

        flags = [*FLAGS, f'-DSPARSEKERN_ISAS="{" ".join(ISA_FLAGS)}"']
        include = [pybind11.get_include(), *cpp.include_paths()]
        sources = ["csrc/direct_call.cpp", "csrc/module.cpp"]
        found.append(Extension("sparsekern._C", sources, include_dirs=include, extra_compile_args=flags))
    return found


def cuda_extension(cpp, cuda, torch_cuda, flags):
    """The host code of `_cuda`; its kernels are compiled before it is linked."""
    extension = cpp.CppExtension(
        "sparsekern._cuda",
        sorted(map(str, Path("csrc/cuda").glob("*.cpp"))),
        py_limited_api=True,
        extra_compile_args=[*flags, "-DUSE_CUDA"],
        extra_link_args=toolchain.link_arguments(cuda, torch_cuda),
    )
    extension.cuda = cuda
    return extension


def build_command(cpp, info):
    """torch's build_ext, which also compiles the instruction sets, all by ninja, and records `info`."""

    class Build(cpp.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.inplace:  # pip's temporary folder would compile everything again each time
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def run(self):
            for piece, decision in info["decisions"].items():
                print(f"sparsekern build: {piece}: {decision}", file=sys.stderr)
            for stale in Path(self.build_lib).glob("sparsekern/*.so"):  # of an earlier build, would go into the wheel
                stale.unlink()
            super().run()
            folder = Path("." if self.inplace else self.build_lib) / "sparsekern"
            (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

        def build_extension(self, ext):
            if ext.name == "sparsekern._ops":
                with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                    ext.extra_objects += sum(pool.map(self.compile_isa, ISA_FLAGS), [])
            if ext.name == "sparsekern._cuda":
                with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                    kernels = sorted(Path("csrc/cuda").glob("*.cu"))
                    ext.extra_objects += pool.map(lambda source: self.compile_kernels(source, ext.cuda), kernels)
            super().build_extension(ext)

        def compile_isa(self, isa):
            sources, folder = [f"csrc/cpu/simd/build_{isa}.cpp"], f"{self.build_temp}/{isa}"
            return self.compiler.compile(sources, folder, extra_postargs=FLAGS + ISA_FLAGS[isa])

        def compile_kernels(self, source, cuda):
            target = Path(self.build_temp, "cuda", source.with_suffix(".o").name)
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [
                cuda.nvcc,
                *NVCC_FLAGS,
                *cuda.flags,
                "-ccbin",
                shlex.split(os.environ["CXX"])[-1],
                "-c",
                str(source),
            ]
            toolchain.compile_if_changed([*command, "-o", str(target)], target)
            return str(target)

    return Build


class Platform(Distribution):
    def has_ext_modules(self):
        """True with nothing compiled too: build_ext records that, and such a wheel must not pass for a pure one."""
        return True


def build_arguments():
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        raise SystemExit(f"sparsekern build: {error}; pip install 'torch>=2.10' or drop --no-build-isolation") from None
    if torch.__version__ < (2, 10):
        raise SystemExit(f"sparsekern build: torch {torch.__version__} found, 2.10 or newer is needed")
    info = {"decisions": {}, "torch": str(torch.__version__), "torch_cuda": torch.version.cuda,
            "python": platform.python_version(), "sources": toolchain.sources_digest()}  # fmt: skip
    found = extensions(cpp, torch.version.cuda, info["decisions"])
    return {"ext_modules": found, "cmdclass": {"build_ext": build_command(cpp, info)}, "distclass": Platform}


if __name__ == "__main__":
    # The commands that only ask for metadata need neither torch nor a compiler.
    setup(**({} if {"egg_info", "dist_info", "sdist"} & set(sys.argv) else build_arguments()))
