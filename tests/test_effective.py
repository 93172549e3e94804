"""What every method with a dense store owes: the swap of forward weights, resume, copies, compile, overflow."""

import copy

import pytest
import torch
from method_helpers import setup
from method_steps import OPTIMIZERS, batch, iterate
from torch import nn

import sparsekern as sk
from sparsekern.phases import PhaseSchedule, PhaseSpan
from sparsekern.updates import UpdateSchedule

PHASES = PhaseSchedule((PhaseSpan(0, 2, sk.Dense()), PhaseSpan(2, 8, sk.Sparse(0.8))))
METHODS = {
    "topkast": lambda: sk.TopKAST(0.8, 0.5, every=2),
    "topkast-power": lambda: sk.TopKAST(0.8, 0.5, alpha=2.0),
    "srste": lambda: sk.SRSTE(),
    "st3": lambda: sk.ST3(0.8, UpdateSchedule(1, 4, 1, 8)),
    "st3-sigma": lambda: sk.ST3(0.8, UpdateSchedule(1, 4, 2, 8), sigma=True),
    "str": lambda: sk.STR(start=-3.0, decay=0.05),
    "movement": lambda: sk.Movement(0.8, UpdateSchedule(1, 3, 1, 8), momentum=0.5),
    "soft": lambda: sk.SoftMovement(UpdateSchedule(1, 3, 1, 8), threshold=0.5, penalty=1.0),
    "power": lambda: sk.Powerpropagation(1.5, PHASES),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("kind", ["masked", "adamw"])
def test_forward_is_sparse_and_the_model_sees_nothing_of_it(method, kind):
    model, optimizer, sparsifier = setup(METHODS[method], kind)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    iterate(model, optimizer, sparsifier, 0, 4)
    seen = {}
    for layer, name in ((model[0], "0.weight"), (model[5], "5.weight")):
        layer.register_forward_pre_hook(lambda m, _, name=name: seen.__setitem__(name, m.weight.detach().clone()))
    model(batch(0)[0])
    masks = sparsifier.forward_masks()
    for name, weight in seen.items():
        mask = masks.bool(name)
        assert not weight[~mask].any() and weight[mask].all() and int((~mask).sum()) > 0
        assert torch.equal(weight, sparsifier.sparse_state_dict()[name])
        assert sparsifier.masks.parameter(name).count_nonzero() > weight.count_nonzero()
    assert list(model.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[0].weight is parameters[0] and "weight" not in model[0].__dict__


@every_method
def test_finalize_leaves_a_plain_module_of_equal_output(method):
    model, optimizer, sparsifier = setup(METHODS[method])
    iterate(model, optimizer, sparsifier, 0, 5)
    model.eval()
    x = batch(9)[0]
    with torch.no_grad():
        want, averaged = model(x), sparsifier.sparse_state_dict()
        assert sparsifier.finalize() is model
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), averaged, rtol=0, atol=0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert sk.sparsity_report(model).sparsity > 0.1
    for name in sparsifier.masks:
        assert torch.equal(sparsifier.masks.parameter(name) != 0, sparsifier.masks.bool(name))


@every_method
def test_copies_made_while_attached_run_sparse(method):
    model, optimizer, sparsifier = setup(METHODS[method])
    average = torch.optim.swa_utils.AveragedModel(model)
    iterate(model, optimizer, sparsifier, 0, 4)
    average.update_parameters(model)
    model.eval(), average.eval()
    x = batch(0)[0]
    with torch.no_grad():
        average.module.load_state_dict(model.state_dict())
        torch.testing.assert_close(average(x), model(x), rtol=0, atol=0)
        state = sparsifier.sparse_state_dict(average)
    assert torch.equal(state["module.5.weight"], sparsifier.sparse_state_dict()["5.weight"])
    with pytest.raises(TypeError, match="cannot be pickled while a sparsifier is attached"):
        torch.save(model, "/dev/null")


@every_method
def test_accelerate_keeps_the_results(method):
    def run(fast):
        model, optimizer, sparsifier = setup(METHODS[method])
        if fast:
            sk.nn.accelerate(model, sparsifier, lambda *_: True)
        iterate(model, optimizer, sparsifier, 0, 4)
        return model.state_dict()

    torch.testing.assert_close(run(True), run(False))


@every_method
def test_exceptions_leave_the_stored_weight_and_closures_are_refused(method):
    model, optimizer, sparsifier = setup(METHODS[method])
    iterate(model, optimizer, sparsifier, 0, 3)
    with pytest.raises(RuntimeError):
        model[5](torch.zeros(2, 3))
    assert "weight" not in model[5].__dict__ and isinstance(model[5].weight, nn.Parameter)
    if method == "power":  # reads no gradient before the step
        return optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(lambda: None)


def test_attention_that_never_calls_its_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match=r"exclude: must cover 1.self_attn.out_proj.weight"):
        sk.TopKAST(0.8, 0.5).attach(model, optimizer)
    sk.TopKAST(0.8, 0.5, exclude=["out_proj"]).attach(model, optimizer, verbose=False)
