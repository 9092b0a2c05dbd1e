"""The commands of the README, as processes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import BIN, ROOT, TRAIN, run, run_on_two_ranks, start
from methods import config_of

from pipeline.training.journal import trace


def test_the_main_job_makes_what_it_stands_on_and_ends_with_a_table(
    place: Path, main_job: subprocess.CompletedProcess[str]
):
    assert main_job.returncode == 0, main_job.stderr
    table = main_job.stdout.splitlines()[-3:]
    for row, name in zip(table, ("teacher", "ce", "ddkd"), strict=True):
        result = json.loads((place / "runs" / name / "result.json").read_text())
        assert f"{result['parameters']:,}" in row
        assert f"{result['top1']:.2f}" in row
        assert row.endswith(f"runs/{name}")
    assert main_job.stdout.count("$ python pipeline/train.py") == 2
    assert main_job.stdout.count("$ python shards/prepare_demo.py") == 1


def test_a_killed_run_repeats_the_trace_of_one_that_was_not(place: Path, main_job: subprocess.CompletedProcess[str]):
    command = [
        sys.executable,
        TRAIN,
        "ddkd.yaml",
        "folder=runs/killed",
        "checkpoints={every_steps: 2, every_epochs: 0}",
    ]
    journal = place / "runs" / "killed" / "journal.jsonl"
    kill_twice(command, journal, place)
    assert run(*command, folder=place).returncode == 0
    whole = place / "runs" / "ddkd"
    assert trace(journal) == trace(whole / "journal.jsonl")
    for name in ("student.safetensors", "student_best.safetensors"):
        assert (place / "runs" / "killed" / name).read_bytes() == (whole / name).read_bytes()


def kill_twice(command: list[str], journal: Path, place: Path) -> None:
    """Start a run and kill it at some step, two times."""
    dice = random.Random(time.time_ns())  # any step will do
    for least in (1, 7):
        with start(*command, folder=place) as process:
            lines = least + dice.randrange(5)
            while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < lines):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"


@pytest.mark.endurance
@pytest.mark.parametrize("kind", ["adamw", pytest.param("timm/lamb", marks=pytest.mark.long)])
def test_a_killed_run_of_another_optimizer_ends_as_one_that_was_not(
    place: Path, main_job: subprocess.CompletedProcess[str], kind: str
):
    optimizer = f"optimizer={{kind: {kind}, momentum: null, nesterov: null, decay_norms_and_biases: false}}"
    words = (sys.executable, TRAIN, "ce.yaml", optimizer, "schedule.rate=0.001", "ema={decay: 0.99, warmup: true}")
    name = kind.replace("/", "_")
    runs = [place / "runs" / f"{name}_{way}" for way in ("whole", "killed")]
    command = [*words, f"folder={runs[1]}", "checkpoints={every_steps: 2, every_epochs: 0}"]
    kill_twice(command, runs[1] / "journal.jsonl", place)
    for words_of_run in ((*words, f"folder={runs[0]}"), command):
        assert run(*words_of_run, folder=place).returncode == 0
    assert trace(runs[0] / "journal.jsonl") == trace(runs[1] / "journal.jsonl")
    for path in runs[0].glob("*.safetensors"):
        assert (runs[1] / path.name).read_bytes() == path.read_bytes()


def test_two_ranks_train_together_and_one_process_goes_on(place: Path, main_job: subprocess.CompletedProcess[str]):
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    words = [TRAIN, "ddkd.yaml", "folder=runs/two", "compare=null"]
    done = run_on_two_ranks(*torchrun, *words, "stop.steps=7", folder=place)
    assert done.returncode == 0, done.stderr
    checkpoint = place / "runs" / "two" / "checkpoints" / "step-7"
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["world_size"], state["progress"]["samples_seen"]) == (2, 7 * 12)
    files = {path.name for path in checkpoint.iterdir()}
    assert {"buffers-0.safetensors", "buffers-1.safetensors"} <= files
    done = run(sys.executable, *words, folder=place)
    assert done.returncode == 0, done.stderr
    lines = trace(place / "runs" / "two" / "journal.jsonl")
    assert [line["step"] for line in lines if "total" in line] == list(range(1, 16))


def test_losses_of_every_scope_train_on_two_ranks_of_accelerate_in_micro_batches_though_the_head_learns_nothing(
    place: Path, main_job: subprocess.CompletedProcess[str]
):
    losses = {name: config_of(name) for name in ("ab", "sp", "review", "crd")}
    recipe = {"base": "ce.yaml", "teacher": {"recipe": "teacher.yaml"}, "losses": {"ce": None, **losses}}
    (place / "scopes.yaml").write_text(yaml.safe_dump({**recipe, "accumulation": 2, "folder": "runs/scopes"}))
    accelerate = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = [TRAIN, "scopes.yaml", "schedule.rate=1e-4"]
    done = run_on_two_ranks(*accelerate, *words, "stop.steps=4", folder=place, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    state = json.loads((place / "runs" / "scopes" / "checkpoints" / "step-4" / "state.json").read_text())
    assert state["world_size"] == 2
    done = run(sys.executable, *words, folder=place)
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace(place / "runs" / "scopes" / "journal.jsonl") if "total" in line]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert {"ab", "sp", "review", "crd/student", "crd/teacher"} <= lines[0].keys()


def test_a_signal_saves_and_the_same_command_goes_on(place: Path, main_job: subprocess.CompletedProcess[str]):
    command = [sys.executable, TRAIN, "ce.yaml", "folder=runs/signal", "epochs=40", "checkpoints.every_epochs=0"]
    journal = place / "runs" / "signal" / "journal.jsonl"
    with start(*command, folder=place) as process:
        while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < 5):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate()
    assert process.returncode == 0
    assert "(a signal to stop); the same command continues" in told
    (checkpoint,) = (place / "runs" / "signal" / "checkpoints").iterdir()
    steps = [line["step"] for line in trace(journal) if "total" in line]
    assert checkpoint.name == f"step-{steps[-1]}"


def test_a_run_is_evaluated_by_its_folder(place: Path, main_job: subprocess.CompletedProcess[str]):
    done = run(sys.executable, str(ROOT / "pipeline" / "evaluate.py"), "runs/ddkd", folder=place)
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "runs" / "ddkd" / "result.json").read_text())
    assert f"top-1 {result['top1']:.2f}" in done.stdout
