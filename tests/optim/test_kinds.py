"""Every optimizer is its library's own, leaves all as it was in a skipped step, and goes on from a saved state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from pydantic import ValidationError
from torch import nn
from updates import Updates, network, set_gradients

from pipeline.optim import kinds
from pipeline.optim.optimizer import Config, check_optimizer, create_optimizer, optimizer_state
from pipeline.training.files import load_pickled, save_pickled


def admitted(name: str) -> bool:
    """Return whether a recipe may name timm's optimizer."""
    try:
        check_optimizer(Config(kind=f"timm/{name}"))
    except ValueError:
        return False
    return True


TORCH = tuple(kinds.TORCH_OPTIMIZERS)
TIMM = tuple(f"timm/{name}" for name in timm.optim.list_optimizers() if admitted(name))
EVERY = (*TORCH, *TIMM)
DECAY = {"weight_decay": 0.05, "decay_norms_and_biases": False}


def everything(updates: Updates) -> dict[Any, Any]:
    """Return a copy of the parameters and of all that the optimizer holds, by name."""
    state = optimizer_state(updates.optimizer)
    found: dict[Any, Any] = {name: p.detach().clone() for name, p in updates.module.named_parameters()}
    for number, of_parameter in state["state"].items():
        found |= {(number, name): copy.deepcopy(value) for name, value in of_parameter.items()}
    for number, group in enumerate(state["param_groups"]):
        found |= {("group", number, key): value for key, value in group.items() if key != "lr"}
    return found


