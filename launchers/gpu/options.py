"""What the command line of the half hour says, handed to every check as ``options.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat

from pipeline.config.arguments import parse_command_args
from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel

OPTIONS_FILE = "options.json"


class Options(FrozenModel):
    """The words, and how large everything is."""

    commands: Annotated[tuple[int, ...], Field(min_length=1)]
    rehearse: bool = False
    out: Path = Path("runs/half_hour")
    minutes: PositiveFloat = 8.5
    cifar: Path | None = None
    weights: Path | None = None
    jpegs: Path | None = None

    @property
    def steps(self) -> int:
        """Steps of a short run."""
        return 4 if self.rehearse else 60

    @property
    def imagenet_batch(self) -> int:
        """Images of ImageNet's size in a batch."""
        return 4 if self.rehearse else 256

    @property
    def imagenet_size(self) -> int:
        """Their side in pixels."""
        return 64 if self.rehearse else 224

    @property
    def patience(self) -> int:
        """How often a stage may take its seconds: a rehearsal's machine may be a slow one, or busy."""
        return 5 if self.rehearse else 1

    @property
    def inputs(self) -> Path:
        """Where what was drawn lies."""
        return self.out / "inputs"

    @property
    def cifar_shards(self) -> Path:
        """Shards of images of 32 pixels."""
        return self.cifar or self.inputs / "cifar"

    @property
    def jpeg_shards(self) -> Path:
        """Shards of JPEGs of many sizes."""
        return self.jpegs or self.inputs / "jpegs"


def read_options(words: Sequence[str]) -> Options:
    """Return the options of a command line, and write them for the checks. Raises RecipeError."""
    commands = [int(word) for word in words if word in ("1", "2", "3")]
    given = {key: text for key, _, text in (word.partition("=") for word in words if "=" in word)}
    if twice := given.keys() & {"commands", "rehearse"}:
        raise RecipeError(f"command line: {twice.pop()}: write 1 2 3 and --rehearse")
    stray = [word for word in words if "=" not in word and word not in ("1", "2", "3", "--rehearse")]
    if stray or not commands:
        raise RecipeError(f"command line: name the commands to run, 1, 2 or 3{f', not {stray[0]}' if stray else ''}")
    flags = {"commands": json.dumps(commands), "rehearse": json.dumps("--rehearse" in words)}
    options = parse_command_args(given | flags, Options)
    paths = {key: path.resolve() for key in ("out", "cifar", "weights", "jpegs") if (path := getattr(options, key))}
    options = options.model_copy(update=paths)  # stages run in folders of their own
    options.out.mkdir(parents=True, exist_ok=True)
    _check_same(options)
    (options.out / OPTIONS_FILE).write_text(options.model_dump_json())
    return options


def _check_same(options: Options) -> None:
    """Raise RecipeError if the folder holds what was found of other inputs, or of a rehearsal."""
    if not (options.out / OPTIONS_FILE).is_file():
        return
    there = load_options(options.out)
    for key in ("rehearse", "cifar", "weights", "jpegs"):
        if getattr(there, key) != getattr(options, key):
            told = f"{key} was {getattr(there, key)} there and is {getattr(options, key)} here"
            raise RecipeError(f"out: {options.out} holds other results ({told}); give out=ANOTHER, or delete it")


def load_options(out: Path) -> Options:
    """Return the options that ``read_options`` wrote."""
    return Options.model_validate(json.loads((out / OPTIONS_FILE).read_text()))
