"""Flows, singular vectors, congruence and relations under their published names."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from published_cases import Case, Formulas, Outcome
from published_relations import linear_layers
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses import kdsvd as kdsvd_module
from pipeline.losses._base import Facts
from pipeline.losses._peers import facts_of_peers
from pipeline.losses._registry import load_spec
from pipeline.losses.ce import label_cross_entropy
from pipeline.losses.crcd import gradient_loss
from pipeline.losses.fsp import fsp_loss
from pipeline.losses.kdsvd import kdsvd_loss


def fsp(case: Case) -> Outcome:
    students, teachers, leaves = maps_of(case)
    pairs = {f"pair_{level}": fsp_loss(students[level : level + 2], teachers[level : level + 2]) for level in (0, 1)}
    loss = fsp_loss(students, teachers)
    return {"loss": loss, **pairs}, loss, leaves


def maps_of(case: Case) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    students, teachers = (
        [case[key] for key in sorted(case) if key.startswith(f"in.{network}_feature_")]
        for network in ("student", "teacher")
    )
    return students, teachers, {f"student_feature_{level}": x.requires_grad_() for level, x in enumerate(students)}


def kdsvd(case: Case) -> Outcome:
    """Give each row's vectors the published signs, which a library chose: those with the published gradient."""
    students, teachers, leaves = maps_of(case)
    published = [case[f"grad.{key}"] for key in leaves]
    rows = len(students[0])
    best, error = torch.ones(len(students), rows), torch.full((rows,), torch.inf)
    for choice in product((1.0, -1.0), repeat=len(students) - 1):
        flips = torch.tensor([1.0, *choice]).unsqueeze(1).expand(-1, rows)
        gradients = torch.autograd.grad(with_signs(students, teachers, flips, case["hyper"]["k"]), students)
        gaps = [(a - b).abs().flatten(1).amax(1) for a, b in zip(gradients, published, strict=True)]
        gap_B = torch.stack(gaps).amax(0)
        best, error = torch.where(gap_B < error, flips, best), torch.minimum(gap_B, error)
    loss = with_signs(students, teachers, best, case["hyper"]["k"])
    return {"loss": loss}, loss, leaves


