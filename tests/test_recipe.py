"""Recipes: TOML round trip, overrides, and errors that name the key, what was given and what is allowed."""

import re

import pytest

import sparsekern as sk
from sparsekern import recipe
from sparsekern.recipe import Method, Model, Recipe, RecipeError


def test_shipped_recipes_resolve_and_survive_a_round_trip(tmp_path):
    assert "digits" in recipe.shipped()
    for name in recipe.shipped():
        settings = recipe.resolve(name)
        (tmp_path / "copy.toml").write_text(recipe.to_toml(settings), encoding="utf-8")
        assert recipe.resolve(str(tmp_path / "copy.toml")) == settings
        assert recipe.differences(settings, recipe.parse(recipe.to_toml(settings))) == []


def test_round_trip_of_awkward_values():
    odd = Recipe(method=Method(include=('a"b\\c\x7f\n', "ä[0-9]+", ""), sparsity=0.1 + 0.2), model=Model(width=1))
    assert recipe.parse(recipe.to_toml(odd)) == odd


def test_overrides():
    given = ["epochs=3", "optimizer.lr=1", "method.pattern=4x1", 'data.name="digits"', "method.include=['conv']",
             "optimizer.nesterov=true", "optimizer.warmup_epochs = 0", "epochs=4"]  # fmt: skip
    settings = recipe.resolve("digits", given)
    assert (settings.epochs, settings.optimizer.lr, settings.method.pattern) == (4, 1.0, "4x1")
    assert isinstance(settings.optimizer.lr, float) and settings.optimizer.nesterov is True
    assert settings.method.include == ("conv",) and settings.optimizer.warmup_epochs == 0
    plain = recipe.resolve("digits")
    assert settings.method.exclude == plain.method.exclude and settings.seed == plain.seed
    assert "epochs: 4, " in "; ".join(recipe.differences(settings, plain))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "epoch: unknown key, given 3; allowed here are ['seed', 'epochs',"),
        ("method.foo=1", "method.foo: unknown key, given 1; allowed here are ['name', 'sparsity',"),
        ("epochs.x=1", "epochs.x: unknown key; epochs is a value and has no keys"),
        ("epochs=abc", "epochs: given 'abc' (str), allowed is a whole number of at least 1"),
        ("epochs=2.0", "epochs: given 2.0 (float), allowed is a whole number"),
        ("epochs=true", "epochs: given True (bool), allowed is a whole number"),
        ("epochs=0", "epochs: given 0 (int), allowed is a whole number of at least 1"),
        ("epochs=1\nbatch=2", "epochs: given '1\\nbatch=2' (str)"),
        ("batch=1", "batch: given 1 (int), allowed is a whole number of at least 2"),
        ("method=3", "method: given 3, allowed is a table of ['name',"),
        ("method.sparsity=1.5", "method.sparsity: given 1.5 (float), allowed is a finite number from 0 to 1"),
        ("method.sparsity=-0.1", "allowed is a finite number from 0 to 1"),
        ("method.sparsity=nan", "method.sparsity: given nan (float)"),
        ("method.sparsity='0.9'", "method.sparsity: given '0.9' (str)"),
        ("optimizer.lr=inf", "optimizer.lr: given inf (float), allowed is a finite number of at least 0"),
        ("optimizer.nesterov=1", "optimizer.nesterov: given 1 (int), allowed is true or false"),
        ("method.pattern=2x2", "method.pattern: given '2x2' (str), allowed is one of ['auto', 'unstructured',"),
        ("method.include=conv", "method.include: given 'conv' (str), allowed is a list of strings"),
        ("method.include=[1]", "method.include: given [1] (list), allowed is a list of strings"),
        ("optimizer.warmup_epochs=1000", "optimizer.warmup_epochs: given 1000, allowed is a whole number from 0 to"),
        ("nothing", "override: given 'nothing', allowed is key=value"),
        ("=3", "override: given '=3', allowed is key=value"),
    ],
)
def test_errors_name_key_given_and_allowed(override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe.resolve("digits", [override])


def test_errors_in_files(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe: given 'nope', which cannot be read .* one of \['digits'"):
        recipe.resolve("nope")
    bad = tmp_path / "bad.toml"
    bad.write_text("epochs = = 3")
    with pytest.raises(RecipeError, match=r"bad\.toml: is not valid TOML: .*line 1"):
        recipe.resolve(str(bad))
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.resolve(str(bad))
    bad.write_text("[optimizer]\nlearning_rate = 1")
    with pytest.raises(RecipeError, match=r"optimizer\.learning_rate: unknown key, given 1; .* \['name', 'lr'"):
        recipe.resolve(str(bad))


def test_every_method_builds_from_a_recipe_and_options_survive():
    settings = recipe.resolve("digits", ["method.name=gmp", "method.options.initial=0.5",
                                         "method.options.layer_sparsity={first = 0.0, 'a\"b' = 0.25}"])  # fmt: skip
    assert settings.method.options == {"initial": 0.5, "layer_sparsity": {"first": 0.0, 'a"b': 0.25}}
    assert recipe.parse(recipe.to_toml(settings)) == settings
    assert recipe.differences(settings, recipe.resolve("digits", ["method.name=gmp"]))
    for name in sk.METHODS:
        assert recipe.resolve("digits", [f"method.name={name}"]).method.name == name
    with pytest.raises(RecipeError, match="method.name: given 'magic'"):
        recipe.resolve("digits", ["method.name=magic"])
    with pytest.raises(RecipeError, match="method.options: given 3"):
        recipe.resolve("digits", ["method.options=3"])
