"""The report of a search, as one HTML page: the metric of its trials, and what each key did to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.plots.trials import PlottedTrial, SearchedKey, draw_key, draw_trials
from pipeline.reports import page
from pipeline.training.result import percent


class SearchFacts(NamedTuple):
    """What the page says of a search besides its trials."""

    title: str
    folder: str
    metric: str
    """Title of the task's main metric."""
    unit: str
    """Unit of that metric."""
    seeds: Sequence[int]
    command: str | None
    """Command that trains with the best values; None without a finished trial."""

    @property
    def axis(self) -> str:
        """Return the label of an axis of the metric."""
        return f"{self.metric}, {self.unit}"


def search_page(facts: SearchFacts, keys: Sequence[SearchedKey], trials: Sequence[PlottedTrial]) -> str:
    """Return the report of a search in HTML."""
    finished = [trial for trial in trials if trial.metric is not None]
    seeds = f"seed{'s' if len(facts.seeds) > 1 else ''} {', '.join(map(str, facts.seeds))}"
    body = [f"<h1>{page.escaped(facts.title)}</h1>", page.note(f"{facts.folder}, {seeds}"), _numbers(facts, trials)]
    if finished:
        body += [
            page.section("Trials", page.pictures([_trials_picture(facts, trials)])),
            page.section("Keys", page.pictures([_key_picture(facts, key, finished) for key in keys])),
        ]
    if facts.command:
        text = "Train with the best values on all training images, with several seeds before a result is told:"
        chance = "The best of several trials is better than its mean by chance alone."
        body.append(page.section("The best", page.paragraph(text), page.preformatted(facts.command), page.note(chance)))
    body.append(page.section("All trials, best first", _table(facts, keys, trials)))
    return page.html_page(facts.title, body)


def _numbers(facts: SearchFacts, trials: Sequence[PlottedTrial]) -> str:
    metrics = [trial.metric for trial in trials if trial.metric is not None]
    failed = sum(trial.failed for trial in trials)
    values = [("finished trials", str(len(metrics)))]
    values += [("failed trials", str(failed))] if failed else []
    values += [(f"best {facts.metric} on held-out images, {facts.unit}", percent(max(metrics)))] if metrics else []
    return page.numbers(values)


def _trials_picture(facts: SearchFacts, trials: Sequence[PlottedTrial]) -> tuple[str, str]:
    texts = [f"trial {trial.number} {'failed' if trial.failed else percent(trial.metric)}" for trial in trials]
    caption = f"{facts.metric} on held-out images by trial"
    return caption, draw_trials("trials", f"{caption}: {', '.join(texts)}", trials, ylabel=facts.axis)


def _key_picture(facts: SearchFacts, key: SearchedKey, finished: Sequence[PlottedTrial]) -> tuple[str, str]:
    texts = [f"{json.dumps(trial.values[key.key])}: {percent(trial.metric)}" for trial in finished]
    caption = f"{facts.metric} by {key.key}; filled: the best trial"
    name = f"key-{''.join(letter if letter.isalnum() else '-' for letter in key.key)}"
    return caption, draw_key(name, f"{caption}. {', '.join(texts)}", key, finished, ylabel=facts.axis)


def _table(facts: SearchFacts, keys: Sequence[SearchedKey], trials: Sequence[PlottedTrial]) -> str:
    ordered = sorted(trials, key=lambda trial: (trial.metric is None, -(trial.metric or 0.0), trial.number))
    rows = [
        [str(trial.number), "failed" if trial.failed else percent(trial.metric)]
        + [json.dumps(trial.values.get(key.key), ensure_ascii=False) for key in keys]
        for trial in ordered
    ]
    return page.table(["trial", facts.metric, *(key.key for key in keys)], rows)
