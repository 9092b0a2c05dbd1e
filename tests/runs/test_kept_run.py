"""What was written by earlier code is read by today's: a run that stopped, its checkpoint, and a teacher's cache.

``kept`` holds a run of DDKD from a cache, with EMA and clipping, that commit 0dab1ed wrote and that stopped after 6 of
8 steps. ``end`` holds how it ends: what that commit made of the rest, but for the last bits of the norm by which
gradients are clipped, changed on purpose since. A change of a format, or of numbers, writes it anew, and says so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from caching_on_ranks import cache
from safetensors.torch import load_file
from training_on_ranks import train

from pipeline.runs.folder import load_run
from pipeline.training.journal import trace

KEPT = Path(__file__).with_name("kept")
DECODER = "teacher.accept=[data.decoder.version]"
"""A PNG is the same pixels for every version of its decoder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what is kept, to go on in."""
    return shutil.copytree(KEPT, tmp_path / "kept")


def go_on(folder: Path) -> Path:
    """Train the kept run to its end; return its folder."""
    train(0, 1, folder, ["recipe.yaml", DECODER])
    return folder / "run"


def test_a_kept_run_goes_on_to_the_end_that_its_own_code_gave_it(folder: Path):
    run = go_on(folder)
    ours, theirs = (trace(path / "journal.jsonl") for path in (run, KEPT / "end"))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-4, abs=1e-6)
    for name in ("student", "student_ema", "student_best"):
        expected = load_file(KEPT / "end" / f"{name}.safetensors")
        torch.testing.assert_close(load_file(run / f"{name}.safetensors"), expected, rtol=1e-4, atol=1e-6)


def test_on_the_machine_that_wrote_it_the_end_is_the_same_bytes(folder: Path):
    end = json.loads((KEPT / "end" / "step-8.json").read_text())
    if end["machine"] != machine():
        pytest.skip("another processor or torch than the kept run's rounds otherwise")
    run = go_on(folder)
    saved = run / "checkpoints" / "step-8"
    assert {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in end["sha256"]} == end["sha256"]
    assert trace(run / "journal.jsonl") == trace(KEPT / "end" / "journal.jsonl")
    for name in ("student", "student_ema", "student_best"):
        file = f"{name}.safetensors"
        assert (run / file).read_bytes() == (KEPT / "end" / file).read_bytes()


def test_what_it_leaves_has_the_names_that_were_kept(folder: Path):
    run = go_on(folder)
    before, after = KEPT / "run" / "checkpoints" / "step-6", run / "checkpoints" / "step-8"
    since = {"identity.json"}
    assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()} | since
    for file in before.glob("*.safetensors"):
        old, new = load_file(file), load_file(after / file.name)
        assert {name: (x.shape, x.dtype) for name, x in new.items()} == {
            name: (x.shape, x.dtype) for name, x in old.items()
        }
    old, new = (json.loads((path / "state.json").read_text()) for path in (before, after))
    assert new.keys() == old.keys() | {"sha256", "state_sha256"}  # files are held against their digests since
    for name in ("recipe.yaml", "identity.json"):
        assert (run / name).read_bytes() == (KEPT / "run" / name).read_bytes()


def test_a_run_of_the_same_recipe_writes_the_same_recipe_and_identity(folder: Path):
    train(0, 1, folder, ["recipe.yaml", DECODER, "folder=anew", "stop.steps=1"])
    old, new = (yaml.safe_load((folder / name / "recipe.yaml").read_text()) for name in ("run", "anew"))
    assert (new["folder"], new["stop"]["steps"], new["teacher"]["accept"]) == ("anew", 1, ["data.decoder.version"])
    old |= {"task": "classification"}
    old["student"] |= {"arguments": None, "freeze": [], "checkpoint": False, "sync_batchnorm": False, "inherit": []}
    old["student"] |= {"peers": None, "export": 0, "shared": None, "train": [], "within": None}
    old["data"] |= {"views_per_step": 1}
    old["checkpoints"] |= {"export_epochs": []}
    old["schedule"] |= {"every": None, "cycles": None}
    old["optimizer"] |= {"rates": {}, "betas": None, "eps": None, "arguments": None}
    old["schedule"] |= {"power": None, "unit": "step"}
    old["ema"] |= {"warmup": False}
    old["journal"] |= {"project": "distillation", "name": None, "tags": [], "report": True}
    since = {"weights_key": None, "method": None, "with": [], "arguments": None, "size": None, "head": None}
    old["teacher"]["expect"] = old["teacher"].pop("expect_top1")
    old["teacher"] |= {"accept": ["data.decoder.version"], "route": None, "snapshots": None, **since}
    old["data"] |= {"order_seed": None, "holdout": None, "validation_size": None, "repeat": 1, "augment": []}
    old["data"] |= {"scales": None, "short": None, "long": None, "buckets": None, "pairs": False, "upscale": 1}
    old["data"] |= {"unlabelled": None}
    old["losses"]["ddkd"] |= {"class_maps": None}
    old["losses"]["ddkd"]["feature"] |= {"level_weight": "equal"}
    old["losses"]["ddkd"]["logit_distance"]["dkd"]["ramp"] |= {"gaussian": None, "steps": []}
    assert new == old | {"folder": "anew", "stop": old["stop"] | {"steps": 1}, "graph": "auto"}
    before, now = (json.loads((folder / name / "identity.json").read_text()) for name in ("run", "anew"))
    weights = json.loads((KEPT / "cache" / "cache.json").read_text())["binding"]["teacher"]["network"]["weights"]
    assert now == before | {"teacher": before["teacher"] | {"weights": f"sha256:{weights}"}}  # it was a path


def test_keys_of_a_kept_recipe_that_have_other_names_now_are_read(folder: Path):
    file = folder / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("expect_top1: null", "expect_top1: 42.0"))
    teacher = load_run(folder / "run").recipe.teacher
    assert teacher is not None
    assert teacher.expect == 42


def test_a_kept_cache_is_verified_and_written_again_as_the_same_bytes(folder: Path):
    cache(0, 1, folder, ["--verify", "recipe.yaml", DECODER, "sample=16", "tolerance=0.001"])
    cache(0, 1, folder, ["recipe.yaml", "teacher.cache=again"])
    for path in (KEPT / "cache").glob("*.npy"):
        ours, theirs = np.load(folder / "again" / path.name), np.load(path)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.dtype == np.float16:
            np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=2e-3, atol=2e-3)
    ours, theirs = (json.loads((where / "cache.json").read_text()) for where in (folder / "again", KEPT / "cache"))
    for header in (ours, theirs):
        header["binding"]["data"]["decoder"].pop("version")
    assert ours == theirs


def machine() -> dict[str, str]:
    """Return what the last bits of a run depend on."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in lines}
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": cpu.get("model name", ""),
        "flags": hashlib.sha256(cpu.get("flags", "").encode()).hexdigest(),
    }