def with_signs(students: list[Tensor], teachers: list[Tensor], flips_LB: Tensor, k: int) -> Tensor:
    """Return the loss with the signs of the teacher's vectors flipped, level by level and row by row."""
    original, calls = kdsvd_module.signs, []

    def signs(x: Tensor) -> Tensor:
        calls.append(x)
        flip = flips_LB[len(calls) // 2].view(-1, 1, 1) if len(calls) % 2 else 1.0  # the teacher's, then the student's
        return original(x) * flip

    with mock.patch.object(kdsvd_module, "signs", signs):
        return kdsvd_loss(students, teachers, k=k)


def cc(case: Case) -> Outcome:
    student, teacher = case["in.student_embedding"].requires_grad_(), case["in.teacher_embedding"]
    shapes = {"embedding": student.shape[1:]}, {"embedding": teacher.shape[1:]}
    loss = load_spec("cc", {**case["hyper"], "pairs": "neighbours"}).build(Facts(5, *shapes)).double()
    loss.load_state_dict(linear_layers(case))
    rows = torch.arange(len(student))
    seen = [Outputs(x, {"embedding": x}) for x in (student, teacher)]
    (value,) = loss(*seen, Batch(student, rows, rows, {})).values()
    own = dict(loss.named_parameters())
    return {"loss": value}, value, {"student_embedding": student, **published_leaves(own)}


def published_leaves(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the two linear layers under their published names."""
    return {f"param.embed_{key.replace('_head', '.linear')}": x for key, x in own.items()}


def crcd(case: Case) -> Outcome:
    hyper, student = case["hyper"], case["in.student_embedding"].requires_grad_()
    teacher, ids = case["in.teacher_embedding"], case["in.index"]
    keys = {key: hyper[key] for key in ("temperature", "momentum", "negatives")}
    dim = case["in.memory_student"].shape[1]
    spec = load_spec("crcd", {"dim": dim, "own_anchor": True, "gradient_weight": 0, **keys})
    labels = np.arange(hyper["num_data"]) % 2
    shapes = {"embedding": student.shape[1:]}, {"embedding": teacher.shape[1:]}
    loss = spec.build(Facts(2, *shapes, len(labels), labels)).double()
    banks = {f"{network}_bank": case[f"in.memory_{network}"] for network in ("student", "teacher")}
    loss.load_state_dict({**linear_layers(case), **banks, "normalizers": torch.zeros(2)}, strict=True)
    seen = [Outputs(x, {"embedding": x}) for x in (student, teacher)]
    with mock.patch.object(loss.others, "forward", return_value=case["in.negative_index"]):
        total = torch.stack(list(loss(*seen, Batch(student, ids, ids, {})).values())).sum()
    after = deepcopy(loss)
    after.commit()
    state = after.state_dict()
    outputs = {"loss": total, "Z_student": state["normalizers"][0], "Z_teacher": state["normalizers"][1]}
    outputs |= {f"memory_{network}_after": state[f"{network}_bank"] for network in ("student", "teacher")}
    return outputs, total, {"student_embedding": student, **published_leaves(dict(loss.named_parameters()))}


def crcd_gradient(case: Case) -> Outcome:
    student = case["in.student_embedding"].requires_grad_()
    head = {key: case[f"param.student_head.{key}"].requires_grad_() for key in ("weight", "bias")}
    teacher_KD = case["param.teacher_head.weight"]
    logits = student @ head["weight"].T + head["bias"]
    of_teacher = case["in.teacher_embedding"] @ teacher_KD.T + case["param.teacher_head.bias"]
    loss = case["hyper"]["factor"] * gradient_loss(logits, of_teacher, case["in.labels"], head["weight"], teacher_KD)
    leaves = {f"param.student_head.{key}": x for key, x in head.items()}
    return {"loss": loss}, loss, {"student_embedding": student, **leaves}


def mmt(case: Case) -> Outcome:
    """Add up both networks' losses, as the authors' code does: (1 − w)·CE with smoothing, and w·soft CE."""
    weight, smoothing = case["hyper"]["soft_weight"], case["hyper"]["label_smoothing"]
    peers, averages = (peers_of(case, key, 2) for key in ("logits", "mean_logits"))
    batch = Batch(case["in.labels"], case["in.labels"], case["in.labels"], {})
    hard = [label_cross_entropy(logits, batch, smoothing) for logits in peers]
    soft = PeersOf("peer_mean", {"temperature": 1.0, "form": "ce"}).parts(peers, averages, batch)
    loss = torch.stack([(1 - weight) * value for value in hard] + [weight * value for value in soft]).sum()
    named = {
        f"{kind}_{number}": value for kind, of in (("hard", hard), ("soft", soft)) for number, value in enumerate(of)
    }
    return {"loss": loss, **named}, loss, {f"logits_{number}": logits for number, logits in enumerate(peers)}


def pcl(case: Case) -> Outcome:
    """Add up the ensemble's CE, and of each peer its CE, and both divergences where the ramp has ended."""
    temperature = case["hyper"]["temperature"]
    peers, averages = (peers_of(case, key, 3) for key in ("logits", "mean_logits"))
    ensemble = case["in.ensemble_logits"].requires_grad_()
    batch = Batch(case["in.labels"], case["in.labels"], case["in.labels"], {})
    of_averages = PeersOf("peer_mean", {"temperature": temperature, "form": "kl"}).parts(peers, averages, batch)
    of_ensemble = PeersOf("peer_ensemble", {"temperature": temperature})
    with mock.patch.object(of_ensemble.loss.fc, "forward", return_value=ensemble):
        ce, *divergences = of_ensemble.parts(peers, averages, batch)
    each = zip(peers, divergences, of_averages, strict=True)
    parts = [label_cross_entropy(logits, batch, 0.0) + a + b for logits, a, b in each]
    loss = torch.stack([ce, *parts]).sum()
    leaves = {f"logits_{number}": logits for number, logits in enumerate(peers)} | {"ensemble_logits": ensemble}
    return {"loss": loss, **{f"peer_{number}": value for number, value in enumerate(parts)}}, loss, leaves


def peers_of(case: Case, key: str, count: int) -> list[Tensor]:
    return [case[f"in.{key}_{number}"].requires_grad_(key == "logits") for number in range(count)]


class PeersOf:
    """A loss of networks that train together, called with their logits."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        shapes = {"embedding": (1,)}
        self.loss: Any = load_spec(name, config).build(facts_of_peers([Facts(20, shapes, shapes)] * 3, 0)).double()

    def parts(self, peers: list[Tensor], averages: list[Tensor], batch: Batch) -> list[Tensor]:
        networks = (tuple(Outputs(x, {"embedding": x[:, :1].detach()}) for x in of) for of in (peers, averages))
        student, teacher = (outputs[0]._replace(peers=outputs) for outputs in networks)
        return list(self.loss.parts(student, teacher, batch, Progress(1)).values())


def ft(case: Case) -> Outcome:
    student, teacher = case["in.student_feature"].requires_grad_(), case["in.teacher_feature"]
    config = {"share": case["hyper"]["rate"], "paraphraser": {"method": "ft_init"}}
    loss = load_spec("ft", config).build(Facts(5, {"last": student.shape[1:]}, {"last": teacher.shape[1:]})).double()
    state = {key.removeprefix("param."): x for key, x in case.items() if key.startswith("param.")}
    prefix = "translator.encoder."
    ours = {key: key.replace(prefix, "translator.") for key in state if key.startswith(prefix)}
    loss.load_state_dict({own: state[key] for key, own in ours.items()}, strict=False)
    loss.load_auxiliary({f"ft_paraphraser.{of_layer(key)}": x for key, x in state.items() if key not in ours})
    seen = [Outputs(x.mean((2, 3)), {"last": x}) for x in (student, teacher)]
    rows = torch.arange(len(student))
    (value,) = loss(*seen, Batch(student, rows, rows, {})).values()
    own = dict(loss.named_parameters())
    leaves = {f"param.{key}": own[name] for key, name in ours.items()}
    factor = loss.teacher_factor(teacher)  # type: ignore[operator]
    return {"loss": value, "teacher_factor": factor}, value, {"student_feature": student, **leaves}


def of_layer(key: str) -> str:
    """Return our name of a published layer: there is an empty norm between each convolution and its activation."""
    network, half, layer, kind = key.split(".")
    return f"{network}.{half}.{int(layer) * 2 // 3}.{kind}"


def ft_paraphraser(case: Case) -> Outcome:
    teacher = case["in.teacher_feature"]
    spec = load_spec("ft_paraphraser", {"share": case["hyper"]["rate"]})
    loss = spec.build(Facts(5, {}, {"last": teacher.shape[1:]})).double()
    names = [key for key in case if key.startswith("param.")]
    loss.load_state_dict({of_layer(key.removeprefix("param.")): case[key] for key in names}, strict=True)
    seen, rows = Outputs(teacher.mean((2, 3)), {"last": teacher}), torch.arange(len(teacher))
    (value,) = loss(seen, seen, Batch(teacher, rows, rows, {})).values()
    network, own = loss.get_submodule("paraphraser"), dict(loss.named_parameters())
    outputs = {"loss": value, "factor": network.encoder(teacher), "reconstruction": network(teacher)}  # type: ignore[operator]
    return outputs, value, {key: own[of_layer(key.removeprefix("param."))] for key in names}


FORMULAS: Formulas = {
    formula.__name__: formula for formula in (fsp, kdsvd, cc, crcd, crcd_gradient, mmt, pcl, ft, ft_paraphraser)
}
