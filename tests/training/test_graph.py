"""A step that is captured once and replayed computes what one does that runs operation by operation.

On a CPU its operations are recorded and run again (``recorded_graph``): all that a capture bakes in shows. What a GPU
does beyond that, streams and memory, is in ``tests/nullgpu`` and, with a GPU, below.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recorded_graph
import torch
import yaml
from methods import CAPTURABLE, WITHOUT_TEACHER, arguments_of, losses_of
from recorded_graph import Dispatching, RecordedGraph
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.benchmarks.step import split
from pipeline.errors import RecipeError
from pipeline.losses import Loss
from pipeline.models import create_model
from pipeline.training import graph
from pipeline.training.journal import trace

Train = Callable[..., None]
HERE = Path(__file__).stem


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Have this machine's CPU be captured as one GPU is."""
    obstacle = graph._obstacle

    def of_a_gpu(accelerator: Any, accumulation: int) -> str | None:
        found = obstacle(accelerator, accumulation)
        return None if found == "no GPU" and accumulation == 1 else found

    monkeypatch.setattr(graph, "_obstacle", of_a_gpu)
    monkeypatch.setattr(graph, "Graph", RecordedGraph)
    monkeypatch.setattr(graph, "_LIBRARIES", (*graph._LIBRARIES, recorded_graph.__file__))
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    return RecordedGraph


@pytest.fixture
def recipe(recipes: Path) -> Callable[..., str]:
    """``recipe("dkd", …)`` writes a recipe of that method with a teacher's weights, changed so; returns its name."""

    def write(method: str, **changes: Any) -> str:
        torch.manual_seed(0)
        losses, arguments = losses_of(method), arguments_of(method)
        torch.save(create_model("cifar_resnet20", 20, arguments).state_dict(), recipes / "teacher.pt")
        network = {"model": "cifar_resnet20", "weights": "teacher.pt", "arguments": arguments}
        teacher = None if method in WITHOUT_TEACHER else network
        own = {"student": {"arguments": arguments}, "losses": {"ce": None, **losses}}
        tree = {"base": "ce.yaml", "teacher": teacher, **own, **changes}
        (recipes / "method.yaml").write_text(yaml.safe_dump(tree))
        return "method.yaml"

    return write


def both(run_train: Train, recipes: Path, *words: str) -> list[tuple[list[dict[str, Any]], dict[str, bytes]]]:
    """Train eagerly and by a graph; return the trace and the files of tensors of each."""
    found = []
    for way in ("false", "true"):
        with Dispatching():
            run_train(*words, f"graph={way}", f"folder=runs/{way}")
        folder = recipes / "runs" / way
        files = [*folder.glob("*.safetensors"), *(folder / "checkpoints").glob("step-*/*.safetensors")]
        files += (folder / "checkpoints").glob("step-*/optimizer.pt")
        found.append((trace(folder / "journal.jsonl"), {str(p.relative_to(folder)): p.read_bytes() for p in files}))
    return found


@pytest.mark.parametrize("method", CAPTURABLE)
def test_every_method_is_the_same_run_replayed(
    method: str, run_train: Train, recipes: Path, recipe: Callable[..., str], recorded: type[RecordedGraph]
):
    eager, replayed = both(run_train, recipes, recipe(method), "schedule.rate=1e-4")
    assert recorded.replays == 7
    assert eager == replayed


def test_a_step_whose_batches_differ_in_size_is_not_captured():
    said: list[str] = []
    step: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda"), print=said.append))
    assert graph.maybe_graph(step, "auto", 1, varying="images with boxes") is step
    assert said == ["graph: off (images with boxes)"]
    with pytest.raises(RecipeError, match="this run has images with boxes; give graph=auto"):
        graph.maybe_graph(step, True, 1, varying="images with boxes")


