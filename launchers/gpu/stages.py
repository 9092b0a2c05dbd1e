"""The stages of the three commands: what each runs, and how long it may take."""

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
    """A command and its limit; ``{folder}`` in a word is where its result lies."""

    name: str
    seconds: float
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """Where it runs; None is the current folder."""
    goes_on: bool = False
    """Whether it is run again though it ended well: what it makes may not be finished."""

    @property
    def command_line(self) -> str:
        """The command as a reader would type it."""
        return shlex.join(["python", *self.words[1:]]) if self.words[0] == sys.executable else shlex.join(self.words)


def stages_of(command: int, options: Options) -> list[HalfHourStage]:
    """Return the stages of a command, in their order."""
    return {1: _right, 2: _quick, 3: _cells}[command](options)


def _check(name: str, seconds: float, options: Options, **environment: str) -> HalfHourStage:
    script = str(CHECKOUT / "launchers" / "gpu" / "check.py")
    return HalfHourStage(name, seconds, (sys.executable, script, name, str(options.out), "{folder}"), environment)


def _pipeline(name: str, seconds: float, script: str, *words: str) -> HalfHourStage:
    return HalfHourStage(name, seconds, (sys.executable, str(CHECKOUT / "pipeline" / script), *words))


def _right(options: Options) -> list[HalfHourStage]:
    """Does it run, is it right."""
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
    """Return what makes the demo a single run: its teacher and its baseline would take minutes."""
    weights = options.inputs / "demo_teacher.pt"
    return [
        "compare=null",
        f"data.path={options.inputs / 'demo'}",
        f"teacher={{recipe: null, model: cifar_resnet20, weights: {weights}}}",
    ]


def cifar_words(options: Options, method: str) -> list[str]:
    """Return the overrides with which a row of the CIFAR pair runs here."""
    words = [f"data.path={options.cifar_shards}"]
    if method != "ce":
        weights = options.weights or options.inputs / "resnet56.pt"
        words += [f"teacher={{recipe: null, model: cifar_resnet56, weights: {weights}}}"]
    return words


def all_methods() -> list[str]:
    """Return the rows of the CIFAR pair that need no cache and no earlier run."""
    names = [path.stem for path in sorted((CHECKOUT / CIFAR_PAIR).glob("*.yaml"))]
    return [name for name in names if name not in ("pair", "ab") and not name.endswith("_cached")]


def short_run(options: Options, method: str) -> list[str]:
    """Return the recipe of that row and its overrides, with a small batch in a rehearsal."""
    return [f"{CIFAR_PAIR}/{method}.yaml", *cifar_words(options, method), *(["batch=16"] if options.rehearse else [])]


def imagenet_words(options: Options, method: str) -> list[str]:
    """Return the overrides with which a row of ImageNet's pair runs here, on noise."""
    words = [f"data.path={options.inputs / 'imagenet'}", "data.loader=synthetic"]
    words += [f"data.size={options.imagenet_size}", f"batch={options.imagenet_batch}"]
    if method != "ce":
        words += [f"teacher.weights={options.inputs / 'resnet50.pt'}", "teacher.expect_top1=null"]
    return words


def _quick(options: Options) -> list[HalfHourStage]:
    """How quick it is."""
    records = f"out={options.out}/records"
    how = ["repeats=2", "steps=2", "warmup=1"] if options.rehearse else ["repeats=7", "steps=20", "warmup=5"]
    small = ("ce", "kd") if options.rehearse else METHODS

    def bench(name: str, seconds: float, what: str, recipe: str, *words: str) -> HalfHourStage:
        return _pipeline(name, seconds, "bench.py", what, f"{recipe}.yaml", *words, records, *how)

    def both_ways(name: str, seconds: float, recipe: str, *words: str) -> list[HalfHourStage]:
        """Return the step operation by operation, whose parts are measured, and as a graph."""
        graph = "graph=auto" if options.rehearse else "graph=true"
        eager = bench(name, seconds, "step", recipe, *words, "graph=false")
        return [eager, bench(f"{name}-graph", seconds, "step", recipe, *words, graph)]

    stages = [s for m in small for s in both_ways(f"cifar-{m}", 40, f"{CIFAR_PAIR}/{m}", *short_run(options, m)[1:])]
    stages += [
        s for m in small for s in both_ways(f"imagenet-{m}", 60, f"{IMAGENET_PAIR}/{m}", *imagenet_words(options, m))
    ]
    for key in ("student.compile", "teacher.compile", "losses.ddkd.diffusion.compile"):
        name = f"ddkd-{key.split('.')[-2]}-compiled"
        words = [*imagenet_words(options, "ddkd"), f"{key}=true"]
        stages += [] if options.rehearse else [bench(name, 120, "step", f"{IMAGENET_PAIR}/ddkd", *words)]
    losses = "kd" if options.rehearse else "ddkd"
    stages += [bench(f"losses-{losses}", 60, "losses", f"{IMAGENET_PAIR}/{losses}", *imagenet_words(options, losses))]
    loader = [f"data.path={options.jpeg_shards}", f"batch={8 if options.rehearse else 128}", "data.resize=null"]
    return [*stages, bench("loader", 60, "loader", f"{IMAGENET_PAIR}/ce", *loader)]


def _cells(options: Options) -> list[HalfHourStage]:
    """Cells of CIFAR-100's tables: three methods, as many seeds as there is time for."""
    methods = ("kd",) if options.rehearse else ("kd", "dkd", "perception")
    recipes = [str(CHECKOUT / CIFAR_PAIR / f"{method}.yaml") for method in methods]
    words = [*cifar_words(options, "kd"), "checkpoints.every_epochs=60", "journal={every_steps: 781, trackers: []}"]
    words += (
        ["epochs=1", "batch=16"]
        if options.rehearse
        else [f"stop.minutes={max(options.minutes - 1, 0.5)}", "data.validation_batch=2000"]
    )
    seeds, jobs = ("0", "1") if options.rehearse else ("0,1", "6")  # as many runs as jobs: all stop at once
    stage = _pipeline("cells", 60 * options.minutes, "compare.py", *recipes, f"seeds={seeds}", f"jobs={jobs}", *words)
    return [replace(stage, folder=options.out, goes_on=True)]
