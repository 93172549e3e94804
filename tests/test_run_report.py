"""Report, curves and speeds: self-contained, complete, escaped; timings interleaved; nothing given is changed."""

import base64
import copy
import io
import re
import struct
import sys
from html.parser import HTMLParser

import pytest
import torch

import sparsekern as sk
from sparsekern import measure, models, run_report, speeds
from sparsekern.recipe import Model

SPEED = {"what": "training step", "case": "sparse phase", "baseline": "dense phase", "ours_ms": 2.0,
         "ours_iqr_ms": 0.5, "baseline_ms": 1.0, "baseline_iqr_ms": 0.1, "speedup": 0.5}  # fmt: skip
LAYER = SPEED | {"what": "convolution forward", "case": "stem", "ours_ms": 1.0, "speedup": 3.0}


@pytest.fixture
def one_thread():
    """On a busy machine several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def result():
    rows = [
        {"epoch": i, "step": 10 * i, "phase": "dense", "lr": 0.1, "loss": 1 / i, "validation_loss": 2 / i,
         "accuracy": 0.5, "entropy": 1.5 / i, "sparsity": 0.1 * i, "seconds": 1.0 * i} for i in range(1, 5)
    ]  # fmt: skip
    scores = {"accuracy": 0.9876, "loss": 0.1, "entropy": 0.2, "sparsity": 0.95}
    return {
        "name": "<b>odd</b>", "recipe": "seed = 0 # <script>", "device": "cpu", "machine": "a machine", "steps": 40,
        "seconds": 4.0, "metrics": rows, "sparse": scores, "dense": scores | {"accuracy": 0.9912, "sparsity": 0.01},
        "phases": [{"start": 0, "stop": 30, "sparsity": None}, {"start": 30, "stop": 40, "sparsity": 0.95}],
        "layers": [{"name": "a", "shape": [2, 3], "weights": 6, "live": 3, "ran": "sparse 4x1"},
                   {"name": "b", "shape": [4], "weights": 4, "live": 0, "ran": "dense: is faster"}],
        "speeds": [SPEED, LAYER, LAYER | {"what": "convolution forward + backward", "speedup": 0.25}],
    }  # fmt: skip


def test_tables(result):
    networks, layers, speed, convolutions = run_report.tables(result)
    assert networks.rows[0][:2] == ("sparse", "0.9876") and networks.rows[1][:2] == ("dense twin", "0.9912")
    assert layers.rows == [
        ("a", "2x3", "6", "3", "0.5000", "sparse 4x1"),
        ("b", "4", "4", "0", "1.0000", "dense: is faster"),
        ("overall", "", "10", "3", "0.7000", ""),
    ]
    assert speed.rows == [("training step", "sparse phase", "dense phase", "~2.000", "1.000", "0.50x slower")]
    assert convolutions.rows == [("stem", "~1.000", "1.000", "3.00x", "~1.000", "1.000", "0.25x slower")]
    lines = networks.text().splitlines()
    assert lines[2] == "network     accuracy  validation loss  output entropy  sparsity"
    assert lines[4] == "dense twin    0.9912           0.1000          0.2000    0.0100"
    assert len(run_report.tables(result | {"speeds": []})) == 2


class Page(HTMLParser):
    """Collects what a page refers to, and its open tags."""

    def __init__(self):
        super().__init__()
        self.links, self.tags, self.open = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_well_formed_and_needs_no_other_file(result):
    text = run_report.page(result, b"picture")
    page = Page()
    page.feed(text)
    assert page.links == ["data:image/png;base64," + base64.b64encode(b"picture").decode()]
    assert not page.open and not page.tags & {"script", "link", "b"} and "url(" not in text
    for wanted in ("&lt;b&gt;odd", "# &lt;script&gt;", "0.9876", "0.50x slower", "overall", "a machine", "30", "0.375",
                   "1 of 2 prunable layers (50%)"):  # fmt: skip
        assert wanted in text
    assert "Without curves" in run_report.page(result, None)


def test_curves(result):
    pytest.importorskip("matplotlib")
    picture = run_report.curves(result["metrics"], result["phases"])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (1500, 960)
    dense = [{"start": 0, "stop": 40, "sparsity": None}]
    assert shaded_share(picture) > 0.1 and shaded_share(run_report.curves(result["metrics"], dense)) == 0


def shaded_share(picture):
    """Share of the pixels that have the colour of a sparse phase: #f0b429 at 22% over white."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(picture)).convert("RGB")
    counts = {colour: count for count, colour in image.getcolors(1 << 20)}
    near = sum(n for c, n in counts.items() if all(abs(x - y) <= 2 for x, y in zip(c, (252, 239, 208), strict=True)))
    return near / (image.width * image.height)


def test_without_matplotlib(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError):
        run_report.curves(result["metrics"], result["phases"])


def test_contenders_take_turns():
    calls = []
    found = measure.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, sample_seconds=0)
    assert "".join(calls) == "aabb" + "ab" * 3  # warm-up and calibration, then three rounds
    assert all(timing.median >= 0 and timing.iqr >= 0 for timing in found.values())
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        measure.interleaved({"a": int}, rounds=1)


def test_short_calls_are_repeated_until_a_sample_lasts():
    calls = []
    measure.interleaved({"a": lambda: calls.append(0)}, rounds=2, sample_seconds=0.01)
    assert len(calls) >= 2 + 2 * 100


def test_speeds_cover_every_hot_path_and_change_nothing(monkeypatch, one_thread):
    monkeypatch.setattr(speeds, "RESNET50_WEIGHTS", 5_000)
    model = models.build(Model(width=4), 1, 10)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    masks = sk.MaskSet({f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, kinds)})
    for name in masks:
        masks.set(name, torch.rand_like(masks.parameter(name)) < 0.3)
    masks.apply()
    before, digest = copy.deepcopy(model.state_dict()), masks.hash()
    rows = speeds.measure(model, masks, torch.randn(8, 1, 8, 8), torch.arange(8), "unstructured", rounds=2)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert masks.hash() == digest and all(p.grad is None for p in model.parameters())
    by_kind = {}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ours_ms"]) and row["ours_ms"] > 0
        by_kind.setdefault(row["what"], []).append(row)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    for what in ("convolution forward", "convolution forward + backward"):
        assert [row["case"].split()[0] for row in by_kind[what]] == layers
    for what, baselines in (("optimizer step", "SGD"), ("mask selection", "np.partition|torch.topk")):
        assert len(by_kind[what]) == 4 and all(re.search(baselines, row["baseline"]) for row in by_kind[what])
    assert [row["case"] for row in by_kind["training step"]] == [
        "sparse phase, accelerated", "sparse phase, plain", "dense phase, accelerated"
    ]  # fmt: skip
    assert {row["baseline"] for row in by_kind["training step"]} == {"dense phase, plain"}
