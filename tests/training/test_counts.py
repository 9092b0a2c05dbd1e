"""What a step computes, dispatches, sends and keeps is what is stored: a guard that needs no quiet machine.

Other numbers are no error but a decision: ``pytest tests/training/test_counts.py --record "why they changed"`` stores
them in ``counts.json``, by torch's minor version, and puts table and reason into BENCHMARKS.md.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from masked import PIXEL_CLASSES, write_masked
from one_core import one_core
from step_counts import EARLY, LATE, Counts, count

from pipeline.config.compose import compose
from pipeline.config.source import RecipeSource
from pipeline.errors import ROOT
from pipeline.models import create_model

STORED = Path(__file__).with_name("counts.json")
BENCHMARKS = ROOT / "BENCHMARKS.md"
HEADING = "## Counted per step"
VERSION = ".".join(torch.__version__.split(".")[:2])
HOW = 'pytest tests/training/test_counts.py --record "why"'

PAIRS = {
    "resnet56_resnet20": ("cifar100", "cifar_resnet56", 16, ["ce", "kd", "dkd", "perception", "ddkd"]),
    "r50_mbv1": ("imagenet", "resnet50", 32, ["kd", "ddkd"]),
}
# An epoch is longer than what is counted, and no step large: these teachers' answers are.
SHORT = {
    "epochs": 1,
    "batch": 6,
    "schedule": {"kind": "cosine", "rate": 1e-6},
    "journal": {"every_steps": 100, "trackers": []},
}
SMALLER = {"r50_mbv1/ddkd": ["losses.ddkd.feature.latent=256"]}
RECIPES = {f"{pair}/{method}": 1 for pair, (*_, methods) in PAIRS.items() for method in methods}
RECIPES |= {f"resnet56_resnet20/{method}, 2 ranks": 2 for method in ("perception", "ddkd")}
OF_PIXELS = ("ce", "kd", "diffkd")
RECIPES |= {f"demo_segmentation/{method}": 1 for method in OF_PIXELS}


def write(folder: Path, shards: Path) -> None:
    """Write the recipes of the tree for the tiny shards, with teachers that have learned nothing."""
    for pair, (dataset, teacher, size, methods) in PAIRS.items():
        torch.manual_seed(0)
        torch.save(create_model(teacher, 20).state_dict(), folder / f"{teacher}.pt")
        for method in methods:
            tree = compose(RecipeSource(ROOT / "configs" / dataset / f"{pair}.yaml", method))
            own = {"model": teacher, "weights": f"{teacher}.pt"} if method != "ce" else None
            losses = {key: tree[key] for key in ("student", "losses", "optimizer")}
            data = {"path": str(shards), "size": size, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
            recipe = {**SHORT, **losses, "teacher": own, "data": data}
            (folder / f"{pair}.{method}.yaml").write_text(yaml.safe_dump(recipe))


def write_of_pixels(folder: Path) -> None:
    """Write the recipes of the demo of segmentation likewise, for small images with masks."""
    write_masked(folder / "masked", 60, 0)
    torch.manual_seed(0)
    torch.save(create_model("plain_fpn", len(PIXEL_CLASSES)).state_dict(), folder / "plain_fpn.pt")
    for method in OF_PIXELS:
        tree = compose(RecipeSource(ROOT / "configs" / "demo_segmentation.yaml", method))
        own = {"model": "plain_fpn", "weights": "plain_fpn.pt"} if method != "ce" else None
        given = {key: tree[key] for key in ("task", "student", "losses", "optimizer")}
        data = {"path": "masked", "size": [16, 24], "crop": "scaled", "mean": [0.5] * 3, "std": [0.25] * 3}
        recipe = {**SHORT, **given, "teacher": own, "data": data}
        (folder / f"demo_segmentation.{method}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def counted(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, ranks: Ranks, request: pytest.FixtureRequest
) -> dict[str, tuple[Counts, int]]:
    """The counts of every recipe, and how many tensors were alive earlier; stored first if that is asked for."""
    why = request.config.getoption("--record")
    if torch.cuda.is_available():
        pytest.skip("counts are a CPU's: give CUDA_VISIBLE_DEVICES=")
    if VERSION not in stored() and not why:
        pytest.skip(f"nothing is stored for torch {VERSION}; record it: {HOW}")
    folder = tmp_path_factory.mktemp("counts")
    write(folder, shards)
    write_of_pixels(folder)
    found = {}
    for name, world in RECIPES.items():
        words = [f"{name.partition(',')[0].replace('/', '.')}.yaml", f"folder=runs/{name.replace(' ', '')}"]
        words += SMALLER.get(name, [])
        with one_core():
            found[name] = ranks(count, folder, words)[0] if world > 1 else count(0, 1, folder, words)
    if why:
        record({name: counts for name, (counts, _) in found.items()}, why)
    return found


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text()) if STORED.is_file() else {}


def record(counts: dict[str, Counts], why: str) -> None:
    """Store the counts, and write table and reason into the section of BENCHMARKS.md."""
    found = {name: one._asdict() for name, one in counts.items()}
    reason = f"- {datetime.date.today()}, torch {VERSION}, counts {digest(found)}: {why}"
    reasons = [*stored().get(VERSION, {"why": []})["why"], reason]
    whole = {**stored(), VERSION: {"counts": found, "why": reasons}}
    STORED.write_text(json.dumps(whole, indent=1) + "\n")
    text = BENCHMARKS.read_text()
    before, _, rest = text.partition(f"{HEADING}\n")
    introduction = rest.partition("\n**torch ")[0]
    after = rest[rest.index("\n## ") :] if "\n## " in rest else "\n"
    BENCHMARKS.write_text(f"{before}{HEADING}\n{introduction}\n{tables(whole)}{after}")


def digest(counts: dict[str, dict[str, int]]) -> str:
    """Return what binds a reason to the counts it was given for."""
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:8]


def tables(whole: dict[str, Any]) -> str:
    """Return what BENCHMARKS.md shows of the stored values."""
    shown = []
    for version, values in whole.items():
        rows = [
            f"| `{name}` | {c['flops'] / 1e6:.3f} | {c['operators']} | {c['allocations']} | {c['kept']:,} | "
            f"{c['alive']} | {c['collectives']} | {c['sent']:,} |"
            for name, c in values["counts"].items()
        ]
        head = [
            "| recipe | MFLOP | operators | allocations | bytes kept | tensors alive | collectives | bytes sent |",
            "|---" * 8 + "|",
        ]
        shown.append("\n".join([f"**torch {version}**\n", *head, *rows, "", *values["why"], ""]))
    return "\n".join(shown)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_counts_what_is_stored(name: str, counted: dict[str, tuple[Counts, int]]):
    assert counted[name][0]._asdict() == stored()[VERSION]["counts"][name], f"if that is meant: {HOW}"


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_piles_up_from_step_to_step(name: str, counted: dict[str, tuple[Counts, int]]):
    counts, early = counted[name]
    assert counts.alive == early, f"tensors after step {LATE} and after step {EARLY}"


def test_the_benchmarks_show_what_is_stored_and_why():
    assert tables(stored()) in BENCHMARKS.read_text()
    for values in stored().values():
        assert f"counts {digest(values['counts'])}: " in values["why"][-1], f"other counts need a reason: {HOW}"


def test_other_counts_do_not_pass_under_the_reason_of_earlier_ones():
    whole = stored()
    counts = whole[next(iter(whole))]["counts"]
    earlier = digest(counts)
    counts[next(iter(counts))]["operators"] += 1
    assert digest(counts) != earlier
    assert tables(whole) not in BENCHMARKS.read_text()
