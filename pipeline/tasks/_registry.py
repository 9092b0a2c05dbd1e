"""The tasks by name, and the type of the recipe's key ``task``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipeline.tasks._base import Task


def known_tasks() -> list[str]:
    """Return the names of the tasks: the files of this folder that do not begin with an underscore."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in names if not name.startswith("_"))


def find_task(name: str) -> Task:
    """Return the task named ``name``. Raises ValueError if there is none."""
    if name not in known_tasks():
        raise ValueError(f"there is no task {name!r}; known are {', '.join(known_tasks())}")
    module = importlib.import_module(f"{__package__}.{name}")
    (task,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    )
    return task()


def _check_name(name: str) -> str:
    find_task(name)
    return name


TaskName = Annotated[str, AfterValidator(_check_name)]
"""Type of the recipe's ``task``."""
