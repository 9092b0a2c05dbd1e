"""Real images and published weights, from the archives to the figures; minutes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from one_core import one_core

from pipeline.models import create_model
from pipeline.training.journal import trace

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.shared, pytest.mark.endurance, pytest.mark.timeout(900)]


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 300 real ImageNet images, one a class, and a ResNet-50 that never saw one."""
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(DATA / "imagenet-sample-300.tar") as archive:
        archive.extractall(folder / "source", filter="data")
    run(sys.executable, ROOT / "shards" / "prepare_imagenet.py", folder / "source", folder / "shards", folder=folder)
    assert "300" in run(sys.executable, ROOT / "shards" / "verify.py", folder / "shards", folder=folder)
    torch.save(create_model("resnet50", 300).state_dict(), folder / "resnet50.pt")
    return folder


WORDS = (
    *(
        "configs/imagenet/r50_mbv1.yaml",
        "method=ddkd",
        "data.path=shards",
        "teacher.weights=resnet50.pt",
        "teacher.expect=null",
    ),
    *("batch=8", "precision=fp32", "stop.steps=2", "journal.every_steps=1"),
)


@pytest.mark.parametrize(
    "launcher",
    [(BIN / "accelerate", "launch"), (BIN / "torchrun", "--standalone", "--nproc_per_node", "2")],
    ids=["one process", "two ranks"],
)
def test_two_steps_of_the_imagenet_recipe_on_real_images(
    imagenet: Path, launcher: tuple[Path | str, ...], request: pytest.FixtureRequest
):
    name = f"runs/{request.node.callspec.id.replace(' ', '-')}"
    run(*launcher, ROOT / "pipeline" / "train.py", *WORDS, f"folder={name}", folder=imagenet)
    lines = trace(imagenet / name / "journal.jsonl")
    assert [line["samples"] for line in lines] == [8, 16]
    parts = {
        "ce",
        "ddkd/feature",
        "ddkd/diffusion_feature",
        "ddkd/autoencoder",
        "ddkd/logit_dkd",
        "ddkd/diffusion_logit",
    }
    assert all(parts <= line.keys() for line in lines)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-100 as shards."""
    folder = tmp_path_factory.mktemp("cifar")
    run(sys.executable, DATA / "cifar100" / "unpack.py", folder, folder=folder)
    prepare = ROOT / "shards" / "prepare_cifar.py"
    run(sys.executable, prepare, folder / "cifar-100-python", folder / "shards", folder=folder)
    return folder


@pytest.mark.parametrize(("name", "accuracy"), [("resnet56", "72.63  top-5 91.94"), ("resnet20", "68.83  top-5 91.01")])
def test_a_published_network_reaches_its_published_accuracy_on_cifar100(cifar: Path, name: str, accuracy: str):
    command = (
        *(sys.executable, ROOT / "pipeline" / "evaluate.py", "configs/cifar100/teachers/resnet56.yaml", "speed=no"),
        *("data.path=shards", f"weights={DATA / 'weights' / f'cifar100_{name}.pt'}", "data.validation_batch=250"),
        *("data.mean=[0.5070,0.4865,0.4409]", "data.std=[0.2673,0.2564,0.2761]", f"student.model=cifar_{name}"),
    )
    with one_core():
        told = run(*command, folder=cifar)
    assert f"top-1 {accuracy}  (10,000 images)" in told
