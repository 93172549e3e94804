"""masked_adamw_ and MaskedAdamW against the reference, torch.optim.AdamW and values computed by hand."""

import copy
import pickle

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 33, 1000, (1 << 15) + 5]
# torch itself rounds without fma below AVX2, so bit-equality with it is promised only from there on.
torch_has_fma = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")
HYPER = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False)


def step(backend, *args, **hyper):
    run = sk.ops.masked_adamw_.reference if backend == "reference" else sk.ops.masked_adamw_
    run(*args, **{**HYPER, **hyper})


def problem(dtype, density=0.3, sizes=SIZES, seed=0):
    """Parameters with gradients, both moments, packed masks and step counts of their own."""
    g = torch.Generator().manual_seed(seed)
    p, d, m, v = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(4))
    masks = [sk.ops.pack_mask(torch.rand(n, generator=g) < density) for n in sizes]
    masks[-2] = None
    return p, d, m, [x.abs() for x in v], masks, torch.arange(len(sizes), dtype=torch.float32)


OPTIONS = [
    dict(),
    dict(weight_decay=0.0, maximize=True),
    dict(beta1=0.3, beta2=0.5, eps=0.1),
    dict(beta1=0.0, beta2=0.0, eps=0.1),
    dict(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0)),
    dict(found_inf=torch.tensor(1.0)),
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
    # The reference has torch's float64 roots, which may be one unit in the last place wrong.
    near = dict(rtol=1e-14, atol=1e-14) if dtype == torch.float64 else dict(rtol=0, atol=0)
    torch.testing.assert_close(got[0], want[0], **near)
    torch.testing.assert_close(got[1:], want[1:], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_instruction_sets_agree_in_float64(options):
    before, results = torch.ops.sparsekern.cpu_isa(), []
    try:
        for isa in ("scalar", "avx2", "avx512"):
            torch.ops.sparsekern.set_cpu_isa(isa)
            args = problem(torch.float64)
            step("native", *args, **options)
            results.append(args)
    finally:
        torch.ops.sparsekern.set_cpu_isa(before)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_values_computed_by_hand(backend):
    w, g, m, v = ([torch.tensor(x, dtype=torch.float64)] for x in ([1.0, 2], [0.5, 9], [0.2, 9], [0.04, 9]))
    mask = [sk.ops.pack_mask(torch.tensor([True, False]))]
    step(backend, w, g, m, v, mask, torch.ones(1), lr=0.1, beta1=0.9, beta2=0.99, eps=0.0)
    # m = .9 * .2 + .1 * .5, v = .99 * .04 + .01 * .25; corrected by 1 - .81 and 1 - .9801.
    expected = 1 * (1 - 0.1 * 0.1) - 0.1 * (0.23 / 0.19) / (0.0421 / 0.0199) ** 0.5
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(w[0], torch.tensor([expected, 0], dtype=torch.float64), **close)
    torch.testing.assert_close(m[0], torch.tensor([0.23, 0], dtype=torch.float64), **close)
    torch.testing.assert_close(v[0], torch.tensor([0.0421, 0], dtype=torch.float64), **close)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_bad_pruned_values_reach_nothing(backend, bad, eps):
    keep = torch.arange(37) % 3 == 0
    tensors = [torch.where(keep, torch.ones(37), bad) for _ in range(4)]
    step(backend, *[[t] for t in tensors], [sk.ops.pack_mask(keep)], torch.zeros(1), eps=eps)
    for i in (0, 2, 3):
        assert torch.isfinite(tensors[i]).all() and not tensors[i][~keep].any() and tensors[i][keep].all()


def test_overflow_changes_nothing_and_is_not_counted(backend):
    args = problem(torch.float32)
    before = copy.deepcopy(args)
    step(backend, *args, found_inf=torch.tensor(1.0))
    torch.testing.assert_close(args, before, rtol=0, atol=0)
    step(backend, *args, found_inf=torch.tensor(0.0))
    torch.testing.assert_close(args[-1], before[-1] + 1, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5])
