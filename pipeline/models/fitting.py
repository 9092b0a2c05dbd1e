"""Which of the tensors in a file are a network's, whatever is around them and whatever stands before their names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.foreign_names import foreign_names
from pipeline.models.from_timm import PREFIX, timms_own
from pipeline.models.weights_file import WEIGHTS_ADVICE, mappings

COUNTER = "num_batches_tracked"
"""Weights saved before BatchNorm counted its batches do not have this one; nothing here reads it."""
TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.")
"""Heads of torchvision's GoogLeNet and Inception that only train them; ``create_model`` leaves them out."""
COUNTED = ("total_ops", "total_params")
"""What thop, which counts operations, leaves in every module."""
AVERAGED = "ema"


class Candidate(NamedTuple):
    """Tensors in a file that may be a network's, by its names."""

    key: str
    """Where they lie in the file."""
    state: dict[str, Tensor]
    beside: list[str]
    """Names, in the same mapping, of tensors that do not begin as these do."""


class Fitted(NamedTuple):
    """A network's weights."""

    state: dict[str, Tensor]
    note: str
    """What was chosen or left out; empty where there was no choice."""


def fit_state(content: Any, model: nn.Module, source: str, name: str, key: str | None = None) -> Fitted:
    """Return the weights of ``model``, which is left as it is, in what a file holds.

    They may lie anywhere in it, all under one prefix, and under the names of well-known code. Where there are several
    that fit, such as raw and averaged ones, ``key`` names one of them, as the note does; without it the raw ones are
    taken. Raises ValueError, one line, for weights of another architecture.
    """
    wanted = {each: value for each, value in model.state_dict().items() if isinstance(value, Tensor)}
    everything = found = list(_candidates(content, model, wanted))
    if not everything:
        raise ValueError(f"{source}: expected tensors by name, a state dict; {WEIGHTS_ADVICE}")
    if key is not None:
        found = [each for each in found if each.key == key or each.key.startswith(f"{key}.")]
    if not found:
        known = ", ".join(dict.fromkeys(each.key for each in everything if each.key)) or "no key, take it away"
        raise ValueError(f"{source}: holds no weights under weights_key {key!r}; it has {known}")
    fitting = [each for each in found if not _misfits(each.state, wanted)]
    if not fitting:
        nearest = max(found, key=lambda each: (len(each.state.keys() & wanted.keys()), -len(each.state)))
        state = _own_way(model, nearest.state) or _timms_way(model, nearest.state, name)
        if state is None:
            raise ValueError(_refusal(nearest.state, wanted, source, name))
        fitting = [nearest._replace(state=state)]
    return _chosen(fitting, source, key)


