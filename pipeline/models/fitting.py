"""Selection of a network's weights among the contents of a file.

The weights may be nested in the file, have a prefix before their names, or have the names of well-known code.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.foreign_names import foreign_names, from_foreign
from pipeline.models.from_timm import PREFIX, converted_by_timm
from pipeline.models.headless import head_prefixes
from pipeline.models.weights_file import WEIGHTS_ADVICE, mappings

COUNTER = "num_batches_tracked"
"""Name of a buffer that old weights lack: BatchNorm did not count its batches then. Nothing here reads it."""
TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
"""Auxiliary heads of torchvision's networks, used in training only: a network here may be without them."""
PROFILER_COUNTERS = ("total_ops", "total_params")
"""Buffers that thop, a counter of operations, leaves in every module."""
CLASS_BIAS, BOX_BIAS = (f"head.{name}.bias" for name in ("classification_head.cls_logits", "regression_head.bbox_reg"))
"""Tensors of a detector with a row for each class, and for each number of a box, of every anchor of a cell."""
REGIONS = "roi_heads.box_predictor."
"""Start of the names of a two-stage detector's tensors with rows for each class and, before them, a background."""
AVERAGED = "ema"
"""Text in the key of averaged weights."""


class Candidate(NamedTuple):
    """A set of tensors in a file that may be the network's weights, by the network's names."""

    key: str
    """Dotted key of the tensors in the file, with their common prefix."""
    state: dict[str, Tensor]
    unprefixed: list[str]
    """Names of the tensors in the same mapping that do not have the prefix."""
    of_head: list[str]
    """Names of the tensors of the head that the network does not have; they are left out of ``state``."""


class Fitted(NamedTuple):
    """A network's weights, and a note about their selection."""

    state: dict[str, Tensor]
    note: str
    """Weights that were chosen or left out, as one line; empty if there was no choice."""


def fit_state(
    content: Any,
    model: nn.Module,
    source: str,
    name: str,
    key: str | None = None,
    left_out: frozenset[str] = frozenset(),
    arguments: Mapping[str, Any] | None = None,
    *,
    part: bool = False,
    prefixed: bool = True,
) -> Fitted:
    """Return the weights of ``model`` that are found in ``content``; the model itself is not changed.

    They may be anywhere in it, under a common prefix, and under the names of well-known code. If several fit, such as
    raw and averaged weights, ``key`` selects one of them. Without ``key`` the raw weights are taken, and the note names
    the others. The network's tensors in ``left_out`` may have any shape or be missing, and are not in the result.
    ``arguments`` are those that the network was built with. With ``part``, the model is a part of a network, such as
    its backbone, and the file may have other modules besides. Without ``prefixed``, names are taken as they are: under
    a prefix, a few modules may have the names of others. Raises ValueError, in one line, for weights of another
    architecture.
    """
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = _under_key(list(_candidates(content, model, wanted, part=part, prefixed=prefixed)), source, key)
    wanted = _without(wanted, left_out)
    fitting = [candidate._replace(state=_without(candidate.state, left_out)) for candidate in found]
    fitting = [candidate for candidate in fitting if not _misfits(candidate.state, wanted)]
    if not fitting:
        # Only the candidate with most of the names, and of those the smallest, is worth converting or reporting.
        nearest = max(found, key=lambda candidate: (len(candidate.state.keys() & wanted.keys()), -len(candidate.state)))
        state = _loaded_by_model(model, nearest.state, left_out)
        state = state or _loaded_by_timm(model, nearest.state, name, left_out, arguments)
        if state is None:
            message = _mismatch_message(_without(nearest.state, left_out), wanted, source, name, part or bool(left_out))
            raise ValueError(message)
        fitting = [nearest._replace(state=state)]
    return _choose(fitting, source, key)


def _under_key(everything: list[Candidate], source: str, key: str | None) -> list[Candidate]:
    """Return the candidates under ``key``, all if it is None. Raises ValueError if there are none."""
    found = everything
    if not everything:
        raise ValueError(f"{source}: expected tensors by name, a state dict; {WEIGHTS_ADVICE}")
    if key is not None:
        found = [candidate for candidate in found if candidate.key == key or candidate.key.startswith(f"{key}.")]
    if not found:
        keys = dict.fromkeys(candidate.key for candidate in everything if candidate.key)
        known = ", ".join(keys) or "no keys, remove weights_key"
        raise ValueError(f"{source}: holds no weights under weights_key {key!r}; it has {known}")
    return found


