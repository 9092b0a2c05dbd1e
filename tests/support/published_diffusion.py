"""DiffKD's branches under their published names."""

from __future__ import annotations

from published_cases import Case, Formulas, Outcome
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser, Draws
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec

PUBLISHED_NAMES = {
    "ae.encoder.": "autoencoder.encoder.",
    "ae.decoder.0.": "autoencoder.decoder.",
    "trans.": "projection.",
    "model.time_embedding.": "predictor.time_embedding.",
    "model.pred.": "predictor.network.",
    "noise_adapter.feat.0.block.": "adapter.network.block.",
    "noise_adapter.feat.": "adapter.network.",
    "noise_adapter.pred.": "adapter.linear.",
    "proj.": "output.",
}


def diffkd_feature(case: Case) -> Outcome:
    denoiser, outputs = denoised(case, "feature_denoiser")
    outputs["distance_mse"] = (outputs["denoised"] - outputs["teacher_latent"]).square().mean()
    total = outputs["distance_mse"] + outputs["diffusion_loss"] + outputs.get("autoencoder_loss", 0)
    return {**outputs, "total": total}, total, differentiated(case, denoiser)


def diffkd_logits(case: Case) -> Outcome:
    denoiser, outputs = denoised(case, "logit_denoiser")
    total = outputs["diffusion_loss"] + (outputs["denoised"] * case["in.denoised_weight"]).mean()
    return {**outputs, "total": total}, total, differentiated(case, denoiser)


def denoised(case: Case, which: str) -> tuple[Denoiser, dict[str, Tensor]]:
    """Return the denoiser with the published parameters, and its answers under the published names."""
    denoiser = denoiser_of(case["hyper"], which)
    denoiser.load_state_dict({ours(key): case[key] for key in case if key.startswith("param.")}, strict=True)
    draws = Draws(case["in.adapter_noise"], case["in.train_noise"], case["in.train_timesteps"])
    answer = denoiser(case["in.student"].requires_grad_(), case["in.teacher"], draws)
    outputs = {
        "denoised": answer.student_BCHW,
        "teacher_latent": answer.target_BCHW,
        "diffusion_loss": answer.diffusion_loss,
        "gamma": answer.gamma_B,
    }
    return denoiser, outputs | ({"autoencoder_loss": answer.autoencoder_loss} if "ae" in parameters(case) else {})


def denoiser_of(hyper: Case, which: str) -> Denoiser:
    steps = hyper["timesteps"]
    assert hyper["beta_schedule"] == "linear"
    diffusion = {
        "time_steps": hyper["num_train_timesteps"],
        "beta_start": hyper["beta_start"],
        "beta_end": hyper["beta_end"],
        "sampler_steps": hyper["inference_steps"],
        "sampler_stride": steps[0] - steps[1],
        "time_rows": 1280,
    }
    feature = {"predictor_reduction": 4, "adapter_reduction": 8}
    feature["latent"] = hyper["latent_channels"] if hyper["autoencoder"] else None
    logits = {
        "logits": {"predictor_expansion": 4, "adapter_expansion": 2},
        "logit_distance": {"kd": {"temperature": 1}},
    }
    weights = dict.fromkeys(("diffusion_weight", "autoencoder_weight", "distance_weight"), 1.0)
    branch = {"feature": feature} if which == "feature_denoiser" else logits
    shapes = [{"last": (hyper[f"{network}_channels"], 4, 4)} for network in ("student", "teacher")]
    loss = load_spec("diffkd", {"diffusion": diffusion, **branch, **weights}).build(
        Facts(hyper["student_channels"], *shapes)
    )
    assert loss.config.diffusion.sampled == steps
    return getattr(loss, which).double()


def differentiated(case: Case, denoiser: Denoiser) -> dict[str, Tensor]:
    own = dict(denoiser.named_parameters())
    by_name = {key: own[ours(key)] for key in case if key.startswith("param.")}
    return {"student": case["in.student"], **by_name}


def parameters(case: Case) -> set[str]:
    """Return the first words of the published parameters' names."""
    return {key.split(".")[1] for key in case if key.startswith("param.")}


def ours(published: str) -> str:
    name = published.removeprefix("param.")
    prefix = next(prefix for prefix in PUBLISHED_NAMES if name.startswith(prefix))
    return PUBLISHED_NAMES[prefix] + name.removeprefix(prefix)


FORMULAS: Formulas = {
    "diffkd_feature": diffkd_feature,
    "diffkd_feature_no_autoencoder": diffkd_feature,
    "diffkd_logits": diffkd_logits,
}
