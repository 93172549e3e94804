"""The `backend` and `native` fixtures: every operator test runs on the reference and on each instruction set here.

Uninitialised memory is NaN (or the largest integer) in all tests, so that an element nobody wrote shows.
"""

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


def _select(name: str):
    if name == "reference":
        yield name
        return
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa(name)
    yield name
    torch.ops.sparsekern.set_cpu_isa(before)


@pytest.fixture(params=["reference", *NATIVE])
def backend(request):
    """Name of the backend under test; a compiled one is selected for the whole test."""
    yield from _select(request.param)


@pytest.fixture(params=NATIVE)
def native(request):
    """As `backend`, without the reference, for what is compared with it."""
    yield from _select(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode makes torch fill what torch.empty returns; the rest of that mode is only asked to warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
