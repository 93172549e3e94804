"""The roofline picture: what is drawn, and that the benchmarks draw it."""

import pytest
import torch

import sparsekern as sk
from benchmarks import (
    bench_batch_norm,
    bench_masked_adamw,
    bench_masked_sgd,
    bench_sparse_conv2d,
    bench_topk_mask,
    harness,
    optimizer_step,
    roofline,
)
from benchmarks.roofline import Roof, Work

ROWS = [
    {"pass": "step", "pattern": "4x1", "sparsity": 0.9, "median_ms": 2.0, "baseline": "torch", "baseline_ms": 4.0},
    {"pass": "step", "pattern": "4x1", "sparsity": 0.95, "median_ms": 1.0, "baseline": "torch", "baseline_ms": 4.0},
]


def work(row):
    return Work(10 * (1 - row["sparsity"]), 100.0), Work(10.0, 100.0)


def test_points():
    found = roofline.points(ROWS, work)
    assert set(found) == {"4x1", "torch"}
    (x1, y1, first), (x2, y2, second) = found["4x1"]
    assert (x1, y1, x2, y2) == pytest.approx((0.01, 500, 0.005, 500)) and (first, second) == ("90%", "95%")
    assert found["torch"] == [(0.1, 2500.0, "")]  # once for both rows


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_shows_roof_and_labels(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roof.{suffix}"
    roofline.draw(path, ROWS, work, "one step", Roof(reads=2e10, moves=1e10, operations=1e11))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        text = content.decode()  # matplotlib keeps the words beside their outlines
        assert all(
            f"<!-- {word} -->" in text for word in ("90%", "95%", "torch", "one step", "20 GB/s read", "100 GFLOP/s")
        )


def test_roof_is_measured():
    roof = roofline.measure_roof(elements=1000, size=64)
    assert 0 < roof.moves < 1e13 and 0 < roof.reads < 1e13 and 0 < roof.operations < 1e14


@pytest.mark.parametrize(
    "bench", [bench_masked_sgd, bench_masked_adamw, bench_topk_mask, bench_sparse_conv2d, bench_batch_norm]
)
def test_benchmarks_draw(bench, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "SAMPLE_MS", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", 2)
    monkeypatch.setattr(roofline, "measure_roof", lambda *_: Roof(1e10, 1e10, 1e11))
    path = tmp_path / "roof.png"
    bench.main(["--smoke", "--threads", "1", "--plot", str(path)])
    assert path.stat().st_size > 10_000 and f"drawn in {path}" in capsys.readouterr().out


def test_work_counts_lines_with_live_weights():
    p, dense = torch.zeros(4, 40).requires_grad_(), torch.zeros(17).requires_grad_()
    mask = torch.zeros(4, 40, dtype=torch.bool)
    mask[0, :3] = mask[1, 7] = mask[3, 39] = True  # elements 0 to 2, 47 and 159: lines 0, 2 and 9 of 16
    optimizer = sk.MaskedSGD([p, dense], masks={p: mask})
    found = optimizer_step.work(bench_masked_sgd.SGD, optimizer, {p: mask})
    assert found == Work(7 * (5 + 17), 20 * 16 * (3 + 2) + 20)


def test_work_of_a_convolution():
    # 8 to 16 channels, 3 x 3, stride 2, 9 x 9 to 5 x 5 pixels; a tenth of 1152 weights.
    row = {"case": "resnet50/layer0.conv", "batch": 2, "sparsity": 0.9}
    kept, dense = bench_sparse_conv2d.work(row)
    assert (kept.operations, dense.operations) == pytest.approx((2 * 115.2 * 50, 2 * 1152 * 50))
    moved = 2 * 8 * 81 + 16 * 50
    assert (kept.bytes, dense.bytes) == pytest.approx((4 * (moved + 115.2), 4 * (moved + 1152)))
