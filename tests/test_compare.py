"""Comparisons end to end, tiny: processes, the table, going on after a kill, bad input, refusals."""

import argparse
import csv
import inspect
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import sparsekern
from sparsekern import cli, compare, comparison, method_settings, recipe, training_run

pytest.importorskip("sklearn")
ARGUMENTS = ["--data", "digits", "--sparsity", "0.8", "--epochs", "1", "--name", "tiny",
             "--set", "model.width=6", "batch=64", "optimizer.warmup_epochs=1", "device=cpu"]  # fmt: skip
COMMAND = [sys.executable, "-m", "sparsekern", "compare"]
LONG = [*COMMAND, "--methods", "acdc,gmp", *ARGUMENTS[:5], "4", *ARGUMENTS[6:]]


def environment():
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sparsekern.__file__)), "OMP_NUM_THREADS": "1"}


def table(folder):
    """What was computed, without the clock."""
    with (folder / "runs/tiny/table.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in a folder and returns what it printed; its runs are processes of their own all the same."""

    def run(folder, command=LONG):
        monkeypatch.chdir(folder)
        assert cli.main(command[3:]) == 0
        return capsys.readouterr().out

    return run


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_killed_and_started_again_comes_to_the_same_table(tmp_path, call):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    shown = call(whole)
    rows = table(whole)
    assert [(row["method"], row["sparsity asked"], row["epochs"], row["runs"]) for row in rows] == [
        ("acdc", "0.8", "4", "1"), ("gmp", "0.8", "4", "1")
    ]  # fmt: skip
    for row in rows:
        assert abs(float(row["sparsity"]) - 0.8) < 1e-3 and 0.05 < float(row["accuracy"]) <= 1
        assert 0 < float(row["inference FLOPs"]) < 0.5 < float(row["training FLOPs"]) < 1 and row["note"] == ""
    assert (
        f"{float(rows[0]['accuracy']):.4f}" in shown and "| gmp | 0.8 |" in (whole / "runs/tiny/table.md").read_text()
    )

    process = subprocess.Popen(LONG, cwd=killed, env=environment(), stderr=subprocess.DEVNULL)
    folders = [killed / f"runs/tiny/{method}-0.8-4epochs-seed0" for method in ("acdc", "gmp")]
    while not any((folder / "checkpoint.pt").exists() for folder in folders) and process.poll() is None:
        time.sleep(0.02)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while any(map(alive, children)):  # runs whose parent is gone stop by themselves
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not all((folder / "result.json").exists() for folder in folders)
    call(killed)
    assert table(killed) == rows
    assert "Going on at step" in "".join((folder / "log.txt").read_text() for folder in folders)
    assert "2 finished before, 0 to go" in call(killed) and table(killed) == rows


def test_a_refusal_is_a_row_and_the_rest_goes_on(tmp_path, call):
    call(tmp_path, [*COMMAND, "--methods", "fixed-mask,dense,step", *ARGUMENTS, "--jobs", "1"])
    refused, dense, step = table(tmp_path)
    assert "none of its prunable weights has a zero" in refused["note"] and refused["accuracy"] == ""
    assert "optimizer must be torch.optim.Adam" in step["note"] and step["runs"] == "0"
    assert dense["sparsity asked"] == "" and float(dense["sparsity"]) == 0 and float(dense["training FLOPs"]) == 1
    assert float(dense["inference FLOPs"]) == 1 and dense["runs"] == "1" and dense["note"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gmp,magic"], "--methods: given 'magic', allowed are ['dense', 'acdc',"),
        (["--methods", "gmp,gmp"], "--methods: given ['gmp', 'gmp'], allowed is each one once"),
        (["--data", "cifar"], "--data: given 'cifar', allowed is one of ['digits', 'fashion-mnist']"),
        (["--sparsity", "0.5", "1.5"], "method.sparsity: given 1.5"),
        (["--epochs", "0"], "epochs: given 0"),
        (["--lengths", "0.3"], "--lengths: 0.3 epochs given"),
        (["--jobs", "0"], "--jobs: given 0"),
        (["--name", "../up"], "--name: given '../up'"),
        (["--pattern", "2x2"], "method.pattern: given '2x2'"),
        (["--train-images", "99999"], "data.train_images: given 99999, allowed is at most 1437"),
        (["--set", "model.size=3"], "model.size: unknown key"),
        (["--method-set", "initial=0.5"], "--method-set: given 'initial=0.5', allowed is METHOD.KEY=VALUE"),
        (["--method-set", "gmp.initial"], "--method-set: given 'gmp.initial', allowed is METHOD.KEY=VALUE"),
        (["--method-set", "str.start=-6"], "given 'str.start=-6', allowed are the methods of this comparison: ['gmp']"),
        (["--method-set", "gmp.start=-6"], "allowed for gmp are ['distribution', 'exclude', 'include', 'initial', "),
        (["--method-set", "gmp.sparsity=0.5"], "given 'gmp.sparsity=0.5', allowed for gmp are"),
        (["--method-set", "gmp.epochs=9"], "given 'gmp.epochs=9', allowed for gmp are"),
        (["--method-set", "gmp.optimizer.name=rmsprop"], "optimizer.name: given 'rmsprop'"),
        (
            ["--method-set", "gmp.initial=0.95"],
            "given ['gmp.initial=0.95'], which gmp refuses: method: initial must be",
        ),
    ],
)
def test_bad_input_is_an_error_before_anything_starts(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--methods", "gmp", *ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_runs_of_another_recipe_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/tiny/gmp-0.8-1epochs-seed0"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('batch = 64\nepochs = 2\n[method]\nname = "gmp"\n')
    assert cli.main(["compare", "--methods", "gmp", *ARGUMENTS]) == 2
    assert "holds a run of another recipe (key: given now, stored): " in (shown := capsys.readouterr().err)
    assert "epochs: 1, 2" in shown and os.listdir(folder) == ["recipe.toml"]


def planned(*arguments):
    """The recipes of a comparison, by the folders of their runs."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return {entry.folder: entry.settings for entry in compare.plan(parser.parse_args([*ARGUMENTS, *arguments]))}


def test_runs_differ_in_what_is_compared_alone():
    """One budget for all methods: the same initial weights, and the same batches in the same order."""
    found = planned("--methods", "acdc,gmp,rigl,dense", "--seeds", "0", "3", "--lengths", "1", "2")
    assert len(found) == 16
    for folder, settings in found.items():
        seed, epochs = (3 if folder.endswith("seed3") else 0), (2 if "-2epochs" in folder else 1)
        changed = recipe.differences(settings, found["acdc-0.8-1epochs-seed0"])
        kept = [line for line in changed if not line.startswith(("method.name:", "method.pattern:"))]
        assert kept == [f"seed: {seed}, 0"] * (seed > 0) + [f"epochs: {epochs}, 1"] * (epochs > 1)
    ours, theirs = (training_run.Run(found[f"{m}-0.8-2epochs-seed3"], verbose=False) for m in ("acdc", "gmp"))
    assert ours.total_steps == theirs.total_steps == 46 and ours.data.labels.unique().numel() == 10
    batches = []
    for step in range(46):
        ours.step = theirs.step = step
        batches.append(ours.batch()[0])
        assert torch.equal(batches[-1], theirs.batch()[0]) and ours.learning_rate() == theirs.learning_rate()
    assert not torch.equal(batches[0], batches[23])
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name])


def test_a_setting_of_one_method_reaches_that_method_alone(tmp_path, monkeypatch, capsys):
    methods = ["--methods", "gmp,granet,step,one-shot,topkast,powerpropagation,acdc"]
    plain = planned(*methods)
    own = ["--method-set", "gmp.initial=0.25", "step.optimizer.name=adamw", "one-shot.pretrain=0.75",
           "--method-set", "granet.drop_fraction=0.4", "topkast.backward_sparsity=0.6", "powerpropagation.alpha=3",
           "acdc.rule=proportional", "acdc.pattern=4x1"]  # fmt: skip
    changed = planned(*methods, *own)
    assert {folder: recipe.differences(settings, plain[folder]) for folder, settings in changed.items()} == {
        "gmp-0.8-1epochs-seed0": ["method.options.initial: 0.25, None"],
        "granet-0.8-1epochs-seed0": ["method.options.drop_fraction: 0.4, None"],
        "step-0.8-1epochs-seed0": ["optimizer.name: 'adamw', 'sgd'"],
        "one-shot-0.8-1epochs-seed0": ["method.pretrain: 0.75, 0.5"],
        "topkast-0.8-1epochs-seed0": ["method.options.backward_sparsity: 0.6, None"],
        "powerpropagation-0.8-1epochs-seed0": ["method.options.alpha: 3, None"],
        "acdc-0.8-1epochs-seed0": ["method.pattern: '4x1', 'auto'", "method.options.rule: 'proportional', None"],
    }  # fmt: skip
    folder = tmp_path / "runs/tiny/gmp-0.8-1epochs-seed0"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.to_toml(plain[folder.name]))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--methods", "gmp", *ARGUMENTS, "--method-set", "gmp.initial=0.25"]) == 2
    assert "another recipe (key: given now, stored): method.options.initial: 0.25, None" in capsys.readouterr().err


def test_targets_are_those_that_a_method_may_end_with():
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    methods = ["--methods", "dense,gmp,str,sr-ste,extended-gmp,acdc", "--method-set", "acdc.pattern=1:4"]
    options = parser.parse_args([*ARGUMENTS[:2], "--sparsity", "0.8", *methods])
    entries = {entry.method: entry for entry in compare.plan(options)}
    found = {name: compare._targets(entry, [0.8, 0.9]) for name, entry in entries.items()}
    assert found["dense"] == ((), "") and found["gmp"] == ((0.8,), "")
    assert found["str"] == ((0.8, 0.9), "it finds its own")
    assert found["sr-ste"] == found["acdc"] and found["acdc"][0] == (0.8,) and "end of a row" in found["acdc"][1]
    assert found["extended-gmp"] == ((0.8,), "some layers have a sparsity of their own")


@pytest.mark.parametrize("name", sparsekern.METHODS)
def test_every_setting_of_a_method_is_an_argument_that_it_takes(name):
    """What is built with its own default stays what it is; so each key goes where it belongs."""
    for key in set(method_settings.keys(name)) - {"pattern", "include", "exclude", "pretrain"}:
        entry, rest = sparsekern.METHODS[name], {"initial": {}} if name == "lottery-ticket" else {}
        found = [p for c in entry.cls.__mro__ for n, p in inspect.signature(c.__init__).parameters.items() if n == key]
        value = "reference" if key == "rule" else 0.25 if key == "backward_sparsity" else found[0].default
        sparsekern.build_method(name, 0.8, epochs=4, steps_per_epoch=3, **{key: value}, **rest)


def outcome(method, accuracy, seconds=1.0, found=0.9, **changes):
    scores = {"accuracy": accuracy, "loss": 0.5, "entropy": 0.25, "sparsity": found}
    result = {"sparse": scores, "flops": {"dense": 100.0, "inference": 20.0, "training": 900.0}, "steps": 10,
              "seconds": seconds, "metrics": [{"accuracy": 0.1}, {"accuracy": accuracy}]}  # fmt: skip
    return comparison.Outcome(**{"method": method, "sparsity": 0.9, "epochs": 2, "result": result, **changes})


def test_means_over_seeds_and_a_reason_that_cannot_break_the_table():
    failed = comparison.Outcome("b|c", 0.9, 2, None, "why\nso")
    found = comparison.rows([outcome("a", 0.5), outcome("a", 0.75, 3.0), failed])
    assert found[0] == {"method": "a", "sparsity asked": 0.9, "epochs": 2, "accuracy": 0.625, "loss": 0.5,
                        "entropy": 0.25, "sparsity": 0.9, "inference FLOPs": 0.2, "training FLOPs": 0.3,
                        "seconds": 2.0, "runs": 2, "note": ""}  # fmt: skip
    assert found[1]["accuracy"] is None and found[1]["note"] == "why so"
    text = comparison.table([outcome("a", 0.5), failed], "T").markdown()
    assert "| a | 0.9 | 2 | 0.5000 |" in text and "| b\\|c | 0.9 |" in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("found", "targets", "remark"),
    [
        (0.9049, (0.9,), ""),  # 0.951 times the live weights
        (0.8951, (0.9,), ""),
        (0.9051, (0.9,), "misses sparsity 0.9, 0.95 times the live weights"),
        (0.8949, (0.9,), "misses sparsity 0.9, 1.05 times the live weights"),
        (0.9784, (0.98,), "misses sparsity 0.98, 1.08 times the live weights"),
        (0.981, (0.9, 0.98), ""),  # a method that finds its own sparsity is near one of them
        (0.97, (0.9, 0.98), "misses sparsity 0.98, 1.50 times the live weights"),
        (0.5, (), ""),
        (1.0, (1.0,), ""),
        (0.99, (1.0,), "misses sparsity 1"),
        (0.0, (0.0,), ""),
    ],
)
def test_another_sparsity_than_asked_for_is_remarked(found, targets, remark):
    runs = [outcome("a", 0.5, found=found, targets=targets), outcome("a", 0.5, found=found, targets=targets)]
    assert comparison.rows(runs)[0]["note"] == remark
    shifted = comparison.rows([outcome("a", 0.5, found=found, targets=targets, shifted="why")])[0]["note"]
    assert shifted == (remark and f"{remark}: why")


def test_layers_without_live_weights_are_remarked():
    run = outcome("a", 0.1)
    run.result["layers"] = [{"name": "stem", "live": 3}, {"name": "head", "live": 0}, {"name": "fc", "live": 0}]
    assert comparison.rows([run, outcome("a", 0.5)])[0]["note"] == "no live weight in head, fc"


def test_plot():
    two = [outcome("a", 0.5), outcome("a", 0.75), comparison.Outcome("a", 0.9, 2, None, "failed")]
    assert comparison.mean_curve(two) == [0.1, 0.625]
    assert comparison.mean_curve(two[2:]) == []
    assert comparison.label(two, [2]) == "a" and comparison.label(two, [2, 4]) == "a, 2 epochs"
    astray = [outcome("b", 0.5, found=0.95, targets=(0.9,)), outcome("b", 0.5, found=0.9, targets=(0.9,))]
    assert comparison.label(astray, [2]) == "b (sparsity 0.925)"
    pytest.importorskip("matplotlib")
    several = [outcome("a", 0.5), outcome("a", 0.6), outcome("dense", 0.7, sparsity=None)]
    assert comparison.plot(several, 0.9)[:8] == b"\x89PNG\r\n\x1a\n"
    assert comparison.plot([comparison.Outcome("b", 0.9, 2, None, "refused")], 0.9)[:4] == b"\x89PNG"
