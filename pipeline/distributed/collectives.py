"""Collectives: exact sums, rows gathered with their gradients, and statistics over the rows of all ranks.

This is the only file that imports torch.distributed. Without a process group, every function behaves as for one rank.
All functions that communicate are collective. Every rank calls them in the same order, forward and backward, even if
it has no rows.

Gradients follow one rule. The differentiated function is the sum of the ranks' losses, so a backward here adds up the
ranks' gradients. DDP then divides by the number of ranks. With equal numbers of rows, a loss is therefore the mean over
this rank's rows. A loss of gathered rows is the same number on every rank. Neither needs an extra factor.

Input of the collectives on one rank, calls × bytes, where x is a tensor's bytes and W is the number of ranks:

                                  forward             backward
    global_sum                    1 × x               1 × x
    gather_rows                   1 × 8, 1 × x        1 × W·x
    gather_rows of equal shares   1 × x               1 × W·x
    standardize_columns, BatchNorm 1 × 8·(1 + 2C)      1 × 8·2C
    standardize_both of equal C   1 × 8·(1 + 4C)      1 × 8·2C

N rows, C columns or channels, B batch, H W space.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import GradBucket, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")

_single_process = False
"""True inside ``single_process()``, where this rank runs alone and must not wait for the others."""


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if _is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and prints."""
    return rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Behave as a single process inside the context, for dry runs, whatever the other ranks do."""
    global _single_process
    before, _single_process = _single_process, True
    try:
        yield
    finally:
        _single_process = before


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of the ranks' ``x``, of equal shape on all; without gradient."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of the ranks' ``x``, of equal shape on all; without gradient."""
    return all_reduce_sum(x) / world_size()


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the elementwise maximum of the ranks' ``x``, of equal shape on all; without gradient."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_reduce_min(x: Tensor) -> Tensor:
    """Return the elementwise minimum of the ranks' ``x``, of equal shape on all; without gradient."""
    return _all_reduce(x, dist.ReduceOp.MIN)


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank. The host waits for the result."""
    return any(_gather_numbers(int(flag)))


@contextmanager
def average_buffers(module: nn.Module) -> Iterator[None]:
    """Average the floating-point buffers of ``module`` over the ranks inside the context, and restore them after it."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        yield
        return
    saved = [buffer.clone() for buffer in buffers]
    # One all-reduce of a flat tensor, in float64: the mean of equal numbers is then exactly that number.
    means = all_reduce_mean(torch.cat([buffer.double().flatten() for buffer in buffers]))
    for buffer, mean in zip(buffers, means.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
    try:
        yield
    finally:
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.copy_(before)


def global_sum(x: Tensor) -> Tensor:
    """Return the sum of the ranks' ``x``, of equal shape on all; gradients are summed over the ranks."""
    return _GlobalSum.apply(x)


def gather_rows(x: Tensor, *, equal: bool = False) -> Tensor:
    """Return the rows of all ranks in the order of the ranks; gradients are summed over the ranks.

    Ranks may have different numbers of rows. They first exchange these numbers, and the host waits for them. ``equal``
    promises equal row counts on all ranks, as in every training step: one collective each way, and no wait.
    """
    return _GatherRows.apply(x, [len(x)] * world_size() if equal else _gather_numbers(len(x)))


def standardize_columns(x_NC: Tensor, eps: float, *, across_ranks: bool = True) -> Tensor:
    """Return (x − mean)·(variance + eps)^(−1/2) of every column, over the rows of all ranks or of this rank.

    The variance is biased, and gradients flow through both statistics. There is one all-reduce forward and one
    backward. Ranks may have different numbers of rows. Sums are in float64, so that a large mean costs no digits. The
    result has the dtype of ``x``.
    """
    return _Standardize.apply(x_NC, x_NC[:, :0], eps, across_ranks)[0]


def standardize_both(
    x_NC: Tensor, constant_NC: Tensor, eps: float, *, across_ranks: bool = True
) -> tuple[Tensor, Tensor]:
    """Return ``standardize_columns`` of both, with as many all-reduces as for one; the second gets no gradient."""
    return _Standardize.apply(x_NC, constant_NC, eps, across_ranks)


def open_store(address: str, port: int, rank: int, timeout: timedelta) -> Store:
    """Return the ranks' common key-value store; rank 0 serves it unless torchrun does.

    Raises RuntimeError if the store cannot be served or reached.
    """
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # Without a wait for the others: the rendezvous waits itself, handles signals and names the missing ranks.
    store = TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False)
    # torchrun's store survives a restart of the workers, with all its keys; the prefix separates the attempts.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def create_process_group(
    backend: str, store: Store, rank: int, world: int, timeout: timedelta, local_gpu: int | None = None
) -> None:
    """Create the process group, with ``timeout`` for each of its collectives.

    With NCCL each rank has one GPU; ``local_gpu`` is its index on the host. Raises RuntimeError if the ranks cannot
    connect to one another.
    """
    gpu = None
    if "nccl" in backend:
        # torch 2.15 has another NCCL backend by default. With it, backward waits for each bucket of gradients it sends.
        os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
        # With a device, NCCL connects now, so that an error is raised here and not in the first collective.
        gpu = torch.device("cuda", local_gpu or 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=gpu)


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    if _is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(item: _T) -> list[_T]:
    """Return every rank's object, in the order of the ranks. The host waits for the result."""
    if world_size() == 1:
        return [item]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def all_reduce_(x: Tensor) -> Tensor:
    """Replace ``x`` by the sum of the ranks' ``x``, in place and without a copy; without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def compress_gradients(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make DDP, if it wraps ``module``, send the gradients of these parameters in bfloat16: half the bytes.

    DDP sends buckets of gradients. A bucket that also has other parameters is averaged without compression, bit for
    bit. A compressed mean of W ranks has an error of at most W·2⁻⁸ of their mean magnitude.
    """
    if isinstance(module, DistributedDataParallel):
        # DDP checks a hook's annotations, and rejects the strings that this file's __future__ import makes of them.
        module.register_comm_hook(set(parameters), lambda compressed, bucket: _average_bucket(compressed, bucket))


