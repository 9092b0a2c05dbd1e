"""The house's rules, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "shards").rglob("*.py")])

LEVELS = {
    0: [
        "pipeline.batch",
        "pipeline.parallel",
        "pipeline.schedules",
        "pipeline.augment",
        "pipeline.composition",
        "pipeline.stage_names",
        "pipeline.ranks",
        "pipeline.notice",
    ],
    1: [
        "pipeline.losses",
        "pipeline.models",
        "pipeline.taps",
        "pipeline.linear_encoder",
        "pipeline.data",
        "pipeline.optimizers",
        "pipeline.timing",
        "pipeline.flops",
        "pipeline.guard",
        "pipeline.ema",
    ],
    2: [
        *(
            "pipeline.recipe",
            "pipeline.runs",
            "pipeline.build",
            "pipeline.distiller",
            "pipeline.teacher",
            "pipeline.teacher_cache",
            "pipeline.build_teacher",
            "pipeline.checkpoint",
        ),
        *("pipeline.journal", "pipeline.launch", "pipeline.stopping", "pipeline.zero"),
    ],
    3: [
        "pipeline.train",
        "pipeline.evaluate",
        "pipeline.compare",
        "pipeline.report",
        "pipeline.check",
        "pipeline.image_flops",
        "pipeline.doctor",
        "pipeline.health",
        "pipeline.places",
        "pipeline.caching",
        "pipeline.cache_teacher",
        "pipeline.bench",
        "pipeline.benches",
    ],
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Yield every module a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(module: str) -> int | None:
    matches = [
        number for number, names in LEVELS.items() for name in names if module == name or module.startswith(f"{name}.")
    ]
    return matches[0] if matches else None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_downward(path: Path):
    own = module_name(path)
    if own in ("pipeline", "shards"):
        assert not list(imports(path))
        return
    if own.startswith("shards"):
        assert not [
            name
            for name in imports(path)
            if name.split(".")[0] in ("torch", "torchvision", "pipeline", "accelerate", "nvidia")
        ]
        return
    mine = level(own)
    assert mine is not None, f"{own} stands on no level; add it to the list"
    for name in imports(path):
        if name.startswith("pipeline."):
            other = level(name)
            assert other is None or other <= mine, f"{own} imports {name}, which lies above it"
        if name.startswith("shards."):
            assert name.startswith(("shards.manifest", "shards.read")), f"{own} imports {name}"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("torch.distributed", {"pipeline.parallel"}),
        ("nvidia", {"pipeline.data.dali"}),
        (
            "accelerate",
            {
                *("pipeline.launch", "pipeline.train", "pipeline.evaluate"),
                *("pipeline.checkpoint", "pipeline.guard", "pipeline.zero"),
            },
        ),
        ("deepspeed", {"pipeline.zero"}),
        ("matplotlib", {"pipeline.benches.picture"}),
        ("torchvision.transforms", set()),
        ("pickle", {"shards.prepare_cifar"}),
    ],
)
def test_a_package_is_imported_only_in_its_home(package: str, home: set[str]):
    users = {
        module_name(path)
        for path in SOURCES
        for name in imports(path)
        if name == package or name.startswith(f"{package}.")
    }
    assert users <= home


def test_no_file_shadows_the_standard_library():
    names = {path.stem for path in SOURCES if path.parent in (ROOT / "pipeline", ROOT / "shards")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_data_and_losses_do_not_know_each_other():
    for path in SOURCES:
        own = module_name(path)
        if own.startswith("pipeline.losses"):
            assert not [name for name in imports(path) if name.startswith(("pipeline.data", "pipeline.models"))]
        if own.startswith("pipeline.data"):
            assert not [name for name in imports(path) if name.startswith(("pipeline.losses", "pipeline.models"))]


def test_no_loop_asks_which_method_it_runs():
    names = {path.stem for path in (ROOT / "pipeline" / "losses").glob("[!_]*.py")} - {"diffusion"}
    for path in (ROOT / "pipeline").glob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & {value for value in strings if isinstance(value, str)}, f"{path.name} names a loss"


def test_the_package_list_of_the_project_is_complete():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {module_name(path) for path in SOURCES if path.name == "__init__.py"}
