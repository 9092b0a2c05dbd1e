"""Which images without labels are used, by a teacher's logits: the surest of each class, equally many of all."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.caching import image_selection
from pipeline.caching.image_selection import select_images, write_selection

Draw = tuple[np.ndarray, np.ndarray]


def plain_selection(logits: list[list[float]], ids: list[int], keep: float, per_class: int) -> list[int]:
    """Choose images one by one."""
    found: list[list[tuple[float, int]]] = [[] for _ in logits[0]]
    for number in ids:
        row = logits[number]
        top = row.index(max(row))
        probability = 1 / sum(math.exp(x - row[top]) for x in row)
        if probability >= keep:
            found[top].append((-probability, number))
    kept = [[number for _, number in sorted(each)[:per_class]] for each in found]
    most = max(map(len, kept))
    chosen: list[int] = []
    for each in kept:
        chosen += [each[place % len(each)] for place in range(most)] if each else []
    return chosen


@st.composite
def drawn(draw: st.DrawFn) -> Draw:
    """Return logits [12, 4] in float16, with ties, and some of the ids in order."""
    values = st.sampled_from([-3.0, -0.5, 0.0, 0.25, 1.0, 4.0])
    logits = draw(st.lists(st.lists(values, min_size=4, max_size=4), min_size=12, max_size=12))
    ids = draw(st.sets(st.integers(0, 11), min_size=1))
    return np.array(logits, np.float16), np.array(sorted(ids))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=drawn(), keep=st.sampled_from([0.0, 0.3, 0.5, 0.9]), per_class=st.integers(1, 5))
def test_the_selection_is_that_of_a_plain_loop(case: Draw, keep: float, per_class: int):
    logits, ids = case
    found = select_images(logits, ids, keep, per_class)
    assert found.tolist() == plain_selection(logits.astype(float).tolist(), ids.tolist(), keep, per_class)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(case=drawn(), keep=st.sampled_from([0.3, 0.6]), per_class=st.integers(1, 3))
def test_no_class_has_more_than_the_limit_and_every_image_is_sure_enough(case: Draw, keep: float, per_class: int):
    logits, ids = case
    found = select_images(logits, ids, keep, per_class)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    counts = Counter(logits[found].argmax(1).tolist())
    assert len(set(counts.values())) <= 1
    assert max(counts.values(), default=0) <= per_class
    assert (probabilities[found].max(1) >= keep - 1e-12).all()
    assert set(found.tolist()) <= set(ids.tolist())


def test_logits_are_read_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch):
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float16)
    whole = select_images(logits, np.arange(50), 0.3, 7)
    monkeypatch.setattr(image_selection, "_CHUNK", 28)
    assert select_images(logits, np.arange(50), 0.3, 7).tolist() == whole.tolist()


def test_a_selection_that_is_written_again_is_complete_only_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_selection(tmp_path, np.arange(3), 0.3, 7)
    written = image_selection.write_atomically

    def fail_at_the_ids(path: Path, content: bytes) -> None:
        if path.name == "kept.npy":
            raise OSError("disk full")
        written(path, content)

    monkeypatch.setattr(image_selection, "write_atomically", fail_at_the_ids)
    with pytest.raises(OSError, match="disk full"):
        write_selection(tmp_path, np.arange(5), 0.3, 7)
    assert not (tmp_path / "kept.json").exists()
