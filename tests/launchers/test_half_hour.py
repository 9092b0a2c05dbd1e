"""``launchers/gpu/half_hour.py``: stages that fail, hang or are stopped, and what is left to read afterwards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from one_core import one_core

from pipeline.config.measured import read_results
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
CIFAR_PAIR = "configs/cifar100/resnet56_resnet20.yaml"
GPU = ROOT / "launchers" / "gpu"
SCRIPT = GPU / "half_hour.py"
MODULES = ("half_hour", "options", "report", "stages", "supervise", "checks")


@pytest.fixture
def half_hour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in a folder of its own."""
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.chdir(tmp_path)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import half_hour

    return half_hour


Staged = Callable[..., None]


@pytest.fixture
def staged(half_hour: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Staged:
    """``staged(name="Python code", …)`` are the stages of command 1, of at most three seconds each."""
    from stages import HalfHourStage

    def define(**codes: str) -> None:
        stages = [HalfHourStage(name, 3.0, (sys.executable, "-c", code, "{folder}")) for name, code in codes.items()]
        monkeypatch.setattr(half_hour, "stages_of", lambda command, options: stages)

    return define


def ended(half_hour: ModuleType, *words: str) -> int:
    try:
        half_hour.main(["1", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def statuses(out: Path = Path("runs/half_hour")) -> dict[str, str]:
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    return {result["name"]: result["status"] for result in results}


ANSWER = (
    "import json, pathlib, sys; pathlib.Path(sys.argv[1], 'answer.json').write_text(json.dumps("
    "{'passed': %s, 'title': 'Pixels', 'columns': ['a', 'b'], 'rows': [['x', 1]], 'notes': 'they differ'}))"
)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(half_hour: ModuleType, staged: Staged):
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '77777']); time.sleep(60)"
    staged(good="print('fine')", broken="raise SystemExit('it broke')", hanging=hangs, last="print('still here')")
    assert ended(half_hour) == 1
    assert statuses() == {"good": "passed", "broken": "FAILED", "hanging": "FAILED", "last": "passed"}
    summary = Path("runs/half_hour/summary.md").read_text()
    assert "exit code 1: it broke" in summary
    assert "not finished after 3 s" in summary
    assert "77777" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_what_has_passed_is_not_run_again_and_what_has_not_is(half_hour: ModuleType, staged: Staged):
    once = "import pathlib; pathlib.Path('ran').open('a').write('x')"
    staged(first=once, second="import pathlib; raise SystemExit(not pathlib.Path('mended').exists())")
    assert ended(half_hour) == 1
    Path("mended").touch()
    assert ended(half_hour) == 0
    assert Path("ran").read_text() == "x"
    assert statuses() == {"first": "passed", "second": "passed"}


def test_a_check_that_finds_something_wrong_fails_with_its_table(half_hour: ModuleType, staged: Staged):
    staged(right=ANSWER % True, wrong=ANSWER % False)
    assert ended(half_hour) == 1
    assert statuses() == {"right": "passed", "wrong": "FAILED"}
    assert "| wrong | FAILED |" in Path("runs/half_hour/summary.md").read_text()
    assert "they differ" in Path("runs/half_hour/summary.md").read_text()
    assert (
        Path("runs/half_hour/benchmarks.md").read_text().count("## Pixels\n\n| a | b |\n| --- | --- |\n| x | 1 |") == 2
    )


def test_no_stage_begins_when_the_minutes_are_over(half_hour: ModuleType, staged: Staged):
    staged(first="print('too late')")
    assert ended(half_hour, "minutes=0.1") == 1
    assert statuses() == {"first": "no time"}
    assert "| first | no time |" in Path("runs/half_hour/summary.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "pass the commands to run, 1, 2 or 3"),
        (["4"], "not 4"),
        (["1", "minuts=3"], "minuts: Extra inputs are not permitted"),
        (["1", "minutes=-1"], "minutes: Input should be greater than 0"),
        (["1", "minutes=["], "is not YAML"),
        (["1", "rehearse=yes"], "rehearse: write 1 2 3 and --rehearse"),
    ],
)
def test_words_that_mean_nothing_are_one_line(half_hour: ModuleType, words: list[str], told: str):
    with pytest.raises(RecipeError) as caught:
        half_hour.main(words)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rehearsal_waits_longer_for_a_stage(half_hour: ModuleType, staged: Staged):
    staged(slow="import time; time.sleep(3.5)")  # of three seconds
    assert ended(half_hour, "--rehearse") == 0
    assert ended(half_hour, "out=runs/other") == 1
    assert statuses(Path("runs/other")) == {"slow": "FAILED"}


def test_a_rehearsal_is_no_result(half_hour: ModuleType, staged: Staged):
    staged(first="print('fine')")
    assert ended(half_hour, "--rehearse") == 0
    with pytest.raises(RecipeError, match=r"contains other results \(rehearse was True there and is False here\)"):
        ended(half_hour)


def test_what_a_stage_started_ends_with_it_even_if_it_ignores_the_signal(half_hour: ModuleType, staged: Staged):
    deaf = "trap '' TERM; sleep 88888"
    staged(leaving=f"import subprocess; subprocess.Popen(['bash', '-c', {deaf!r}])")
    assert ended(half_hour) == 0
    assert "88888" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


