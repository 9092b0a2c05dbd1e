"""The law of the draws, against what torchvision and timm draw; their images stay as they are and only calls count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_augment
from torchvision import transforms
from torchvision.transforms import autoaugment as reference
from torchvision.transforms import functional

from pipeline.augmentations._base import Augmentation, SampleDraws
from pipeline.augmentations._noise import normal_noise
from pipeline.augmentations._operations import CODES
from pipeline.augmentations._registry import AugmentationEntry, build_augmentations, known_augmentations
from pipeline.augmentations.autoaugment import read_policy
from pipeline.philox import philox4x32

SIDE, COUNT = 64, 6000
IMAGE = Image.new("RGB", (SIDE, SIDE))
NAMES = {code: name for name, code in CODES.items()}
THEIR_NAMES = {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "autoaugment": {"policy": "imagenet"},
    "color_jitter": {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1},
    "cutmix": {"alpha": 1.0},
    "erasing": {"probability": 0.5},
    "mixup": {"alpha": 0.8},
    "randaugment": {"ops": 2, "magnitude": 9, "magnitude_std": 0.5, "increasing": True, "probability": 0.5},
    "trivialaugment": {},
}
Call = tuple[str, float]


def built(name: str, size: int = SIDE, **keys: object) -> Augmentation:
    (augmentation,) = build_augmentations([AugmentationEntry.model_validate({name: keys})], size)
    return augmentation


def drawn(augmentation: Augmentation, count: int = COUNT, *, view: int = 0, seed: int = 0, position: int = 0):
    return augmentation.draw(SampleDraws(np.arange(count), view, seed, position))


def our_calls(augmentation: Augmentation) -> list[Call]:
    """Return the operations of many images, without those that leave an image alone."""
    chosen = drawn(augmentation).reshape(-1, 2)
    return [(NAMES[int(code)], value) for code, value in chosen.tolist() if NAMES[int(code)] != "identity"]


def torchvisions_calls(transform: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    calls: list[Call] = []

    def recorded(image: Any, name: str, magnitude: float, **_: object) -> Any:
        calls.append((THEIR_NAMES.get(name, name.lower()), magnitude))
        return image

    monkeypatch.setattr(reference, "_apply_op", recorded)
    torch.manual_seed(0)
    for _ in range(COUNT):
        transform(IMAGE)
    moves = ("translate_x", "translate_y", "posterize")  # their operations cut the magnitude to a whole number
    return [(name, float(int(value)) if name in moves else value) for name, value in calls if name != "identity"]


def assert_same_law(ours: Sequence[Call], theirs: Sequence[Call], digits: int = 3) -> None:
    """Compare how often each operation comes with each value; rare ones count together."""
    counts = [Counter((name, round(abs(value), digits), value < 0) for name, value in each) for each in (ours, theirs)]
    assert {key[0] for key in counts[0]} == {key[0] for key in counts[1]}
    keys = [key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 10]
    table = np.array([[count[key] for key in keys] for count in counts])
    rest = np.array([[sum(count.values())] for count in counts]) - table.sum(axis=1, keepdims=True)
    table = np.hstack([table, rest]) if rest.sum() else table
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert abs(len(ours) / len(theirs) - 1) < 0.03


def test_every_augmentation_has_an_example() -> None:
    assert list(EXAMPLES) == known_augmentations()


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_randaugment_draws_as_torchvision_does(magnitude: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvisions_calls(transforms.RandAugment(3, magnitude), monkeypatch)
    assert_same_law(our_calls(built("randaugment", ops=3, magnitude=magnitude)), theirs)


def test_trivialaugment_draws_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvisions_calls(transforms.TrivialAugmentWide(), monkeypatch)
    assert_same_law(our_calls(built("trivialaugment")), theirs)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_draws_as_torchvision_does(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvisions_calls(transforms.AutoAugment(reference.AutoAugmentPolicy(policy)), monkeypatch)
    assert_same_law(our_calls(built("autoaugment", policy=policy)), theirs)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_the_policies_of_autoaugment_are_those_of_torchvision(policy: str) -> None:
    theirs = transforms.AutoAugment(reference.AutoAugmentPolicy(policy)).policies
    expected = [[(THEIR_NAMES.get(name, name.lower()), p, level or 0) for name, p, level in pair] for pair in theirs]
    assert [[tuple(step) for step in pair] for pair in read_policy(policy)] == expected


def timms_calls(config: str) -> list[Call]:
    """Return the operations and values of timm's RandAugment, in the units of ours."""
    transform = timm_augment.rand_augment_transform(config, {"translate_pct": 0.45})
    calls: list[Call] = []
    names = {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateXRel": "translate_x", "TranslateYRel": "translate_y"}
    for each in transform.ops:
        name = each.name.removesuffix("Increasing")
        name = {**names, "AutoContrast": "autocontrast", "SolarizeAdd": "solarize_add"}.get(name, name.lower())
        scale, shift = {"translate_x": (SIDE, 0), "translate_y": (SIDE, 0)}.get(name, (1, 0))
        shift = -1 if name in ("brightness", "color", "contrast", "sharpness") else shift

        def record(image: Any, *levels: float, name: str = name, scale: int = scale, shift: int = shift, **_: object):
            calls.append((name, scale * levels[0] + shift if levels else 0.0))
            return image

        each.aug_fn = record
    timm_augment.random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # timm's own
    for _ in range(COUNT):
        transform(IMAGE)
    return calls


@pytest.mark.parametrize("std", [0.0, 0.5, 3.0])
def test_increasing_randaugment_draws_as_timm_does(std: float) -> None:
    theirs = timms_calls(f"rand-m9-mstd{std}-inc1" if std else "rand-m9-inc1")
    keys = {"ops": 2, "magnitude": 9, "magnitude_std": std, "increasing": True, "probability": 0.5}
    ours = our_calls(built("randaugment", **keys))
    names = sorted({name for name, _ in theirs})
    assert names == sorted({name for name, _ in ours})
    counts = [Counter(name for name, _ in calls) for calls in (ours, theirs)]
    assert stats.chi2_contingency([[count[name] for name in names] for count in counts]).pvalue > 1e-3
    assert abs(len(ours) / len(theirs) - 1) < 0.03
    for name in names:
        one, other = ([round(value, 9) for each, value in calls if each == name] for calls in (ours, theirs))
        assert stats.ks_2samp(one, other, method="asymp").pvalue > 1e-3


def test_color_jitter_draws_as_torchvision_does() -> None:
    found = drawn(built("color_jitter", **EXAMPLES["color_jitter"]))
    torch.manual_seed(0)
    ranges = transforms.ColorJitter(0.4, 1.5, 0.2, 0.1)
    params = (ranges.brightness, ranges.contrast, ranges.saturation, ranges.hue)
    theirs = [transforms.ColorJitter.get_params(*params) for _ in range(COUNT)]
    numbers = [CODES[name] for name in ("brightness", "contrast", "color", "hue")]
    orders = [
        Counter(tuple(numbers.index(int(code)) for code in codes) for codes in found[:, :, 0]),
        Counter(tuple(order.tolist()) for order, *_ in theirs),
    ]
    assert len(orders[0]) == 24
    assert stats.chi2_contingency([[count[order] for order in orders[0]] for count in orders]).pvalue > 1e-3
    for column, number in enumerate(numbers):
        ours = found[found[:, :, 0] == number][:, 1] + (0 if column == 3 else 1)
        assert stats.ks_2samp(ours, [each[1 + column] for each in theirs]).pvalue > 1e-3


def test_a_strength_of_zero_leaves_its_operation_out() -> None:
    calls = our_calls(built("color_jitter", contrast=0.4))
    assert {name for name, _ in calls} == {"contrast"}
    assert len(calls) == COUNT


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.5, 1.0), (0.1, 10.0))])
def test_erasing_draws_as_torchvision_does(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """The second seldom fits."""
    torch.manual_seed(0)
    image = torch.zeros(3, SIDE, SIDE)
    params = [transforms.RandomErasing.get_params(image, scale, ratio, [0.0]) for _ in range(COUNT)]
    theirs = np.array([each[:4] if each[2:4] != (SIDE, SIDE) else (0, 0, 0, 0) for each in params])
    ours = drawn(built("erasing", probability=1.0, scale=scale, ratio=ratio))
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    erased = drawn(built("erasing", probability=0.25, scale=(0.02, 0.1)))[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.02


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), side=st.integers(2, 40), probability=st.sampled_from([0.0, 0.5, 1.0]))
def test_an_erased_image_is_torchvisions_erase_of_the_box(seed: int, side: int, probability: float) -> None:
    augmentation = built("erasing", side, probability=probability, scale=(0.02, 0.9))
    images = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(seed))
    for layout in (torch.contiguous_format, torch.channels_last):
        boxes = drawn(augmentation, 6, seed=seed)
        found = augmentation.apply(images.contiguous(memory_format=layout).clone(), boxes)
        for ours, image, (top, left, height, width) in zip(
            found, images, boxes[:, :4].astype(int).tolist(), strict=True
        ):
            assert torch.equal(ours, functional.erase(image, top, left, height, width, torch.zeros(3, 1, 1)))
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", EXAMPLES)
def test_draws_differ_by_seed_view_and_position_and_not_by_the_batch(name: str) -> None:
    augmentation = built(name, **EXAMPLES[name])
    keys: list[dict[str, int]] = [{}, {"seed": 1}, {"view": 1}, {"position": 1}, {"seed": 1 << 40}]
    found = [drawn(augmentation, 200, **each) for each in keys]
    assert len({each.tobytes() for each in found}) == len(keys)
    ids = np.random.default_rng(0).permutation(200)
    parts = [augmentation.draw(SampleDraws(part, 0, 0, 0)) for part in (ids[:70], ids[70:71], ids[71:])]
    np.testing.assert_array_equal(np.concatenate(parts), found[0][ids])


