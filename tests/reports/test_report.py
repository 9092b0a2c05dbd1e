"""The report of runs is one HTML page that stands alone, and says what their folders say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_page import draw

from pipeline import report
from pipeline.errors import RecipeError
from pipeline.reports.references import find_references
from pipeline.reports.reported_run import read_run
from shards.documents import DamagedFile

Train = Callable[..., None]


@pytest.fixture
def trained(run_train: Train, recipes: Path) -> Path:
    """A run of DDKD, with its teacher and the student alone."""
    run_train("ddkd.yaml")
    return recipes / "runs"


def test_the_page_stands_alone_and_shows_what_the_folder_says(trained: Path):
    page = draw("runs/ddkd")
    assert not {"script", "link", "img", "iframe", "object", "image"} & {*page.tags}
    assert page.outside == []
    assert "@import" not in Path("report.html").read_text()
    assert "url(http" not in Path("report.html").read_text()
    assert len(page.ids) == len({*page.ids})
    result, alone, teacher = (
        json.loads((trained / name / "result.json").read_text()) for name in ("ddkd", "ce", "teacher")
    )
    for shown in (result, alone, teacher):
        assert f"{shown['top1']:.2f}" in page.text
    sections = ["Learning curves", "Loss parts", "Accuracy and cost", "The denoiser", "Time and memory", "Runs"]
    assert [title for title in page.headings if title in sections] == sections
    assert page.tags.count("svg") == page.tags.count("figure") >= 8
    assert page.text.count("the last feature map of one validation image".capitalize()) == 1
    assert "python pipeline/evaluate.py runs/ddkd agreement=yes" in page.text
    assert "1 start:" in page.text
    assert "million MAC" in page.text


def test_every_picture_says_what_it_shows_and_is_the_same_each_time(trained: Path):
    draw("runs/ddkd")
    first = Path("report.html").read_bytes()
    draw("runs/ddkd")
    assert Path("report.html").read_bytes() == first
    titled = re.findall(
        r'<svg class="picture" role="img" aria-labelledby="([\w-]+)" [^>]*>\s*<title id="\1">.', first.decode()
    )
    assert len(titled) == first.decode().count("<svg")


def test_a_run_that_is_not_finished_is_shown_as_it_stands(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=3")
    page = draw("runs/ce")
    assert "runs/ce is not finished: step 3 of 10." in page.text
    with (recipes / "runs/ce/journal.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')  # cut in the middle of a line
    assert "step 3 of 10." in draw("runs/ce").text


def test_memory_and_utilization_of_a_gpu_are_drawn_where_the_journal_has_them(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=3")
    assert "GPU memory" not in draw("runs/ce").text
    journal = recipes / "runs/ce/journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line["timing"] |= {"mfu": 0.4, "memory_gib": {"allocated": 3.5, "reserved": 4.0}}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = draw("runs/ce")
    assert "GPU memory of the first rank" in page.text
    assert "Model FLOPs utilization" in page.text


def test_seeds_and_methods_are_compared(run_train: Train, recipes: Path):
    for method in ("ce", "teacher"):
        tree = yaml.safe_load((recipes / f"{method}.yaml").read_text())
        (recipes / f"{method}.yaml").write_text(yaml.safe_dump({**tree, "epochs": 1, "folder": None}))
        for seed in (0, 1):
            run_train(f"{method}.yaml", f"seed={seed}")
    page = draw("ce.yaml", "runs/teacher")
    results = [json.loads((recipes / f"runs/ce/seed-{seed}/result.json").read_text())["top1"] for seed in (0, 1)]
    assert f"ce: {results[0]:.2f}, {results[1]:.2f}" in page.text
    assert "Methods and seeds" in page.headings
    assert all(f"runs/{name}/seed-{seed} finished" in page.text for name in ("ce", "teacher") for seed in (0, 1))


def test_names_of_the_user_cannot_break_the_page(run_train: Train, recipes: Path):
    folder = "runs/a<b>&'\"/seed-0"
    run_train("ce.yaml", "epochs=1", f"folder={json.dumps(folder)}")
    page = draw(folder)
    assert folder in page.text
    assert "b" not in page.tags[: page.tags.index("ul")]


def change(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a recipe or of a JSON file."""
    tree = yaml.safe_load(path.read_text()) | changes
    path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))