def _candidates(
    content: Any, model: nn.Module, wanted: Mapping[str, Tensor], *, part: bool, prefixed: bool
) -> Iterator[Candidate]:
    """Yield a candidate for each mapping with tensors, each set of names and each prefix.

    The sets of names are ours and those of well-known code. Of a ``part``, other modules are left out, not other layers
    of its own modules.
    """
    modules = {name.partition(".")[0] for name in wanted}
    heads = head_prefixes(model)
    removed = [f"{head}{kind}" for head in heads for kind in ("weight", "bias")]
    ours_by_name = [{name: name for name in wanted}, foreign_names(model, [*wanted, *removed])]
    for path, mapping in mappings(content):
        tensors = {name: value for name, value in mapping.items() if isinstance(value, Tensor)}
        for ours in ours_by_name if tensors else ():
            for prefix in _prefixes(tensors, ours) if prefixed else [""] if ours else []:
                stripped = {
                    name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
                }
                state = {ours.get(name, name): value for name, value in stripped.items() if not _needless(name, wanted)}
                state = state if ours is ours_by_name[0] else from_foreign(model, state)
                unprefixed = [name for name in tensors if not name.startswith(prefix)]
                if part:
                    unprefixed += [f"{prefix}{name}" for name in state if name.partition(".")[0] not in modules]
                    state = {name: value for name, value in state.items() if name.partition(".")[0] in modules}
                of_head = [name for name in state if name.startswith(heads)]
                state = {name: value for name, value in state.items() if name not in of_head}
                yield Candidate(".".join(filter(None, (path, prefix.rstrip(".")))), state, unprefixed, of_head)


