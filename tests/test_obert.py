"""oBERT: the inverse Fisher against a dense one, scores, compensation, counts, resume."""

import pytest
import torch
from method_helpers import check_zero, setup
from method_steps import OPTIMIZERS, iterate, network
from torch import nn

import sparsekern as sk
from sparsekern.methods.fisher import InverseFisher
from sparsekern.updates import UpdateSchedule

SCHEDULE = UpdateSchedule(3, 9, 3, 12)


def make(pattern="unstructured", **kwargs):
    return lambda: sk.OBERT(0.8, SCHEDULE, initial=0.4, damp=1e-3, pattern=pattern, fisher_block=8, **kwargs)


def dense_order(weight, group):
    """Indices of a weight's entries in the order of `InverseFisher.split`, -1 where it is padded."""
    index = torch.arange(weight.numel()).view(weight.shape).movedim(1, -1)
    return nn.functional.pad(index, (0, -index.shape[-1] % group), value=-1).flatten().tolist()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("shape", [(2, 4), (3, 6), (2, 3, 2, 1)])
def test_inverse_scores_and_compensation_equal_a_dense_computation(group, shape):
    g = torch.Generator().manual_seed(0)
    weight, samples = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(5)]
    block, damp = 8, 1e-2
    fisher = InverseFisher(weight, block, group, damp, len(samples))
    for sample in samples:
        fisher.add(sample)
    order = dense_order(weight, group)
    order += [-1] * (-len(order) % block)
    pick = lambda t: torch.tensor([0.0 if i < 0 else float(t.flatten()[i]) for i in order]).double()  # noqa: E731
    pruned = torch.rand(shape, generator=g) < 0.3
    if group == 4:
        pruned[:] = False
        pruned[1, :4] = True
    scores, moved = torch.zeros(len(order)).double(), torch.zeros(len(order)).double()
    for b in range(0, len(order), block):
        w = pick(weight)[b : b + block]
        rows = torch.stack([pick(s)[b : b + block] for s in samples])
        inverse = torch.linalg.inv(damp * torch.eye(block).double() + rows.T @ rows / len(samples))
        for q in range(0, block, group):
            part = slice(q, q + group)
            solved = torch.linalg.solve(inverse[part, part], w[part])
            scores[b + q : b + q + group] = 0.5 * w[part] @ solved
            if pick(pruned)[b:][part].any():
                moved[b : b + block] -= inverse[:, part] @ solved
    real = torch.tensor([i for i in order if i >= 0])
    live = torch.tensor([i >= 0 for i in order])
    for got, want in ((fisher.scores(weight), scores), (fisher.compensation(weight, pruned), moved)):
        torch.testing.assert_close(got.flatten()[real].double(), want[live], rtol=1e-3, atol=1e-4)


def test_compensation_of_one_weight_makes_it_zero_and_keeps_the_quadratic_least():
    weight = torch.tensor([[1.0, -2, 3, 0.5]])
    fisher = InverseFisher(weight, 4, 1, 0.1, 3)
    for i in range(3):
        fisher.add(torch.randn(1, 4, generator=torch.Generator().manual_seed(i)))
    pruned = torch.tensor([[False, False, False, True]])
    moved = fisher.compensation(weight, pruned)
    torch.testing.assert_close((weight + moved)[pruned], torch.zeros(1), rtol=0, atol=1e-5)
    # The cost 1/2 d^T F d of that move is the score, and any other move to zero costs more.
    hessian = torch.linalg.inv(fisher.inverse[0])
    cost = lambda d: 0.5 * d.flatten() @ hessian @ d.flatten()  # noqa: E731
    torch.testing.assert_close(cost(moved), fisher.scores(weight)[0, 3], rtol=1e-3, atol=1e-5)
    assert cost(moved + torch.tensor([[0.1, 0, 0, 0]])) > cost(moved)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
