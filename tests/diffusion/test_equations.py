from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.diffusion.config import Diffusion
from pipeline.diffusion.equations import add_noise, denoise, diffusion_loss, match_noise
from pipeline.diffusion.networks import (
    Bottleneck,
    NoiseAdapter,
    NoisePredictor,
    logit_adapter,
    logit_predictor,
    map_predictor,
)

PUBLISHED = {
    "time_steps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "sampler_steps": 5,
    "sampler_stride": 100,
    "time_rows": 1280,
}
DIFFUSION = Diffusion(**PUBLISHED)  # type: ignore[arg-type]
ALPHA_BARS = DIFFUSION.alpha_bars()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_alpha_bars_are_the_published_ones():
    expected = {0: 0.9999, 100: 0.895141, 200: 0.656347, 300: 0.394011, 400: 0.193572, 500: 0.0778, 900: 2.7e-4}
    for t, value in expected.items():
        assert ALPHA_BARS[t].item() == pytest.approx(value, rel=1e-5 if t < 500 else 2e-2), t
    assert ALPHA_BARS.dtype == torch.float64
    assert ALPHA_BARS[0].item() == 1 - 1e-4


def test_the_sampler_visits_400_to_0():
    assert DIFFUSION.sampled == [400, 300, 200, 100, 0]
    assert Diffusion(**{**PUBLISHED, "sampler_steps": 1}).sampled == [0]  # type: ignore[arg-type]


def test_the_unrolled_sampler_has_the_known_coefficients():
    """x = 2.2729·x_T − (.8009·ε_400 + .5166·ε_300 + .3813·ε_200 + .3323·ε_100 + .0100·ε_0)."""
    steps = DIFFUSION.sampled
    known = {400: -0.8009, 300: -0.5166, 200: -0.3813, 100: -0.3323, 0: -0.0100}

    def of(start: float, noisy_t: int) -> float:
        """Return what the sampler makes of a start and of a noise that is 1 at one time step and 0 at the others."""
        unit = torch.full((1,), start, dtype=torch.float64)
        return denoise(lambda y, t: torch.full_like(y, float(t == noisy_t)), unit, steps, ALPHA_BARS).item()

    assert of(1.0, -1) == pytest.approx(2.2729, abs=5e-5)
    for t, coefficient in known.items():
        assert of(0.0, t) == pytest.approx(coefficient, abs=5e-5), t


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 9), stride=st.integers(1, 110))
def test_a_perfect_noise_predictor_gives_the_clean_tensor_back(seed: int, steps: int, stride: int):
    schedule = Diffusion(**{**PUBLISHED, "sampler_steps": steps, "sampler_stride": stride})  # type: ignore[arg-type]
    clean, eps = noise(seed, 3, 2, 2, 2), noise(seed + 1, 3, 2, 2, 2)
    start = add_noise(clean, eps, ALPHA_BARS[schedule.sampled[0]])
    torch.testing.assert_close(
        denoise(lambda y, t: eps, start, schedule.sampled, ALPHA_BARS), clean, rtol=1e-9, atol=1e-9
    )


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_a_row_gets_the_noise_of_its_own_time_step(seed: int, t: list[int]):
    clean, eps = noise(seed, 3, 2, 1, 1), noise(seed + 1, 3, 2, 1, 1)
    noisy = add_noise(clean, eps, ALPHA_BARS[torch.tensor(t)])
    for row, step in enumerate(t):
        share = ALPHA_BARS[step].item()
        torch.testing.assert_close(noisy[row], share**0.5 * clean[row] + (1 - share) ** 0.5 * eps[row])


def test_the_diffusion_loss_is_zero_for_a_perfect_predictor_and_a_mean_over_elements():
    clean, eps, t = noise(0, 4, 3, 2, 2), noise(1, 4, 3, 2, 2), torch.tensor([0, 10, 500, 999])
    assert diffusion_loss(lambda y, t: eps, clean, eps, t, ALPHA_BARS).item() == 0
    assert diffusion_loss(lambda y, t: eps + 2, clean, eps, t, ALPHA_BARS).item() == pytest.approx(4)


def test_mixing_is_linear_or_keeps_the_variance():
    feature, eps, gamma = noise(0, 2, 4, 1, 1), noise(1, 2, 4, 1, 1), torch.tensor([1.0, 0.36], dtype=torch.float64)
    linear, root = match_noise(feature, eps, gamma, "linear"), match_noise(feature, eps, gamma, "sqrt")
    torch.testing.assert_close(linear[0], feature[0])
    torch.testing.assert_close(linear[1], 0.36 * feature[1] + 0.64 * eps[1])
    torch.testing.assert_close(root[1], 0.6 * feature[1] + 0.8 * eps[1])


def test_formulas_keep_float32_and_never_leave_the_table_for_half():
    """1 − ᾱ₀ is zero in half; the table stays float64 and the result has the tensor's dtype."""
    clean, eps = noise(0, 2, 3, 1, 1).float(), noise(1, 2, 3, 1, 1).float()
    noisy = add_noise(clean, eps, ALPHA_BARS[torch.tensor([0, 0])])
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy - clean, 0.01 * eps - 5e-5 * clean, rtol=1e-4, atol=1e-6)
    assert denoise(lambda y, t: eps, noisy, [0], ALPHA_BARS).dtype == torch.float32


def multiplications(network: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-adds of the network's convolutions."""
    count = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal count
        assert isinstance(module, nn.Conv2d)
        count += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    network(*inputs)
    return count


def norm(channels: int) -> nn.Module:
    return DIFFUSION.norm(channels)


@pytest.mark.parametrize("c", [128, 1024])
def test_the_networks_cost_what_the_closed_forms_say(c: int):
    """Per pixel: Φ 3.125 c² and adapter .390625 c² for maps, Φ 16 K² and adapter 4 K² for logits."""
    with torch.device("meta"):
        pixels, x, t = 2 * 49, torch.randn(2, c, 7, 7), torch.zeros(2, dtype=torch.long)
        logits = torch.randn(2, c, 1, 1)
        assert multiplications(NoisePredictor(map_predictor(c, 4, norm), c, 1280), x, t) == pixels * 3.125 * c**2
        assert multiplications(NoiseAdapter(Bottleneck(c, 8, norm), c), x) == pixels * 0.390625 * c**2
        assert multiplications(NoisePredictor(logit_predictor(c, 4, norm), c, 1280), logits, t) == 2 * 16 * c**2
        assert multiplications(NoiseAdapter(logit_adapter(c, 2, norm), c), logits) == 2 * 4 * c**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler_stride": 250}, "the sampler would start at t = 1000, past time_steps: 1000"),
        ({"time_rows": 999}, "time_rows must be at least time_steps: 1000, got 999"),
        ({"t_max": 1001}, "t_max must be at most time_steps: 1000, got 1001"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(change: dict[str, int], message: str):
    with pytest.raises(ValidationError, match=message):
        Diffusion(**{**PUBLISHED, **change})  # type: ignore[arg-type]
