"""mixup and CutMix: the law of their draws, and their pixels and shares of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from torchvision.transforms import v2

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._mixing import UNMIXED, mix_images, mix_labels, symmetric_beta
from pipeline.augmentations._registry import Augmentations, build_augmentations

quick = settings(derandomize=True, deadline=None, max_examples=40)
IDS = np.arange(40_000)


def drawn_of(config: dict, size: int = 32, seed: int = 7) -> np.ndarray:
    (mixing,) = build_augmentations(TypeAdapter(Augmentations).validate_python([config]), size)
    return mixing.draw(SampleDraws(IDS, 3, seed, 0))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 1.7, 8.0, 100.0])
def test_mixups_shares_have_the_beta_distribution(alpha: float):
    drawn_R6 = drawn_of({"mixup": {"alpha": alpha}})
    shares_R = symmetric_beta(SampleDraws(IDS, 3, 7, 0).uniforms(0), alpha)
    assert stats.kstest(shares_R, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert np.array_equal(drawn_R6[:, 0], shares_R.astype(np.float32))
    assert np.array_equal(drawn_R6[:, 0], drawn_R6[:, 1])
    assert not drawn_R6[:, 2:].any()


@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.1])
def test_of_a_small_alpha_most_shares_are_at_the_ends(alpha: float):
    """Near 1 a float has too few digits for the test of Kolmogorov and Smirnov."""
    shares_R = drawn_of({"mixup": {"alpha": alpha}})[:, 0]
    for end in (1e-6, 1e-3, 0.1, 0.3):
        expected = stats.beta(alpha, alpha).cdf(end)
        for count in ((shares_R < end).sum(), (shares_R > 1 - end).sum()):
            assert abs(count - expected * len(IDS)) < 4 * np.sqrt(expected * (1 - expected) * len(IDS))


@quick
@given(alpha=st.floats(0.01, 100), words=st.tuples(*[st.sampled_from([0, 1, 2**30, 2**31, 2**32 - 1])] * 3))
def test_a_share_is_a_number_of_0_to_1_at_the_ends_of_its_uniform_numbers(alpha: float, words: tuple[int, ...]):
    with np.errstate(all="raise", under="ignore"):
        (share,) = symmetric_beta(np.array([*words, 0])[:, None] / 2**32, alpha)
    assert 0 <= share <= 1


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_images_are_mixed_with_their_probability(name: str):
    everywhere, some = drawn_of({name: {"alpha": 1.0}}), drawn_of({name: {"alpha": 1.0, "probability": 0.3}})
    mixed_R = some[:, 0] < 1
    assert np.array_equal(some[mixed_R], everywhere[mixed_R])
    assert (some[~mixed_R & (everywhere[:, 0] < 1)] == UNMIXED).all()
    share = mixed_R.mean() / (everywhere[:, 0] < 1).mean()
    assert share == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("size", [32, 45])
def test_cutmixs_boxes_are_those_of_torchvision_from_the_same_numbers(size: int):
    drawn_R6, draws = drawn_of({"cutmix": {"alpha": 1.0}}, size), SampleDraws(IDS, 3, 7, 0)
    shares_R, (y_R, x_R, _, _) = symmetric_beta(draws.uniforms(0), 1.0), draws.uniforms(1)
    for row in range(500):
        # torchvision.transforms.v2.CutMix.make_params
        r_y, r_x, r = int(y_R[row] * size), int(x_R[row] * size), 0.5 * np.sqrt(1.0 - shares_R[row])
        half = int(r * size)
        top, left = max(r_y - half, 0), max(r_x - half, 0)
        bottom, right = min(r_y + half, size), min(r_x + half, size)
        share = 1 - (bottom - top) * (right - left) / size**2
        assert drawn_R6[row].tolist() == [pytest.approx(share, abs=1e-12), 1, top, left, bottom, right]


def test_cutmixs_centres_come_everywhere_equally_often():
    drawn_R6 = drawn_of({"cutmix": {"alpha": 100.0}}, size=4)  # the box has half the area: two pixels and more
    corners, counts = np.unique(drawn_R6[:, 2:4] + drawn_R6[:, 4:6], axis=0, return_counts=True)
    assert len(corners) == 16
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_differ_by_id_view_and_seed_and_not_by_batch():
    (mixing,) = build_augmentations(TypeAdapter(Augmentations).validate_python([{"cutmix": {"alpha": 1.0}}]), 32)
    whole = mixing.draw(SampleDraws(IDS[:50], 3, 7, 0))
    parts = [mixing.draw(SampleDraws(IDS[part], 3, 7, 0)) for part in (slice(0, 20), slice(20, 50))]
    assert np.array_equal(np.concatenate(parts), whole)
    each = mixing.draw(SampleDraws(IDS[:50], np.arange(50), 7, 0))
    assert each[3].tolist() == whole[3].tolist()
    others = [mixing.draw(SampleDraws(IDS[:50], *keys)) for keys in ((4, 7, 0), (3, 8, 0), (3, 7, 1))]
    assert not any((other[:, 0] == whole[:, 0]).sum() > 5 for other in (*others, each))


def table_of(draw: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Return rows of all kinds: whole, mixed, cut, and cut out of a mixture."""
    corners = np.sort(draw.integers(0, size + 1, (rows, 2, 2)), axis=1).reshape(rows, 4)
    shares, kind = draw.random(rows), draw.integers(0, 3, rows)
    weights = np.where(kind == 1, shares, 1.0)
    table = np.column_stack([shares, weights, np.where(kind[:, None] == 2, corners, 0)])
    table[kind == 0] = UNMIXED
    return table