FACTS = {"identity": "", "model": "m", "parameters": 1, "epochs": 240, "images_per_second": 1.0, "images": 50_000}
TEACHER = "teacher={recipe: null, model: cifar_resnet56, weights: teacher.pt}"


def finish(out: Path, seed: int, top1: float, **override: str) -> None:
    """Write the files of a finished run of KD, as the third command leaves it."""
    folder = out / "runs" / "cifar100" / "resnet56_resnet20" / "kd" / f"seed-{seed}"
    folder.mkdir(parents=True)
    words = ["method=kd", f"seed={seed}", TEACHER, "data.validation_batch=2000", "checkpoints.every_epochs=60"]
    loaded = load_recipe(ROOT / CIFAR_PAIR, [*words, *(f"{key}={value}" for key, value in override.items())])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dump_recipe(loaded.recipe)))
    digests = {"data": {"manifest": "a", "classes": "b"}, "teacher": {"weights": "sha256:c"}}
    identity = {"student": {}, "losses": {}, **digests}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    (folder / "identity.json").write_text(json.dumps(identity))
    measured = {"identity": digest, "top1": top1, "best_top1": top1 + 0.5, "sha256": {"student.safetensors": str(top1)}}
    result = {**FACTS, **measured, "recipe": f"{CIFAR_PAIR} method=kd", "shards": "prepare_cifar"}
    (folder / "result.json").write_text(json.dumps(result))


def test_finished_runs_are_results_that_can_be_copied(half_hour: ModuleType):
    from report import write_reports

    out = Path("out")
    for seed, top1 in enumerate((70.0, 71.0)):
        finish(out, seed, top1)
    finish(out, 2, 20.0, epochs="1")
    for _ in range(2):  # it is called after every stage
        write_reports(out, is_real=True)
    runs = read_results(out / "results" / "cifar100" / "resnet56_resnet20" / "kd.json")
    assert [(run.seed, run.last, run.best, run.teacher) for run in runs] == [
        (0, 70.0, 70.5, "sha256:c"),
        (1, 71.0, 71.5, "sha256:c"),
    ]
    assert "Not recorded: out/runs/cifar100/resnet56_resnet20/kd/seed-2: trained with other values of epochs" in (
        (out / "summary.md").read_text()
    )


def test_runs_on_generated_inputs_are_no_results(half_hour: ModuleType):
    from options import read_options
    from report import write_reports

    finish(Path("out"), 0, 70.0)
    write_reports(Path("out"), is_real=False)
    assert not Path("out/results").exists()
    real = ("3", "cifar=shards", "weights=teacher.pt")
    assert read_options([*real, "out=a"]).is_real
    for number, words in enumerate((real[:2], (real[0], real[2]), (*real, "--rehearse"))):
        assert not read_options([*words, f"out=b{number}"]).is_real


def test_only_the_named_stages_run_and_keep_their_folders(half_hour: ModuleType, staged: Staged, tmp_path: Path):
    staged(first="", second="", third="")
    assert ended(half_hour, "stages=third,first", f"out={tmp_path}/out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["101-first", "103-third"]
    with pytest.raises(RecipeError, match=r"no stage 'fourth'.*known: first, second, third"):
        ended(half_hour, "stages=fourth", f"out={tmp_path}/out")


def test_every_stage_names_a_recipe_and_overrides_that_load(half_hour: ModuleType):
    from options import read_options
    from stages import all_methods, short_run, stages_of

    options = read_options(["1", "2", "3", "out=full"])
    for method in all_methods():
        path, *words = short_run(options, method)
        load_recipe(path, words)
    assert len(all_methods()) > 20
    benched = [stage.args for stage in stages_of(2, options)]
    assert all(args[1].endswith("bench.py") for args in benched)
    own = ("out", "repeats", "steps", "warmup", "--tune")
    for _, _, _, path, *words in benched:
        load_recipe(path, [word for word in words if word.partition("=")[0] not in own])
    (stage,) = stages_of(3, options)
    assert [word for word in stage.args if word.startswith("methods=")] == ["methods=kd,dkd,perception"]
    assert Path(stage.args[2]) == ROOT / CIFAR_PAIR


def rehearsed(tmp_path: Path, *words: str) -> dict[str, str]:
    """Rehearse stages as a user would, and return their statuses."""
    began = time.monotonic()
    command = [sys.executable, str(SCRIPT), "1", "2", "3", "--rehearse", f"out={tmp_path}/out", *words]
    with one_core():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"rehearsed in {time.monotonic() - began:.0f} s")
    assert not (tmp_path / "out" / "results").exists()  # a rehearsal is no result
    return statuses(tmp_path / "out")


@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_a_part_of_each_command_is_rehearsed_on_this_machine(tmp_path: Path):
    names = ("inputs", "methods", "side", "cifar-kd", "cells")
    assert rehearsed(tmp_path, f"stages={','.join(names)}") == dict.fromkeys(names, "passed")
    run = tmp_path / "out" / "runs" / "cifar100" / "resnet56_resnet20" / "kd" / "seed-0"
    assert (run / "result.json").is_file()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_of_it_is_rehearsed_on_this_machine(tmp_path: Path):
    found = rehearsed(tmp_path)
    assert set(found.values()) == {"passed"}
    assert len(found) > 20
    tables = (tmp_path / "out" / "benchmarks.md").read_text()
    for title in ("## Machine", "## Milliseconds per step of every method", "## Losses against float64", "## A step"):
        assert title in tables
