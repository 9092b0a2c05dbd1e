"""The built wheel: what lies in it, and its commands outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, environment

from pipeline import train

FOLDERS = ("configs", "launchers", "slurm")


def tracked(*names: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked. It is built from a copy without a network, because a build leaves files behind."""
    copy, unpacked = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if not name.startswith(("tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True)
    (file,) = (copy / "dist").glob("*.whl")
    zipfile.ZipFile(file).extractall(unpacked)
    return unpacked


def python(wheel: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    given = environment(PYTHONPATH=str(wheel), CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=given, check=False)


def run(wheel: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python(wheel, folder, "-m", "pipeline", *words)


def test_it_has_every_module_recipe_script_and_photograph_and_nothing_else(wheel: Path):
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    modules = {name for name in tracked("pipeline", "shards") if name.endswith(".py")}
    photographs = {name for name in tracked("shards") if name.startswith("shards/photographs/")}
    assert len(photographs) == 13  # with the list of their authors
    files = {name for name in tracked(*FOLDERS) if name.startswith(("configs/", "slurm/"))}
    files |= {name for name in tracked("launchers") if name.endswith((".yaml", ".json", ".sh"))}
    assert len(files) > 80
    expected = modules | photographs | {f"pipeline/files/{name}" for name in files}
    assert {name for name in found if ".dist-info/" not in name} == expected


def test_its_list_and_the_parts_of_its_recipe_are_those_of_the_checkout(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    commands = [["--list"], ["--check", "configs/demo.yaml"]]
    for words in commands:
        train.main(words)
    code = f"from pipeline import train\nfor words in {commands}: train.main(words)"
    told = python(wheel, tmp_path, "-c", code)
    assert (told.stdout, told.stderr) == (capsys.readouterr().out, "")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_ones_own_comes_before_the_one_of_that_name(wheel: Path, tmp_path: Path):
    paths = ["-m", "pipeline.config.paths", "configs/demo.yaml"]
    assert python(wheel, tmp_path, *paths).stdout.splitlines()[0] == "datasets/demo"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("data: {path: mine}\nlosses: {ce: {}}\n")
    assert python(wheel, tmp_path, *paths).stdout.splitlines()[0] == "mine"


def test_messages_name_the_commands_of_the_wheel(wheel: Path, tmp_path: Path):
    done = run(wheel, tmp_path, "train", "--help")
    assert "distill train --list" in done.stdout
    assert "torchrun --nproc_per_node 2 -m pipeline.train PAIR" in done.stdout
    assert ".py" not in done.stdout


def test_runs_and_shards_lie_below_the_current_folder(wheel: Path, tmp_path: Path):
    before = sorted(path for path in wheel.rglob("*") if "__pycache__" not in path.parts)
    drawn = run(
        wheel, tmp_path, "shards", "prepare_demo", "datasets/demo", "--train", "60", "--val", "20", "--jobs", "1"
    )
    assert drawn.returncode == 0, drawn.stderr
    words = ("method=ce", "stop.steps=2", "data.samples=null", "batch=20")
    trained = run(wheel, tmp_path, "train", "configs/demo.yaml", *words)
    assert trained.returncode == 0, trained.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"datasets", "runs"}
    assert (tmp_path / "runs" / "demo" / "ce" / "seed-0" / "recipe.yaml").is_file()
    assert sorted(path for path in wheel.rglob("*") if "__pycache__" not in path.parts) == before


def test_several_ranks_are_started_by_the_module(wheel: Path, tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = python(wheel, tmp_path, *launcher, "-m", "pipeline.doctor")
    assert "2 ranks" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []
