"""Layers on maps [rows][channels][height][width] in float64 NumPy, one output at a time, and how levels are paired."""

from __future__ import annotations

from math import ceil, floor

import numpy as np


def convolution(x, weight, bias=None, stride=1, padding=0):
    rows, _, height, width = x.shape
    out_channels, _, tall, wide = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    out_height = (height + 2 * padding - tall) // stride + 1
    out_width = (width + 2 * padding - wide) // stride + 1
    out = np.zeros((rows, out_channels, out_height, out_width))
    for b, o, i, j in np.ndindex(out.shape):
        patch = padded[b, :, i * stride : i * stride + tall, j * stride : j * stride + wide]
        out[b, o, i, j] = (weight[o] * patch).sum() + (0 if bias is None else bias[o])
    return out


def transposed_convolution(x, weight, bias, stride, padding):
    """Spread every input over the outputs that it reaches; the weight is [in][out][tall][wide]."""
    rows, in_channels, height, width = x.shape
    _, out_channels, tall, wide = weight.shape
    spread = np.zeros((rows, out_channels, (height - 1) * stride + tall, (width - 1) * stride + wide))
    for b, c, i, j in np.ndindex(rows, in_channels, height, width):
        spread[b, :, i * stride : i * stride + tall, j * stride : j * stride + wide] += x[b, c, i, j] * weight[c]
    inner = spread[:, :, padding : spread.shape[2] - padding, padding : spread.shape[3] - padding]
    return inner + bias[None, :, None, None]


def batch_norm(x, weight, bias):
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        mean = x[:, c].mean()
        variance = ((x[:, c] - mean) ** 2).mean()
        out[:, c] = (x[:, c] - mean) / np.sqrt(variance + 1e-5) * weight[c] + bias[c]
    return out


def average(x, height, width):
    """Average to that size: output i takes the rows from ⌊i·H/h⌋ to ⌈(i+1)·H/h⌉."""
    rows, channels, tall, wide = x.shape
    out = np.zeros((rows, channels, height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = floor(i * tall / height), ceil((i + 1) * tall / height)
            left, right = floor(j * wide / width), ceil((j + 1) * wide / width)
            out[:, :, i, j] = x[:, :, top:bottom, left:right].sum((2, 3)) / ((bottom - top) * (right - left))
    return out


def at_the_smaller(a, b):
    height, width = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return average(a, height, width), average(b, height, width)


def nearest(x, height, width):
    """Enlarge or thin to that size: output i repeats row ⌊i·H/h⌋."""
    tall, wide = x.shape[2:]
    return x[:, :, [i * tall // height for i in range(height)]][:, :, :, [j * wide // width for j in range(width)]]


def pairs(inputs, student_kind="", teacher_kind=""):
    """Return (student, teacher) names, the shallowest first: of two against three the teacher's first is left out."""
    students = sorted(name for name in inputs.student_features if fits(name, student_kind))
    teachers = sorted(name for name in inputs.teacher_features if fits(name, teacher_kind))
    levels = min(len(students), len(teachers))
    return list(zip(students[-levels:], teachers[-levels:], strict=True))


def fits(name, kind):
    return name.startswith("stage") and name.removeprefix("stage")[1:] == kind


def maps(inputs, student, teacher):
    return np.array(inputs.student_features[student]), np.array(inputs.teacher_features[teacher])


def named_pairs(config, inputs):
    """Return the (student, teacher) names of a config's stages: each a name, a pair, or a group of both networks."""
    found = []
    for stage in config["stages"]:
        student, teacher = (stage, stage) if isinstance(stage, str) else (stage["student"], stage["teacher"])
        ends = [f".p{number}" for number in range(2, 8)]
        levels = [end for end in ends if student + end in inputs.student_features]
        levels = [end for end in levels if teacher + end in inputs.teacher_features]
        found += [(student + end, teacher + end) for end in levels] or [(student, teacher)]
    return found


def aligned(inputs, level, student, teacher):
    """Return a level's maps at the smaller size, the student's by ``connectors.LEVEL``, if it has a weight."""
    own = {key: value for key, value in inputs.parameters.items() if key.startswith(f"connectors.{level}.")}
    student, teacher = at_the_smaller(*maps(inputs, student, teacher))
    if own:
        weight, bias = (own.get(f"connectors.{level}.{key}") for key in ("weight", "bias"))
        student = convolution(student, weight, bias)
    return student, teacher


def regressor(parameters, prefix, student, teacher):
    """Return the convolution that fits the sizes, and the norm: parameters ``0.…`` and ``1.…`` below the prefix."""
    weight, bias = parameters[f"{prefix}0.weight"], parameters[f"{prefix}0.bias"]
    tall, wanted = student.shape[2], teacher.shape[2]
    if tall == 2 * wanted:
        mapped = convolution(student, weight, bias, stride=2, padding=1)
    elif 2 * tall == wanted:
        mapped = transposed_convolution(student, weight, bias, stride=2, padding=1)
    else:
        mapped = convolution(student, weight, bias)
    return batch_norm(mapped, parameters[f"{prefix}1.weight"], parameters[f"{prefix}1.bias"])
