"""What every method owes, whatever it prunes: the things that users of such packages trip over."""

import copy

import pytest
import torch
from every_method import CONSTANT, KINDS, OPTIONS, STEPS, check_sparse, every_method, kinds, masks_of, ready, setup
from method_helpers import check_equal
from method_steps import assert_compiles_once, batch, iterate, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from sparsekern.methods import swap
from sparsekern.methods.effective import EffectiveSparsifier


@kinds("masked", "sgd", "adamw", "masked-adamw")
def test_pruned_is_zero_after_every_step_and_at_the_end(name, kind):
    parts = model, optimizer, sparsifier = setup(name, kind)
    seen = []
    for i in range(STEPS):
        check_sparse(*parts)
        seen.append(masks_of(sparsifier))
        iterate(*parts, i, i + 1)
        assert sparsifier.position == i + 1
    check_sparse(*parts)
    changed = any(not torch.equal(a[n], b[n]) for a, b in zip(seen, seen[1:], strict=False) for n in a)
    assert changed == (name not in CONSTANT)
    masks, keys = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}, list(network().state_dict())
    assert sparsifier.finalize() is model and list(model.state_dict()) == keys
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(not model.state_dict()[n][~mask].any() for n, mask in masks.items())
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()  # a plain one again


OTHERS = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, weight_decay=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, weight_decay=1e-2),
    "rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["acdc", "rigl", "topkast", "str"])
def test_other_optimizers_of_torch(name, kind, monkeypatch):
    monkeypatch.setitem(KINDS, kind, OTHERS[kind])
    parts = setup(name, kind)
    for i in range(STEPS):
        iterate(*parts, i, i + 1)
        check_sparse(*parts)
    assert all(bool(p.isfinite().all()) for p in parts[0].parameters())


def test_step_refuses_other_optimizers():
    for kind in ("masked", "sgd", "masked-adamw"):
        with pytest.raises(TypeError, match="optimizer must be torch.optim.Adam or AdamW for STEP"):
            setup("step", kind)


@every_method
def test_gradient_accumulation_counts_optimizer_steps(name):
    def run(parts_of_a_batch):
        model, optimizer, sparsifier = setup(name, model=network().double())
        model.eval()  # batch norm sees the parts
        for i in range(5):
            x, y = batch(i)
            optimizer.zero_grad()
            for a, b in zip(x.double().chunk(parts_of_a_batch), y.chunk(parts_of_a_batch), strict=True):
                (nn.functional.cross_entropy(model(a), b) / parts_of_a_batch).backward()
            optimizer.step()
            sparsifier.step()
        return model.state_dict(), masks_of(sparsifier)

    (got, masks), (want, expected) = run(2), run(1)
    torch.testing.assert_close(got, want)
    check_equal(masks, expected)


@every_method
def test_weights_shared_between_layers(name):
    model = network().append(nn.Linear(6, 6)).append(nn.Linear(6, 6))
    model[7].weight = model[6].weight
    parts = model, _, sparsifier = setup(name, model=model)
    assert list(sparsifier.masks) == ["0.weight", "3.weight", "5.weight", "6.weight"]
    seen = []
    for layer in (model[6], model[7]):
        layer.register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach().clone()))
    for i in range(5):
        iterate(*parts, i, i + 1)
        check_sparse(*parts)
        assert torch.equal(*seen[-2:])
    assert sparsifier.finalize()[7].weight is model[6].weight


