"""The benchmarks run at tiny sizes, give the rows they promise, and refuse to time a wrong result."""

import argparse
import csv
import functools
import json
import math

import pytest
import torch

import sparsekern as sk
from benchmarks import (
    bench_batch_norm,
    bench_masked_adamw,
    bench_masked_sgd,
    bench_sparse_conv2d,
    bench_topk_mask,
    bench_training,
    harness,
    networks,
    optimizer_step,
)

BENCHES = {"masked_sgd": bench_masked_sgd, "masked_adamw": bench_masked_adamw, "topk_mask": bench_topk_mask}
BENCHES["sparse_conv2d"] = bench_sparse_conv2d
NUMBERS = ("sparsity", "median_ms", "iqr_ms", "baseline_ms", "speedup", "floor_ms", "efficiency")
COMPLETE = {
    "bench": "b", "case": "net/layer", "role": "goal", "backend": "native", "pass_": "step", "dtype": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """What is tested here is not the numbers."""
    monkeypatch.setattr(harness, "SAMPLE_MS", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", 2)
    monkeypatch.setattr(harness.machine, "load", lambda: 0.5)


@pytest.mark.parametrize("bench", BENCHES)
def test_smoke_rows_have_the_schema(bench, tmp_path, capsys):
    BENCHES[bench].main(["--smoke", "--threads", "1", "--json", str(tmp_path / "out.json")])
    stored = json.loads((tmp_path / "out.json").read_text())
    assert set(stored) == {"machine", "rows"} and set(stored["machine"]) == set(harness.MACHINE_KEYS)
    assert len(stored["rows"]) >= 9
    for row in stored["rows"]:
        assert set(row) <= set(harness.ROW_KEYS)
        assert set(harness.ROW_KEYS) - set(row) <= set(harness.OPTIONAL)
        assert row["bench"] == bench and row["threads"] == 1 and row["case"].startswith("resnet50/")
        assert all(math.isfinite(row[key]) and row[key] >= 0 for key in NUMBERS if key in row)
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["median_ms"])
        if bench == "sparse_conv2d":
            assert row["efficiency"] == pytest.approx(row["speedup"] * (1 - row["sparsity"]), rel=0.2)
        else:
            assert row["floor_ms"] > 0
    assert {0.9, 0.95, 0.98} <= {row["sparsity"] for row in stored["rows"]}
    assert {"unstructured", "4x1", "1x4"} <= {row["pattern"] for row in stored["rows"]}
    assert len(capsys.readouterr().out.splitlines()) == len(stored["rows"]) + 3


def test_batch_norm_rows_and_their_sums(monkeypatch):
    rows = bench_batch_norm.main(["--smoke", "--threads", "1", "--batch", "2"])
    assert [(row["case"], row["pass"]) for row in rows] == [
        *((norm.name, pass_) for norm in bench_batch_norm.SMOKE for pass_ in bench_batch_norm.PASSES),
        ("resnet50/all", "forward"), ("resnet50/all", "both"),
    ]  # fmt: skip
    assert all(row["bench"] == "batch_norm" and row["floor_ms"] > 0 and row["speedup"] > 0 for row in rows)
    for key in ("median_ms", "baseline_ms", "floor_ms"):
        assert rows[-1][key] == pytest.approx(sum(row[key] for row in rows[1:-2:2]))
    monkeypatch.setattr(sk.ops, "batch_norm", lambda *args, **kwargs: (right_norm(*args, **kwargs)[0] * 1.01,))
    with pytest.raises(harness.WrongResult, match="resnet50/layer0.bn forward"):
        bench_batch_norm.main(["--smoke", "--threads", "1"])


def test_batch_norms_of_the_network():
    norms = [bench_batch_norm.norm_of(conv) for conv in networks.resnet50_convs()]
    assert (len(norms), len({norm.key for norm in norms})) == (53, 16)
    assert sum(16 * norm.channels * norm.size**2 for norm in norms) == 16 * 11_113_984
    assert {norm.name for norm in norms} >= {"resnet50/bn1+relu", "resnet50/layer4.0.downsample.1",
                                             "resnet50/layer3.5.bn3+add+relu"}  # fmt: skip
    assert norms[3].name == "resnet50/layer1.0.bn3+add+relu" and norms[3].tensors("both") == 8


def test_training_rows_say_where_a_step_spends_its_time(tmp_path):
    rows = bench_training.main(["--smoke", "--threads", "1"])
    assert all(row["bench"] == "training" and row["batch"] == 2 for row in rows)
    for pattern in bench_training.PATTERNS:
        for sparsity in bench_training.SPARSITIES:
            chosen = [r for r in rows if (r.get("pattern"), r.get("sparsity")) == (pattern, sparsity)]
            assert [r["case"].removeprefix("resnet50/") for r in chosen] == [
                "step", "mask update", "step/convolution", "step/batch-norm", "step/optimizer", "step/rest"
            ]  # fmt: skip
            assert all(r["speedup"] > 0 for r in chosen[:2]) and all(r["median_ms"] > 0 for r in chosen)
    others = [r["case"].removeprefix("resnet50/dense step") for r in rows if "pattern" not in r]
    assert others == [", our norms", "/convolution", "/batch-norm", "/optimizer", "/rest"] * 3


def test_training_refuses_wrong_gradients(monkeypatch):
    layers = bench_training.sk.nn.acceleration
    right = layers.run_sparse
    monkeypatch.setattr(layers, "measured_speeds", lambda *_: True)
    monkeypatch.setattr(layers, "run_sparse", lambda module, s, x, w, b: right(module, s, x, w * 1.5, b))
    with pytest.raises(harness.WrongResult, match="resnet50/step"):
        bench_training.main(["--smoke", "--threads", "1", "--patterns", "4x1"])


# Taken before a test replaces them.
right_step, right_topk, right_conv = sk.MaskedSGD.step, sk.ops.topk_mask, sk.ops.sparse_conv2d
right_norm = sk.ops.batch_norm


def wrong_step(optimizer):
    right_step(optimizer)  # of the base class, hence of both optimizers
    optimizer.param_groups[0]["params"][0].data.view(-1)[0] += 1e-3


def wrong_mask(*args, **kwargs):
    masks = right_topk(*args, **kwargs)
    masks[0][0] ^= 1
    return masks


def wrong_conv(*args):
    return right_conv(*args) * 1.001


wrong_mask.reference = right_topk.reference


@pytest.mark.parametrize("bench", BENCHES)
def test_a_wrong_result_is_never_timed(bench, monkeypatch):
    monkeypatch.setattr(sk.MaskedSGD, "step", wrong_step)
    monkeypatch.setattr(sk.MaskedAdamW, "step", wrong_step)
    monkeypatch.setattr(sk.ops, "topk_mask", wrong_mask)
    monkeypatch.setattr(sk.ops, "sparse_conv2d", wrong_conv)
    monkeypatch.setattr(harness, "_sample", lambda run, calls: pytest.fail("timed a wrong result"))
    with pytest.raises(harness.WrongResult, match="resnet50/.*nothing was timed"):
        BENCHES[bench].main(["--smoke", "--threads", "1"])


def test_weight_gradient_off_the_mask_is_refused():
    layer = bench_sparse_conv2d.Layer.make(bench_sparse_conv2d.SMOKE[0], 1)
    mask = torch.rand(layer.conv.weight_shape) < 0.1
    dense = bench_sparse_conv2d.dense(layer)
    grad = bench_sparse_conv2d.contender(dense, layer, "weight_grad")()
    bench_sparse_conv2d.check(dense, layer, "weight_grad", mask, torch.where(mask, grad, 0))
    with pytest.raises(AssertionError, match="off the mask"):
        bench_sparse_conv2d.check(dense, layer, "weight_grad", mask, grad)


def test_contenders_run_once_a_round_in_changing_order(monkeypatch):
    monkeypatch.setattr(harness, "ROUNDS", 6)
    runs = []
    for _ in range(2):
        calls = []
        contenders = {name: functools.partial(calls.append, name) for name in "ABC"}
        timings = harness.measure("x", functools.partial(calls.append, "check"), contenders)
        assert set(timings) == set("ABC") and calls[0] == "check" and "".join(calls[1:10]) == "AAABBBCCC"
        rounds = ["".join(calls[i : i + 3]) for i in range(10, 28, 3)]
        assert all(sorted(one) == list("ABC") for one in rounds) and len(calls) == 28
        assert len(set(rounds)) > 2, "an order that never changes favours who follows whom"
        runs.append(rounds)
    assert runs[0] == runs[1]


def test_noise_is_said():
    row = harness.make_row(harness.Timing(1.0, 0.21), **COMPLETE)
    assert harness.is_noisy(row) and "noisy" in harness.format_row(row)
    row = harness.make_row(harness.Timing(1.0, 0.19), **COMPLETE)
    assert not harness.is_noisy(row) and "noisy" not in harness.format_row(row)


def test_rows_refuse_what_the_schema_does_not_know():
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        harness.make_row(harness.Timing(1, 0), **COMPLETE, colour="red")
    with pytest.raises(ValueError, match=r"missing keys \['role'\]"):
        harness.make_row(harness.Timing(1, 0), **{**COMPLETE, "role": None})
    with pytest.raises(ValueError, match="pass='sideways'"):
        harness.make_row(harness.Timing(1, 0), **{**COMPLETE, "pass_": "sideways"})


def test_backend_is_seen_from_what_runs():
    scores = [torch.randn(8, 4)]
    assert harness.backend_of(lambda: sk.ops.topk_mask.reference(scores, [3], True, "4x1", True, [])) == "reference"
    assert harness.backend_of(lambda: None) == "native"
    if not sk.degradation:
        assert harness.backend_of(lambda: sk.ops.topk_mask(scores, 3)) == "native"


def test_record_appends_rows_with_their_machine(tmp_path):
    rows = [harness.make_row(harness.Timing(1 / 3, 0), "torch", harness.Timing(1, 0), **COMPLETE)]
    where = dict.fromkeys(harness.MACHINE_KEYS, "x, y")
    for _ in range(2):
        path = harness.record("b", rows, where, tmp_path)
    with path.open() as file:
        stored = list(csv.DictReader(file))
    assert [(r["commit"], r["median_ms"], r["speedup"], r["layout"]) for r in stored] == [
        ("x, y", "0.333333", "3", "")
    ] * 2


def test_record_refuses_smoke_and_uncommitted_sources(monkeypatch):
    with pytest.raises(SystemExit, match="--record needs committed sources"):
        bench_topk_mask.main(["--smoke", "--record"])
    monkeypatch.setattr(harness.machine, "commit", lambda: "0123456789ab-dirty")
    with pytest.raises(SystemExit, match="the commit is 0123456789ab-dirty"):
        bench_topk_mask.main(["--record"])


def test_a_busy_machine_is_said_and_not_recorded(monkeypatch, capsys):
    monkeypatch.setattr(harness.machine, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(harness.machine, "load", lambda: 1000.0)
    with pytest.raises(SystemExit, match="--record refused: load 1000.0"):
        bench_topk_mask.main(["--record"])
    harness.run("topk_mask", lambda _: iter(()), harness.parser("").parse_args(["--smoke"]))
    assert "warning: load 1000.0" in capsys.readouterr().out


def test_command_is_what_to_type_again():
    options = harness.parser("").parse_args(["--quick", "--threads", "1", "--record", "--json", "x"])
    assert harness.command("topk_mask", options) == "python -m benchmarks.bench_topk_mask --quick --threads 1"


def test_a_stopped_run_goes_on_from_its_file(tmp_path, monkeypatch, capsys):
    smoke = ["--smoke", "--threads", "1", "--resume", str(tmp_path / "rows.json")]
    assert (
        bench_sparse_conv2d.main([*smoke, "--minutes", "0"]) == [] and "left out after 0 s" in capsys.readouterr().out
    )
    first = bench_sparse_conv2d.main(smoke)
    monkeypatch.setattr(bench_sparse_conv2d, "layer_rows", None)  # nothing is measured again
    assert bench_sparse_conv2d.main(smoke) == first and {r["pass"] for r in first} == set(bench_sparse_conv2d.PASSES)
    with pytest.raises(SystemExit, match="--resume .*rows.json: it is of"):
        bench_sparse_conv2d.main([*smoke, "--batch", "2"])


def test_quick_stops_when_its_time_is_up(capsys):
    options = argparse.Namespace(quick=True, started=-1e9)
    assert harness.left_out(options, "the rest") and "the rest" in capsys.readouterr().out
    options.quick = False
    assert not harness.left_out(options, "the rest")


def test_network_shapes():
    convs, shapes = networks.resnet50_convs(), networks.resnet50_parameters()
    assert (len(convs), len({c.shape_key for c in convs}), len(shapes)) == (53, 23, 161)
    assert sum(math.prod(s) for s in shapes.values()) == 25_557_032
    by_name = {c.name: c for c in convs}
    assert by_name["resnet50/layer2.0.downsample.0"].shape_key == (256, 512, 1, 2, 56)
    assert by_name["resnet50/layer2.1.conv2"].shape_key == (128, 128, 3, 1, 28)
    assert {f"resnet50/{name}" for name in bench_sparse_conv2d.QUICK} <= set(by_name)
    # 4.09e9 multiply-adds, as published for 224 x 224.
    work = sum(math.prod(c.weight_shape) * c.output_size**2 for c in convs) + 2048 * 1000
    assert work == pytest.approx(4.09e9, rel=1e-3)
    assert sum(math.prod(c.weight_shape) for c in networks.mobilenet_v1_pointwise()) == 3_139_584


def test_random_mask_keeps_whole_blocks_exactly():
    for pattern in bench_sparse_conv2d.PATTERNS:
        mask = optimizer_step.random_mask((8, 12), 0.75, pattern)
        structure = sk.ops.sparse_structure(mask, pattern)  # raises if a block is kept in part
        assert structure.kept == int(mask.sum()) == 24


def test_untimed_calls_come_before_each_sample():
    log: list[str] = []
    contenders = {name: lambda name=name: log.append(name) for name in "ab"}
    harness.measure("case", lambda: None, contenders)
    alone, log[:] = list(log), []
    harness.measure("case", lambda: None, contenders, settle=2)
    settled = harness.ROUNDS * 2 * 2
    assert len(log) == len(alone) + settled and "".join(log[-6:]) == "aaabbb"
