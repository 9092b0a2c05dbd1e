"""What the ranks know of one another: who they are, exact sums, rows gathered with gradient, statistics over all rows.

The only file that imports torch.distributed. Without a process group every function answers for a single rank. All but
the rank facts are collective: every rank calls them, in the same order, forward and backward, even with no rows.

Gradients keep one rule. What is differentiated is the sum of the ranks' losses, so a backward here adds what the ranks
send back; DDP then divides by their number. With equal numbers of rows a loss is therefore the mean over this rank's
rows, and a loss of gathered rows the same number on every rank; neither asks for a factor.

What a rank hands to collectives, calls × bytes, where x is a tensor's bytes and W the number of ranks:

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


def rank() -> int:
    """Return this process's number among the ranks, 0 without a process group."""
    return dist.get_rank() if _is_up() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if _is_up() else 1


def is_main() -> bool:
    """Whether this is the rank that writes files and prints."""
    return rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Answer for a single rank inside the context, whatever the others do: for what is tried, not trained."""
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
    """Return the elementwise greatest of the ranks' ``x``, of equal shape on all; without gradient."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_reduce_min(x: Tensor) -> Tensor:
    """Return the elementwise least of the ranks' ``x``, of equal shape on all; without gradient."""
    return _all_reduce(x, dist.ReduceOp.MIN)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. The host waits for the answer."""
    return any(_of_all_ranks(int(flag)))


@contextmanager
def average_buffers(module: nn.Module) -> Iterator[None]:
    """Give ``module`` the mean of the ranks' floating-point buffers inside the context, and its own after it."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        yield
        return
    own = [buffer.clone() for buffer in buffers]
    # One flat all-reduce, in float64 so that the mean of equal numbers is that number.
    means = all_reduce_mean(torch.cat([buffer.double().flatten() for buffer in buffers]))
    for buffer, mean in zip(buffers, means.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
    try:
        yield
    finally:
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)


def global_sum(x: Tensor) -> Tensor:
    """Return the sum of the ranks' ``x``, of equal shape on all; gradients are summed over the ranks."""
    return _GlobalSum.apply(x)


def gather_rows(x: Tensor, *, equal: bool = False) -> Tensor:
    """Return the rows of all ranks in their order; gradients are summed over the ranks.

    Any rank may have any number of rows, and the host waits until the ranks have told one another how many. ``equal``
    is the caller's word that all have as many, as in every training step: one collective each way, and no wait.
    """
    return _GatherRows.apply(x, [len(x)] * world_size() if equal else _of_all_ranks(len(x)))


def standardize_columns(x_NC: Tensor, eps: float, *, across_ranks: bool = True) -> Tensor:
    """Return (x − mean)·(variance + eps)^(−1/2) of every column over the rows of all ranks, or of this one.

    The variance is the biased one and both statistics are differentiated through. One all-reduce forward and one
    backward; ranks may have different numbers of rows. Sums are in float64, so that a large mean costs no digits; the
    result has the dtype of ``x``.
    """
    return _Standardize.apply(x_NC, x_NC[:, :0], eps, across_ranks)[0]


def standardize_both(
    x_NC: Tensor, constant_NC: Tensor, eps: float, *, across_ranks: bool = True
) -> tuple[Tensor, Tensor]:
    """Return ``standardize_columns`` of both, by the same all-reduces as of one; no gradient reaches the second."""
    return _Standardize.apply(x_NC, constant_NC, eps, across_ranks)


def open_store(address: str, port: int, rank: int, timeout: timedelta) -> Store:
    """Return the ranks' common store of keys; rank 0 serves it unless torchrun does. Raises RuntimeError."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False)
    # torchrun's outlives an attempt, and so does what was said in it.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def create_process_group(
    backend: str, store: Store, rank: int, world: int, timeout: timedelta, local_gpu: int | None = None
) -> None:
    """Join the ranks in a process group whose collectives wait for ``timeout``. Raises RuntimeError.

    With NCCL each rank has a GPU, by its number on the host.
    """
    gpu = None
    if "nccl" in backend:
        # torch 2.15 has another NCCL by default, with which backward waits for each bucket of gradients as it is sent.
        os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
        gpu = torch.device("cuda", local_gpu or 0)  # joins at once, so that what is wrong is said here
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=gpu)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if _is_up():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(one: _T) -> list[_T]:
    """Return every rank's object, by rank. The host waits for the answer."""
    if world_size() == 1:
        return [one]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, one)
    return found


