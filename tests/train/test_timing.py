"""The journal says where a step's time went, all of it, and asking costs no wait for the device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.timing import Split

Train = Callable[..., None]
CPU = torch.device("cpu")


def test_time_is_added_up_by_the_name_of_the_mark_that_ends_it(monkeypatch: pytest.MonkeyPatch):
    moments = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    split = Split(CPU)
    for name in ("data", "teacher", "data"):
        split.mark(name)
    assert split.read() == {"data": 1.5, "teacher": 2.0}
    split.mark("teacher")  # the clock went on
    assert split.read() == {"teacher": 6.5}


def test_the_journal_splits_a_step_into_all_that_it_consists_of(run_train: Train, recipes: Path):
    run_train("ddkd.yaml", "journal.every_steps=3")
    lines = [json.loads(line) for line in (recipes / "runs/ddkd/journal.jsonl").read_text().splitlines()]
    timings = [line["timing"] for line in lines if "timing" in line]
    parts = ["data", "teacher", "student", "losses", "backward", "optimizer", "rest"]
    assert all(list(timing["milliseconds"]) == parts for timing in timings)
    for timing in timings[1:]:
        together = sum(timing["milliseconds"].values()) / 1000
        assert together == pytest.approx(12 / timing["images_per_second"], rel=0.05)
        assert timing["data_wait"] == pytest.approx(timing["milliseconds"]["data"] / 1000 / together, abs=0.01)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_devices_time_and_events_are_used_again():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    split = Split(device)
    for _ in range(3):
        split.mark("data")
        for _ in range(20):
            a @ a
        split.mark("teacher")
        found = split.read()
        assert found["teacher"] > 10 * found["data"]
    assert len(split._spare) <= 3
