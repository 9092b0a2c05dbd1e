"""Write the tables of launchers/README.md: what a step of ResNet-50 → MobileNetV1 sends, and how long it takes.

    python launchers/cost_model.py            write them
    python launchers/cost_model.py --check    exit with 1 where the file is not what it would write

A model: parameters, multiply-accumulates and bytes are counted of the recipes themselves, speeds are what vendors say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from math import ceil, log2, prod
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from pipeline.builders.student import student_spec
from pipeline.builders.summary import Report, summarize
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.errors import ROOT
from pipeline.losses._registry import LossSpec
from pipeline.losses._rows import BatchLoss

README = ROOT / "launchers" / "README.md"
BEGIN, END = "<!-- written by cost_model.py -->\n", "<!-- end -->\n"
FOUND = sorted((ROOT / "configs/imagenet/r50_mbv1").glob("*.yaml"))
RECIPES = [path for path in FOUND if path.stem != "pair" and not path.stem.endswith("_cached")]
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
"""Of a node."""
BUCKET = 8 * 2**20
"""Bytes of gradients that DDP sends at once (bucket_cap_mb in pipeline/training/accelerator.py)."""
TRAIN_IMAGES = 1_281_167

PUBLISHED_IMAGES = 2_470
"""ResNet-50 training images/s of one A100 80GB in mixed precision, NVIDIA DeepLearningExamples (21.03 container)."""
NVLINK = 235e9
"""Bytes/s a GPU sends inside a node of A100: what NCCL's own model grants it of NVLink 3's 300e9."""
BASE, NVLINK_HOP, RING_BASE, RING_NVLINK_HOP = 4.4e-6, 0.52e-6, 3.6e-6, 0.47e-6
"""Seconds: NCCL's own model, low-latency protocol, of a tree and of a ring; inside one of several nodes × 1.8."""
SEVERAL_NODES = 1.8


class Interconnect(NamedTuple):
    """What lies between nodes."""

    name: str
    bandwidth: float
    """Bytes/s that a node sends, all its adapters together."""
    tree_hop: float
    """Seconds from node to node."""
    ring_hop: float


LINE_RATE = 0.8
"""Share of an adapter's nominal speed that large messages reach: an assumption."""
INFINIBAND_8 = Interconnect("8 × 200 Gb/s InfiniBand", LINE_RATE * 200e9, 5e-6, 2.7e-6)
INFINIBAND_1 = Interconnect("1 × 400 Gb/s InfiniBand", LINE_RATE * 50e9, 5e-6, 2.7e-6)
ETHERNET = Interconnect("25 Gb/s Ethernet", LINE_RATE * 3.125e9, 30e-6, 30e-6)
NETWORKS = (INFINIBAND_8, INFINIBAND_1, ETHERNET)


class Message(NamedTuple):
    """A collective of a step."""

    kind: str
    """``all-reduce``, ``all-gather`` or ``reduce-scatter``."""
    bytes: int
    """What this rank hands to it."""


class Shapes(NamedTuple):
    """Shapes of the taps and of the logits, without the batch."""

    student: dict[str, tuple[int, ...]]
    teacher: dict[str, tuple[int, ...]]


def messages(specs: Iterable[LossSpec], shapes: Shapes, rows: int, ranks: int) -> list[Message]:
    """Return what losses of float32 logits send in a step of that many rows a rank, forward, backward, after it."""
    return [message for spec in specs for message in _of_loss(spec, shapes, rows, ranks)]


def _of_loss(spec: LossSpec, shapes: Shapes, rows: int, ranks: int) -> Iterator[Message]:
    """Yield what one loss and those inside it send. Raises ValueError for a loss that this model does not know."""
    classes = shapes.student["logits"][0]
    scope = _stat_scope(spec)
    if spec.name == "perception" and scope == "global":  # float64: a count and two sums a column; the gradient's two
        yield from (Message("all-reduce", 8 * (1 + 4 * classes)), Message("all-reduce", 8 * 2 * classes))
    elif spec.name == "dist" and scope == "global":  # a count and the columns' sums, then their products; and back
        both = Message("all-reduce", 4 * (1 + 2 * classes)), Message("all-reduce", 4 * 3 * classes)
        yield from (*both, *both[::-1])
    elif spec.name == "crd":  # ids, and both networks' embeddings, for the banks
        yield from (Message("all-gather", 8 * rows), Message("all-gather", 4 * 2 * spec.config.dim * rows))
    elif issubclass(spec.loss, BatchLoss) and scope == "global":
        yield from _gathered(spec, shapes, rows, ranks)
    elif spec.loss.scope != "sample" and scope == "global":
        raise ValueError(f"{spec.name}: what it sends is not known here")
    for _, value in spec.config:
        if isinstance(value, LossSpec):
            yield from _of_loss(value, shapes, rows, ranks)


