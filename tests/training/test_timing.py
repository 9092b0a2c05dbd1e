"""The journal says where a step's time went, all of it, and asking costs no wait for the device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest
import torch
from gloo_ranks import Ranks
from torch import distributed as dist
from torch import nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from training_on_ranks import train

from pipeline.distiller import Distiller
from pipeline.training.journal import trace
from pipeline.training.timer import StepTimer

Train = Callable[..., None]
CPU = torch.device("cpu")


def test_time_is_added_up_by_the_name_of_the_mark_that_ends_it(monkeypatch: pytest.MonkeyPatch):
    moments = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    split = StepTimer(CPU)
    for name in ("data", "teacher", "data"):
        split.lap(name)
    assert split.read() == {"data": 1.5, "teacher": 2.0}
    split.lap("teacher")  # the clock went on
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


def test_what_happens_between_steps_is_no_wait_for_data(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = Distiller.commit

    def slow(distiller: Distiller) -> None:
        time.sleep(0.2)
        commit(distiller)

    monkeypatch.setattr(Distiller, "commit", slow)
    run_train("ce.yaml", "journal.every_steps=5", "epochs=1")
    last = json.loads((recipes / "runs/ce/journal.jsonl").read_text().splitlines()[1])["timing"]["milliseconds"]
    assert last["rest"] > 190


def timed_backwards(rank: int, world: int) -> list[dict[str, float]]:
    """Return the split of backwards whose all-reduce takes 0.3 seconds."""

    def slow(_, bucket):
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        answer: Future[torch.Tensor] = Future()

        def finish() -> None:
            work.wait()  # type: ignore[union-attr]
            time.sleep(0.3)
            answer.set_result(bucket.buffer())

        # In a thread: a callback of an all-reduce that has ended already would run, and sleep, within backward.
        Thread(target=finish, daemon=True).start()
        return answer

    model = DistributedDataParallel(nn.Linear(3, 3), find_unused_parameters=True, gradient_as_bucket_view=True)
    model.register_comm_hook(None, slow)
    split, found = StepTimer(CPU, by_ddp=True), []
    for _ in range(3):
        total = model(torch.ones(2, 3)).square().sum()
        split.begin()
        with split.backward(total):
            total.backward()
        found.append(split.read())
    return found


def test_what_backward_waits_for_other_ranks_is_communication(ranks: Ranks):
    for found in ranks(timed_backwards):
        assert all(list(split) == ["backward", "communication"] for split in found)
        assert min(split["backward"] for split in found) < 0.2
        assert max(split["communication"] for split in found) > 0.25


def train_unmarked(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Train as where there is no DDP to wait for."""
    with mock.patch("pipeline.builders.session.StepTimer", lambda device, **_: StepTimer(device)):
        train(rank, world, folder, words)


def test_several_ranks_journal_has_communication_and_marking_it_changes_no_number(ranks: Ranks, recipes: Path):
    words = ["ce.yaml", "stop.steps=4"]
    ranks(train, recipes, [*words, "folder=runs/marked"])
    ranks(train_unmarked, recipes, [*words, "folder=runs/unmarked"])
    marked, unmarked = (recipes / "runs" / name / "journal.jsonl" for name in ("marked", "unmarked"))
    assert trace(marked) == trace(unmarked)
    parts = ["data", "teacher", "student", "losses", "backward", "communication", "optimizer", "rest"]
    for path, expected in {marked: parts, unmarked: [part for part in parts if part != "communication"]}.items():
        assert list(json.loads(path.read_text().splitlines()[0])["timing"]["milliseconds"]) == expected


def test_neither_reading_ahead_nor_writing_down_changes_a_number(run_train: Train, recipes: Path):
    run_train("teacher.yaml")
    words = ("ddkd.yaml", "compare=null", "epochs=1")
    run_train(*words, "folder=runs/one", "data.prefetch=1")
    run_train(*words, "folder=runs/other", "data.prefetch=4", "journal.every_steps=50")
    one, other = (recipes / "runs" / name for name in ("one", "other"))
    lines = trace(other / "journal.jsonl")
    assert [line["step"] for line in lines] == [1, 5, 5]  # the last is the evaluation
    assert all(line in trace(one / "journal.jsonl") for line in lines)
    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_devices_time_and_events_are_used_again():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    split = StepTimer(device)
    for _ in range(3):
        split.lap("data")
        for _ in range(20):
            a @ a
        split.lap("teacher")
        found = split.read()
        assert found["teacher"] > 10 * found["data"]
    assert len(split._spare) <= 3
