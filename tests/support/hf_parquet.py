"""Parquet files as Hugging Face's ``datasets`` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pictures import jpeg

NAMES = ("ant", "bee", "cat")
FILES = {
    "train-00000-of-00002.parquet": range(15),
    "train-00001-of-00002.parquet": range(15, 26),
    "validation-00000-of-00001.parquet": range(100, 107),
}
"""The numbers of the images in each file."""


def features(**columns: dict[str, Any]) -> dict[bytes, bytes]:
    """Return the metadata that describe some columns."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


CLASS_LABELS = features(image={"_type": "Image"}, label={"names": list(NAMES), "_type": "ClassLabel"})


def write_table(path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None) -> Path:
    """Write a file in row groups of 10."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), path, row_group_size=10)
    return path


def images(contents: Sequence[bytes | None]) -> list[dict[str, Any]]:
    """Return the values of an image column."""
    return [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(contents)]


def write_parquet(folder: Path) -> Path:
    """Write JPEGs of three classes in the files of ``FILES``, in a folder ``data``."""
    for name, numbers in FILES.items():
        columns = {"image": images([jpeg(n) for n in numbers]), "label": [n % len(NAMES) for n in numbers]}
        write_table(folder / "data" / name, columns, CLASS_LABELS)
    return folder