@quick
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6), size=st.integers(1, 9), last=st.booleans())
def test_pixels_are_the_weighted_sum_to_the_rounding_of_float32_and_those_of_a_box_exact(
    seed: int, rows: int, size: int, last: bool
):
    draw = np.random.default_rng(seed)
    table = table_of(draw, rows, size)
    mixed = np.flatnonzero(table[:, 0] < 1)
    images = torch.from_numpy(draw.normal(size=(rows + len(mixed), 3, size, size)).astype(np.float32))
    layout = torch.channels_last if last else torch.contiguous_format
    found = mix_images(images.clone().contiguous(memory_format=layout), table)
    assert found.shape == (rows, 3, size, size)
    expected = images[:rows].double()
    for number, row in enumerate(mixed):
        _, weight, top, left, bottom, right = table[row]
        w = torch.full((size, size), np.float32(weight).item(), dtype=torch.float64)
        w[int(top) : int(bottom), int(left) : int(right)] = 0
        expected[row] = w * images[row].double() + (1 - w) * images[rows + number].double()
    # Three roundings: two products and their sum.
    scale = images.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * 2**-24 * scale)
    exact = torch.from_numpy(table[:, 1] == 1)
    assert torch.equal(found[exact].double(), expected[exact])


@quick
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6))
def test_shares_of_classes_sum_to_one_and_the_larger_ones_class_is_the_label(seed: int, rows: int):
    draw = np.random.default_rng(seed)
    table = table_of(draw, rows, 4)
    table[draw.random(rows) < 0.2, 0] = 0.5
    labels, others = draw.integers(0, 5, (2, rows))
    mixed = np.flatnonzero(table[:, 0] < 1)
    found_B, soft_BK = mix_labels(torch.from_numpy(labels), table, others[mixed], 5)
    assert soft_BK.dtype == torch.float32
    for row in range(rows):
        share = table[row, 0]
        expected = share * np.eye(5)[labels[row]] + (1 - share) * np.eye(5)[others[row]]
        np.testing.assert_allclose(soft_BK[row].numpy(), expected, rtol=0, atol=1e-7)
        assert found_B[row] == (labels[row] if share >= 0.5 else others[row])
        assert soft_BK[row, found_B[row]] == soft_BK[row].max()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_pixels_and_shares_are_those_of_torchvision_for_its_pairs_of_neighbours(name: str):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 3, 3, 1, 4, 2])
    (row,) = drawn_of({name: {"alpha": 1.0}}, 16)[5:6]
    share, _, top, left, bottom, right = row.tolist()
    theirs = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](num_classes=5)
    box = tuple(map(int, (left, top, right, bottom)))
    params = {"labels": labels, "batch_size": 6, "lam": share, "lam_adjusted": share, "box": box}
    drawn_R6 = np.tile(row, (6, 1))
    ours = mix_images(torch.cat([images, images.roll(1, 0)]), drawn_R6)
    assert torch.equal(ours, theirs.transform(images, params))
    _, soft_BK = mix_labels(labels, drawn_R6, labels.roll(1, 0).numpy(), 5)
    torch.testing.assert_close(soft_BK, theirs.transform(labels, params), rtol=0, atol=1e-7)


def test_cutmixs_shares_have_torchvisions_distribution():
    torch.manual_seed(0)
    theirs, image = v2.CutMix(num_classes=5, alpha=1.0), [torch.zeros(1, 3, 32, 32)]
    shares = [theirs.make_params(image)["lam_adjusted"] for _ in range(4000)]
    assert stats.ks_2samp(shares, drawn_of({"cutmix": {"alpha": 1.0}})[:, 0]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("augment", "told"),
    [
        ([{"mixup": {"alpha": 0.8}}, {"trivialaugment": {}}], "mixup mixes finished images; move it behind all others"),
        ([{"mixup": {"alpha": 0.8}}, {"mixup": {"alpha": 0.2}}], "mixup is given more than once"),
        ([{"cutmix": {"alpha": 1.0, "switch": 0.3}}], "cutmix.switch is for a recipe that mixes in two ways; remove"),
        ([{"mixup": {"alpha": 0}}], "greater than or equal to 0.01"),
        ([{"mixup": {}}], "Field required"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(augment: list, told: str):
    with pytest.raises(ValidationError, match=told):
        TypeAdapter(Augmentations).validate_python(augment)
