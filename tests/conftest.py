"""The `backend` and `native` fixtures: every operator test runs on the reference, on each instruction set here and on
the CUDA kernels, emulated. What has no emulated kernel of the operators under test says so in its own fixture.

Uninitialised memory is NaN (or the largest integer) in all tests, so that an element nobody wrote shows.
"""

import zlib

import emulated_cuda
import emulator
import pytest
import torch

import sparsekern as sk

# Tiny tensors gain nothing from threads and lose much where the machine is busy; tests of threads set their own number.
torch.set_num_threads(1)


def _instruction_sets() -> list[str]:
    """The compiled backends that this CPU can run, best last."""
    if sk.degradation:
        return []
    before = torch.ops.sparsekern.cpu_isa()
    found = []
    for name in ("scalar", "avx2", "avx512"):
        torch.ops.sparsekern.set_cpu_isa(name)
        if torch.ops.sparsekern.cpu_isa() == name:
            found.append(name)
    torch.ops.sparsekern.set_cpu_isa(before)
    return found


NATIVE = _instruction_sets()
EMULATED = pytest.param(
    "emulated-cuda", marks=pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())
)


def _select(name: str, test: str):
    if name == "reference":
        yield name
        return
    if name == "emulated-cuda":
        # Every test has one of the three orders of threads, always the same.
        with emulated_cuda.installed(zlib.crc32(test.encode()) % 3):
            yield name
        return
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa(name)
    yield name
    torch.ops.sparsekern.set_cpu_isa(before)


@pytest.fixture(params=["reference", *NATIVE, EMULATED])
def backend(request):
    """Name of the backend under test; a compiled one is selected for the whole test."""
    yield from _select(request.param, request.node.name)


@pytest.fixture(params=[*NATIVE, EMULATED])
def native(request):
    """As `backend`, without the reference, for what is compared with it."""
    yield from _select(request.param, request.node.name)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode makes torch fill what torch.empty returns; the rest of that mode is only asked to warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
