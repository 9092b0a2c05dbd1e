"""Losses of networks that train together: against plain loops, by their gradients, on ranks, and in half precision."""

from __future__ import annotations

from math import exp
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, oracle
from methods import config_of
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, Loss
from pipeline.losses._peers import EachPeer, facts_of_peers
from pipeline.losses._registry import load_spec
from pipeline.optim.schedule import ramp_factor

ROWS, WIDTHS = 6, (3, 4, 2)
EARLY = Progress(steps_per_epoch=10, step=400)
"""Half of the way along PCL's ramp of 80 epochs."""

every_loss_of_peers = pytest.mark.parametrize("name", ["mutual", "peer_mean", "peer_ensemble"])


class Case(NamedTuple):
    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch

    def parts(self) -> dict[str, Tensor]:
        return self.loss.parts(self.student, self.teacher, self.batch, EARLY)

    def total(self) -> Tensor:
        return torch.stack(list(self.parts().values())).sum()

    def leaves(self, network: Outputs) -> list[Tensor]:
        return [x for peer in network.peers for x in (peer.logits, *peer.features.values())]

    def at(self, rows: slice) -> Case:
        """Return the case with those rows alone, as leaves of their own."""

        def cut(outputs: Outputs) -> Outputs:
            peers = tuple(
                Outputs(
                    peer.logits.detach()[rows].requires_grad_(),
                    {name: x.detach()[rows].requires_grad_() for name, x in peer.features.items()},
                )
                for peer in outputs.peers
            )
            return peers[0]._replace(peers=peers)

        batch = Batch(*(x[rows] for x in self.batch[:3]), {})
        return self._replace(student=cut(self.student), teacher=cut(self.teacher), batch=batch)


def facts() -> Facts:
    shapes = [{"embedding": (width,), "logits": (CLASSES,)} for width in WIDTHS]
    return facts_of_peers([Facts(CLASSES, of_peer, of_peer) for of_peer in shapes], 0)


def case_of(name: str, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, **changes: Any) -> Case:
    torch.manual_seed(0)
    loss = load_spec(name, config_of(name) | changes).build(facts())
    loss = loss.double() if dtype == torch.float64 else loss

    def network() -> Outputs:
        def made(width: int) -> Tensor:
            return (scale * torch.randn(ROWS, width, dtype=torch.float64)).to(dtype).requires_grad_()

        peers = tuple(Outputs(made(CLASSES), {"embedding": made(width)}) for width in WIDTHS)
        return peers[0]._replace(peers=peers)

    labels = torch.arange(ROWS) * 2 % CLASSES
    return Case(loss, network(), network(), Batch(torch.zeros(ROWS, 3, 4, 4), labels, torch.arange(ROWS), {}))


def inputs_of(case: Case) -> SimpleNamespace:
    def logits(outputs: Outputs) -> list[list[list[float]]]:
        return [peer.logits.tolist() for peer in outputs.peers]

    return SimpleNamespace(
        peers=logits(case.student),
        averages=logits(case.teacher),
        embeddings=[peer.features["embedding"].tolist() for peer in case.student.peers],
        labels=case.batch.labels_B.tolist(),
        parameters={key: x.tolist() for key, x in case.loss.named_parameters()},
        ramp=1.0,
    )


@every_loss_of_peers
def test_a_loss_of_peers_equals_its_oracle_to_ten_digits(name: str):
    case = case_of(name)
    inputs, config = inputs_of(case), case.loss.config
    inputs.ramp = ramp_factor(config.ramp, EARLY) if name == "peer_ensemble" else 1.0
    factor = config.weight * (1.0 if name == "peer_ensemble" else ramp_factor(config.ramp, EARLY))
    expected = oracle(name).parts(config.model_dump(mode="json"), inputs)
    found = case.parts()
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert found[part].item() == pytest.approx(factor * value, rel=1e-10), part


def test_both_forms_of_the_averages_loss_have_one_gradient_and_equal_their_oracles():
    gradients = []
    for form in ("kl", "ce"):
        case = case_of("peer_mean", form=form, temperature=2.0, ramp=None)
        for part, value in oracle("peer_mean").parts(case.loss.config.model_dump(mode="json"), inputs_of(case)).items():
            assert case.parts()[part].item() == pytest.approx(case.loss.config.weight * value, rel=1e-10)
        case.total().backward()
        gradients.append([peer.logits.grad for peer in case.student.peers])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@every_loss_of_peers
