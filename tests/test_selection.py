"""Which weights a method prunes."""

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sparsekern.methods.selection import prunable_weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)


def network():
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 4, 3), "body": nn.ModuleList([Block(), Block()]), "volume": nn.Conv3d(2, 2, 1),
         "words": nn.Embedding(8, 4), "normed": weight_norm(nn.Linear(4, 4)), "tied": nn.Linear(4, 8),
         "frozen": nn.Linear(4, 4), "fc": nn.Linear(4, 8)}
    )  # fmt: skip
    model["tied"].weight = model["fc"].weight
    model["frozen"].weight.requires_grad_(False)
    return model


BODY = [f"body.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        # No bias, norm, embedding or frozen weight, nor one that is computed; a shared one under its first name.
        ([".*"], [], ["stem.weight", *BODY, "volume.weight", "tied.weight"]),
        (["conv1"], [], BODY[::2]),
        (["^stem", r"\.1\."], [], ["stem.weight", *BODY[2:]]),
        (["body"], [r"conv2\.weight$"], BODY[::2]),
        ([".*"], ["^stem", "tied", "volume", r"0\.conv"], BODY[2:]),
    ],
)
def test_expressions_are_searched_for_in_names(include, exclude, chosen):
    model = network()
    found = prunable_weights(model, include, exclude)
    assert list(found) == chosen
    assert all(weight is model.get_parameter(name) for name, weight in found.items())
    assert list(prunable_weights(nn.DataParallel(model), include, exclude)) == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (["head"], [], r"include: 'head' matches none of the prunable weights \['stem.weight'"),
        ([".*"], ["frozen"], "exclude: 'frozen' matches none"),
        (["stem"], ["st"], "include, exclude: leave nothing"),
    ],
)
def test_what_matches_nothing_is_named(include, exclude, words):
    with pytest.raises(ValueError, match=words):
        prunable_weights(network(), include, exclude)
