"""Students that train together: one is the plain run, several differ, share what they share, resume, and leave one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from methods import OF_PEERS
from safetensors.torch import load_file
from shard_factory import config_of, open_loader
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.builders.peers import build_trained, peer_seed
from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT, RecipeError
from pipeline.features.cohort import Cohort
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.tasks.classification import Classification
from pipeline.training.evaluation import measure_peers, measure_split
from pipeline.training.journal import trace

Train = Callable[..., None]
SLOW = "schedule.rate=1e-3"
TEACHER = "teacher={model: cifar_resnet20, weights: a.pt}"


def weights_of(recipes: Path, name: str) -> dict[str, Tensor]:
    return load_file(recipes / "runs" / name / "student.safetensors")


def last_state(recipes: Path, name: str) -> dict[str, Tensor]:
    """Return the Distiller in the last checkpoint of a run."""
    folders = sorted((recipes / "runs" / name / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return load_file(folders[-1] / "distiller.safetensors")


def totals(recipes: Path, name: str) -> list[float]:
    return [line["total"] for line in trace(recipes / "runs" / name / "journal.jsonl") if "total" in line]


def of_peer(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"student.peers.{number}.model."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def mutual(recipes: Path) -> Path:
    """``mutual.yaml``: two networks that teach each other, for an epoch of five steps."""
    tree = {"base": "ce.yaml", "student": {"peers": 2}, "losses": {"mutual": {"temperature": 1.0}}, "epochs": 1}
    (recipes / "mutual.yaml").write_text(yaml.safe_dump(tree))
    return recipes


def test_one_peer_is_the_plain_run_bit_for_bit(run_train: Train, recipes: Path):
    run_train("ce.yaml", "ema.decay=0.9")
    run_train("ce.yaml", "student.peers=1", "ema.decay=0.9", "folder=runs/one")
    assert totals(recipes, "one") == totals(recipes, "ce")
    for name in ("student", "student_best", "student_ema"):
        assert_same(*(load_file(recipes / "runs" / run / f"{name}.safetensors") for run in ("one", "ce")))
    plain, one = (trace(recipes / "runs" / run / "journal.jsonl") for run in ("ce", "one"))
    for line, expected in zip(one, plain, strict=True):
        assert line == {("ce/peer0" if key == "ce" else key): value for key, value in expected.items()} | (
            {"peers": line["peers"]} if "peers" in line else {}
        )


def test_peers_differ_and_the_exported_one_is_a_plain_network(run_train: Train, mutual: Path):
    run_train("mutual.yaml", "folder=runs/both")
    state = last_state(mutual, "both")
    first, second = of_peer(state, 0), of_peer(state, 1)
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[key], second[key]) for key in first if key.endswith("conv1.weight"))
    exported = weights_of(mutual, "both")
    create_model("cifar_resnet8", 20).load_state_dict(exported, strict=True)
    assert_same(exported, first)
    run_train("mutual.yaml", "student.export=1", "folder=runs/other")
    assert_same(weights_of(mutual, "other"), second)
    result = json.loads((mutual / "runs" / "both" / "result.json").read_text())
    assert list(result["peers"]) == ["peer0", "peer1", "mean", "ensemble"]
    assert result["peers"]["peer0"] == result["top1"]
    assert result["peers"]["mean"] == pytest.approx((result["peers"]["peer0"] + result["peers"]["peer1"]) / 2)
    assert result["parameters"] == sum(
        parameter.numel() for parameter in create_model("cifar_resnet8", 20).parameters()
    )


def test_peers_with_swapped_seeds_swap_their_weights(run_train: Train, mutual: Path, monkeypatch: pytest.MonkeyPatch):
    run_train("mutual.yaml", "folder=runs/both")
    monkeypatch.setattr("pipeline.builders.peers.peer_seed", lambda seed, number: peer_seed(seed, 1 - number))
    run_train("mutual.yaml", "folder=runs/swapped")
    assert_same(of_peer(last_state(mutual, "swapped"), 0), of_peer(last_state(mutual, "both"), 1))
    assert_same(of_peer(last_state(mutual, "swapped"), 1), of_peer(last_state(mutual, "both"), 0))


@pytest.mark.parametrize("method", OF_PEERS)
def test_a_method_of_peers_goes_on_bit_for_bit_where_it_was_stopped(run_train: Train, recipes: Path, method: str):
    pair = yaml.safe_load((recipes / "ce.yaml").read_text())
    del pair["losses"]
    (recipes / "pair.yaml").write_text(yaml.safe_dump(pair))
    words = ["pair.yaml", f"method={method}", "epochs=1", SLOW]
    run_train(*words, "folder=runs/straight")
    run_train(*words, "folder=runs/stopped", "stop.steps=3")
    run_train(*words, "folder=runs/stopped")
    straight, stopped = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    assert_same(weights_of(recipes, "straight"), weights_of(recipes, "stopped"))
    assert_same(last_state(recipes, "straight"), last_state(recipes, "stopped"))
    start = load_file(recipes / "runs" / "stopped" / "checkpoints" / "step-3" / "distiller.safetensors")
    end = last_state(recipes, "stopped")
    assert all(
        any(not torch.equal(of_peer(start, n)[key], value) for key, value in of_peer(end, n).items()) for n in (0, 1)
    )


def test_peers_of_unlike_networks_learn_from_each_other(run_train: Train, mutual: Path):
    run_train(
        "mutual.yaml", "student={model: null, peers: [cifar_resnet8, cifar_resnet20], export: 1}", "folder=runs/unlike"
    )
    create_model("cifar_resnet20", 20).load_state_dict(weights_of(mutual, "unlike"), strict=True)


def test_shared_modules_are_one_object_and_stand_in_every_peers_weights(recipes: Path):
    overrides = ["student.peers=3", "student.shared=stage2", "losses.mutual={temperature: 1.0}"]
    recipe = load_recipe(recipes / "ce.yaml", overrides).recipe
    cohort = build_trained(recipe, 20)
    assert isinstance(cohort, Cohort)
    first, second, _ = (peer.model for peer in cohort.members)
    names = [name for name, _ in first.named_parameters()]
    shared = [name for name in names if first.get_parameter(name) is second.get_parameter(name)]
    assert shared == [name for name in names if not name.startswith(("layer3", "fc"))]
    own = sum(first.get_parameter(name).numel() for name in names if name not in shared)
    whole = sum(parameter.numel() for parameter in first.parameters())
    assert sum(parameter.numel() for parameter in cohort.parameters()) == whole + 2 * own
    assert first.state_dict().keys() == create_model("cifar_resnet8", 20).state_dict().keys()


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``peers.yaml``: two peers without BatchNorm, each with a view of its own, that share their first stage."""
    folder = tmp_path_factory.mktemp("two_views")
    prepare = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder / "shards"), "--train", "60"]
    subprocess.run([*prepare, "--val", "12", "--size", "16", "--jobs", "1"], check=True, capture_output=True)
    images = {"path": "shards", "loader": "memory", "crop": "pad", "size": 16, "views_per_step": 2}
    recipe = {
        "data": {**images, "mean": [0.5] * 3, "std": [0.25] * 3},
        "student": {"model": "witness:plain", "stages": {"stage1": "1"}, "peers": 2, "shared": "stage1"},
        "losses": {"ce": {}, "mutual": {"temperature": 2.0}},
        "epochs": 2,
        "batch": 12,
        "schedule": {"kind": "cosine", "rate": 0.02},
        "journal": {"every_steps": 1, "trackers": []},
    }
    (folder / "peers.yaml").write_text(yaml.safe_dump(recipe))
    losses = {"peer_mean": {"temperature": 2.0, "form": "kl"}, "peer_ensemble": {"temperature": 2.0}}
    average = {"average": {"decay": 0.9}, "batch": 2, "dtype": "fp32"}
    student = {"model": "witness:with_linear_head", "stages": {"embedding": "4:in"}}
    single = {"base": "peers.yaml", "student": student, "teacher": average}
    (folder / "averages.yaml").write_text(yaml.safe_dump({**single, "losses": losses}))
    return folder


