"""Items that a thread computes before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

_T = TypeVar("_T")
CPU = torch.device("cpu")


def read_ahead(items: Generator[_T, None, None], depth: int, device: torch.device = CPU) -> Generator[_T, None, None]:
    """Yield ``items``, which a thread computes up to ``depth`` ahead; its exceptions are raised here.

    Closing the generator ends the thread, after the item it is at, and closes ``items``. ``device`` is the one that the
    thread makes pinned memory for.
    """
    end = object()
    index = cuda_index(device)
    # A new thread is at the first GPU, whichever its process is at, and would take memory there.
    start = None if index is None else partial(torch.cuda.set_device, index)
    worker = ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=start)
    try:
        ahead = deque(worker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(worker.submit(next, items, end))
            yield item  # type: ignore[misc]  # the end is the one item that is no T
    finally:
        worker.shutdown(cancel_futures=True)
        items.close()


def cuda_index(device: torch.device) -> int | None:
    """Return which GPU ``device`` is, by default this thread's; None where it is none."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