def test_the_noise_of_a_box_is_philox_of_the_images_key_through_the_normal_quantiles() -> None:
    keys = np.array([[0, 0], [2**32 - 1, 5], [123456789, 2**31]], np.float64)
    counts = [1, 80_000, 13]
    found = normal_noise(keys, counts, torch.device("cpu"))
    for noise, (key0, key1), count in zip(found, keys.astype(np.int64).tolist(), counts, strict=True):
        counters = np.zeros((4, -(-count // 8)), np.uint32)
        counters[0] = np.arange(counters.shape[1])
        words = philox4x32(counters, (key0, key1)).T
        halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)[:count]
        np.testing.assert_allclose(noise.numpy(), stats.norm.ppf((halves + 0.5) / 2**16), rtol=1e-6, atol=1e-7)
    assert stats.kstest(found[1].numpy(), "norm").pvalue > 1e-3


def test_erasing_with_noise_fills_the_same_boxes_with_numbers_of_each_image_and_view() -> None:
    augmentation = built("erasing", probability=0.7, value="noise")
    mean = built("erasing", probability=0.7)
    boxes = drawn(augmentation, 12)
    np.testing.assert_array_equal(boxes, drawn(mean, 12))
    noisy, erased = (each.apply(torch.full((12, 3, SIDE, SIDE), 9.0), boxes) for each in (augmentation, mean))
    assert torch.equal(noisy == 9, erased == 9)
    boxes[:, :4] = 0, 0, 8, 8
    first = [
        tuple(image[:, :8, :8].flatten().tolist()) for image in augmentation.apply(torch.zeros(12, 3, 64, 64), boxes)
    ]
    assert len(set(first)) == 12
    one = augmentation.apply(torch.zeros(1, 3, 64, 64), boxes[5:6])
    assert tuple(one[0, :, :8, :8].flatten().tolist()) == first[5]
