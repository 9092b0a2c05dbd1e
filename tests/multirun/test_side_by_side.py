"""``compare.py side=N``: runs of one process, each with the bytes that it has alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from resolved import run_of

from pipeline import compare
from pipeline.batch import Batch, Outputs
from pipeline.builders.shared import SharedParts
from pipeline.distributed import signals
from pipeline.errors import Interrupted, RecipeError
from pipeline.teachers.frozen import Teacher
from pipeline.training.journal import trace

Train = Callable[..., None]
Compare = Callable[..., None]
METHODS = ("ce", "kd", "ddkd")
MEMORY = {"loader": "memory", "crop": "pad", "size": 24}
AUGMENT = [{"randaugment": {"ops": 2, "magnitude": 9}}, {"erasing": {"probability": 0.5, "value": "noise"}}]
LOADERS = {"dali": {}, "memory": MEMORY, "augmented": {**MEMORY, "augment": AUGMENT}}
SPEEDS = ("images_per_second", "seconds", "side")


@pytest.fixture
def loader() -> str:
    """The loader of all runs; a test may choose another."""
    return "memory"


@pytest.fixture
def place(recipes: Path, run_train: Train, loader: str) -> Path:
    """The folder of tiny recipes for three methods, with their teacher trained."""
    common = yaml.safe_load((recipes / "ddkd.yaml").read_text()) | {"folder": None, "compare": []}
    common["data"] |= LOADERS[loader]
    teacher = yaml.safe_load((recipes / "teacher.yaml").read_text()) | {"data": common["data"]}
    (recipes / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    losses = {"ce": {"ce": {}}, "kd": {"ce": {}, "kd": {"temperature": 4.0}}, "ddkd": common["losses"]}
    for name in METHODS:
        recipe = common | {"losses": losses[name]} | ({"teacher": None} if name == "ce" else {})
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    run_train("teacher.yaml")
    return recipes


@pytest.fixture
def side(place: Path, run_train: Train) -> Compare:
    """``side(4, "kd.yaml", "seeds=0,1")`` is the command in this process."""

    def run(number: int, *words: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        compare.main([*words, f"side={number}"])

    return run


def outcome(folder: Path) -> dict[str, object]:
    """Return all that a run left but its speed."""
    result = json.loads((folder / "result.json").read_text())
    return {
        "trace": trace(folder / "journal.jsonl"),
        "result": {key: value for key, value in result.items() if key not in SPEEDS},
        **{path.name: path.read_bytes() for path in folder.glob("*.safetensors")},
        "identity": (folder / "identity.json").read_bytes(),
    }


def folders(place: Path) -> list[Path]:
    """Return the folders of the students' runs."""
    return sorted(path for name in METHODS for path in (place / "runs" / name).glob("seed-*"))


def trained_alone(run_train: Train, place: Path, *words: str, seeds: tuple[int, ...], methods: tuple[str, ...]):
    """Train each run by a command of its own, and move it out of the way; return what they left, by folder."""
    found = {}
    for method in methods:
        for seed in seeds:
            run_train(f"{method}.yaml", f"seed={seed}", *words)
            folder = place / "runs" / method / f"seed-{seed}"
            found[folder] = outcome(folder)
    for method in methods:
        (place / "runs" / method).rename(place / f"{method}-alone")
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_four_runs_side_by_side_have_the_bytes_of_four_alone_over_a_stop_and_a_resume(
    run_train: Train, side: Compare, place: Path
):
    seeds, methods = (0, 1), ("kd", "ddkd")
    alone = trained_alone(run_train, place, seeds=seeds, methods=methods)
    command = [f"{name}.yaml" for name in methods] + ["seeds=0,1"]
    with pytest.raises(Interrupted):
        side(4, *command, "stop.steps=3")  # in the middle of the first epoch
    assert not [folder for folder in alone if (folder / "result.json").exists()]
    side(4, *command)
    assert {folder: outcome(folder) for folder in alone} == alone


