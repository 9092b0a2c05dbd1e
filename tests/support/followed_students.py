"""A student that a teacher follows: its network, what a step of training does to it, and images."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.models import create_model


def student_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("cifar_resnet8", 10)


def learn(student: nn.Module, seed: int) -> None:
    """Change weights and BatchNorm statistics as a step of training does."""
    torch.manual_seed(seed)
    student.train()(torch.randn(8, 3, 16, 16) + seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def batch() -> Batch:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6), torch.arange(6), {})
