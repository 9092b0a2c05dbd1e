"""DiffKD in float64 NumPy, a pixel or a channel at a time, from the papers' equations and the networks' description."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch

PROPERTIES = {"reads the logits"}


class Weights:
    """Parameters below a prefix, by their place."""

    def __init__(self, table, prefix):
        self.table, self.prefix = table, prefix

    def __getitem__(self, name):
        return Weights(self.table, f"{self.prefix}{name}.")

    def of(self, name):
        return self.table[self.prefix + name]

    def __contains__(self, name):
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.table)


def conv(weights, x):
    weight, bias = weights.of("weight"), weights.of("bias")
    rows, _, height, width = x.shape
    around = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)))
    out = np.zeros((rows, len(weight), height, width))
    for b in range(rows):
        for i in range(height):
            for j in range(width):
                patch = padded[b, :, i : i + 2 * around + 1, j : j + 2 * around + 1]
                out[b, :, i, j] = [(filter_ * patch).sum() for filter_ in weight] + bias
    return out


def norm(weights, x):
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        variance = ((values - values.mean()) ** 2).mean()
        out[:, c] = (values - values.mean()) / np.sqrt(variance + 1e-5) * weights.of("weight")[c] + weights.of("bias")[
            c
        ]
    return out


def sequence(weights, x, kinds):
    """Run convolutions (c), norms (n), ReLUs (r) and bottlenecks (b) in their order."""
    for position, kind in enumerate(kinds):
        own = weights[position]
        if kind == "c":
            x = conv(own, x)
        elif kind == "n":
            x = norm(own, x)
        elif kind == "r":
            x = np.maximum(x, 0)
        else:
            x = bottleneck(own, x)
    return x


def bottleneck(weights, x):
    return x + sequence(weights["block"], x, "cnrcnrcn")


def alpha_bars(diffusion):
    table, product, steps = [], 1.0, diffusion["time_steps"]
    for s in range(steps):
        rise = (diffusion["beta_end"] - diffusion["beta_start"]) * s / (steps - 1)
        product *= 1 - diffusion["beta_start"] - rise
        table.append(product)
    return table


def branch(weights, diffusion, student, teacher, predictor, adapter):
    """Return the denoised student, the target, the diffusion loss and the autoencoder's loss."""
    table = alpha_bars(diffusion)
    target, autoencoder_loss = teacher, None
    if "autoencoder" in weights:
        target = sequence(weights["autoencoder"]["encoder"], teacher, "cn")
        autoencoder_loss = ((conv(weights["autoencoder"]["decoder"], target) - teacher) ** 2).mean()
    rows, channels, height, width = target.shape
    drawn = (torch.randn(rows, height, width, channels, dtype=torch.float64).numpy() for _ in range(2))
    start_noise, train_noise = (np.moveaxis(noise, 3, 1) for noise in drawn)
    t = torch.randint(diffusion["time_steps"], (len(target),)).numpy()

    def predict(y, times):
        embedded = weights["predictor"]["time_embedding"].of("weight")[times]
        return predictor(weights["predictor"]["network"], y + embedded[:, :, None, None])

    z = conv(weights["projection"], student)
    pooled = adapter(weights["adapter"]["network"], z).mean((2, 3))
    scores = pooled @ weights["adapter"]["linear"].of("weight").T + weights["adapter"]["linear"].of("bias")
    gamma = np.exp(scores[:, 0]) / np.exp(scores).sum(1)
    gamma = gamma[:, None, None, None]
    y = gamma * z + (1 - gamma) * start_noise
    steps, stride = diffusion["sampler_steps"], diffusion["sampler_stride"]
    for k in range(steps - 1, -1, -1):
        now, after = table[k * stride], table[(k - 1) * stride] if k else 1.0
        noise = predict(y, [k * stride] * len(y))
        y = np.sqrt(after) * (y - np.sqrt(1 - now) * noise) / np.sqrt(now) + np.sqrt(1 - after) * noise
    noisy = np.stack(
        [np.sqrt(table[t[b]]) * target[b] + np.sqrt(1 - table[t[b]]) * train_noise[b] for b in range(len(t))]
    )
    diffusion_loss = ((predict(noisy, t) - train_noise) ** 2).mean()
    return sequence(weights["output"], y, "cn"), target, diffusion_loss, autoencoder_loss


def parts(config, inputs):
    torch.manual_seed(inputs.seed)
    feature, stage = Weights(inputs.parameters, "feature_denoiser."), config["feature"]["stage"]
    denoised, target, diffusion, autoencoder = branch(
        feature,
        config["diffusion"],
        np.array(inputs.student_features[stage]),
        np.array(inputs.teacher_features[stage]),
        lambda weights, x: sequence(weights, x, "bbcn"),
        bottleneck,
    )
    answer = {
        "feature": config["distance_weight"] * ((denoised - target) ** 2).mean(),
        "diffusion_feature": config["diffusion_weight"] * diffusion,
        "autoencoder": config["autoencoder_weight"] * autoencoder,
    }
    denoised, _, diffusion, _ = branch(
        Weights(inputs.parameters, "logit_denoiser."),
        config["diffusion"],
        np.array(inputs.student_logits)[:, :, None, None],
        np.array(inputs.teacher_logits)[:, :, None, None],
        lambda weights, x: sequence(weights, x, "cnrcncnrc"),
        lambda weights, x: sequence(weights, x, "cnrcn"),
    )
    ((name, inner),) = config["logit_distance"].items()
    seen = inputs._replace(student_logits=denoised[:, :, 0, 0].tolist())
    distances = import_module(f"oracles.{name}").parts(inner, seen)
    answer |= {f"logit_{name}": config["distance_weight"] * value for name, value in distances.items()}
    return answer | {"diffusion_logit": config["diffusion_weight"] * diffusion}
