"""The example of the README runs as it stands there."""

import re
from pathlib import Path


def test_example_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example, "README.md has lost its python example"
    exec(compile(example[1], "README.md", "exec"), {})
