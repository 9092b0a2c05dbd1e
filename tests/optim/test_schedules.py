from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR

from pipeline.batch import Progress
from pipeline.optim.schedule import Ramp, Schedule, learning_rate, ramp_factor


def at(epochs: float, steps_per_epoch: int = 100) -> Progress:
    return Progress(steps_per_epoch, step=round(epochs * steps_per_epoch))


def test_the_cifar_schedule_drops_at_the_published_epochs():
    schedule = Schedule(kind="step", rate=0.05, milestones=(150, 180, 210))
    epochs = [0, 149.99, 150, 179.99, 180, 209.99, 210, 239.99]
    rates = [learning_rate(schedule, at(epoch), 240) for epoch in epochs]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-5, 5e-5])


def test_warm_up_is_linear_from_its_first_rate_to_the_rate():
    schedule = Schedule(rate=1.0, warmup_epochs=5, warmup_rate=0.2)
    assert [learning_rate(schedule, at(epoch), 10) for epoch in (0, 2.5, 5, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_the_cosine_goes_from_the_rate_after_warm_up_to_the_final_rate():
    schedule = Schedule(kind="cosine", rate=1.0, warmup_epochs=2, final_rate=0.1)
    assert learning_rate(schedule, at(2), 12) == pytest.approx(1.0)
    assert learning_rate(schedule, at(7), 12) == pytest.approx(0.55)
    assert learning_rate(schedule, at(4.5), 12) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(schedule, at(12), 12) == pytest.approx(0.1)


def rates(schedule: Schedule, epochs: int, steps_per_epoch: int) -> list[float]:
    """Return the rate of every step of a run."""
    steps = range(epochs * steps_per_epoch)
    return [learning_rate(schedule, Progress(steps_per_epoch, step=step), epochs) for step in steps]


def rates_of(scheduler: type[LRScheduler], rate: float, steps: int, **keys: Any) -> list[float]:
    """Return what one of torch's schedulers gives at every step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    theirs, found = scheduler(optimizer, **keys), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    return found


@given(every=st.sampled_from([0.5, 1.0, 2.4, 3.0]), factor=st.floats(0.5, 0.99), steps=st.integers(1, 20))
def test_a_factor_every_so_many_epochs_is_timms(every: float, factor: float, steps: int):
    """timm's scheduler for B2 counts whole epochs: factor to the power of ⌊epoch / every⌋, warm-up included."""
    scheduler = pytest.importorskip("timm.scheduler").StepLRScheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.048)
    theirs = scheduler(
        optimizer, decay_t=every, decay_rate=factor, warmup_t=3, warmup_lr_init=1e-6, warmup_prefix=False
    )
    keys = {"rate": 0.048, "factor": factor, "warmup_epochs": 3, "warmup_rate": 1e-6, "unit": "epoch"}
    schedule = Schedule(kind="step", every=every, **keys)
    for epoch in range(12):
        theirs.step(epoch)
        found = learning_rate(schedule, Progress(steps, step=epoch * steps), 12)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@given(power=st.floats(0.3, 3), epochs=st.integers(1, 6), steps=st.integers(1, 9), rate=st.floats(1e-4, 10))
def test_poly_is_torchs(power: float, epochs: int, steps: int, rate: float):
    ours = rates(Schedule(kind="poly", rate=rate, power=power), epochs, steps)
    theirs = rates_of(PolynomialLR, rate, epochs * steps, total_iters=epochs * steps, power=power)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_poly_is_a_line_to_the_final_rate_after_the_warm_up():
    schedule = Schedule(kind="poly", rate=1.0, final_rate=0.2, warmup_epochs=2)
    assert [learning_rate(schedule, at(epoch), 10) for epoch in (1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.6, 0.2])


@given(
    epochs=st.integers(2, 6),
    steps=st.integers(2, 9),
    rate=st.floats(1e-4, 10),
    warmup=st.integers(1, 10),
    first=st.floats(2, 50),
    last=st.floats(2, 1e4),
)
def test_one_cycle_is_torchs(epochs: int, steps: int, rate: float, warmup: int, first: float, last: float):
    total = epochs * steps
    share = min(warmup + 1, total - 1) / total
    schedule = Schedule(
        kind="one_cycle",
        rate=rate,
        warmup_epochs=share * epochs,
        warmup_rate=rate / first,
        final_rate=rate / first / last,
    )
    factors = {"pct_start": share, "div_factor": first, "final_div_factor": last}
    theirs = rates_of(OneCycleLR, rate, total, max_lr=rate, total_steps=total, cycle_momentum=False, **factors)
    assert rates(schedule, epochs, steps) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_a_cosine_is_timms_by_step_and_by_epoch(unit: str, warmup: int):
    epochs, steps = 9, 5
    schedule = Schedule.model_validate(
        {"kind": "cosine", "rate": 0.3, "final_rate": 0.01, "warmup_epochs": warmup, "warmup_rate": 0.05, "unit": unit}
    )
    timm = pytest.importorskip("timm.scheduler")
    length = 1 if unit == "epoch" else steps
    theirs = timm.CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=0.3),
        t_initial=(epochs - warmup) * length,
        lr_min=0.01,
        warmup_t=warmup * length,
        warmup_lr_init=0.05,
        warmup_prefix=True,
        t_in_epochs=unit == "epoch",
    )
    expected = [theirs._get_lr(step // steps if unit == "epoch" else step)[0] for step in range(epochs * steps)]
    assert rates(schedule, epochs, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "poly", "one_cycle", "step", "constant"])
def test_by_epoch_the_rate_changes_only_between_epochs(kind: str):
    keys = {"milestones": (1, 3)} if kind == "step" else {}
    schedule = Schedule.model_validate(
        {"kind": kind, "rate": 0.3, "warmup_epochs": 2, "warmup_rate": 0.1, "unit": "epoch", **keys}
    )
    found = rates(schedule, 6, 4)
    assert [len(set(found[4 * epoch : 4 * epoch + 4])) for epoch in range(6)] == [1] * 6
    alone = [learning_rate(schedule, Progress(1, step=epoch), 6) for epoch in range(6)]
    assert found[::4] == alone


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kind": "cosine", "power": 2.0}, "power needs kind: poly, got kind: cosine"),
        ({"kind": "one_cycle"}, "kind: one_cycle needs warmup_epochs above 0; torch's default is 0.3 of the run"),
        ({"unit": "epoch", "warmup_epochs": 3}, "unit: epoch with a warm-up needs warmup_rate above 0"),
    ],
)
def test_keys_of_another_schedule_are_refused(keys: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        Schedule(rate=0.1, **keys)


def test_milestones_and_step_belong_together():
    wrong: list[dict[str, Any]] = [
        {"kind": "cosine", "milestones": (1,)},
        {"kind": "cosine", "every": 2},
        {"kind": "step"},
        {"kind": "step", "milestones": (1,), "every": 2},
    ]
    for keys in wrong:
        with pytest.raises(ValidationError, match="kind: step needs either milestones or every, and no other kind"):
            Schedule(rate=0.1, **keys)
    with pytest.raises(ValidationError, match="must be in increasing order"):
        Schedule(kind="step", rate=0.1, milestones=(30, 20))


def test_the_published_warm_up_of_dkd_counts_epochs_from_one():
    ramp = Ramp(linear_epochs=20)
    assert [ramp_factor(ramp, at(epoch)) for epoch in (0, 0.99, 1, 18.5, 19, 200)] == [
        1 / 20,
        1 / 20,
        2 / 20,
        19 / 20,
        1,
        1,
    ]


def test_a_ramp_holds_from_its_start_until_its_end():
    ramp = Ramp.model_validate({"from": 2, "until": 30})
    assert [ramp_factor(ramp, at(epoch)) for epoch in (0, 1.99, 2, 29.99, 30)] == [0, 0, 1, 1, 0]
    with pytest.raises(ValidationError, match="must be smaller than"):
        Ramp.model_validate({"from": 5, "until": 5})


def test_a_ramp_that_starts_late_grows_from_there():
    ramp = Ramp.model_validate({"from": 10, "linear_epochs": 4})
    assert [ramp_factor(ramp, at(epoch)) for epoch in (9, 10, 11, 13, 14)] == [0, 0.25, 0.5, 1, 1]


def test_no_ramp_is_a_factor_of_one():
    assert ramp_factor(None, at(0)) == 1.0


def test_a_ramp_of_steps_has_each_factor_from_its_epoch_on():
    ramp = Ramp(steps=((0, 1.0), (75, 4 / 3), (80.5, 0.0)))
    epochs = (0, 74.99, 75, 80, 80.5, 300)
    assert [ramp_factor(ramp, at(epoch)) for epoch in epochs] == [1.0, 1.0, 4 / 3, 4 / 3, 0.0, 0.0]


def test_a_gaussian_ramp_grows_by_whole_epochs_up_to_its_last():
    ramp = Ramp(gaussian=80)
    for epoch in (0, 0.99, 1, 40, 79.5, 80, 200):
        expected = math.exp(-5 * (1 - min(math.floor(epoch) / 80, 1)) ** 2)
        assert ramp_factor(ramp, at(epoch)) == pytest.approx(expected, rel=1e-15)
    assert ramp_factor(ramp, at(0)) == pytest.approx(math.exp(-5))
    assert ramp_factor(ramp, at(80)) == 1.0


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_cosine_begins_again_in_each_cycle(warmup: int):
    several = Schedule(kind="cosine", rate=1.0, warmup_epochs=warmup, final_rate=0.1, cycles=4)
    alone = Schedule(kind="cosine", rate=1.0, final_rate=0.1)
    for epoch in (0, 1.25, 74.99, 75, 100, 149.99, 224, 299.99):
        expected = learning_rate(alone, at(epoch % 75), 75)
        assert learning_rate(several, at(warmup + epoch), warmup + 300) == pytest.approx(expected, rel=1e-9)
    assert learning_rate(several, at(warmup + 300), warmup + 300) == pytest.approx(0.1)
