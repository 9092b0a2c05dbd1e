"""What a network computes on the way: features at canonical stages, captured by hooks on an unchanged model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.features.names import canonical, deep_stages, find_stage

CAM = "cam"
"""The tap that is computed: the class activation map [K, H, W], Zhou et al., CVPR 2016, eq. 2, without the bias."""

LAYOUTS = {"nhwc": "BHWC", "tokens": "BNC"}
TOKENS = r"tokens(\+(?P<prefix>\d+)(@(?P<rows>\d+)x(?P<columns>\d+))?)?"
TOKENS_BEFORE = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens", "storage_tokens")
"""What networks call the parameters that they put before the tokens of the image."""
MOST_BEFORE = 32
"""Tokens of no place that are looked for where neither recipe nor network say how many there are."""
TAP_SYNTAX = re.compile(rf"[^:]*(?P<input>:in)?(:(?P<layout>nhwc|{TOKENS}))?(:(?P<channels>\d+))?")


class NormParameters(NamedTuple):
    """Scale and shift of a BatchNorm, per channel."""

    weight_C: Tensor
    bias_C: Tensor


class Form(NamedTuple):
    """How a place's tensor is to be read."""

    layout: str | None
    """One of LAYOUTS; None for [B, C, H, W] and for what is no map."""
    channels: int | None
    """How many the map must have, where that was said."""
    prefixes: tuple[int, ...] = ()
    """How many tokens may stand before those of the map, the likeliest first, where recipe or network say it."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the map's tokens, where that was said."""


class FeatureTaps(nn.Module):
    """A model whose forward returns ``Outputs``: its logits, and the features that were asked for.

    ``stages`` maps stage names to module paths (``pipeline.models.stages``). The names in ``wanted`` are the keys of
    ``Outputs.features``: aliases such as ``last`` keep theirs, ``all`` and ``all.preact`` become those of every stage,
    and ``cam`` is the class activation map. Maps are [B, C, H, W] whatever the network computes them as. The plain
    network, whose state dict is the one to export, is ``.model``. Raises ValueError where a stage or its module does
    not exist.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, str], wanted: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.stages = dict(stages)
        self.wanted = sorted({name for want in wanted for name in deep_stages(stages, want)})
        needed = {"map" if name == CAM else name for name in self.wanted}
        if CAM in self.wanted:
            self._linear_head()
        self.paths = {name: find_stage(stages, name) for name in sorted(needed)}
        self.forms: dict[str, Form] = {}
        self._captured: dict[str, tuple[Tensor, int]] | None = None
        names = {path: name for name, path in self.paths.items()}
        for path, name in names.items():
            self._watch(path, name)
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
            raise ValueError(
                f"{_type(self.model)} returned a {_type(logits_BK)}, expected one tensor of logits; give a factory "
                "whose network has no auxiliary heads"
            )
        image = (images_BCHW.shape[2], images_BCHW.shape[3])
        features = {name: self._intact(name, path, captured, image) for name, path in self.paths.items()}
        if CAM in self.wanted:
            features[CAM] = self._class_activation(features["map"])
        return Outputs(logits_BK, {name: features[name] for name in self.wanted})

    def tapped_modules(self) -> set[nn.Module]:
        """Return the modules whose input or output is captured."""
        return {self._module_at(path, name) for name, path in self.paths.items()}

    def norms(self) -> dict[str, NormParameters]:
        """Return copies of the parameters of the BatchNorm that ends each tapped ``.preact``, by the tap's name.

        A tap whose stage names none (``stageN.norm``) is left out. Raises ValueError where what it names is none.
        """
        taps = [tap for tap in self.paths if tap.endswith(".preact")]
        names = [canonical(self.stages, f"{tap.removesuffix('.preact')}.norm") for tap in taps]
        return {tap: self._norm(name) for tap, name in zip(taps, names, strict=True) if name in self.stages}

    def _norm(self, name: str) -> NormParameters:
        norm = self._module_at(self.stages[name], name)
        if not isinstance(norm, nn.BatchNorm2d) or not norm.affine:
            raise ValueError(
                f"stage {name!r}: {self.stages[name]!r} is a {_type(norm)}, expected a BatchNorm2d with scale and shift"
            )
        return NormParameters(norm.weight.detach().clone(), norm.bias.detach().clone())

    def _linear_head(self) -> nn.Linear:
        """Return the layer whose weights a class activation map takes. Raises ValueError where there is none."""
        head = self._module_at(self.stages["logits"], "logits") if {"map", "logits"} <= self.stages.keys() else None
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"tap {CAM!r}: no average of a map followed by one linear layer is known of {_type(self.model)}; "
                "name both by stages: {map: <module path>, logits: <module path>}"
            )
        return head

    def _class_activation(self, map_BCHW: Tensor) -> Tensor:
        """Return Σ_c w_kc · F_c at every pixel: what the linear head says of it before the average."""
        weight_KC = self._linear_head().weight
        if map_BCHW.ndim != 4 or map_BCHW.shape[1] != weight_KC.shape[1]:
            raise ValueError(
                f"tap {CAM!r}: the stage 'map' of {_type(self.model)} is shaped {list(map_BCHW.shape[1:])}, and its "
                f"linear head takes {weight_KC.shape[1]} channels"
            )
        return nn.functional.conv2d(map_BCHW, weight_KC[..., None, None])

    def _intact(self, name: str, path: str, captured: dict[str, tuple[Tensor, int]], image: tuple[int, int]) -> Tensor:
        if path not in captured:
            raise ValueError(f"tap {name!r}: the forward of {_type(self.model)} never called its module {path!r}")
        value, version = captured[path]
        if version != _version(value):
            raise ValueError(f"tap {name!r}: {_type(self.model)} overwrites {path!r} in place; tap another module")
        try:
            return _as_map(value, self.forms[path], image)
        except ValueError as error:
            raise ValueError(f"tap {name!r}: {_type(self.model)} computes at {path!r} {error}") from None

    def _watch(self, path: str, name: str) -> None:
        module = self._module_at(path, name)
        if (place := TAP_SYNTAX.fullmatch(path)) is None:
            ending = path.partition(":")[2]
            raise ValueError(
                f"stage {name!r}: {path!r} ends in {ending!r}; known are in, {', '.join(LAYOUTS)} and a number of "
                "channels, in this order, each after a colon"
            )
        layout, channels, rows = (place["layout"] or "")[:6] or None, place["channels"], place["rows"]
        self.forms[path] = Form(
            layout,
            int(channels) if channels else None,
            (int(place["prefix"]),) if place["prefix"] else prefix_tokens(self.model),
            (int(rows), int(place["columns"])) if rows else None,
        )
        # Bound methods, unlike closures, follow a deep copy of this module to the copy.
        if place["input"]:
            module.register_forward_pre_hook(partial(self._keep_input, path))
        else:
            module.register_forward_hook(partial(self._keep_output, path))

    def _module_at(self, path: str, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(path.partition(":")[0])
        except AttributeError as error:
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

    One forward in evaluation mode: BatchNorm statistics, random states and the modules' modes stay as they are. Raises
    ValueError where the network fails on such an image.
    """
    parameter = next(taps.parameters())
    image_1CHW = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    try:
        with evaluating(taps), torch.no_grad():
            outputs = taps(image_1CHW)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or _type(error)
        raise ValueError(f"{_type(taps.model)} cannot take images of {image_size} pixels: {reason}") from error
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


