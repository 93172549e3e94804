"""Pruned entries of MaskedSGD stay zero, whoever else writes; memory that is known to be zero is left alone."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from benchmarks import machine


def pruned_weight():
    torch.manual_seed(0)
    w = torch.randn(64, 64).requires_grad_()
    keep = torch.zeros(64, 64, dtype=torch.bool)
    keep[::7] = torch.rand(10, 64) < 0.3
    optimizer = sk.MaskedSGD([w], lr=0.1, momentum=0.9, masks=sk.MaskSet({"w": w}))
    optimizer.masks.set("w", keep)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        optimizer.step()
    return w, keep, optimizer


@pytest.mark.parametrize(
    "write",
    ["weight", "momentum", "load", "mask", "masks", "data and set_masks", "new data", "transposed", "state", "alias"]
    + ["found_inf"],
)
def test_pruned_entries_written_from_outside_become_zero_again(write):
    w, keep, optimizer = pruned_weight()
    buffer = optimizer.state[w]["momentum_buffer"]
    assert not w[~keep].any() and not buffer[~keep].any() and w[keep].all()
    with torch.no_grad():
        if write == "weight":
            w.fill_(float("nan"))
            w.masked_fill_(keep, 1)
        elif write == "momentum":
            buffer.add_(1)
        elif write == "load":
            torch.nn.ParameterList([w]).load_state_dict({"0": torch.ones(64, 64)})
        elif write == "mask":
            keep = keep.roll(1, 0)
            optimizer.masks.set("w", keep)
        elif write == "masks":
            keep = keep.roll(1, 0)
            optimizer.set_masks({w: keep})
        elif write == "data and set_masks":
            w.data.fill_(1)
            optimizer.set_masks(optimizer.masks)
        elif write == "new data":
            w.data = torch.ones(64, 64)
        elif write == "transposed":
            w.data = w.data.t()  # same address
        elif write == "state":
            optimizer.state[w]["momentum_buffer"] = torch.ones(64, 64)
        elif write == "alias":
            optimizer.state[w]["momentum_buffer"] = buffer.data.add_(1)  # same memory, a counter of its own
        elif write == "found_inf":
            w.fill_(1)
            optimizer.found_inf = torch.ones(())
            w.grad = torch.ones_like(w)
            optimizer.step()
            assert w.eq(1).all()
            del optimizer.found_inf
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert not w[~keep].any() and not optimizer.state[w]["momentum_buffer"][~keep].any()


def test_dead_memory_is_left_alone_once_it_is_zero(monkeypatch):
    import sparsekern.masked_optimizer as implementation

    seen = []
    original = implementation.launch
    monkeypatch.setattr(implementation, "launch", lambda *a, **k: (seen.append(k["known_zero"]), original(*a, **k))[1])
    _, _, optimizer = pruned_weight()
    assert seen == [[], [1], [1]]
    optimizer.momentum_policy = "decay"
    optimizer.step()
    assert seen[-1] == []


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_keep_masks(way):
    w, keep, optimizer = pruned_weight()
    again = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
    (clone,) = again.param_groups[0]["params"]
    assert clone is not w
    for p, o in ((w, optimizer), (clone, again)):
        p.grad = torch.ones_like(p)
        o.step()
    torch.testing.assert_close(clone, w, rtol=0, atol=0)
    assert not clone[~keep].any()


@pytest.mark.skipif(bool(sk.degradation) or not sys.platform.startswith("linux"), reason="needs the library and Linux")
def test_new_state_lies_in_huge_pages_where_there_are_any():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    torch.use_deterministic_algorithms(False)  # which would fill the memory before it is advised
    w = torch.zeros(8 << 20).requires_grad_()  # 32 MiB
    w.grad = torch.zeros_like(w)
    optimizer = sk.MaskedSGD([w], momentum=0.9)
    before = machine.huge_pages_mib()
    optimizer.step()
    # How many the system has left is not ours to say: 12 MiB were seen, and unasked it gives none.
    given = machine.huge_pages_mib() - before
    assert given > 0 and not optimizer.state[w]["momentum_buffer"].any()


@pytest.mark.parametrize("make", [sk.MaskedSGD, sk.MaskedAdamW])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
def test_packed_values_train_as_the_dense_weight_does(make, pattern):
    torch.manual_seed(0)
    x, y, weight = torch.randn(40, 24), torch.randn(40, 32), torch.randn(32, 24)
    keep = torch.rand(8 if pattern == "4x1" else 32, 6 if pattern == "1x4" else 24) < 0.2
    keep = keep.repeat_interleave(32 // keep.shape[0], 0).repeat_interleave(24 // keep.shape[1], 1)
    structure = sk.ops.sparse_structure(keep, pattern)
    dense, packed = weight.clone().requires_grad_(), structure.pack(weight).clone().requires_grad_()
    hyper = dict(lr=0.1, weight_decay=0.1, **({"momentum": 0.9} if make is sk.MaskedSGD else {}))
    for w, masks in ((dense, {dense: keep}), (packed, None)):
        optimizer = make([w], **hyper, masks=masks)
        for _ in range(4):
            optimizer.zero_grad()
            (sk.ops.sparse_linear(x, w, structure) - y).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(packed, structure.pack(dense.detach()), rtol=0, atol=0)
    assert not dense[~keep].any()
