"""Losses of feature maps under their published names."""

from __future__ import annotations

import torch
from published_cases import Case, Formulas, Outcome
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._registry import load_spec
from pipeline.losses.byot import exit_losses
from pipeline.losses.ce import label_cross_entropy
from pipeline.losses.ofd import partial_l2
from pipeline.losses.review import Fusion, hcl_loss


def fitnet(case: Case) -> Outcome:
    return of_loss(case, "fitnet", {"stage": "stage1"}, {"conv.": "regressor.0.", "bn.": "regressor.1."})


def vid(case: Case) -> Outcome:
    config = {"stages": ["stage1"], "initial_variance": 5.0, **case["hyper"]}
    return of_loss(case, "vid", config, {"regressor.": "means.0.", "softplus_variance": "variances.0.theta_C"})


def ofd_partial_l2(case: Case) -> Outcome:
    student = case["in.student_feature"].requires_grad_()
    loss = partial_l2(student, case["in.teacher_feature"], case["in.margin"])
    return {"loss": loss}, loss, {"student_feature": student}


def review_hcl(case: Case) -> Outcome:
    students = {key.removeprefix("in."): case[key].requires_grad_() for key in levels(case, "student")}
    loss = hcl_loss(list(students.values()), [case[key] for key in levels(case, "teacher")])
    return {"loss": loss}, loss, students


def review_abf(case: Case) -> Outcome:
    feature, residual = case["in.feature"].requires_grad_(), case["in.residual"].requires_grad_()
    hyper, norm = case["hyper"], nn.BatchNorm2d
    fusion = Fusion(feature.shape[1], hyper["mid_channels"], hyper["out_channels"], norm, deepest=False).double()
    names = {"conv1.": "input.", "conv2.": "output.", "att_conv.": "attention."}
    parameters = published_parameters(case, fusion, names)
    fused = fusion.fuse(feature, residual, size=(hyper["size"], hyper["size"]))
    loss = (fusion.output(fused) * case["in.output_weight"]).mean() + (fused * case["in.residual_weight"]).mean()
    return {"loss": loss}, loss, {"feature": feature, "residual": residual, **parameters}


def pad(case: Case) -> Outcome:
    student, teacher = case["in.student_embedding"].requires_grad_(), case["in.teacher_embedding"]
    shapes = [{"embedding": tuple(x.shape[1:])} for x in (student, teacher)]
    loss = load_spec("pad", case["hyper"]).build(Facts(5, *shapes)).double()
    parameters = published_parameters(case, loss, {f"var_estimator.{i}.": name for i, name in enumerate(PAD)})
    (value,) = loss(*(Outputs(x, {"embedding": x}) for x in (student, teacher)), batch=None).values()
    return {"loss": value}, value, {"student_embedding": student, **parameters}


PAD = ("variance.linear.", "variance.norm.")


def byot(case: Case) -> Outcome:
    """Weigh the parts as published: the cross-entropy of the end is one of them, and features are summed over rows."""
    hyper, features, logits = dict(case["hyper"]), levels(case, "student"), case["in.student_logits"].requires_grad_()
    maps = {f"stage{i + 1}": case[key].requires_grad_() for i, key in enumerate(features)}
    embedding, labels, side = case["in.student_embedding"], case["in.labels"], maps["stage1"].shape[2]
    end = (embedding.shape[1], *(side // hyper.pop("kernel_sizes")[0],) * 2)
    shapes = {name: tuple(x.shape[1:]) for name, x in maps.items()} | {"stage4": end, "embedding": embedding.shape[1:]}
    loss: Loss = load_spec("byot", hyper).build(Facts(logits.shape[1], shapes)).double()
    parameters = published_parameters(case, loss, {"exits.": "exits."})
    batch, ended = Batch(labels, labels, labels, {}), Outputs(logits, {"embedding": embedding})
    outputs = {"ce_0": label_cross_entropy(logits, batch, 0.0)}
    for i, (stage, branch) in enumerate(zip(maps, loss.exits, strict=True)):  # type: ignore[arg-type]
        own = branch.bottleneck(maps[stage]).mean((2, 3))
        parts = exit_losses(branch.fc(own), own, ended, batch, temperature=hyper["temperature"])
        outputs |= {f"ce_{i + 1}": parts.ce, f"kd_{i}": parts.kd, f"feature_{i}": parts.feature * len(labels)}
    weights = {"ce": 1 - hyper["alpha"], "kd": hyper["alpha"], "feature": hyper["beta"]}
    total = torch.stack([weights[name.partition("_")[0]] * value for name, value in outputs.items()]).sum()
    leaves = {key.removeprefix("in."): case[key] for key in features} | {"student_logits": logits}
    return {"loss": total, **outputs}, total, {**leaves, **parameters}


def of_loss(case: Case, name: str, config: Case, names: dict[str, str]) -> Outcome:
    """Return a loss of one stage with the published parameters, whose names begin otherwise."""
    student, teacher = case["in.student_feature"].requires_grad_(), case["in.teacher_feature"]
    loss: Loss = load_spec(name, config).build(Facts(5, {"stage1": student.shape[1:]}, {"stage1": teacher.shape[1:]}))
    parameters = published_parameters(case, loss.double(), names)
    (value,) = loss(*(outputs_of(x) for x in (student, teacher)), batch=None).values()
    return {"loss": value}, value, {"student_feature": student, **parameters}


def outputs_of(feature: Tensor) -> Outputs:
    return Outputs(feature.mean((2, 3)), {"stage1": feature})


def published_parameters(case: Case, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """Load the published parameters into the module and return its own under their published names."""
    ours = {key: renamed(key.removeprefix("param."), names) for key in case if key.startswith("param.")}
    assert set(ours.values()) == {key for key, _ in module.named_parameters()}
    module.load_state_dict({own: case[key] for key, own in ours.items()}, strict=False)
    own_parameters = dict(module.named_parameters())
    return {key: own_parameters[own] for key, own in ours.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    prefix = next(prefix for prefix in names if name.startswith(prefix))
    return names[prefix] + name.removeprefix(prefix)


def levels(case: Case, network: str) -> list[str]:
    return sorted(key for key in case if key.startswith(f"in.{network}_feature_"))


FORMULAS: Formulas = {
    formula.__name__: formula for formula in (fitnet, vid, ofd_partial_l2, review_hcl, review_abf, pad, byot)
}