def _prefixes(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """Return the prefixes under which most of ``names`` occur, the most frequent first.

    If there is none, it is the empty prefix, or no prefix if ``names`` is empty.
    """
    counts = Counter[str]()
    for tensor in tensors:
        parts = tensor.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                counts[".".join(parts[:start]) + "." * bool(start)] += 1
    return [prefix for prefix, count in counts.most_common() if 2 * count > len(names)] or ([""] if names else [])


def _needless(name: str, wanted: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor may be left out: the network does not have it, and it is of no use in evaluation."""
    last = name.rpartition(".")[2]
    return name not in wanted and (name.startswith(TRAINING_ONLY) or last in PROFILER_COUNTERS)


def _without(state: Mapping[str, Tensor], left_out: frozenset[str]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in left_out}


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are missing, unexpected or of another shape."""
    missing = any(name not in state and not name.endswith(COUNTER) for name in wanted)
    return missing or any(name not in wanted or value.shape != wanted[name].shape for name, value in state.items())


def _loaded_by_model(
    model: nn.Module, state: Mapping[str, Tensor], left_out: frozenset[str]
) -> dict[str, Tensor] | None:
    """Return a state dict of an older version, converted by the network's own loading; None if it does not fit."""
    try:
        # A copy on the meta device: it takes the file's tensors by ``assign``, without memory for weights of its own.
        empty = copy.deepcopy(model).to("meta")
        result = empty.load_state_dict(_without(state, left_out), strict=False, assign=True)
    except Exception:  # tensors of another shape, and any error of a network's own loading
        return None
    missing = [name for name in result.missing_keys if not name.endswith(COUNTER) and name not in left_out]
    if result.unexpected_keys or missing:
        return None
    loaded = {name: value for name, value in empty.state_dict().items() if isinstance(value, Tensor)}
    # What is still on the meta device was not in the file: batch counters, and what is left out.
    return {name: value for name, value in loaded.items() if not value.is_meta}


def _loaded_by_timm(
    model: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    left_out: frozenset[str],
    arguments: Mapping[str, Any] | None,
) -> dict[str, Tensor] | None:
    """Return a state dict, converted by timm's filter for the network; None if it does not fit."""
    if not name.startswith(PREFIX):
        return None
    wanted, classes = model.state_dict(), 0 if head_prefixes(model) else int(getattr(model, "num_classes", 0))
    if left_out:  # the file's classes are those of its head, the last tensor
        classes = next((len(value) for value in reversed(list(state.values())) if value.ndim), classes)
    try:
        # timm initialises a network before it loads the weights; the caller's random state must not change by that.
        with torch.random.fork_rng(), torch.device("cpu"):
            found = _without(converted_by_timm(name, classes, state, arguments), left_out)
    except Exception:  # for a state dict that it does not know, a filter may raise nearly any error
        return None
    return None if _misfits(found, _without(wanted, left_out)) else found


def _choose(fitting: list[Candidate], source: str, key: str | None) -> Fitted:
    """Return the weights that ``key`` selects, or the raw weights if averaged ones fit too, or the only ones.

    Raises ValueError if several are left.
    """
    several: list[Candidate] = []
    for candidate in fitting:
        if not any(_same(candidate.state, other.state) for other in several):
            several.append(candidate)
    keys = [candidate.key or "the file's own" for candidate in several]
    exact = [candidate for candidate in several if candidate.key == key]
    raw = exact or [candidate for candidate in several if AVERAGED not in candidate.key.lower()] or several
    if len(raw) > 1:
        raise ValueError(f"{source}: holds several weights that fit; set weights_key to one of {', '.join(keys)}")
    chosen, *_ = raw
    notes = []
    if len(several) > 1:
        others = ", ".join(other for other in keys if other != (chosen.key or "the file's own"))
        notes.append(f"{chosen.key or 'the weights outside'} are used and not {others}; weights_key can select it")
    unused = [name for name in chosen.unprefixed if name != "n_averaged"]
    if unused and len(several) == 1:
        notes.append(f"{len(unused)} other tensors (first {unused[0]}) are left out")
    if chosen.of_head:
        notes.append(f"head: none leaves out {', '.join(sorted(chosen.of_head))}")
    return Fitted(chosen.state, f"{source}: {'; '.join(notes)}" if notes else "")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two states have the same names and tensors."""
    return one.keys() == other.keys() and all(
        value is other[name] or (value.dtype == other[name].dtype and torch.equal(value, other[name]))
        for name, value in one.items()
    )


def _mismatch_message(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, name: str, new_head: bool
) -> str:
    """Return a message, in one line, with the keys and shapes in which weights differ from the network."""
    missing = [key for key in wanted if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if reshaped and not (missing or unexpected or new_head) and _other_classes(state, wanted, reshaped):
        found, expected = (round(_classes(tensors, reshaped[0], wanted)) for tensors in (state, wanted))
        advice = "a student may start with student.start.head=new, a teacher of features be used with teacher.head=none"
        return f"{source}: the weights have {found} classes, the network and the shards have {expected}; {advice}"
    problems = [f"{len(missing)} keys missing (first {missing[0]})"] if missing else []
    problems += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    if reshaped:
        found, expected = tuple(state[reshaped[0]].shape), tuple(wanted[reshaped[0]].shape)
        problems += [f"{len(reshaped)} of another shape (first {reshaped[0]}: {found}, expected {expected})"]
    return f"{source}: weights of another architecture than {name}: {'; '.join(problems)}"


def _classes(tensors: Mapping[str, Tensor], key: str, wanted: Mapping[str, Tensor]) -> float:
    """Return the number of classes of which a tensor of the last layers has rows; no whole number if it has others.

    A class has one row in most networks, one for each anchor of a cell in a detector, and four for a region's box.
    """
    rows = len(tensors[key]) if tensors[key].ndim else 0
    if key.startswith(REGIONS):
        return rows / (4 if key.startswith(f"{REGIONS}bbox_pred.") else 1) - 1
    return rows / (len(wanted[BOX_BIAS]) // 4 if BOX_BIAS in wanted else 1)


def _other_classes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], reshaped: Iterable[str]) -> bool:
    """Return whether the ``reshaped`` tensors differ in their number of classes alone.

    It is that of the last layer, and of an auxiliary head besides. That of a detector's classes is not the last of the
    network.
    """
    last = CLASS_BIAS if CLASS_BIAS in wanted else list(wanted)[-1]
    classes = [_classes(tensors, last, wanted) for tensors in (state, wanted)]
    # Each must have as many classes as the last, and be equal in its other dimensions.
    return min(classes) >= 1 and all(
        [_classes(tensors, key, wanted) for tensors in (state, wanted)] == classes
        and state[key].shape[1:] == wanted[key].shape[1:]
        for key in reshaped
    )


def check_finite(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Raise ValueError, in one line, for values that training cannot produce.

    These are tensors of another kind of number, NaN, infinite parameters or statistics, and negative variances.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected_state = model.state_dict()
    for name, value in state.items():
        expected, key = expected_state[name], f"{source}: {name}"
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"{key} is a {value.layout} {value.dtype} tensor without plain numbers; {WEIGHTS_ADVICE}")
        kinds = (expected.is_floating_point(), value.is_floating_point())
        if kinds[0] != kinds[1] or value.is_complex() != expected.is_complex():
            raise ValueError(f"{key} holds {value.dtype}, expected {expected.dtype}: no weights of a trained network")
        statistic = name.endswith(("running_mean", "running_var"))
        # Checked after the cast: a float64 value may become infinite in the network's float32.
        cast = value.to(expected.dtype)
        # Other buffers may contain infinity on purpose, as an attention mask does.
        wrong = cast.isnan() if not (name in parameters or statistic) else ~cast.isfinite()
        if wrong.any():
            raise ValueError(f"{key}: {int(wrong.sum())} of {wrong.numel()} values are not finite; take another file")
        if name.endswith("running_var") and (cast < 0).any():
            raise ValueError(f"{key}: a variance is below zero, which training cannot produce; take another file")
