"""Floating-point operations: those of what runs, counted, and those that a GPU could do in a second."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """``with FlopCounter() as counted:`` adds up in ``counted.flops`` the operations of what runs, on any device.

    They are those of convolutions and of matrix products, attention's among them, a multiplication and an addition
    being two: the convention of "model FLOPs". Nothing else is counted, and neither is what has no kernel of torch's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():  # there alone conv2d comes as such
            with self:
                composed = func.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *more: Any, out_val: tuple[Tensor | None, ...], **_: Any
) -> int:
    """Return the operations of the gradients that were asked for, each as many as the convolution has.

    torch's own formula takes a grouped convolution's gradient for a dense one's: 32 × for 32 depthwise channels.
    """
    transposed = more[4]
    return 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(x is not None for x in out_val[:2])


FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: _convolution_backward}


class Peak(NamedTuple):
    """TFLOP/s of a GPU's tensor cores by a recipe's precision: dense, summed in float32; None where it has none."""

    fp16: float
    bf16: float | None
    fp32: float
    """In TF32, in which torch convolves by default where there is any; else in float32."""


# NVIDIA's data sheets and, for the GeForces, the white papers of their architectures. Where those give the rate of
# sparse matrices, half of it. A row is for GPUs with all of its words in their names, the first that fits.
PEAKS = {
    "B200": Peak(2250, 2250, 1125),
    "H200 NVL": Peak(835.5, 835.5, 417.5),
    "H200": Peak(989.4, 989.4, 494.7),
    "H100 NVL": Peak(835.5, 835.5, 417.5),
    "H100 PCIe": Peak(756, 756, 378),
    "H100": Peak(989.4, 989.4, 494.7),
    "GH200": Peak(989.4, 989.4, 494.7),
    "A100": Peak(312, 312, 156),
    "A40": Peak(149.7, 149.7, 74.8),
    "A10": Peak(125, 125, 62.5),
    "L40S": Peak(362, 362, 183),
    "L40": Peak(181, 181, 90.5),
    "L4": Peak(121, 121, 60),
    "RTX 4090": Peak(165.2, 165.2, 82.6),
    "RTX 3090": Peak(71, 71, 35.6),
    "V100S": Peak(130, None, 16.4),
    "V100 PCIE": Peak(112, None, 14),
    "V100": Peak(125, None, 15.7),
    "T4": Peak(65, None, 8.1),
}
OTHERS = {"MIG", "Laptop", "D", "Ti", "FHHL"}
"""A word of these names another GPU, or a part of one."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return what the device could do in a second, None where that is not known."""
    return peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_of(name: str, precision: str) -> float | None:
    """Return what a GPU of that name could do in a second in that precision: fp32, bf16 or fp16."""
    words = set(re.split("[ -]", name))
    peak = next((peak for key, peak in PEAKS.items() if words.issuperset(key.split())), None)
    teraflops = getattr(peak, precision) if peak and not words & OTHERS else None
    return 1e12 * teraflops if teraflops else None
