"""Tars as other tools write them: webdataset's own writer, img2dataset, and timm's ``imagenet-1k-wds``."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import encode, jpeg, pixels

CLASSES = 3
IMAGES = ("jpg", "jpeg", "png", "webp")
Entries = list[tuple[str, bytes]]


def picture(number: int, kind: str) -> bytes:
    """Return an image of ``kind``: jpg, jpeg, png or webp."""
    names = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    return jpeg(number) if kind in ("jpg", "jpeg") else encode(pixels(number), names[kind])


def write_tar(path: Path, entries: Entries, kind: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar with those members in that order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_by_webdataset(folder: Path, train: int = 26, val: int = 7) -> Path:
    """Write shards with ``webdataset.ShardWriter``: numbers as ``cls``, and headers for times with fractions."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        with webdataset.ShardWriter(f"{folder}/{split}-%04d.tar", maxcount=9, verbose=0) as writer:
            for n in range(count):
                writer.write({"__key__": f"{split}/im age {n:03d}", "jpg": jpeg(n), "cls": n % CLASSES})
    return folder


def write_by_img2dataset(folder: Path, train: int = 26, val: int = 7) -> Path:
    """Write shards in img2dataset's layout: a folder for each run, the label in ``json``, lists beside the tars."""
    for split, count in (("train", train), ("val", val)):
        for shard, first in enumerate(range(0, count, 10)):
            entries: Entries = []
            for n in range(first, min(first + 10, count)):
                key, label = f"{shard:05d}{n - first:04d}", ["cat", "ant", "bee"][n % CLASSES]
                values = {"caption": f"a {label}", "key": key, "label": label, "status": "success", "width": 20}
                entries += [(f"{key}.jpg", jpeg(n)), (f"{key}.json", json.dumps(values).encode())]
                entries.append((f"{key}.txt", f"a {label}".encode()))
            write_tar(folder / split / f"{shard:05d}.tar", entries, tarfile.PAX_FORMAT)
            (folder / split / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def write_as_timm(folder: Path) -> Path:
    """Write shards with the names and members of ``timm/imagenet-1k-wds``, in mixed kinds of images."""
    for name, count in (("imagenet1k-train-0000", 13), ("imagenet1k-train-0001", 13), ("imagenet1k-validation-00", 7)):
        entries: Entries = []
        for n in range(count):
            kind = ("JPEG", "png", "webp", "jpg")[n % 4]
            values = {"label": n % CLASSES, "width": 20, "height": 16, "filename": f"n0{n}.JPEG"}
            key = f"n01440764_{n}"
            entries += [
                (f"{key}.cls", str(n % CLASSES).encode()),
                (f"{key}.{kind}", picture(n, kind.lower())),
                (f"{key}.json", json.dumps(values).encode()),
            ]
        write_tar(folder / f"{name}.tar", entries)
    return folder


def read_by_webdataset(tars: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the samples that the library finds, as bytes by component."""
    webdataset = pytest.importorskip("webdataset")
    yield from webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    gc.collect()  # the library leaves its files to the garbage collector
