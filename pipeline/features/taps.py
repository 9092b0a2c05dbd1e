"""Taps: features at the canonical stages of a network, captured by hooks on an unchanged model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isqrt
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.features.names import canonical, deep_stages, find_stage
from pipeline.image_size import Resolution, height_width, size_text

CAM = "cam"
"""Name of the one tap that is computed, not captured: the class activation map [K, H, W].

It is Zhou et al., CVPR 2016, eq. 2, without the bias.
"""

LAYOUTS = {"nhwc": "BHWC", "tokens": "BNC"}
"""Dimensions of a tapped tensor by the layout's name in a stage's path."""
TOKENS = r"tokens(\+(?P<prefix>\d+)(@(?P<rows>\d+)x(?P<columns>\d+))?)?"
PREFIX_PARAMETERS = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens", "storage_tokens")
"""Names of the parameters that networks put before the tokens of the image (prefix tokens)."""
MOST_PREFIX_TOKENS = 32
"""Upper bound (exclusive) of the prefix tokens that are tried, if neither recipe nor network gives their number."""
TAP_SYNTAX = re.compile(rf"[^:]*(?P<input>:in)?(?P<copy>:copy)?(:(?P<layout>nhwc|{TOKENS}))?(:(?P<channels>\d+))?")
"""Syntax of a stage's path, of which several may be joined; ``pipeline.models.stages`` explains it."""
JOIN = "|"
"""Character between the paths of tensors whose channels are concatenated."""


class NormParameters(NamedTuple):
    """The scale and shift of a BatchNorm, per channel."""

    weight_C: Tensor
    bias_C: Tensor


class TensorFormat(NamedTuple):
    """The format of a tapped tensor, from the endings of its stage's path."""

    layout: str | None
    """One of ``LAYOUTS``; None for a map [B, C, H, W] and for a tensor that is not a map."""
    channels: int | None
    """Required number of channels of the map; None if the path does not give it."""
    prefixes: tuple[int, ...] = ()
    """Possible numbers of prefix tokens, likeliest first; empty if neither path nor network gives one."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the map's tokens; None if the path does not give them."""


