"""Whether the ranks were told the same: each compares what it was told with what rank 0 was, at the store they meet at.

Before there is a process group, so that nothing can wait in a collective for a rank that ends here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.distributed.collectives import Store  # pyright: ignore[reportPrivateImportUsage]

_FIRST, _DIFFERENCE = "told/first", "told/difference"
_NOTHING = "nothing"
_LONGEST = 80


def publish(store: Store, settings: Mapping[str, Any]) -> None:
    """Leave at the store what rank 0 was told; it does so before it says that it has come."""
    store.set(_FIRST, json.dumps(_texts(settings)))


def compare_with_rank0(store: Store, settings: Mapping[str, Any], name: str) -> None:
    """Leave at the store where this rank, called ``name``, differs from rank 0, if it does."""
    found = difference(json.loads(store.get(_FIRST)), _texts(settings))
    if found is not None:
        key, first, own = found
        line = f"{name}: {key} is {_shorten(own)} here and {_shorten(first)} on rank 0"
        store.set(_DIFFERENCE, f"{line}; start all ranks with the same command, shards, code and packages")


def read_difference(store: Store) -> str | None:
    """Return what a rank left, once all have compared."""
    return store.get(_DIFFERENCE).decode() if store.check([_DIFFERENCE]) else None


def difference(first: Mapping[str, str], own: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return the first key at which the two differ with both values, None where they are the same."""
    keys = (key for key in {**first, **own} if first.get(key) != own.get(key))
    return next(((key, first.get(key, _NOTHING), own.get(key, _NOTHING)) for key in keys), None)


def flatten(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings and what stands there."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, default=str, ensure_ascii=False) for key, value in flatten(settings)}


def _shorten(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
