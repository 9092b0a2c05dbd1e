"""A counter of floating-point operations, and the peak rates of known GPUs."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """A context that counts the floating-point operations of the code inside it, on any device.

    ``with FlopCounter() as counter:`` adds them up in ``counter.flops``. Convolutions and matrix products are counted,
    including those of attention. A multiplication and an addition are two operations, as usual for "model FLOPs".
    Nothing else is counted, nor are kernels that do not belong to torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        # Only in inference mode does conv2d arrive as one operation that must be decomposed first.
        if formula is None and torch.is_inference_mode_enabled():
            with self:
                composed = func.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *options: Any, out_val: tuple[Tensor | None, ...], **_: Any
) -> int:
    """Return the operations of the computed gradients; each takes the same number as the forward convolution.

    torch's own formula treats a grouped convolution's gradient as dense: 32 times too many for 32 depthwise channels.
    """
    transposed = options[4]  # bias_sizes, stride, padding, dilation, transposed, …
    return 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(x is not None for x in out_val[:2])


FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: _convolution_backward}


class Peak(NamedTuple):
    """Peak TFLOP/s of a GPU's tensor cores by recipe precision: dense, float32 sums; None if unsupported."""

    fp16: float
    bf16: float | None
    fp32: float
    """TF32, which torch uses for convolutions by default, if the GPU has it; otherwise float32."""


# The sources are NVIDIA's data sheets and, for GeForce GPUs, the white papers of their architectures. Where a source
# gives the rate for sparse matrices, the table has half of it. The first row whose words all occur in the GPU's name
# applies.
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
OTHER_VARIANTS = {"MIG", "Laptop", "D", "Ti", "FHHL"}
"""Words in a GPU's name that mean a different GPU, or only a partition of one."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak FLOP/s in a precision, None if unknown."""
    return peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_of(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of the named GPU in fp32, bf16 or fp16, None if unknown."""
    words = set(re.split("[ -]", name))
    peak = next((peak for key, peak in PEAKS.items() if words.issuperset(key.split())), None)
    teraflops = getattr(peak, precision) if peak and not words & OTHER_VARIANTS else None
    return 1e12 * teraflops if teraflops else None
