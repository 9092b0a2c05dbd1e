"""The stages of the three commands, with their command lines and time limits."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from options import Options

CHECKOUT = Path(__file__).resolve().parents[2]
CIFAR_PAIR, IMAGENET_PAIR = "configs/cifar100/resnet56_resnet20", "configs/imagenet/r50_mbv1"
METHODS = ("ce", "kd", "dkd", "perception", "ddkd")
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class HalfHourStage:
    """A command with a time limit; ``{folder}`` in an argument is replaced by the folder of its result."""

    name: str
    seconds: float
    args: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """Working directory; None for the current one."""
    rerun_if_passed: bool = False
    """Whether a stage that passed runs again, because it may pass before all of its work is finished."""

    @property
    def command_line(self) -> str:
        """Return the command as a user would type it."""
        return shlex.join(["python", *self.args[1:]]) if self.args[0] == sys.executable else shlex.join(self.args)


def stages_of(command: int, options: Options) -> list[HalfHourStage]:
    """Return the stages of a command, in order."""
    return {1: _correctness_stages, 2: _speed_stages, 3: _table_stages}[command](options)


def _check(name: str, seconds: float, options: Options, **environment: str) -> HalfHourStage:
    script = str(CHECKOUT / "launchers" / "gpu" / "check.py")
    return HalfHourStage(name, seconds, (sys.executable, script, name, str(options.out), "{folder}"), environment)


def _pipeline(name: str, seconds: float, script: str, *args: str) -> HalfHourStage:
    return HalfHourStage(name, seconds, (sys.executable, str(CHECKOUT / "pipeline" / script), *args))


def _correctness_stages(options: Options) -> list[HalfHourStage]:
    """Return the stages that check whether the pipeline runs, and whether its results are correct."""
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(CHECKOUT / "tests"))
    return [
        _check("inputs", 120, options),
        _check("machine", 30, options),
        _pipeline("doctor", 60, "doctor.py"),
        HalfHourStage("gpu-tests", 150, (sys.executable, *tests)),
        _pipeline(
            "demo", 120, "train.py", f"stop.steps={options.steps}", f"folder={options.out}/demo", *_demo(options)
        ),
        _check("methods", 150, options),
        _check("graph", 150, options, **DETERMINISTIC),
        _check("memory", 60, options),
        _check("teacher", 60, options),
        _check("losses", 60, options),
        _check("pixels", 60, options),
        _check("resume", 90, options, **DETERMINISTIC),
        _check("cache", 60, options),
    ]


def _demo(options: Options) -> list[str]:
    """Return overrides that make the demo a single run, because training its teacher and baseline takes minutes."""
    weights = options.inputs / "demo_teacher.pt"
    return [
        "compare=null",
        f"data.path={options.inputs / 'demo'}",
        f"teacher={{recipe: null, model: cifar_resnet20, weights: {weights}}}",
    ]


def cifar_overrides(options: Options, method: str) -> list[str]:
    """Return the overrides for a method of the CIFAR pair: shards, and weights in place of the teacher's own run."""
    overrides = [f"data.path={options.cifar_shards}"]
    if method != "ce":
        weights = options.weights or options.inputs / "resnet56.pt"
        overrides += [f"teacher={{recipe: null, model: cifar_resnet56, weights: {weights}}}"]
    return overrides


def all_methods() -> list[str]:
    """Return the methods of the CIFAR pair that need neither a cache nor an earlier run."""
    names = [path.stem for path in sorted((CHECKOUT / CIFAR_PAIR).glob("*.yaml"))]
    return [name for name in names if name not in ("pair", "ab") and not name.endswith("_cached")]


def short_run(options: Options, method: str) -> list[str]:
    """Return a method's recipe of the CIFAR pair and its overrides, with a small batch in a rehearsal."""
    return [
        f"{CIFAR_PAIR}/{method}.yaml",
        *cifar_overrides(options, method),
        *(["batch=16"] if options.rehearse else []),
    ]


