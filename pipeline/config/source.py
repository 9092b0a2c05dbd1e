"""Where a recipe comes from: a recipe file, the method under it and the overlays over it.

A *pair* is a recipe file without losses: a student, a teacher, their data and training strategy. It becomes a complete
recipe with a method, ``configs/methods/<name>.yaml``. An *overlay* is a file of ``overlays/`` beside the recipe file.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.errors import ROOT, RecipeError, display_path

CONFIGS = ROOT / "configs"
METHODS_FOLDER = CONFIGS / "methods"
OVERLAYS = "overlays"
SELECTION = ("method", "with")
"""Arguments that choose a recipe's files; they are no keys of a recipe."""
_RENAMED = {
    "demo_ce": "demo.yaml method=ce",
    "methods/ab_ce": "methods/ab.yaml",
    "tiny_imagenet/mobilenet_v1_ce": "tiny_imagenet/resnet18_mobilenet_v1.yaml method=ce",
    "tiny_imagenet/mobilenet_v1_ddkd": "tiny_imagenet/resnet18_mobilenet_v1.yaml method=ddkd",
    "tiny_imagenet/mobilenet_v1_ddkd_cached": "tiny_imagenet/resnet18_mobilenet_v1.yaml method=ddkd with=cached",
    "cifar100/proxy_strategy": "cifar100/proxy.yaml",
}
"""New names of files under ``configs/`` from before recipes were a pair and a method."""


@dataclass(frozen=True)
class RecipeSource:
    """The files of a recipe: its own, its method's and its overlays'."""

    path: Path
    """The recipe file, absolute."""
    method: str | None = None
    """Name or path of the method; None for the one that the recipe file names itself, if any."""
    overlays: tuple[str, ...] = ()
    """Names or paths of the overlays; later ones win."""

    @property
    def selection(self) -> tuple[str, ...]:
        """Return the arguments that choose the method and the overlays."""
        method = (f"method={self.method}",) if self.method else ()
        return (*method, *((f"with={','.join(self.overlays)}",) if self.overlays else ()))

    @property
    def args(self) -> tuple[str, ...]:
        """Return the arguments that name this recipe on the command line of another process."""
        return (str(self.path), *self.selection)

    @property
    def shown_args(self) -> tuple[str, ...]:
        """Return the arguments as messages show them: the path is relative to the project if it is inside."""
        return (display_path(self.path), *self.selection)

    def __str__(self) -> str:
        """Return the arguments as a user types them."""
        return shlex.join(self.shown_args)

    @property
    def cell(self) -> str:
        """Return the method and the overlays as one name: ``kd``, ``kd_cached``; empty if there are none."""
        return "_".join(Path(name).stem for name in (self.method, *self.overlays) if name)

    @property
    def run_name(self) -> Path:
        """Return the name of its runs, ``<path under configs/>/<method>[_<overlay>]``.

        It has no method if the recipe file names it itself. A file outside ``configs/`` has its name alone.
        """
        path = self.path.relative_to(CONFIGS) if self.path.is_relative_to(CONFIGS) else Path(self.path.name)
        if self.method:
            return path.with_suffix("") / self.cell
        return path.with_name("_".join(filter(None, (path.stem, self.cell))))


def split_source(overrides: Sequence[str]) -> tuple[str | None, tuple[str, ...], list[str]]:
    """Return the values of ``method=`` and ``with=``, of which the last ones count, and the other overrides."""
    given = {key: value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    others = [override for override in overrides if override.partition("=")[0] not in SELECTION]
    method = given.get("method") or None
    return (None if method == "null" else method), split_names(given.get("with", "")), others


def split_names(text: str) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return tuple(name.strip() for name in text.strip("[]").split(",") if name.strip())


def find_recipe(path: Path) -> Path:
    """Return the absolute path of a recipe, searched from the current folder, then the project.

    Raises RecipeError if there is no such file.
    """
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    if renamed := _renamed(path):
        raise RecipeError(f"{path}: no such recipe; it is now {renamed}")
    by_stem = {file.stem: display_path(file) for file in CONFIGS.rglob("*.yaml")}
    near = difflib.get_close_matches(path.stem, by_stem, n=1, cutoff=0.8)
    hint = f"did you mean {by_stem[near[0]]}?" if near else f"recipes are under {display_path(CONFIGS)}"
    raise RecipeError(f"{path}: no such recipe; {hint}")


def _renamed(path: Path) -> str | None:
    """Return the present name of a file ``configs/<pair>/<method>.yaml`` of former versions, None if it never was."""
    path = (path if path.is_absolute() else ROOT / path).with_suffix("")
    if not path.is_relative_to(CONFIGS):
        return None
    if known := _RENAMED.get(str(path.relative_to(CONFIGS))):
        return f"configs/{known}"
    pair = path.parent.with_suffix(".yaml")
    if not pair.is_file():
        return None
    if path.name == "pair":
        return display_path(pair)
    method, overlays = path.name.removesuffix("_cached"), ("cached",) if path.name.endswith("_cached") else ()
    return str(RecipeSource(pair, method, overlays)) if (METHODS_FOLDER / f"{method}.yaml").is_file() else None


def known_methods() -> list[str]:
    """Return the names of the methods under ``configs/methods/``."""
    return sorted(path.stem for path in METHODS_FOLDER.glob("*.yaml"))


def method_file(name: str) -> Path:
    """Return the file of a method, given by name or by path. Raises RecipeError if there is none."""
    return _named_file(name, METHODS_FOLDER) or _unknown("method", name, known_methods(), METHODS_FOLDER)


def overlay_file(name: str, source: RecipeSource, method: str | None) -> Path:
    """Return the file of an overlay, given by name or by path. Raises RecipeError if there is none.

    ``<name>_<method>.yaml`` comes before ``<name>.yaml``, since some overlays differ for a method.
    """
    folder = source.path.parent / OVERLAYS
    special = _named_file(f"{name}_{method}", folder) if method else None
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    return special or _named_file(name, folder) or _unknown("with", name, known, folder)


def _named_file(name: str, folder: Path) -> Path | None:
    """Return the file of a name in a folder, or of a path as a recipe is found; None if there is none."""
    is_path = "/" in name or name.endswith(".yaml")
    candidates = [Path(name), ROOT / name] if is_path else [folder / f"{name}.yaml"]
    return next((file.resolve() for file in candidates if file.is_file()), None)


def _unknown(key: str, name: str, known: Sequence[str], folder: Path) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"
    raise RecipeError(f"{key}: there is no {name!r} under {display_path(folder)}; {hint}")