@pytest.mark.parametrize(("recipe", "rounding"), [("peers", 1e-11), ("averages", 1e-5)])
def test_peers_on_ranks_are_those_of_one_process(two_views: Path, recipe: str, rounding: float, several_ranks: Ranks):
    names = f"{recipe}_one", f"{recipe}_{several_ranks.world}"
    training_on_ranks.train(0, 1, two_views, [f"{recipe}.yaml", f"folder=runs/{names[0]}"])
    several_ranks(training_on_ranks.train, two_views, [f"{recipe}.yaml", f"folder=runs/{names[1]}"], timeout=250)
    one, ranks = (last_state(two_views, name) for name in names)
    assert one.keys() == ranks.keys()
    assert max((one[key] - ranks[key]).abs().max().item() for key in one) < rounding
    assert totals(two_views, names[1]) == pytest.approx(totals(two_views, names[0]), rel=rounding)
    journals = [trace(two_views / "runs" / name / "journal.jsonl") for name in names]
    of_peers = [[line["peers"] for line in lines if "peers" in line] for lines in journals]
    assert of_peers[0] == of_peers[1]
    assert len(of_peers[0]) == 2


def test_the_ensemble_is_the_mean_of_the_peers_probabilities(photo_shards: Path):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 20)) for _ in range(3)]
    cohort = Cohort([FeatureTaps(network, {}, ()) for network in networks], 1).eval()
    batches = list(open_loader(config_of(photo_shards)).validation())
    found = measure_peers(Classification(), cohort, batches)

    def mean(batch: Batch) -> Outputs:
        probabilities = [network(batch.images_BCHW).softmax(1) for network in networks]
        return Outputs(torch.stack(probabilities).mean(0), {})

    expected = [
        measure_split(
            Classification(), lambda batch, network=network: Outputs(network(batch.images_BCHW), {}), batches
        ).main
        for network in networks
    ]
    assert [found.peers[f"peer{number}"] for number in range(3)] == expected
    assert found.main == expected[1]
    assert found.peers["ensemble"] == measure_split(Classification(), mean, batches).main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["losses.mutual={temperature: 1}"],
            "the loss 'mutual' compares networks that train together; set student.peers",
        ),
        (["student.peers=2", "student.export=2"], "export: 2 is no peer; there are 2, counted from 0"),
        (["student.shared=stage1"], "shared is for several networks that train together; set peers, or remove it"),
        (["student.export=1"], "export is for several networks that train together; set peers, or remove it"),
        (["student.peers=[cifar_resnet20, cifar_resnet8]"], "model: cifar_resnet8 is not peer 0, cifar_resnet20"),
        (
            ["student.peers=[cifar_resnet8, cifar_resnet20]", "student.shared=stage1"],
            "shared needs peers of one network, got cifar_resnet8, cifar_resnet20; remove it",
        ),
        (["student.peers=2", "student.compile=true"], "peers do not go with compile; remove one of them"),
        (["student.peers=2", "student.start={weights: a.pt}"], "peers do not go with start; remove one of them"),
        (["student.peers=2", "data.views_per_step=3"], "views_per_step: 3 is not the number of student.peers, 2"),
        (["data.views_per_step=2"], "views_per_step: 2 is not the number of student.peers, 0; set 1 or that"),
        (["student.peers=2", "losses.peer_mean={temperature: 1, form: kl}"], "the loss 'peer_mean' needs a teacher"),
        (
            ["student.peers=2", "losses.kd={temperature: 4}", TEACHER, "data.views_per_step=2"],
            "data.views_per_step: a teacher answers for one view of an image; set 1",
        ),
        (
            ["student.peers=2", "losses.peer_mean={temperature: 1, form: kl}", TEACHER],
            "the loss 'peer_mean' reads the averages of the peers; set teacher.average",
        ),
        (["student.peers=17"], "student.peers"),
        (["student.peers=2", "student.train=[stage1]"], "peers do not go with train; remove one of them"),
        (["student.peers=2", "teacher.snapshots.cycles=2"], "teacher.snapshots follows one student"),
    ],
)
def test_what_peers_cannot_do_is_one_line(recipes: Path, words: list[str], message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipes / "ce.yaml", words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_that_cannot_be_shared_is_one_line(run_train: Train, mutual: Path):
    with pytest.raises(
        RecipeError, match=r"student\.shared: 'stage9' is no stage of this network; it has stem, stage1"
    ):
        run_train("mutual.yaml", "student.shared=stage9")
