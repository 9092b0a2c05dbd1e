"""Options of the half hour, which are passed to every check as ``options.json``."""

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
    """The command line, and the sizes that follow from it."""

    commands: Annotated[tuple[int, ...], Field(min_length=1)]
    rehearse: bool = False
    out: Path = Path("runs/half_hour")
    minutes: PositiveFloat = 8.5
    cifar: Path | None = None
    weights: Path | None = None
    jpegs: Path | None = None
    stages: str | None = None
    """Names of the stages to run, separated by commas; None for all stages of the commands."""

    @property
    def steps(self) -> int:
        """Return the steps of a short run."""
        return 4 if self.rehearse else 60

    @property
    def imagenet_batch(self) -> int:
        """Return the batch size for images of ImageNet's size."""
        return 4 if self.rehearse else 256

    @property
    def imagenet_size(self) -> int:
        """Return the side of ImageNet's images in pixels."""
        return 64 if self.rehearse else 224

    @property
    def time_factor(self) -> int:
        """Return the factor of every stage's time limit: a rehearsal may run on a slow or busy machine."""
        return 5 if self.rehearse else 1

    @property
    def is_real(self) -> bool:
        """Return whether finished runs are results of CIFAR-100: neither its images nor the teacher are generated."""
        return self.cifar is not None and self.weights is not None and not self.rehearse

    @property
    def inputs(self) -> Path:
        """Return the folder of the generated inputs."""
        return self.out / "inputs"

    @property
    def cifar_shards(self) -> Path:
        """Return the folder of shards with images of 32 × 32 pixels."""
        return self.cifar or self.inputs / "cifar"

    @property
    def jpeg_shards(self) -> Path:
        """Return the folder of shards with JPEGs of various sizes."""
        return self.jpegs or self.inputs / "jpegs"


def read_options(args: Sequence[str]) -> Options:
    """Return the options of a command line, and write them for the checks.

    Raises RecipeError for wrong options, and if the folder has results of other inputs.
    """
    commands = [int(arg) for arg in args if arg in ("1", "2", "3")]
    overrides = {key: text for key, _, text in (arg.partition("=") for arg in args if "=" in arg)}
    # These two keys have their own form on the command line, so they must not be set as overrides, too.
    if reserved := overrides.keys() & {"commands", "rehearse"}:
        raise RecipeError(f"command line: {reserved.pop()}: write 1 2 3 and --rehearse")
    unknown = [arg for arg in args if "=" not in arg and arg not in ("1", "2", "3", "--rehearse")]
    if unknown or not commands:
        raise RecipeError(
            f"command line: pass the commands to run, 1, 2 or 3{f', not {unknown[0]}' if unknown else ''}"
        )
    flags = {"commands": json.dumps(commands), "rehearse": json.dumps("--rehearse" in args)}
    options = parse_command_args(overrides | flags, Options)
    paths = {key: path.resolve() for key in ("out", "cifar", "weights", "jpegs") if (path := getattr(options, key))}
    options = options.model_copy(update=paths)  # absolute, because stages run in other folders
    options.out.mkdir(parents=True, exist_ok=True)
    _check_same(options)
    (options.out / OPTIONS_FILE).write_text(options.model_dump_json())
    return options


def _check_same(options: Options) -> None:
    """Raise RecipeError if the folder contains results of other inputs, or of a rehearsal."""
    if not (options.out / OPTIONS_FILE).is_file():
        return
    stored = load_options(options.out)
    for key in ("rehearse", "cifar", "weights", "jpegs"):
        if getattr(stored, key) != getattr(options, key):
            difference = f"{key} was {getattr(stored, key)} there and is {getattr(options, key)} here"
            raise RecipeError(
                f"out: {options.out} contains other results ({difference}); set out=ANOTHER_FOLDER, or delete it"
            )


def load_options(out: Path) -> Options:
    """Return the options that ``read_options`` has written."""
    return Options.model_validate(json.loads((out / OPTIONS_FILE).read_text()))
