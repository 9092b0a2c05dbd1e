"""Gradients that travel in bfloat16: the bytes that saves, the precision it costs, and what it leaves alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gloo_ranks import Ranks
from resolved import run_of
from sent_bytes import Collectives
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_on_ranks import train

from pipeline.distributed import collectives
from pipeline.training.journal import trace

WIDE, LAYERS = 300, 4
LAYER = 4 * WIDE * (WIDE + 1)
"""Bytes of a layer's gradients, of which a bucket holds two."""


class Pair(nn.Module):
    """A student and the module of a loss, as a Distiller has them."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(*[nn.Linear(WIDE, WIDE) for _ in range(LAYERS)])
        self.losses = nn.Sequential(*[nn.Linear(WIDE, WIDE) for _ in range(LAYERS + 1)])

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.losses(self.student(x_BD)).square().mean()


class Step(NamedTuple):
    gradients: dict[str, Tensor]
    own: dict[str, Tensor]
    """This rank's, before the mean."""
    bytes: int


def first_step(rank: int, world: int, compress: str | None, micro_batches: int) -> Step:
    """Return what a rank has of a step under DDP as ``launch.create_accelerator`` asks for it, in small buckets."""
    torch.manual_seed(0)
    pair = Pair()
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
    wrapped = DistributedDataParallel(pair, broadcast_buffers=False, bucket_cap_mb=1.5 * LAYER / 2**20, **options)
    if compress:
        collectives.compress_gradients(wrapped, (pair if compress == "all" else pair.losses).parameters())
    torch.manual_seed(rank)
    alone = copy.deepcopy(pair)
    with Collectives() as sent:
        for index in range(micro_batches):
            x_BD = torch.randn(8, WIDE)
            with wrapped.no_sync() if index < micro_batches - 1 else nullcontext():
                wrapped(x_BD).backward()
            alone(x_BD).backward()
    found, own = ({name: p.grad.clone() for name, p in m.named_parameters()} for m in (pair, alone))  # type: ignore[union-attr]
    return Step(found, own, sum(call.bytes for call in sent.calls if call.name.startswith("allreduce")))


@pytest.mark.filterwarnings("ignore:find_unused_parameters")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_compressed_mean_is_near_and_half_as_long_and_the_rest_is_what_it_was(micro_batches: int, ranks: Ranks):
    plain = ranks(first_step, None, micro_batches)
    mean_magnitude = {name: sum(step.own[name].abs() for step in plain) / 2 for name in plain[0].own}
    for which in ("auxiliary", "all"):
        compressed = ranks(first_step, which, micro_batches)
        assert all(torch.equal(compressed[0].gradients[name], x) for name, x in compressed[1].gradients.items())
        changed = set()
        for name, expected in plain[0].gradients.items():
            found = compressed[0].gradients[name]
            assert bool(((found - expected).abs() <= 1.01 * 2 * 2**-8 * mean_magnitude[name]).all())
            changed |= set() if torch.equal(found, expected) else {name}
        weights = {name for name in plain[0].gradients if name.endswith("weight")}
        if which == "all":
            assert changed >= weights
            assert compressed[0].bytes == pytest.approx(plain[0].bytes / 2, rel=1e-3)
        else:
            # Buckets are of two layers or so, from the end: one may be of the loss's first and the student's last.
            assert {name for name in changed if name.startswith("student.")} == set()
            saved = plain[0].bytes - compressed[0].bytes
            assert saved == pytest.approx(sum(LAYER for name in changed if name in weights) / 2, rel=1e-2)
            assert saved >= 2 * LAYER / 2


def test_a_run_whose_gradients_are_compressed_is_another_one(recipes: Path, ranks: Ranks):
    plain, compressed = (run_of(recipes / "ce.yaml", words) for words in ((), ("compress=all",)))
    assert "compress" not in plain.identity  # as before there was such a key
    assert compressed.identity["compress"] == "all"
    words = ["ce.yaml", "stop.steps=3"]
    ranks(train, recipes, [*words, "folder=runs/plain"])
    ranks(train, recipes, [*words, "folder=runs/compressed", "compress=all"])
    plain, compressed = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("plain", "compressed"))
    assert plain[0]["total"] == compressed[0]["total"]
    for a, b in zip(plain, compressed, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-2)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
        assert a["gradient_norm"] != b["gradient_norm"]
