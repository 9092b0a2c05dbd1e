"""What torch does on the host of a GPU: seen with one that computes nothing, so that no GPU is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import null_gpu
import pytest
import torch
import training_on_ranks
import yaml
from methods import MULTILABEL, OF_BOXES, OF_IMAGES, OF_MASKS, OF_MODULES, OF_STAGES, OF_TOKENS
from safetensors.torch import save_file
from shard_factory import NUM_CLASSES, draw_samples, write_shards

from pipeline.config.source import known_methods
from pipeline.models import create_model

ROOT = Path(__file__).resolve().parents[2]
UNDER = str(ROOT / "tests" / "support" / "under_null_gpu.py")
OF_ONE_RUN = {"ab", "fsp", "pad", "subclass_kd", *OF_MODULES, *OF_STAGES}
OTHERS = {*OF_ONE_RUN, "kdsvd", "ddkd_paper_literal", *MULTILABEL, *OF_TOKENS, *OF_MASKS, *OF_BOXES, *OF_IMAGES}
METHODS = [name for name in known_methods() if name not in OTHERS]
"""All but those that need another run, one whose eigenvalues the host waits for, and one that equals another here."""
STORED = Path(__file__).with_name("launches.json")
COUNTED = ("launches", "products", "copies", "fills", "convolutions", "nodes")
pytestmark = [
    pytest.mark.endurance,
    pytest.mark.skipif(bool(null_gpu.missing()), reason=str(null_gpu.missing())),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 32 pixels and a teacher's weights."""
    folder = tmp_path_factory.mktemp("place")
    splits = {"train": draw_samples(96, [32], "png", 0), "val": draw_samples(16, [32], "png", 1)}
    write_shards(folder / "shards", splits, "png", per_shard=48)
    torch.manual_seed(0)
    save_file(create_model("cifar_resnet56", NUM_CLASSES).state_dict(), folder / "teacher.safetensors")
    return folder


