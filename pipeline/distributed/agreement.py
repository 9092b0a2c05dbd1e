"""Comparison of every rank's settings with those of rank 0, through the ranks' common store.

No process group exists yet, so no rank can wait in a collective for a rank that stops here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.distributed.collectives import Store  # pyright: ignore[reportPrivateImportUsage]

_RANK_0, _DIFFERENCE = "settings/rank0", "settings/difference"
_NOT_SET = "not set"
_MAX_CHARACTERS = 80


def publish(store: Store, settings: Mapping[str, Any]) -> None:
    """Write rank 0's settings to the store; rank 0 calls it before it reports its arrival."""
    store.set(_RANK_0, json.dumps(_to_text(settings)))


def compare_with_rank0(store: Store, settings: Mapping[str, Any], name: str) -> None:
    """Write to the store how this rank, called ``name``, differs from rank 0, if it does."""
    found = difference(json.loads(store.get(_RANK_0)), _to_text(settings))
    if found is not None:
        key, first, ours = found
        line = f"{name}: {key} is {_shorten(ours)} here and {_shorten(first)} on rank 0"
        store.set(_DIFFERENCE, f"{line}; start all ranks with the same command, shards, code and packages")


def read_difference(store: Store) -> str | None:
    """Return the difference that a rank wrote, None if there is none; valid once all ranks have compared."""
    # get() would wait for a key that no rank may ever write; check() returns at once.
    return store.get(_DIFFERENCE).decode() if store.check([_DIFFERENCE]) else None


def difference(first: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return the first key at which the two differ, with both values; None if they are equal."""
    keys = (key for key in {**first, **ours} if first.get(key) != ours.get(key))
    return next(((key, first.get(key, _NOT_SET), ours.get(key, _NOT_SET)) for key in keys), None)


def flatten(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of nested mappings with its value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:  # an empty mapping has no keys below it, so it is a value itself
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _to_text(settings: Mapping[str, Any]) -> dict[str, str]:
    # JSON, because the store carries text, and an error message shows it; paths become strings.
    return {key: json.dumps(value, default=str, ensure_ascii=False) for key, value in flatten(settings)}


def _shorten(value: str) -> str:
    return value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}…"
