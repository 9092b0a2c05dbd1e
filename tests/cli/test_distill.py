"""The command ``distill``: its table of commands, its help, and a word that it does not know."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from commands import ROOT

from pipeline import __version__
from pipeline.__main__ import first_line, main
from pipeline.commands import COMMANDS, as_started


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``distill("shards", "verfy")`` returns exit code, standard output and standard error."""

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_every_file_that_is_a_program_is_a_command():
    files = [path for folder in ("pipeline", "shards") for path in (ROOT / folder).glob("*.py")]
    programs = {path for path in files if 'if __name__ == "__main__":' in path.read_text()}
    named = {ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in COMMANDS.values()}
    assert named == programs - {ROOT / "pipeline" / "__main__.py"}


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_with_what_it_does(distill, words: tuple[str, ...]):
    code, told, error = distill(*words)
    assert (code, error) == (0, "")
    for name, module in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(first_line(module))}$", told, re.MULTILINE)
        assert len(first_line(module)) > 10


def test_the_help_of_shards_lists_its_commands(distill):
    code, told, _ = distill("shards")
    assert code == 0
    assert "shards verify" in told
    assert "  train" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["shards", "verfy"], "there is no command 'shards verfy'; did you mean 'shards verify'?"),
        (["zzz", "configs/demo.yaml"], "there is no command 'zzz'; distill --help lists them"),
        (["shards", "zzz"], "there is no command 'shards zzz'; distill shards --help lists them"),
    ],
)
def test_an_unknown_command_ends_in_one_line(distill, words: list[str], message: str):
    assert distill(*words) == (2, "", f"error: distill: {message}\n")


def test_a_command_gets_its_own_words(distill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "shards.verify", raising=False)  # as in a new process; runpy would warn
    code, _, error = distill("shards", "verify", "--nothing")
    assert code == 2
    assert error.startswith("error: ")
    assert error.endswith("(--help lists the options)\n")


def test_it_tells_the_version_and_the_folder_of_the_recipes(distill):
    assert distill("--version") == (0, f"{__version__}\n", "")
    assert Path(distill("--files")[1].strip(), "configs", "demo.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "installed"),
    [
        ("train it: python pipeline/train.py a.yaml method=kd", "train it: distill train a.yaml method=kd"),
        ("write it: pipeline/cache_teacher.py RECIPE", "write it: distill cache RECIPE"),
        ("python shards/verify.py x lists", "distill shards verify x lists"),
        ("torchrun --nproc_per_node N pipeline/bench.py …", "torchrun --nproc_per_node N -m pipeline.bench …"),
        ("accelerate launch pipeline/train.py", "accelerate launch -m pipeline.train"),
        ("/my/pipeline/train.pyc and shards/mine.py", "/my/pipeline/train.pyc and shards/mine.py"),
    ],
)
def test_messages_name_commands_as_they_are_started(text: str, installed: str):
    assert as_started(text, installed=True) == installed
    assert as_started(text, installed=False) == text


def test_the_version_to_cite_is_the_one_of_the_package():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
