"""The training program end to end, short: files, exact sparsity, the twin, resuming bit for bit, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint, cli, evaluation, models, recipe, run_report, train
from sparsekern.progress import Progress

pytest.importorskip("sklearn")
# 48 steps: phases of two to seven steps, and twelve steps an epoch.
TINY = ["epochs=4", "batch=128", "model.width=6", "threads=1", "measure=false", "optimizer.warmup_epochs=1",
        "method.sparsity=0.8", "device=cpu", "accelerate=always"]  # fmt: skip
FILES = ("curves.png", "dense.pt", "metrics.jsonl", "recipe.toml", "report.html", "result.json", "sparse.pt")


@pytest.fixture(autouse=True)
def threads():
    """A recipe may set torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dropout(monkeypatch):
    """Makes every step draw from torch's random state, so that resuming has to restore it."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: nn.Sequential(build(*args), nn.Dropout(0.2)))


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(run_report, "curves", lambda *_: b"")


def outcome(folder):
    """All that a run computed, without the clock: tensors, metrics, scores."""
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == result["metrics"]
    for row in rows:
        del row["seconds"]
    tensors = {name: checkpoint.load(folder / name) for name in ("sparse.pt", "dense.pt")}
    return tensors, rows, [result[key] for key in ("sparse", "dense", "layers", "phases", "recipe")]


def act_at(monkeypatch, step, action):
    """Do `action` once the run has made `step` steps."""

    class Acting(Progress):
        def advance(self, note):
            super().advance(note)
            if self.done == step:
                action()

    monkeypatch.setattr(train, "Progress", Acting)


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1:] == other[1:]


def test_a_run_leaves_its_files_and_two_networks(tmp_path, capsys):
    settings = recipe.resolve("digits", TINY)
    result = train.train(settings, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(set(FILES) - (set() if matplotlib() else {"curves.png"}))
    tensors, rows, _ = outcome(tmp_path)
    assert [row["step"] for row in rows] == [12, 24, 36, 48] and rows[-1]["phase"] == "sparse 80%"
    assert all(row["loss"] > 0 and 0 < row["entropy"] < math.log(10) and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[-1]["accuracy"] > 0.2  # alive, or equal results would say nothing
    total = sum(layer["weights"] for layer in result["layers"])
    assert sum(layer["live"] for layer in result["layers"]) == sk.keep_count(total, 0.8)
    assert result["sparse"]["sparsity"] == rows[-1]["sparsity"] == 1 - sk.keep_count(total, 0.8) / total
    assert 1 - result["dense"]["sparsity"] > 2 * (1 - result["sparse"]["sparsity"])  # channels that died stay zero
    for key, file in (("sparse", "sparse.pt"), ("dense", "dense.pt")):
        run = train.Run(settings)
        run.model.load_state_dict(tensors[file])
        found = evaluation.evaluate(run.model, run.data.validation_images, run.data.validation_labels)
        assert found == pytest.approx({name: result[key][name] for name in found}, rel=1e-5)  # sums in another order
    assert recipe.resolve(str(tmp_path / "recipe.toml")) == settings
    shown = capsys.readouterr().out
    for text in ("first step", "prunable weight", "dense twin", "overall"):
        assert text in shown


def matplotlib():
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    return matplotlib


def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, monkeypatch, dropout, no_picture, capsys):
    settings = recipe.resolve("digits", TINY)
    train.train(settings, tmp_path / "straight")
    edges = train.Run(settings).sparsifier.schedule.edges
    stops = [1, edges[0], edges[0] + 1, 12, edges[-2] + 2, edges[-1] + 3, 48]
    for stop in stops:  # every stop is a Ctrl-C
        act_at(monkeypatch, stop, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(train.Stopped, match=f"stopped at step {stop} of 48; the same command goes on"):
            train.train(settings, tmp_path / "stopped")
        torch.rand(3)  # another process would start from another random state
    monkeypatch.setattr(train, "Progress", Progress)
    train.train(settings, tmp_path / "stopped")
    result = json.loads((tmp_path / "stopped/result.json").read_text())
    assert all(layer["ran"].startswith("sparse") for layer in result["layers"])
    assert "Going on at step 1 of 48" in capsys.readouterr().out
    same(outcome(tmp_path / "straight"), outcome(tmp_path / "stopped"))


def test_which_layers_run_sparse_is_measured_once_and_kept_in_the_checkpoint(tmp_path, monkeypatch, no_picture):
    asked = []

    def measured(layer, structure, input):
        asked.append(layer)
        return len(asked) % 2 == 1

    monkeypatch.setattr(sk.nn, "measured_choice", measured)
    settings = recipe.resolve("digits", [*TINY, "accelerate=measured"])
    act_at(monkeypatch, 40, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(train.Stopped):
        train.train(settings, tmp_path)
    before = len(asked)
    monkeypatch.setattr(train, "Progress", Progress)
    result = train.train(settings, tmp_path)
    assert before > len(result["layers"]) and len(asked) == before
    assert {layer["ran"].split()[0] for layer in result["layers"]} == {"sparse", "dense:"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which fails as a full disk does")
def test_crash_and_full_disk_lose_no_more_than_an_epoch(tmp_path, monkeypatch, dropout, no_picture):
    settings = recipe.resolve("digits", TINY)
    train.train(settings, tmp_path / "straight")
    folder = tmp_path / "crashed"

    def crash():
        raise MemoryError

    act_at(monkeypatch, 17, crash)
    with pytest.raises(MemoryError):
        train.train(settings, folder)
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 12
    act_at(monkeypatch, 30, lambda: (folder / "checkpoint.pt.partial").symlink_to("/dev/full"))
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt: cannot be written: No space left"):
        train.train(settings, folder)
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 24
    monkeypatch.setattr(train, "Progress", Progress)
    train.train(settings, folder)
    same(outcome(tmp_path / "straight"), outcome(folder))


def test_ctrl_c_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "sparsekern", "train", "digits", *TINY, "epochs=60", "--name", "stopped"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(train.__file__))}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs/stopped/checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the same command goes on" in shown and "Traceback" not in shown
    assert 0 < checkpoint.load(tmp_path / "runs/stopped/checkpoint.pt")["step"] < 60 * 12


def test_bad_input_is_explained_and_changes_nothing(tmp_path, monkeypatch, no_picture, capsys):
    monkeypatch.chdir(tmp_path)
    act_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["train", "digits", *TINY]) == 130
    path = tmp_path / "runs/digits/checkpoint.pt"
    good = path.read_bytes()
    monkeypatch.setattr(train, "Progress", Progress)

    def refused(*arguments):
        assert cli.main(["train", "digits", *TINY, *arguments]) == 2
        return capsys.readouterr().err

    assert "epochs: given 'x' (str)" in refused("epochs=x") and "seed: given 'y'" in refused("--overwrite", "seed=y")
    assert "method: include: 'none' matches none of" in refused('method.include=["none"]', "--name", "other")
    assert "--name: given '../up', allowed is the name of one folder" in refused("--name", "../up")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "digits", "--quick", "seed=1"])
    assert "unrecognized arguments: --quick" in capsys.readouterr().err
    assert "another recipe" in (shown := refused("seed=5", "epochs=5")) and "seed: 5, 0; epochs: 5, 4" in shown
    for bad in (good[:-9], good[:1000] + bytes([good[1000] ^ 4]) + good[1001:]):
        path.write_bytes(bad)
        assert "checkpoint.pt: is " in refused()
        assert path.read_bytes() == bad
    checkpoint.save({"version": 99}, path)
    assert "is of version 99, this program reads 2" in refused()
    path.write_bytes(good)
    assert cli.main(["train", "digits", *TINY]) == 0
    assert "holds a finished run" in refused()
    if not torch.cuda.is_available():
        assert "device: given 'cuda', allowed without a GPU" in refused("device=cuda", "--overwrite")
    assert sorted(os.listdir(path.parent)) == sorted(set(FILES) - (set() if matplotlib() else {"curves.png"}))


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    orders = []
    for seed in (0, 1):
        run = train.Run(recipe.resolve("digits", [*TINY, f"seed={seed}"]))
        count = len(run.data.labels)
        run.data = run.data._replace(labels=torch.arange(count))
        for epoch in (0, 1):
            batches = []
            for run.step in range(12 * epoch, 12 * (epoch + 1)):
                torch.rand(1)  # whatever else draws numbers
                batches.append(run.batch()[1])
            orders.append(torch.cat(batches))
            assert torch.equal(orders[-1].sort().values, torch.arange(count))
    assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_entropy_and_loss_against_hand_calculated_values():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    found = evaluation.evaluate(nn.Identity(), logits, torch.tensor([0]))
    assert found == pytest.approx({"loss": 0.407606, "accuracy": 1.0, "entropy": 0.832396}, abs=1e-6)
    assert evaluation.output_entropy(torch.zeros(2, 1000)).tolist() == pytest.approx([6.907755] * 2, abs=1e-5)
    certain = torch.tensor([[5.0, -math.inf], [0.0, -1e4]])  # p = 0 contributes 0
    assert evaluation.output_entropy(certain).tolist() == [0.0, 0.0]


def test_evaluation_leaves_the_model_alone_and_does_not_depend_on_the_batch():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    x, y = torch.randn(50, 3, dtype=torch.float64).float(), torch.arange(50) % 3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole, parts = (evaluation.evaluate(model, x, y, batch=batch) for batch in (50, 7))
    assert whole == pytest.approx(parts, abs=1e-6) and model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
