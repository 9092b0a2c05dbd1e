"""One main job for all tests of commands: its shards, its teacher and its students."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from commands import BIN, TRAIN, run
from methods import losses_of

CE = """
student: {model: cifar_resnet8}
losses: {ce: {}}
data: {path: shards, prepare: [shards/prepare_demo.py, --train, "60", --val, "20", --size, "24", --jobs, "1"], size: 16,
       mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
epochs: 3
batch: 12
schedule: {rate: 0.05}
journal: {every_steps: 1}
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not the project's, with a recipe that stands on two others and on shards, none of them made."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "ce.yaml").write_text(CE + "folder: runs/ce\n")
    (folder / "teacher.yaml").write_text(
        "base: ce.yaml\nstudent: {model: cifar_resnet20}\nepochs: 1\nfolder: runs/teacher\n"
    )
    ddkd = losses_of("ddkd")
    own = {"base": "ce.yaml", "teacher": {"recipe": "teacher.yaml"}, "compare": ["ce.yaml"], "losses": ddkd}
    (folder / "ddkd.yaml").write_text(yaml.safe_dump({**own, "folder": "runs/ddkd"}))
    return folder


@pytest.fixture(scope="session")
def main_job(place: Path) -> subprocess.CompletedProcess[str]:
    """The main job through Accelerate's launcher: it makes its shards, its teacher and the student to compare with."""
    return run(str(BIN / "accelerate"), "launch", "--cpu", TRAIN, "ddkd.yaml", folder=place)
