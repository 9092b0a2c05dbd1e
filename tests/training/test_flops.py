"""Operations are counted as one counts them by hand, and the journal holds them against the clock and the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from small_networks import Careful
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.builders import meta as counting
from pipeline.builders.meta import image_flops
from pipeline.builders.summary import summarize
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.distributed import collectives
from pipeline.errors import ROOT
from pipeline.models import create_model
from pipeline.training.flops import FlopCounter, peak_of
from pipeline.training.journal import TrainingJournal
from pipeline.training.timer import StepTimer

IMAGENET = ROOT / "configs" / "imagenet" / "r50_mbv1.yaml"
RESNET50, MOBILENET = 4.089e9, 0.5687e9
CHECKPOINT = "losses.ddkd.diffusion.checkpoint=true"
STEM = 32 * 27 * 112 * 112
"""Multiply-accumulates of MobileNetV1's first convolution, at whose images no gradient is asked for."""


def recipe_of(path: Path, *words: str) -> Recipe:
    return load_recipe(path, words).recipe


def flops_of(path: Path, *words: str) -> float | None:
    loaded = load_recipe(path, words)
    return image_flops(loaded.recipe, [named.recipe for named in loaded.teachers])


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_resnet50_forward_is_what_everyone_counts(context: Callable[[], AbstractContextManager[None]]):
    with torch.device("meta"), context(), FlopCounter() as counted:
        create_model("resnet50", 1000)(torch.empty(2, 3, 224, 224))
    assert counted.flops / 2 / 2 == pytest.approx(RESNET50, rel=1e-3)


def backward(layer: nn.Module, x: Tensor) -> int:
    """Return the operations of the layer's backward in units of its forward's."""
    with FlopCounter() as counted:
        y = layer(x)
        forward, counted.flops = counted.flops, 0
        y.sum().backward()
    assert counted.flops % forward == 0
    return counted.flops // forward


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), 16 * 8 * 9 * 4 * 4),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 8 * 9 * 8 * 8),
        (nn.Conv2d(8, 16, 3, padding=1, groups=2), 16 * 4 * 9 * 8 * 8),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), 8 * 4 * 4 * 8 * 8),
        (nn.Linear(8, 5), 8 * 8 * 8 * 5),
    ],
    ids=["dense", "depthwise", "grouped", "transposed", "linear"],
)
def test_a_layers_backward_is_a_forward_for_its_weights_and_one_for_its_input(layer: nn.Module, macs: int):
    x = torch.randn(2, 8, 8, 8)
    with FlopCounter() as counted:
        layer(x)
    assert counted.flops == 2 * 2 * macs
    assert backward(layer, x) == 1
    assert backward(layer, x.requires_grad_()) == 2


def test_torchs_own_counter_agrees_where_no_convolution_has_groups():
    x, network = torch.randn(4, 3, 32, 32), create_model("cifar_resnet20", 10)
    with FlopCounterMode(display=False) as theirs:
        network(x).sum().backward()
    with FlopCounter() as ours:
        network(x).sum().backward()
    assert ours.flops == theirs.get_total_flops()


@pytest.mark.parametrize(
    ("words", "macs"),
    [
        (("method=ce",), 3 * MOBILENET - STEM),
        (("method=kd",), 3 * MOBILENET - STEM + RESNET50),
        (("method=kd", "with=cached"), 3 * MOBILENET - STEM),
        (("method=kd_perception",), 3 * MOBILENET - STEM + RESNET50),
    ],
)
def test_an_image_costs_the_student_three_times_and_a_teacher_that_is_asked_once(words: tuple[str, ...], macs: float):
    assert flops_of(IMAGENET, *words) == pytest.approx(2 * macs, rel=1e-3)


def test_a_denoisers_backward_is_counted_as_it_is():
    report = summarize(load_recipe(IMAGENET, ["method=ddkd"]))
    found = flops_of(IMAGENET, "method=ddkd")
    assert found is not None
    # The teacher's map, which enters the autoencoder and (encoded) a noise predictor, is a constant, and so are noises.
    assert 0.97 * report.training_macs < found / 2 < report.training_macs - STEM


def test_what_backward_computes_again_to_save_memory_is_not_counted(recipes: Path):
    plain, checkpointed = (flops_of(recipes / "ddkd.yaml", *words) for words in ((), (CHECKPOINT,)))
    assert recipe_of(recipes / "ddkd.yaml", CHECKPOINT) != recipe_of(recipes / "ddkd.yaml")
    assert checkpointed == plain is not None


