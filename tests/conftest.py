"""The `backend` fixture: every operator test runs on the reference and on each instruction set of this CPU."""

import pytest
import torch

import sparsekern as sk

BACKENDS = ("reference", "scalar", "avx2", "avx512")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Name of the backend under test; the compiled ones are selected for the whole test."""
    name = request.param
    if name == "reference":
        yield name
        return
    if sk.degradation:
        pytest.skip(f"{name}: {sk.degradation}")
    before = torch.ops.sparsekern.cpu_isa()
    torch.ops.sparsekern.set_cpu_isa(name)
    if torch.ops.sparsekern.cpu_isa() != name:
        torch.ops.sparsekern.set_cpu_isa(before)
        pytest.skip(f"{name}: this CPU does not have it")
    yield name
    torch.ops.sparsekern.set_cpu_isa(before)
