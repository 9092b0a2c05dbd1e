"""Distil image classifiers: train, evaluate and compare them, and make their shards.

    distill COMMAND [argument …]
    distill COMMAND --help          what a command takes
    distill --version
    distill --files                 the folder with the recipes, launchers and Slurm scripts

``torchrun … -m pipeline.train`` and ``accelerate launch -m pipeline.train`` start several ranks of a command.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence

import pipeline
from pipeline.cli import print_answer, survive_lost_output
from pipeline.commands import COMMANDS
from pipeline.errors import EXIT_USER_ERROR, ROOT, SOURCE


def main() -> None:
    """Run the command that the command line names, as if its file were the program."""
    args = sys.argv[1:]
    command = next((name for name in COMMANDS if args[: name.count(" ") + 1] == name.split()), None)
    if command is None:
        with survive_lost_output():
            sys.exit(answer_words(args))
    sys.argv = [f"distill {command}", *args[command.count(" ") + 1 :]]
    runpy.run_module(COMMANDS[command], run_name="__main__", alter_sys=True)


def answer_words(args: Sequence[str]) -> int:
    """Print what the words ask for if they name no command, and return the exit code."""
    group = "shards " if args[:1] == ["shards"] else ""
    word = next(iter(args[1:] if group else args), "--help")
    if word in ("-h", "--help"):
        print_answer(help_text(group))
    elif word == "--version":
        print_answer(pipeline.__version__)
    elif word == "--files":
        print_answer(ROOT)
    else:
        known = [name.removeprefix(group) for name in COMMANDS if name.startswith(group)]
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {group + near[0]!r}?" if near else f"distill {group}--help lists them"
        print(f"error: distill: there is no command {group + word!r}; {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def help_text(group: str) -> str:
    """Return the names of the commands, each with the first line of its file; with a ``group``, its commands alone."""
    names = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, names)) + 1
    lines = [f"  {name:<{width}}{first_line(COMMANDS[name])}" for name in names]
    return "\n".join([*([] if group else [str(__doc__)]), "commands:", *lines])


def first_line(module: str) -> str:
    """Return the first line of a module's docstring. The module is not imported, which may take seconds."""
    path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