class FeatureTaps(nn.Module):
    """A model whose forward returns ``Outputs``: its logits, or a map of them, and the features named in ``wanted``.

    ``stages`` maps stage names to module paths (``pipeline.models.stages``). The names in ``wanted`` become the keys of
    ``Outputs.features``. An alias such as ``last`` is kept as the key. ``all`` and ``all.preact`` are replaced by the
    names of every stage. ``cam`` is the class activation map. A name that ends in ``?`` is read where the network has
    such a stage.

    Maps are returned as [B, C, H, W], whatever layout the network uses. The plain network, whose state dict is the one
    to export, is ``.model``. The modules at the paths ``frozen`` stay in evaluation mode. Raises ValueError if a stage
    or its module does not exist.
    """

    def __init__(
        self, model: nn.Module, stages: Mapping[str, str], wanted: Iterable[str], frozen: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.frozen = tuple(frozen)
        self.stages = dict(stages)
        self.wanted = sorted({name for want in wanted for name in deep_stages(stages, want)})
        needed = {"map" if name == CAM else name for name in self.wanted}
        if CAM in self.wanted:
            self._linear_head()  # raises now, and not in the first forward, if there is no such layer
        self.paths = {name: find_stage(stages, name) for name in sorted(needed)}
        self.formats: dict[str, TensorFormat] = {}
        # Tensor and version by path while forward runs; None otherwise, when the hooks must do nothing.
        self._captured: dict[str, tuple[Tensor, int]] | None = None
        # Two names may share a path, which needs one hook only.
        names = {path: name for name, joined in self.paths.items() for path in joined.split(JOIN)}
        for path, name in names.items():
            self._add_hook(path, name)
        for module in model.modules() if self.paths else ():
            if getattr(module, "inplace", False):
                module.register_forward_pre_hook(self._protect_captured)

    def train(self, mode: bool = True) -> Self:
        """Put all modules in training mode, but those in ``frozen``; or all in evaluation mode."""
        super().train(mode)
        for path in self.frozen:
            self.model.get_submodule(path).eval()
        return self

    def forward(self, images_BCHW: Tensor, targets: Mapping[str, Tensor] | None = None) -> Outputs:
        """Return the logits and the wanted features; nothing is kept between calls.

        A network with ``takes_targets`` gets the batch's ``targets``, too. Raises ValueError if a tapped module was not
        called, or if the network overwrote a captured tensor in place.
        """
        self._captured = captured = {}
        more = (targets,) if getattr(self.model, "takes_targets", False) else ()
        try:
            logits = self.model(images_BCHW, *more)
        finally:
            self._captured = None
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{_type(self.model)} returned a {_type(logits)}, expected one tensor of logits; give a factory "
                "whose network has no auxiliary heads"
            )
        image_size = (images_BCHW.shape[2], images_BCHW.shape[3])
        features = {name: self._features(name, path, captured, image_size) for name, path in self.paths.items()}
        if CAM in self.wanted:
            features[CAM] = self._class_activation(features["map"])
        return Outputs(logits, {name: features[name] for name in self.wanted})

    def tapped_modules(self) -> set[nn.Module]:
        """Return the modules whose input or output is captured."""
        return {self._module_at(path, name) for name, joined in self.paths.items() for path in joined.split(JOIN)}

    def norms(self) -> dict[str, NormParameters]:
        """Return copies of the parameters of the BatchNorm that ends each tapped ``.preact``, by the tap's name.

        A tap is left out if its stage has no ``stageN.norm``. Raises ValueError if that module is not a BatchNorm.
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

    def linear_head(self) -> nn.Linear | None:
        """Return the layer that computes the logits; None if it is not one known linear layer."""
        head = self._module_at(self.stages["logits"], "logits") if "logits" in self.stages else None
        return head if isinstance(head, nn.Linear) else None

    def _linear_head(self) -> nn.Linear:
        """Return the layer whose weights the class activation map uses. Raises ValueError if there is none."""
        head = self._module_at(self.stages["logits"], "logits") if {"map", "logits"} <= self.stages.keys() else None
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"tap {CAM!r}: {_type(self.model)} has no known average of a map before one linear layer; "
                "name both under stages: {map: <module path>, logits: <module path>}"
            )
        # Known by its attribute: importing the networks takes seconds, and recipes are read without them.
        if hasattr(head, "scores"):
            raise ValueError(
                f"tap {CAM!r}: {_type(self.model)} has maps of subclasses, not of classes; remove subclasses"
            )
        return head

    def _class_activation(self, map_BCHW: Tensor) -> Tensor:
        """Return Σ_c w_kc · F_c at every pixel: the linear head applied before the average."""
        weight_KC = self._linear_head().weight
        if map_BCHW.ndim != 4 or map_BCHW.shape[1] != weight_KC.shape[1]:
            raise ValueError(
                f"tap {CAM!r}: the stage 'map' of {_type(self.model)} is shaped {list(map_BCHW.shape[1:])}, but its "
                f"linear head takes {weight_KC.shape[1]} channels"
            )
        return nn.functional.conv2d(map_BCHW, weight_KC[..., None, None])

    def _features(
        self, name: str, joined: str, captured: dict[str, tuple[Tensor, int]], image_size: tuple[int, int]
    ) -> Tensor:
        """Return the map at one path, or the maps at several, with their channels concatenated."""
        maps = [self._feature(name, path, captured, image_size) for path in joined.split(JOIN)]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)

    def _feature(
        self, name: str, path: str, captured: dict[str, tuple[Tensor, int]], image_size: tuple[int, int]
    ) -> Tensor:
        """Return a captured tensor as a map. Raises ValueError if it is missing, overwritten or of another shape."""
        if path not in captured:
            raise ValueError(f"tap {name!r}: the forward of {_type(self.model)} never called its module {path!r}")
        value, version = captured[path]
        # Checked here because not every in-place operation is a module with ``inplace``, which the hooks can stop.
        if version != _version(value):
            raise ValueError(f"tap {name!r}: {_type(self.model)} overwrites {path!r} in place; tap another module")
        try:
            return _as_map(value, self.formats[path], image_size)
        except ValueError as error:
            raise ValueError(f"tap {name!r}: {_type(self.model)} computes at {path!r} {error}") from None

    def _add_hook(self, path: str, name: str) -> None:
        """Capture the input or output of the module at ``path``. Raises ValueError if the path cannot be parsed."""
        module = self._module_at(path, name)
        if (parsed := TAP_SYNTAX.fullmatch(path)) is None:
            ending = path.partition(":")[2]
            raise ValueError(
                f"stage {name!r}: {path!r} ends in {ending!r}; allowed are in, copy, {', '.join(LAYOUTS)} and a number "
                "of channels, in this order, each after a colon"
            )
        layout = (parsed["layout"] or "")[:6] or None  # without the numbers after "tokens"
        channels, rows = parsed["channels"], parsed["rows"]
        self.formats[path] = TensorFormat(
            layout,
            int(channels) if channels else None,
            (int(parsed["prefix"]),) if parsed["prefix"] else prefix_tokens(self.model),
            (int(rows), int(parsed["columns"])) if rows else None,
        )
        # Bound methods, because ``deepcopy`` binds them to the copied module. Closures would still refer to this one.
        copied = parsed["copy"] is not None
        if parsed["input"]:
            module.register_forward_pre_hook(partial(self._keep_input, path, copied))
        else:
            module.register_forward_hook(partial(self._keep_output, path, copied))

    def _module_at(self, path: str, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(path.partition(":")[0])
        except AttributeError as error:
            raise ValueError(f"stage {name!r}: {_type(self.model)} has no module {path!r}: {error}") from error

    def _keep_input(self, path: str, copied: bool, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(path, copied, args[0])

    def _keep_output(self, path: str, copied: bool, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._keep(path, copied, output)

    def _keep(self, path: str, copied: bool, value: Any) -> None:
        if self._captured is None:  # the plain model is running, outside this module's forward
            return
        if not isinstance(value, Tensor):
            raise ValueError(f"tap at {path!r}: expected one tensor there, got a {_type(value)}")
        value = value.clone() if copied else value
        self._captured[path] = (value, _version(value))

    def _protect_captured(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Switch off ``inplace`` of an activation, permanently, if it is about to overwrite a captured tensor."""
        if self._captured and any(arg is value for arg in args for value, _ in self._captured.values()):
            module.inplace = False  # type: ignore[assignment]