def _candidates(content: Any, model: nn.Module, wanted: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yield what may be meant: every mapping with tensors, by every prefix, in our names and in well-known ones."""
    spaces = [{name: name for name in wanted}, foreign_names(model, wanted)]
    for place, mapping in mappings(content):
        tensors = {name: value for name, value in mapping.items() if isinstance(value, Tensor)}
        for space in spaces if tensors else ():
            for prefix in _prefixes(tensors, space):
                own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                state = {space.get(name, name): value for name, value in own.items() if not _needless(name, wanted)}
                beside = [name for name in tensors if not name.startswith(prefix)]
                yield Candidate(".".join(filter(None, (place, prefix.rstrip(".")))), state, beside)


def _prefixes(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """Return what stands before most of ``names``, the most frequent first; nothing, where they do not occur."""
    counts = Counter[str]()
    for tensor in tensors:
        parts = tensor.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                counts[".".join(parts[:start]) + "." * bool(start)] += 1
    return [prefix for prefix, count in counts.most_common() if 2 * count > len(names)] or ([""] if names else [])


def _needless(name: str, wanted: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor that the network does not have may be left out."""
    last = name.rpartition(".")[2]
    return name not in wanted and (name.startswith(TRAINING_ONLY) or last in COUNTED)


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    missing = any(name not in state and not name.endswith(COUNTER) for name in wanted)
    return missing or any(name not in wanted or value.shape != wanted[name].shape for name, value in state.items())


def _own_way(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what a network makes of a state dict of an older version of its own; None where that does not fit."""
    try:
        empty = copy.deepcopy(model).to("meta")
        result = empty.load_state_dict(dict(state), strict=False, assign=True)
    except Exception:  # tensors of another shape, and whatever a network's own way of loading raises
        return None
    if result.unexpected_keys or any(not name.endswith(COUNTER) for name in result.missing_keys):
        return None
    loaded = {name: value for name, value in empty.state_dict().items() if isinstance(value, Tensor)}
    return {name: value for name, value in loaded.items() if not value.is_meta}


def _timms_way(model: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """Return what timm makes of a state dict, by the filter that it has for a network; None where that does not fit."""
    if not name.startswith(PREFIX):
        return None
    wanted = model.state_dict()
    try:
        with torch.random.fork_rng(), torch.device("cpu"):
            found = timms_own(name, int(getattr(model, "num_classes", 0)), state)
    except Exception:  # of what is no state dict that it knows, a filter raises nearly anything
        return None
    return None if _misfits(dict(found), wanted) else dict(found)


def _chosen(fitting: list[Candidate], source: str, key: str | None) -> Fitted:
    """Return the only weights, the raw ones beside averaged ones, or those that ``key`` says."""
    several: list[Candidate] = []
    for each in fitting:
        if not any(_same(each.state, other.state) for other in several):
            several.append(each)
    keys = [each.key or "the file's own" for each in several]
    exact = [each for each in several if each.key == key]
    raw = exact or [each for each in several if AVERAGED not in each.key.lower()] or several
    if len(raw) > 1:
        raise ValueError(f"{source}: holds several weights that fit; say weights_key: one of {', '.join(keys)}")
    chosen, *_ = raw
    notes = []
    if len(several) > 1:
        others = ", ".join(other for other in keys if other != (chosen.key or "the file's own"))
        notes.append(f"{chosen.key or 'the weights outside'} are taken and not {others}, which weights_key can say")
    beside = [name for name in chosen.beside if name != "n_averaged"]
    if beside and len(several) == 1:
        notes.append(f"{len(beside)} other tensors (first {beside[0]}) are left out")
    return Fitted(chosen.state, f"{source}: {'; '.join(notes)}" if notes else "")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[name] or (value.dtype == other[name].dtype and torch.equal(value, other[name]))
        for name, value in one.items()
    )


def _refusal(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, name: str) -> str:
    """Return how weights differ from those of the network, in keys and shapes."""
    missing = [key for key in wanted if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    head = list(wanted)[-1].rpartition(".")[0]
    if reshaped and not (missing or unexpected) and all(key.startswith(f"{head}.") for key in reshaped):
        theirs, ours = state[reshaped[0]].shape[0], wanted[reshaped[0]].shape[0]
        return f"{source}: the weights have {theirs} classes, the network has {ours}, as many as the shards"
    problems = [f"{len(missing)} keys missing (first {missing[0]})"] if missing else []
    problems += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    if reshaped:
        theirs, ours = tuple(state[reshaped[0]].shape), tuple(wanted[reshaped[0]].shape)
        problems += [f"{len(reshaped)} of another shape (first {reshaped[0]}: {theirs}, expected {ours})"]
    return f"{source}: weights of another architecture than {name}: {'; '.join(problems)}"


def check_finite(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Raise ValueError, one line, for what no training leaves: other kinds of number, NaN, variances below 0."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = model.state_dict()
    for name, value in state.items():
        own, place = whole[name], f"{source}: {name}"
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(
                f"{place} is a {value.layout} {value.dtype} tensor without plain numbers; {WEIGHTS_ADVICE}"
            )
        kinds = (own.is_floating_point(), value.is_floating_point())
        if kinds[0] != kinds[1] or value.is_complex() != own.is_complex():
            raise ValueError(f"{place} holds {value.dtype}, expected {own.dtype}: no weights of a trained network")
        statistic = name.endswith(("running_mean", "running_var"))
        cast = value.to(own.dtype)
        wrong = cast.isnan() if not (name in parameters or statistic) else ~cast.isfinite()
        if wrong.any():
            raise ValueError(f"{place}: {int(wrong.sum())} of {wrong.numel()} values are not finite; take another file")
        if name.endswith("running_var") and (cast < 0).any():
            raise ValueError(f"{place}: a variance is below zero; no network was trained to that, take another file")
