"""bench_sparse_structure: rows of structures and plans, and none for a wrong one."""

import pytest

import sparsekern as sk
from benchmarks import bench_sparse_structure, harness


def test_rows_and_a_wrong_structure_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "SAMPLE_MS", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", 2)
    rows = bench_sparse_structure.main(["--smoke", "--threads", "1"])
    assert len(rows) == 27 and all(row["bench"] == "sparse_structure" and row["median_ms"] > 0 for row in rows)
    for row in rows:
        assert (row["case"] == "resnet50/structures") == ("baseline" in row) == ("floor_ms" in row)
    assert {row["baseline"] for row in rows if "baseline" in row} == {
        "np.flatnonzero", "torch to_sparse_csr", "torch to_sparse_bsr"
    }  # fmt: skip
    monkeypatch.setattr(harness, "_sample", lambda run, calls: pytest.fail("timed a wrong structure"))
    right = sk.ops.sparse_structure

    def wrong(mask, pattern):
        mask = mask.clone()
        mask[:4, :4] = ~mask[:4, :4]
        return right(mask, pattern)

    monkeypatch.setattr(sk.ops, "sparse_structure", wrong)
    with pytest.raises(harness.WrongResult, match="the structure of resnet50/layer3.1.conv2 is not that of its mask"):
        bench_sparse_structure.main(["--smoke", "--threads", "1"])
