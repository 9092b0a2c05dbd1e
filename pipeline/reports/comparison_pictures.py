"""Pictures that compare methods and networks: seeds as dots, and what a network costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.builders.meta import NetworkSummary, probe
from pipeline.builders.student import student_spec
from pipeline.config.recipe import StudentConfig
from pipeline.errors import one_line
from pipeline.plots.costs import Network, draw_costs
from pipeline.plots.dots import draw_dots
from pipeline.reports import page
from pipeline.reports.methods import TEACHER_COLOR, MethodRuns, colored
from pipeline.reports.references import References
from pipeline.reports.reported_run import ReportedRun
from pipeline.training.result import percent
from shards.manifest import MANIFEST, read_manifest


def draw_methods(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of methods by seeds; empty for a single run."""
    values = {method.name: [run.last for run in method.measured if run.last is not None] for method in methods}
    values = {name: found for name, found in values.items() if found}
    if sum(map(len, values.values())) < 2:
        return ""
    task = methods[0].first_run.task
    alone = references.alone_metric
    text = "; ".join(f"{name}: {', '.join(map(percent, found))}" for name, found in values.items())
    svg = draw_dots(
        "methods",
        f"{task.title} after the last epoch by method and seed. {text}",
        values,
        xlabel=f"{task.title} after the last epoch, {task.unit}",
        baseline=None if alone is None else ("student alone", alone),
    )
    return page.section("Methods and seeds", page.pictures([("A dot for each seed; mean ± deviation", svg)]))


def draw_networks(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of accuracy against multiply-accumulates, parameters and latency."""
    notes: list[str] = []
    found = [
        _network(method.name, color, _evaluated_run(method), method.last, notes)
        for color, method in colored(methods, references)
    ]
    teacher = references.teacher
    if teacher is not None and not all(method.first_run.teaches_itself for method in methods):
        found.append(_network("teacher", TEACHER_COLOR, teacher, references.teacher_metric, notes))
    networks = [network for network in found if network is not None]
    selected = [page.note(text) for text in dict.fromkeys(notes)]
    if not networks:
        return page.section("Accuracy and cost", *selected)
    task = methods[0].first_run.task
    title = task.title
    text = "; ".join(
        f"{network.label} {network.metric:.2f} {task.unit} with "
        + ", ".join(f"{cost:.3g} {kind}" for kind, cost in network.costs.items())
        for network in networks
    )
    if len(networks) == 1:
        return page.section("Accuracy and cost", page.paragraph(text), *selected)
    svg = draw_costs("costs", f"{title} against cost: {text}", networks, ylabel=task.title_and_unit)
    return page.section("Accuracy and cost", page.pictures([(f"{title} against what a network costs", svg)]), *selected)


def _evaluated_run(method: MethodRuns) -> ReportedRun:
    return next((run for run in method.runs if run.evaluation), method.first_run)


def _network(label: str, color: int, run: ReportedRun, metric: float | None, notes: list[str]) -> Network | None:
    if metric is None:
        return None
    summary = _summary(run, notes)
    evaluation = run.evaluation
    if evaluation and evaluation.latency_ms:
        threads = f" with {evaluation.threads} thread{'s' if evaluation.threads > 1 else ''}"
        notes.append(f"Latency of {label} on {evaluation.device}{threads}.")
    parameters = summary.parameters if summary else run.result.parameters if run.result else None
    costs = {
        "million MAC": summary and summary.macs / 1e6,
        "million parameters": parameters and parameters / 1e6,
        "ms latency of one image": evaluation and evaluation.latency_ms,
    }
    known = {kind: cost for kind, cost in costs.items() if cost}
    return Network(label, metric, known, color) if known else None


def _summary(run: ReportedRun, notes: list[str]) -> NetworkSummary | None:
    """Return the size of a run's network, None with a note if it cannot be built without its data."""
    data, student = run.recipe.data, run.recipe.student
    manifest = Path(data.path)
    try:
        classes = data.classes or (read_manifest(manifest).num_classes if (manifest / MANIFEST).is_file() else None)
        classes = (len(run.evaluation.classes) if run.evaluation else 0) or classes
        if not classes:
            notes.append(
                f"Multiply-accumulates are not shown: {data.path} has no shards that say the number of classes."
            )
            return None
        config = StudentConfig(model=student.model, stages=student.stages, arguments=student.arguments)
        return probe(student_spec(config, frozenset()), classes, data.for_validation.size)[0]
    except Exception as error:  # a network of the user's own may raise anything
        notes.append(f"Multiply-accumulates of {student.model} are not shown: {one_line(error, 200)}")
        return None
