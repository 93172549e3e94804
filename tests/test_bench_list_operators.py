"""bench_list_operators: a row for every operator, and none for a wrong result."""

import dataclasses

import pytest
import torch

from benchmarks import bench_list_operators, harness


def test_every_list_operator_has_rows_and_a_wrong_one_is_not_timed(monkeypatch):
    rows = bench_list_operators.main(["--smoke", "--threads", "1"])
    found = {row["case"].split("/")[1] for row in rows}
    assert found == {"masked_combine_", "soft_threshold_", "movement_step_", "topk_bounds", "topk_nested",
                     "threshold_mask", "signed_sums", "pack_mask", "unpack_mask"}  # fmt: skip
    assert all(row["bench"] == "list_operators" and row["floor_ms"] > 0 and row["speedup"] > 0 for row in rows)
    monkeypatch.setattr(harness, "_sample", lambda run, calls: pytest.fail("timed a wrong result"))
    model = bench_list_operators.Model.make([(16, 8, 3, 3), (10, 16)])
    for name, case in bench_list_operators.cases(model).items():

        def wrong(m, result, right=case.result):
            found = right(m, result)
            first = found
            while isinstance(first, list):
                first = first[0]
            first.view(-1)[0] = ~first.view(-1)[0] if first.dtype == torch.bool else first.view(-1)[0] + 1
            return found

        with pytest.raises(AssertionError):
            bench_list_operators.check(dataclasses.replace(case, result=wrong), model)
            pytest.fail(f"{name}: a wrong result passed")
