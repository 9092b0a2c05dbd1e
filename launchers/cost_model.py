"""Write the tables of launchers/README.md: bytes sent in a step of ResNet-50 → MobileNetV1, and its time.

    python launchers/cost_model.py            write the tables
    python launchers/cost_model.py --check    exit with 1 if the file differs from what would be written

This is a model, not a measurement. Parameters, multiply-accumulates (MACs) and bytes are counted from the recipes.
Speeds are the vendors' figures.
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
from pipeline.config.tables import table_cells
from pipeline.errors import ROOT
from pipeline.losses._registry import LossSpec
from pipeline.losses._rows import BatchLoss

README = ROOT / "launchers" / "README.md"
BEGIN, END = "<!-- written by cost_model.py -->\n", "<!-- end -->\n"
PAIR = ROOT / "configs" / "imagenet" / "r50_mbv1.yaml"
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
"""GPUs per node."""
BUCKET = 8 * 2**20
"""Size of DDP's gradient buckets in bytes (bucket_cap_mb in pipeline/training/accelerator.py)."""
TRAIN_IMAGES = 1_281_167

PUBLISHED_IMAGES = 2_470
"""ResNet-50 training images/s of one A100 80GB in mixed precision, NVIDIA DeepLearningExamples (21.03 container)."""
NVLINK = 235e9
"""Bytes/s sent by a GPU inside an A100 node, according to NCCL's own model; NVLink 3 has 300e9."""
BASE, NVLINK_HOP, RING_BASE, RING_NVLINK_HOP = 4.4e-6, 0.52e-6, 3.6e-6, 0.47e-6
"""Latencies of a tree and of a ring in seconds, from NCCL's own model of the low-latency protocol."""
SEVERAL_NODES = 1.8
"""Factor of the latencies inside a node if there are several nodes."""


class Interconnect(NamedTuple):
    """A network between nodes."""

    name: str
    bandwidth: float
    """Bytes/s sent by a node over all its adapters."""
    tree_hop: float
    """Latency from node to node in a tree, in seconds."""
    ring_hop: float
    """Latency from node to node in a ring, in seconds."""


LINE_RATE = 0.8
"""Share of an adapter's nominal speed for large messages; an assumption."""
INFINIBAND_8 = Interconnect("8 × 200 Gb/s InfiniBand", LINE_RATE * 200e9, 5e-6, 2.7e-6)
INFINIBAND_1 = Interconnect("1 × 400 Gb/s InfiniBand", LINE_RATE * 50e9, 5e-6, 2.7e-6)
ETHERNET = Interconnect("25 Gb/s Ethernet", LINE_RATE * 3.125e9, 30e-6, 30e-6)
NETWORKS = (INFINIBAND_8, INFINIBAND_1, ETHERNET)


class Message(NamedTuple):
    """A collective in a step."""

    kind: str
    """``all-reduce``, ``all-gather`` or ``reduce-scatter``."""
    bytes: int
    """Bytes of this rank's input."""


class Shapes(NamedTuple):
    """Shapes of the taps and the logits, without the batch dimension."""

    student: dict[str, tuple[int, ...]]
    teacher: dict[str, tuple[int, ...]]


def messages(specs: Iterable[LossSpec], shapes: Shapes, rows: int, ranks: int) -> list[Message]:
    """Return all collectives of some losses in a step, with float32 logits and ``rows`` rows per rank."""
    return [message for spec in specs for message in _loss_messages(spec, shapes, rows, ranks)]


def _loss_messages(spec: LossSpec, shapes: Shapes, rows: int, ranks: int) -> Iterator[Message]:
    """Yield the collectives of a loss and of the losses inside it. Raises ValueError for a loss without a formula."""
    classes = shapes.student["logits"][0]
    scope = _stat_scope(spec)
    if spec.name == "perception" and scope == "global":  # float64: a count, and two sums per column and network
        yield from (Message("all-reduce", 8 * (1 + 4 * classes)), Message("all-reduce", 8 * 2 * classes))
    elif spec.name == "dist" and scope == "global":  # a count and column sums, then products; and backward
        both = Message("all-reduce", 4 * (1 + 2 * classes)), Message("all-reduce", 4 * 3 * classes)
        yield from (*both, *both[::-1])
    elif spec.name == "crd":  # ids, and the embeddings of both networks, for the banks
        yield from (Message("all-gather", 8 * rows), Message("all-gather", 4 * 2 * spec.config.dim * rows))
    elif issubclass(spec.loss, BatchLoss) and scope == "global":
        yield from _batch_loss_messages(spec, shapes, rows, ranks)
    elif spec.loss.scope != "sample" and scope == "global":
        raise ValueError(
            f"{spec.name}: the collectives of this loss have no formula: add one to launchers/cost_model.py"
        )
    for _, value in spec.config:
        if isinstance(value, LossSpec):
            yield from _loss_messages(value, shapes, rows, ranks)


