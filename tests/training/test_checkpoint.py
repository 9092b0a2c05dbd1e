"""What a checkpoint holds once and what it holds of every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import without_digests
from gloo_ranks import Ranks
from safetensors.torch import load_file
from training_on_ranks import train

from pipeline.training.checkpoint import exported_best
from pipeline.training.journal import trace

Train = Callable[..., None]
BANKS = {"losses.crd.student_bank", "losses.crd.teacher_bank", "losses.crd.normalizers"}


@pytest.fixture
def contrastive(run_train: Train, recipes: Path) -> str:
    """Return a recipe with banks, whose teacher is there."""
    crd = {"weight": 0.8, "dim": 8, "negatives": 16, "temperature": 0.07, "momentum": 0.5}
    own = {"base": "ddkd.yaml", "compare": None, "losses": {"ddkd": None, "crd": crd}, "accumulation": 2}
    (recipes / "crd.yaml").write_text(yaml.safe_dump({**own, "folder": "runs/crd"}))
    run_train("teacher.yaml")
    return "crd.yaml"


def test_three_ranks_go_on_bit_for_bit(recipes: Path, three_ranks: Ranks):
    """Unlike two ranks' sum, that of three follows from the order, and so from the buckets that gradients lie in."""
    words = ["ce.yaml", "epochs=1"]
    three_ranks(train, recipes, [*words, "folder=runs/whole"])
    three_ranks(train, recipes, [*words, "folder=runs/parts", "stop.steps=2"])
    three_ranks(train, recipes, [*words, "folder=runs/parts"])
    whole, parts = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("whole", "parts"))
    assert len(whole) == 6
    assert parts == whole


def test_a_run_goes_on_with_the_best_weights_of_an_epoch_before_it_was_stopped(
    run_train: Train, recipes: Path, ranks: Ranks
):
    stopped = ["folder=runs/parts", "stop.steps=7"]  # in the second epoch
    for start, name in ((lambda *words: run_train(*words), "one"), (lambda *w: ranks(train, recipes, [*w]), "two")):
        start("ce.yaml", f"folder=runs/{name}")
        start("ce.yaml", *stopped)
        whole, parts = recipes / "runs" / name, recipes / "runs" / "parts"
        assert exported_best(parts / "student_best.safetensors", "top1").epoch == 1
        start("ce.yaml", "folder=runs/parts")
        for file in ("student.safetensors", "student_best.safetensors"):  # their cards, too
            assert (parts / file).read_bytes() == (whole / file).read_bytes()
        shutil.rmtree(parts)


@pytest.mark.parametrize("ranks_before", [1, 2])
def test_banks_are_saved_once_and_go_on_bit_for_bit_on_another_number_of_ranks_too(
    run_train: Train, recipes: Path, contrastive: str, ranks_before: int
):
    run_train(contrastive, "folder=runs/whole")
    run_train(contrastive, "folder=runs/parts", "stop.steps=3")
    whole, parts = recipes / "runs" / "whole", recipes / "runs" / "parts"
    checkpoint = parts / "checkpoints" / "step-3"
    of_rank, shared = (load_file(checkpoint / name) for name in ("buffers-0.safetensors", "distiller.safetensors"))
    assert shared.keys() >= BANKS
    assert not [name for name in of_rank if name.startswith("losses.")]
    assert [name for name in of_rank if name.endswith("running_mean")]
    # Ranks that happened to have the same statistics, as far as the files can tell.
    for rank in range(1, ranks_before):
        shutil.copy(checkpoint / "buffers-0.safetensors", checkpoint / f"buffers-{rank}.safetensors")
    without_digests(checkpoint, world_size=ranks_before)
    run_train(contrastive, "folder=runs/parts")
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    last = [load_file(folder / "checkpoints" / "step-10" / "distiller.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(last[1][name], value) for name, value in last[0].items())
    assert not torch.equal(shared["losses.crd.student_bank"], last[0]["losses.crd.student_bank"])
    assert torch.equal(shared["losses.crd.normalizers"], last[0]["losses.crd.normalizers"])
