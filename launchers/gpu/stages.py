"""The stages of the three commands, with their command lines and time limits."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from options import Options

from pipeline.config.source import known_methods

CHECKOUT = Path(__file__).resolve().parents[2]
CIFAR_PAIR, IMAGENET_PAIR = "configs/cifar100/resnet56_resnet20.yaml", "configs/imagenet/r50_mbv1.yaml"
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
        _check("side", 120, options, **DETERMINISTIC),
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
    if method not in ("ce", "dml", "pcl", "mmt"):
        weights = options.weights or options.inputs / "resnet56.pt"
        overrides += [f"teacher={{recipe: null, model: cifar_resnet56, weights: {weights}}}"]
    return overrides


def all_methods() -> list[str]:
    """Return the methods that need no earlier run, no masks, no boxes and no larger images."""
    left_out = ("ab", "fsp", "ft", "pad", "subclass_kd", "box_l1", "detection", "fgd", "ifvd", "segmentation")
    left_out += ("l1", "image_l1", "fakd", "srkd", "pisr", "pisr_teacher")
    in_stages = ("rco", "snapshot_distillation", "sskd")
    return [name for name in known_methods() if name not in left_out and not name.startswith(in_stages)]


def short_run(options: Options, method: str) -> list[str]:
    """Return a method's recipe of the CIFAR pair and its overrides, with a small batch in a rehearsal."""
    return [
        CIFAR_PAIR,
        f"method={method}",
        *cifar_overrides(options, method),
        *(["batch=16"] if options.rehearse else []),
    ]


def imagenet_run(options: Options, method: str) -> list[str]:
    """Return a method's recipe of the ImageNet pair and its overrides, which run on noise."""
    overrides = [f"method={method}", f"data.path={options.inputs / 'imagenet'}", "data.loader=synthetic"]
    overrides += [f"data.size={options.imagenet_size}", f"batch={options.imagenet_batch}"]
    if method != "ce":
        overrides += [f"teacher.weights={options.inputs / 'resnet50.pt'}", "teacher.expect=null"]
    return [IMAGENET_PAIR, *overrides]


def _speed_stages(options: Options) -> list[HalfHourStage]:
    """Return the stages that measure speed."""
    records = f"out={options.out}/records"
    repeats = ["repeats=2", "steps=2", "warmup=1"] if options.rehearse else ["repeats=7", "steps=20", "warmup=5"]
    methods = ("ce", "kd") if options.rehearse else METHODS

    def bench(name: str, seconds: float, part: str, *recipe: str) -> HalfHourStage:
        return _pipeline(name, seconds, "bench.py", part, *recipe, records, *repeats)

    def step_stages(name: str, seconds: float, *recipe: str) -> list[HalfHourStage]:
        """Return two stages for a step: eager, which also measures the step's parts, and as a CUDA graph."""
        graph = "graph=auto" if options.rehearse else "graph=true"
        eager = bench(name, seconds, "step", *recipe, "graph=false")
        return [eager, bench(f"{name}-graph", seconds, "step", *recipe, graph)]

    stages = [s for m in methods for s in step_stages(f"cifar-{m}", 40, *short_run(options, m))]
    stages += [s for m in methods for s in step_stages(f"imagenet-{m}", 60, *imagenet_run(options, m))]
    for key in ("student.compile", "teacher.compile", "losses.ddkd.diffusion.compile"):
        name = f"ddkd-{key.split('.')[-2]}-compiled"
        recipe = [*imagenet_run(options, "ddkd"), f"{key}=true"]
        stages += [] if options.rehearse else [bench(name, 120, "step", *recipe)]
    # The compiler joins a folded convolution's bias, the sum with the shortcut and the ReLU into one kernel.
    recipe = [*short_run(options, "kd"), "teacher.compile=true", "graph=true"]
    stages += [] if options.rehearse else [bench("cifar-kd-teacher-compiled", 90, "step", *recipe)]
    method = "kd" if options.rehearse else "ddkd"
    stages += [bench(f"losses-{method}", 60, "losses", *imagenet_run(options, method))]
    loader = [f"data.path={options.jpeg_shards}", f"batch={8 if options.rehearse else 128}", "data.resize=null"]
    stages.append(bench("loader", 60, "loader", IMAGENET_PAIR, "method=ce", *loader))
    tune = _pipeline("loader-tune", 90, "bench.py", "loader", IMAGENET_PAIR, "method=ce", *loader, records, "--tune")
    # What it finds is stored in the folder of results, and not for this user's later runs.
    return [*stages, replace(tune, environment={"XDG_CACHE_HOME": f"{options.out}/cache"})]


def _table_stages(options: Options) -> list[HalfHourStage]:
    """Return the stage that trains results for CIFAR-100's tables: three methods with two seeds each."""
    methods = ("kd",) if options.rehearse else ("kd", "dkd", "perception")
    recipe = [str(CHECKOUT / CIFAR_PAIR), f"methods={','.join(methods)}"]
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
    seeds = "0" if options.rehearse else "0,1"
    # All runs together, so that they stop at the same time.
    stage = _pipeline("cells", 60 * options.minutes, "compare.py", *recipe, f"seeds={seeds}", "side=6", *overrides)
    # It passes when its minutes are over, with unfinished runs, which the next call continues.
    return [replace(stage, folder=options.out, rerun_if_passed=True)]
