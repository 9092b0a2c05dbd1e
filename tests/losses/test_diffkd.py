"""DiffKD and DDKD beyond what every loss must do: who trains what, precision, size, branches, recipe errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import PROGRESS, Example, config_of, draws_of_the_global_batch, example
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Outputs
from pipeline.diffusion.convolution import Convolution
from pipeline.diffusion.denoiser import Denoiser
from pipeline.losses._base import Facts, Taps
from pipeline.losses._registry import load_spec

both = pytest.mark.parametrize("name", ["diffkd", "ddkd"])

NETWORKS = ["projection", "adapter", "predictor", "output", "autoencoder"]
TRAINED_BY = {
    "distance": {"student", "projection", "adapter", "predictor", "output"},
    "diffusion": {"predictor"},
    "autoencoder": {"autoencoder"},
}


def changed(name: str, **changes: Any) -> Example:
    """Return the example of the loss with changes to its config; those to ``diffusion`` are merged."""
    config = config_of(name)
    diffusion = {**config["diffusion"], **changes.pop("diffusion", {})}
    return example(name, load_spec(name, {**config, **changes, "diffusion": diffusion}))


def losses_of(denoiser: Denoiser, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    answer = denoiser(student, teacher)
    losses = {
        "distance": (answer.student_BCHW - answer.target_BCHW).square().mean(),
        "diffusion": answer.diffusion_loss,
    }
    return losses | ({"autoencoder": answer.autoencoder_loss} if denoiser.autoencoder is not None else {})


@both
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("branch", ["feature", "logit"])
def test_each_loss_trains_its_own_networks_and_the_distance_alone_the_student(name: str, detach: bool, branch: str):
    case = changed(name, diffusion={"detach_predictor": detach})
    denoiser = getattr(case.loss, f"{branch}_denoiser")
    student, teacher = (x.features["last"] if branch == "feature" else x.logits_BK[:, :, None, None] for x in case[1:3])
    present = [network for network in NETWORKS if getattr(denoiser, network) is not None]
    assert ("autoencoder" in present) == (branch == "feature")
    largest = [max(getattr(denoiser, network).parameters(), key=lambda p: (p.ndim, p.numel())) for network in present]
    for loss, value in losses_of(denoiser, student, teacher).items():
        gradients = torch.autograd.grad(value, [*largest, student], allow_unused=True, retain_graph=True)
        reached = {what for what, grad in zip([*present, "student"], gradients, strict=True) if grad is not None}
        assert reached == TRAINED_BY[loss] - ({"predictor"} if detach and loss == "distance" else set()), loss


@both
def test_the_distance_is_the_same_with_a_detached_predictor(name: str):
    free, held = changed(name), changed(name, diffusion={"detach_predictor": True})
    assert {k: v.item() for k, v in held.parts().items()} == {k: v.item() for k, v in free.parts().items()}


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_call_under_autocast_is_finite_and_near_float32(name: str, dtype: torch.dtype):
    """The published code is finite in its first call under bf16 and NaN from the second on."""
    single = example(name, dtype=torch.float32)
    mixed = example(name, dtype=torch.float32, autocast=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(3):
            for part, value in mixed.parts(seed).items():
                assert value.dtype == torch.float32
                assert value.item() == pytest.approx(single.parts(seed)[part].item(), rel=0.2), part


@both
def test_only_the_networks_run_under_autocast(name: str):
    case = example(name, dtype=torch.float32, autocast=torch.bfloat16)
    seen: dict[type, set[torch.dtype]] = {}
    for module in case.loss.modules():
        if isinstance(module, nn.Conv2d | Denoiser):
            module.register_forward_hook(
                lambda module, _, y: seen.setdefault(type(module), set()).add(
                    (y[0] if isinstance(y, tuple) else y).dtype
                )
            )
    case.total()
    assert seen == {Convolution: {torch.bfloat16}, Denoiser: {torch.float32}}


@both
def test_a_module_cast_to_half_keeps_its_schedule(name: str):
    case = example(name, dtype=torch.float32)
    case.loss.half()
    for denoiser in (case.loss.feature_denoiser, case.loss.logit_denoiser):
        assert denoiser.alpha_bars_T.dtype == torch.float64
    assert not list(case.loss.buffers())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_norms_take_the_batchs_statistics_in_either_mode(mode: str):
    case = example("ddkd")
    trained = {part: value.item() for part, value in case.parts().items()}
    getattr(case.loss, mode)()
    assert {part: value.item() for part, value in case.parts().items()} == trained


def test_resnet50_to_mobilenet_adds_the_published_number_of_parameters():
    facts = Facts(1000, {"last": (1024, 7, 7)}, {"last": (2048, 7, 7)})
    with torch.device("meta"):
        loss = load_spec("ddkd", config_of("ddkd")).build(facts)

    def millions(module: Any) -> float:
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)

    feature, logits = loss.feature_denoiser, loss.logit_denoiser
    assert isinstance(feature, Denoiser)
    assert isinstance(logits, Denoiser)
    assert (millions(feature), millions(logits)) == (11.32, 23.32)
    assert [millions(getattr(feature, network)) for network in NETWORKS] == [1.05, 0.42, 4.60, 1.05, 4.20]
    assert [millions(getattr(logits, network)) for network in ("adapter", "predictor")] == [4.01, 17.31]


@pytest.mark.parametrize(("teacher", "width"), [(512, 256), (2048, 1024), (4096, 1024), (64, 32)])
def test_an_automatic_latent_is_half_the_teachers_channels_at_most_1024(teacher: int, width: int):
    with torch.device("meta"):
        facts = Facts(10, {"last": (32, 2, 2)}, {"last": (teacher, 2, 2)})
        denoiser = load_spec("diffkd", config_of("diffkd")).build(facts).feature_denoiser
    assert isinstance(denoiser, Denoiser)
    assert denoiser.projection.out_channels == width  # type: ignore[union-attr]


def test_without_a_latent_the_student_is_denoised_towards_the_teachers_own_map():
    feature = {**config_of("ddkd")["feature"], "latent": None}
    case = changed("ddkd", feature=feature)
    assert "autoencoder" not in case.parts()
    denoiser = case.loss.feature_denoiser
    assert isinstance(denoiser, Denoiser)
    answer = denoiser(case.student.features["last"], case.teacher.features["last"])
    assert torch.equal(answer.target_BCHW, case.teacher.features["last"])


def test_maps_of_different_size_meet_at_the_smaller():
    case = example("ddkd")
    large = nn.functional.interpolate(case.teacher.features["last"].detach(), scale_factor=2)
    taller = case.teacher._replace(features={"last": large})
    again = case._replace(teacher=taller)
    assert {k: v.item() for k, v in again.parts().items()} == pytest.approx(
        {k: v.item() for k, v in case.parts().items()}
    )


@pytest.mark.parametrize(
    ("name", "off", "parts", "children"),
    [
        ("ddkd", ["feature"], {"logit_dkd", "diffusion_logit"}, {"logit_denoiser", "logit_distance"}),
        ("diffkd", ["feature"], {"logit_kd", "diffusion_logit"}, {"logit_denoiser", "logit_distance"}),
        ("diffkd", ["logits", "logit_distance"], {"feature", "diffusion_feature", "autoencoder"}, {"feature_denoiser"}),
    ],
)
def test_a_branch_that_is_not_there_is_off(name: str, off: list[str], parts: set[str], children: set[str]):
    case = changed(name, **dict.fromkeys(off))
    assert set(case.parts()) == parts
    assert case.loss.config.taps() == (Taps() if "feature" in off else Taps(frozenset({"last"}), frozenset({"last"})))
    assert {name for name, _ in case.loss.named_children()} == children


def test_the_logits_distance_may_be_perception_and_its_scope_and_ramp_are_kept():
    inner = {"dkd": {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "ramp": {"linear_epochs": 44}}}
    case = changed("ddkd", logit_distance={"perception": {"eps": 1e-5, "inner": inner}})
    full = changed(
        "ddkd", logit_distance={"perception": {"eps": 1e-5, "inner": {"dkd": {**inner["dkd"], "ramp": None}}}}
    )
    assert load_spec("ddkd", case.loss.config.model_dump()).scopes == {"statistics", "sample"}
    assert PROGRESS.epoch + 1 == 22
    assert case.parts()["logit_dkd"].item() == pytest.approx(full.parts()["logit_dkd"].item() / 2)


def test_the_weights_scale_their_parts():
    plain = {key: value.item() for key, value in example("ddkd").parts().items()}
    feature = {**config_of("ddkd")["feature"], "weight": 11.0}
    lambdas = {"diffusion_weight": 2.0, "autoencoder_weight": 3.0, "distance_weight": 5.0}
    heavy = changed("ddkd", **lambdas, feature=feature, weight=7.0).parts()
    factors = {"diffusion_feature": 2, "diffusion_logit": 2, "autoencoder": 3, "feature": 55, "logit_dkd": 5}
    assert {key: value.item() for key, value in heavy.items()} == pytest.approx(
        {k: 7 * factors[k] * plain[k] for k in plain}
    )


def test_training_draws_stay_below_t_max():
    case = changed("ddkd", diffusion={"t_max": 3})
    denoiser = case.loss.logit_denoiser
    assert isinstance(denoiser, Denoiser)
    drawn = torch.cat([denoiser.draw(torch.empty(6, 5, 1, 1)).train_t_B for _ in range(20)])
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("branch", ["feature", "logits"])
def test_a_norm_over_a_single_value_is_refused_in_one_line(branch: str):
    off = {"feature": ["logits", "logit_distance"], "logits": ["feature"]}[branch]
    one = changed("diffkd", **dict.fromkeys(off)).at([0])
    if branch == "logits":
        with pytest.raises(ValueError, match=r"each rank needs at least 2 rows: raise batch$"):
            one.parts()
    else:
        assert all(value.isfinite() for value in one.parts().values())


def test_ddkd_and_diffkd_share_all_but_the_logits_distance():
    ddkd, diffkd = config_of("ddkd"), config_of("diffkd")
    assert set(ddkd.pop("logit_distance")) == {"dkd"}
    assert set(diffkd.pop("logit_distance")) == {"kd"}
    assert ddkd == diffkd


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("diffkd", {"logit_distance": None}, "logits and logit_distance go together"),
        ("diffkd", {"feature": None, "logits": None, "logit_distance": None}, "nothing is distilled"),
        ("diffkd", {"diffusion_weight": -1.0}, "greater than or equal to 0"),
        ("ddkd", {"logit_distance": None}, "logit_distance is required, because DDKD denoises and compares logits"),
        ("ddkd", {"logits": None, "logit_distance": None}, "logits is required"),
    ],
)
def test_a_config_that_means_nothing_is_refused(name: str, change: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        changed(name, **change)


def test_a_tap_that_is_no_map_is_refused_in_one_line():
    spec = load_spec("ddkd", config_of("ddkd"))
    with pytest.raises(ValueError, match=r"the tap 'last' is shaped \[512\], but a map \[C, H, W\] is needed"):
        spec.build(Facts(5, {"last": (512,)}, {"last": (2048, 7, 7)}))


class Trained(nn.Module):
    """A student of one layer and the loss, as a run has them: everything trainable in one forward."""

    def __init__(self, case: Example) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.student = nn.Conv2d(8, 8, 1).double()
        self.classifier = nn.Linear(8, 5).double()
        self.loss = case.loss

    def forward(self, case: Example) -> Tensor:
        feature = self.student(case.student.features["last"].detach())
        student = Outputs(self.classifier(feature.mean((2, 3))), {"last": feature})
        return torch.stack(list(self.loss.parts(student, case.teacher, case.batch, PROGRESS).values())).sum()  # type: ignore[operator]


def gradients_under_ddp(rank: int, world: int, detach: bool) -> dict[str, Tensor]:
    logit_distance = {"perception": {"eps": 1e-5, "inner": config_of("ddkd")["logit_distance"]}}
    case = changed(
        "ddkd", diffusion={"stat_scope": "global", "detach_predictor": detach}, logit_distance=logit_distance
    )
    own = case.at(list(range(6 * rank // world, 6 * (rank + 1) // world)))
    model = Trained(case)
    wrapped = (
        DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True) if world > 1 else model
    )
    with draws_of_the_global_batch(rank, world):
        for seed in range(2):
            model.zero_grad()
            torch.manual_seed(seed)
            wrapped(own).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("detach", [False, True])
def test_ddp_trains_as_one_process_does(detach: bool, several_ranks: Ranks):
    one = gradients_under_ddp(0, 1, detach)
    for answer in several_ranks(gradients_under_ddp, detach):
        for name, expected in one.items():
            torch.testing.assert_close(
                answer[name], expected, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