def _batch_loss_messages(spec: LossSpec, shapes: Shapes, rows: int, ranks: int) -> Iterator[Message]:
    """Yield the collectives of a loss over the rows of all ranks.

    They gather labels with ids, and the outputs of both networks, and scatter the gradient of the student's outputs.
    Raises ValueError for a loss that overrides ``BatchLoss.reduce``.
    """
    if spec.loss.reduce is not BatchLoss.reduce:
        raise ValueError(
            f"{spec.name}: the collectives of this loss have no formula: add one to launchers/cost_model.py"
        )
    taps = spec.config.taps()
    student, teacher = (
        4 * rows * sum(prod(by_tap[name]) for name in (*names, "logits"))
        for by_tap, names in ((shapes.student, taps.student), (shapes.teacher, taps.teacher))
    )
    # Labels and ids travel as one int64 tensor.
    yield from (Message("all-gather", size) for size in (2 * 8 * rows, student, teacher))
    yield Message("reduce-scatter", student * ranks)


def _stat_scope(spec: LossSpec) -> str:
    config = getattr(spec.config, "diffusion", spec.config)
    return getattr(config, "stat_scope", "global")


class StepCost(NamedTuple):
    """The time of a training step, in seconds."""

    compute: float
    exposed: float
    """Time of the gradients' all-reduces that does not overlap with the backward."""
    blocking: float
    """Time of the losses' collectives, which block the next operation, and of the periodic ones."""

    @property
    def seconds(self) -> float:
        """Return the sum of all parts."""
        return self.compute + self.exposed + self.blocking