def test_runs_of_one_method_that_differ_in_more_than_the_seed_are_not_its_seeds(begun: Path):
    again = shutil.copytree(begun / "runs/ce", begun / "runs/again")
    change(again / "recipe.yaml", seed=1)
    change(again / "identity.json", seed=1)
    assert "ce (runs" not in draw("runs/ce", "runs/again").text
    change(again / "identity.json", batch=6)
    text = draw("runs/ce", "runs/again").text
    assert "ce (runs/ce)" in text
    assert "ce (runs/again)" in text


def test_a_seed_that_is_not_finished_does_not_count_in_the_mean(run_train: Train, recipes: Path):
    run_train("ce.yaml", "epochs=1")
    part = shutil.copytree(recipes / "runs/ce", recipes / "runs/part")
    (part / "result.json").unlink()
    change(part / "recipe.yaml", seed=1)
    journal = part / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps(line | {"top1": 77.0}) + "\n" for line in lines))
    table = draw("runs/ce", "runs/part").text.partition("Learning curves")[0]
    assert "1 of 2" in table
    assert "77.00" not in table


def test_the_metric_of_a_teachers_run_is_not_shown_for_other_weights(trained: Path):
    other = shutil.copytree(trained / "ddkd", trained / "replaced")
    measured = json.loads((trained / "teacher" / "result.json").read_text())["top1"]
    assert find_references([read_run(other)]).teacher_metric == measured
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    change(other / "recipe.yaml", teacher={**recipe["teacher"], "weights": "best.safetensors"})
    found = find_references([read_run(other)])
    assert found.teacher_metric is None
    assert "The teacher has other weights than its run's last" in " ".join(found.notes)


def test_runs_of_several_teachers_have_no_share_of_the_gap(trained: Path):
    other = shutil.copytree(trained / "ddkd", trained / "other")
    assert "have different teachers" not in draw("runs/ddkd", "runs/other").text
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    change(other / "recipe.yaml", teacher={**recipe["teacher"], "recipe": None, "model": "wrn_16_1", "weights": "x"})
    text = draw("runs/ddkd", "runs/other").text
    assert "have different teachers" in text
    assert "gap closed" not in text


