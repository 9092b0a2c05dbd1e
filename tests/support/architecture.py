"""The rules of the house, as functions of its sources: each yields a line for every breach.

``House`` holds sources by module name, so that a rule can be shown a breach that is not in the tree.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

House = dict[str, ast.Module]

ENTRY_POINTS = {
    *("train", "evaluate", "predict", "cache_teacher", "pseudo_label", "compare", "bench", "doctor", "export"),
    *("report", "search"),
}
"""The files of ``pipeline/`` that are commands; a new one is a name here, a line in ``ORDER`` and in CONTRIBUTING."""

ORDER = [
    {"bicubic"},
    {"batch", "errors", "frozen_model", "image_size", "models", "network_arguments", "nvjpeg", "philox"},
    {"augmentations", "commands", "distributed", "features", "precision", "run_reference"},
    {"tasks"},
    {"data", "optim", "diffusion"},
    {"losses", "teachers", "plots"},
    {"config", "distiller"},
    {"runs"},
    {"training", "cli"},
    {"builders"},
    {"caching", "diagnostics", "exporting", "multirun", "reports", "train", "predict", "__main__"},
    {"benchmarks", "cache_teacher", "compare", "doctor", "export", "pseudo_label", "report", "search"},
    {"bench", "evaluate"},
]
"""What lies at the root of ``pipeline/``, the lowest first: each imports earlier sets, or itself."""

HOMES = {
    "torch.distributed": {"pipeline.distributed.collectives"},
    "nvidia": {"pipeline.data.dali"},
    "deepspeed": {"pipeline.training.zero"},
    "matplotlib": {"pipeline.plots"},
    "accelerate": {"pipeline.training", "pipeline.builders.session", "pipeline.evaluate", "pipeline.optim.guard"},
    "torchmetrics": {"pipeline.tasks.classification", "pipeline.tasks._image_quality"},
    "torchvision.transforms": set[str](),
    "pickle": {"shards.prepare_cifar"},
    "pyarrow": {"shards.parquet"},
    "fsspec": {"shards.remote"},
    "onnxruntime": {"pipeline.exporting.onnx"},
    "optuna": {"pipeline.multirun.study"},
}
"""The only modules, or packages, that import a library."""

METHODS = ("losses", "diffusion", "benchmarks")
"""The packages that may name a loss."""

HOMONYMS = {"pad"}
"""Losses whose names are also a word for something else: ``data.crop: pad``."""

LONGEST = 40
"""Lines of a function."""


def read_house(root: Path, *folders: str) -> House:
    """Return the modules of those folders."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return {module_name(path.relative_to(root)): ast.parse(path.read_text()) for path in paths}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module that is imported, at any depth, and what is imported from it; a relative one has its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def part(module: str) -> str:
    """Return what a module belongs to at the root of ``pipeline/``."""
    return module.split(".")[1]


def floor(name: str) -> int | None:
    return next((number for number, names in enumerate(ORDER) if name in names), None)


def upward_imports(house: House) -> Iterator[str]:
    """A package imports earlier sets or itself; a name that no set has is an error on both ends."""
    for module, tree in house.items():
        if not within(module, "pipeline") or module == "pipeline":
            continue
        own = floor(part(module))
        if own is None:
            yield f"{module} is in no set of ORDER"
            continue
        for other in {part(name) for name in imports(tree) if name.startswith("pipeline.")} - {part(module)}:
            above = floor(other)
            if above is None:
                yield f"{module} imports {other}, which is in no set of ORDER"
            elif above >= own:
                yield f"{module} imports {other}, which is not below it"


def imports_of_entry_points(house: House) -> Iterator[str]:
    """Nothing imports an entry point, but the benchmark of a step, which trains."""
    for module, tree in house.items():
        for name in imports(tree):
            entry = part(name) if name.startswith("pipeline.") else ""
            if entry in ENTRY_POINTS and not (within(module, "pipeline.benchmarks") and entry == "train"):
                yield f"{module} imports the entry point {entry}"


