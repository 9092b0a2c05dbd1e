"""Relations to anchors: chunks, rows that lie close, anchors that count; the direction that the labels give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT, RecipeError
from pipeline.losses import crcd
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.crcd import gradient_loss, pair_weights, relation_scores


def on_the_sphere(rows: int, dim: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=draw))


@pytest.mark.parametrize("largest", [1, 200, 2**24])
def test_relations_in_chunks_are_those_of_the_whole(largest: int, monkeypatch: pytest.MonkeyPatch):
    bank, anchor_A = on_the_sphere(9, 6, 0), torch.tensor([1, 4, 5])
    index_BJ = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(crcd, "LARGEST_GATHER", largest)
    embedding = on_the_sphere(5, 6, 1).requires_grad_()
    scores = relation_scores(embedding, bank, anchor_A, index_BJ)
    rows, others = F.normalize(embedding[:, None] - bank[anchor_A] + 1e-6, dim=2), bank[index_BJ][:, None]
    expected = (rows.unsqueeze(2) * F.normalize(others - bank[anchor_A][:, None] + 1e-6, dim=3)).sum(3)
    torch.testing.assert_close(scores, expected)
    found, wanted = (torch.autograd.grad(x.square().sum(), embedding, retain_graph=True) for x in (scores, expected))
    torch.testing.assert_close(found, wanted)


def test_rows_of_narrow_clusters_lose_no_digits_in_float32():
    """In float32 expanded products are wrong by 8e-3 there; late in training the rows of a class lie so."""
    centre_5D, scatter_ND = on_the_sphere(5, 128, 0), on_the_sphere(400, 128, 1)
    bank = F.normalize(centre_5D[torch.arange(400) % 5] + 0.003 * scatter_ND)
    embedding, anchor_A = F.normalize(bank[:16] + 0.003 * on_the_sphere(16, 128, 2)), torch.arange(16, 32)
    index_BJ = torch.randint(32, 400, (16, 50), generator=torch.Generator().manual_seed(0))
    embedding, bank = embedding.float(), bank.float()
    rows = F.normalize(embedding.double()[:, None] - bank.double()[anchor_A] + 1e-6, dim=2)
    others = F.normalize(bank.double()[index_BJ][:, None] - bank.double()[anchor_A][:, None] + 1e-6, dim=3)
    found = relation_scores(embedding, bank, anchor_A, index_BJ)
    assert (found - (rows.unsqueeze(2) * others).sum(3)).abs().amax() < 1e-6


@pytest.mark.parametrize("ids", [[3, 1, 8], [3, 1, 3, 8], [3, 3]])
def test_a_row_counts_with_every_anchor_but_those_of_its_own_sample(ids: list[int]):
    ids_B = torch.tensor(ids)
    weights_BA = pair_weights(ids_B, ids_B, False, torch.float64)
    own_BA = ids_B.unsqueeze(1) == ids_B
    assert weights_BA[own_BA].eq(0).all()
    assert weights_BA.sum().item() == pytest.approx(float(len(set(ids)) > 1))
    assert weights_BA[~own_BA].unique().numel() <= 1
    assert pair_weights(ids_B, ids_B, True, torch.float64).eq(1 / len(ids) ** 2).all()


def example_of_heads() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student_BD, teacher_BD = torch.randn(2, 6, 7, dtype=torch.float64, generator=draw)
    student_KD, teacher_KD = torch.randn(2, 4, 7, dtype=torch.float64, generator=draw)
    return student_BD, teacher_BD, student_KD, teacher_KD, torch.arange(6) % 4


def test_the_gradients_are_those_of_the_cross_entropy_by_the_embeddings():
    student_BD, teacher_BD, student_KD, teacher_KD, labels_B = example_of_heads()
    by_autograd = []
    for embedding_BD, weight_KD in ((student_BD, student_KD), (teacher_BD, teacher_KD)):
        leaf = embedding_BD.clone().requires_grad_()
        by_autograd += torch.autograd.grad(F.cross_entropy(leaf @ weight_KD.T, labels_B), leaf)
    expected = 1 - F.cosine_similarity(*by_autograd).mean()
    logits = student_BD @ student_KD.T, teacher_BD @ teacher_KD.T
    torch.testing.assert_close(gradient_loss(*logits, labels_B, student_KD, teacher_KD), expected)


def test_equal_gradients_cost_nothing_and_labels_that_are_certain_stay_finite():
    student_BD, _, student_KD, _, labels_B = example_of_heads()
    logits = (student_BD @ student_KD.T).requires_grad_()
    assert gradient_loss(logits, logits, labels_B, student_KD, student_KD).item() == pytest.approx(0, abs=1e-12)
    certain = (1e3 * F.one_hot(labels_B, 4)).double().requires_grad_()
    gradient_loss(certain, logits.detach(), labels_B, student_KD, student_KD).backward()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


SPEC = {"dim": 4, "negatives": 3, "temperature": 0.05, "momentum": 0.5}
SHAPES = ({"embedding": (5,)}, {"embedding": (7,)})
HEAD_OF_5, HEAD_OF_7 = nn.Linear(5, 2), torch.zeros(2, 7)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "gradient_weight needs the weights of the student's last layer, which is no known linear one; set"),
        (
            {"student_head": HEAD_OF_5},
            "gradient_weight needs the weights of the teacher's last layer, which is no known linear one; set",
        ),
        (
            {"student_head": HEAD_OF_5, "teacher_head_KD": HEAD_OF_7},
            "gradient_weight compares embeddings of equal width, and the student's has 5 numbers and the teacher's 7; "
            "set",
        ),
    ],
)
def test_heads_whose_gradients_cannot_be_compared_are_refused_in_one_line(heads: dict, message: str):
    facts = Facts(2, *SHAPES, 6, torch.arange(6).numpy() % 2, **heads)
    with pytest.raises(ValueError, match=f"^crcd: {message} gradient_weight: 0$"):
        load_spec("crcd", {**SPEC, "gradient_weight": 1.0}).build(facts)
    load_spec("crcd", {**SPEC, "gradient_weight": 0.0}).build(facts)


def test_a_batch_of_one_row_needs_its_own_anchor():
    row = torch.zeros(1, dtype=torch.int64)
    seen = [Outputs(torch.zeros(1, 2), {"embedding": torch.ones(1, width)}) for width in (5, 7)]
    for own_anchor in (False, True):
        spec = load_spec("crcd", {**SPEC, "gradient_weight": 0.0, "own_anchor": own_anchor})
        loss = spec.build(Facts(2, *SHAPES, 6, torch.arange(6).numpy() % 2))
        if own_anchor:
            assert all(part.isfinite() for part in loss(*seen, Batch(row, row, row, {})).values())
        else:
            with pytest.raises(ValueError, match=r"^crcd: a batch of one row has no anchor but its own; raise batch$"):
                loss(*seen, Batch(row, row, row, {}))


PAIR = str(ROOT / "configs" / "cifar100" / "resnet56_resnet20.yaml")
MEMBER = "{model: cifar_resnet20, weights: a.pt}"
NO_HEAD = {
    f"teacher={{recipe: null, members: [{MEMBER}], combine: mean, temperature: 4}}": "members does not give it; remove "
    "teacher.members",
    "teacher={recipe: null, average: {decay: 0.9}}": "average does not give it; remove teacher.average",
    "teacher.cache=nowhere": "cache does not give it; set teacher.fallback: live",
}


@pytest.mark.parametrize("teacher", NO_HEAD)
def test_a_teacher_without_one_head_of_its_own_is_refused_in_one_line(teacher: str):
    with pytest.raises(
        RecipeError, match=f"the loss 'crcd' reads the teacher's last layer, and teacher.{NO_HEAD[teacher]}$"
    ):
        load_recipe(PAIR, ["method=crcd", teacher])
    assert load_recipe(PAIR, ["method=crcd", teacher, "losses.crcd.gradient_weight=0"]).recipe
    assert load_recipe(PAIR, ["method=crcd", "teacher.cache=nowhere", "teacher.fallback=live"]).recipe
