"""AC/DC: phases, masks, momentum, other optimizers, moved models, bad input."""

import pytest
import torch
from acdc_run import SCHEDULE, setup, zeros
from method_steps import OPTIMIZERS, batch, iterate, momenta, network
from torch import nn

import sparsekern as sk


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_phases_hold_exact_counts_and_zero_momentum(kind):
    model, optimizer, sparsifier = setup(kind)
    total = sum(sparsifier.masks.parameter(n).numel() for n in sparsifier.masks)
    pruned = total - sk.keep_count(total, 0.9)
    seen = []
    for i in range(14):
        iterate(model, optimizer, sparsifier, i, i + 1)
        seen.append(zeros(sparsifier))
        if isinstance(sparsifier.phase, sk.Sparse):
            for name in sparsifier.masks:
                off = ~sparsifier.masks.bool(name)
                parameter = sparsifier.masks.parameter(name)
                assert not parameter[off].any()
                assert not any(m[off].any() for m in momenta(optimizer, parameter))
    # After step 3 and 9 the sparse phase begins; at step 6 the pruned weights are free but still exactly zero.
    assert seen[:2] == [0, 0] and seen[2:6] == [pruned] * 4
    assert seen[6] < pruned and seen[8:] == [pruned] * 6


def test_mask_is_the_largest_weights():
    model, optimizer, sparsifier = setup()
    iterate(model, optimizer, sparsifier, 0, 2)
    x, y = batch(2)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    flat = torch.cat([sparsifier.masks.parameter(n).detach().reshape(-1).abs() for n in sparsifier.masks])
    keep = sk.keep_count(flat.numel(), 0.9)
    sparsifier.step()
    mask = torch.cat([sparsifier.masks.bool(n).reshape(-1) for n in sparsifier.masks])
    assert mask.sum() == keep and flat[mask].min() >= flat[~mask].max()


@pytest.mark.parametrize("reset", ["all", "pruned", "none"])
def test_momentum_reset_works_without_gradients(reset):
    model, optimizer, sparsifier = setup(reset=reset)
    iterate(model, optimizer, sparsifier, 0, 5)
    x, y = batch(5)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sparsifier.step()
    assert sparsifier.phase == sk.Dense()
    cleared = [not m.any() for p in model.parameters() for m in momenta(optimizer, p)]
    assert len(cleared) == len(list(model.parameters()))
    assert all(cleared) == (reset == "all")


@pytest.mark.parametrize("kind", ["masked", "sgd"])
def test_dense_phase_starts_from_zero_and_without_momentum(kind):
    """The reset comes before the first dense step, as published; neuralmagic/sparseml's, after it, would undo that."""
    model, optimizer, sparsifier = setup(kind)
    iterate(model, optimizer, sparsifier, 0, 5)
    pruned = {n: ~sparsifier.masks.bool(n) for n in sparsifier.masks}
    iterate(model, optimizer, sparsifier, 5, 6)
    assert sparsifier.phase == sk.Dense() and sparsifier.masks.density() == 1
    assert all(not sparsifier.masks.parameter(n)[p].any() for n, p in pruned.items())
    x, y = batch(6)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    want = {p: p.grad + 1e-2 * p.detach() for p in model.parameters()}
    optimizer.step()
    for p, value in want.items():
        torch.testing.assert_close(momenta(optimizer, p), [value], rtol=1e-6, atol=1e-8)
    sparsifier.step()
    assert all(momenta(optimizer, p)[0].any() for p in model.parameters())


def test_unattached_or_finalized_sparsifier_says_so():
    sparsifier = sk.ACDC(0.9, SCHEDULE)
    for method in (sparsifier.step, sparsifier.finalize, sparsifier.state_dict, lambda: sparsifier.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"is not attached: call attach"):
            method()
    model, optimizer, sparsifier = setup()
    sparsifier.finalize()
    with pytest.raises(RuntimeError, match="is not attached"):
        sparsifier.step()
    optimizer.step()
    optimizer.step()  # nothing of the sparsifier is left in the optimizer
    assert not len(optimizer.masks)


def test_second_attach_is_refused_through_wrappers_and_parts():
    model, optimizer, sparsifier = setup()
    for other in (nn.Sequential(model), torch.compile(model, backend="eager"), model[3]):
        with pytest.raises(ValueError, match="attached to it already"):
            sk.ACDC(0.9, SCHEDULE).attach(other, optimizer, verbose=False)
    fresh = network()
    masks = {fresh[0].weight: torch.ones_like(fresh[0].weight, dtype=torch.bool)}
    taken = sk.MaskedSGD(fresh.parameters(), lr=0.1, masks=masks)
    with pytest.raises(ValueError, match="optimizer: has masks already"):
        sk.ACDC(0.9, SCHEDULE).attach(fresh, taken, verbose=False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_shared_and_late_parameters(kind):
    model = network()
    model.append(nn.Linear(6, 6)).append(nn.Linear(6, 6))
    model[7].weight = model[6].weight
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = OPTIMIZERS[kind](model[:5].parameters())
    sparsifier = sk.ACDC(0.9, SCHEDULE).attach(model, optimizer, verbose=False)
    assert list(sparsifier.masks) == ["3.weight", "5.weight", "6.weight"]
    iterate(model, optimizer, sparsifier, 0, 1)
    optimizer.add_param_group({"params": list(model[5:].parameters())})
    extra = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(extra.parameters())})
    iterate(model, optimizer, sparsifier, 1, 5)
    assert torch.equal(model[0].weight, frozen) and extra.weight.all()
    for name in sparsifier.masks:
        pruned = ~sparsifier.masks.bool(name)
        parameter = sparsifier.masks.parameter(name)
        assert not parameter[pruned].any() and not any(m[pruned].any() for m in momenta(optimizer, parameter))
    assert zeros(sparsifier) == sum(int((~sparsifier.masks.bool(n)).sum()) for n in sparsifier.masks)


