"""bench_sparse_linear: rows of all passes, baselines that compute what they claim, no time of a wrong result."""

import pytest
import torch

import sparsekern as sk
from benchmarks import bench_sparse_linear, harness
from benchmarks.bench_sparse_conv2d import PASSES, contender


def test_rows_and_their_sums(monkeypatch):
    monkeypatch.setattr(harness, "SAMPLE_MS", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", 2)
    rows = bench_sparse_linear.main(["--smoke", "--threads", "1"])
    assert {(row["pass"], row["layout"]) for row in rows} == {
        *((p, "contiguous") for p in (*PASSES, "both")), ("forward", "packed")
    }  # fmt: skip
    assert all(row["bench"] == "sparse_linear" and row["floor_ms"] > 0 and row["speedup"] > 0 for row in rows)
    whole = [row for row in rows if row["case"] == "bert-base/all" and row["pass"] == "both"]
    one = [r for r in rows if r["case"] == "bert-base/smoke" and r["layout"] == "contiguous"]
    assert len(whole) == 9 and sum(r["median_ms"] for r in whole) == pytest.approx(2 * sum(r["median_ms"] for r in one))
    monkeypatch.setattr(harness, "_sample", lambda run, calls: pytest.fail("timed a wrong result"))
    right = sk.ops.sparse_linear
    monkeypatch.setattr(sk.ops, "sparse_linear", lambda *operands: right(*operands) * 1.001)
    with pytest.raises(harness.WrongResult, match="bert-base/smoke forward"):
        bench_sparse_linear.main(["--smoke", "--threads", "1"])


@pytest.mark.parametrize("pass_", PASSES)
def test_compressed_baselines_compute_the_pass(pass_):
    layer = bench_sparse_linear.Layer.make("bert-base/smoke", (16, 24), 2)
    found = bench_sparse_linear.compressed(layer, pass_, 0.0)()
    want = contender(torch.nn.functional.linear, layer, pass_)()
    torch.testing.assert_close(found.to_dense() if pass_ == "weight_grad" else found, want, rtol=1e-4, atol=1e-4)