def test_a_cache_that_lacks_nothing_leaves_the_network_unasked(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    class Kept:
        lacks: dict[str, str]

        def __init__(self, folder: Path) -> None:
            assert folder == Path("answers")

        def missing(self, taps: frozenset[str]) -> dict[str, str]:
            return self.lacks

    monkeypatch.chdir(recipes)
    monkeypatch.setattr(counting, "Cache", Kept)
    words = ("ddkd.yaml", "losses.ddkd=null", "losses.kd={temperature: 4.0}")
    cached = (*words, "teacher.cache=answers", "teacher.fallback=live")
    live, alone = flops_of(*words), flops_of(Path("ce.yaml"))
    Kept.lacks = {}
    assert flops_of(*cached) == alone
    Kept.lacks = {"last": "map"}
    assert flops_of(*cached) == live > alone


def test_relations_cost_by_the_rows_that_are_compared_and_a_student_does_not(recipes: Path):
    (recipes / "sp.yaml").write_text(yaml.safe_dump({"base": "ddkd.yaml", "losses": {"ddkd": None, "sp": {}}}))
    sp = [flops_of(recipes / "sp.yaml", *words) for words in ((), ("batch=24",), ("accumulation=2",))]
    ce = [flops_of(recipes / "ce.yaml", *words) for words in ((), ("batch=24",), ("accumulation=2",))]
    assert ce[0] == ce[1] == ce[2]
    assert sp[2] < sp[0] < sp[1]


def rank_counts(rank: int, world: int, path: Path) -> float | None:
    return flops_of(path) if rank == 0 else collectives.world_size()


def test_one_of_several_ranks_counts_without_the_others(ranks: Callable[..., list[float]], recipes: Path):
    words = {"base": "ddkd.yaml", "losses": {"ddkd": None, "perception": {"inner": {"kd": {"temperature": 4.0}}}}}
    (recipes / "perception.yaml").write_text(yaml.safe_dump(words))
    assert ranks(rank_counts, recipes / "perception.yaml") == [flops_of(recipes / "perception.yaml"), 2]


def test_the_journal_holds_the_count_against_the_clock(run_train: Callable[..., None], recipes: Path):
    run_train("ce.yaml", "epochs=1")
    flops = flops_of(recipes / "ce.yaml")
    assert flops is not None
    lines = [json.loads(line) for line in (recipes / "runs/ce/journal.jsonl").read_text().splitlines()]
    timings = [line["timing"] for line in lines if "timing" in line]
    for timing in timings:
        assert timing["teraflops"] == pytest.approx(timing["images_per_second"] * flops / 1e12, rel=1e-2)
        assert "mfu" not in timing


def test_what_cannot_be_counted_trains_without(run_train: Callable[..., None], recipes: Path):
    assert Careful(20) is not None
    (recipes / "own.yaml").write_text(
        yaml.safe_dump({"base": "ce.yaml", "student": {"model": "small_networks:Careful"}, "folder": "runs/own"})
    )
    run_train("own.yaml", "epochs=1")
    lines = [json.loads(line) for line in (recipes / "runs/own/journal.jsonl").read_text().splitlines()]
    assert "teraflops" not in lines[0]["timing"]


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name(name: str, precision: str, teraflops: float | None):
    assert peak_of(name, precision) == (teraflops and teraflops * 1e12)


def test_mfu_is_the_share_of_all_gpus(run_train: Callable[..., None], recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.training.journal.peak_flops", lambda device, precision: 1e12)
    run_train("ce.yaml", "stop.steps=2")
    timing = json.loads((recipes / "runs/ce/journal.jsonl").read_text().splitlines()[-1])["timing"]
    assert timing["mfu"] == pytest.approx(timing["teraflops"], abs=1e-4)


def peak_of_all(rank: int, world: int, folder: Path, recipe: Path) -> float | None:
    with mock.patch("pipeline.training.journal.peak_flops", return_value=1e12):
        device = torch.device("cpu")
        timer = StepTimer(device)
        track: Any = lambda values, step: None  # noqa: E731
        return TrainingJournal(folder, recipe_of(recipe), total_steps=1, timer=timer, device=device, track=track).peak


def test_several_ranks_could_do_as_many_times_as_much(ranks: Ranks, recipes: Path, tmp_path: Path):
    assert ranks(peak_of_all, tmp_path, recipes / "ce.yaml") == [2e12, 2e12]
