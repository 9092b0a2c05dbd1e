"""CRD's noise, its banks and its normalisers, on one rank and on several."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PROGRESS, draws_of_the_global_batch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses import crd
from pipeline.losses._banks import EPSILON, BankLoss, NegativeSampler, Pending, contrast, update_bank_
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.crd import bank_similarities, by_matrix, by_rows

quick = settings(max_examples=20, derandomize=True, deadline=None)
# Classes of unequal size, and holes at both ends and in the middle.
LABELS = np.array([-1, 2, 0, 0, 1, -1, 2, 2, 0, 1, 2, 2, 2, 0, 1, 2, 0, 2, -1])
PRESENT = np.flatnonzero(LABELS >= 0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MORE = {"crd": {}, "crcd": {"gradient_weight": 0.0}}
"""Keys of the losses with banks, besides those that all have."""
with_banks = pytest.mark.parametrize("name", MORE)


def loss_of(seed: int = 0, name: str = "crd") -> BankLoss:
    spec = load_spec(name, {"dim": 8, "negatives": 30, "temperature": 0.1, "momentum": 0.5, **MORE[name]})
    torch.manual_seed(seed)
    loss = spec.build(Facts(3, {"embedding": (5,)}, {"embedding": (7,)}, len(LABELS), LABELS)).double()
    assert isinstance(loss, BankLoss)
    return loss


def rows_of(ids: list[int], seed: int = 0) -> tuple[Outputs, Outputs, Batch]:
    """Return what student and teacher say of those samples, and the batch."""
    place = torch.tensor(ids)
    student, teacher = drawn(len(LABELS), 5, seed=seed)[place], drawn(len(LABELS), 7, seed=seed + 1)[place]
    batch = Batch(torch.empty(len(ids), 0), torch.from_numpy(LABELS)[place], place, {})
    return Outputs(student, {"embedding": student}), Outputs(teacher, {"embedding": teacher}), batch


def total_of(loss: BankLoss, ids: list[int], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack(list(loss.parts(*rows_of(ids, seed), PROGRESS).values())).sum()


def published(scores_BJ: Tensor, normalizer: Tensor, samples: int) -> Tensor:
    """Return the published form: exponentials first, and logarithms of what came of them."""
    p_BJ = scores_BJ.exp() / normalizer
    kappa = (scores_BJ.shape[1] - 1) / samples
    own_B, noise_BK = p_BJ[:, 0], p_BJ[:, 1:]
    return -((own_B / (own_B + kappa + EPSILON)).log() + (kappa / (noise_BK + kappa + EPSILON)).log().sum(1)).mean()


@quick
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 20), normalizer=st.floats(0.1, 1e6), samples=st.integers(5, 99))
def test_the_stable_form_is_the_published_one_epsilon_included(
    seed: int, scale: float, normalizer: float, samples: int
):
    own, literal = (scale * drawn(3, 6, seed=seed).requires_grad_() for _ in range(2))
    z = torch.tensor(normalizer, dtype=torch.float64)
    found, expected = contrast(own, z, samples=samples), published(literal, z, samples)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, x)[0] for value, x in ((found, own), (expected, literal))]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_scores_whose_exponentials_overflow_stay_finite():
    """The published form is infinity over infinity there: a cosine of 1 at τ = 0.01 in float32."""
    scores = torch.tensor([[100.0, -100.0, 100.0]], requires_grad=True)
    contrast(scores, torch.tensor(10.0), samples=20).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not published(scores.detach(), torch.tensor(10.0), 20).isfinite()


def test_noise_is_uniform_over_the_samples_of_other_classes_and_never_a_hole():
    torch.manual_seed(0)
    number = 30_000
    drawn_BJ = NegativeSampler(LABELS, 3)(torch.tensor([0, 1, 2]), number)
    for label, row in enumerate(drawn_BJ):
        counts = np.bincount(row.numpy(), minlength=len(LABELS))
        others = [i for i in PRESENT if LABELS[i] != label]
        assert set(np.flatnonzero(counts)) == set(others)
        expected = number / len(others)
        chi_square = ((counts[others] - expected) ** 2 / expected).sum()
        # Mean n, deviation √2n; five deviations.
        assert chi_square < len(others) + 5 * sqrt(2 * len(others))


@quick
@given(labels=st.lists(st.integers(-1, 4), min_size=2, max_size=30).filter(lambda x: len(set(x) - {-1}) > 1))
def test_noise_is_of_another_class_whatever_the_data_set(labels: list[int]):
    torch.manual_seed(0)
    found = NegativeSampler(np.array(labels), 5)(torch.tensor(labels).clamp(min=0), 50)
    for label, row in zip(labels, found, strict=True):
        assert not {labels[i] for i in row.tolist()} & {-1, max(label, 0)}


@pytest.mark.parametrize("labels", [[1, 1, -1, 1], [-1, -1], []])
def test_a_data_set_of_one_class_is_refused_in_one_line(labels: list[int]):
    with pytest.raises(ValueError, match=r"^negatives are samples of other classes, but all .* are of one class$"):
        NegativeSampler(np.array(labels, dtype=np.int64), 3)


@pytest.mark.parametrize("largest", [1, 24, 2**24])
def test_scores_by_the_whole_bank_and_by_gathered_rows_are_the_same(largest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crd, "LARGEST_GATHER", largest)
    bank, index = drawn(9, 4), torch.randint(9, (7, 3), generator=torch.Generator().manual_seed(0))
    found = []
    for way in (by_matrix, by_rows):
        anchor = drawn(7, 4, seed=1).requires_grad_()
        scores = way(anchor, bank, index)
        (gradient,) = torch.autograd.grad(scores.square().sum(), anchor)
        found.append((scores.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: by_rows(x, bank, index), drawn(7, 4, seed=1).requires_grad_())


@pytest.mark.parametrize(("largest", "way"), [(63, "by_rows"), (64, "by_matrix")])
def test_a_bank_too_big_to_compare_with_whole_is_gathered_from(largest: int, way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crd, "LARGEST_MATRIX", largest)
    with mock.patch.object(crd, way) as used:
        bank_similarities(torch.empty(8, 2), torch.empty(8, 2), torch.empty(8, 3, dtype=torch.int64))
    used.assert_called_once()


def test_each_row_of_a_bank_moves_once_and_back_onto_the_sphere():
    bank, before, e = drawn(5, 3), drawn(5, 3), drawn(2, 3, seed=1)
    update_bank_(bank, torch.tensor([3, 0]), e, 0.75)
    for i, row in ((3, e[0]), (0, e[1])):
        moved = 0.75 * before[i] + 0.25 * row
        torch.testing.assert_close(bank[i], moved / moved.norm(), rtol=1e-12, atol=1e-12)
    assert torch.equal(bank[[1, 2, 4]], before[[1, 2, 4]])


def test_of_an_id_that_comes_twice_the_last_row_counts():
    twice, once = drawn(5, 3), drawn(5, 3)
    e = drawn(5, 3, seed=1)
    update_bank_(twice, torch.tensor([2, 4, 2, 1, 2]), e, 0.5)
    update_bank_(once, torch.tensor([4, 1, 2]), e[[1, 3, 4]], 0.5)
    assert torch.equal(twice, once)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_embedding_that_is_not_finite_changes_no_bank(bad: float):
    bank, before, e = drawn(5, 3), drawn(5, 3), drawn(2, 3, seed=1)
    e[0, 1] = bad
    update_bank_(bank, torch.tensor([3, 0]), e, 0.5)
    assert torch.equal(bank[[1, 2, 3, 4]], before[[1, 2, 3, 4]])
    assert not torch.equal(bank[0], before[0])


def test_forward_changes_nothing_and_commit_once_changes_the_rows_that_were_seen():
    loss, untouched = loss_of(), loss_of().state_dict()
    for _ in range(3):
        assert total_of(loss, [1, 2, 4]).item() == total_of(loss, [1, 2, 4]).item()
    assert all(torch.equal(value, untouched[key]) for key, value in loss.state_dict().items())
    loss.commit()
    for bank in ("student_bank", "teacher_bank"):
        moved = (loss.state_dict()[bank] != untouched[bank]).any(1)
        assert moved.nonzero().flatten().tolist() == [1, 2, 4]
    after = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.commit()
    assert all(torch.equal(value, after[key]) for key, value in loss.state_dict().items())


def test_nothing_of_a_validation_enters_the_banks():
    loss, before = loss_of().eval(), loss_of().state_dict()
    total_of(loss, [1, 2, 4])
    loss.commit()
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_micro_batches_make_the_banks_of_their_whole():
    whole, parts = loss_of(), loss_of()
    total_of(whole, [1, 2, 4, 6])
    for ids in ([1, 2], [4, 6]):
        total_of(parts, ids)
    for loss in (whole, parts):
        loss.commit()
    for bank in ("student_bank", "teacher_bank"):
        # Not to the bit: a processor may add up a product of four rows in another order than one of two.
        torch.testing.assert_close(whole.state_dict()[bank], parts.state_dict()[bank])


def test_the_normalisers_are_those_of_the_first_batch_ever_after():
    loss = loss_of()
    with mock.patch.object(crd, "bank_similarities", wraps=bank_similarities) as seen:
        total_of(loss, [1, 2, 4])
        scores = [bank_similarities(*call.args) / 0.1 for call in seen.call_args_list]
    loss.commit()
    first = loss.normalizers.clone()
    torch.testing.assert_close(first, torch.stack([len(PRESENT) * x.exp().mean() for x in scores]).detach())
    for seed in (1, 2):
        total_of(loss, [3, 8], seed)
        loss.commit()
        assert torch.equal(loss.normalizers, first)


def trained(loss: BankLoss, optimizer: torch.optim.Optimizer, rank: int, world: int, steps: range) -> list[Tensor]:
    """Train the heads on this rank's rows as DDP would, and return the losses of all ranks."""
    losses = []
    for step in steps:
        ids = np.random.default_rng(step).permutation(PRESENT)[:6].tolist()
        mine = ids[rank * 6 // world : (rank + 1) * 6 // world]
        with draws_of_the_global_batch(rank, world):
            total = total_of(loss, mine, step) / world
        optimizer.zero_grad()
        total.backward()
        parts = [total.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)]
        for part in parts if world > 1 else ():
            dist.all_reduce(part)
        optimizer.step()
        loss.commit()
        losses.append(total.detach())
    return losses


