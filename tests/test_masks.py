"""MaskSet: packing follows storage, files follow row-major order, errors name what is wrong."""

import copy

import pytest
import torch

import sparsekern as sk


def make():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3)
    masks = sk.MaskSet({"module._orig_mod.weight": conv.weight})
    keep = torch.rand(conv.weight.shape) < 0.4
    masks.set("weight", keep)
    return conv, masks, keep


def test_all_ones_at_first():
    assert sk.MaskSet({"w": torch.zeros(3, 5)}).bool("w").all()
    assert sk.MaskSet({}).density() == 1.0


def test_apply_density_and_names():
    conv, masks, keep = make()
    conv.weight.data[~keep] = float("nan")
    masks.apply()
    assert not conv.weight[~keep].any() and torch.isfinite(conv.weight).all() and conv.weight[keep].all()
    assert list(masks) == ["weight"]
    assert masks.density() == masks.density("module.weight") == int(keep.sum()) / keep.numel()
    assert sk.MaskSet.from_zeros(conv).bool("weight").equal(keep)


def test_memory_format_change_repacks_and_hash_stays():
    conv, masks, keep = make()
    before = masks.hash()
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    assert torch.equal(masks.bool("weight"), keep) and masks.hash() == before
    assert torch.equal(masks.packed("weight"), sk.ops.pack_mask(keep.to(memory_format=torch.channels_last)))
    optimizer = sk.MaskedSGD([conv.weight], lr=0.1, momentum=0.9, masks=masks)
    conv.weight.grad = torch.ones_like(conv.weight)
    optimizer.step()
    assert not conv.weight[~keep].any() and conv.weight[keep].all()


def test_overlap():
    a, b = (sk.MaskSet({"w": torch.zeros(4)}) for _ in range(2))
    a.set("w", torch.tensor([True, True, False, False]))
    b.set("w", torch.tensor([True, False, True, False]))
    assert a.overlap(b) == pytest.approx(1 / 3)
    for masks in (a, b):
        masks.set("w", torch.zeros(4, dtype=torch.bool))
    assert a.overlap(b) == 1.0
    with pytest.raises(ValueError, match="must mask the same parameters"):
        a.overlap(sk.MaskSet({}))


def test_change_is_what_different_counts_do_not_explain():
    a, b = (sk.MaskSet({"w": torch.zeros(8)}) for _ in range(2))
    for live_of_a, live_of_b, change in [("11110000", "11110000", 0), ("11110000", "11001100", 4 / 8),
                                         ("11110000", "11000000", 0), ("11110000", "11000001", 2 / 8)]:  # fmt: skip
        for masks, live in ((a, live_of_a), (b, live_of_b)):
            masks.set("w", torch.tensor([bit == "1" for bit in live]))
        assert a.change(b) == b.change(a) == change
    with pytest.raises(ValueError, match="must mask the same parameters"):
        a.change(sk.MaskSet({}))


def test_state_round_trip_and_bad_state_changes_nothing():
    _, masks, _ = make()
    state = copy.deepcopy(masks.state_dict())
    _, other, _ = make()
    other.set("weight", torch.ones(6, 3, 3, 3, dtype=torch.bool))
    full = other.hash()
    state["weight"]["shape"] = (6, 3, 9)
    with pytest.raises(ValueError, match="must be of shape"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="must hold the parameters"):
        other.load_state_dict({})
    assert other.hash() == full
    other.load_state_dict(masks.state_dict())
    assert other.hash() == masks.hash() != full


def test_bad_input():
    _, masks, _ = make()
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(6, 3, 3, 3\) for 'weight'"):
        masks.set("weight", torch.ones(6))
    with pytest.raises(KeyError, match="known are"):
        masks.bool("bias")
    with pytest.raises(TypeError, match="must be a tensor, got int"):
        sk.MaskSet({"w": 3})
    with pytest.raises(ValueError, match="both become 'w'"):
        sk.MaskSet({"w": torch.ones(1), "module.w": torch.ones(1)})
