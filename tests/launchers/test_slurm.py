"""The shipped batch script on a real Slurm of two nodes: one world, preemption, lost nodes, killed ranks, limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from private_slurm import PrivateSlurm

from pipeline.models import create_model
from pipeline.training.journal import trace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

WITHOUT_GPUS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
TINY = (
    *("student.model=cifar_resnet8", "teacher.model=cifar_resnet20", "teacher.expect=null", "precision=fp32"),
    *("data.size=24", "data.resize=null", "data.crop=pad", "data.loader=memory", "batch=12"),
    *("schedule.rate=0.05", "journal.every_steps=1", "checkpoints={every_steps: 5, every_epochs: 0, poll_steps: 1}"),
)
EPOCHS = 20
STEPS = EPOCHS * 4

Submit = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo shards and a teacher's weights."""
    folder = tmp_path_factory.mktemp("place")
    words = ["--train", "48", "--val", "20", "--size", "24", "--jobs", "1", "--samples-per-shard", "25"]
    command = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder / "shards"), *words]
    subprocess.run(command, check=True, capture_output=True)
    torch.manual_seed(0)
    torch.save(create_model("cifar_resnet20", 20).state_dict(), folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def submit(slurm: PrivateSlurm, checkout: Path, place: Path) -> Submit:
    """``submit("name", "--time=1", environment={…})`` gives the shipped script to sbatch and returns the job's id.

    The run folder is ``name`` and the log ``name.log``, in the folder of the shards.
    """

    def submit(name: str, *arguments: str, epochs: int = EPOCHS, **environment: str) -> str:
        own = [f"--output={place / name}.log", *arguments]
        words = [f"data.path={place / 'shards'}", f"teacher.weights={place / 'teacher.pt'}", f"folder={place / name}"]
        command = [
            "sbatch",
            "--parsable",
            *WITHOUT_GPUS,
            *own,
            "slurm/ddkd_r50_mbv1.sh",
            *words,
            *TINY,
            f"epochs={epochs}",
        ]
        given = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        return slurm.run(*command, folder=checkout, **given).strip()

    return submit


@pytest.fixture(scope="module")
def whole(slurm: PrivateSlurm, submit: Submit, place: Path) -> Path:
    """The folder of the run that nothing interrupted."""
    job = submit("whole", STAGE=str(place / "local"))
    slurm.wait_for_end(job, 240)
    assert slurm.job(job)["JobState"] == "COMPLETED", (place / "whole.log").read_text()
    return place / "whole"


@pytest.fixture(autouse=True)
def _tidy(slurm: PrivateSlurm):
    """Leave no job of one test to the next."""
    yield
    slurm.clear()


def steps_of(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_text().count('"total"') if journal.exists() else 0


def assert_same(folder: Path, whole: Path) -> None:
    """Assert that a run left, bit for bit, what the uninterrupted one did."""
    assert trace(folder / "journal.jsonl") == trace(whole / "journal.jsonl")
    for name in ("student.safetensors", "student_best.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_both_nodes_train_as_one_world_from_their_own_disks(whole: Path, place: Path):
    log = whole.with_suffix(".log").read_text()
    assert "on 2 nodes, 2 ranks, rendezvous at n1:" in log or "rendezvous at 127.0.0.1:" in log
    staged = next((place / "local").glob("shards-*"))
    assert sorted(log.count(f"{rank}: {staged}") for rank in (0, 1)) == [1, 1]
    assert json.loads((whole / "versions.json").read_text())
    assert f"path: {staged}" in (whole / "recipe.yaml").read_text()
    lines = [line for line in trace(whole / "journal.jsonl") if "total" in line]
    assert [line["samples"] for line in lines] == [12 * step for step in range(1, STEPS + 1)]
    state = json.loads((whole / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())
    assert state["world_size"] == 2
    assert (whole / "result.json").exists()


def test_a_job_without_the_environment_of_sbatch_is_the_same(
    slurm: PrivateSlurm, submit: Submit, place: Path, checkout: Path
):
    (checkout / ".venv").symlink_to(sys.prefix)  # nobody tells it of another Python
    try:
        job = submit("bare", "--export=NONE", epochs=1)
        slurm.wait_for_end(job, 240)
    finally:
        (checkout / ".venv").unlink()
    log = (place / "bare.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", log
    assert "on 2 nodes, 2 ranks, rendezvous at " in log
    assert (place / "bare" / "result.json").exists()


@pytest.mark.endurance
def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_been(
    slurm: PrivateSlurm, submit: Submit, place: Path, whole: Path
):
    job, folder = submit("preempted"), place / "preempted"
    slurm.wait_for(lambda: steps_of(folder) >= 6, 120, "a few steps")
    other = slurm.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1").strip()
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 60, "the requeue")
    assert steps_of(folder) < STEPS
    assert (folder / "preempted").exists()
    slurm.wait_for_end(other, 60)
    slurm.wait_for_end(job, 240)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert not (folder / "preempted").exists()
    log = folder.with_suffix(".log").read_text()
    assert f"job {job}: start 1 of" in log
    assert "stopped by a signal; requeued" in log
    assert f"job {job}: start 2 of" in log
    assert_same(folder, whole)


@pytest.mark.endurance
def test_a_job_that_lost_a_node_is_requeued_and_goes_on_from_its_last_checkpoint(
    slurm: PrivateSlurm, submit: Submit, place: Path, whole: Path
):
    job, folder = submit("lost"), place / "lost"
    slurm.wait_for(lambda: steps_of(folder) >= 8, 120, "a few steps")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 60, "the requeue")
    assert not (folder / "preempted").exists()
    slurm.resume("n2")
    slurm.wait_for_end(job, 240)
    assert slurm.job(job)["JobState"] == "COMPLETED", folder.with_suffix(".log").read_text()
    assert_same(folder, whole)


@pytest.mark.endurance
def test_a_rank_that_is_killed_ends_the_job_within_a_minute_and_is_named(
    slurm: PrivateSlurm, submit: Submit, place: Path
):
    job, folder = submit("killed"), place / "killed"
    slurm.wait_for(lambda: steps_of(folder) >= 3, 120, "a few steps")
    began = time.monotonic()
    (rank_1,) = [pid for pid in processes(f"folder={folder}") if variable(pid, "RANK") == "1"]
    subprocess.run(["kill", "-KILL", rank_1], check=True)
    slurm.wait_for_end(job, 60)
    assert time.monotonic() - began < 60
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")
    assert found["ExitCode"] != "0:0"
    log = folder.with_suffix(".log").read_text()
    assert "error: rank 1 on n2: Killed; the step ended with exit code 137" in log


@pytest.mark.endurance
def test_a_time_limit_is_heard_in_time_and_the_job_goes_on(slurm: PrivateSlurm, submit: Submit, place: Path):
    # A minute is the least limit there is; the notice comes at some time of it, and the run is longer.
    job, folder = submit("late", "--time=1", "--signal=B:USR1@50", epochs=2000), place / "late"
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 120, "the requeue")
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=infinite")
    saved = steps_of(folder)
    slurm.wait_for(lambda: steps_of(folder) > saved, 120, "a step after the last one")
    log = folder.with_suffix(".log").read_text()
    assert "stopped by a signal; requeued" in log
    assert f"job {job}: start 2 of" in log
    assert "TIME LIMIT" not in log
    steps = [line["step"] for line in trace(folder / "journal.jsonl") if "total" in line]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.endurance
def test_a_cancelled_job_saves_and_does_not_come_back(slurm: PrivateSlurm, submit: Submit, place: Path):
    job, folder = submit("cancelled"), place / "cancelled"
    slurm.wait_for(lambda: steps_of(folder) >= 3, 120, "a few steps")
    slurm.run("scancel", job)
    slurm.wait_for_end(job, 60)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert "the job was cancelled" in folder.with_suffix(".log").read_text()
    assert (folder / "checkpoints" / f"step-{steps_of(folder)}").is_dir()


@pytest.mark.endurance
def test_the_writing_of_a_cache_is_requeued_and_ends_with_the_same_bytes(
    slurm: PrivateSlurm, checkout: Path, place: Path
):
    recipe = ("configs/imagenet/r50_mbv1.yaml", "method=kd", "with=cached")
    words = [
        *recipe,
        f"data.path={place / 'shards'}",
        f"teacher.weights={place / 'teacher.pt'}",
        *TINY,
        "views=150",
        "block=12",
    ]
    own = [*WITHOUT_GPUS, f"--output={place / 'cache.log'}", "slurm/cache_teacher.sh", *words]
    folder = place / "cache"
    given = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    job = slurm.run("sbatch", "--parsable", *own, f"teacher.cache={folder}", folder=checkout, **given).strip()
    slurm.wait_for(lambda: blocks_of(folder) >= 8, 120, "a few blocks")
    slurm.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 60, "the requeue")
    assert 8 <= blocks_of(folder) < 150 * 4
    slurm.wait_for_end(job, 240)
    log = (place / "cache.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", log
    assert "stopped by a signal; requeued" in log
    alone = [sys.executable, "pipeline/cache_teacher.py", *words, f"teacher.cache={place / 'alone'}"]
    subprocess.run(alone, cwd=checkout, check=True, capture_output=True)
    names = {file.name for file in folder.iterdir()} - {".lock"}
    assert all((folder / name).read_bytes() == (place / "alone" / name).read_bytes() for name in names)


def blocks_of(folder: Path) -> int:
    """Return how many blocks of a cache are marked as written."""
    return sum(int(np.load(file).any(axis=1).sum()) for file in folder.glob("*.sha256.npy"))


def processes(word: str) -> list[str]:
    """Return the pids of the Python processes with that word on their command line."""
    found = subprocess.run(["pgrep", "--full", f"pipeline.train .*{word}"], capture_output=True, text=True, check=True)
    return [pid for pid in found.stdout.split() if Path(f"/proc/{pid}/exe").resolve().name.startswith("python")]


def variable(pid: str, name: str) -> str:
    """Return a variable of a process's environment."""
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(word.partition("=")[::2] for word in words)[name]
