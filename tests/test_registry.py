"""Methods by name: each builds, ends where it was asked to, and refuses patterns that make no sense for it."""

import copy

import pytest
import torch
from method_steps import OPTIMIZERS, iterate, network

import sparsekern as sk

EXAMPLES = ("unstructured", "4x1", "1x4", "block4", "2:4")
# First and last layer by rules of their own; for n:m the short groups at the end of a row.
SHIFTED = {"extended-gmp", "sr-ste", "step"}


def ready(name, model):
    """The optimizer, and what a method needs to find in a model or among its arguments."""
    entry = sk.METHODS[name]
    options = {"initial": copy.deepcopy(model.state_dict())} if name == "lottery-ticket" else {}
    if entry.start == "sparse":
        with torch.no_grad():
            model[3].weight[0] = 0
    optimizer = torch.optim.Adam if entry.optimizer == "adam" else OPTIMIZERS["masked"]
    return optimizer(model.parameters()), options


@pytest.mark.parametrize("name", sk.METHODS)
def test_every_method_builds_and_ends_at_its_sparsity(name, capsys):
    model, entry = network(), sk.METHODS[name]
    optimizer, options = ready(name, model)
    sparsifier = sk.build_method(name, 0.9, epochs=4, steps_per_epoch=3, **options)
    assert type(sparsifier) is entry.cls
    sparsifier.attach(model, optimizer, 3)
    printed = capsys.readouterr().out
    assert sparsifier.timeline() in printed and "prunable weight" in printed
    iterate(model, optimizer, sparsifier, 0, 12)
    weights = [sparsifier.masks.parameter(n) for n in sparsifier.masks]
    sparsifier.finalize()
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    if entry.exact and entry.patterns and name not in SHIFTED:
        assert total - zeros == pytest.approx(sk.keep_count(total, 0.9), abs=1)
    assert (zeros > 0) == (name not in ("dense", "str"))


@pytest.mark.parametrize("name", sk.METHODS)
@pytest.mark.parametrize("pattern", EXAMPLES)
def test_patterns_are_taken_or_refused(name, pattern):
    model, entry = network(), sk.METHODS[name]
    optimizer, options = ready(name, model)
    build = lambda: sk.build_method(name, 0.5, epochs=4, steps_per_epoch=3, pattern=pattern, **options)  # noqa: E731
    if pattern not in entry.patterns and not (pattern == "2:4" and "n:m" in entry.patterns):
        with pytest.raises(ValueError, match=f"pattern must be .* for {name}"):
            build()
        if entry.patterns:  # the class itself says no as well
            with pytest.raises(ValueError, match="pattern"):
                entry.make(0.5, sk.methods.registry.Length(4, 3), pattern=pattern, **options)
        return
    sparsifier = build().attach(model, optimizer, 3, verbose=False)
    iterate(model, optimizer, sparsifier, 0, 12)
    sparsifier.finalize()
    axis = {"4x1": 0, "1x4": 1, "block4": 1}.get(pattern)
    for mask in (sparsifier.masks.bool(n) for n in sparsifier.masks):
        if axis is not None:
            assert all(torch.equal(b.any(axis), b.all(axis)) for b in mask.split(4, axis))
        elif pattern == "2:4":
            assert all(bool((b.sum(1) == min(2, b.shape[1])).all()) for b in mask.split(4, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "magic"}, "name must be one of"),
        ({"sparsity": 1.5}, "sparsity must be a number from 0"),
        ({"epochs": 0}, "epochs must be a finite number"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1"),
        ({"name": "sr-ste", "sparsity": 1.0}, "sparsity must be below 1 for sr-ste"),
        ({"name": "sr-ste", "sparsity": 0.9, "pattern": "2:4"}, "sparsity must be 0.5 or left out"),
        ({"include": ["("]}, "include: '\\(' is no regular expression"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {"name": "acdc", "sparsity": 0.9, "epochs": 4, "steps_per_epoch": 3, **change}
    with pytest.raises(ValueError, match=words):
        sk.build_method(arguments.pop("name"), arguments.pop("sparsity"), **arguments)