def watched(environment: dict[str, str], place: Path, *cases: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train so, and return what was seen by case."""
    common = [
        *("data.path=shards", "batch=8", "journal={every_steps: 100, trackers: []}"),
        *("checkpoints={every_steps: 0, every_epochs: 0}", "schedule={kind: constant, milestones: null, rate: 0.01}"),
        "teacher={recipe: null, model: cifar_resnet56, weights: teacher.safetensors}",
        *words,
    ]
    shutil.rmtree(place / "runs", ignore_errors=True)
    done = null_gpu.python(environment, UNDER, json.dumps(common), *cases, folder=place, seconds=560)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@pytest.fixture(scope="session", params=["fp32", "bf16", "fp16"])
def seen(request: pytest.FixtureRequest, environment: dict[str, str], place: Path) -> dict[str, Any]:
    """What was seen of every method in a precision, by method."""
    found = watched(environment, place, *(f"{method}:{request.param}" for method in METHODS))
    return {"precision": request.param, **{case.partition(":")[0]: counts for case, counts in found.items()}}


def test_every_method_trains_and_no_step_waits_for_the_gpu(seen: dict[str, Any]):
    assert {method: seen[method]["error"] for method in METHODS if "error" in seen[method]} == {}
    assert {method: seen[method]["waits"] for method in METHODS} == dict.fromkeys(METHODS, 0)


def test_every_step_is_captured_and_its_replay_launches_little_and_allocates_nothing(seen: dict[str, Any]):
    replayed = {method: seen[method]["replayed"] for method in METHODS}
    for name, number in {"replays": 1, "waits": 0, "pageable": 0, "allocations": 0, "products": 0, "fills": 0}.items():
        assert {method: found[name] for method, found in replayed.items()} == dict.fromkeys(METHODS, number)
    assert all(found["alike"] for found in replayed.values())
    # The batch, the rate and the step's number, and where the step draws torch's seed and offset.
    launches = replayed["ce"]["launches"]
    assert launches <= LOADING + FILLED
    assert {found["launches"] for found in replayed.values()} == {launches, launches + 2}
    assert all(seen[method]["nodes"] > 200 for method in METHODS)
    # Functions that Python calls for it: as many for every method.
    assert max(found["calls"] for found in replayed.values()) < min(seen[method]["calls"] for method in METHODS) / 4


LOADING, FILLED = 5, 6
"""Launches of the loader ``memory`` for a batch; and of what a replay is given."""


def test_a_step_is_captured_anew_on_the_way(environment: dict[str, str], place: Path):
    words = ("batch=32", "losses.dkd.ramp.linear_epochs=3", "ema.decay=0.9", "clip=1")  # three steps in an epoch
    (found,) = watched(environment, place, "dkd:fp16", words=words).values()
    assert "error" not in found
    assert found["replayed"]["captures"] == 2


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_adam_and_an_average_that_warms_up_are_captured_and_never_wait(
    environment: dict[str, str], place: Path, kind: str, precision: str
):
    optimizer = f"optimizer={{kind: {kind}, momentum: null, nesterov: null, decay_norms_and_biases: false}}"
    words = (optimizer, "ema={decay: 0.9, warmup: true}", "clip=1")
    (found,) = watched(environment, place, f"dkd:{precision}", words=words).values()
    assert "error" not in found
    assert (found["waits"], found["pageable"]) == (0, 0)
    replayed = found["replayed"]
    assert (replayed["replays"], replayed["waits"], replayed["pageable"], replayed["allocations"]) == (1, 0, 0, 0)
    assert replayed["alike"]


@pytest.mark.parametrize("kind", ["nadam", "timm/lion"])
def test_for_an_optimizer_that_is_not_fused_the_host_waits_once_a_step_and_there_is_no_graph(
    environment: dict[str, str], place: Path, kind: str
):
    words = (f"optimizer={{kind: {kind}, momentum: null, nesterov: null}}",)
    (found,) = watched(environment, place, "dkd:fp32", words=words).values()
    assert found["waits"] == 6  # of the six steps that are watched
    assert "an optimizer that cannot be captured" in found["error"]


@pytest.mark.parametrize(
    ("runs", "number"),
    [("kd+ddkd:0", 2 + 1), ("kd:0,1", 2), ("ce+kd+dkd+crd:0", 4 + 1)],
)
def test_runs_side_by_side_each_replay_their_own_graph_and_never_wait(
    environment: dict[str, str], place: Path, runs: str, number: int
):
    """A teacher that computes every batch has a graph, too; one whose logits are known for the whole view has none."""
    words = ("teacher.batch=8",)
    (found,) = watched(environment, place, runs, words=words).values()
    assert found["error"] is None
    assert found["steps"] == 9
    assert (found["captures"], found["replays"]) == (number, number)
    assert (found["waits"], found["pageable"]) == (0, 0)


MOVED = {
    "a route": "teacher={model: null, weights: null, recipe: kept.yaml, route: {epochs: [1, 2], each: 1}}",
    "snapshots": "teacher={model: null, weights: null, snapshots: {cycles: 2}}",
    "a stage": "student.train=[stage2]",
}
SHORT = ("batch=16", "epochs=2", "losses={ce: null, kd: {ramp: {from: 1}}}")
"""Its second epoch begins with the seventh step, and a teacher that moves does so there."""


@pytest.fixture(scope="module")
def plain(environment: dict[str, str], place: Path) -> dict[str, Any]:
    """What is seen of such a run with a plain teacher. ``kept.yaml`` is a run that keeps the weights of its epochs."""
    recipe = {
        "base": str(ROOT / "configs" / "cifar100" / "resnet56_resnet20.yaml"),
        "losses": {"ce": {}},
        "teacher": None,
        "data": {"path": "shards"},
        "epochs": 2,
        "schedule": {"milestones": [1]},
        "checkpoints": {"export_epochs": [1, 2]},
        "folder": "kept",
    }
    (place / "kept.yaml").write_text(yaml.safe_dump(recipe))
    training_on_ranks.train(0, 1, place, ["kept.yaml"])
    return watched(environment, place, "kd:fp32", words=SHORT)["kd:fp32"]


@pytest.mark.parametrize("name", MOVED)
def test_a_teacher_that_moves_and_a_stage_alone_are_captured_and_make_no_step_wait(
    environment: dict[str, str], place: Path, plain: dict[str, Any], name: str
):
    (found,) = watched(environment, place, "kd:fp32", words=(*SHORT, MOVED[name])).values()
    assert "error" not in found
    for counts, expected in ((found, plain), (found["replayed"], plain["replayed"])):
        assert (counts["pageable"], counts["captures"]) == (0, expected["captures"])
        # The anchors of a route are in the host's memory: the host waits where one takes the place of another.
        assert (counts["waits"] > expected["waits"]) == (name == "a route")
    assert (found["replayed"]["replays"], found["replayed"]["allocations"]) == (1, 0)


def test_no_augmentation_waits_for_the_gpu(environment: dict[str, str], place: Path):
    augment = [
        {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
        *({"autoaugment": {"policy": policy}} for policy in ("imagenet", "cifar10", "svhn")),
        {"trivialaugment": {}},
        {"randaugment": {"ops": 9, "magnitude": 9, "magnitude_std": 0.5, "increasing": True}},
        {"erasing": {"probability": 0.9}},
        {"erasing": {"probability": 0.9, "value": "noise"}},
        {"mixup": {"alpha": 0.8, "probability": 0.7}},
        {"cutmix": {"alpha": 1.0}},
    ]
    (found,) = watched(environment, place, "kd:fp32", words=(f"data.augment={json.dumps(augment)}",)).values()
    assert "error" not in found
    assert (found["waits"], found["pageable"]) == (0, 0)
    assert (found["replayed"]["waits"], found["replayed"]["pageable"]) == (0, 0)


def test_nothing_is_copied_from_memory_that_is_not_pinned(seen: dict[str, Any]):
    assert {method: seen[method]["pageable"] for method in METHODS} == dict.fromkeys(METHODS, 0)


def test_a_step_launches_what_is_stored(seen: dict[str, Any], request: pytest.FixtureRequest):
    """Other numbers are a decision, no error: ``pytest tests/nullgpu --endurance --record "why"`` stores them."""
    table, version = json.loads(STORED.read_text()), ".".join(torch.__version__.split(".")[:2])
    ours = {method: [seen[method].get(name) for name in COUNTED] for method in METHODS}
    if why := request.config.getoption("--record"):
        table.setdefault(version, {})[seen["precision"]] = ours
        table.setdefault("reasons", []).append(f"{version} {seen['precision']}: {why}")
        STORED.write_text(json.dumps(table).replace("], ", "],\n").replace("{", "{\n") + "\n")
    if version not in table:
        pytest.skip(f"no counts are stored for torch {version}")
    assert ours == table[version][seen["precision"]]


@pytest.mark.parametrize("loss", ["Item", "Mask", "FromHost"])
def test_a_loss_that_waits_is_seen_and_named_where_it_is_captured(environment: dict[str, str], place: Path, loss: str):
    losses = f'losses={{"waiting_losses:{loss}": {{}}}}'
    (found,) = watched(environment, place, "ce:fp32", words=(losses,)).values()
    assert found["waits"] + found["pageable"] > 0
    where = f"RecipeError: graph: the step cannot be captured, losses.waiting_losses:{loss}, "
    assert found["error"].startswith(where)
    assert "waiting_losses.py:" in found["error"]


def test_the_doctor_and_the_benchmark_of_losses_reach_their_end(environment: dict[str, str], place: Path):
    doctor = null_gpu.python(environment, str(ROOT / "pipeline" / "doctor.py"), folder=place)
    assert "GPU             NVIDIA H200, 139.0 of 140.0 GiB free" in doctor.stdout
    # DALI, which brings a CUDA of its own, does not know this one.
    assert [line.split()[1] for line in doctor.stdout.splitlines() if line.startswith("FAIL")] == ["decoding"]
    recipe = ("configs/cifar100/resnet56_resnet20.yaml", "method=kd")
    words = ["losses", *recipe, "data.path=shards", "batch=8", "repeats=2", "steps=2"]
    teacher = "teacher={recipe: null, model: cifar_resnet56, weights: teacher.safetensors}"
    bench = null_gpu.python(environment, str(ROOT / "pipeline" / "bench.py"), *words, teacher, folder=place)
    assert bench.returncode == 0, bench.stderr
    assert "gpu NVIDIA H200" in bench.stdout
    assert "peak bytes" in bench.stdout
