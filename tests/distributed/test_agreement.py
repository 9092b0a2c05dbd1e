"""Ranks that were told different things: before they join, one line with the key and both values, the same on all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline.config.recipe import load_recipe
from pipeline.distributed import collectives, rendezvous, signals
from pipeline.distributed.agreement import difference, flatten
from pipeline.distributed.launcher import Launch
from pipeline.errors import ROOT, Interrupted
from pipeline.runs import rank_settings
from pipeline.runs.identity import resolve

LAUNCHERS = (
    *rendezvous.REQUIRED_VARIABLES,
    *rendezvous.TASK_COUNT_VARIABLES,
    "GROUP_WORLD_SIZE",
    rendezvous.SECONDS_VARIABLE,
)
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
Z2 = {"zero_optimization": {"stage": 2}}
ADVICE = "; start all ranks with the same command, shards, code and packages"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A place to meet; what it returns stands for joining a process group, which a process can do once only."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(collectives, "create_process_group", join := mock.Mock())
    return join


def met(*tellings: dict[str, Any], world: int = 0) -> list[str]:
    """Return what each rank's attempt to meet the others ends in."""

    def meet(rank: int, told: dict[str, Any]) -> str:
        try:
            rendezvous.init_process_group(Launch(rank, world or len(tellings), rank, use_cpu=True), settings=told)
        except (ValueError, OSError, Interrupted) as error:
            return str(error)
        return "met"

    with ThreadPoolExecutor(len(tellings)) as pool:
        return list(pool.map(meet, range(len(tellings)), tellings))


def told(folder: Path, *words: str, recipe: str = "ce.yaml") -> dict[str, Any]:
    """Return what a rank of a training with those words was told."""
    loaded = load_recipe(folder / recipe, words)
    run = resolve(loaded, Launch())
    return rank_settings.shared_settings("train", run.recipe, run)


def test_ranks_that_were_told_the_same_join(join: mock.Mock):
    assert met({"seed": 0, "stop": {"steps": None}}, {"stop": {"steps": None}, "seed": 0}) == ["met", "met"]
    assert join.call_count == 2


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        ({"seed": 0, "batch": 8}, {"seed": 5, "batch": 9}, "seed is 5 here and 0 on rank 0"),
        ({"stop": {"steps": 3}}, {"stop": {"steps": None}}, "stop.steps is null here and 3 on rank 0"),
        ({"command": "train"}, {}, 'command is not set here and "train" on rank 0'),
        ({}, {"losses": {"kd": {}}}, "losses.kd is {} here and not set on rank 0"),
        ({"prepare": ["a"]}, {"prepare": ["a", "é"]}, 'prepare is ["a", "é"] here and ["a"] on rank 0'),
    ],
)
def test_the_first_difference_is_named_with_both_values_on_every_rank(
    join: mock.Mock, first: dict[str, Any], other: dict[str, Any], said: str
):
    line = f"rank 1 of 3 on {os.uname().nodename}: {said}{ADVICE}"
    assert met(first, other, first) == [line] * 3
    assert not join.called


def test_a_rank_on_a_cpu_does_not_wait_for_one_on_a_gpu(join: mock.Mock):
    (line, again) = met({}, {"device": "cuda"})
    assert line == again
    assert 'device is "cuda" here and "cpu" on rank 0' in line


def test_a_signal_ends_the_waiting_for_other_ranks(join: mock.Mock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "_requested", True)
    (line,) = met({}, world=2)
    assert line.endswith("was stopped while it waited for the others; the same command continues")


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("seed=5", "seed"),
        ("folder=runs/other", "folder"),
        ("stop.minutes=3", "stop.minutes"),
        ("checkpoints.poll_steps=5", "checkpoints.poll_steps"),
        ("journal.every_steps=7", "journal.every_steps"),
        ("losses.ce.weight=2", "losses.ce.weight"),
        ("data.views=3", "data.views"),
        ("data.hw_decoder_load=1", "data.hw_decoder_load"),
    ],
)
def test_a_word_that_one_rank_alone_was_given_is_the_difference(recipes: Path, word: str, key: str):
    mine, other = dict(flatten(told(recipes))), dict(flatten(told(recipes, word)))
    assert difference(mine, other) == (key, mine[key], other[key])


def test_where_shards_lie_and_how_a_host_decodes_them_is_its_own_matter(recipes: Path, shards: Path, tmp_path: Path):
    shutil.copytree(shards, tmp_path / "staged")
    own = told(recipes, f"data.path={tmp_path / 'staged'}", "data.threads=3", "data.prefetch=4")
    assert own == told(recipes)


def test_other_shards_under_the_same_path_are_a_difference(recipes: Path, shards: Path, tmp_path: Path):
    mine = told(recipes, f"data.path={shutil.copytree(shards, tmp_path / 'shards')}")
    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    other = told(recipes, f"data.path={tmp_path / 'shards'}")
    assert {key for key in mine if mine[key] != other[key]} == {"data.manifest.json (sha256)"}


def test_other_code_and_other_packages_are_a_difference(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    mine = told(recipes)
    monkeypatch.setattr(rank_settings, "code_digest", lambda: "other")
    monkeypatch.setattr(rank_settings, "packages", lambda: {"torch": "2.0"})
    other = told(recipes)
    assert {key for key in mine if mine[key] != other.get(key)} >= {"torch", "code (sha256)"}


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        (Z2, Z2, "met"),
        (Z2, {"zero_optimization": {"stage": 3}}, "DeepSpeed.zero_optimization.stage is 3 here and 2 on rank 0"),
        (Z2, Z2 | {"wall_clock_breakdown": True}, "DeepSpeed.wall_clock_breakdown is true here and not set on rank 0"),
        (Z2, None, "ACCELERATE_USE_DEEPSPEED is false here and true on rank 0"),
        (None, Z2, "ACCELERATE_USE_DEEPSPEED is true here and false on rank 0"),
        (Z2, [], f'{FILE} is [] here and "settings" on rank 0'),
        (Z2, "gone", f'{FILE} is "no file gone.json" here and "settings" on rank 0'),
    ],
)
def test_ranks_with_other_settings_of_deepspeed_do_not_join(
    recipes: Path, join: mock.Mock, first: object, other: object, said: str
):
    def launch(rank: int, settings: object) -> Launch:
        path = recipes / f"zero{rank}.json"
        if settings != "gone":
            path.write_text(json.dumps(settings))
        name = "gone.json" if settings == "gone" else str(path)
        on = settings is not None
        return Launch(rank, 2, rank, use_cpu=not on, use_deepspeed=on, deepspeed_file=name if on else None)

    recipe = load_recipe(recipes / "ce.yaml").recipe

    def meet(rank: int, settings: object) -> str:
        try:
            rank_settings.join_ranks(launch(rank, settings), "train", recipe)
        except ValueError as error:
            return str(error)
        return "met"

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(meet, range(2), (first, other)))
    assert ends[0] == ends[1]
    assert said in ends[0]


def test_two_processes_of_which_one_was_given_another_seed_end_in_that_line_and_train_nothing(recipes: Path):
    place = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    command = [sys.executable, str(ROOT / "pipeline" / "train.py"), "ce.yaml"]
    both = [
        subprocess.Popen(
            [*command, *words],
            cwd=recipes,
            env={**environment, **place, "RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate([[], ["seed=5"]])
    ]
    line = f"error: rank 1 of 2 on {os.uname().nodename}: seed is 5 here and 0 on rank 0{ADVICE}\n"
    assert [process.communicate()[1] for process in both] == [line] * 2
    assert [process.returncode for process in both] == [2, 2]
    assert not (recipes / "runs").exists()
