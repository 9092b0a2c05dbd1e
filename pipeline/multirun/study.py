"""The record of a search, which an interrupted command continues; Optuna proposes the values. Only here is it imported.

The proposals of a trial depend on the search's seed and on the results of the trials before it. So a search that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, one_line
from pipeline.multirun.space import Range, Space
from pipeline.runs.files import NEW_FOLDER_HINT
from shards.documents import DamagedFile

STUDY_FILE = "study.log"
_NAME = "search"
"""Name of the study in its file."""
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
    """The trials of a search, in a file of its folder. Raises DamagedFile if the file cannot be read."""

    def __init__(self, folder: Path, space: Space, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed = optuna, seed
        self._distributions = {key: self._distribution(space[key]) for key in space}
        file = folder / STUDY_FILE
        try:
            storage = JournalStorage(JournalFileBackend(str(file)))
            # Not create_study for both, which would write to the file of a search that is only read.
            if _NAME in optuna.get_all_study_names(storage):
                self._study = optuna.load_study(study_name=_NAME, storage=storage)
            else:
                self._study = optuna.create_study(study_name=_NAME, storage=storage, direction="maximize")
            self.trials()
        except OSError:
            raise
        except Exception as error:  # for a line that is not Optuna's, it may raise anything
            advice = f"search again in a new folder: {NEW_FOLDER_HINT}"
            raise DamagedFile(f"{file}: is no log of trials ({one_line(error, 100)}); {advice}") from error

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
        proposed = self._study.ask(self._distributions)
        return self._trial(self._study.get_trials(deepcopy=False)[proposed.number])

    def finish(self, trial: Trial, metric: float) -> None:
        """Record the metric of a trial."""
        self._study.tell(trial.number, metric)

    def fail(self, trial: Trial) -> None:
        """Record that a trial has no metric."""
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _trial(self, frozen: Any) -> Trial:
        values = {key: _plain(value, frozen.distributions[key]) for key, value in frozen.params.items()}
        return Trial(frozen.number, values, frozen.value, frozen.state == self._optuna.trial.TrialState.FAIL)


def check_optuna() -> None:
    """Raise RecipeError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise RecipeError("search needs Optuna; pip install '.[search]'")


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the largest metric, the earliest of several; None if none is finished."""
    finished = [trial for trial in trials if trial.metric is not None]
    return max(finished, key=lambda trial: (trial.metric, -trial.number), default=None)


def recover(folder: Path) -> None:
    """Make the log of a killed search one that can be continued; only the process with the folder's lock may do so.

    Optuna would wait for its own lock, and add its next line to a line that a crash or a full disk has cut.
    """
    file = folder / STUDY_FILE
    for left in folder.glob(f"{STUDY_FILE}.lock*"):
        left.unlink()
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def _plain(value: Any, distribution: Any) -> Any:
    """Return the value for a recipe: a choice as it was given, a number with as many digits as people write.

    There are four, or as many as tell a thousand values of the range apart.
    """
    if isinstance(value, str):
        return json.loads(value)
    if not isinstance(value, float):
        return value
    low, high = distribution.low, distribution.high
    digits = max(4, 3 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))))
    return min(max(float(f"{value:.{digits}g}"), low), high)