@every_method
def test_frozen_parameters(name):
    """Frozen before `attach`: never touched. Frozen after it: pruned perhaps, but not moved."""
    model = network()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    parts = model, optimizer, sparsifier = setup(name, model=model)
    assert "3.weight" not in sparsifier.masks
    iterate(*parts, 0, 1)
    optimizer.zero_grad()
    model[5].weight.requires_grad_(False)
    stored = model[5].weight.detach().clone()
    for i in range(1, 7):
        iterate(*parts, i, i + 1)
        check_sparse(*parts)
    assert torch.equal(model[3].weight, before)
    now = model[5].weight.detach()
    assert torch.equal(now[now != 0], stored[now != 0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_layers_without_weights_or_without_gradients(name, dtype):
    model = network()
    unused = [nn.Linear(6, 0), nn.Linear(0, 6), nn.Linear(6, 6), nn.Conv1d(8, 8, 3), nn.Conv3d(8, 8, 2)]
    model[5].unused = nn.ModuleList(unused)  # never called
    model, optimizer, sparsifier = parts = setup(name, model=model.to(dtype))
    for i in range(STEPS):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
        sparsifier.step()
        check_sparse(*parts)
    assert len(sparsifier.masks) == 8 and all(bool(p.isfinite().all()) for p in sparsifier.finalize().parameters())


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@kinds("masked", "adamw")
@pytest.mark.parametrize("device", DEVICES)
def test_model_moved_cast_and_laid_out_anew_after_attach(name, kind, device):
    def run(change, at):
        model, optimizer, sparsifier = parts = setup(name, kind)
        model.eval()  # under batch norm a bias has no gradient but noise, of which Adam makes whole steps
        for i in range(6):
            if i == at:
                change(model)
            x, y = (t.to(model[0].weight.device) for t in batch(i))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()
            optimizer.step()
            sparsifier.step()
            check_sparse(*parts)
        return {n: v.cpu() for n, v in model.state_dict().items()}, masks_of(sparsifier)

    # torch's Adam follows no cast and no move of what it has state of.
    late = 3 if kind == "masked" else 0
    want, masks = run(lambda m: m.to(device), late)
    got, found = run(lambda m: m.to(device).to(memory_format=torch.channels_last), 3 if device == "cpu" else late)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got, _ = run(lambda m: m.to(device).double(), late)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, check_dtype=False)


@every_method
def test_parameters_added_after_attach_train_densely(name):
    parts = model, optimizer, sparsifier = setup(name)
    iterate(*parts, 0, 1)
    added = nn.Linear(6, 6)
    before = added.weight.detach().clone()
    model.append(added)
    optimizer.add_param_group({"params": added.parameters(), "lr": 0.01})
    for i in range(1, STEPS):
        iterate(*parts, i, i + 1)
        check_sparse(*parts)
    assert added.weight.all() and not torch.equal(added.weight, before)
    with pytest.raises(ValueError, match="a sparsifier is attached to it already"):
        sk.DenseTraining().attach(model, optimizer)


@every_method
def test_compiled_model_neither_breaks_nor_recompiles(name):
    assert_compiles_once(lambda: setup(name), STEPS)


def test_compiled_model_where_a_module_keeps_its_attributes(monkeypatch):
    monkeypatch.setattr(swap, "_TRACES_POP", False)  # as torch 2.10
    assert_compiles_once(lambda: setup("topkast"), STEPS)


class _Operations(TorchDispatchMode):
    """The operators that torch runs, by name."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(name, step):
    parts = model, optimizer, sparsifier = setup(name)
    iterate(*parts, 0, step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
    with _Operations() as found:
        optimizer.step()
        sparsifier.step()
    return found.names


@every_method
def test_a_step_without_an_update_does_nothing_that_could_be_avoided(name):
    """Methods that hold zeros add no operator at all to MaskedSGD's, and none of the others reads the device."""
    held = not isinstance(setup(name)[2], EffectiveSparsifier)
    if held or name == "powerpropagation":
        assert operations(name, STEPS) == operations("dense", STEPS)
    elif name not in ("sr-ste", "step"):  # of these masks change every step
        assert "aten._local_scalar_dense.default" not in operations(name, 6)


@every_method
def test_averages_of_weights_are_masked(name):
    model, optimizer, sparsifier = parts = setup(name)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
    for i in range(STEPS):
        iterate(*parts, i, i + 1)
        average.update_parameters(model)
    before = copy.deepcopy(average.state_dict())
    sparsifier.state_dict()  # brings masks up to date
    state = sparsifier.sparse_state_dict(average.module)
    check_equal(dict(average.state_dict()), dict(before))
    plain = network()
    plain.load_state_dict(state)
    for name in sparsifier.masks if not isinstance(sparsifier, EffectiveSparsifier) else ():
        mask = sparsifier.masks.bool(name)
        assert not state[name][~mask].any() and torch.equal(state[name][mask], before[f"module.{name}"][mask])
    if isinstance(sparsifier, EffectiveSparsifier):
        plain.eval(), average.eval()
        torch.testing.assert_close(plain(batch(0)[0]), average(batch(0)[0]), rtol=0, atol=0)


@every_method
def test_second_attach_is_refused_until_finalize(name):
    model, optimizer, sparsifier = setup(name)
    before, masks = copy.deepcopy(model.state_dict()), masks_of(sparsifier)
    options = {**ready(name, network())[1], **OPTIONS.get(name, {})}
    again = sk.build_method(name, 0.5, epochs=STEPS, steps_per_epoch=1, **options)
    for other in (model, nn.Sequential(model), model[3]):
        with pytest.raises(ValueError, match="a sparsifier is attached to it already"):
            again.attach(other, type(optimizer)(other.parameters(), lr=0.1), 1)
    check_equal(dict(model.state_dict()), dict(before))
    check_equal(masks_of(sparsifier), masks)
    iterate(model, optimizer, sparsifier, 0, 3)
    sparsifier.finalize()
    again.attach(model, optimizer, 1, verbose=False)
    iterate(model, optimizer, again, 3, 5)