@pytest.mark.parametrize("reset", ["pruned", "none"])
def test_published_momentum_decays_through_a_sparse_phase(reset):
    model = network()
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, momentum_policy="decay")
    sparsifier = sk.ACDC(0.9, SCHEDULE, reset=reset).attach(model, optimizer, verbose=False)
    iterate(model, optimizer, sparsifier, 0, 3)
    pruned = ~sparsifier.masks.bool("3.weight")
    buffer = optimizer.state[model[3].weight]["momentum_buffer"]
    before = buffer[pruned].clone()
    iterate(model, optimizer, sparsifier, 3, 4)
    assert before.all() and not model[3].weight[pruned].any()
    torch.testing.assert_close(buffer[pruned], 0.9 * before)
    iterate(model, optimizer, sparsifier, 4, 6)
    assert sparsifier.phase == sk.Dense() and buffer[~pruned].any()
    assert buffer[pruned].any() == (reset == "none")


@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_block_patterns_prune_whole_blocks(pattern, distribution):
    model, optimizer, sparsifier = setup(pattern=pattern, distribution=distribution)
    iterate(model, optimizer, sparsifier, 0, 3)
    for name in sparsifier.masks:
        mask = sparsifier.masks.bool(name)
        for block in mask.split(4, dim=0 if pattern == "4x1" else 1):
            assert torch.equal(block.any(0 if pattern == "4x1" else 1), block.all(0 if pattern == "4x1" else 1))


def test_finalize_leaves_a_plain_module_with_zeros():
    model, optimizer, sparsifier = setup()
    keys = list(model.state_dict())
    iterate(model, optimizer, sparsifier, 0, 14)
    with pytest.raises(ValueError, match="is attached to it already"):
        sk.ACDC(0.9, SCHEDULE).attach(model, optimizer, verbose=False)
    assert sparsifier.finalize() is model and list(model.state_dict()) == keys
    assert zeros(sparsifier) / sum(sparsifier.masks.parameter(n).numel() for n in sparsifier.masks) > 0.899
    sk.ACDC(0.9, SCHEDULE).attach(model, optimizer, verbose=False)


def test_prints_timeline_and_layers(capsys):
    model = network()
    sk.ACDC(0.95, sk.acdc_schedule(epochs=100)).attach(model, OPTIMIZERS["sgd"](model.parameters()), steps_per_epoch=7)
    printed = capsys.readouterr().out
    assert "16 phases, 700 steps" in printed and "3.weight" in printed and "10x8x3x3" in printed


def test_bad_input_is_named():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match="sparsity"):
        sk.ACDC(1.5, SCHEDULE)
    with pytest.raises(ValueError, match="pattern must be one of"):
        sk.ACDC(0.9, SCHEDULE, pattern="8x1")
    with pytest.raises(ValueError, match="include: 'stem' matches none"):
        sk.ACDC(0.9, SCHEDULE, include=["stem"]).attach(model, optimizer)
    with pytest.raises(ValueError, match="steps_per_epoch must be given"):
        sk.ACDC(0.9, sk.acdc_schedule(epochs=100)).attach(model, optimizer)
    with pytest.raises(ValueError, match=r"include: '\(' is no regular expression"):
        sk.ACDC(0.9, SCHEDULE, include=["("])
    with pytest.raises(
        TypeError, match="exclude must be a sequence of regular expressions, got the single string 'fc'"
    ):
        sk.ACDC(0.9, SCHEDULE, exclude="fc")
    with pytest.raises(ValueError, match="schedule must end with sparse 95%, got sparse 90%"):
        sk.ACDC(0.95, SCHEDULE)
    with pytest.raises(TypeError, match="schedule must be acdc_schedule"):
        sk.ACDC(0.95, 100)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        sk.ACDC(0.9, SCHEDULE).attach(model, [])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        sk.ACDC(0.9, SCHEDULE).attach([], optimizer)
    chosen = sk.ACDC(0.9, SCHEDULE, exclude=["^0", "^5"]).attach(model, optimizer, verbose=False)
    assert list(chosen.masks) == ["3.weight"]
