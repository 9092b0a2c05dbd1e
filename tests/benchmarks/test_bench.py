"""``bench.py``: what a record holds, what is measured, and what a comparison makes of two."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from one_core import one_core
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_on_ranks import run

from pipeline import bench
from pipeline.batch import Batch, Outputs
from pipeline.benchmarks.allreduce import bucket_sizes, buckets
from pipeline.benchmarks.compare import comparison_table, speed_ratio
from pipeline.benchmarks.losses import measure_losses
from pipeline.benchmarks.measure import Measurement, measure_parts
from pipeline.benchmarks.record import BenchmarkRecord, read_record
from pipeline.benchmarks.step import contains_evaluation
from pipeline.cli import entry
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError
from pipeline.losses._base import Facts, Loss
from pipeline.models import create_model
from pipeline.runs.versions import versions
from pipeline.training.accelerator import BUCKET_MIB
from pipeline.training.checkpoint import export_student

CPU = torch.device("cpu")
DKD = """
student: {model: cifar_resnet8}
teacher: {model: cifar_resnet8, weights: teacher.safetensors}
losses: {ce: {}, dkd: {alpha: 1.0, beta: 2.0, temperature: 4.0}}
data: {path: shards, prepare: [shards/prepare_demo.py, --train, "60", --val, "20", --size, "24", --jobs, "1"], size: 16,
       mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
epochs: 3
batch: 12
schedule: {rate: 0.05}
"""
NO_SHARDS = ("data.path=nowhere", "data.classes=20")
QUICK = ("repeats=2", "steps=2", "warmup=1")
PNG = b"\x89PNG\r\n\x1a\n"


class Done(NamedTuple):
    """What a command printed, and the record it left."""

    printed: str
    path: Path
    record: BenchmarkRecord


def command(folder: Path, *words: str) -> Done:
    """Run the command in this process, on one rank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), one_core():
        run(bench.main, 0, 1, folder, [*words])
    path = folder / printed.getvalue().splitlines()[-1]
    return Done(printed.getvalue(), path, read_record(path, bench.TUNING if "--tune" in words else words[0]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose teacher has learned nothing, and with none of its shards."""
    folder = tmp_path_factory.mktemp("bench")
    export_student(create_model("cifar_resnet8", 20), folder / "teacher.safetensors")
    (folder / "dkd.yaml").write_text(DKD)
    return folder


@pytest.fixture(scope="module")
def losses(place: Path) -> Done:
    return command(place, "losses", "dkd.yaml", *QUICK, "out=measured", *NO_SHARDS)


@pytest.fixture(scope="module")
def step(place: Path) -> Done:
    return command(place, "step", "dkd.yaml", *QUICK, "out=measured")


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_says_of_what_by_which_code_and_where(losses: Done, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    record = losses.record
    assert record.what == "losses"
    assert record.recipe == str(place / "dkd.yaml")
    assert record.resolved == dump_recipe(load_recipe("dkd.yaml", NO_SHARDS).recipe)
    assert set(NO_SHARDS) < set(record.words)
    assert record.versions == versions()
    assert {"torch", "commit", "uncommitted_changes"} <= record.versions.keys()
    assert record.machine.keys() == {"cpu", "cores", "gpu", "ranks"}
    assert record.machine["ranks"] == 1
    assert json.loads(losses.path.read_text())["measured"][0]["name"] == record.measured[0].name
    assert all(len(each.seconds) == 2 and each.steps == 2 for each in record.measured)


def test_the_table_and_the_picture_stand_beside_the_record(losses: Done, step: Done):
    for done in (losses, step):
        assert done.path.with_suffix(".png").read_bytes().startswith(PNG)
        lines = {line.split("  ")[0]: line for line in done.printed.splitlines()}
        for each in done.record.measured:
            assert f"{each.milliseconds[0]:,.3f}" in lines[each.name]


# -- what is measured -------------------------------------------------------------------------------------------------


def test_a_repeat_is_some_calls_after_those_for_warmth_and_its_parts_are_told_apart():
    calls = 0

    def function(mark: Callable[[str], None]) -> None:
        nonlocal calls
        calls += 1
        mark("nothing")
        time.sleep(0.002)
        mark("sleep")

    nothing, sleep = measure_parts(function, device=CPU, repeats=3, warmup=4, steps=5, images=7)
    assert calls == 4 + 3 * 5
    assert (nothing.name, sleep.name) == ("nothing", "sleep")
    assert len(nothing.seconds) == len(sleep.seconds) == 3
    assert sleep.images == 35
    assert all(seconds >= 5 * 0.002 for seconds in sleep.seconds)
    assert sleep.milliseconds[0] == pytest.approx(1000 * sleep.median / 5)


def test_the_parts_of_a_step_add_up(step: Done):
    whole, *parts = step.record.measured
    assert [each.name for each in step.record.measured][:4] == ["step", "data", "teacher", "student"]
    assert whole.images == 2 * 12
    for repeat in range(2):
        assert whole.seconds[repeat] == pytest.approx(sum(part.seconds[repeat] for part in parts))
    assert whole.images_per_second == pytest.approx(whole.images / whole.median)
    assert all(part.images == whole.images for part in parts)
    shares = step.record.shares()
    assert shares.pop("step") == 1
    assert sum(shares.values()) == pytest.approx(1)  # of two repeats the median is the mean
    assert whole.counts["teraflops"] > 0


def test_the_loader_is_measured_and_tuned(place: Path, step: Done, monkeypatch: pytest.MonkeyPatch):
    parts = command(place, "loader", "dkd.yaml", *QUICK).record.measured
    assert {"read", "decode", "loader"} <= {part.name for part in parts}
    assert all(part.images == 2 * 12 and part.steps == 2 for part in parts)
    monkeypatch.setattr(bench, "tune", lambda loaded, device: [Measurement("threads 1", [1.0], 12)])
    assert [each.name for each in command(place, "loader", "dkd.yaml", "--tune").record.measured] == ["threads 1"]


def test_a_measured_step_leaves_nothing_but_its_record(step: Done):
    beside = {path.name for path in step.path.parent.iterdir() if path.name.startswith("step-")}
    assert beside == {step.path.name, step.path.with_suffix(".png").name}
    assert "the same command continues" not in step.printed


def test_the_teacher_runs_by_itself(place: Path, step: Done):
    (teacher,) = command(place, "teacher", "dkd.yaml", *QUICK, "accumulation=2").record.measured
    assert teacher.images == 2 * 12 // 2
    assert len(teacher.seconds) == 2
    with pytest.raises(RecipeError, match=r"dkd.yaml: teacher: the recipe has none to measure"):
        command(place, "teacher", "dkd.yaml", "teacher=null", "losses.dkd=null")


class Slow(torch.autograd.Function):
    """Takes its time, twice as much backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(0.02)
        return grad


class Known(Loss):
    """A loss of which all is known: what exp returns is kept once, for exp and for square."""

    needs_teacher = False

    def __init__(self, config: Loss.Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.own = nn.Linear(facts.num_classes, 3, bias=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        squares_BK = Slow.apply(student.logits_BK).exp().square()
        return {"": squares_BK.mean() + self.own(student.logits_BK).sum()}


def test_a_known_loss_takes_the_bytes_and_the_time_that_it_must(tmp_path: Path):
    recipe = {"student": {"model": "cifar_resnet8"}, "losses": {f"{__name__}:Known": {}}, "epochs": 1, "batch": 6}
    data = {"path": "nowhere", "classes": 5, "size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "known.yaml").write_text(yaml.safe_dump({**recipe, "data": data, "schedule": {"rate": 0.1}}))
    loaded = load_recipe(tmp_path / "known.yaml")
    forward, backward = measure_losses(loaded, Launch(), CPU, repeats=2, warmup=0, steps=1)
    # The logits and the weights, which the linear layer keeps, are there anyway.
    assert forward.counts == {"kept bytes": 6 * 5 * 4, "parameters": 3 * 5}
    assert backward.counts == {}
    assert [forward.name, backward.name] == [f"{__name__}:Known forward", f"{__name__}:Known backward"]
    assert all(seconds >= 0.01 for seconds in forward.seconds)
    assert all(seconds >= 0.02 for seconds in backward.seconds)
    assert forward.images == 6


def test_losses_are_shares_of_their_sum(losses: Done):
    assert [each.name for each in losses.record.measured[:2]] == ["ce forward", "ce backward"]
    assert sum(losses.record.shares().values()) == pytest.approx(1)


# -- the gradients' sum -----------------------------------------------------------------------------------------------


def test_one_rank_has_nothing_to_send_and_says_so_in_one_line(place: Path):
    with pytest.raises(RecipeError, match="allreduce: one rank sends nothing; start several"):
        run(bench.main, 0, 1, place, ["allreduce", "dkd.yaml", "out=unwritten", *NO_SHARDS])
    assert not list((place / "unwritten").iterdir())


def on_ranks(rank: int, world: int, folder: Path, words: list[str]) -> None:
    run(bench.main, rank, world, folder, words)


def test_two_ranks_add_up_all_gradients_and_the_first_writes(ranks: Ranks, place: Path):
    words = ["allreduce", "dkd.yaml", *QUICK, "out=added", *NO_SHARDS]
    ranks(on_ranks, place, words)
    (path,) = (place / "added").glob("*.json")
    record = read_record(path, "allreduce")
    (gradients,) = record.measured
    assert record.machine["ranks"] == 2
    numbers = sum(size for size, _ in bucket_sizes(load_recipe(place / "dkd.yaml", NO_SHARDS)))
    assert gradients.counts["bytes"] == 4 * numbers
    # 2(W − 1)/W is 1 on two ranks.
    assert gradients.counts["bus bytes/s"] == pytest.approx(2 * 4 * numbers / gradients.median, rel=1e-6)


def test_gradients_that_are_compressed_have_half_the_bytes(place: Path):
    def dtypes(*words: str) -> set[torch.dtype]:
        loaded = load_recipe(place / "dkd.yaml", (*NO_SHARDS, *words))
        return {dtype for _, dtype in bucket_sizes(loaded)}

    assert dtypes() == {torch.float32}
    assert dtypes("compress=all") == {torch.bfloat16}


SIZES = (600_000, 1_500_000, 900_000, 2_200_000, 10, 1_200_000, 700_000, 100)


class Layers(nn.Module):
    """Parameters of those sizes, used in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.ones(size) for size in SIZES])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * layer.mean()
        return x


def buckets_of_ddp(rank: int, world: int) -> list[int]:
    """Return the bytes of the buckets that DDP sends."""
    module = DistributedDataParallel(Layers(), bucket_cap_mb=BUCKET_MIB, find_unused_parameters=True)
    sent: list[int] = []

    def send(bucket: Any) -> Any:
        sent.append(bucket.buffer().nbytes)
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    module.register_comm_hook(None, lambda _, bucket: send(bucket))
    for _ in range(3):
        sent.clear()
        module(torch.ones(())).backward()
    return sent


def test_buckets_are_those_of_ddp(ranks: Ranks):
    expected, _ = ranks(buckets_of_ddp)
    found = buckets([torch.empty(size, device="meta") for size in SIZES], BUCKET_MIB * 2**20)
    assert [sum(x.nbytes for x in bucket) for bucket in found] == expected
    assert len(expected) > 2


def test_an_epoch_that_ends_within_a_line_of_the_journal_cuts_it():
    for steps, in_epoch, end in product((1, 2, 3, 5), (5, 6, 7), range(10, 40)):
        before_the_last = range(end - steps + 1, end)
        assert contains_evaluation(end, steps, in_epoch) == any(step % in_epoch == 0 for step in before_the_last)


# -- comparing --------------------------------------------------------------------------------------------------------


def recorded(times: dict[str, list[float]], images: int = 10, **changed: Any) -> BenchmarkRecord:
    """Return a record of those seconds."""
    facts = {"what": "teacher", "recipe": "a.yaml", "resolved": {"batch": 10}, "words": (), "date": "2026-01-01"}
    facts |= {"machine": {"cpu": "a", "cores": 2}, "versions": {"torch": "2.11", "commit": "a"}}
    return BenchmarkRecord.model_validate(
        {**facts, "measured": [Measurement(name, each, images) for name, each in times.items()], **changed}
    )


NOISY = [1.00, 1.04, 0.97, 1.02, 0.99]


def verdicts(old: BenchmarkRecord, new: BenchmarkRecord) -> dict[str, list[str]]:
    """Return ratio, noise and verdict by name."""
    lines = [re.split(" {2,}", line.strip()) for line in comparison_table(old, new).splitlines() if " – " in line]
    return {name: columns for name, *columns in lines}


def test_a_planted_slowdown_is_found_and_equal_runs_are_called_equal():
    old = recorded({"slowed": NOISY, "equal": NOISY, "quickened": NOISY})
    again = [0.98, 1.03, 0.99, 0.96, 1.01]  # by its median 1 % faster
    new = {"slowed": [1.25 * x for x in again], "equal": again, "quickened": [x / 2 for x in again]}
    found = verdicts(old, recorded(new))
    assert {name: words[-1] for name, words in found.items()} == {
        "slowed": "slower",
        "equal": "no difference beyond noise",
        "quickened": "faster",
    }
    assert float(found["slowed"][0]) == pytest.approx(1 / 0.99 / 1.25, abs=0.001)
    assert float(found["equal"][0]) == pytest.approx(1 / 0.99, abs=0.001)
    assert float(found["quickened"][0]) == pytest.approx(2 / 0.99, abs=0.001)


def test_the_noise_is_the_range_of_all_pairs():
    ratio, noise, _ = verdicts(recorded({"a": [1.0, 2.0]}), recorded({"a": [1.0, 4.0]}))["a"]
    # Pairs: 1/1, 1/4, 2/1, 2/4.
    assert [float(x) for x in (ratio, *noise.split(" – "))] == pytest.approx([0.6, 0.25, 2], abs=0.001)


def test_noise_is_seldom_taken_for_a_difference():
    """Exactly: of all ways to deal ten different times to two records of five, one in 126 sets them apart."""
    times = [1.0 + rank / 100 for rank in range(10)]
    deals = [[time in dealt for time in times] for dealt in combinations(times, 5)]
    apart = 0
    for deal in deals:
        old, new = ([time for time, mine in zip(times, deal, strict=True) if mine is own] for own in (True, False))
        found = speed_ratio(Measurement("a", old), Measurement("a", new))
        assert found is not None
        apart += found.verdict != "no difference beyond noise"
    assert apart / len(deals) == pytest.approx(1 / 126)


def test_two_or_three_repeats_are_too_few_for_a_verdict():
    old, new = recorded({"a": [1.0, 1.1, 1.2]}), recorded({"a": [5.0, 5.1, 5.2]})
    assert verdicts(old, new)["a"][-1] == "too few repeats to tell"


def test_speeds_are_of_images_where_there_are_any_and_of_steps_elsewhere():
    old, new = ([Measurement("a", [1.0], 10 * k), Measurement("b", [1.0], steps=5 * k)] for k in (1, 2))
    found = verdicts(recorded({}, measured=old), recorded({}, measured=new))
    assert [found["a"][0], found["b"][0]] == ["2.000", "2.000"]


def test_what_else_may_explain_a_difference_is_said():
    old = recorded({"a": [1.0], "gone": [1.0]})
    changed = {"machine": {"cpu": "b", "cores": 2}, "versions": {"torch": "2.12", "commit": "b"}}
    told = comparison_table(old, recorded({"a": [0.0], "come": [1.0]}, resolved={"batch": 20}, **changed))
    assert told.splitlines()[:3] == [
        "another machine: cpu a, now b",
        "other packages: torch 2.11, now 2.12",
        "another recipe: batch",
    ]
    lines = {line.split()[0]: line for line in told.splitlines()[4:] if line}
    assert lines["a"].endswith("too short to tell")
    assert lines["gone"].endswith("only in the old record")
    assert lines["come"].endswith("only in the new record")
    assert "other" not in comparison_table(old, old)


def test_the_command_compares_with_an_earlier_record(losses: Done, place: Path):
    words = (*QUICK, *NO_SHARDS, "out=measured")
    done = command(place, "losses", "dkd.yaml", "--compare", str(losses.path), *words, "batch=24")
    told = done.printed.partition(f"compared with {losses.path}\n")[2]
    assert told.startswith("another recipe: batch\n")
    assert all(each.name in told for each in losses.record.measured)


# -- what a user can get wrong ----------------------------------------------------------------------------------------


def test_something_unknown_to_measure_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["bench.py", "stop", "ce.yaml"])
    with pytest.raises(SystemExit) as ended:
        entry(bench.main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: command line: expected loader, teacher, losses, allreduce or step first, got 'stop'; "
        "did you mean 'step'?"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected loader, teacher, losses, allreduce or step first, got ''; such as: bench.py step RECIPE"),
        (["step", "--tune"], "--tune works with loader only, not with step"),
        (["losses", "--compare"], "--compare: name an earlier record"),
        (["losses", "--compare", "gone.json"], "gone.json cannot be read: No such file or directory"),
        (["losses", "--compare", "broken.json"], "broken.json is no record of this command"),
        (["losses", "--compare", "teacher.json"], "teacher.json is a record of teacher, not of losses"),
        (["losses", "repeats=0"], "repeats: Input should be greater than 0, got 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{}")
    Path("teacher.json").write_text(recorded({"a": [1.0]}).model_dump_json())
    with pytest.raises(RecipeError) as caught:
        bench.main(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