def test_prunes_by_the_curve_nested_and_zero(kind, pattern):
    model, optimizer, sparsifier = setup(make(pattern), kind)
    before, counts = None, []
    for i in range(12):
        iterate(model, optimizer, sparsifier, i, i + 1)
        check_zero(optimizer, sparsifier)
        masks = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
        assert before is None or not any((masks[n] & ~before[n]).any() for n in masks)
        before = masks
        heads = [m if pattern == "unstructured" else m[:, ::4] for m in masks.values()]
        counts.append(sum(int(h.sum()) for h in heads))
        if pattern == "1x4":
            assert all(torch.equal(b.any(1), b.all(1)) for m in masks.values() for b in m.split(4, 1))
    groups = sum(h.numel() for h in heads)
    curve = [0.4 + 0.4 * (1 - (1 - k / 2) ** 3) for k in range(3)]
    want = [groups] * 2 + [k for s in curve for k in [sk.keep_count(groups, s)] * 3] + [counts[-1]]
    assert counts == want and counts[-1] == sk.keep_count(groups, 0.8)


@pytest.mark.parametrize("window", [2, 3])
def test_updates_by_hand(window):
    """Updates at steps 3 and 6 of one layer: scores of the dense computation choose, and the others move."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = make(gradients=window)().attach(model, optimizer, verbose=False)
    rows = [torch.randn(1, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    mask = torch.ones(8).bool()
    for i, row in enumerate(rows):
        before = model.weight.detach() - 0.1 * row
        model.weight.grad = row.clone()
        optimizer.step()
        sparsifier.step()
        if i not in (2, 5):
            continue
        # The last gradients of live weights.
        stack = torch.cat(rows[i + 1 - window : i + 1]).double() * mask
        inverse = torch.linalg.inv(1e-3 * torch.eye(8).double() + stack.T @ stack / window)
        w = before[0].double() * mask
        scores = torch.where(mask, 0.5 * w**2 / inverse.diagonal(), float("inf"))
        gone = scores.argsort()[:3]
        mask = mask.index_fill(0, gone, False)
        assert torch.equal(sparsifier.masks.bool("weight")[0], mask)
        want = w - sum(inverse[:, q] * w[q] / inverse[q, q] for q in gone)
        torch.testing.assert_close(model.weight.detach()[0].double(), want * mask, rtol=1e-3, atol=1e-4)


def test_a_pruned_weight_never_returns_not_even_in_a_tie():
    model, optimizer, sparsifier = setup(make())
    iterate(model, optimizer, sparsifier, 0, 3)
    before = {n: sparsifier.masks.bool(n) for n in sparsifier.masks}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_(), optimizer.state[p].clear()
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sparsifier.step()
    assert sparsifier.updates == 2 and all((sparsifier.masks.bool(n) <= before[n]).all() for n in before)


def test_bad_input_is_named():
    for pattern in ("4x1", "2:4"):
        with pytest.raises(ValueError, match="pattern must be 'unstructured', '1x4' or 'block4' for oBERT"):
            sk.OBERT(0.9, SCHEDULE, pattern=pattern)
    for change, words in [
        ({"gradients": 0}, "gradients must be a whole number"),
        ({"damp": 0.0}, "damp must be greater than 0"),
        ({"pattern": "block4", "fisher_block": 50}, "fisher_block must be a multiple of 4"),
        ({"initial": 0.95}, "initial must be at most sparsity"),
    ]:
        with pytest.raises(ValueError, match=words):
            sk.OBERT(0.9, SCHEDULE, **change)
    with pytest.raises(ValueError, match="its first update must come after at least one step"):
        model = network()
        sk.OBERT(0.9, UpdateSchedule(0, 4, 2, 8)).attach(model, OPTIMIZERS["sgd"](model.parameters()))
    published = sk.OBERT(0.9, sk.update_schedule(total_steps=300))
    model = network()
    published.attach(model, OPTIMIZERS["sgd"](model.parameters()), verbose=False)
    assert list(published.schedule.steps()) == [20, 60, 100, 140, 180, 220, 260]
    short = setup(lambda: sk.OBERT(0.9, sk.update_schedule(total_steps=3)))[2]
    assert list(short.schedule.steps()) == [1, 2, 3]