def run_of(rank: int, world: int, name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    loss = loss_of(name=name)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    losses = trained(loss, optimizer, rank, world, range(5))
    return losses, dict(loss.state_dict())


@with_banks
def test_ranks_keep_the_same_banks_and_those_of_one_process(name: str, several_ranks: Ranks):
    (first_losses, first), *others = several_ranks(run_of, name)
    losses, one = run_of(0, 1, name)
    torch.testing.assert_close(first_losses, losses, rtol=1e-9, atol=1e-12)
    for key, expected in one.items():
        assert all(torch.equal(first[key], other[key]) for _, other in others), key
        torch.testing.assert_close(first[key], expected, rtol=1e-9, atol=1e-12, msg=key)
    assert not torch.equal(one["student_bank"], loss_of().student_bank)


def bank_of_repeated_ids(rank: int, world: int) -> Tensor:
    """Return a bank after a batch of 12 rows with every id three times; a rank has every ``world``-th row."""
    loss = loss_of()
    ids_B, embeddings_B2D = torch.tensor([3, 8, 4, 10]).repeat_interleave(3), drawn(12, 16)
    for rows in (slice(0, 6), slice(6, 12)):  # micro-batches, each of consecutive rows of the rank
        mine = torch.arange(rank, 12, world)[rows.start // world : rows.stop // world]
        loss.pending.append(Pending(ids_B[mine], embeddings_B2D[mine], torch.ones(2)))
    loss.commit()
    return loss.student_bank


def test_of_the_views_of_an_image_in_a_batch_the_last_counts_on_any_number_of_ranks(several_ranks: Ranks):
    alone, found = bank_of_repeated_ids(0, 1), several_ranks(bank_of_repeated_ids)
    assert all(torch.equal(alone, bank) for bank in found)
    expected = loss_of().student_bank
    update_bank_(expected, torch.tensor([3, 8, 4, 10]), drawn(12, 16)[2::3, :8], 0.5)
    assert torch.equal(alone, expected)


@with_banks
def test_a_saved_state_goes_on_as_if_nothing_had_been(name: str):
    def run(stops: Callable[[int], bool]) -> dict[str, Tensor]:
        loss, optimizer = loss_of(name=name), None
        for step in range(6):
            if optimizer is None or stops(step):
                saved, moments = loss.state_dict(), optimizer.state_dict() if optimizer else None
                loss = loss_of(step, name)
                loss.load_state_dict(saved)
                optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
                if moments:
                    optimizer.load_state_dict(moments)
            trained(loss, optimizer, 0, 1, range(step, step + 1))
        return dict(loss.state_dict())

    whole, parts = run(lambda _: False), run(lambda step: step in (1, 4))
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_a_map_is_no_embedding():
    spec = load_spec("crd", {"stage": "last", "dim": 8, "negatives": 3, "temperature": 0.1, "momentum": 0.5})
    with pytest.raises(ValueError, match=r"^crd: the tap 'last' is shaped \[4, 2, 2\], but a vector such as"):
        spec.build(Facts(3, {"last": (4, 2, 2)}, {"last": (8, 2, 2)}, len(LABELS), LABELS))
