"""The house's rules, read from the source, and each shown a breach of it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import architecture
import pytest
from architecture import House, read_house

from pipeline.losses._registry import find_loss, known_losses

ROOT = Path(__file__).resolve().parents[1]
HOUSE = read_house(ROOT, "pipeline", "shards")
TESTS = read_house(ROOT, "tests")

BREACHES: dict[str, list[dict[str, str]]] = {
    "upward_imports": [
        {"pipeline.models.planted": "from pipeline.losses import Loss"},
        {"pipeline.data.planted": "def f():\n    from pipeline.optim import ema"},  # beside it, and within a function
        {"pipeline.planted": ""},
        {"pipeline.runs.planted": "from pipeline import planted"},
        {"pipeline.runs.planted": "import pipeline.planted.deep"},
    ],
    "imports_of_entry_points": [
        {"pipeline.benchmarks.planted": "from pipeline.evaluate import main"},
        {"pipeline.bench": "from pipeline import doctor"},
    ],
    "imports_outside_their_home": [
        {"pipeline.training.planted": "import torch.distributed as dist"},
        {"pipeline.losses.planted": "from torch import distributed"},
        {"pipeline.data.loader": "from nvidia.dali import fn"},
        {"pipeline.benchmarks.planted": "import matplotlib"},
        {"pipeline.builders.planted": "from accelerate import Accelerator"},
        {"pipeline.training.planted": "import deepspeed"},
        {"shards.planted": "import pyarrow.parquet"},
        {"shards.stage": "import fsspec"},
    ],
    "foreign_imports_of_shards": [
        {"shards.planted": "import torch"},
        {"pipeline.data.planted": "from shards.write import write_split"},
        {"pipeline.data.planted": "from shards import scan"},
    ],
    "strangers": [
        {"pipeline.losses.planted": "from pipeline.data.config import Config"},
        {"pipeline.data.planted": "from pipeline.models import create_model"},
    ],
    "relative_imports": [{"pipeline.data.planted": "from . import config"}],
    "named_losses": [
        {"pipeline.builders.planted": "if name == 'ddkd': pass"},
        {"pipeline.distiller": "from pipeline.losses.dkd import dkd_loss"},
        {"pipeline.teachers.planted": "from pipeline.losses import crd"},
    ],
    "stems_of_the_standard_library": [{"pipeline.optim.types": ""}, {"shards.queue": ""}],
    "unlisted_files_at_the_root": [{"pipeline.helpers": ""}],
    "circles": [{"pipeline.data.a": "import pipeline.data.b", "pipeline.data.b": "from pipeline.data import a"}],
    "long_functions": [{"pipeline.data.planted": "def f():\n" + "    pass\n" * architecture.LONGEST}],
}


@pytest.mark.parametrize("name", BREACHES)
def test_the_house_keeps_its_rules(name: str):
    assert not list(rule(name)(HOUSE))


@pytest.mark.parametrize(("name", "planted"), [(name, each) for name, cases in BREACHES.items() for each in cases])
def test_a_planted_breach_is_found(name: str, planted: dict[str, str]):
    assert list(rule(name)(HOUSE | {module: ast.parse(source) for module, source in planted.items()}))


def rule(name: str) -> Callable[[House], Iterator[str]]:
    return getattr(architecture, name)


def test_contributing_draws_the_order_that_is_tested():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert architecture.drawn_order(text) == architecture.ORDER
    assert architecture.drawn_order(text.replace("  runs\n", "  runs  planted\n")) != architecture.ORDER


def test_every_file_of_losses_without_an_underscore_is_a_loss():
    stems = {path.stem for path in (ROOT / "pipeline" / "losses").glob("[!_]*.py")}
    assert stems == set(known_losses())
    assert all(find_loss(stem).__module__ == f"pipeline.losses.{stem}" for stem in stems)


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for folder in ("pipeline", "shards") for path in (ROOT / folder).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_test_files_have_unique_names_and_short_functions():
    names = [module.rpartition(".")[2] for module in TESTS if not module.endswith("conftest")]
    oracles = {module.rpartition(".")[2] for module in TESTS if ".oracles." in module}
    assert sorted(names) == sorted({*names})
    assert not [name for name in names if name.startswith("test_") and name in oracles]
    assert not list(architecture.long_functions(TESTS))


def test_tests_lie_in_the_folder_of_what_they_test():
    packages = {module.split(".")[1] for module in HOUSE if module.count(".") > 1 and module.startswith("pipeline.")}
    others = {"cli", "docs", "shards", "launchers", "support", "oracles", "published", "speed", "nullgpu", "faults"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= folders
    assert folders <= packages | others
