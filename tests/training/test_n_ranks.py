"""A whole run on several ranks is that of one process, and goes on on any number of them with the same batches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_on_ranks
import witness
import yaml
from gloo_ranks import Ranks
from methods import losses_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.training.journal import trace

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
BATCH = 12
# Of ten steps in float64; a step moves the weights by 1e-3 and more.
ROUNDING = 1e-11


def method(name: str) -> dict[str, Any]:
    return losses_of(name)[name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 images, a teacher's weights and ``plain.yaml``: a loss of every scope, and no BatchNorm."""
    folder = tmp_path_factory.mktemp("n_ranks")
    prepare = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder / "shards"), "--train", "60"]
    subprocess.run([*prepare, "--val", "12", "--size", "16", "--jobs", "1"], check=True, capture_output=True)
    torch.manual_seed(0)
    save_file(witness.plain(20).state_dict(), folder / "teacher.safetensors")
    network = {"path": "witness:plain", "stages": {"last": "1"}}
    data = {"path": "shards", "loader": "memory", "crop": "pad", "size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    dkd = {**method("dkd"), "ramp": None}
    of_samples = {"ce": {}, "dkd": dkd, "witness:Witness": {}}
    of_batches = {"perception": {"inner": {"dkd": dkd}}, "dist": method("dist"), "sp": method("sp")}
    recipe = {
        "data": data,
        "student": {"model": network},
        "teacher": {"model": network, "weights": "teacher.safetensors"},
        "losses": {**of_samples, **of_batches},
        "epochs": 2,
        "batch": BATCH,
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"kind": "cosine", "rate": 0.02},
        "journal": {"every_steps": 1, "trackers": []},
        "checkpoints": {"keep": 9},
    }
    (folder / "plain.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "samples.yaml").write_text(yaml.safe_dump({"base": "plain.yaml", "losses": dict.fromkeys(of_batches)}))
    return folder


def ids_of_a_rank(rank: int, world: int, folder: Path, words: list[str]) -> list[list[int]]:
    """Train, and return the ids of each micro-batch that this rank was given."""
    witness.SEEN.clear()
    training_on_ranks.train(rank, world, folder, words)
    return list(witness.SEEN)


class Trained:
    """A run after a command: where it is, and the ids of what the command trained on."""

    def __init__(self, folder: Path, ids_by_rank: list[list[list[int]]]) -> None:
        self.folder = folder
        micro_batches = zip(*ids_by_rank, strict=True)
        # Row r of every W rows is rank r's.
        ids = [i for by_rank in micro_batches for row in zip(*by_rank, strict=True) for i in row]
        self.batches = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
        """The ids of each global batch, in order."""

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "student.safetensors")

    @property
    def losses(self) -> list[float]:
        return [line["total"] for line in trace(self.folder / "journal.jsonl") if "total" in line]


def train(place: Path, name: str, *words: str, ranks: Ranks | None = None, recipe: str = "plain.yaml") -> Trained:
    """Run the command in ``runs/<name>`` on standing ranks, or in this process."""
    command = [recipe, f"folder=runs/{name}", *words]
    if ranks is None:
        return Trained(place / "runs" / name, [ids_of_a_rank(0, 1, place, command)])
    return Trained(place / "runs" / name, ranks(ids_of_a_rank, place, command, timeout=250))


@pytest.fixture(scope="module")
def one_process(place: Path) -> Trained:
    """Ten steps of one process; teachers answer in chunks of a rank's size, as in the runs it is compared with."""
    return train(place, "one", "teacher.batch=6")


def assert_equal_to_rounding(found: Trained, expected: Trained) -> None:
    difference = max((found.weights[key] - value).abs().max().item() for key, value in expected.weights.items())
    print(f"{found.folder.name} and {expected.folder.name}: parameters differ by at most {difference:.1e}")
    assert difference < ROUNDING
    assert found.losses == pytest.approx(expected.losses, rel=ROUNDING)


def test_ten_steps_on_ranks_are_those_of_one_process(place: Path, one_process: Trained, several_ranks: Ranks):
    found = train(place, f"on_{several_ranks.world}", "teacher.batch=6", ranks=several_ranks)
    assert found.batches == one_process.batches
    assert len(found.batches) == STEPS
    assert_equal_to_rounding(found, one_process)


