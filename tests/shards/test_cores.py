"""The cores of a process, on systems that bind it to some and on those that do not."""

from __future__ import annotations

import os

import pytest

from pipeline.data.loader_settings import cores
from shards.command import Parser, add_jobs
from shards.cores import usable_cores


def test_they_are_those_that_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {7, 2})
    assert usable_cores() == [2, 7]


def test_they_are_all_where_no_process_is_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    parser = Parser()
    add_jobs(parser)
    assert usable_cores() == [0, 1, 2, 3, 4, 5]
    assert parser.parse_args([]).jobs == 6
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores() == 3


def test_there_is_one_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == [0]