def test_the_page_needs_no_loss_of_the_users_own(begun: Path):
    change(begun / "runs/ce/recipe.yaml", losses={"gone_losses:Mine": {}})
    page = draw("runs/ce")
    assert page.headings[0] == "Learning curves"
    assert "gone_losses:Mine" in page.text  # in the recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run's folder"),
        (["runs/none"], "runs/none: there is no such folder"),
        (["empty"], "empty: there is no finished run in it"),
        (["runs/ce", "seed=1"], "seed=1: a report changes no key"),
        (["runs/ce", "out=empty"], "out: empty is a folder"),
        (["runs/new"], r"runs/new: this run has not begun \(no step in journal.jsonl yet\)"),
        (["runs/evaluated"], r"runs/evaluated: this run has not begun"),
        (["runs/ce", "runs/other"], r"runs/ce and runs/other are of different data \(shards\)"),
        (["runs/ce", "runs/classes"], r"different data \(classes\)"),
        (["runs/ce", "runs/held"], r"different data \(data.holdout\)"),
    ],
)
def test_what_cannot_be_reported_is_one_line(begun: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        report.main(words)


@pytest.fixture
def begun(run_train: Train, recipes: Path) -> Path:
    """A run of one step, and copies of it that were changed."""
    run_train("ce.yaml", "stop.steps=1")
    (recipes / "empty").mkdir()
    keys = {"other": "manifest", "classes": "classes"}
    for name in ("new", "evaluated", "other", "classes", "held"):
        copy = shutil.copytree(recipes / "runs/ce", recipes / "runs" / name)
        if key := keys.get(name):
            tree = json.loads((copy / "identity.json").read_text())
            tree["data"][key] = "0" * 64
            (copy / "identity.json").write_text(json.dumps(tree))
    (recipes / "runs/new/journal.jsonl").write_text("")
    (recipes / "runs/evaluated/journal.jsonl").write_text('{"step": 1, "epoch": 1, "top1": 5.0}\n')
    tree = yaml.safe_load((recipes / "runs/held/recipe.yaml").read_text())
    tree["data"]["holdout"] = {"share": 0.2}
    (recipes / "runs/held/recipe.yaml").write_text(yaml.safe_dump(tree))
    return recipes


def test_a_journal_that_is_damaged_inside_is_refused_with_its_line(begun: Path):
    journal = begun / "runs/ce/journal.jsonl"
    journal.write_bytes(b"{damaged\n" + journal.read_bytes())
    with pytest.raises(DamagedFile, match=r"journal.jsonl: line 1"):
        report.main(["runs/ce"])


UNMEASURED: dict[str, Any] = {
    **dict.fromkeys(("weights", "sha256", "recipe", "task", "shards", "shards_sha256", "data", "device"), ""),
    **dict.fromkeys(("real_labels", "per_class", "confusion", "reliability", "teacher", "agreement", "kl", "speed")),
    **{"samples": 0, "metrics": {}, "classes": [], "threads": 1},
    "network": {"model": "cifar_resnet8", "parameters": 1, "macs": 2, "bytes": 3},
}
"""An evaluation without a figure."""


def bins(step: int) -> dict[str, list[float]]:
    """Return 15 bins of confidence."""
    middles = [(number + 0.5) / 15 for number in range(15)]
    return {"samples": [step] * 15, "confidence": middles, "accuracy": [middle**2 for middle in middles]}


def test_an_evaluation_adds_calibration_and_single_classes(trained: Path):
    classes = [f"class <{number}>" for number in range(25)]
    ours = {"samples": [4] * 25, "correct": [number % 5 for number in range(25)]}
    theirs = {"samples": [4] * 25, "correct": [2] * 25}
    evaluation = UNMEASURED | {
        "sha256": "0" * 64,
        "samples": 100,
        "metrics": {"top1": 50.0, "top5": 80.0, "nll": 1.5, "ece": 7.25},
        "classes": classes,
        "per_class": ours,
        "reliability": bins(4),
        "teacher": {"name": "cifar_resnet20", "metrics": {"top1": 60.0}, "per_class": theirs, "reliability": None},
        "agreement": 61.25,
        "kl": 0.5,
        "speed": [{"batch": 1, "latency_ms": 2.5, "low_ms": 2, "high_ms": 3, "images_per_second": 400}],
    }
    (trained / "ddkd/evaluation.json").write_text(json.dumps(evaluation))
    page = draw("runs/ddkd")
    assert "against the teacher: the 10 best and worst of 25 classes" in page.text
    assert "class <4> +50.0" in page.text
    assert all(text in page.text for text in ("61.25", "7.25", "ms latency"))
    assert "evaluation.json is of weights that this run no longer has" in page.text
    (trained / "ce/evaluation.json").write_text(json.dumps(evaluation | {"teacher": None, "per_class": theirs}))
    assert "against the student alone" in draw("runs/ddkd").text


def test_an_evaluation_of_several_classes_each_has_no_calibration(trained: Path):
    evaluation = UNMEASURED | {"task": "multilabel", "metrics": {"map": 50.0, "f1": 40.0}}
    (trained / "ddkd/evaluation.json").write_text(json.dumps(evaluation))
    page = draw("runs/ddkd")
    assert "Single classes and calibration" in page.headings
    assert "Reliability" not in page.text
