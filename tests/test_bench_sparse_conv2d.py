"""Floors and sums of the convolution benchmark; what all benchmarks owe is in test_benchmarks.py."""

import pytest
import torch

from benchmarks import bench_sparse_conv2d, harness, networks
from benchmarks.roofline import Roof


def test_totals_count_each_layer_as_often_as_it_occurs():
    rows = [
        harness.make_row(
            harness.Timing(ms, 0), "torch", harness.Timing(10 * ms, 0), bench="sparse_conv2d", case=case, role="goal",
            backend="native", pass_="forward", pattern=pattern, sparsity=sparsity, dtype="float32", floor_ms=ms / 2,
        )
        for case, ms in (("a", 1.0), ("b", 2.0))
        for pattern in bench_sparse_conv2d.PATTERNS
        for sparsity in (0.8, 0.9, 0.99)
    ]  # fmt: skip
    for row in rows:
        row |= {"layout": "contiguous", "batch": 1}
    found = list(bench_sparse_conv2d.totals(rows, {"a": 3, "b": 1}, ["forward"]))
    assert len(found) == 9 and all(row["case"] == "resnet50/all" for row in found)
    assert {(row["median_ms"], row["baseline_ms"], row["floor_ms"]) for row in found} == {(5.0, 50.0, 2.5)}
    assert [row["efficiency"] for row in found[:3]] == pytest.approx([2.0, 1.0, 0.1])


def test_floor_of_a_convolution_is_arithmetic_or_memory():
    conv, roof = networks.Conv("resnet50/any", 64, 32, 1, 1, 100), Roof(reads=1e10, moves=1e9, operations=1e11)
    floor = bench_sparse_conv2d.floor_ms
    cached, large = (bench_sparse_conv2d.layer_work(conv, images, 0.9) for images in (1, 64))
    assert floor(cached, roof) == pytest.approx(1e3 * 2 * 204.8 * 1e4 / 1e11)
    assert floor(large, roof) == pytest.approx(1e3 * 4 * (96 * 64e4 + 204.8) / 1e10)
    mask = torch.zeros(4, 4, 3, 3, dtype=torch.bool)
    mask[2, 1, 0, 1] = mask[0, 1, 2, 2] = mask[1, 3, 0, 0] = True
    assert [bench_sparse_conv2d.inputs_moved(mask, p) for p in bench_sparse_conv2d.PASSES] == [0.5, 1.0, 0.5]
    none = bench_sparse_conv2d.layer_work(conv, 64, 0.9, inputs=0.5)
    assert large.bytes - none.bytes == pytest.approx(4 * 32 * 64e4)