def imports_outside_their_home(house: House) -> Iterator[str]:
    for module, tree in house.items():
        for library, homes in HOMES.items():
            used = any(within(name, library) for name in imports(tree))
            if used and not any(within(module, home) for home in homes):
                yield f"{module} imports {library}"


def foreign_imports_of_shards(house: House) -> Iterator[str]:
    """``shards/`` needs no torch, and ``pipeline/`` of it only what reads."""
    heavy = ("torch", "torchvision", "pipeline", "accelerate", "nvidia")
    for module, tree in house.items():
        for name in imports(tree):
            if within(module, "shards") and name.split(".")[0] in heavy:
                yield f"{module} imports {name}"
            allowed = ("manifest", "read", "documents", "cores", "image_order")
            read = any(within(name, f"shards.{each}") for each in allowed)
            if within(module, "pipeline") and within(name, "shards") and name != "shards" and not read:
                yield f"{module} imports {name}"


def strangers(house: House) -> Iterator[str]:
    """Losses and data know neither one another nor the networks."""
    pairs = {"losses": ("data", "models"), "data": ("losses", "models"), "models": ("losses", "data")}
    for module, tree in house.items():
        for package, others in pairs.items():
            for name in imports(tree):
                if within(module, f"pipeline.{package}") and any(within(name, f"pipeline.{other}") for other in others):
                    yield f"{module} imports {name}"


def relative_imports(house: House) -> Iterator[str]:
    for module, tree in house.items():
        yield from (f"{module} imports {name}" for name in imports(tree) if name.startswith("."))


def named_losses(house: House) -> Iterator[str]:
    """No other part of the project knows which losses there are."""
    losses = {name.rpartition(".")[2] for name in house if re.fullmatch(r"pipeline\.losses\.[a-z]\w*", name)} - HOMONYMS
    for module, tree in house.items():
        if not within(module, "pipeline") or module == "pipeline" or part(module) in METHODS:
            continue
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        yield from (f"{module} names the loss {name!r}" for name in sorted(losses & strings))
        taken = {f"pipeline.losses.{name}" for name in losses} & set(imports(tree))
        yield from (f"{module} imports {name}" for name in sorted(taken))


def stems_of_the_standard_library(house: House) -> Iterator[str]:
    for module in house:
        if (stem := module.rpartition(".")[2]) in sys.stdlib_module_names:
            yield f"{module} is called as {stem} of the standard library"


def unlisted_files_at_the_root(house: House) -> Iterator[str]:
    """At the root of ``pipeline/`` lie the entry points and what ``ORDER`` lists beside the packages."""
    packages = {part(module) for module in house if module.startswith("pipeline.") and module.count(".") > 1}
    listed = ENTRY_POINTS | {
        "__main__",
        "commands",
        "cli",
        "distiller",
        "batch",
        "bicubic",
        "errors",
        "frozen_model",
        "image_size",
        "network_arguments",
        "nvjpeg",
        "philox",
        "precision",
        "run_reference",
    }
    files = {part(module) for module in house if module.startswith("pipeline.")} - packages
    yield from (f"pipeline/{name}.py is not listed" for name in sorted(files - listed))


def circles(house: House) -> Iterator[str]:
    """No module imports itself by way of others; that a module's packages are imported before it is no arrow."""
    arrows = {
        module: {name for name in imports(tree) if name in house and not within(module, name)}
        for module, tree in house.items()
    }
    while ends := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {module: targets for module, targets in arrows.items() if module not in ends}
    yield from (f"{module} imports itself by way of others, or imports what does" for module in sorted(arrows))


def long_functions(house: House) -> Iterator[str]:
    for module, tree in house.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST:
                    yield f"{module}.{node.name} has {lines} lines"


def drawn_order(contributing: str) -> list[set[str]]:
    """Return ``ORDER`` as CONTRIBUTING draws it: numbered lines of names, the highest first."""
    lines = re.findall(r"^ *\d+  (.+)$", contributing, re.MULTILINE)
    return [set(line.split()) for line in reversed(lines)]
