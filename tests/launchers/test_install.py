"""What is installed: the constraints, the extras, and the commands of the containers."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNTESTED = {"cu12", "mlflow", "wandb"}
"""Extras that are in no constraint, because no number of a run depends on them, or was tested with them."""
CONTAINERS = sorted((ROOT / "launchers" / "containers").iterdir())
INSTALL = re.compile(r'pip install .*-c (\S+) "\.\[([\w,]+)\]"')


def direct() -> list[Requirement]:
    extras = chain.from_iterable(lines for name, lines in EXTRAS.items() if name not in UNTESTED)
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "launchers" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: version for name, version in pairs}


def test_every_direct_dependency_has_a_tested_version_that_satisfies_it():
    tested = constraints()
    assert len(tested) > 40
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert name in tested, f"add {name} to launchers/constraints.txt"
        assert requirement.specifier.contains(tested[name]), requirement


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_installs_extras_that_exist_on_a_python_that_fits(file: Path):
    text = file.read_text()
    (installed,) = INSTALL.findall(text)
    assert (ROOT / installed[0]).is_file()
    assert set(installed[1].split(",")) <= EXTRAS.keys()
    (python,) = re.findall(r"^(?:FROM|From:) python:([\d.]+)-slim$", text, re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def test_the_containers_install_the_same_from_the_same_files():
    docker, apptainer = (file.read_text() for file in CONTAINERS)
    assert INSTALL.findall(docker) == INSTALL.findall(apptainer)
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /src(?:/\S+)?$", apptainer.partition("%post")[0], re.MULTILINE))
    assert all((ROOT / name).exists() for name in copied)
