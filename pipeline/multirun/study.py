"""The record of a search, which an interrupted command continues; Optuna proposes the values. Only here is it imported.

The proposals of a trial depend on the search's seed and on the results of the trials before it. So a search that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.multirun.space import Range, Space

STUDY_FILE = "study.log"
RANDOM_TRIALS = 8
"""Trials before the proposals follow the results."""


@dataclass(frozen=True)
class Trial:
    """The values of one trial, and the metric that they reached."""

    number: int
    values: dict[str, Any]
    metric: float | None = None
    """The main metric in percent; None if the trial is not finished, or failed."""
    failed: bool = False

    @property
    def is_over(self) -> bool:
        """Return whether the trial has ended, with a metric or without."""
        return self.failed or self.metric is not None


class Study:
    """The trials of a search, in a file of its folder."""

    def __init__(self, folder: Path, space: Space, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed = optuna, seed
        self._distributions = {key: self._distribution(space[key]) for key in space}
        storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
        self._study = optuna.create_study(
            storage=storage, study_name="search", direction="maximize", load_if_exists=True
        )

    def _distribution(self, values: Any) -> Any:
        distributions = self._optuna.distributions
        if not isinstance(values, Range):  # Optuna's categories are texts and numbers only
            return distributions.CategoricalDistribution([json.dumps(value) for value in values.values])
        if values.is_whole:
            return distributions.IntDistribution(values.low, values.high, log=values.log, step=values.step or 1)
        return distributions.FloatDistribution(values.low, values.high, log=values.log, step=values.step)

    def trials(self) -> list[Trial]:
        """Return the trials so far, in their order."""
        return [self._trial(each) for each in self._study.get_trials(deepcopy=False)]

    def next_trial(self) -> Trial:
        """Return the trial that was interrupted, or else a new one."""
        begun = [trial for trial in self.trials() if not trial.is_over]
        for trial in begun:
            if trial.values.keys() == self._distributions.keys():
                return trial
            self.fail(trial)  # the command was killed while it chose the values
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=(self._seed + 1_000_003 * number) % 2**32, n_startup_trials=RANDOM_TRIALS
        )
        suggested = self._study.ask(self._distributions)
        return self._trial(self._study.get_trials(deepcopy=False)[suggested.number])

    def finish(self, trial: Trial, metric: float) -> None:
        """Record the metric of a trial."""
        self._study.tell(trial.number, metric)

    def fail(self, trial: Trial) -> None:
        """Record that a trial has no metric."""
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _trial(self, frozen: Any) -> Trial:
        values = {key: _plain(value) for key, value in frozen.params.items()}
        return Trial(frozen.number, values, frozen.value, frozen.state == self._optuna.trial.TrialState.FAIL)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the largest metric, the earliest of several; None if none is finished."""
    finished = [trial for trial in trials if trial.metric is not None]
    return max(finished, key=lambda trial: (trial.metric, -trial.number), default=None)


def _plain(value: Any) -> Any:
    """Return the value for a recipe: a choice as it was given, a number with as many digits as people write."""
    if isinstance(value, str):
        return json.loads(value)
    return float(f"{value:.4g}") if isinstance(value, float) else value
