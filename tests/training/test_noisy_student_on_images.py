"""Noisy student on real images: 50 labelled ones of each of twenty classes, and 450 without labels; ten minutes."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from statistics import mean, stdev

import noisy_chain
import pytest

from pipeline.runs.files import read_result
from shards.prepare_imagenet import main as prepare_imagenet
from shards.prepare_unlabelled import main as prepare_unlabelled

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT.parent / "shared" / "data" / "tiny-imagenet-20.tar"
LABELLED, SEEDS = 50, (0, 1, 2)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with shards of the first images of each class, and of the others without their labels."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "few", filter="data")
    for folder in (tmp_path / "few" / "train").iterdir():
        (tmp_path / "rest" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[LABELLED:]:
            shutil.move(file, tmp_path / "rest" / folder.name)
    small = ["--resize-short", "16", "--jobs", "1"]
    assert prepare_imagenet([str(tmp_path / "few"), str(tmp_path / "shards"), *small]) == 0
    assert prepare_unlabelled([str(tmp_path / "rest"), str(tmp_path / "others"), *small]) == 0
    return tmp_path


def write_recipes(place: Path, seed: int) -> None:
    """Write the recipes of the chain with a seed, on these shards, and with the teacher's answers of that seed."""
    data = f"data: {{path: {place / 'shards'}"
    supervised, student = (ROOT / "configs" / "noisy_student" / name for name in ("supervised.yaml", "ns1.yaml"))
    (place / f"teacher{seed}.yaml").write_text(f"base: {supervised}\nseed: {seed}\n{data}}}\nfolder: runs/t{seed}\n")
    unlabelled = f"unlabelled: {{path: {place / 'others'}, pseudo: pseudo/{seed}}}"
    (place / f"student{seed}.yaml").write_text(
        f"base: {student}\nseed: {seed}\n{data}, {unlabelled}}}\nteacher: {{recipe: teacher{seed}.yaml}}\n"
        f"folder: runs/s{seed}\n"
    )


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.timeout(0)
def test_a_student_is_better_than_its_teacher_by_more_than_the_seeds_differ(place: Path):
    reached: dict[str, list[float]] = {"t": [], "s": []}
    for seed in SEEDS:
        write_recipes(place, seed)
        noisy_chain.train(0, 1, place, [f"teacher{seed}.yaml"])
        noisy_chain.label(0, 1, place, [f"student{seed}.yaml", str(place / "others"), f"pseudo/{seed}"])
        noisy_chain.train(0, 1, place, [f"student{seed}.yaml"])
        for name, values in reached.items():
            result = read_result(place / "runs" / f"{name}{seed}")
            assert result is not None
            assert result.last is not None
            values.append(result.last)
    teacher, student = reached["t"], reached["s"]
    print(f"top-1 of the teachers {teacher}, of the students {student}")
    assert mean(student) - mean(teacher) > max(stdev(teacher), stdev(student))
