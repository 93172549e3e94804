"""bench_methods: rows, how the cost of steps of several kinds is put together, and masks that are not as promised."""

import itertools
import math

import pytest

import sparsekern as sk
from benchmarks import bench_methods, harness


def test_method_rows_are_the_training_step_plus_what_the_method_adds(monkeypatch, capsys):
    rows = bench_methods.main(["--smoke", "--threads", "1"])
    assert [row["case"] for row in rows] == [f"resnet50/{name}" for name in sk.METHODS]
    shown = capsys.readouterr().out
    for row in rows:
        assert row["batch"] == 16 and row["median_ms"] >= row["baseline_ms"] and row["speedup"] <= 1
        share = f", {row['median_ms'] / row['baseline_ms'] - 1:.2%} of the training step"
        assert share in next(x for x in shown.splitlines() if x.startswith(row["case"].removeprefix("resnet50/") + ":"))
    # What costs time once per interval is divided by it: 100 steps for RigL; AC/DC has 14 phases in 90 epochs.
    total = 90 * bench_methods.STEPS_PER_EPOCH
    assert bench_methods.interval("rigl") == (100, 0) and bench_methods.interval("topkast") == (1, 0)
    assert bench_methods.interval("acdc") == (pytest.approx(total / 13), 0)
    assert bench_methods.interval("dense") == bench_methods.interval("lottery-ticket") == (math.inf, 0)
    assert bench_methods.interval("obert") == (pytest.approx(total * 4 / 30, abs=1), 1024)


LAYERS = [bench_methods.Conv("stem", 3, 8, 3, 1, 8), bench_methods.Conv("conv", 8, 16, 3, 1, 8)]


def test_overhead_counts_each_kind_of_step_by_its_share(monkeypatch):
    # Held and own steps in turn: 2 more where nothing happens, 3 more than that where gradients are gathered, then 10.
    own = [(3.0, "plain"), (6.0, "gather"), (13.0, "update")]
    times = itertools.cycle([x for step in own for x in ((1.0, "plain"), step)])
    monkeypatch.setattr(bench_methods.Trained, "step", lambda self: next(times))
    monkeypatch.setattr(bench_methods, "check", lambda *_: None)
    monkeypatch.setattr(bench_methods, "interval", lambda name: (100, 20))
    found = bench_methods.overhead("rigl", 12, LAYERS)
    assert found.per_step == pytest.approx(2 + 3 * 20 / 100 + 10 / 100)
    assert bench_methods.scaled(found, 2.0).per_step == pytest.approx(2 * found.per_step)


@pytest.mark.parametrize("name", ["gmp", "sr-ste", "extended-gmp", "dense", "fixed-mask", "topkast"])
def test_methods_with_other_masks_than_promised_are_not_timed(name):
    trained = bench_methods.Trained(name, 4, LAYERS)
    for _ in range(4):
        trained.step()
    bench_methods.check(name, trained.sparsifier)
    masks = trained.sparsifier.masks
    kept = masks.bool("fc.weight")
    kept.view(-1)[kept.view(-1).nonzero()[:4]] = False  # one more than rounding may move
    masks.set("fc.weight", kept)
    trained.sparsifier._sync_masks = lambda: None
    with pytest.raises(harness.WrongResult, match=f"{name}: fc.weight has weights that are pruned and not zero"):
        bench_methods.check(name, trained.sparsifier)
    trained.sparsifier.forward_weights = dict
    with pytest.raises(harness.WrongResult, match=f"{name}: .* weights are live at the end, promised"):
        bench_methods.check(name, trained.sparsifier)