def _as_map(value: Tensor, form: Form, image: tuple[int, int]) -> Tensor:
    """Return what is in that form as a map [B, C, H, W]; without a layout it stays as it is.

    ``image`` is the height and width of what the network looked at.
    """
    map_BCHW = _turned(value, form, image)
    if form.channels and (map_BCHW.ndim != 4 or map_BCHW.shape[1] != form.channels):
        raise ValueError(
            f"a tensor shaped {list(value.shape)}, expected {form.channels} channels; say by stages where they are, as "
            "<module path>:nhwc or :tokens"
        )
    return map_BCHW


def _turned(value: Tensor, form: Form, image: tuple[int, int]) -> Tensor:
    """Return [B, H, W, C], or those of the tokens [B, N, C] that have a place in the image, as a map."""
    layout = form.layout
    if layout is None:
        return value
    if value.ndim != len(LAYOUTS[layout]):
        raise ValueError(f"a tensor shaped {list(value.shape)}, and :{layout} is for [{', '.join(LAYOUTS[layout])}]")
    if layout == "nhwc":
        return value.movedim(-1, 1)
    prefix, grid = _token_grid(value.shape[1], form, image)
    return value[:, prefix:].movedim(-1, 1).unflatten(2, grid)


def _token_grid(count: int, form: Form, image: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Return how many of ``count`` tokens have no place, and the rows and columns of the others.

    The map has the image's proportions unless its grid was said. Where nothing says how many have no place, they are as
    few as leave a map of whole patches, or a map at all.
    """
    fitting = []
    for prefix in form.prefixes or range(min(count, MOST_BEFORE)):
        rows = isqrt(max(count - prefix, 0) * image[0] // image[1])
        grid = form.grid or (rows, rows * image[1] // image[0])
        if grid[0] * grid[1] == count - prefix > 0:
            whole = bool(form.prefixes) or image[0] % grid[0] == image[1] % grid[1] == 0
            fitting.append((not whole, prefix, grid))
    if fitting:
        _, prefix, grid = fitting[0] if form.prefixes else min(fitting)
        return prefix, grid
    said = f", {form.prefixes[0]} of them before the map's" if form.prefixes else ""
    raise ValueError(
        f"{count} tokens{said}, which are no map of an image of {image[0]} × {image[1]}; say by stages how many stand "
        "before it, and its rows and columns, as <module path>:tokens+5@7x14"
    )


def prefix_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return how many tokens a network puts before those of the image, or none, before it does; () if it does not say.

    It says so as timm's networks do, or by the names of its parameters [1, N, C].
    """
    said = getattr(model, "num_prefix_tokens", None)
    if isinstance(said, int):
        return (said, 0)
    named = ((name.rpartition(".")[2], value) for name, value in model.named_parameters())
    found = [value.shape[1] for name, value in named if name in TOKENS_BEFORE and value.ndim == 3]
    return (sum(found), 0) if found else ()


def _version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written in place; inference mode and compiled code do not count."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _type(value: object) -> str:
    return type(value).__name__
