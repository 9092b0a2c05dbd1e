from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

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


def test_milestones_and_step_belong_together():
    with pytest.raises(ValidationError, match="milestones need kind: step"):
        Schedule(kind="cosine", rate=0.1, milestones=(1,))
    with pytest.raises(ValidationError, match="kind: step needs milestones"):
        Schedule(kind="step", rate=0.1)
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