def _gathered(spec: LossSpec, shapes: Shapes, rows: int, ranks: int) -> Iterator[Message]:
    """Yield what a loss of all ranks' rows sends: labels and ids, both networks' outputs, the student's gradient."""
    if spec.loss.reduce is not BatchLoss.reduce:
        raise ValueError(f"{spec.name}: what it gathers is not known here")
    taps = spec.config.taps()
    student, teacher = (
        4 * rows * sum(prod(of[name]) for name in (*wanted, "logits"))
        for of, wanted in ((shapes.student, taps.student), (shapes.teacher, taps.teacher))
    )
    yield from (Message("all-gather", size) for size in (2 * 8 * rows, student, teacher))
    yield Message("reduce-scatter", student * ranks)


def _stat_scope(spec: LossSpec) -> str:
    config = getattr(spec.config, "diffusion", spec.config)
    return getattr(config, "stat_scope", "global")


class StepCost(NamedTuple):
    """A training step, in seconds."""

    compute: float
    exposed: float
    """Of the gradients' all-reduces: what no backward hides."""
    blocking: float
    """The losses' collectives, which the next operation waits for, and what is asked every few steps."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.exposed + self.blocking


class Method(NamedTuple):
    """A recipe, and what it is made of."""

    path: Path
    recipe: Recipe
    report: Report

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.path.stem

    @property
    def gradients(self) -> int:
        """Bytes of the trained parameters' gradients: float32, under autocast too."""
        return 4 * (self.report.student.parameters + sum(self.report.auxiliary.values()))

    def messages(self, rows: int, ranks: int) -> list[Message]:
        """Return what its losses send in a step."""
        teacher = self.report.teachers[0].shapes if self.report.teachers else {}
        return messages(self.recipe.losses.values(), Shapes(self.report.student.shapes, teacher), rows, ranks)

    def auxiliary_macs(self, rows: int, ranks: int) -> float:
        """Return the losses' multiply-accumulates forward on a rank: of its rows, or of all that it gathers."""
        if not any(issubclass(spec.loss, BatchLoss) for spec in self.recipe.losses.values()):
            return rows * self.report.auxiliary_macs
        return rows * ranks * _auxiliary_macs(self.path, rows * ranks)

    def step(self, nodes: int, rows: int, network: Interconnect, rate: float) -> StepCost:
        """Return a step of that many rows a GPU, on GPUs of ``rate`` FLOP/s."""
        trained = rows * self.report.student.macs + self.auxiliary_macs(rows, nodes * GPUS)
        backward = 2 * 2 * trained / rate
        compute = 2 * (trained + rows * sum(teacher.macs for teacher in self.report.teachers)) / rate + backward
        buckets = ceil(self.gradients / BUCKET)
        one = seconds(Message("all-reduce", self.gradients // buckets), nodes, network)
        blocking = sum(seconds(message, nodes, network) for message in self.messages(rows, nodes * GPUS))
        return StepCost(compute, max(one, buckets * one - backward), blocking + self.seldom(nodes, network))

    def seldom(self, nodes: int, network: Interconnect) -> float:
        """Return a step's share of what is asked every few steps: whether to stop, loss parts, what was not finite."""
        small = seconds(Message("all-reduce", 8), nodes, network)
        return small / self.recipe.checkpoints.poll_steps + 2 * small / self.recipe.journal.every_steps


def seconds(message: Message, nodes: int, network: Interconnect) -> float:
    """Return how long a collective takes: its latency, and its bytes over the narrower of NVLink and network."""
    sent = volume(message, nodes * GPUS)
    # Rings use every adapter of a node, and each ring crosses from node to node once.
    return _latency(message.kind, nodes, network) + sent / (min(NVLINK, network.bandwidth) if nodes > 1 else NVLINK)


def volume(message: Message, ranks: int) -> float:
    """Return the bytes that a rank sends on a ring: of its message of s bytes 2(n−1)/n·s, (n−1)·s or (n−1)/n·s."""
    share = {"all-reduce": 2 / ranks, "all-gather": 1, "reduce-scatter": 1 / ranks}[message.kind]
    return (ranks - 1) * share * message.bytes


def _latency(kind: str, nodes: int, network: Interconnect) -> float:
    inside = SEVERAL_NODES if nodes > 1 else 1
    if kind == "all-reduce":  # a chain inside the node, a tree over the nodes, up and down
        return BASE + 2 * ((GPUS - 1) * inside * NVLINK_HOP + log2(nodes) * network.tree_hop)
    return RING_BASE + nodes * (GPUS - 1) * inside * RING_NVLINK_HOP + (nodes - 1) * network.ring_hop


@cache
def _auxiliary_macs(path: Path, batch: int) -> float:
    """Return those of one image where that many are compared."""
    return summarize(load_recipe(path, [f"batch={batch}"])).auxiliary_macs


def methods() -> list[Method]:
    """Return every recipe of the pair."""
    loaded = [load_recipe(path) for path in RECIPES]
    return [Method(one.path, one.recipe, summarize(one)) for one in loaded]


def published_rate(found: list[Method]) -> float:
    """Return the FLOP/s of the published ResNet-50 training: a forward and twice as much of a backward."""
    teacher = next(method.report.teachers[0] for method in found if method.report.teachers)
    return PUBLISHED_IMAGES * 3 * 2 * teacher.macs


def readme(found: list[Method]) -> str:
    """Return README.md with its tables."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rate = published_rate(found)
    ddkd = next(method for method in found if method.name == "ddkd")
    tables = (bytes_table(found), cost_table(found, rate), *(batch_table(ddkd, batch, rate) for batch in (256, 2048)))
    return before + BEGIN + "\n".join(tables) + END + after


ROWS = 32
"""Images a GPU where the batch grows with the GPUs: the recipes' 256 on one node."""


def bytes_table(found: list[Method]) -> str:
    """Return what a step computes and what it sends, of every method."""
    nodes, ranks = 8, 8 * GPUS
    head = ["method", "parameters of its own", "GMAC an image", "gradients, MB"]
    head += ["collectives of its losses", "their bytes, kB", "sent in all, MB"]
    title = f"### Bytes of a step, a rank\n\n{ROWS} images a GPU, {ranks} ranks ({nodes} nodes). Once an epoch "
    lines = [f"{title}{statistics(found[0]) / 1e3:,.0f} kB more, of the student's statistics.\n", *_head(head)]
    for method in found:
        asked = method.messages(ROWS, ranks)
        sent = volume(Message("all-reduce", method.gradients), ranks) + sum(volume(one, ranks) for one in asked)
        own, gmac = sum(method.report.auxiliary.values()), method.report.training_macs / 1e9
        cells = [f"`{method.name}`", f"{own:,}", f"{gmac:.2f}", f"{method.gradients / 1e6:.1f}"]
        handed = sum(one.bytes for one in asked) / 1e3
        lines.append(_line([*cells, str(len(asked)), f"{handed:,.0f}", f"{sent / 1e6:.1f}"]))
    return "\n".join(lines) + "\n"


def statistics(method: Method) -> int:
    """Return the bytes of the student's floating-point buffers, averaged in float64."""
    with torch.device("meta"):
        config = method.recipe.student
        student = student_spec(config, method.recipe.taps.student).build(method.report.student.shapes["logits"][0])
    return 8 * sum(buffer.numel() for buffer in student.buffers() if buffer.is_floating_point())


def cost_table(found: list[Method], rate: float) -> str:
    """Return a step's time of every method where the batch grows with the GPUs."""
    lines = [
        f"### Milliseconds of a step, {ROWS} images a GPU\n\nThe global batch grows with the GPUs. {INFINIBAND_8.name} "
        f"a node; in brackets {ETHERNET.name}.\n",
        *_head(["method", "images/s a node", "compute, 1 node", *(_nodes(nodes) for nodes in NODES)]),
    ]
    for method in found:
        steps = [[method.step(nodes, ROWS, network, rate) for network in (INFINIBAND_8, ETHERNET)] for nodes in NODES]
        alone = steps[0][0]
        cells = [f"{_ms(fast.seconds)} ({1e3 * slow.seconds:,.0f})" for fast, slow in steps[1:]]
        speed = f"{GPUS * ROWS / alone.seconds:,.0f}"
        lines.append(_line([f"`{method.name}`", speed, _ms(alone.compute), _ms(alone.seconds), *cells]))
    return "\n".join(lines) + "\n"


def batch_table(method: Method, batch: int, rate: float) -> str:
    """Return how a fixed global batch scales over nodes, on each network, and the images a node then reads."""
    names = [network.name for network in NETWORKS]
    lines = [
        f"### `{method.name}`, a global batch of {batch:,}\n\nMilliseconds of a step (of them not compute), and what "
        "that is of linear scaling from one node.\n",
        *_head(["nodes", "images a GPU", *names, f"images/s a node, {NETWORKS[0].name}", "minutes an epoch"]),
    ]
    alone = method.step(1, batch // GPUS, INFINIBAND_8, rate).seconds
    for nodes in (nodes for nodes in NODES if batch >= nodes * GPUS):
        rows = batch // (nodes * GPUS)
        steps = [method.step(nodes, rows, network, rate) for network in NETWORKS]
        cells = [
            f"{1e3 * one.seconds:.2f} ({1e3 * (one.seconds - one.compute):.2f}), {alone / nodes / one.seconds:.0%}"
            for one in steps
        ]
        speed = batch / steps[0].seconds
        lines.append(
            _line([str(nodes), str(rows), *cells, f"{speed / nodes:,.0f}", f"{TRAIN_IMAGES / speed / 60:.2f}"])
        )
    return "\n".join(lines) + "\n"


def _ms(duration: float) -> str:
    return f"{1e3 * duration:,.0f}" if duration > 1 else f"{1e3 * duration:.1f}"


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number > 1 else ''}"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(only_check: bool) -> int:
    """Write, or compare, the file; return the exit code."""
    wanted = readme(methods())
    if only_check and wanted != README.read_text():
        print("launchers/README.md: run python launchers/cost_model.py")
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:] == ["--check"]))
