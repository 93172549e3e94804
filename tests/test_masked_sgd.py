"""masked_sgd_ and MaskedSGD against the reference, torch.optim.SGD and hand-computed values."""

import copy
import itertools
import math

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 33, 1000, (1 << 15) + 5]
# torch itself rounds without fma below AVX2, so bit-equality with it is promised only from there on.
torch_has_fma = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def step(backend, *args, lr=0.1, mu=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, **rest):
    run = sk.ops.masked_sgd_.reference if backend == "reference" else sk.ops.masked_sgd_
    hyper = dict(lr=lr, mu=mu, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
    run(*args, **hyper, **more(args[0], rest))


def more(params, options):
    """What the operator asks for beside numbers; with two weight decays: each by random masks, but one parameter."""
    inner = []
    if "inner_decay" in options:
        g = torch.Generator().manual_seed(1)
        inner = [sk.ops.pack_mask(torch.empty_like(p).float().uniform_(generator=g) < 0.5) for p in params]
        inner[len(params) // 2] = None
    return {"momentum_policy": "mask", "inner": inner, **options}


def problem(dtype, density=0.3, sizes=SIZES, seed=0):
    """A list of parameters with gradients, momentum, packed masks and alternating `fresh`."""
    g = torch.Generator().manual_seed(seed)
    p, d, v = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(3))
    masks = [sk.ops.pack_mask(torch.rand(n, generator=g) < density) for n in sizes]
    masks[-2] = None
    return p, d, v, masks, torch.arange(len(sizes), dtype=torch.uint8) % 2


OPTIONS = [
    dict(),
    dict(mu=0.9),
    dict(mu=0.9, dampening=0.3, weight_decay=0.01),
    dict(mu=0.9, nesterov=True, weight_decay=0.01, maximize=True),
    dict(mu=0.9, momentum_policy="decay", weight_decay=0.01),
    dict(mu=0.9, momentum_policy="freeze", weight_decay=0.01, nesterov=True),
    dict(momentum_policy="freeze", weight_decay=0.1),
    dict(mu=0.9, grad_scale=torch.tensor(3.0)),
    dict(weight_decay=0.1, maximize=True, found_inf=torch.tensor(0.0)),
    dict(mu=0.9, found_inf=torch.tensor(1.0)),
    dict(mu=0.9, weight_decay=0.01, momentum_policy="freeze", inner_decay=0.5, outer_decay=0.1),
    dict(maximize=True, grad_scale=torch.tensor(3.0), inner_decay=0.0, outer_decay=0.3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_backends_agree_bit_for_bit(native, dtype, options, density):
    if not torch_has_fma:
        pytest.skip("torch has no fma on this CPU")
    got = problem(dtype, density)
    want = copy.deepcopy(got)
    step(native, *got, **options)
    step("reference", *want, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_published_values(backend):
    mask = [sk.ops.pack_mask(torch.tensor([True, False, False, True]))]

    def first(**kw):
        w, v = torch.tensor([1.0, -2, 0.5, 3], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        args = [w], [torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)], [v], mask, torch.zeros(1).byte()
        step(backend, *args, mu=0.9, weight_decay=0.01, **kw)
        return args

    close = dict(rtol=0, atol=1e-12)
    args = first()
    torch.testing.assert_close(args[0][0], torch.tensor([0.989, 0, 0, 2.957], dtype=torch.float64), **close)
    torch.testing.assert_close(args[2][0], torch.tensor([0.11, 0, 0, 0.43], dtype=torch.float64), **close)
    step(backend, *args, mu=0.9, weight_decay=0.01)
    torch.testing.assert_close(args[0][0], torch.tensor([0.968111, 0, 0, 2.875343], dtype=torch.float64), **close)
    torch.testing.assert_close(args[2][0], torch.tensor([0.20889, 0, 0, 0.81657], dtype=torch.float64), **close)
    nesterov = torch.tensor([0.9791, 0, 0, 2.9183], dtype=torch.float64)
    torch.testing.assert_close(first(nesterov=True)[0][0], nesterov, **close)


@pytest.mark.parametrize(("policy", "pruned"), [("decay", 0.45), ("mask", 0.0)])
def test_momentum_policies(backend, policy, pruned):
    w, v = torch.tensor([1.0, 0]), torch.tensor([0.5, 0.5])
    mask = sk.ops.pack_mask(torch.tensor([True, False]))
    step(backend, [w], [torch.tensor([0.0, 1])], [v], [mask], torch.zeros(1).byte(), mu=0.9, momentum_policy=policy)
    torch.testing.assert_close(v, torch.tensor([0.45, pruned]))
    torch.testing.assert_close(w, torch.tensor([0.955, 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_freeze_leaves_what_is_outside_the_mask_as_it_is(backend, dtype):
    """Whatever it is, and whatever its gradient and momentum are; the rest steps as it would alone."""
    (w, _), (g, _), (v, _), _, _ = problem(dtype, sizes=[1000, 1])
    fresh, keep = torch.zeros(1, dtype=torch.uint8), torch.arange(1000) % 3 == 0
    w[1], g[~keep], v[2] = math.nan, math.nan, math.inf
    before, alone = w.clone(), [t[keep].clone() for t in (w, g, v)]
    options = dict(mu=0.9, weight_decay=0.1)
    step(backend, [w], [g], [v], [sk.ops.pack_mask(keep)], fresh, momentum_policy="freeze", **options)
    step(backend, *([t] for t in alone), [None], fresh, **options)
    torch.testing.assert_close(w[~keep], before[~keep], rtol=0, atol=0, equal_nan=True)
    assert not v[~keep].any() and torch.equal(w[keep], alone[0]) and torch.equal(v[keep], alone[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("policy", ["mask", "decay"])
def test_bad_pruned_values_reach_nothing(backend, bad, policy):
    keep = torch.arange(37) % 3 == 0
    w = torch.where(keep, torch.ones(37), bad)
    g = torch.where(keep, torch.ones(37), bad)
    v = torch.where(keep, torch.ones(37), bad if policy == "mask" else 0.0)
    args = [w], [g], [v], [sk.ops.pack_mask(keep)], torch.zeros(1).byte()
    step(backend, *args, mu=0.9, weight_decay=0.1, momentum_policy=policy)
    assert torch.isfinite(w).all() and torch.isfinite(v).all()
    assert not w[~keep].any() and not v[~keep].any()
    assert w[keep].all()


def test_overflow_changes_nothing_and_stays_fresh(backend):
    args = problem(torch.float32)
    before = copy.deepcopy(args)
    step(backend, *args, mu=0.9, found_inf=torch.tensor(1.0))
    torch.testing.assert_close(args, before, rtol=0, atol=0)
    step(backend, *args, mu=0.9, found_inf=torch.tensor(0.0))
    assert not args[-1].any()


def test_exact_zeros_survive(backend):
    w, v = torch.zeros(40), torch.zeros(40)
    for _ in range(5):
        step(backend, [w], [torch.zeros(40)], [v], [None], torch.zeros(1).byte(), mu=0.9, weight_decay=1e-4)
    assert not w.any() and not v.any()


@pytest.mark.skipif(not torch_has_fma, reason="torch has no fma on this CPU")
def test_thread_count_does_not_matter():
    sizes, threads = [1_000_003, 3, 70_000, 65_536], torch.get_num_threads()
    want = problem(torch.float32, sizes=sizes)
    step("reference", *want, mu=0.9)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = problem(torch.float32, sizes=sizes)
            step("native", *got, mu=0.9)
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "mixed"])
def test_layouts_equal_contiguous(native, layout):
    w, g, v = torch.randn(3, 6, 4, 5, 3)
    keep = torch.rand(6, 4, 5, 3) < 0.5
    want = [t.clone() for t in (w, g, v)]
    step(native, *[[t] for t in want], [sk.ops.pack_mask(keep)], torch.zeros(1).byte(), mu=0.9)
    change = {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    if layout == "mixed":
        got = [change["channels_last"](w), g.clone(), v.clone()]
    else:
        got = [change[layout](t) for t in (w, g, v)]
    packed = sk.ops.pack_mask(torch.empty_like(got[0], dtype=torch.bool).copy_(keep))
    step(native, *[[t] for t in got], [packed], torch.zeros(1).byte(), mu=0.9)
    torch.testing.assert_close([got[0], got[2]], [want[0], want[2]], rtol=0, atol=0)


def test_two_weight_decays_by_hand(backend):
    """Inside 8 + 0.5 * 8, outside 8 + 0.25 * 8, pruned nothing, and one decay for all of the second parameter."""
    params, grads = [torch.full((4,), 8.0) for _ in range(2)], [torch.full((4,), 8.0) for _ in range(2)]
    masks, inner = ([sk.ops.pack_mask(torch.tensor(m)), None] for m in ([True, True, False, True], [True, False] * 2))
    fresh, decays = torch.zeros(2, dtype=torch.uint8), dict(weight_decay=1.0, inner_decay=0.5, outer_decay=0.25)
    run = sk.ops.masked_sgd_.reference if backend == "reference" else sk.ops.masked_sgd_
    rest = dict(mu=0.0, dampening=0.0, nesterov=False, maximize=False, momentum_policy="freeze", inner=inner)
    run(params, grads, [], masks, fresh, lr=0.25, **rest, **decays)
    assert [p.tolist() for p in params] == [[5.0, 5.5, 8.0, 5.5], [4.0] * 4]


def test_opcheck_every_sample():
    for dtype, options in itertools.product(DTYPES, OPTIONS):
        hyper = dict(lr=0.1, mu=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
        args = problem(dtype, sizes=[1, 17, 40, 3])
        torch.library.opcheck(torch.ops.sparsekern.masked_sgd_, args, {**hyper, **more(args[0], options)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5])
def test_known_zero_gives_the_same_result_and_leaves_dead_memory(native, dtype, density):
    got = problem(dtype, density)
    for p, v, m in zip(got[0], got[2], got[3], strict=True):
        if m is not None:
            p.masked_fill_(~sk.ops.unpack_mask(m, p), 0), v.masked_fill_(~sk.ops.unpack_mask(m, p), 0)
    want = copy.deepcopy(got)
    options = dict(mu=0.9, weight_decay=0.01, nesterov=True)
    step(native, *got, **options, known_zero=[True] * len(SIZES))
    step(native, *want, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if density == 0 and native != "triton":  # the promise is taken at its word; Triton does not use it
        w = torch.ones(1024, dtype=dtype)  # memory is looked at in stretches of up to so many weights
        args = [w], [w.clone()], [w.clone()], [torch.zeros(128, dtype=torch.uint8)], torch.zeros(1).byte()
        step(native, *args, mu=0.9, known_zero=[True])
        assert w.all() and args[2][0].all()
        step(native, *args, mu=0.9, known_zero=[False])
        assert not w.any() and not args[2][0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_known_zero_across_stretches_of_every_density(native, dtype):
    density = torch.tensor([0.0, 0.01, 0.6, 0.0, 0.1, 0.02, 1.0, 0.001]).repeat(4).repeat_interleave(7777)
    torch.manual_seed(0)
    keep = torch.rand(density.numel()) < density
    w, g, v = (torch.randn(density.numel(), dtype=dtype) for _ in range(3))
    w, v = w * keep, v * keep
    tensors = [w[start:].clone() for start in (0, 5000, 100_000)]  # each an own length, in one list
    masks = [sk.ops.pack_mask(keep[start:].clone()) for start in (0, 5000, 100_000)]
    got = tensors, [g[-t.numel() :].clone() for t in tensors], [v[-t.numel() :].clone() for t in tensors], masks
    got = *got, torch.zeros(3).byte()
    want = copy.deepcopy(got)
    step(native, *got, mu=0.9, weight_decay=0.01, known_zero=[True] * 3)
    step(native, *want, mu=0.9, weight_decay=0.01)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_version_counters_are_bumped():
    tensors = torch.ones(4), torch.ones(4), torch.zeros(1, dtype=torch.uint8)
    before = [t._version for t in tensors]
    step("native", [tensors[0]], [torch.ones(4)], [tensors[1]], [None], tensors[2], mu=0.9)
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))
    w = torch.randn(4, requires_grad=True)
    loss = (w * w).sum()
    step("native", [w], [torch.ones(4)], [], [None], torch.zeros(1).byte())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grads=[torch.zeros(3)]), r"grads\[0\] must be torch.float32 of shape \(4,\)"),
        (dict(grads=[]), "grads must have one entry"),
        (dict(masks=[torch.zeros(2, dtype=torch.uint8)]), r"masks\[0\] must be contiguous uint8 of shape \(1,\)"),
        (dict(fresh=torch.zeros(1)), "fresh must be contiguous uint8"),
        (dict(momentum_policy="drop"), "momentum_policy must be one of .*, got 'drop'"),
        (dict(nesterov=True, dampening=0.5), "nesterov needs"),
        (dict(grad_scale=torch.ones(2)), "grad_scale must be one float32 or float64 number in a tensor on cpu"),
        (dict(found_inf=torch.zeros(1, dtype=torch.int32)), "found_inf must be one .* got torch.int32"),
        (dict(found_inf=1.0), "found_inf must be one .* got 1.0"),
        (dict(grads=[torch.ones(4).to_sparse()]), r"grads\[0\] must be dense"),
        (dict(params=[torch.ones(4, device="meta")]), r"params\[0\] must be on cpu like fresh, got meta"),
        (dict(known_zero=[]), "known_zero must be None or hold 1 bools"),
        (dict(inner=[None, None]), "inner must have one entry for each of the 1 params, got 2"),
        (dict(inner=[torch.zeros(2).byte()]), r"inner\[0\] must be contiguous uint8 of shape \(1,\)"),
        (dict(known_zero=[True], momentum_policy="decay"), "known_zero must be None under momentum_policy 'decay'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, message):
    args = dict(params=[torch.ones(4)], grads=[torch.ones(4)], momentum=[torch.ones(4)], masks=[None])
    args = {**args, "fresh": torch.zeros(1, dtype=torch.uint8), "lr": 0.1, "mu": 0.9, **change}
    with pytest.raises(ValueError, match=message):
        sk.ops.masked_sgd_(**args)
    assert args["params"][0].is_meta or args["params"][0].eq(1).all() and args["momentum"][0].eq(1).all()
    with pytest.raises(TypeError, match=r"params\[0\] must be one of"):
        sk.ops.masked_sgd_(**{**args, "params": [torch.ones(4, dtype=torch.int32)], "grads": [torch.ones(4)],
                              "masks": [None], "fresh": torch.zeros(1).byte(), "nesterov": False,
                              "momentum_policy": "mask", "grad_scale": None, "found_inf": None,
                              "known_zero": None, "inner": ()})  # fmt: skip


def test_overlapping_memory_is_refused():
    w = torch.ones(4)
    fresh = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="overlaps the memory"):
        sk.ops.masked_sgd_([w], [w], [], None, fresh, lr=0.1)
    flat = torch.ones(7)
    with pytest.raises(ValueError, match="overlaps the memory"):
        sk.ops.masked_sgd_([flat[:4]], [w], [flat[3:]], None, fresh, lr=0.1, mu=0.9)
    bits = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"overlaps the memory of (masks|params)\[0\]"):
        sk.ops.masked_sgd_([bits.view(torch.float32)], [torch.ones(1)], [], [bits[:1]], fresh, lr=0.1)
    with pytest.raises(ValueError, match="overlaps the memory"):
        sk.ops.masked_sgd_([w], [flat[:4]], [], None, fresh, lr=0.1, found_inf=w[:1])
    with pytest.raises(ValueError, match=r"params\[0\] must have memory for each element"):
        sk.ops.masked_sgd_([w[:1].expand(4)], [flat[:4]], [], None, fresh, lr=0.1)
    assert flat.eq(1).all() and w.eq(1).all() and not bits.any()
    sk.ops.masked_sgd_([flat[:3]], [w[:3]], [flat[3:6]], None, fresh, lr=0.1, mu=0.9)
