"""Measured results: what is recorded of a finished run, what is refused, and the tables that are made of the files."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import DATA, STRATEGY
from training_on_ranks import train

from pipeline.config.measured import MeasuredRun, measured, read_results, results_file
from pipeline.config.source import RecipeSource
from pipeline.config.tables import load_tables
from pipeline.errors import ROOT, RecipeError
from pipeline.runs.files import RESULT_FILE, read_result, read_versions
from pipeline.runs.recording import record_run
from pipeline.training.result import training_seconds
from shards.documents import DamagedFile

SCRIPT = runpy.run_path(str(ROOT / "configs" / "results.py"))
PAIR = "configs/tiny/pair.yaml"
RUN = Path("runs/tiny/pair/kd")
FILE = Path("results/tiny/pair/kd.json")


@contextmanager
def project_at(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Be in a folder whose ``configs/`` are those of the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in ("config.source", "config.measured", "runs.recording", "training.result"):
            patch.setattr(f"pipeline.{module}.CONFIGS", folder / "configs")
        yield patch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A folder with a pair, its teacher, shards that are not called drawn, and runs of both: KD with two seeds."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(shards, folder / "shards")
    name_tool(folder, "prepare_imagenet")
    data = {**DATA, "path": "shards", "samples": 60}
    pair = {"student": {"model": "cifar_resnet8"}, "teacher": {"recipe": "teachers/teacher.yaml"}}
    teacher = {"student": {"model": "cifar_resnet20"}, "losses": {"ce": {}}, "epochs": 1}
    for name, recipe in {"pair": pair, "teachers/teacher": teacher}.items():
        path = folder / "configs" / "tiny" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"data": data, **STRATEGY, **recipe}))
    with project_at(folder):
        for words in (["configs/tiny/teachers/teacher.yaml"], *([PAIR, "method=kd", f"seed={n}"] for n in (0, 1))):
            train_here(*words)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that folder, to be in."""
    folder = shutil.copytree(trained, tmp_path / "project")
    # The recipes of the copied runs are in the first folder.
    for path in folder.glob("runs/**/re*"):
        path.write_text(path.read_text().replace(str(trained), str(folder)))
    with project_at(folder):
        yield folder


def train_here(*words: str) -> None:
    train(0, 1, Path.cwd(), list(words))