def test_a_peers_gradient_is_that_of_its_own_part_and_none_reaches_a_teacher(name: str):
    case = case_of(name)
    case.total().backward()
    found = [peer.logits.grad for peer in case.student.peers]
    for number, gradient in enumerate(found):
        again = case_of(name)
        again.parts()[f"peer{number}"].backward()
        own = [peer.logits.grad for peer in again.student.peers]
        torch.testing.assert_close(own[number], gradient)
        assert all(other is None or not other.any() for place, other in enumerate(own) if place != number)
    assert all(x.grad is None for x in case.leaves(case.teacher))


@every_loss_of_peers
def test_gradient_is_exact_where_the_other_peers_are_constants(name: str):
    case = case_of(name)
    others = case.student

    def part(logits_BK: Tensor) -> Tensor:
        peers = (others.peers[0]._replace(logits=logits_BK), *(peer for peer in others.peers[1:]))
        return case._replace(student=peers[0]._replace(peers=peers)).parts()["peer0"]

    assert torch.autograd.gradcheck(part, case.student.peers[0].logits)


def test_the_ensembles_gradient_reaches_every_embedding_by_its_cross_entropy_alone():
    case = case_of("peer_ensemble")
    parts = case.parts()
    torch.stack([value for part, value in parts.items() if part != "ce"]).sum().backward()
    assert all(peer.features["embedding"].grad is None for peer in case.student.peers)
    case.parts()["ce"].backward()
    for peer in case.student.peers:
        assert peer.features["embedding"].grad is not None
        assert peer.features["embedding"].grad.abs().amax() > 0
    assert torch.autograd.gradcheck(
        lambda *_: case.parts()["ce"], [peer.features["embedding"] for peer in case.student.peers]
    )


def test_the_ensemble_learns_before_its_ramp_rises():
    case = case_of("peer_ensemble", ramp={"gaussian": 80})
    first = case.loss.parts(case.student, case.teacher, case.batch, Progress(10))
    last = case.loss.parts(case.student, case.teacher, case.batch, Progress(10, step=800))
    assert first["ce"] == last["ce"]
    for number in range(3):
        assert (first[f"peer{number}"] / last[f"peer{number}"]).item() == pytest.approx(exp(-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_loss_of_peers
def test_logits_of_a_thousand_in_half_stay_finite(name: str, dtype: torch.dtype):
    case = case_of(name, dtype=dtype, scale=1000.0)
    total = case.total()
    total.backward()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in case.leaves(case.student))


def on_a_rank(rank: int, world: int, name: str) -> tuple[Tensor, list[Tensor | None]]:
    size = ROWS // world
    case = case_of(name).at(slice(rank * size, (rank + 1) * size))
    total = case.total() / world
    total.backward()
    return total.detach(), [x.grad for x in case.leaves(case.student)]


@every_loss_of_peers
def test_ranks_with_equal_shares_equal_one_process(name: str, several_ranks: Ranks):
    total, gradients = on_a_rank(0, 1, name)
    totals, of_ranks = zip(*several_ranks(on_a_rank, name), strict=True)
    torch.testing.assert_close(torch.stack(totals).sum(), total)
    for expected, *found in zip(gradients, *of_ranks, strict=True):
        assert (expected is None) == (found[0] is None)
        if expected is not None:
            torch.testing.assert_close(torch.cat(found), expected)


def test_equal_peers_teach_each_other_nothing():
    case = case_of("mutual")
    total = case._replace(student=case.student._replace(peers=(case.student.peers[0],) * 2)).total()
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    gradient = case.student.peers[0].logits.grad
    assert gradient is not None
    assert gradient.abs().amax() < 1e-12


def test_an_ordinary_loss_is_that_of_each_peer_with_modules_of_its_own():
    torch.manual_seed(0)
    loss = load_spec("pkt", config_of("pkt")).build(facts())
    assert isinstance(loss, EachPeer)
    case = case_of("mutual")._replace(loss=loss.double())
    found = case.parts()
    assert list(found) == ["peer0", "peer1", "peer2"]
    for number, member in enumerate(loss.members):
        (alone,) = member.parts(case.student.peers[number], case.teacher.peers[number], case.batch, EARLY).values()
        assert found[f"peer{number}"] == alone


def test_the_peers_losses_need_two_of_them():
    with pytest.raises(ValueError, match=r"set student\.peers"):
        load_spec("mutual", config_of("mutual")).build(Facts(CLASSES))
