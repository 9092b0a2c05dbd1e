"""Runs that stand on runs that stand on runs: a teacher's assistant, and a teacher that is the same network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from methods import losses_of
from resolved import run_of
from safetensors.torch import load_file

from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.builders.teacher import build_teacher
from pipeline.config.recipe import load_recipe
from pipeline.distributed.launcher import read_launch
from pipeline.errors import RecipeError
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.training.journal import trace

Train = Callable[..., None]
KD = {"ce": {}, "kd": {"temperature": 4.0}}


@pytest.fixture
def chain(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``student.yaml`` learns from ``assistant.yaml``, which learns from ``teacher.yaml``."""
    write = {"assistant": ("cifar_resnet8", "teacher.yaml"), "student": ("cifar_resnet8", "assistant.yaml")}
    for name, (model, teacher) in write.items():
        own = {"student": {"model": model}, "teacher": {"recipe": teacher}, "losses": KD, "epochs": 1}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump({"base": "ce.yaml", **own, "folder": f"runs/{name}"}))
    monkeypatch.chdir(recipes)
    return recipes


def result_of(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / "runs" / name / "result.json").read_text())


def test_the_student_of_another_run_teaches_without_its_head(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(recipes)
    own = {"teacher": {"recipe": "teacher.yaml", "head": "none"}, "losses": losses_of("at"), "epochs": 1}
    (recipes / "at.yaml").write_text(yaml.safe_dump({"base": "ce.yaml", **own, "folder": "runs/at"}))
    run_train("at.yaml")
    assert "head: none leaves out fc.bias, fc.weight" in capsys.readouterr().out
    run_train("at.yaml", "teacher.head=null", "folder=runs/whole")
    assert trace(recipes / "runs/at/journal.jsonl") == trace(recipes / "runs/whole/journal.jsonl")
    of_at, of_whole = (run_of(recipes / "at.yaml", words) for words in ((), ("teacher.head=null",)))
    assert (of_at.identity["teacher"]["head"], "head" in of_whole.identity["teacher"]) == ("none", False)


def test_a_chain_is_made_from_its_far_end_and_a_link_that_is_finished_asks_for_nothing(
    run_train: Train, chain: Path, capfd: pytest.CaptureFixture[str]
):
    run_train("student.yaml")
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [line.rpartition("/")[2] for line in told] == ["teacher.yaml", "assistant.yaml"]
    assert {name: result_of(chain, name)["epochs"] for name in ("teacher", "assistant", "student")}

    before = result_of(chain, "assistant")
    for gone in ("teacher", "student"):
        shutil.rmtree(chain / "runs" / gone)
    run_train("student.yaml")
    assert "$ " not in capfd.readouterr().out
    assert not (chain / "runs" / "teacher").exists()
    assert result_of(chain, "assistant") == before
    assert result_of(chain, "student")["model"] == "cifar_resnet8"

    run_train("assistant.yaml")
    told = capfd.readouterr().out
    assert "$ " not in told
    teacher, own = told.splitlines()[-2:]
    assert teacher.split() == ["teacher", "ce", "cifar_resnet20", "gone", "runs/teacher"]
    assert own.startswith("student ")
    assert not (chain / "runs" / "teacher").exists()


@pytest.fixture
def two_stages(chain: Path) -> Path:
    """``second.yaml`` begins from the student of ``first.yaml``; both lie by seed."""
    own = {"base": "ce.yaml", "epochs": 1, "folder": None}
    (chain / "first.yaml").write_text(yaml.safe_dump(own))
    (chain / "second.yaml").write_text(yaml.safe_dump({**own, "student": {"start": {"recipe": "first.yaml"}}}))
    return chain


def test_a_students_first_stage_has_its_seed(run_train: Train, two_stages: Path, capfd: pytest.CaptureFixture[str]):
    run_train("second.yaml", "seed=3")
    told = capfd.readouterr().out
    (asked,) = [line for line in told.splitlines() if line.startswith("$ ")]
    assert asked.endswith("first.yaml seed=3")
    start, own = (two_stages / "runs" / stage / "seed-3" for stage in ("first", "second"))
    assert [path.name for path in start.parent.iterdir()] == ["seed-3"]
    assert [yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] for folder in (start, own)] == [3, 3]
    rows = [line.split() for line in told.splitlines()[-2:]]
    assert [(row[0], row[-1]) for row in rows] == [("start", "runs/first/seed-3"), ("student", "runs/second/seed-3")]

    second = run_of("second.yaml", ["seed=3"])
    first = run_of("first.yaml", ["seed=3"])
    assert second.identity["student"]["start"]["recipe"] == first.fingerprint
    config = second.recipe.student
    student = build_student(student_spec(config, frozenset()), 20, seed=3)
    load_start(second, student)
    weights = load_file(start / "student.safetensors")["fc.weight"]
    torch.testing.assert_close(student.model.get_parameter("fc.weight").detach(), weights)


def test_a_teacher_keeps_its_own_seed(chain: Path):
    identity = run_of("assistant.yaml", ["seed=3"]).identity
    assert identity["teacher"]["recipe"] == run_of("teacher.yaml").fingerprint


def test_a_first_stage_that_is_also_the_teacher_is_one_run_with_its_own_seed(two_stages: Path):
    own = {"base": "second.yaml", "teacher": {"recipe": "first.yaml"}, "losses": KD}
    (two_stages / "both.yaml").write_text(yaml.safe_dump(own))
    identity = run_of("both.yaml", ["seed=3"]).identity
    first = run_of("first.yaml").fingerprint
    assert (identity["teacher"]["recipe"], identity["student"]["start"]["recipe"]) == (first, first)


def test_the_end_of_a_chain_is_part_of_what_every_run_below_it_is(chain: Path):
    before = [run_of(f"{name}.yaml").fingerprint for name in ("student", "assistant", "ce")]
    other = yaml.safe_load((chain / "teacher.yaml").read_text()) | {"seed": 3}
    (chain / "teacher.yaml").write_text(yaml.safe_dump(other))
    after = [run_of(f"{name}.yaml").fingerprint for name in ("student", "assistant", "ce")]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_a_circle_further_down_is_refused_before_anything_is_made(chain: Path):
    other = yaml.safe_load((chain / "teacher.yaml").read_text()) | {"teacher": {"recipe": "assistant.yaml"}}
    (chain / "teacher.yaml").write_text(yaml.safe_dump({**other, "losses": KD}))
    with pytest.raises(RecipeError, match=r"assistant.yaml: the recipe depends on itself, through .*teacher.yaml"):
        ensure_dependencies(load_recipe("student.yaml"), read_launch())
    assert not (chain / "runs").exists()


def test_under_several_ranks_the_far_end_is_told_first(chain: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"one process must make it first: python pipeline/train.py .*teacher.yaml"):
        ensure_dependencies(load_recipe("student.yaml"), read_launch())


def test_a_network_learns_from_itself_trained_first(run_train: Train, chain: Path):
    own = {"base": "ce.yaml", "teacher": {"recipe": "ce.yaml"}, "losses": KD, "folder": "runs/again", "epochs": 1}
    (chain / "again.yaml").write_text(yaml.safe_dump(own))
    run_train("ce.yaml")
    run_train("again.yaml")
    teacher = build_teacher(run_of("again.yaml"), torch.device("cpu"))
    assert teacher is not None
    first, second = (load_file(chain / "runs" / name / "student.safetensors") for name in ("ce", "again"))
    torch.testing.assert_close(teacher.taps.model.get_parameter("fc.weight").detach(), first["fc.weight"])
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