class Method(NamedTuple):
    """A method's recipe, with the sizes of its networks."""

    name: str
    recipe: Recipe
    report: Report

    @property
    def gradients(self) -> int:
        """Return the bytes of all trained parameters' gradients, which are float32 even under autocast."""
        return 4 * (self.report.student.parameters + sum(self.report.auxiliary.values()))

    def messages(self, rows: int, ranks: int) -> list[Message]:
        """Return the collectives of its losses in a step."""
        teacher = self.report.teachers[0].shapes if self.report.teachers else {}
        return messages(self.recipe.losses.values(), Shapes(self.report.student.shapes, teacher), rows, ranks)

    def auxiliary_macs(self, rows: int, ranks: int) -> float:
        """Return the losses' forward MACs on a rank, over its own rows or over the rows of all ranks."""
        if not any(issubclass(spec.loss, BatchLoss) for spec in self.recipe.losses.values()):
            return rows * self.report.auxiliary_macs
        return rows * ranks * _auxiliary_macs(self.name, rows * ranks)

    def step(self, nodes: int, rows: int, network: Interconnect, rate: float) -> StepCost:
        """Return the time of a step with ``rows`` images per GPU, on GPUs of ``rate`` FLOP/s."""
        trained = rows * self.report.student.macs + self.auxiliary_macs(rows, nodes * GPUS)
        # A MAC is two FLOP, and a backward costs two forwards. Teachers have no backward.
        backward = 2 * 2 * trained / rate
        compute = 2 * (trained + rows * sum(teacher.macs for teacher in self.report.teachers)) / rate + backward
        buckets = ceil(self.gradients / BUCKET)
        bucket = seconds(Message("all-reduce", self.gradients // buckets), nodes, network)
        blocking = sum(seconds(message, nodes, network) for message in self.messages(rows, nodes * GPUS))
        # The last bucket is ready when the backward ends, so at least one bucket is never hidden.
        exposed = max(bucket, buckets * bucket - backward)
        return StepCost(compute, exposed, blocking + self.periodic(nodes, network))

    def periodic(self, nodes: int, network: Interconnect) -> float:
        """Return a step's share of the collectives every few steps: stop flag, loss parts, non-finite counts."""
        small = seconds(Message("all-reduce", 8), nodes, network)
        return small / self.recipe.checkpoints.poll_steps + 2 * small / self.recipe.journal.every_steps


def seconds(message: Message, nodes: int, network: Interconnect) -> float:
    """Return the seconds of a collective: its latency, plus its bytes divided by the slowest link's bandwidth."""
    sent = volume(message, nodes * GPUS)
    # NCCL's rings together use every adapter of a node, and each ring crosses from node to node once.
    return _latency(message.kind, nodes, network) + sent / (min(NVLINK, network.bandwidth) if nodes > 1 else NVLINK)


def volume(message: Message, ranks: int) -> float:
    """Return the bytes that a rank sends on a ring of n ranks.

    For a message of s bytes an all-reduce sends 2(n−1)/n·s, an all-gather (n−1)·s, a reduce-scatter (n−1)/n·s.
    """
    share = {"all-reduce": 2 / ranks, "all-gather": 1, "reduce-scatter": 1 / ranks}[message.kind]
    return (ranks - 1) * share * message.bytes


def _latency(kind: str, nodes: int, network: Interconnect) -> float:
    factor = SEVERAL_NODES if nodes > 1 else 1
    if kind == "all-reduce":  # a chain inside the node and a tree over the nodes, in both directions
        return BASE + 2 * ((GPUS - 1) * factor * NVLINK_HOP + log2(nodes) * network.tree_hop)
    return RING_BASE + nodes * (GPUS - 1) * factor * RING_NVLINK_HOP + (nodes - 1) * network.ring_hop


@cache
def _auxiliary_macs(method: str, batch: int) -> float:
    """Return the losses' MACs per image in a batch of that size."""
    return summarize(load_recipe(PAIR, [f"method={method}", f"batch={batch}"])).auxiliary_macs


def methods() -> list[Method]:
    """Return all methods of the pair's table."""
    names = sorted(str(cell.method) for cell in table_cells([PAIR], ()))
    loaded = {name: load_recipe(PAIR, [f"method={name}"]) for name in names}
    return [Method(name, run.recipe, summarize(run)) for name, run in loaded.items()]


def published_rate(found: list[Method]) -> float:
    """Return the FLOP/s of the published ResNet-50 training, whose backward costs two forwards."""
    teacher = next(method.report.teachers[0] for method in found if method.report.teachers)
    return PUBLISHED_IMAGES * 3 * 2 * teacher.macs


def readme(found: list[Method]) -> str:
    """Return the text of README.md with its tables replaced."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rate = published_rate(found)
    ddkd = next(method for method in found if method.name == "ddkd")
    tables = (bytes_table(found), cost_table(found, rate), *(batch_table(ddkd, batch, rate) for batch in (256, 2048)))
    return before + BEGIN + "\n".join(tables) + END + after


ROWS = 32
"""Images per GPU if the batch grows with the number of GPUs: the recipes' batch of 256 divided by a node's GPUs."""


def bytes_table(found: list[Method]) -> str:
    """Return the table of every method's computation and bytes sent in a step."""
    nodes, ranks = 8, 8 * GPUS
    head = ["method", "parameters of the losses", "GMAC per image", "gradients, MB"]
    head += ["collectives of the losses", "bytes of these, kB", "total sent, MB"]
    title = f"### Bytes per step and rank\n\n{ROWS} images per GPU, {ranks} ranks ({nodes} nodes). Once per epoch "
    lines = [f"{title}{statistics(found[0]) / 1e3:,.0f} kB more, for the student's statistics.\n", *_head(head)]
    for method in found:
        collectives = method.messages(ROWS, ranks)
        sent = volume(Message("all-reduce", method.gradients), ranks) + sum(volume(one, ranks) for one in collectives)
        parameters, gmac = sum(method.report.auxiliary.values()), method.report.training_macs / 1e9
        cells = [f"`{method.name}`", f"{parameters:,}", f"{gmac:.2f}", f"{method.gradients / 1e6:.1f}"]
        input_kb = sum(one.bytes for one in collectives) / 1e3
        lines.append(_line([*cells, str(len(collectives)), f"{input_kb:,.0f}", f"{sent / 1e6:.1f}"]))
    return "\n".join(lines) + "\n"


def statistics(method: Method) -> int:
    """Return the bytes of the student's floating-point buffers, which are averaged in float64."""
    with torch.device("meta"):  # no memory is allocated: only sizes are needed
        config = method.recipe.student
        student = student_spec(config, method.recipe.taps.student).build(method.report.student.shapes["logits"][0])
    return 8 * sum(buffer.numel() for buffer in student.buffers() if buffer.is_floating_point())


def cost_table(found: list[Method], rate: float) -> str:
    """Return the table of every method's step time if the batch grows with the GPUs."""
    lines = [
        f"### Milliseconds per step, {ROWS} images per GPU\n\nThe global batch grows with the GPUs. "
        f"Each node has {INFINIBAND_8.name}; the values in brackets are for {ETHERNET.name}.\n",
        *_head(["method", "images/s per node", "compute, 1 node", *(_nodes(nodes) for nodes in NODES)]),
    ]
    for method in found:
        steps = [[method.step(nodes, ROWS, network, rate) for network in (INFINIBAND_8, ETHERNET)] for nodes in NODES]
        alone = steps[0][0]
        cells = [f"{_ms(fast.seconds)} ({1e3 * slow.seconds:,.0f})" for fast, slow in steps[1:]]
        speed = f"{GPUS * ROWS / alone.seconds:,.0f}"
        lines.append(_line([f"`{method.name}`", speed, _ms(alone.compute), _ms(alone.seconds), *cells]))
    return "\n".join(lines) + "\n"


def batch_table(method: Method, batch: int, rate: float) -> str:
    """Return the table of a fixed global batch over nodes: step time on each network, and images read per node."""
    names = [network.name for network in NETWORKS]
    lines = [
        f"### `{method.name}`, a global batch of {batch:,}\n\nMilliseconds per step, in brackets those that are not "
        "compute, and the efficiency relative to linear scaling from one node.\n",
        *_head(["nodes", "images per GPU", *names, f"images/s per node, {NETWORKS[0].name}", "minutes per epoch"]),
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
    """Write the file, or compare it, and return the exit code."""
    wanted = readme(methods())
    if only_check and wanted != README.read_text():
        print("launchers/README.md: the tables are out of date: run python launchers/cost_model.py")
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:] == ["--check"]))