def _average_bucket(compressed: set[nn.Parameter], bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket over the ranks, in place."""
    # DDP itself multiplies by 1/W before the sum; a division by W can round differently.
    flat = bucket.buffer().mul_(1 / world_size())
    compress = compressed.issuperset(bucket.parameters())
    sent = flat.bfloat16() if compress else flat
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: flat.copy_(done.value()[0]) if compress else done.value()[0])


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized() and not _single_process


def _gather_numbers(number: int) -> list[int]:
    """Return every rank's ``number``. The host waits for the result."""
    if world_size() == 1:
        return [number]
    # NCCL sends only tensors on the GPU.
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    numbers = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(numbers, torch.tensor([number], device=device))
    return numbers.tolist()


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    # Collectives need a contiguous tensor, and a channels_last one is not.
    result = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(result, operation)
    return result


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce_sum(grad)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks. Collectives need equal shapes, so a rank with fewer rows appends rows of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        if len(counts) == 1:
            return x.clone()
        max_rows = max(counts)
        parts = x.new_empty((len(counts) * max_rows, *x.shape[1:]))
        dist.all_gather_into_tensor(parts, _pad_rows(x, max_rows))
        if min(counts) == max_rows:
            return parts
        return torch.cat([part[:count] for part, count in zip(parts.split(max_rows), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(ctx.counts) == 1:
            return grad, None
        max_rows = max(ctx.counts)
        equal = min(ctx.counts) == max_rows
        parts = grad.contiguous()
        if not equal:
            parts = torch.cat([_pad_rows(part, max_rows) for part in grad.split(ctx.counts)])
        ours = grad.new_empty((max_rows, *grad.shape[1:]))
        # Every rank has a gradient for the rows of every other: sum them, and give each rank the part of its rows.
        dist.reduce_scatter_tensor(ours, parts)
        return ours[: ctx.counts[rank()]], None


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x.contiguous() if len(x) == rows else torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


class _Standardize(torch.autograd.Function):
    """Standardized columns: ``h = (x − μ)·r`` with ``r = (v + ε)^(−1/2)``.

    The gradient is ``∂L/∂x = r·(g − Σg/N − h·Σ(g·h)/N)``, with sums over the rows of all ranks. In forward
    one all-reduce serves all columns. In backward the all-reduce leaves the constant columns out.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, constant_NJ: Tensor, eps: float, across_ranks: bool) -> tuple[Tensor, Tensor]:
        ctx.reduce_sum = all_reduce_sum if across_ranks else Tensor.detach
        x = torch.cat([x_NC, constant_NJ], 1).double()
        # The row count is part of the sums: ranks may have different numbers of rows.
        sums = ctx.reduce_sum(torch.cat([x.new_full((1,), len(x)), x.sum(0), x.square().sum(0)]))
        count, (mean, square) = sums[0], (sums[1:] / sums[0]).chunk(2)
        # Rounding can make a variance of zero slightly negative.
        scale = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
        standard, constant = ((x - mean) * scale).tensor_split([x_NC.shape[1]], 1)
        h_NC, h_NJ = standard.to(x_NC.dtype), constant.to(constant_NJ.dtype)
        ctx.mark_non_differentiable(h_NJ)
        ctx.save_for_backward(h_NC, scale[: x_NC.shape[1]], count)
        return h_NC, h_NJ

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_NC: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None]:
        h_NC, scale_C, count = ctx.saved_tensors
        grad, h = grad_NC.double(), h_NC.double()
        mean_grad_C, mean_product_C = (ctx.reduce_sum(torch.cat([grad.sum(0), (grad * h).sum(0)])) / count).chunk(2)
        return (scale_C * (grad - mean_grad_C - h * mean_product_C)).to(grad_NC.dtype), None, None, None
