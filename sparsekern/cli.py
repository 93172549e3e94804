"""The command line. A command is a module with `add_arguments(parser)` and `run(options) -> exit status`.

Its help is the first line of its docstring. To add one: write the module, name it in COMMANDS.
"""

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "train": "sparsekern.train",
    "compare": "sparsekern.compare",
    "doctor": "sparsekern.doctor",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to sys.argv[1:]. Returns the exit status, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="sparsekern", description="Training and running very sparse networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        summary = (module.__doc__ or name).splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no positional argument after an option
        options.overrides += rest
    return options.run(options)
