"""How quick the DDKD loss is beside the published DiffKD module: forward and backward, in one run, in turn.

    PYTHONPATH=.:tests/support python tests/speed/published_diffkd.py FOLDER [rows] [repeats]

FOLDER is the published package ``diffkd`` (lib/models/losses/diffkd of hunto/image_classification_sota). Both get the
same weights, inputs and noise, the sizes of ResNet-50 → MobileNetV1, and DKD as the logits' distance.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from loss_cases import config_of
from published_diffusion import PUBLISHED_NAMES
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.batch import Batch, Outputs, Progress
from pipeline.benchmarks.measure import Measurement, measure
from pipeline.diffusion.denoiser import Denoiser, Draws
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.dkd import dkd_loss

CPU = torch.device("cpu")
CLASSES, STUDENT, TEACHER, SIDE = 1000, 1024, 2048, 7
DKD = {"alpha": 1.0, "beta": 0.5, "temperature": 1.0}


def published_package(folder: str) -> Any:
    """Return the published package, imported from where it lies."""
    spec = importlib.util.spec_from_file_location(
        "diffkd", Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["diffkd"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


class Case:
    """Both losses with one latent width, and what they are given."""

    def __init__(self, published: Any, rows: int, latent: int, **diffusion: bool) -> None:
        torch.manual_seed(0)
        self.map = torch.randn(rows, STUDENT, SIDE, SIDE).relu()
        self.teacher_map = torch.randn(rows, TEACHER, SIDE, SIDE).relu()
        self.logits, self.teacher_logits = torch.randn(rows, CLASSES), torch.randn(rows, CLASSES)
        self.labels = torch.randint(CLASSES, (rows,))
        self.feature = published.DiffKD(STUDENT, TEACHER, use_ae=True, ae_channels=latent)
        self.logit = published.DiffKD(CLASSES, CLASSES, kernel_size=1)
        config = config_of("ddkd") | {"logit_distance": {"dkd": DKD}}
        config["feature"] |= {"latent": latent}
        config["diffusion"] |= diffusion
        facts = Facts(CLASSES, *({"last": (width, SIDE, SIDE)} for width in (STUDENT, TEACHER)))
        self.loss: Any = load_spec("ddkd", config).build(facts)
        for own, theirs in ((self.loss.feature_denoiser, self.feature), (self.loss.logit_denoiser, self.logit)):
            own.load_state_dict(renamed(theirs))
        self.draws = [drawn(rows, width, side) for width, side in ((latent, SIDE), (CLASSES, 1))]

    def theirs(self) -> list[Tensor]:
        """Run the published module forward and backward; return the total and the student's gradients."""
        feature, logits = self.map.clone().requires_grad_(), self.logits.clone().requires_grad_()
        with published_draws(self.draws):
            student, target, diffusion, autoencoder = self.feature(feature, self.teacher_map)
            seen, _, of_logits, _ = self.logit(logits[..., None, None], self.teacher_logits[..., None, None])
        distance = dkd_loss(seen.flatten(1).float(), self.teacher_logits, self.labels, **DKD)
        total = F.mse_loss(student.float(), target.float()) + diffusion + autoencoder + of_logits + distance
        return self.finished(total, [self.feature, self.logit], feature, logits)

    def ours(self, layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
        """Run the loss of this project likewise."""
        feature = self.map.to(memory_format=layout, copy=True).requires_grad_()
        logits = self.logits.clone().requires_grad_()
        batch = Batch(torch.empty(0), self.labels, self.labels, {})
        teacher = Outputs(self.teacher_logits, {"last": self.teacher_map.to(memory_format=layout)})
        with mock.patch.object(Denoiser, "draw", lambda _, target: self.draws[target.shape[-1] == 1]):
            parts = self.loss.parts(Outputs(logits, {"last": feature}), teacher, batch, Progress(1))
        return self.finished(torch.stack(list(parts.values())).sum(), [self.loss], feature, logits)

    def finished(self, total: Tensor, networks: list[nn.Module], *inputs: Tensor) -> list[Tensor]:
        """Return the total and the inputs' gradients."""
        total.backward()
        for network in networks:
            network.zero_grad()  # nothing is left to be freed while the next run's memory is counted
        return [total.detach(), *(x.grad for x in inputs)]  # type: ignore[misc]


def renamed(published: nn.Module) -> dict[str, Tensor]:
    """Return the published parameters under this project's names."""
    norms = ("running_mean", "running_var", "num_batches_tracked")
    names = {name: name for name in published.state_dict() if not name.endswith(norms)}
    for name in names:
        old, new = next((old, new) for old, new in PUBLISHED_NAMES.items() if name.startswith(old))
        names[name] = new + name.removeprefix(old)
    return {names[name]: published.state_dict()[name] for name in names}


def drawn(rows: int, width: int, side: int) -> Draws:
    """Return the noise of one branch."""
    shape = (rows, side, side, width)
    return Draws(torch.randn(shape).movedim(-1, 1), torch.randn(shape).movedim(-1, 1), torch.randint(1000, (rows,)))


@contextmanager
def published_draws(draws: list[Draws]) -> Iterator[None]:
    """Give the published module that noise: each branch asks for the sampler's, then for training's."""
    noises = iter([noise.contiguous() for draw in draws for noise in draw[:2]])
    times = iter([draw.train_t_B for draw in draws])
    with mock.patch("torch.randn", side_effect=noises), mock.patch("torch.randint", side_effect=times):
        yield


def peak_megabytes(run: Callable[[], object]) -> float:
    """Return the most memory that ``run`` holds at once, torch's own buffers included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> list[Measurement]:
    """Return how long each takes, all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name] += measure(name, run, device=CPU, repeats=1, warmup=0).seconds
    return [Measurement(name, seconds) for name, seconds in found.items()]