def all_reduce_(x: Tensor) -> Tensor:
    """Replace ``x`` by the sum of the ranks' ``x``, as quickly as the network can; without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def compress_gradients(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let DDP, if it wraps ``module``, send the gradients of these parameters in bfloat16: half the bytes.

    DDP sends buckets of gradients. One with other parameters among them is averaged as without this, bit for bit. A
    compressed mean of W ranks is off by at most W·2⁻⁸ of their mean magnitude.
    """
    if isinstance(module, DistributedDataParallel):
        # DDP looks at a hook's annotations, which are strings here.
        module.register_comm_hook(set(parameters), lambda compressed, bucket: _averaged(compressed, bucket))


def _averaged(compressed: set[nn.Parameter], bucket: GradBucket) -> Future[Tensor]:
    """Return the mean of the ranks' bucket, in place."""
    # As DDP does without a hook: times 1/W, which is not always the same as by W.
    flat = bucket.buffer().mul_(1 / world_size())
    small = compressed.issuperset(bucket.parameters())
    sent = flat.bfloat16() if small else flat
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: flat.copy_(done.value()[0]) if small else done.value()[0])


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized() and not _single_process


def _of_all_ranks(number: int) -> list[int]:
    """Return every rank's ``number``. The host waits for the answer."""
    if world_size() == 1:
        return [number]
    # NCCL alone carries no tensors of the host.
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    numbers = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(numbers, torch.tensor([number], device=device))
    return numbers.tolist()


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
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
    """Collectives carry equal parts: a rank with fewer rows than another sends rows of zeros after its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        if len(counts) == 1:
            return x.clone()
        most = max(counts)
        parts = x.new_empty((len(counts) * most, *x.shape[1:]))
        dist.all_gather_into_tensor(parts, _padded(x, most))
        if min(counts) == most:
            return parts
        return torch.cat([part[:count] for part, count in zip(parts.split(most), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(ctx.counts) == 1:
            return grad, None
        most = max(ctx.counts)
        equal = min(ctx.counts) == most
        parts = grad.contiguous() if equal else torch.cat([_padded(part, most) for part in grad.split(ctx.counts)])
        own = grad.new_empty((most, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, parts)
        return own[: ctx.counts[rank()]], None


def _padded(x: Tensor, rows: int) -> Tensor:
    return x.contiguous() if len(x) == rows else torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


class _Standardize(torch.autograd.Function):
    """h = (x − μ)·r with r = (v + ε)^(−1/2), and ∂L/∂x = r·(g − Σg/N − h·Σ(g·h)/N), sums over the rows of all ranks.

    What is constant travels with ``x`` forward and not at all backward.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, constant_NJ: Tensor, eps: float, across_ranks: bool) -> tuple[Tensor, Tensor]:
        ctx.add_up = all_reduce_sum if across_ranks else Tensor.detach
        x = torch.cat([x_NC, constant_NJ], 1).double()
        sums = ctx.add_up(torch.cat([x.new_full((1,), len(x)), x.sum(0), x.square().sum(0)]))
        count, (mean, square) = sums[0], (sums[1:] / sums[0]).chunk(2)
        scale = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
        own, others = ((x - mean) * scale).tensor_split([x_NC.shape[1]], 1)
        h_NC, h_NJ = own.to(x_NC.dtype), others.to(constant_NJ.dtype)
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
        mean_grad_C, mean_product_C = (ctx.add_up(torch.cat([grad.sum(0), (grad * h).sum(0)])) / count).chunk(2)
        return (scale_C * (grad - mean_grad_C - h * mean_product_C)).to(grad_NC.dtype), None, None, None
