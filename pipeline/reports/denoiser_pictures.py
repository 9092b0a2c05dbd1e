"""Pictures of the denoisers of a loss: their noise level by epoch, and the last maps of one image.

The loss's own parts are among the loss parts. What is drawn here was recorded after each epoch (``observer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.plots.curves import Curve, draw_curves
from pipeline.plots.maps import draw_maps
from pipeline.reports import page
from pipeline.reports.methods import MethodRuns
from pipeline.reports.reported_run import ReportedRun
from pipeline.reports.training_pictures import Captioned, thinned
from pipeline.training.journal import OBSERVED

_GAMMAS = {"gamma": "γ of the feature map", "gamma_logits": "γ of the logits"}
_MAPS = {"teacher": "teacher", "student": "student", "denoised": "student, denoised"}


def draw_denoisers(methods: Sequence[MethodRuns]) -> str:
    """Return the section of the denoisers of each method's first run; empty if no loss has one."""
    parts: list[str] = []
    drawn: Captioned = []
    for number, method in enumerate(methods):
        run = method.first_run
        names = [name for name, spec in run.recipe.losses.items() if hasattr(spec.config, "diffusion")]
        if not names:
            continue
        drawn += [_losses(f"denoiser-losses-{number}", method.name, run, names)]
        seen = [(line["epoch"], line[OBSERVED]) for line in run.evaluations if isinstance(line.get(OBSERVED), dict)]
        if not seen:
            parts.append(page.note(_why_nothing(run)))
        for name in names:
            found = [(epoch, each[name]) for epoch, each in seen if name in each]
            drawn += _of_loss(f"{number}-{name.replace(':', '-').replace('.', '-')}", method.name, found)
    return page.section("The denoiser", page.pictures(drawn), *parts)


def _losses(name: str, method: str, run: ReportedRun, losses: Sequence[str]) -> tuple[str, str]:
    """Return the picture of the parts of the losses with a denoiser."""
    lines = run.training
    epochs = [line["epoch"] for line in lines]
    keys = [key for key in lines[-1] if key.partition("/")[0] in losses]
    curves = [
        Curve(key.partition("/")[2] or key, *thinned(epochs, [line.get(key) for line in lines]), color, color)
        for color, key in enumerate(keys)
    ]
    title = f"Loss parts of the denoiser of {method} by epoch: {', '.join(curve.label for curve in curves)}"
    svg = draw_curves(name, title, curves, xlabel="epoch", ylabel="loss, weighted", log=True)
    return f"{method}: diffusion, reconstruction and distance", svg


def _of_loss(key: str, method: str, seen: Sequence[tuple[float, dict[str, Any]]]) -> Captioned:
    """Return the pictures of one loss: γ by epoch, and the maps after the last epoch."""
    if not seen:
        return []
    epochs = [epoch for epoch, _ in seen]
    curves = []
    for color, (name, label) in enumerate(_GAMMAS.items()):
        if values := [each[name] for _, each in seen if name in each]:
            curves.append(Curve(label, epochs, [value["mean"] for value in values], color, color))
            for end in ("least", "most"):
                y = [value[end] for value in values]
                curves.append(Curve(f"{label}, least and most", epochs, y, color, 3, thin=True))
    ends = [(curve.label, curve.y[-1]) for curve in curves if not curve.thin]
    last = "; ".join(f"{label} ends at {'–' if value is None else f'{value:.3f}'}" for label, value in ends)
    title = f"γ, the share of the student's tensor at the start of the denoising, by epoch: {last}"
    svg = draw_curves(f"gamma-{key}", title, curves, xlabel="epoch", ylabel="γ")
    drawn = [(f"{method}: γ, the student's share at the start", svg)]
    if maps := {
        label: seen[-1][1]["maps"][name] for name, label in _MAPS.items() if name in seen[-1][1].get("maps", {})
    }:
        svg = draw_maps(f"maps-{key}", f"The last feature map of one validation image: {', '.join(maps)}", maps)
        drawn.append((f"{method}: one validation image after epoch {epochs[-1]:g}; mean square over the channels", svg))
    return drawn


def _why_nothing(run: ReportedRun) -> str:
    """Return why γ and the maps of a run were not recorded."""
    reason = "it was begun by code that did not record them, or had no evaluation yet"
    if not run.recipe.journal.report:
        reason = "journal.report is false"
    elif any((path / "zero").is_dir() for path in run.folder.glob("checkpoints/step-*")):
        reason = "under DeepSpeed a rank may have a part of the weights only"
    return f"γ and maps of {run.folder} are not recorded: {reason}."
