"""What `make gpu` does, up to the point where a GPU is needed; its cases are right on the CPU, on small sizes."""

from __future__ import annotations

import csv
import itertools
import sys

import device_cuda
import emulated_cuda
import emulator
import pytest
import torch

import sparsekern as sk
from sparsekern import _library

pytest.importorskip("benchmarks", reason="needs the checkout")
from benchmarks import gpu  # noqa: E402
from benchmarks.networks import Conv  # noqa: E402

CPU = torch.device("cpu")
OPERATORS = ["masked_sgd_", "masked_adamw_", "topk_mask", "sparse_conv2d", "sparse_linear"]


def cases():
    shapes = [(8, 4, 3, 3), (12,), (16, 8)]
    yield from gpu.optimizer_cases(shapes, CPU)
    yield from gpu.selection_cases(shapes, CPU)
    yield from gpu.layer_cases([Conv("a", 8, 12, 3, 2, 9), Conv("b", 8, 8, 1, 1, 6)], 2, CPU)
    yield from gpu.product_cases(32, 5, CPU)


def test_every_case_is_checked_timed_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    rows = gpu.measure(cases(), CPU)
    assert {row["case"].split()[0] for row in rows} == set(OPERATORS)
    assert all(row["ms"] > 0 for row in rows)
    for _ in range(2):
        gpu.record(rows, "a GPU", tmp_path / "gpu.csv")
    found = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert len(found) == 2 * len(rows) and found[0]["device"] == "a GPU"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_result_stops_the_run(monkeypatch, name):
    right = getattr(sk.ops, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        for t in arguments[0] if result is None else [result] if isinstance(result, torch.Tensor) else result:
            t.data[(0,) * t.dim()] += 1
        return result

    wrong.reference = right.reference
    monkeypatch.setattr(sk.ops, name, wrong)
    with pytest.raises(gpu.Stopped) as stopped:
        list(itertools.chain(cases()))
    assert stopped.value.code == 1


def test_without_a_gpu_it_stops_where_one_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_library, "cuda_obstacle", "")
    monkeypatch.setattr(_library, "build_info", lambda: {"decisions": {"CUDA": "sm_1"}})
    with pytest.raises(gpu.Stopped) as stopped:
        gpu.main(["--quick"])
    said = capsys.readouterr()
    assert stopped.value.code == 3 and "no GPU is visible" in said.err and "kernels: sm_1" in said.out
    monkeypatch.setattr(_library, "cuda_obstacle", "nobody built them")
    with pytest.raises(gpu.Stopped) as stopped:
        gpu.main([])
    assert stopped.value.code == 1


def test_failed_tests_stop_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(gpu.Stopped) as stopped:
        gpu.run_tests(quick=True)
    assert stopped.value.code == 1


@pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())
def test_operands_are_moved_and_what_is_written_comes_back():
    """The stand-in of a GPU is a copy on the CPU."""
    with emulated_cuda.installed():
        call = device_cuda.moved(torch.ops.sparsekern.masked_sgd_.default, torch.clone)
        w, v, fresh = torch.ones(40), torch.zeros(40), torch.ones(1, dtype=torch.uint8)
        hyper = dict(lr=0.5, mu=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
        call([w], [torch.ones(40)], [v], [None], fresh, **hyper, momentum_policy="mask", inner=[])
        assert w.eq(0.5).all() and v.eq(1).all() and not fresh.any()
        choose = device_cuda.moved(torch.ops.sparsekern.topk_mask.default, torch.clone)
        masks, status = choose([torch.arange(8.0)], [2], True, "unstructured", True, [])
        assert masks[0].tolist() == [0b11000000] and status == 0
