"""Methods by name: each builds, ends where it was asked to, and refuses patterns that make no sense for it."""

import pytest
import torch
from every_method import ready
from method_steps import iterate, network

import sparsekern as sk

EXAMPLES = ("unstructured", "4x1", "1x4", "block4", "2:4")
# First and last layer by rules of their own; for n:m the short groups at the end of a row.
SHIFTED = {"extended-gmp", "sr-ste", "step"}


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


def test_names_that_share_a_class_differ_in_what_the_paper_says():
    build = lambda name, **options: sk.build_method(name, 0.9, epochs=64, steps_per_epoch=10, **options)  # noqa: E731
    assert build("gmp").allocation.layer_sparsity == {}
    assert build("extended-gmp").allocation.layer_sparsity == {"first": 0.0, "last": 0.8}
    assert [build(name).sigma for name in ("st3", "st3-sigma")] == [False, True]
    assert [build(name).alpha for name in ("topkast", "powerpropagation-topkast")] == [1.0, 2.0]
    assert build("topkast").backward_sparsity == 0.8
    assert build("powerpropagation")._schedule.edges == (500,)  # 25/32 of 640 steps
    assert build("granet").initial == 0.5 and build("obert").initial == 0.7
    assert sk.build_method("obert", 0.6, epochs=64, steps_per_epoch=10).initial == 0.6
    assert [len(build("acdc", rule=rule)._schedule.phase_list()) for rule in ("reference", "proportional")] == [8, 16]
    assert build("step").total_steps == 640 and build("sr-ste").pattern == "1:10"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "magic"}, "name must be one of"),
        ({"sparsity": 1.5}, "sparsity must be a number from 0"),
        ({"epochs": 0}, "epochs must be a finite number"),
        ({"name": "powerpropagation", "epochs": 1, "steps_per_epoch": 1}, "must be at least 2 steps, one dense"),
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