@pytest.fixture
def rows_of_teacher(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every batch that a teacher computes."""
    rows: list[int] = []
    forward = Teacher.forward

    def counted(teacher: Teacher, batch: Batch) -> Outputs:
        rows.append(len(batch.ids_B))
        return forward(teacher, batch)

    monkeypatch.setattr(Teacher, "forward", counted)
    return rows


def test_seeds_whose_losses_read_only_logits_share_those_of_every_view(
    run_train: Train, side: Compare, place: Path, rows_of_teacher: list[int]
):
    alone = trained_alone(run_train, place, seeds=(0, 1, 2), methods=("kd",))
    assert sum(rows_of_teacher) == 3 * 2 * 60  # seeds × epochs × images
    rows_of_teacher.clear()
    side(3, "kd.yaml", "seeds=0,1,2")
    assert sum(rows_of_teacher) == 2 * 60
    assert {folder: outcome(folder) for folder in alone} == alone


@pytest.mark.parametrize("key", ["data.repeat=2", "data.augment=[{mixup: {alpha: 1.0}}, {cutmix: {alpha: 1.0}}]"])
def test_seeds_with_repeated_or_mixed_images_learn_what_they_learn_alone(
    key: str, run_train: Train, side: Compare, place: Path
):
    words = ("epochs=1", key, "data.views=3")
    for seed in (0, 1):
        run_train("kd.yaml", f"seed={seed}", *words)
    alone = {folder: outcome(folder) for folder in folders(place)}
    (place / "runs").rename(place / "alone")
    side(2, "kd.yaml", "seeds=0,1", *words)
    assert {folder: outcome(folder) for folder in folders(place)} == alone


def test_methods_with_one_order_of_images_share_every_batch_and_the_teachers_outputs(
    side: Compare, place: Path, rows_of_teacher: list[int]
):
    side(3, "ce.yaml", "kd.yaml", "ddkd.yaml")
    assert rows_of_teacher == [12] * (10 + 1)  # one batch a step, and once the images that the report shows of DDKD
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(place)]
    assert [result["side"] for result in results] == [3, 3, 3]


def test_seeds_with_one_order_of_images_share_them_too_and_are_still_different_runs(
    run_train: Train, side: Compare, place: Path, rows_of_teacher: list[int]
):
    run_train("ddkd.yaml", "seed=1", "data.order_seed=0")
    alone = outcome(place / "runs" / "ddkd" / "seed-1")
    (place / "runs" / "ddkd").rename(place / "alone")
    rows_of_teacher.clear()
    side(2, "ddkd.yaml", "seeds=0,1", "data.order_seed=0")
    assert rows_of_teacher == [12] * (10 + 2)
    assert outcome(place / "runs" / "ddkd" / "seed-1") == alone
    first = outcome(place / "runs" / "ddkd" / "seed-0")
    assert first["trace"] != alone["trace"]
    assert first["identity"] != alone["identity"]


def test_a_run_that_is_behind_catches_up_and_the_others_wait(run_train: Train, side: Compare, place: Path):
    alone = trained_alone(run_train, place, seeds=(0, 1), methods=("kd",))
    with pytest.raises(Interrupted):
        side(2, "kd.yaml", "seeds=0,1", "stop.steps=6")
    for checkpoint in (place / "runs" / "kd" / "seed-1" / "checkpoints").glob("step-6"):
        shutil.rmtree(checkpoint)  # as after a kill between the two saves
    side(2, "kd.yaml", "seeds=0,1")
    assert {folder: outcome(folder) for folder in alone} == alone


def test_a_run_that_fails_is_one_line_and_the_others_go_on(
    run_train: Train, side: Compare, place: Path, capsys: pytest.CaptureFixture[str]
):
    alone = trained_alone(run_train, place, seeds=(0,), methods=("kd",))
    bad = yaml.safe_load((place / "ce.yaml").read_text())
    bad["schedule"] = {"kind": "constant", "rate": 1.0e30}
    (place / "bad.yaml").write_text(yaml.safe_dump(bad))
    with pytest.raises(RecipeError, match=r"^1 of 2 runs failed: .*bad.yaml .*seed=0: .* became NaN or inf at step"):
        side(2, "bad.yaml", "kd.yaml")
    assert {folder: outcome(folder) for folder in alone} == alone
    told = capsys.readouterr()
    assert "runs/bad/seed-0: failed: " in told.err
    assert "Traceback" not in told.err
    assert "| `kd` |" in told.out


def test_an_error_that_is_not_the_users_shows_its_place_and_ends_its_own_run_only(
    side: Compare, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    loss = "class Broken(Loss):\n    def forward(self, *_):\n        return {}[1]\n"
    (place / "broken.py").write_text(f"from pipeline.losses._base import Loss\n\n\n{loss}")
    monkeypatch.syspath_prepend(str(place))
    recipe = yaml.safe_load((place / "kd.yaml").read_text()) | {"losses": {"ce": {}, "broken:Broken": {}}}
    (place / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"^1 of 2 runs failed: .*mine.yaml .*seed=0: KeyError: 1$"):
        side(2, "mine.yaml", "ce.yaml")
    assert "return {}[1]" in capsys.readouterr().err
    assert (place / "runs" / "ce" / "seed-0" / "result.json").exists()


def test_runs_of_another_precision_or_accumulation_follow_in_a_group_of_their_own(
    run_train: Train, side: Compare, place: Path
):
    halves = yaml.safe_load((place / "kd.yaml").read_text()) | {"accumulation": 2}
    (place / "halves.yaml").write_text(yaml.safe_dump(halves))
    run_train("halves.yaml")
    alone = outcome(place / "runs" / "halves" / "seed-0")
    (place / "runs" / "halves").rename(place / "alone")
    side(4, "kd.yaml", "halves.yaml", "seeds=0,1")
    assert outcome(place / "runs" / "halves" / "seed-0") == alone


def test_a_signal_saves_every_run_under_way_and_begins_no_other(
    side: Compare, place: Path, monkeypatch: pytest.MonkeyPatch
):
    polled = iter([False] * 8)
    monkeypatch.setattr(signals, "stop_requested", lambda: next(polled, True))
    with pytest.raises(Interrupted):
        side(2, "kd.yaml", "seeds=0,1,2")
    saved = [[path.name for path in folder.glob("checkpoints/*")] for folder in folders(place)]
    assert saved == [["step-4"], ["step-3"]]
    assert not (place / "runs" / "kd" / "seed-2").exists()


def test_a_second_order_of_images_in_memory_decodes_nothing_again(place: Path):
    runs = [run_of("kd.yaml", [f"seed={seed}"]) for seed in (0, 1)]
    parts = SharedParts(runs)
    first, second = (parts.loader(run, torch.device("cpu"), None) for run in runs)
    assert first is not second
    assert first.decoders is second.decoders
    assert first is parts.loader(run_of("ce.yaml"), torch.device("cpu"), None)


def test_a_teacher_with_a_tapped_norm_is_not_shared_with_runs_that_fold_it(place: Path):
    stages = {"stages": {"inner": "layer1.0.bn1", "outer": "layer1"}}
    recipe = yaml.safe_load((place / "kd.yaml").read_text()) | {"losses": {"fitnet": {"stage": "inner"}}}
    recipe["teacher"] |= stages
    recipe["student"] |= stages
    (place / "inner.yaml").write_text(yaml.safe_dump(recipe))
    plain = recipe | {"losses": {"fitnet": {"stage": "outer"}}}
    (place / "outer.yaml").write_text(yaml.safe_dump(plain))
    inner, outer = run_of("inner.yaml"), run_of("outer.yaml")
    parts, device = SharedParts([inner, outer]), torch.device("cpu")
    assert parts.teacher(inner, device) is not parts.teacher(outer, device)
    assert parts.teacher(inner, device) is parts.teacher(inner, device)
