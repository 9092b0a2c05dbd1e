"""The blocks of the pages under ``docs/`` that are marked as runnable run as they stand, in their order."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BIN, environment
from one_core import one_core
from pages import PAGES, ROOT, blocks

from pipeline import train

FOLDERS = ("pipeline", "shards", "configs", "launchers")
ENDURANCE = {"your_own_data.md"}
"""Pages that train several networks."""
MARKS = [pytest.mark.endurance, pytest.mark.timeout(900)]
RUNNABLE = [
    pytest.param(page, id=page.name, marks=MARKS if page.name in ENDURANCE else [])
    for page in PAGES
    if any(block.runs for block in blocks(page.read_text()))
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which looks like the project's and has the journal of a run of the demo."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    run = tmp_path / "runs" / "demo" / "seed-0"
    run.mkdir(parents=True)
    (run / "journal.jsonl").symlink_to(ROOT / "tests" / "runs" / "kept" / "end" / "journal.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_blocks_of_a_page_run_in_their_order(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    before = set(sys.modules)
    for block in blocks(page.read_text()):
        if block.file:
            (checkout / block.file).write_text(block.code)
        for line in block.code.splitlines() if block.runs else ():
            execute(line, checkout, monkeypatch)
    for name in set(sys.modules) - before:  # modules of the page: another page may write others with their names
        if Path(getattr(sys.modules[name], "__file__", None) or ROOT).is_relative_to(checkout):
            del sys.modules[name]


def execute(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of a page; what needs no process of its own runs in this one, which has imported torch already."""
    words = [word for word in shlex.split(line) if word != "PYTHONPATH=."]
    if words[:3] == ["python", "pipeline/train.py", "--check"]:
        train.main(words[2:])
    elif words[0] == "python" and (folder / words[1]).is_file() and "/" not in words[1]:
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    else:
        done = run_in_shell(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def run_in_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    with one_core():
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=folder,
            env=environment(PATH=path),
            capture_output=True,
            text=True,
            check=False,
        )
