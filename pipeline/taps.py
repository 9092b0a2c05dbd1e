"""What a network computes on the way: features at canonical stages, captured by hooks on an unchanged model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.models.stages import find_stage


class FeatureTaps(nn.Module):
    """A model whose forward returns ``Outputs``: its logits, and the features that were asked for.

    ``stages`` maps stage names to module paths (``pipeline.models.stages``). The names in ``wanted``, aliases such as
    ``last`` among them, are the keys of ``Outputs.features``. The plain network, whose state dict is the one to export,
    is ``.model``. Raises ValueError where a stage or its module does not exist.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, str], wanted: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.paths = {name: find_stage(stages, name) for name in sorted(set(wanted))}
        self._captured: dict[str, tuple[Tensor, int]] | None = None
        for path in sorted(set(self.paths.values())):
            self._watch(path)
        for module in model.modules() if self.paths else ():
            if getattr(module, "inplace", False):
                module.register_forward_pre_hook(self._spare_taps)

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Return the model's outputs; nothing is kept between calls.

        Raises ValueError where a tapped module was not called, or where the network overwrote what was captured.
        """
        self._captured = captured = {}
        try:
            logits_BK = self.model(images_BCHW)
        finally:
            self._captured = None
        if not isinstance(logits_BK, Tensor):
            raise ValueError(f"{_type(self.model)} returned a {_type(logits_BK)}, expected one tensor of logits")
        return Outputs(logits_BK, {name: self._intact(name, path, captured) for name, path in self.paths.items()})

    def tapped_modules(self) -> set[nn.Module]:
        """Return the modules whose input or output is captured."""
        return {self._module_at(path) for path in self.paths.values()}

    def _intact(self, name: str, path: str, captured: dict[str, tuple[Tensor, int]]) -> Tensor:
        if path not in captured:
            raise ValueError(f"tap {name!r}: the forward of {_type(self.model)} never called its module {path!r}")
        value, version = captured[path]
        if version != _version(value):
            raise ValueError(f"tap {name!r}: {_type(self.model)} overwrites {path!r} in place; tap another module")
        return value

    def _watch(self, path: str) -> None:
        # Bound methods, unlike closures, follow a deep copy of this module to the copy.
        if path.endswith(":in"):
            self._module_at(path).register_forward_pre_hook(partial(self._keep_input, path))
        else:
            self._module_at(path).register_forward_hook(partial(self._keep_output, path))

    def _module_at(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path.removesuffix(":in"))
        except AttributeError as error:
            name = next(name for name, known in self.paths.items() if known == path)
            raise ValueError(f"stage {name!r}: {_type(self.model)} has no module {path!r}: {error}") from error

    def _keep_input(self, path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(path, args[0])

    def _keep_output(self, path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._keep(path, output)

    def _keep(self, path: str, value: Any) -> None:
        if self._captured is None:  # the plain model is running, outside this module's forward
            return
        if not isinstance(value, Tensor):
            raise ValueError(f"tap at {path!r}: expected one tensor there, got a {_type(value)}")
        self._captured[path] = (value, _version(value))

    def _spare_taps(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Stop, for good, an in-place activation that is about to overwrite a captured tensor."""
        if self._captured and any(arg is value for arg in args for value, _ in self._captured.values()):
            module.inplace = False  # type: ignore[assignment]


def tap_shapes(taps: FeatureTaps, image_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tap and of ``logits``, without the batch, on square images of ``image_size`` pixels.

    One forward in evaluation mode: BatchNorm statistics, random states and the modules' modes stay as they are.
    """
    parameter = next(taps.parameters())
    image_1CHW = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    with evaluating(taps), torch.no_grad():
        outputs = taps(image_1CHW)
    found = {**outputs.features, "logits": outputs.logits_BK}
    return {name: tuple(value.shape[1:]) for name, value in found.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode; every module within gets its own mode back."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written in place; inference mode and compiled code do not count."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _type(value: object) -> str:
    return type(value).__name__
