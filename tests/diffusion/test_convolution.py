"""The denoiser's convolutions compute what torch's do, and what makes them quick changes no number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.config import Diffusion
from pipeline.diffusion.convolution import Convolution, batched_weight_grad
from pipeline.diffusion.denoiser import Denoiser, Draws
from pipeline.diffusion.networks import (
    Autoencoder,
    Bottleneck,
    NoisePredictor,
    logit_predictor,
    map_predictor,
)

DIFFUSION = Diffusion(
    time_steps=1000, beta_start=1e-4, beta_end=2e-2, sampler_steps=5, sampler_stride=100, time_rows=1280
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(network: nn.Module, *outputs: Tensor, **options: Any) -> list[Tensor]:
    weighed = [(output * drawn(7, *output.shape).to(output.dtype)).sum() for output in outputs]
    return list(torch.autograd.grad(torch.stack(weighed).sum(), list(network.parameters()), **options))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
@pytest.mark.parametrize("size", [1, 3])
def test_it_is_torchs_own_convolution(size: int, layout: torch.memory_format):
    own, theirs = Convolution(6, 4, size).double(), nn.Conv2d(6, 4, size, padding=size // 2).double()
    theirs.load_state_dict(own.state_dict())
    x = drawn(0, 3, 6, 5, 5).to(memory_format=layout)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients(own, own(x)), gradients(theirs, theirs(x)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def passes(network: nn.Module, x: Tensor, number: int) -> list[Tensor]:
    """Return what the network makes of x, of that, and so on."""
    return list(accumulate(range(number), lambda x, _: network(x), initial=x))[1:]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
def test_passes_differentiated_at_once_have_the_gradients_of_passes_differentiated_one_by_one(
    layout: torch.memory_format,
):
    network = Bottleneck(6, 2, DIFFUSION.norm).double()
    x = drawn(1, 3, 6, 4, 4).to(memory_format=layout)
    expected = passes(network, x, 4)
    with batched_weight_grad(network, 5):  # one more than are run
        found = passes(network, x, 4)
    for compared in (slice(None), slice(1, 2)):  # of all passes, and of what the second was made of
        of_all = gradients(network, *found[compared], retain_graph=True)
        for mine, other in zip(of_all, gradients(network, *expected[compared], retain_graph=True), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_the_input_of_a_pass_has_its_gradient_and_nothing_is_left_over_for_the_next_one():
    network = Bottleneck(6, 2, DIFFUSION.norm).double()
    x = drawn(1, 3, 6, 4, 4).requires_grad_()
    with batched_weight_grad(network, 2):
        outputs = passes(network, x, 2)
    (alone,) = torch.autograd.grad(outputs[1].square().sum(), x, retain_graph=True)  # no weight asks for a gradient
    torch.testing.assert_close(
        alone, torch.autograd.grad(passes(network, x, 2)[1].square().sum(), x)[0], rtol=1e-10, atol=1e-12
    )
    for mine, other in zip(gradients(network, outputs[0]), gradients(network, network(x)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_under_autocast_weights_have_float32_gradients_near_their_own():
    network = nn.Sequential(Convolution(16, 8), nn.ReLU(), Convolution(8, 16, 3))
    x = drawn(1, 8, 16, 4, 4).float()
    expected = gradients(network, *passes(network, x, 3))
    with torch.autocast("cpu", torch.bfloat16), batched_weight_grad(network, 3):
        found = passes(network, x, 3)
    for mine, other in zip(gradients(network, *found), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0.1, atol=0.1 * other.abs().max().item())


@pytest.mark.parametrize("kind", [map_predictor, logit_predictor])
def test_a_time_step_that_all_rows_share_does_not_count(kind: Callable[..., nn.Sequential]):
    predictor = NoisePredictor(kind(8, 4, DIFFUSION.norm), 8, 1280).double()
    y = drawn(2, 6, 8, 3, 3)
    for t in (0, 400):
        torch.testing.assert_close(predictor(y, torch.full((6,), t)), predictor(y), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(predictor(y, torch.arange(6)), predictor(y), rtol=1e-2, atol=1e-2)


def denoiser(**options: bool) -> Denoiser:
    torch.manual_seed(0)
    diffusion = DIFFUSION.model_copy(update=options)
    networks = {"predictor": map_predictor(8, 4, diffusion.norm), "adapter": Bottleneck(8, 4, diffusion.norm)}
    return Denoiser(diffusion, 5, 8, **networks, autoencoder=Autoencoder(16, 8, diffusion.norm)).double()


def written_out(own: Denoiser, student: Tensor, teacher: Tensor, draws: Draws) -> Tensor:
    """Return the sum of a denoiser's losses as the papers' equations say them, one after the other."""
    levels = own.alpha_bars_T

    def run(network: nn.Module, x: Tensor) -> Tensor:
        if isinstance(network, nn.Sequential):
            for module in network:
                x = run(module, x)
            return x
        if isinstance(network, Bottleneck):
            return x + run(network.block, x)
        if isinstance(network, nn.Conv2d):
            return F.conv2d(x, network.weight, network.bias, padding=network.weight.shape[-1] // 2)
        return network(x)

    def predict(y: Tensor, t: Tensor) -> Tensor:
        return run(own.predictor.network, y + own.predictor.time_embedding(t)[:, :, None, None])

    assert own.autoencoder is not None
    latent = run(own.autoencoder["encoder"], teacher)
    target = latent.detach()
    feature = run(own.projection, student)
    pooled = run(own.adapter.network, feature).mean((2, 3))
    gamma = own.adapter.linear(pooled).softmax(1)[:, 0].view(-1, 1, 1, 1)
    y = gamma * feature + (1 - gamma) * draws.start_noise_BCHW
    for t in (400, 300, 200, 100, 0):
        noise = predict(y, torch.full((len(y),), t))
        clean = (y - (1 - levels[t]).sqrt() * noise) / levels[t].sqrt()
        y = levels[t - 100].sqrt() * clean + (1 - levels[t - 100]).sqrt() * noise if t else clean
    level = levels[draws.train_t_B].view(-1, 1, 1, 1)
    noisy = level.sqrt() * target + (1 - level).sqrt() * draws.train_noise_BCHW
    distances = [
        run(own.output, y) - target,
        predict(noisy, draws.train_t_B) - draws.train_noise_BCHW,
        run(own.autoencoder["decoder"], latent) - teacher,
    ]
    return torch.stack([distance.square().mean() for distance in distances]).sum()


def quick(own: Denoiser, student: Tensor, teacher: Tensor, draws: Draws) -> Tensor:
    answer = own(student, teacher, draws)
    distance = (answer.student_BCHW - answer.target_BCHW).square().mean()
    return distance + answer.diffusion_loss + answer.autoencoder_loss


def trace(own: Denoiser, losses: Callable[..., Tensor], layout: torch.memory_format) -> list[float]:
    """Return the losses of twenty steps of training."""
    own = copy.deepcopy(own).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    found = []
    for step in range(20):
        student, teacher = (drawn(10 * step + c, 6, c, 4, 4).to(memory_format=layout) for c in (5, 16))
        t = torch.randint(1000, (6,), generator=torch.Generator().manual_seed(step))
        loss = losses(own, student, teacher, Draws(drawn(step, 6, 8, 4, 4), drawn(step + 1, 6, 8, 4, 4), t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
def test_twenty_steps_of_training_are_those_of_the_equations_written_out(layout: torch.memory_format):
    own = denoiser()
    expected = trace(own, written_out, torch.contiguous_format)
    assert expected[-1] != pytest.approx(expected[0], rel=0.1)
    assert trace(own, quick, layout) == pytest.approx(expected, rel=1e-9)


@contextmanager
def bytes_kept() -> Iterator[dict[int, int]]:
    """Give the bytes of the storages that a graph keeps for its backward, by their place."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def check_same(plain: Denoiser, loss: Tensor, other: Denoiser, again: Tensor) -> None:
    """Compare two denoisers' losses, each with its gradients."""
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=0)
    pairs = zip(gradients(plain, loss, allow_unused=True), gradients(other, again, allow_unused=True), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(theirs, mine, rtol=1e-10, atol=1e-12)


CASE = (
    *(drawn(0, 6, 5, 4, 4), drawn(1, 6, 16, 4, 4)),
    Draws(drawn(2, 6, 8, 4, 4), drawn(3, 6, 8, 4, 4), torch.arange(6)),
)


def test_a_checkpoint_keeps_less_and_computes_the_same():
    plain, checkpointed = denoiser(), denoiser(checkpoint=True)
    with bytes_kept() as of_plain:
        loss = quick(plain, *CASE)
    with bytes_kept() as of_checkpointed:
        again = quick(checkpointed, *CASE)
    assert sum(of_checkpointed.values()) < 0.6 * sum(of_plain.values())
    assert again.item() == loss.item()
    check_same(plain, loss, checkpointed, again)


@pytest.mark.endurance
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler hides it, but not from pytest
def test_compiled_networks_compute_the_same():
    torch._dynamo.utils.counters.clear()
    for more in ({}, {"detach_predictor": True}, {"checkpoint": True}):
        plain, compiled = denoiser(**more), denoiser(compile=True, **more)
        check_same(plain, quick(plain, *CASE), compiled, quick(compiled, *CASE))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # Φ without t and with it, and the adapter


def test_norms_over_ranks_are_not_compiled():
    with pytest.raises(ValueError, match="compile: true needs stat_scope: rank"):
        Diffusion(**{**DIFFUSION.model_dump(), "compile": True, "stat_scope": "global"})
