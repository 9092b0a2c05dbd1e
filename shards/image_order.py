"""The numbers of ImageNet's validation images, by which lists of labels of others are ordered."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from shards.read import SplitReader
from shards.val_labels import read_list

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_HEADER, _NAME = 512, 100
"""Bytes of a tar's header, and of the name at its beginning."""


def image_numbers(reader: SplitReader, val_labels: Path | None) -> np.ndarray:
    """Return the number of each validation image by id, int64 [id_count]: 1 for ``ILSVRC2012_val_00000001``.

    Tars of another tool have it in the names of their members, and 0 is an id without an image. Shards of this project
    do not. Their ids are the sorted paths ``<class>/<file>``, which follow from ``val_labels``, the list of classes
    that ``prepare_imagenet.py`` takes. Raises ValueError if the list is missing or does not fit, or if a name has no
    number.
    """
    if reader.manifest.is_foreign:
        return _from_names(reader)
    if val_labels is None:
        raise ValueError(
            f"{reader.folder} does not keep the names of the images; give val_labels=FILE, the list of classes that "
            "prepare_imagenet.py takes as --val-labels"
        )
    wnids = read_list(val_labels)
    names = sorted(wnids, key=lambda name: f"{wnids[name]}/{name}")
    samples, classes = reader.samples, reader.manifest.classes
    fits = len(names) == reader.split.id_count and all(
        classes[label] == wnids[names[number]]
        for number, label in zip(samples["id"].tolist(), samples["label"].tolist(), strict=True)
    )
    if not fits:
        raise ValueError(
            f"{val_labels} lists {len(names):,} images, which are not the {reader.split.id_count:,} of "
            f"{reader.folder}; give the list of exactly these images"
        )
    return np.array([_number(name, val_labels) for name in names], np.int64)


def _from_names(reader: SplitReader) -> np.ndarray:
    """Return the numbers in the names of the images' members."""
    numbers = np.zeros(reader.split.id_count, np.int64)
    for index, shard in enumerate(reader.split.shards):
        rows = reader.samples[reader.samples["shard"] == index]
        with (reader.folder / shard.url).open("rb") as file:
            for sample_id, offset in zip(rows["id"].tolist(), rows["offset"].tolist(), strict=True):
                file.seek(offset - _HEADER)
                name = file.read(_NAME).partition(b"\0")[0].decode(errors="replace")
                numbers[sample_id] = _number(name, reader.folder / shard.url)
    return numbers


def _number(name: str, path: Path) -> int:
    found = _NUMBER.search(name)
    if found is None:
        raise ValueError(f"{path}: {name} is not a name such as ILSVRC2012_val_00000001.JPEG; it says no number")
    return int(found[1])
