"""The first lines of a command name the run, where it continues, and what is trained before it, in which order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import TRAIN
from resolved import run_of

from pipeline.distributed.launcher import Launch
from pipeline.runs.describe import training_order
from pipeline.training.start_report import print_start

Train = Callable[..., None]
Captured = pytest.CaptureFixture[str]


def lines(captured: Captured, *titles: str) -> list[str]:
    """Return the lines that begin with one of these words."""
    return [line for line in captured.readouterr().out.splitlines() if line.startswith(titles)]


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(recipes)
    return recipes


def write(place: Path, name: str, **own: Any) -> str:
    """Write a recipe over ``ce.yaml``, and return its name."""
    (place / name).write_text(yaml.safe_dump({"base": "ce.yaml", "folder": f"runs/{Path(name).stem}", **own}))
    return name


def test_a_new_run_a_continued_one_and_a_finished_one_say_so(run_train: Train, place: Path, capsys: Captured):
    titles = ("recipe", "folder", "data", "teacher", "device", "batch", "training ", "needs", "note")
    run_train("ce.yaml", "stop.steps=3")
    assert lines(capsys, *titles) == [
        f"recipe     {place / 'ce.yaml'}: cifar_resnet8, losses ce",
        "folder     runs/ce: new",
        f"data       {run_of('ce.yaml').recipe.data.path}: 60 training images, 20 validation images",
        "teacher    none",
        "device     CPU, 1 rank with 1 core, fp32",
        "batch      12 images = 1 rank × 12 rows × accumulation 1",
        "training   2 epochs × 5 steps = 10 steps; this command ends at stop.steps=3",
    ]
    run_train("ce.yaml")
    assert lines(capsys, "folder", "training ") == [
        "folder     runs/ce: continues at step 3 of 10",
        "training   2 epochs × 5 steps = 10 steps",
    ]
    run_train("ce.yaml")
    assert lines(capsys, *titles)[1:] == ["folder     runs/ce: finished"]


def test_what_is_missing_is_named_before_it_is_trained_and_an_override_is_said_to_stay_here(
    run_train: Train, place: Path, capsys: Captured
):
    run_train("teacher.yaml", "stop.steps=2")
    capsys.readouterr()
    run_train("ddkd.yaml", "stop.epoch=1", "folder=runs/short")
    teacher, compared, student = (place / f"{name}.yaml" for name in ("teacher", "ce", "ddkd"))
    found = lines(capsys, "teacher of", "compared with", "needs", "note", "$")
    assert found[:6] == [
        f"needs      {teacher}, teacher of {student}: continues at step 2 of 5, is trained first (1 epoch)",
        f"needs      {compared}, compared with {student}: new, is trained first (2 epochs)",
        "note: stop.epoch=1 applies to this run only; the others are trained by their own recipes",
        f"teacher of {student}: {teacher} is not trained yet; training it first (1 epoch, continues at step 2 of 5)",
        f"$ python pipeline/train.py {teacher}",
        f"compared with {student}: {compared} is not trained yet; training it first (2 epochs)",
    ]
    run_train("ddkd.yaml", "stop.epoch=1", "folder=runs/short")
    assert lines(capsys, "needs", "note") == [
        f"needs      {teacher}, teacher of {student}: finished",
        f"needs      {compared}, compared with {student}: finished",
    ]


def test_shards_that_are_missing_are_prepared_with_a_word_of_why(run_train: Train, place: Path, capsys: Captured):
    with pytest.raises(AssertionError):  # this fixture trains recipes, and runs no script
        run_train("ce.yaml", "data.path=new", "data.prepare=[shards/prepare_demo.py]")
    assert lines(capsys, f"{place / 'ce.yaml'}: there are no shards in 'new' yet; preparing them first")


def test_the_order_is_that_of_training_and_a_run_that_two_need_is_named_once(place: Path):
    kd = {"ce": {}, "kd": {"temperature": 4.0}}
    write(place, "assistant.yaml", teacher={"recipe": "teacher.yaml"}, losses=kd)
    compare = ["teacher.yaml", "ce.yaml"]
    student = write(place, "student.yaml", teacher={"recipe": "assistant.yaml"}, losses=kd, compare=compare)
    order = [(dependent.path.stem, dependency.path.stem) for dependent, dependency in training_order(run_of(student))]
    assert order == [("assistant", "teacher"), ("student", "assistant"), ("student", "ce")]


def test_a_seed_reaches_the_first_stage_of_a_student_and_no_teacher(place: Path, capsys: Captured):
    second = write(place, "second.yaml", student={"start": {"recipe": "ce.yaml"}})
    kd = {"ce": None, "kd": {"temperature": 4.0}}
    student = write(place, "kd.yaml", teacher={"recipe": "teacher.yaml"}, losses=kd)
    for name, notes in ((second, 0), (student, 1)):
        run = replace(run_of(name, ["seed=3"]), overrides=("seed=3", "folder=runs/x", "data.path=shards"))
        print_start(run, Launch())
        assert len(lines(capsys, "note: seed=3 applies")) == notes


@pytest.mark.parametrize(
    ("teacher", "changes", "expected"),
    [
        ({"recipe": "teacher.yaml"}, {}, "live, cifar_resnet20"),
        ({"recipe": "teacher.yaml"}, {"cache": "c"}, "outputs from the cache c"),
        (
            {"recipe": "teacher.yaml"},
            {"cache": "c", "fallback": "live"},
            "outputs from the cache c; others live, cifar_",
        ),
        ({"average": {"decay": 0.9}}, {}, "a moving average of the student's weights"),
        (
            {"members": [{"recipe": "teacher.yaml"}, {"recipe": "ce.yaml"}], "combine": "mean", "temperature": 4},
            {},
            "live, cifar_resnet20 + cifar_resnet8",
        ),
    ],
)
def test_a_teacher_is_named_with_the_source_of_its_outputs(
    place: Path, teacher: dict[str, Any], changes: dict[str, str], expected: str, capsys: Captured
):
    run = run_of(write(place, "kd.yaml", teacher=teacher, losses={"ce": None, "kd": {"temperature": 4.0}}))
    config = run.recipe.teacher
    assert config is not None
    run = replace(run, recipe=run.recipe.model_copy(update={"teacher": config.model_copy(update=changes)}))
    print_start(run, Launch())
    (line,) = lines(capsys, "teacher")
    assert line.startswith(f"teacher    {expected}")


def test_a_folder_of_another_run_is_not_said_to_continue(run_train: Train, place: Path, capsys: Captured):
    run_train("ce.yaml", "stop.steps=3")
    capsys.readouterr()
    print_start(run_of("ce.yaml", ["epochs=7"]), Launch())
    assert lines(capsys, "folder") == ["folder     runs/ce: holds the run of another recipe"]


@pytest.mark.parametrize(
    ("words", "rank", "prints"),
    [
        ([], None, True),
        (["ce.yaml", "epochs=1"], "0", True),
        (["ce.yaml"], "1", False),
        (["--check", "ce.yaml"], None, False),
    ],
)
def test_the_first_line_comes_before_torch_is_loaded(tmp_path: Path, words: list[str], rank: str | None, prints: bool):
    (tmp_path / "torch.py").write_text("raise SystemExit(3)")
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    environment |= {"PYTHONPATH": str(tmp_path), **({"RANK": rank} if rank else {})}
    command = [sys.executable, TRAIN, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ("loading PyTorch and the other libraries, which takes some seconds\n" if prints else "")
