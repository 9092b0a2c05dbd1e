"""Reading of images and labels from Parquet files as Hugging Face's ``datasets`` writes them.

The image column is a struct of ``bytes`` and ``path``, or plain bytes. The label is a number, whose class name is in
the file's ``huggingface`` metadata, or a class name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.classes import Label

LABEL_COLUMNS = ("label", "labels", "class", "cls")
"""Names of label columns where the metadata do not say which column is one."""
_ROWS_AT_ONCE = 64


class ImageTable(NamedTuple):
    """A Parquet file, its image and label columns, and the class names in its metadata, if there are any."""

    path: Path
    image: str
    label: str
    names: tuple[str, ...]
    rows: int
    image_bytes: int
    """Size of the image column in bytes, not compressed."""


class TableRow(NamedTuple):
    """A row: its label, and the bytes of its image, which are empty where the table has none."""

    label: Label
    image: bytes


def open_table(path: Path, image_column: str | None, label_column: str | None) -> ImageTable:
    """Return the columns of a file. Raises ValueError if it has no image or label column, or is damaged."""
    file = _open(path)
    features = _features(file)
    images = [field.name for field in file.schema_arrow if _holds_images(field.type)]
    described = [name for name in images if _type_of(features, name) == "Image"] or images
    image = _choose(path, file, "image", image_column, described, images)
    labels = [field.name for field in file.schema_arrow if _holds_labels(field.type)]
    described = [name for name in labels if _type_of(features, name) == "ClassLabel"]
    usual = [name for name in LABEL_COLUMNS if name in labels]
    label = _choose(path, file, "label", label_column, described or usual, labels)
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    found = tuple(map(str, names)) if isinstance(names, list) else ()
    return ImageTable(path, image, label, found, file.metadata.num_rows, _column_bytes(file, image))


def read_table(table: ImageTable) -> Iterator[TableRow]:
    """Yield the rows of a file in their order. Raises ValueError for a row without a label, or a damaged file."""
    import pyarrow

    number = 0
    try:
        for batch in _open(table.path).iter_batches(_ROWS_AT_ONCE, columns=[table.image, table.label]):
            column = batch.column(table.image)
            images = column.field("bytes") if pyarrow.types.is_struct(column.type) else column
            # A row without a struct has no bytes, whatever its field contains.
            present = column.is_valid().to_pylist()
            for image, valid, label in zip(
                images.to_pylist(), present, batch.column(table.label).to_pylist(), strict=True
            ):
                if label is None:
                    raise ValueError(f"{table.path}: row {number:,} has no {table.label}: remove the row")
                yield TableRow(label, image if valid and image else b"")
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(table.path, error) from None


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: pyarrow is not installed; pip install pyarrow (or this project's extra 'data')"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a complete Parquet file ({error}): download it again")


def _features(file: Any) -> dict[str, Any]:
    """Return Hugging Face's description of the columns, an empty one if there is none."""
    metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(metadata)["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _type_of(features: dict[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type")) if isinstance(feature, dict) else ""


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _choose(path: Path, file: Any, what: str, option: str | None, found: list[str], possible: list[str]) -> str:
    """Return the column for ``what``, image or label. Raises ValueError unless there is exactly one choice."""
    if option in possible and option is not None:
        return option
    columns = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)
    if option is not None:
        raise ValueError(f"--{what}-column {option}: {path} has no such {what} column; its columns are {columns}")
    if not found:
        raise ValueError(f"{path} has no {what} column; its columns are {columns}; name it with --{what}-column")
    if len(found) > 1 and what not in found:
        raise ValueError(f"{path} has several {what} columns, {', '.join(found)}: choose with --{what}-column")
    return what if what in found else found[0]


def _column_bytes(file: Any, column: str) -> int:
    metadata = file.metadata
    return sum(
        metadata.row_group(group).column(index).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for index in range(metadata.num_columns)
        if metadata.row_group(group).column(index).path_in_schema.split(".")[0] == column
    )
