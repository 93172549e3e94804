"""The examples of the README run as they stand there, and what it tells of the command line is so."""

import re
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern import recipe

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run(capsys):
    drop_in, masks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(drop_in.splitlines()) <= 15, "the drop-in example has at most 15 lines"
    names: dict = {}
    exec(compile(drop_in, "README.md", "exec"), names)
    model, weights = names["model"], [names["model"][i].weight for i in (0, 2)]
    assert sum(int(w.count_nonzero()) for w in weights) == sk.keep_count(sum(w.numel() for w in weights), 0.95)
    assert type(model[0]) is torch.nn.Linear and "sparse 95%" in capsys.readouterr().out
    exec(compile(masks, "README.md", "exec"), {})


def test_recipe_arguments_are_valid():
    lines = re.findall(r"sparsekern train (\w+)(?![-.\w])(?: --name \w+)?((?: [\w.]+=[\w.-]+)*)", README)
    assert len(lines) >= 2
    for name, overrides in lines:
        recipe.resolve(name, overrides.split())