def in_bfloat16(run: Callable[[], object]) -> Callable[[], object]:
    """Return ``run`` under a plain autocast."""

    def under() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return under


def show(latent: int, runs: dict[str, Callable[[], object]], repeats: int) -> None:
    """Print how long each takes, how many times as quick as the first it is, and what it holds at most."""
    times = interleaved(runs, repeats)
    for each in times:
        middle, least, most = each.milliseconds
        print(
            f"latent {latent:4}  {each.name:15} {middle:7.0f} ms ({least:.0f}–{most:.0f})  "
            f"{times[0].median / each.median:5.2f} × as quick  {peak_megabytes(runs[each.name]):6.0f} MB",
            flush=True,
        )


def main(folder: str, rows: int = 8, repeats: int = 9) -> None:
    published = published_package(folder)
    print(f"{rows} rows, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for latent in (1024, 256):
        case = Case(published, rows, latent)
        case.loss.to(memory_format=torch.channels_last)
        for mine, other in zip(case.ours(), case.theirs(), strict=True):
            assert (mine - other).norm() < 0.01 * other.norm(), "they do not compute the same"
        options = {f"ours, {key}": Case(published, rows, latent, **{key: True}) for key in ("checkpoint", "compile")}
        for option in options.values():
            option.loss.to(memory_format=torch.channels_last)
        planes = {"ours, planes": partial(case.ours, torch.contiguous_format)}
        others = {name: option.ours for name, option in options.items()}
        for run in others.values():
            run()  # compiled before it is measured
        show(latent, {"published": case.theirs, "ours": case.ours, **planes, **others}, repeats)
        case.loss.feature_denoiser.autocast = case.loss.logit_denoiser.autocast = torch.bfloat16
        half = {"published, bf16": in_bfloat16(case.theirs), "ours, bf16": in_bfloat16(case.ours)}
        show(latent, half, max(repeats // 9, 1))  # a processor without its instructions takes minutes


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:]))