@pytest.mark.parametrize("kind", ["adamw", "timm/lamb"])
def test_ten_steps_of_another_optimizer_on_ranks_are_those_of_one_process(
    kind: str, place: Path, several_ranks: Ranks, tmp_path: Path
):
    optimizer = {"kind": kind, "momentum": None, "decay_norms_and_biases": False, "weight_decay": 0.05}
    words = [f"optimizer={json.dumps(optimizer)}", "teacher.batch=6", "schedule.rate=0.002"]
    name = kind.replace("/", "_")
    one = train(place, f"{name}_beside_{several_ranks.world}", *words)
    found = train(place, f"{name}_on_{several_ranks.world}", *words, ranks=several_ranks)
    assert found.batches == one.batches
    assert_equal_to_rounding(found, one)


@pytest.fixture(scope="module")
def interrupted(place: Path, ranks: Ranks) -> Trained:
    """Two ranks, stopped within the first epoch."""
    return train(place, "interrupted", "stop.steps=3", ranks=ranks)


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_of_two_ranks_goes_on_on_another_number_with_the_same_global_batches(
    world: int, place: Path, one_process: Trained, interrupted: Trained, three_ranks: Ranks
):
    name = f"resumed_on_{world}"
    shutil.copytree(interrupted.folder, place / "runs" / name)
    rest = train(place, name, ranks=three_ranks if world == 3 else None)
    assert interrupted.batches + rest.batches == one_process.batches
    assert len(interrupted.batches) == 3
    states = [json.loads(path.read_text()) for path in sorted((rest.folder / "checkpoints").glob("*/state.json"))]
    assert [state["world_size"] for state in states] == [world, 2, world]  # of the steps 10, 3 and 5
    assert yaml.safe_load((rest.folder / "recipe.yaml").read_text())["teacher"]["batch"] == 6
    assert_equal_to_rounding(rest, one_process)


def test_micro_batches_of_losses_of_samples_are_one_batch(place: Path, ranks: Ranks):
    whole = train(place, "samples", recipe="samples.yaml")
    for name, among in {"micro": None, "micro_on_2": ranks}.items():
        parts = train(place, name, "accumulation=3", "teacher.batch=12", ranks=among, recipe="samples.yaml")
        assert parts.batches == whole.batches
        assert_equal_to_rounding(parts, whole)


def test_statistics_are_those_of_the_same_micro_batches_on_any_number_of_ranks(
    place: Path, one_process: Trained, ranks: Ranks
):
    one = train(place, "parts", "accumulation=2", "teacher.batch=6")
    two = train(place, "parts_on_2", "accumulation=2", "teacher.batch=6", ranks=ranks)
    assert two.batches == one.batches
    assert_equal_to_rounding(two, one)
    assert one.losses[0] != pytest.approx(one_process.losses[0], rel=1e-3)


def goes_on_with_other_ranks(
    place: Path, name: str, words: list[str], whole: Trained, ranks: Ranks, several_ranks: Ranks
) -> None:
    """Train four steps on two ranks and the rest on others, and compare it with the run on one."""
    first = train(place, f"{name}_begun", *words, "stop.steps=4", ranks=ranks)
    shutil.copytree(first.folder, place / "runs" / name)
    rest = train(place, name, *words, ranks=several_ranks)
    assert first.batches + rest.batches == whole.batches
    assert_equal_to_rounding(rest, whole)


def test_mixed_and_repeated_images_are_the_same_on_any_number_of_ranks(place: Path, several_ranks: Ranks, ranks: Ranks):
    mixing = "data.augment=[{mixup: {alpha: 0.8}}, {cutmix: {alpha: 1.0, probability: 0.7}}]"
    words = [mixing, "data.repeat=2", "epochs=1", "teacher.batch=6"]
    whole = train(place, f"mixed_beside_{several_ranks.world}", *words)
    assert len(whole.batches) == STEPS  # of 60 images, each twice
    goes_on_with_other_ranks(place, f"mixed_on_{several_ranks.world}", words, whole, ranks, several_ranks)


def test_held_out_images_and_a_teachers_own_size_are_the_same_on_any_number_of_ranks(
    place: Path, several_ranks: Ranks, ranks: Ranks
):
    words = ["data.holdout={share: 0.34}", "teacher.size=12", "teacher.batch=6", "epochs=3"]
    whole = train(place, f"held_out_beside_{several_ranks.world}", *words)
    assert len(whole.batches) == 9  # of 40 images of 60
    goes_on_with_other_ranks(place, f"held_out_on_{several_ranks.world}", words, whole, ranks, several_ranks)