def same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Return whether both hold the same to the last bit."""
    if one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_lamb_lion_muon_and_those_of_torch_are_among_them():
    assert {"timm/lamb", "timm/lion", "timm/muon", "timm/adan", "timm/lars", "timm/nadamw"} <= set(TIMM)
    assert {"adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adamax"} <= set(TORCH)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", EVERY)
def test_a_skipped_step_leaves_weights_and_state_as_they_were(kind: str, spoiled: float):
    updates = Updates(Config(kind=kind, **DECAY), network())
    for _ in range(3):
        before = everything(updates)
        updates(spoiled)
        assert same(everything(updates), before)
        updates()
        assert not same(everything(updates), before)


@pytest.mark.parametrize("kind", EVERY)
def test_a_skipped_step_leaves_no_trace_in_those_that_follow(kind: str):
    straight, skipped = (Updates(Config(kind=kind, **DECAY), network()) for _ in range(2))
    skipped(torch.nan)
    skipped.number = 0
    for number in range(6):
        straight()
        skipped()
        if number == 2:
            skipped(torch.inf)
            skipped.number -= 1
    assert same(everything(skipped), everything(straight))


@pytest.mark.parametrize("kind", EVERY)
def test_a_saved_state_goes_on_bit_for_bit(kind: str, tmp_path: Path):
    config = Config(kind=kind, **DECAY)
    straight = Updates(config, network(torch.float32))
    for _ in range(3):
        straight()
    resumed = Updates(config, copy.deepcopy(straight.module))
    save_pickled(tmp_path / "optimizer.pt", optimizer_state(straight.optimizer))
    resumed.optimizer.load_state_dict(load_pickled(tmp_path / "optimizer.pt"))
    resumed.number = straight.number
    for _ in range(3):
        straight()
        resumed()
    assert same(everything(resumed), everything(straight))


KEYS: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.8, 0.95), "eps": 1e-6, "arguments": {"amsgrad": True}},
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6},
    "rmsprop": {"momentum": 0.5, "arguments": {"alpha": 0.9, "centered": True}},
    "nadam": {"arguments": {"momentum_decay": 0.01, "decoupled_weight_decay": True}},
}


@pytest.mark.parametrize(
    ("kind", "keys"), [*((kind, {}) for kind in EVERY), *KEYS.items()], ids=[*EVERY, *(f"{kind} keys" for kind in KEYS)]
)
def test_twenty_steps_are_those_of_its_librarys_own_loop(kind: str, keys: dict[str, Any]):
    updates, module = Updates(Config(kind=kind, **DECAY, **keys), network()), network()
    sets = [[p for p in module.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    groups = [{"params": sets[0]}, {"params": sets[1], "weight_decay": 0.0}]
    own = {**{key: value for key, value in keys.items() if key != "arguments"}, **keys.get("arguments", {})}
    if kind == "sgd":
        own |= {"momentum": 0.9}
    plain: Any
    if kind in TORCH:
        plain = kinds.TORCH_OPTIMIZERS[kind](groups, lr=0.1, weight_decay=0.05, foreach=False, **own)  # type: ignore[call-arg]
    else:
        plain = timm.optim.create_optimizer_v2(groups, opt=kind[5:], lr=0.1, weight_decay=0.05, **own)
    for number in range(1, 21):
        updates()
        set_gradients(module, number)
        for group in plain.param_groups:
            group["lr"] = torch.tensor(0.1 / number, dtype=torch.float32).item()
        plain.step()
    for ours, theirs in zip(updates.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TORCH)
def test_it_is_fused_where_a_step_is_skipped_on_the_device(kind: str):
    optimizer = create_optimizer(Config(kind=kind), network())
    assert bool(optimizer.param_groups[0].get("fused")) == (kind in kinds.FUSED)


def test_other_optimizers_than_sgd_keep_their_own_momentum():
    assert (Config().momentum, Config().nesterov) == (0.9, False)
    rmsprop = Config(kind="rmsprop")
    assert (rmsprop.momentum, rmsprop.nesterov) == (None, None)
    assert Config.model_validate(rmsprop.model_dump(mode="json")) == rmsprop
    assert create_optimizer(rmsprop, network()).param_groups[0]["momentum"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kind": "adamv"}, "there is no optimizer 'adamv'; did you mean adam"),
        ({"kind": "lbfgs"}, "there is no optimizer 'lbfgs'; known are sgd, adam, adamw, "),
        ({"kind": "adamw", "nesterov": True}, "adamw has no nesterov, but betas, eps; give optimizer.nesterov=null"),
        ({"kind": "adamw", "momentum": 0.9}, "adamw has no momentum, but betas, eps; give optimizer.momentum=null"),
        (
            {"kind": "nadam", "momentum": 0.9, "nesterov": True},
            "nadam has no momentum and no nesterov, but betas, eps; give optimizer.momentum=null optimizer.nest",
        ),
        ({"betas": [0.9, 0.99]}, "sgd has no betas, but momentum, nesterov; give optimizer.betas=null"),
        ({"kind": "adamw", "betas": [0.9]}, r"betas: adamw has 2, such as [0.9, 0.999], got [0.9]"),
        ({"kind": "adamw", "betas": [0.9, 1.0]}, "less than 1"),
        (
            {"kind": "adam", "arguments": {"amsgrat": True}},
            "arguments: adam takes no amsgrat; it takes amsgrad, ",
        ),
        ({"kind": "adam", "arguments": {"lr": 0.1}}, "arguments: lr cannot be given here; it is schedule.rate"),
        (
            {"kind": "adam", "arguments": {"eps": 0.1}},
            "eps cannot be given here; it is the key optimizer.eps",
        ),
        ({"kind": "adam", "arguments": {"foreach": True}}, "foreach cannot be given here; the run chooses"),
        ({"kind": "rmsprop", "arguments": {"alpha": -1}}, "rmsprop cannot be made: Invalid alpha value: -1"),
        ({"kind": "timm/lamp"}, "there is no optimizer 'timm/lamp'; did you mean timm/lamb?"),
        ({"kind": "timm/adamw"}, "timm/adamw is torch's own; give adamw"),
        ({"kind": "timm/adahessian"}, "timm/adahessian is not supported: a skipped or resumed step"),
        ({"kind": "timm/kron"}, "timm/kron is not supported"),
        ({"kind": "timm/fusedlamb"}, "timm/fusedlamb is not supported"),
        ({"kind": "timm/lookahead_lamb"}, "there is no optimizer 'timm/lookahead_lamb'"),
        ({"kind": "timm/lion", "eps": 1e-8}, "timm/lion has no eps, but betas; give optimizer.eps=null"),
        (
            {"kind": "timm/lamb", "arguments": {"beta": 1}},
            "timm/lamb takes no beta; it takes bias_correction",
        ),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused_in_one_line(given: dict[str, Any], told: str):
    with pytest.raises((ValueError, ValidationError)) as raised:
        check_optimizer(Config(**given))
    errors = raised.value.errors() if isinstance(raised.value, ValidationError) else [{"msg": str(raised.value)}]
    assert told in errors[0]["msg"]
    assert "\n" not in errors[0]["msg"]


def test_timm_that_is_not_installed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm.optim", None)
    with pytest.raises(ValueError, match=r"^timm/lamb: timm is not installed; install this project's extra 'timm'$"):
        check_optimizer(Config(kind="timm/lamb"))


def test_the_largest_rate_is_known_to_optimizers_that_scale_their_decay_by_it():
    plain, ours = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    ours.load_state_dict(plain.state_dict())
    updates = Updates(Config(kind="timm/adamc", weight_decay=0.5), ours, rate=0.3)
    own = timm.optim.create_optimizer_v2(plain.parameters(), opt="adamc", lr=0.3, weight_decay=0.5)
    for number in (1, 2):
        updates()
        set_gradients(plain, number)
        own.param_groups[0]["lr"] = torch.tensor(0.3 / number, dtype=torch.float32).item()
        own.step()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-12, atol=0)
