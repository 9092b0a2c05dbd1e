"""A trained student as the formats take it, and its trace, which names the operation that cannot be exported."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.runs.card import CARD, Card

_OPERATION = re.compile(r"(?:torch\.ops\.|op='|target=)?\b((?:aten|torchvision|prims)(?:\.|::)\w+)")
_PLACE = re.compile(r"Caused by: \((\S+:\d+) in (\w+)\)")
_COLOUR = re.compile(r"\x1b\[\d*m|\[\d+m")
AT_ONCE = 64
"""Images that run through a network at once."""
CARD_FILE = f"{CARD}.json"
"""Name of the extra file of a .pt2 or TorchScript file, and of the file in a folder, that holds the student's card."""


class TrainedStudent(NamedTuple):
    """A student in evaluation mode, in float32 on the CPU."""

    model: nn.Module
    images_BCHW: Tensor
    """Some normalised validation images."""
    logits_BK: Tensor
    """The student's logits of these images, before BatchNorms were folded."""
    card: Card
    folded: bool = False
    """Whether BatchNorms are folded into convolutions, so that the weights are no longer those of the factory."""
    description: str = ""
    """The model card, in Markdown."""
    other_size: tuple[Tensor, Tensor] | None = None
    """Images of another height and width, and the student's answers, of a network that takes any."""

    @property
    def two_images(self) -> Tensor:
        """Return two images for a trace: torch takes a dimension of size one for a constant."""
        return self.images_BCHW[[0, min(1, len(self.images_BCHW) - 1)]].contiguous()

    @property
    def card_text(self) -> str:
        """Return the student's card as JSON."""
        return self.card.metadata()[CARD]


def inference(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the network as a function without gradients, from images [B, C, H, W] to logits [B, K]."""

    def run(images_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images_BCHW)

    return run


def trace_student(student: TrainedStudent, *, any_size: bool = False) -> torch.export.ExportedProgram:
    """Return the program of the network for any number of images. Raises RecipeError that names what prevents it.

    With ``any_size``, or for a student with images of another size, it is for any height and width, too, if the network
    is.
    """
    example, sizes = student.two_images, ({0: torch.export.Dim("batch")},)
    if any_size or student.other_size:
        sizes = ({**sizes[0], 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    with naming_operations(), torch.no_grad():
        program = torch.export.export(student.model, (example,), dynamic_shapes=sizes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names this machine's folders
    return program


@contextmanager
def naming_operations() -> Iterator[None]:
    """Turn an error of torch's exporters into one line, and keep what they print to themselves."""
    printed, quiet = io.StringIO(), logging.getLogger("torch")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except Exception as error:  # torch.export runs the network's own code, and dozens of kinds of errors come from it
        raise RecipeError(f"the network cannot be exported: {reason(error, printed.getvalue())}") from error
    finally:
        quiet.setLevel(level)


def reason(error: BaseException, printed: str = "") -> str:
    """Return in one line what prevents an export: the operation, its site in the network's code, torch's words.

    ``printed`` is what torch printed: for a branch on a tensor's value, the operations up to the one that reads it.
    """
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    texts = [_COLOUR.sub("", str(each)) for each in reversed(chain)]
    said = next((found for text in texts if (found := _OPERATION.search(text))), None)
    read = _OPERATION.findall(printed)
    operation = said[1] if said else read[-1] if read else None
    line = next((found for text in texts if (found := _PLACE.search(text))), None)
    words = next((text for text in texts if text.strip()), type(error).__name__)
    first = " ".join(words.partition("\n")[0].split())[:200]
    where = f" ({line[1]} in {line[2]})" if line else ""
    return f"the operation {operation}{where}: {first}" if operation else f"{first}{where}"