DKD = {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "clipped, with an average": ("dkd", {"clip": 0.5, "ema": {"decay": 0.9}}),
    "a teacher that follows": ("dkd", {"teacher": {"model": None, "weights": None, "average": {"decay": 0.9}}}),
    "a ramp": ("dkd", {"losses": {"dkd": {**DKD, "ramp": {"linear_epochs": 2}}}}),
    "a loss that begins late": ("dkd", {"losses": {"dkd": {**DKD, "ramp": {"from": 1}}}}),
    "no momentum, no warm-up": ("ce", {"optimizer": {"momentum": 0}, "schedule": {"rate": 0.1}}),
    "AdamW, with an average that warms up": (
        "dkd",
        {"optimizer": {"kind": "adamw", "momentum": None, "weight_decay": 0.05}, "ema": {"decay": 0.9, "warmup": True}},
    ),
    "Adam by epochs": (
        "ce",
        {
            "optimizer": {"kind": "adam", "momentum": None, "arguments": {"amsgrad": True}},
            "schedule": {"kind": "poly", "unit": "epoch", "power": 2.0, "warmup_epochs": None},
        },
    ),
    "bfloat16": ("ddkd", {"precision": "bf16"}),
    "recomputed": ("ddkd", {"losses.ddkd.diffusion.checkpoint": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recipe_is_the_same_run_replayed(
    change: str, run_train: Train, recipes: Path, recipe: Callable[..., str], recorded: type[RecordedGraph]
):
    method, changes = CHANGES[change]
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    eager, replayed = both(run_train, recipes, recipe(method), "schedule.rate=1e-3", *words)
    assert recorded.replays == 7
    assert eager == replayed


def test_a_run_that_is_stopped_and_goes_on_is_the_same_by_a_graph(
    run_train: Train, recipes: Path, recipe: Callable[..., str], recorded: type[RecordedGraph]
):
    name = recipe("crd")
    with Dispatching():
        run_train(name, "graph=false", "folder=runs/straight")
        for stop in ("stop.steps=5", "stop.steps=6", "stop.steps=null"):
            run_train(name, "graph=true", "folder=runs/stopped", stop)
    # Each command begins with three steps of its own; the run's identity does not know of graphs.
    assert recorded.replays == 2 + 0 + 1
    straight, stopped = (recipes / "runs" / each for each in ("straight", "stopped"))
    assert trace(straight / "journal.jsonl") == trace(stopped / "journal.jsonl")
    assert (straight / "student.safetensors").read_bytes() == (stopped / "student.safetensors").read_bytes()


def test_a_step_is_captured_anew_where_a_ramp_changes_and_only_there(
    run_train: Train, recipe: Callable[..., str], recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
):
    captured: list[int] = []
    capture = graph.GraphedStep._capture

    def noted(self: graph.GraphedStep, batch: Batch, progress: Progress, *others: Any) -> None:
        captured.append(progress.step + 1)
        capture(self, batch, progress, *others)

    monkeypatch.setattr(graph.GraphedStep, "_capture", noted)
    words = ["graph=true", "epochs=5", "losses.dkd.ramp.linear_epochs=3"]
    run_train(recipe("dkd"), *words)
    assert captured == [4, 6, 11]  # five steps in an epoch; factors of 1/3, 2/3 and, from the third epoch on, 1


def test_a_run_that_goes_on_four_steps_before_its_ramp_rises_is_captured_twice_in_a_row(
    run_train: Train, recipes: Path, recipe: Callable[..., str], recorded: type[RecordedGraph]
):
    words = [recipe("dkd"), "losses.dkd.ramp.linear_epochs=3"]  # five steps in an epoch
    with Dispatching():
        run_train(*words, "graph=false", "folder=runs/straight")
        for stop in ("stop.steps=1", "stop.steps=null"):
            run_train(*words, "graph=true", "folder=runs/stopped", stop)
    assert recorded.replays == 10 - 1 - graph.EAGER_STEPS
    straight, stopped = (recipes / "runs" / each for each in ("straight", "stopped"))
    assert trace(straight / "journal.jsonl") == trace(stopped / "journal.jsonl")
    assert (straight / "student.safetensors").read_bytes() == (stopped / "student.safetensors").read_bytes()


class FollowsSteps(Loss):
    """Reads what is another number at every step."""

    needs_teacher = False

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"": student.logits_BK.square().mean() * (1 + progress.step)}


class FollowsEpochs(Loss):
    """Reads the epoch, and not by a ramp."""

    needs_teacher = False

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"": student.logits_BK.square().mean() * (1 + progress.epoch)}


class DrawsByPython(Loss):
    """Draws where a graph does not see it."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"": student.logits_BK.square().mean() * random.random()}


class DrawsByNumPy(Loss):
    """So does this one."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"": student.logits_BK.square().mean() * np.random.rand()}  # noqa: NPY002


def test_a_loss_that_reads_the_epoch_is_the_same_run_replayed(
    run_train: Train, recipes: Path, recorded: type[RecordedGraph]
):
    eager, replayed = both(run_train, recipes, "ce.yaml", f'losses={{"ce": {{}}, "{HERE}:FollowsEpochs": {{}}}}')
    assert eager == replayed


def test_a_loss_that_reads_another_number_at_every_step_is_refused(run_train: Train, recorded: type[RecordedGraph]):
    with pytest.raises(RecipeError, match=r"graph: the losses read progress\.step, .* give graph=false$"):
        run_train("ce.yaml", "graph=true", f'losses={{"ce": {{}}, "{HERE}:FollowsSteps": {{}}}}')


@pytest.mark.parametrize(("draws", "named"), [("DrawsByPython", "random"), ("DrawsByNumPy", "numpy.random")])
def test_draws_of_the_host_are_refused(draws: str, named: str, run_train: Train, recorded: type[RecordedGraph]):
    with pytest.raises(RecipeError, match=rf"^graph: the step draws from {named}, .* give graph=false$"):
        run_train("ce.yaml", "graph=true", f'losses={{"ce": {{}}, "{HERE}:{draws}": {{}}}}')


@pytest.mark.parametrize(
    ("loss", "line"), [("Item", ".sum().item() > 0"), ("Mask", ".nonzero())"), ("FromHost", "torch.tensor([2.0]")]
)
def test_a_loss_that_waits_is_named_with_its_line(
    loss: str, line: str, run_train: Train, recorded: type[RecordedGraph]
):
    with pytest.raises(RecipeError) as raised:
        run_train("ce.yaml", "graph=true", f'losses={{"ce": {{}}, "waiting_losses:{loss}": {{}}}}')
    told = str(raised.value)
    assert told.startswith(f"graph: the step cannot be captured, losses.waiting_losses:{loss}, ")
    assert "waiting_losses.py:" in told
    assert line in told
    assert told.endswith("change that line, or give graph=false")
    assert "\n" not in told


@pytest.mark.parametrize("words", [("accumulation=2",), ()], ids=["accumulation", "no GPU"])
def test_a_graph_that_is_asked_for_where_it_cannot_be_is_refused(words: tuple[str, ...], run_train: Train):
    with pytest.raises(RecipeError, match=r"^graph: true needs one GPU and accumulation: 1, and this run has no GPU;"):
        run_train("ce.yaml", "graph=true", *words)


@pytest.mark.parametrize("kind", ["nadam", "rmsprop", "timm/lion"])
def test_an_optimizer_that_cannot_be_captured_is_refused_with_a_graph_and_trains_without(
    kind: str, run_train: Train, recorded: type[RecordedGraph]
):
    words = ("ce.yaml", f"optimizer.kind={kind}", "optimizer.momentum=null", "schedule.rate=1e-3")
    told = r"an optimizer that cannot be captured, \w+ \(sgd, adam, adamw can be\);"
    with pytest.raises(RecipeError, match=rf"^graph: true needs .*, and this run has {told}"):
        run_train(*words, "graph=true")
    run_train(*words)
    assert recorded.replays == 0


def test_auto_is_a_graph_where_one_can_be(run_train: Train, recorded: type[RecordedGraph]):
    run_train("ce.yaml", "accumulation=2", "folder=runs/parts")
    assert recorded.replays == 0
    run_train("ce.yaml", "folder=runs/whole")
    assert recorded.replays == 7
    run_train("ce.yaml", "graph=false", "folder=runs/eager")
    assert recorded.replays == 7


def test_no_part_of_a_replays_time_is_named_as_the_whole_step(
    run_train: Train, recipes: Path, recorded: type[RecordedGraph]
):
    run_train("ce.yaml", "graph=true", "journal.every_steps=1", "folder=runs/replayed")
    lines = map(json.loads, (recipes / "runs" / "replayed" / "journal.jsonl").read_text().splitlines())
    timings = [line["timing"] for line in lines if "timing" in line][graph.EAGER_STEPS :]
    assert {tuple(timing["milliseconds"]) for timing in timings} == {("data", "graph", "rest")}
    whole, *parts = split(timings, steps=1, batch=4)
    assert whole.name not in {part.name for part in parts}
    assert whole.median > max(part.median for part in parts)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "precision"), [("dkd", "fp32"), ("crd", "fp32"), ("ddkd", "fp32"), ("ddkd", "fp16"), ("ddkd", "bf16")]
)
def test_on_a_gpu_replays_are_the_same_run(
    method: str,
    precision: str,
    run_train: Train,
    recipes: Path,
    recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        words = [recipe(method), "schedule.rate=1e-4", f"precision={precision}", "clip=5", "ema.decay=0.9"]
        eager, replayed = both(run_train, recipes, *words)
    finally:
        torch.use_deterministic_algorithms(False)
    assert eager == replayed
