"""Tables that quote recorded runs: what they show, and that README and results agree with the records."""

import torch
from test_benchmarks import COMPLETE

from benchmarks import harness, table

COMPLETE_THREADS = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"


def test_readme_and_details_quote_what_is_recorded():
    text = table.README.read_text()
    assert text.split(table.BEGIN)[1].split(table.END)[0] == f"\n{table.overview()}\n", "run python -m benchmarks.table"
    assert table.DETAILS.read_text() == table.render() + "\n", "run python -m benchmarks.table"


def test_table_shows_the_last_runs_and_their_losing_rows(tmp_path):
    assert table.render(tmp_path) == table.overview(tmp_path) == table.NOTHING
    where = {**dict.fromkeys(harness.MACHINE_KEYS, "m"), "commit": "old"}
    for commit, cpu, batch, case_ms in (
        ("old", "other", 16, {"a": 1}), ("old", "m", 1, {"a": 1}), ("more", "m", 16, {"a": 2.5}),
        ("new", "m", 1, {"a": 5.0, "b": 40.0, "resnet50/all": 20.0}),
    ):  # fmt: skip
        rows = [
            harness.make_row(
                harness.Timing(ms, ms), "torch", harness.Timing(10, 0),
                **{**COMPLETE, "case": case, "pass_": "forward", "backend": "reference"}, pattern="4x1", sparsity=0.9,
                batch=batch,
            )
            for case, ms in case_ms.items()
        ]  # fmt: skip
        harness.record("sparse_conv2d", rows, {**where, "commit": commit, "cpu": cpu}, tmp_path)
    text = table.render(tmp_path)
    assert "| forward | dense | 4x1 | 1.12x (0.25 to 2.00; 1 of 2 slower); whole network 0.50x |" in text
    assert "| forward | dense | 4x1 | 4.00x (4.00 to 4.00; 0 of 1 slower) |" in text
    assert "commit new" in text and "commit more" in text and "old" not in text
    assert "3 of 3 rows noisy" in text and "3 of 3 rows run the plain PyTorch reference" in text
    short = table.overview(tmp_path)
    assert "| 52 convolutions of ResNet-50, forward" not in short, "of packed weights only"


def test_overview_is_against_the_fastest_baseline_and_counts_who_loses(tmp_path):
    rows = [
        harness.make_row(
            harness.Timing(ms, 0), name, harness.Timing(10, 0), **{**COMPLETE, "case": case, "pass_": "forward"},
            pattern="4x1", sparsity=sparsity, layout="packed", batch=1,
        )
        for case, ms, name, sparsity in [
            ("resnet50/all", 2.0, "a", 0.9), ("resnet50/all", 4.0, "b", 0.9), ("resnet50/all", 1.0, "a", 0.98),
            ("resnet50/all", 20.0, "a", 0.8), ("layer1", 12.5, "a", 0.95), ("layer2", 8.0, "a", 0.95),
        ]
    ]  # fmt: skip
    harness.record("sparse_conv2d", rows, dict.fromkeys(harness.MACHINE_KEYS, "m"), tmp_path)
    text = table.overview(tmp_path)
    assert f"forward | {COMPLETE_THREADS}, batch 1 | 4x1, packed | 2.50x |  | 10.00x |" in text
    assert "Of all 4 cases, single layers and passes too, 1 are slower (layer1 forward, 4x1 0.95" in text
    assert "0.80x" in text
