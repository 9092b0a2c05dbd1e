"""A run knows its weights by what is in them: other ones in the same file make another run, the same ones do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from resolved import run_of
from tiny_runs import DATA, STRATEGY

from pipeline.builders.teacher import build_teacher
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.runs.folder import check_folder, open_folder
from pipeline.runs.identity import Run

SOURCES = {"teacher": "teacher.weights", "member": "teacher.members.1.weights", "start": "student.start.weights"}
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights ``w.pt`` and a recipe for each place that may name them."""
    monkeypatch.chdir(tmp_path)
    model = {"model": "cifar_resnet8"}
    kd = {"losses": {"kd": {"temperature": 4.0}}}
    members = [{**model, "weights": "fixed.pt"}, {**model, "weights": "w.pt"}]
    kinds = {
        "teacher": {"student": model, "teacher": {**model, "weights": "w.pt"}, **kd},
        "member": {"student": model, "teacher": {"members": members, "combine": "mean", "temperature": 4.0}, **kd},
        "start": {"student": {**model, "start": {"weights": "w.pt"}}, "losses": {"ce": {}}},
    }
    for name, recipe in kinds.items():
        own = {"data": {**DATA, "path": str(shards)}, **STRATEGY, **recipe, "folder": f"runs/{name}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
    write("w.pt", 1)
    write("fixed.pt", 3)
    return tmp_path


def write(name: str, seed: int, **around: object) -> None:
    torch.manual_seed(seed)
    state = create_model("cifar_resnet8", 20).state_dict()
    torch.save({**around, "model": state} if around else state, name)


def begun(name: str, *words: str) -> Run:
    run = run_of(f"{name}.yaml", words)
    open_folder(run)
    return run


def moved(name: str) -> str:
    """Return the word by which the recipe is told of another file."""
    if name != "member":
        return f"{SOURCES[name]}=elsewhere.ckpt"
    fixed, own = ({"model": "cifar_resnet8", "weights": file} for file in ("fixed.pt", "elsewhere.ckpt"))
    return f"teacher.members={json.dumps([fixed, own])}"


@pytest.mark.parametrize("name", SOURCES)
def test_other_weights_in_the_same_file_are_another_run(place: Path, name: str):
    begun(name)
    check_folder(run_of(f"{name}.yaml"))
    write("w.pt", 2)
    with pytest.raises(RecipeError, match=r"holds the run of another recipe \(different .*weights|members"):
        check_folder(run_of(f"{name}.yaml"))
    write("w.pt", 1)
    check_folder(run_of(f"{name}.yaml"))


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_weights_elsewhere_and_in_a_wrapping_are_the_same_run(place: Path, name: str):
    run = begun(name)
    write("elsewhere.ckpt", 1, epoch=7)
    again = run_of(f"{name}.yaml", [moved(name)])
    check_folder(again)
    assert again.fingerprint == run.fingerprint


MEASURED = {"model": "cifar_resnet8", "parameters": 1, "top1": 5.0, "best_top1": 5.0, "images_per_second": 9.0}


@pytest.mark.parametrize("name", SOURCES)
def test_a_finished_run_whose_weights_are_gone_is_finished_still(place: Path, name: str):
    run = begun(name)
    (run.folder / "result.json").write_text(json.dumps({"identity": run.fingerprint, **MEASURED}))
    (place / "w.pt").unlink()
    assert run_of(f"{name}.yaml").result is not None
    assert run_of(f"{name}.yaml", [moved(name)]).result is None  # not there either, and another file


def test_a_key_that_chooses_is_part_of_the_run_by_what_it_chooses(place: Path):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(create_model("cifar_resnet8", 20).state_dict())
    torch.save({"model": states[0], "model_ema": states[1]}, "w.pt")
    raw = begun("teacher")
    assert run_of("teacher.yaml", ["teacher.weights_key=model"]).fingerprint == raw.fingerprint
    averaged = run_of("teacher.yaml", ["teacher.weights_key=model_ema"])
    assert averaged.fingerprint != raw.fingerprint
    write("w.pt", 2)
    assert run_of("teacher.yaml").fingerprint == averaged.fingerprint


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_that_began_with_a_path_is_still_compared_by_it(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    run = begun(name)
    text = (run.folder / "identity.json").read_text()
    for section in [run.identity["teacher"] or {}, run.identity["student"]["start"] or {}]:
        for each in section.get("members") or [section]:
            if "weights" in each:
                path = "fixed.pt" if section.get("members") and each is section["members"][0] else "w.pt"
                text = text.replace(each["weights"], path)
    (run.folder / "identity.json").write_text(text)
    check_folder(run_of(f"{name}.yaml"))
    write("elsewhere.ckpt", 1)
    with pytest.raises(RecipeError, match="holds the run of another recipe"):
        check_folder(run_of(f"{name}.yaml", [moved(name)]))
    if name != "start":
        build_teacher(run_of(f"{name}.yaml"), CPU)
        assert "records only the path of w.pt, no digest; it is not checked for changes" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_told_with_their_place(place: Path):
    torch.save(create_model("cifar_resnet20", 20).state_dict(), "w.pt")
    with pytest.raises(RecipeError, match=r"teacher\.yaml: teacher\.weights: w\.pt: weights of another architecture"):
        run_of("teacher.yaml")


def test_published_weights_stay_a_name_and_bring_the_mean_and_std_that_they_expect(place: Path):
    published = run_of("teacher.yaml", ["teacher.model=googlenet", "teacher.weights=IMAGENET1K_V1"])
    assert published.identity["teacher"]["weights"] == "IMAGENET1K_V1"
    assert published.identity["teacher"]["mean"] == published.identity["teacher"]["std"] == [0.5, 0.5, 0.5]