def imagenet_overrides(options: Options, method: str) -> list[str]:
    """Return the overrides for a method of the ImageNet pair, which runs on noise."""
    overrides = [f"data.path={options.inputs / 'imagenet'}", "data.loader=synthetic"]
    overrides += [f"data.size={options.imagenet_size}", f"batch={options.imagenet_batch}"]
    if method != "ce":
        overrides += [f"teacher.weights={options.inputs / 'resnet50.pt'}", "teacher.expect_top1=null"]
    return overrides


def _speed_stages(options: Options) -> list[HalfHourStage]:
    """Return the stages that measure speed."""
    records = f"out={options.out}/records"
    repeats = ["repeats=2", "steps=2", "warmup=1"] if options.rehearse else ["repeats=7", "steps=20", "warmup=5"]
    methods = ("ce", "kd") if options.rehearse else METHODS

    def bench(name: str, seconds: float, part: str, recipe: str, *overrides: str) -> HalfHourStage:
        return _pipeline(name, seconds, "bench.py", part, f"{recipe}.yaml", *overrides, records, *repeats)

    def step_stages(name: str, seconds: float, recipe: str, *overrides: str) -> list[HalfHourStage]:
        """Return two stages for a step: eager, which also measures the step's parts, and as a CUDA graph."""
        graph = "graph=auto" if options.rehearse else "graph=true"
        eager = bench(name, seconds, "step", recipe, *overrides, "graph=false")
        return [eager, bench(f"{name}-graph", seconds, "step", recipe, *overrides, graph)]

    stages = [
        s for m in methods for s in step_stages(f"cifar-{m}", 40, f"{CIFAR_PAIR}/{m}", *short_run(options, m)[1:])
    ]
    stages += [
        s
        for m in methods
        for s in step_stages(f"imagenet-{m}", 60, f"{IMAGENET_PAIR}/{m}", *imagenet_overrides(options, m))
    ]
    for key in ("student.compile", "teacher.compile", "losses.ddkd.diffusion.compile"):
        name = f"ddkd-{key.split('.')[-2]}-compiled"
        overrides = [*imagenet_overrides(options, "ddkd"), f"{key}=true"]
        stages += [] if options.rehearse else [bench(name, 120, "step", f"{IMAGENET_PAIR}/ddkd", *overrides)]
    method = "kd" if options.rehearse else "ddkd"
    stages += [
        bench(f"losses-{method}", 60, "losses", f"{IMAGENET_PAIR}/{method}", *imagenet_overrides(options, method))
    ]
    loader = [f"data.path={options.jpeg_shards}", f"batch={8 if options.rehearse else 128}", "data.resize=null"]
    return [*stages, bench("loader", 60, "loader", f"{IMAGENET_PAIR}/ce", *loader)]


def _table_stages(options: Options) -> list[HalfHourStage]:
    """Return the stage that trains results for CIFAR-100's tables: three methods with two seeds each."""
    methods = ("kd",) if options.rehearse else ("kd", "dkd", "perception")
    recipes = [str(CHECKOUT / CIFAR_PAIR / f"{method}.yaml") for method in methods]
    overrides = [
        *cifar_overrides(options, "kd"),
        "checkpoints.every_epochs=60",
        "journal={every_steps: 781, trackers: []}",
    ]
    overrides += (
        ["epochs=1", "batch=16"]
        if options.rehearse
        else [f"stop.minutes={max(options.minutes - 1, 0.5)}", "data.validation_batch=2000"]
    )
    seeds, jobs = ("0", "1") if options.rehearse else ("0,1", "6")  # one job per run, so that all stop at the same time
    stage = _pipeline(
        "cells", 60 * options.minutes, "compare.py", *recipes, f"seeds={seeds}", f"jobs={jobs}", *overrides
    )
    # It passes when its minutes are over, with unfinished runs, which the next call continues.
    return [replace(stage, folder=options.out, rerun_if_passed=True)]
