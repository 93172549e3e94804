"""sk.nn: layers switch to the sparse operators and back without anybody noticing but the clock."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.layers import structure_of


def always(module, structure, input):
    return True


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(8, 12, (1, 2), dilation=(1, 2), padding="valid"), nn.Flatten(), nn.Linear(96, 6),
    )  # fmt: skip


def masked(model, pattern="unstructured", sparsity=0.5):
    masks = sk.MaskSet({n: p for n, p in model.named_parameters() if p.dim() > 1})
    for name in masks:
        w = masks.parameter(name).detach()
        groups = w.numel() if pattern == "unstructured" else w.numel() // 4
        packed = sk.ops.topk_mask([w], sk.keep_count(groups, sparsity), pattern=pattern)
        masks.set_packed(name, packed[0])
    masks.apply()
    return masks


def results(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("pattern", "dim"), [("4x1", 0), ("1x4", 1)])
def test_structure_has_the_coarsest_pattern_of_its_mask(pattern, dim):
    torch.manual_seed(0)
    mask = (torch.rand(8, 8, 3, 3) < 0.5).index_select(dim, torch.arange(8) // 4)
    assert structure_of(mask, 1).layout == pattern
    for place in range(8):  # a block that is kept in part, whichever its odd weight is
        odd = mask.clone()
        odd.select(dim, place)[-1, -1, -1] ^= True
        assert structure_of(odd, 1).layout == "unstructured"
    assert structure_of(torch.ones_like(mask), 1) is None


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("last", [False, True])
def test_results_stay_and_restore_undoes(pattern, last):
    model, x = network(), torch.randn(3, 4, 8, 8)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    masks = masked(model, pattern)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    keys, text, want = list(model.state_dict()), repr(model), results(model, x)
    assert sk.nn.accelerate(model, masks, choose=always) is model
    assert list(model.state_dict()) == keys and repr(model) == text
    assert {n: id(m) for n, m in model.named_modules()} == {n: i for n, (i, _) in before.items()}
    assert all(isinstance(m, before[n][1]) for n, m in model.named_modules())
    got = results(model, x)
    report = sk.nn.acceleration_report(model)
    assert report.share == 1.0 and len(report.layers) == 4
    assert pattern == "unstructured" or [how for _, how in report.layers].count(f"sparse {pattern}") >= 3
    assert "4 of 4 layers ran on the sparse kernels" in str(report)
    torch.testing.assert_close(got[0], want[0])
    for name, gradient in got[1].items():
        expected = want[1][name]
        expected = torch.where(masks.bool(name), expected, 0) if name in masks else expected
        torch.testing.assert_close(gradient, expected)
    sk.nn.restore(model)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert not any("sparsekern" in key for m in model.modules() for key in vars(m))
    assert sk.nn.acceleration_report(model).layers == ()
    assert sk.nn.restore(model) is model


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_plain(how):
    model, x = network(), torch.randn(2, 4, 8, 8)
    sk.nn.accelerate(model, masked(model), choose=always)
    model(x)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert type(again[0]) is nn.Conv2d and type(again[-1]) is nn.Linear
    assert not any("sparsekern" in key for m in again.modules() for key in vars(m))
    torch.testing.assert_close(again(x), model(x))
    assert sk.nn.acceleration_report(model).share == 1.0 and again[0].weight is not model[0].weight


def test_structures_follow_the_masks_and_are_built_once(monkeypatch):
    from sparsekern.nn import acceleration as implementation

    built = []
    original = implementation.structure_of
    monkeypatch.setattr(implementation, "structure_of", lambda m, g: (built.append(1), original(m, g))[1])
    model, x = network(), torch.randn(2, 4, 8, 8)
    masks = masked(model)
    sk.nn.accelerate(model, masks, choose=always)
    for _ in range(3):
        model(x)
    assert len(built) == 4
    masks.set("0.weight", torch.ones(8, 4, 3, 3, dtype=torch.bool))
    for _ in range(2):
        model(x)
    assert len(built) == 5
    assert sk.nn.acceleration_report(model).layers[0] == ("0", "dense: mask keeps every weight")
    masks.set("0.weight", torch.zeros(8, 4, 3, 3, dtype=torch.bool))
    model[0].bias.data.zero_()
    assert not model[0](x).any()
    model.to(memory_format=torch.channels_last).double()
    torch.testing.assert_close(model(x.double()), sk.nn.restore(copy.deepcopy(model))(x.double()), atol=1, rtol=1)
    assert len(built) == 6, "a change of memory format or dtype is no new mask"


def test_choice_is_asked_once_per_size_and_mask():
    asked = []

    def choose(module, structure, input):
        asked.append((type(module).__name__, structure.kept, tuple(input.shape)))
        return isinstance(module, nn.Linear)

    model = network()
    masks = masked(model)
    sk.nn.accelerate(model, masks, choose=choose)
    for batch in (4, 4, 5, 64, 64):
        model(torch.randn(batch, 4, 8, 8))
    assert len(asked) == 8, "4 and 5 share a decision, 64 has its own"
    assert [how for _, how in sk.nn.acceleration_report(model).layers][:3] == ["dense: is as fast or faster"] * 3
    assert sk.nn.acceleration_report(model).sparse == 1
    masks.set("7.weight", masks.bool("7.weight").flip(0))
    model(torch.randn(4, 4, 8, 8))
    assert len(asked) == 8, "as many weights as before: no new decision"
    masks.set("7.weight", torch.rand(6, 96) < 0.1)
    model(torch.randn(4, 4, 8, 8))
    assert len(asked) == 9


@pytest.mark.parametrize("answer", [True, False])
def test_measured_choice_touches_nothing(monkeypatch, answer):
    from sparsekern.nn import timing

    model, x = network(), torch.randn(2, 4, 8, 8, requires_grad=True)
    clock = iter(range(1000))
    slow = "run_dense" if answer else "run_sparse"
    original = getattr(timing, slow)

    def delayed(*args):
        for _ in range(50):
            next(clock)
        return original(*args)

    monkeypatch.setattr(timing, slow, delayed)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    structure = sk.ops.sparse_structure(torch.rand(8, 4, 3, 3) < 0.1)
    state = torch.get_rng_state()
    assert sk.nn.measured_choice(model[0], structure, x) is answer
    with torch.no_grad():
        assert sk.nn.measured_choice(model[0], structure, x) is answer
    assert x.grad is None and model[0].weight.grad is None and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("sparse", "dense", "ran"), [
    (1e-3, 2e-3, "sparse unstructured, 1 ms against 2 ms dense"),
    (2e-3, 1e-3, "dense: is as fast or faster, 2 ms against 1 ms dense"),
    (0.95e-3, 1e-3, "dense: is as fast or faster, 0.95 ms against 1 ms dense"),
])  # fmt: skip
def test_report_shows_the_speeds_that_decided(monkeypatch, sparse, dense, ran):
    monkeypatch.setattr(sk.nn.acceleration, "measured_speeds", lambda *_: sk.nn.Speeds(sparse, dense))
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    sk.nn.accelerate(model, masked(model))
    model(torch.randn(2, 4, 8, 8))
    assert sk.nn.acceleration_report(model).layers == (("0", ran),)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_autocast_mixed_types_and_padding_modes_run_dense():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 4, padding="same"), nn.Flatten(),
        nn.Linear(64, 2),
    )  # fmt: skip
    masks = masked(model)
    sk.nn.accelerate(model, masks, choose=always)
    x = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert sk.nn.acceleration_report(model).layers == (("3", "dense: autocast"),)
    model(x)
    assert sk.nn.acceleration_report(model).layers == (("3", "sparse unstructured"),)


def test_compiled_model_runs_dense_without_graph_break_or_recompile():
    model, x = network(), torch.randn(2, 4, 8, 8)
    masks = masked(model)
    want = model(x).detach()
    sk.nn.accelerate(model, masks, choose=always)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x), want)
        masks.set("0.weight", torch.zeros(8, 4, 3, 3, dtype=torch.bool))
        compiled(x)


def test_shared_weights_and_a_second_call():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    masks = masked(model)
    sk.nn.accelerate(model, masks, choose=lambda *a: False)
    sk.nn.accelerate(model, masks, choose=always)
    model(torch.randn(2, 8))
    assert sk.nn.acceleration_report(model).share == 1.0
    assert type(sk.nn.restore(model)[0]) is nn.Linear


@pytest.mark.parametrize("disturbed, rounds", [(0, 3), (1, 3), (2, 4), (4, 6), (99, 9)])
def test_times_that_do_not_repeat_are_taken_again(monkeypatch, disturbed, rounds):
    count = iter(range(100))

    def seconds(run, wanted):
        i = next(count)
        sparse = i % 2 == 1
        return (1.0 if sparse else 1.5) + (i if sparse and i < 2 * disturbed else 0)

    monkeypatch.setattr(sk.nn.timing, "_seconds", seconds)
    structure = sk.ops.sparse_structure(torch.eye(4))
    found = sk.nn.measured_speeds(nn.Linear(4, 4), structure, torch.ones(1, 4))
    assert (found.sparse, found.dense) == (2.0 if disturbed == 99 else 1.0, 1.5)
    assert next(count) == 2 * rounds


def test_bad_input_is_named_and_changes_nothing():
    model = network()
    for arguments, error, words in [
        ((3, masked(model)), TypeError, "model must be a torch.nn.Module, got int"),
        ((model, {}), TypeError, "sparsifier_or_masks must be a MaskSet or an attached sparsifier, got dict"),
        ((model, sk.MaskSet({"x": torch.ones(2, 2)})), ValueError, "sparsifier_or_masks must mask"),
    ]:
        with pytest.raises(error, match=words):
            sk.nn.accelerate(*arguments)
    assert type(model[0]) is nn.Conv2d