def tap_shapes(taps: FeatureTaps, image_size: Resolution) -> dict[str, tuple[int, ...]]:
    """Return the shapes, without the batch, of each tap and of ``logits`` on images of ``image_size`` pixels.

    The network runs once, in evaluation mode. BatchNorm statistics, random states and the modules' modes are left
    unchanged. Raises ValueError if the network fails on such an image.
    """
    parameter = next(taps.parameters())
    image_1CHW = torch.zeros(1, 3, *height_width(image_size), dtype=parameter.dtype, device=parameter.device)
    try:
        with evaluating(taps), torch.no_grad():
            outputs = taps(image_1CHW)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or _type(error)
        size = size_text(image_size)
        raise ValueError(f"{_type(taps.model)} cannot take images of {size} pixels: {reason}") from error
    found = {**outputs.features, "logits": outputs.logits}
    return {name: tuple(value.shape[1:]) for name, value in found.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode inside the context; each submodule gets its own mode back afterwards."""
    # ``module.train()`` would not do: it would also switch on submodules that were in evaluation mode before.
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _as_map(value: Tensor, form: TensorFormat, image_size: tuple[int, int]) -> Tensor:
    """Return a tensor of this format as a map [B, C, H, W]; without a layout it is returned unchanged.

    ``image_size`` is the height and width of the network's input. Raises ValueError if the tensor has another format.
    """
    map_BCHW = _channels_first(value, form, image_size)
    if form.channels and (map_BCHW.ndim != 4 or map_BCHW.shape[1] != form.channels):
        raise ValueError(
            f"a tensor shaped {list(value.shape)}, expected {form.channels} channels; give its layout under stages, as "
            "<module path>:nhwc or :tokens"
        )
    return map_BCHW


def _channels_first(value: Tensor, form: TensorFormat, image_size: tuple[int, int]) -> Tensor:
    """Return [B, H, W, C], or tokens [B, N, C] without the prefix tokens, as a map [B, C, H, W]."""
    layout = form.layout
    if layout is None:
        return value
    if value.ndim != len(LAYOUTS[layout]):
        raise ValueError(f"a tensor shaped {list(value.shape)}, but :{layout} is for [{', '.join(LAYOUTS[layout])}]")
    if layout == "nhwc":
        return value.movedim(-1, 1)
    prefix, grid = _token_grid(value.shape[1], form, image_size)
    return value[:, prefix:].movedim(-1, 1).unflatten(2, grid)


def _token_grid(count: int, form: TensorFormat, image_size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Return how many of ``count`` tokens are prefix tokens, and the rows and columns of the others.

    The map has the image's proportions, unless the format gives a grid. The format may give no number of prefix tokens.
    Then it is the smallest that leaves whole patches or, if none does, the smallest that leaves a map.
    """
    height, width = image_size
    fitting = []
    for prefix in form.prefixes or range(min(count, MOST_PREFIX_TOKENS)):
        rows = isqrt(max(count - prefix, 0) * height // width)
        grid = form.grid or (rows, rows * width // height)
        if grid[0] * grid[1] == count - prefix > 0:
            whole_patches = bool(form.prefixes) or height % grid[0] == width % grid[1] == 0
            fitting.append((not whole_patches, prefix, grid))
    if fitting:
        # Given numbers are in order of likelihood. Otherwise tuples sort whole patches first, then few prefix tokens.
        _, prefix, grid = fitting[0] if form.prefixes else min(fitting)
        return prefix, grid
    prefix_text = f", {form.prefixes[0]} of them prefix tokens" if form.prefixes else ""
    raise ValueError(
        f"{count} tokens{prefix_text}, which do not form a map of a {height} × {width} image; give prefix tokens, rows "
        "and columns under stages, as <module path>:tokens+5@7x14"
    )


def prefix_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return the possible numbers of prefix tokens, likeliest first; () if the network does not give one.

    timm's networks have an attribute for it; in others it follows from parameters [1, N, C] with known names. 0 is also
    possible: a tensor may come from a module before the one that adds the prefix tokens.
    """
    number = getattr(model, "num_prefix_tokens", None)
    if isinstance(number, int):
        return (number, 0)
    named = ((name.rpartition(".")[2], value) for name, value in model.named_parameters())
    found = [value.shape[1] for name, value in named if name in PREFIX_PARAMETERS and value.ndim == 3]
    return (sum(found), 0) if found else ()


def _version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written in place; always 0 in inference mode and in compiled code."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _type(value: object) -> str:
    return type(value).__name__