def name_tool(folder: Path, tool: str) -> None:
    manifest = folder / "shards" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tool": tool}))


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes them."""
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def refusal(folder: Path = RUN / "seed-0") -> str:
    """Return the message with which a run is refused, one line."""
    with pytest.raises((RecipeError, DamagedFile)) as caught:
        record_run(folder, Path("results"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_run_is_recorded_with_what_it_was_made_with(project: Path):
    assert record_run(RUN / "seed-0", Path("results")) == FILE
    (run,) = read_results(FILE)
    result, versions = read_result(RUN / "seed-0"), read_versions(RUN / "seed-0")
    teacher = read_result(Path("runs/tiny/teachers/teacher/seed-0"))
    assert result
    assert teacher
    assert versions
    assert (run.seed, run.last, run.best, run.top5) == (0, result.last, result.best, result.metrics["top5"])
    assert (run.epochs, run.ranks, run.identity) == (2, 1, result.identity)
    assert (run.commit, run.versions["torch"]) == (versions["commit"], versions["torch"])
    assert run.teacher == f"run:{teacher.identity}"
    assert run.card
    assert result.seconds
    assert result.seconds > 0


def test_a_second_seed_joins_the_first_and_the_same_run_again_changes_nothing(project: Path):
    for seed in (1, 0):
        record_run(RUN / f"seed-{seed}", Path("results"))
    assert [run.seed for run in read_results(FILE)] == [0, 1]
    before = FILE.read_text()
    record_run(RUN / "seed-0", Path("results"))
    assert FILE.read_text() == before


def test_an_unfinished_run_is_refused(project: Path):
    train_here(PAIR, "method=kd", "seed=2", "stop.steps=3")
    assert "there is no finished run (no result.json)" in refusal(RUN / "seed-2")
    assert "there is no finished run" in refusal(Path("nowhere"))


def test_a_run_with_overrides_is_refused_and_they_are_named(project: Path):
    train_here(PAIR, "method=kd", "epochs=1", "losses.kd.temperature=2", "folder=short")
    assert "trained with other values of epochs, losses.kd.temperature than" in refusal(Path("short"))


def test_overrides_that_change_no_number_are_no_other_recipe(project: Path):
    shutil.move("shards", "moved")
    words = ("data.path=moved", "folder=elsewhere", "data.validation_batch=7", "checkpoints.keep=1", "graph=false")
    train_here(PAIR, "method=kd", "seed=2", *words)
    record_run(Path("elsewhere"), Path("results"))
    assert [run.seed for run in read_results(FILE)] == [2]


def test_a_recipe_that_changed_since_is_another_one(project: Path):
    path = Path(PAIR)
    path.write_text(path.read_text().replace("rate: 0.05", "rate: 0.06"))
    assert "other values of schedule.rate than" in refusal()


def test_another_teacher_is_another_recipe_but_for_weights_of_the_same_network(project: Path):
    other = "teacher={recipe: null, model: cifar_resnet20, weights: teacher.safetensors}"
    shutil.copy("runs/tiny/teachers/teacher/seed-0/student.safetensors", "teacher.safetensors")
    train_here(PAIR, "method=kd", "seed=2", other, "folder=by_weights")
    record_run(Path("by_weights"), Path("results"))
    (run,) = read_results(FILE)
    assert run.teacher
    assert run.teacher.startswith("sha256:")
    # Its teacher is known by its weights, that of the others by its run: nothing says that they are the same.
    assert "its teacher (run:" in refusal()
    recipe = Path("by_weights/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("model: cifar_resnet20", "model: cifar_resnet32"))
    assert "other values of teacher.model" in refusal(Path("by_weights"))


def test_another_run_of_a_recorded_seed_is_refused(project: Path):
    record_run(RUN / "seed-0", Path("results"))
    result = json.loads((RUN / "seed-0" / RESULT_FILE).read_text())
    change(RUN / "seed-0" / RESULT_FILE, sha256={**result["sha256"], "student.safetensors": "0" * 64})
    assert "has another run of seed 0" in refusal()


def test_drawn_images_measure_no_data_set(project: Path):
    for script in ("prepare_demo", "prepare_scenes", "half_hour"):
        change(RUN / "seed-0" / RESULT_FILE, shards=script)
        assert "its images are drawn" in refusal()


def test_a_run_on_fewer_images_than_the_recipe_says_is_refused(project: Path):
    change(RUN / "seed-0" / RESULT_FILE, images=50)
    assert "trained on 50 images, and" in refusal()


def test_a_result_of_earlier_code_is_read_and_what_it_lacks_is_told(project: Path):
    path = RUN / "seed-0" / RESULT_FILE
    change(path, recipe=None, shards=None, images=None, seconds=None, device=None, ranks=None)
    old = read_result(RUN / "seed-0")
    assert old
    assert old.seconds is None
    assert "names no recipe of" in refusal()
    path.unlink()  # as the message advises
    train_here(PAIR, "method=kd", "seed=0")
    record_run(RUN / "seed-0", Path("results"))
    assert read_results(FILE)[0].last == old.last


def test_a_recipe_outside_the_project_has_no_results(project: Path):
    text = Path(PAIR).read_text()
    Path("elsewhere.yaml").write_text(text.replace("teachers/", "configs/tiny/teachers/"))
    train_here("elsewhere.yaml", "method=kd")
    assert "names no recipe of" in refusal(Path("runs/elsewhere/kd/seed-0"))
    method = shutil.copy(ROOT / "configs" / "methods" / "kd.yaml", "own.yaml")
    train_here(PAIR, f"method={method}", "folder=own_method")
    assert "is no recipe of" in refusal(Path("own_method"))


def test_a_result_of_another_run_is_refused(project: Path):
    shutil.copy(RUN / "seed-1" / RESULT_FILE, RUN / "seed-0")
    assert "result.json is of another run than identity.json" in refusal()


def test_a_damaged_file_of_results_is_one_line(project: Path):
    FILE.parent.mkdir(parents=True)
    for text, key in {'[{"seed": "0"}]': "0.seed", "[": "kd.json", '[{"seed": 0, "lost": 1}]': "0.last"}.items():
        FILE.write_text(text)
        assert key in refusal()
        assert FILE.read_text() == text


def test_seconds_are_summed_over_the_commands_of_a_run():
    def line(step: int, speed: float) -> dict[str, Any]:
        return {"step": step, "timing": {"images_per_second": speed}}

    # 10 steps at 50 images a second; after an evaluation and a resume, 10 steps at 20.
    lines = [line(1, 50.0), line(10, 50.0), {"step": 10, "top1": 3.0}, line(20, 20.0)]
    assert training_seconds(lines, batch=5) == pytest.approx(10 * 5 / 50 + 10 * 5 / 20)
    assert training_seconds([], batch=5) == 0


def run_of_seed(seed: int, last: float, best: float, **more: Any) -> dict[str, Any]:
    facts = {"top5": 90.0 + seed, "epochs": 240, "minutes": 1234.56, "card": "a card", "ranks": 1 + seed}
    facts |= {"commit": "0123456789abcdef", "uncommitted_changes": bool(seed), "versions": {"torch": "2"}}
    return {"seed": seed, "last": last, "best": best, **facts, "teacher": "sha256:" + "ab" * 32, **more} | {
        "identity": "i",
        "student": f"s{seed}",
    }


def write_runs(path: Path, *runs: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([MeasuredRun(**run).model_dump(mode="json") for run in runs]))


def page_of(results: Path) -> dict[str, str]:
    """Return the sections of the page that the script makes of a folder of results, by their titles."""
    text = SCRIPT["page"](f"# Fixed\n\n{SCRIPT['BEGIN']}old{SCRIPT['END']}the end\n", load_tables(), results)
    assert text.startswith("# Fixed\n")
    assert text.endswith("the end\n")
    assert "old" not in text
    return dict(part.split("\n", 1) for part in re.split("^### ", text, flags=re.MULTILINE)[1:])


def test_the_table_shows_mean_and_sample_deviation_of_two_seeds(tmp_path: Path):
    pair = tmp_path / "cifar100" / "resnet56_resnet20"
    write_runs(pair / "kd.json", run_of_seed(0, 70.0, 70.5), run_of_seed(1, 71.0, 71.25))
    write_runs(pair / "dkd_cached.json", run_of_seed(0, 69.0, 69.0))
    sections = page_of(tmp_path)
    section = sections["CIFAR-100, ResNet-56 to ResNet-20"]
    # The mean of 70 and 71 is 70.5, their deviation √(2 · 0.5² / 1) = 0.71; of 70.5 and 71.25 √(2 · 0.375²) = 0.53.
    row = "| [`kd`](../configs/methods/kd.yaml) | 70.66 | 70.66 | 70.66 | 70.50 ± 0.71 (70.88 ± 0.53), 2 seeds |"
    assert row in section
    assert "| `dkd_cached` |  |  |  | 69.00 (69.00), 1 seed |" in section
    assert "| recipe | DDKD, table 2 | perception, table 3 | CRD, table 1 | ours |" in section
    facts = "| 71.00 | 71.25 | 240 | 1,234.6 | 2 × a card | 012345678 and changes | sha256:abababababab |"
    assert f"| `kd` | 1 {facts}" in section
    assert "not measured" not in section
    others = [text for title, text in sections.items() if title != "CIFAR-100, ResNet-56 to ResNet-20"]
    assert all("not measured yet" in text and "ours" not in text for text in others)


def test_top5_has_a_column_where_the_papers_print_it(tmp_path: Path):
    write_runs(tmp_path / "imagenet" / "r50_mbv1" / "kd.json", run_of_seed(0, 70.0, 70.5), run_of_seed(1, 70.0, 70.5))
    section = page_of(tmp_path)["ImageNet, ResNet-50 to MobileNetV1"]
    assert "| ours | ours, top-5 |" in section
    assert "| 70.00 ± 0.00 (70.50 ± 0.00), 2 seeds | 90.50 ± 0.71 |" in section


def test_recipes_of_no_paper_have_a_section_of_their_own_and_a_teacher_is_in_both(tmp_path: Path):
    write_runs(tmp_path / "cifar100" / "proxy" / "kd.json", run_of_seed(0, 26.0, 26.5, side=6))
    write_runs(tmp_path / "cifar100" / "teachers" / "resnet56.json", run_of_seed(0, 72.0, 72.5, teacher=None))
    sections = page_of(tmp_path)
    assert "| recipe | ours |\n| --- | --- |\n| `kd` | 26.00 (26.50), 1 seed |" in sections["configs/cifar100/proxy"]
    assert "| a card, 6 runs together |" in sections["configs/cifar100/proxy"]
    assert "| `resnet56` | 72.00 (72.50), 1 seed |" in sections["configs/cifar100/teachers"]
    pair = sections["CIFAR-100, ResNet-56 to ResNet-20"]
    assert "| the teacher | 72.34 |  | 72.34 | 72.00 (72.50), 1 seed |" in pair
    assert "`configs/cifar100/resnet56_resnet20.yaml`: not measured yet." in pair


def test_every_number_of_the_papers_is_on_the_page(tmp_path: Path):
    sections, tables = page_of(tmp_path), load_tables()
    shown = sum(len(re.findall(r"\| \d+\.\d\d(?= )", text)) for text in sections.values())
    pairs = [pair for dataset in tables.datasets.values() for pair in dataset.pairs.values()]
    assert shown == sum(len(printed) for pair in pairs for printed in pair.published.values())


def test_the_page_of_the_tree_is_what_the_script_writes():
    SCRIPT["main"](["--check"])


def test_adding_a_run_writes_the_page_and_a_page_that_is_out_of_date_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    main = SCRIPT["main"]
    shutil.copy(SCRIPT["PAGE"], "page.md")
    for name, path in {"PAGE": Path("page.md"), "RESULTS": Path("results")}.items():
        monkeypatch.setitem(main.__globals__, name, path)
    main(["add", str(RUN / "seed-0"), str(RUN / "seed-1")])
    assert "seed-1: recorded in results/tiny/pair/kd.json" in capsys.readouterr().out
    assert ", 2 seeds |" in Path("page.md").read_text()
    main(["--check"])
    write_runs(FILE, run_of_seed(0, 26.0, 26.5))
    with pytest.raises(SystemExit) as ended:
        main(["--check"])
    assert ended.value.code == 1
    assert "run python configs/results.py" in capsys.readouterr().out
    main([])
    main(["--check"])
    assert "26.00 (26.50), 1 seed" in Path("page.md").read_text()


def test_a_recipe_knows_its_file_of_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pair = ROOT / "configs" / "cifar100" / "proxy.yaml"
    assert results_file(RecipeSource(pair, "kd"), Path("r")) == Path("r/cifar100/proxy/kd.json")
    assert results_file(RecipeSource(pair, "kd", ("cached",)), Path("r")) == Path("r/cifar100/proxy/kd_cached.json")
    teacher = ROOT / "configs" / "cifar100" / "teachers" / "resnet56.yaml"
    assert results_file(RecipeSource(teacher), Path("r")) == Path("r/cifar100/teachers/resnet56.json")
    assert measured(RecipeSource(tmp_path / "pair.yaml", "kd")) == []


@pytest.mark.parametrize("words", [["add"], ["--check", "x"], ["runs/x"]])
def test_words_that_mean_nothing_are_refused(words: list[str]):
    with pytest.raises(RecipeError, match="command line: expected nothing, --check, or add"):
        SCRIPT["main"](words)