def test_known_zero_gives_the_same_result(native, dtype, density):
    got = problem(dtype, density, [*SIZES, 150_001])
    for *tensors, mask in zip(got[0], got[2], got[3], got[4], strict=True):
        if mask is not None:
            for t in tensors:
                t.masked_fill_(~sk.ops.unpack_mask(mask, t), 0)
    want = copy.deepcopy(got)
    step(native, *got, known_zero=[True] * len(got[0]))
    step(native, *want)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_thread_count_does_not_matter():
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        args = problem(torch.float32, sizes=[200_000, 3, 70_000, 65_536])
        step("native", *args)
        results.append(args)
    torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts_equal_contiguous(native, layout):
    tensors = torch.rand(4, 6, 4, 5, 3)
    keep = torch.rand(6, 4, 5, 3) < 0.5
    want = [t.clone() for t in tensors]
    step(native, *[[t] for t in want], [sk.ops.pack_mask(keep)], torch.zeros(1))
    change = {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    got = [change[layout](t) for t in tensors]
    packed = sk.ops.pack_mask(torch.empty_like(got[0], dtype=torch.bool).copy_(keep))
    step(native, *[[t] for t in got], [packed], torch.zeros(1))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_opcheck_every_sample():
    for dtype, options in [*((dtype, {}) for dtype in DTYPES[1:]), *((torch.float32, o) for o in OPTIONS[3:])]:
        args = problem(dtype, sizes=[1, 17, 40, 3])
        torch.library.opcheck(torch.ops.sparsekern.masked_adamw_, args, {**HYPER, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(exp_avg=[torch.zeros(3)]), r"exp_avg\[0\] must be torch.float32 of shape \(4,\)"),
        (dict(exp_avg_sq=[]), "exp_avg_sq must have one entry"),
        (dict(steps=torch.zeros(1, dtype=torch.uint8)), r"steps must be contiguous float32 of shape \(1,\)"),
        (dict(beta1=1.0), "beta1 must be at least 0 and less than 1, got 1.0"),
        (dict(known_zero=[]), "known_zero must be None or hold 1 bools"),
        (dict(grads="params"), r"overlaps the memory"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, message):
    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    args = {name: [torch.ones(4)] for name in names} | dict(masks=[None], steps=torch.zeros(1), lr=0.1)
    change = {k: args[v] if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        sk.ops.masked_adamw_(**{**args, **change})
    assert all(args[name][0].eq(1).all() for name in names) and not args["steps"].any()


def train(make, dtype, steps=5):
    torch.manual_seed(0)
    params = [torch.randn(n, dtype=dtype).requires_grad_() for n in [(3, 5), (17,), (33, 40)]]
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i in range(steps):
        for j, p in enumerate(params):
            p.grad = None if (i, j) == (2, 1) else torch.randn(p.shape, dtype=dtype)  # counts then differ
        optimizer.step()
        scheduler.step()
    return params, optimizer


HYPERS = [dict(), dict(lr=0.1, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.0), dict(maximize=True, betas=(0.2, 0.9))]


def states(params, optimizer):
    """Weights, first moments and second moments, each flat over all parameters."""
    kinds = [params, *([optimizer.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))]
    return [[t.detach().flatten() for t in each] for each in kinds]


@pytest.mark.skipif(not torch_has_fma, reason="torch has no fma on this CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_optimizer_equals_torch_fused_without_masks(native, dtype, hyper):
    got = states(*train(lambda p: sk.MaskedAdamW(p, **hyper), dtype))
    want = states(*train(lambda p: torch.optim.AdamW(p, **hyper, fused=True), dtype))
    near = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 1e-2)
    for mine, theirs in zip(sum(got, []), sum(want, []), strict=True):
        whole = mine.numel() // 32 * 32  # torch rounds what is left after its last vector in another way
        torch.testing.assert_close(mine[:whole], theirs[:whole], rtol=0, atol=0)
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)


@pytest.mark.skipif(not torch_has_fma, reason="torch has no fma on this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_optimizer_agrees_with_torch_default_without_masks(native, dtype, hyper):
    got, ours = train(lambda p: sk.MaskedAdamW(p, **hyper), dtype)
    want, theirs = train(lambda p: torch.optim.AdamW(p, **hyper, foreach=False), dtype)
    near = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got, want, rtol=near, atol=near)
    mine, other = ours.state_dict(), theirs.state_dict()
    torch.testing.assert_close(mine["state"], other["state"], rtol=0, atol=0)
    assert mine["param_groups"][0].keys() == other["param_groups"][0].keys()


@pytest.mark.parametrize("way", ["ours to torch", "torch to ours", "pickle"])
def test_checkpoints_go_both_ways(way):
    params, optimizer = train(sk.MaskedAdamW if way != "torch to ours" else torch.optim.AdamW, torch.float32)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(optimizer))
    else:
        clones = [p.detach().clone().requires_grad_() for p in params]
        again = (torch.optim.AdamW if way == "ours to torch" else sk.MaskedAdamW)(clones)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, again):
        for p in o.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        o.step()
    torch.testing.assert_close(again.param_groups[0]["params"], params, rtol=1e-6, atol=1e-6)
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 5, 6]


def test_pruned_entries_stay_zero_and_bad_options_are_refused():
    w = torch.randn(64, 64).requires_grad_()
    keep = torch.rand(64, 64) < 0.05
    optimizer = sk.MaskedAdamW([w], masks={w: keep})
    for i in range(4):
        w.grad = torch.ones_like(w)
        if i == 2:  # seen by autograd's counters, so that no dead memory is skipped
            optimizer.state[w]["exp_avg"].add_(1)
        optimizer.step()
        state = optimizer.state[w]
        assert not any(t[~keep].any() for t in (w, state["exp_avg"], state["exp_avg_sq"])) and w[keep].all()
    for options in (dict(amsgrad=True), dict(capturable=True), dict(differentiable=True), dict(betas=(0.9, 1.0))):
        with pytest.raises(ValueError, match=next(iter(options))):
            sk.MaskedAdamW([w], **options)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.step()
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        sk.MaskedAdamW([w], eps=-1)


def test_grad_scaler_skips_a_step():
    w = torch.ones(40).requires_grad_()
    optimizer = sk.MaskedAdamW([w])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    w.grad = torch.full((40,), float("inf"))
    optimizer.step()
    assert w.eq(1).all() and float(optimizer.state[w]["step"]) == 0
    w.grad, optimizer.found_inf = torch.full((40,), 6.0), torch.tensor(0.0)
    optimizer.step()
    other = torch.ones(40).requires_grad_()
    other.grad = torch.full((40,), 3.0)
    torch.optim.AdamW([other], foreach=False).step()
    torch.testing.assert_close(w, other)
