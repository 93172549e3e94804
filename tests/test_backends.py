"""One function chooses what runs an operator, and SPARSEKERN_BACKEND is met or refused."""

import pytest

from sparsekern import _library, backends


@pytest.fixture
def machine(monkeypatch):
    """Sets what is there: the setting, a CUDA library, Triton, compiled CPU kernels."""

    def build(setting, cuda, triton, compiled=True):
        monkeypatch.setenv("SPARSEKERN_BACKEND", setting)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(_library, "cuda_operators", frozenset({"masked_sgd_", "topk_mask"} if cuda else ()))
        monkeypatch.setattr(_library, "cuda_obstacle", "" if cuda else "nobody built it")
        monkeypatch.setattr(_library, "has_kernel", lambda name, key: key == "CPU" and compiled)
        monkeypatch.setattr(backends, "why_no_triton", lambda: "" if triton else "Triton is not installed")

    return build


@pytest.mark.parametrize(
    ("setting", "cuda", "triton", "in_library", "not_in_library"),
    [
        ("auto", True, True, "cuda", "triton"),
        ("auto", False, True, "triton", "triton"),
        ("auto", True, False, "cuda", "reference"),
        ("auto", False, False, "reference", "reference"),
        ("cuda", True, True, "cuda", "reference"),
        ("triton", True, True, "triton", "triton"),
        ("reference", True, True, "reference", "reference"),
    ],
)
def test_choice(machine, setting, cuda, triton, in_library, not_in_library):
    machine(setting, cuda, triton)
    assert backends.chosen("topk_mask", "CUDA") == in_library
    assert backends.chosen("sparse_conv2d", "CUDA") == not_in_library
    assert backends.chosen("topk_mask", "CPU") == ("reference" if setting == "reference" else "compiled")
    machine(setting, cuda, triton, compiled=False)
    assert backends.chosen("topk_mask", "CPU") == "reference"


def test_what_has_no_kernel_runs_on_the_reference(machine):
    machine("triton", False, True)
    assert backends.chosen("an operator of tomorrow", "CUDA") == "reference"


@pytest.mark.parametrize(
    ("setting", "said"),
    [("cuda", "SPARSEKERN_BACKEND=cuda: nobody built it"), ("triton", "SPARSEKERN_BACKEND=triton: Triton is not inst")],
)
def test_a_setting_that_cannot_be_met_is_refused(machine, monkeypatch, setting, said):
    machine(setting, False, False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=said):
        backends.install()


def test_interpreted_triton_serves_cpu_tensors_on_request_only(machine, monkeypatch):
    machine("auto", False, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.chosen("topk_mask", "CPU") == "compiled"
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    assert backends.chosen("topk_mask", "CPU") == "triton"
    assert backends.chosen("unknown", "CPU") == "reference"
