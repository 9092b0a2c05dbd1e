"""The page on ImageNet's weights does what it says: its commands run as they stand, on few images and in few steps."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.models
import yaml
from accelerate.state import AcceleratorState, PartialState
from one_core import one_core
from pages import ROOT, blocks, command_lines
from pictures import write_folders
from safetensors.torch import load_file

from pipeline import evaluate, train
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from shards import prepare_folder

PAGE = (ROOT / "docs" / "finetune.md").read_text()
CLASSES = ["apple", "pear", "quince"]
CUT = {"epochs": 1, "batch": 4, "checkpoints": {"every_epochs": 0}, "journal": {"trackers": []}}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "shards/prepare_folder.py": prepare_folder.main,
    "pipeline/train.py": train.main,
    "pipeline/evaluate.py": evaluate.main,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with class folders, the recipes cut to a few steps, and random weights where torchvision looks first."""
    (tmp_path / "configs").mkdir()
    for file in (ROOT / "configs").glob("finetune*.yaml"):
        shutil.copy(file, tmp_path / "configs")
    (tmp_path / "configs" / "methods").symlink_to(ROOT / "configs" / "methods")
    data = tmp_path / "configs" / "finetune_data.yaml"
    recipe = yaml.safe_load(data.read_text())
    recipe |= {**CUT, "data": recipe["data"] | {"size": 32}, "schedule": recipe["schedule"] | {"warmup_epochs": 0}}
    data.write_text(yaml.safe_dump(recipe))
    write_folders(tmp_path, "images", CLASSES, 10)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name, weights in {"resnet50": "IMAGENET1K_V2", "resnet18": "IMAGENET1K_V1"}.items():
        torch.manual_seed(1)
        url = torchvision.models.get_model_weights(name)[weights].url
        torch.save(torchvision.models.get_model(name).state_dict(), cache / url.rpartition("/")[2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(line: str) -> None:
    python, script, *words = shlex.split(line)
    assert python == "python"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    with one_core():
        COMMANDS[script](words)


def test_the_commands_of_the_page_make_a_teacher_and_a_student_of_ones_own_classes(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [line for line in command_lines(PAGE) if line.startswith("python ")]
    assert len(lines) == 5
    said = []
    for line in lines:
        execute(line)
        said.append(capsys.readouterr().out)

    note = (
        "note: student.start: fc.weight, fc.bias are not read from IMAGENET1K_V{} and keep their random initialisation"
    )
    assert note.format(2) in said[1]
    assert note.format(1) in said[2]
    assert "teacher: top-1" in said[3]
    for folder, width in {"runs/finetune/seed-0": 2048, "runs/finetune_student/dkd/seed-0": 512}.items():
        weights = load_file(f"{folder}/student.safetensors")
        assert weights["fc.weight"].shape == (len(CLASSES), width)
    more = yaml.safe_load(Path("runs/finetune_more/recipe.yaml").read_text())["student"]["start"]
    assert (more["weights"], more["head"]) == ("runs/finetune/seed-0/student.safetensors", "keep")
    files = [Path(f"runs/{name}/identity.json") for name in ("finetune/seed-0", "finetune_more")]
    identities = [json.loads(file.read_text()) for file in files]
    assert identities[0]["student"]["start"]["weights"] == "IMAGENET1K_V2"
    assert identities[1]["student"]["start"]["weights"].startswith("sha256:")


def test_the_recipes_of_the_page_are_recipes(place: Path):
    files = {block.file: block.code for block in blocks(PAGE) if block.file}
    for name, code in files.items():
        Path(name).write_text(code)
    student = load_recipe("my_student.yaml", ["method=dkd"])
    assert [named.recipe.student.model for named in student.teachers] == ["efficientnet_v2_s"]
    assert summarize(student).student.name == "mobilenet_v2"
    part = load_recipe("my_part.yaml").recipe
    assert part.optimizer.rates == {"fc.*": 10.0}
    assert summarize(load_recipe("my_part.yaml")).student.name == "resnet50"
