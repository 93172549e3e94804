"""The `backend` and `native` fixtures: every operator test runs on the reference, on each instruction set here and on
the CUDA kernels, emulated, where they have one.

SPARSEKERN_BACKEND=triton TRITON_INTERPRET=1 runs a part of the same tests on the Triton kernels, interpreted, and on
nothing else: the interpreter takes the place of the compiler in the whole process. test_triton.py starts that.

Uninitialised memory is NaN (or the largest integer) in all tests, so that an element nobody wrote shows.
"""

import zlib

import device_cuda
import emulated_cuda
import emulator
import pytest
import torch

import sparsekern as sk
from sparsekern import _library

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


INTERPRETED = _library.interpreted()
NATIVE = _instruction_sets()
EMULATED = pytest.param(
    "emulated-cuda", marks=pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())
)

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]
)

CASES_INTERPRETED = 2
NOT_INTERPRETED = {
    "test_brute_force", "test_conv2d_gradients_agree_with_float64_on_any_number_of_threads",
    "test_instruction_sets_agree_in_float64", "test_opcheck", "test_opcheck_every_sample",
    "test_thread_count_does_not_matter", "test_ties_ignore_the_memory_format",
}  # fmt: skip
"""Tests that take too long interpreted, with a shorter twin in test_triton_kernels.py, or are about CPUs."""
collect_ignore = [] if INTERPRETED else ["test_triton_kernels.py"]
if INTERPRETED or _library.backend_setting() != "triton":
    collect_ignore.append("test_triton_compile.py")
ALL = ["triton"] if INTERPRETED else ["reference", *NATIVE, EMULATED, CUDA]


def _select(request):
    name = request.param
    if name in ("reference", "triton"):
        yield name
        return
    if name == "cuda":
        with device_cuda.installed():
            yield name
        return
    if name == "emulated-cuda":
        # Every test has one of the three orders of threads, always the same.
        with emulated_cuda.installed(zlib.crc32(request.node.name.encode()) % 3):
            yield name
        return
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa(name)
    yield name
    torch.ops.sparsekern.set_cpu_isa(before)


@pytest.fixture(params=ALL)
def backend(request):
    """Name of the backend under test; a compiled one is selected for the whole test."""
    yield from _select(request)


@pytest.fixture(params=[name for name in ALL if name != "reference"])
def native(request):
    """As `backend`, without the reference, for what is compared with it."""
    yield from _select(request)


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    """Interpreted, a test takes a hundred times as long: of the cases of a test that other backends share a few run."""
    if not INTERPRETED:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for found in cases.values():
        if found[0].path.stem == "test_triton_kernels":
            kept.update(found)
        elif found[0].originalname not in NOT_INTERPRETED:
            kept.update(found[:: -(-len(found) // CASES_INTERPRETED)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode makes torch fill what torch.empty returns; the rest of that mode is only asked to warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
