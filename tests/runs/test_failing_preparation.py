"""What a run stands on and cannot be made is one line, said by the process that was to make it or by this one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline import evaluate, train
from pipeline.cli import entry
from pipeline.errors import RecipeError
from pipeline.runs import dependencies

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recipes, and of two scripts of the user's."""
    (recipes / "idle.py").write_text("")
    (recipes / "broken.py").write_text("import sys\nsys.exit(7)\n")
    monkeypatch.chdir(recipes)
    return recipes


def refusal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that the command ends in."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        entry(train.main)
    assert end.value.code == 2
    line, *more = capfd.readouterr().err.splitlines()
    assert not more
    return line


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        ("['']", "data.prepare: there is no script ''; name one such as shards/prepare_demo.py"),
        ("[missing.py]", "data.prepare: there is no script 'missing.py'; name one"),
        ("[.]", "data.prepare: there is no script '.'; name one"),
        ("[/dev/null]", "data.prepare: there is no script '/dev/null'; name one"),
        ('["a\\0b"]', "data.prepare: there is no script 'a\\x00b'; name one"),
        ("[{}/idle.py]", "idle.py new made no manifest.json in 'new'; name a script that prepares shards"),
        ("[{}/broken.py]", "failed with exit code 7: python"),
        ("[shards/prepare_demo.py, --foo]", "error: unrecognized arguments: --foo (--help lists the options)"),
        ("[shards/prepare_demo.py, --size, '0']", "error: argument --size: expected a whole number from 1 to 8,192"),
    ],
)
def test_a_preparation_that_makes_no_shards_is_one_line(
    place: Path, prepare: str, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = ("ce.yaml", f"data.prepare={prepare.replace('{}', str(place))}", "data.path=new")
    line = refusal(monkeypatch, capfd, *words)
    assert line.startswith("error: ")
    assert told in line


def test_what_a_run_folder_says_of_a_preparation_is_not_run(place: Path):
    run = place / "runs" / "given"
    run.mkdir(parents=True)
    script = run / "script.py"
    script.write_text(f"open({str(place / 'canary')!r}, 'w')\n")
    recipe = yaml.safe_load((place / "ce.yaml").read_text())
    recipe["data"] |= {"path": "gone", "prepare": [str(script)]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"data\.path: there are no shards in 'gone' .* or give data\.path=FOLDER$"):
        evaluate.main([str(run)])
    assert not (place / "canary").exists()


@pytest.mark.parametrize("code", [1, -signal.SIGKILL])
def test_a_run_that_ends_without_a_word_is_named(
    place: Path, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(dependencies, "_status", lambda command: code)
    line = refusal(monkeypatch, capfd, "ddkd.yaml")
    start = f"error: this run depends on a command that failed with exit code {code}: python pipeline/train"
    assert line.startswith(start)


def test_nothing_is_added_to_what_the_other_process_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def status(command: list[str]) -> int:
        print("error: it said so", file=sys.stderr)
        return 2

    monkeypatch.setattr(dependencies, "_status", status)
    assert refusal(monkeypatch, capfd, "ddkd.yaml") == "error: it said so"
