"""A fixed linear encoder of feature maps: the principal components of their channels, fitted once.

No other R directions lose less variance (Jolliffe, Principal Component Analysis, 2002, section 2.1). Everything here
takes vectors [B, C] as well as maps [B, C, H, W].

B batch, C channels, H W space, R components, N positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from shards.manifest import write_atomically


class Encoder(NamedTuple):
    """A linear encoder: the mean that is subtracted at every position, and the directions that are kept.

    Both tensors are float32.
    """

    mean_C: Tensor
    basis_RC: Tensor
    """Orthonormal rows, the direction of largest variance first."""

    def encode(self, map_BCHW: Tensor) -> Tensor:
        """Return the codes [B, R, H, W] in float32, or in float64 if the map is float64."""
        with _without_autocast(map_BCHW):
            map_BHWC = _at_least_float32(map_BCHW).movedim(1, -1)
            codes_BHWR = (map_BHWC - self.mean_C) @ self.basis_RC.T.to(map_BHWC.dtype)
        return codes_BHWR.movedim(-1, 1)

    def decode(self, codes_BRHW: Tensor) -> Tensor:
        """Return the decoded map [B, C, H, W] in float32 or float64, in channels-last memory format."""
        with _without_autocast(codes_BRHW):
            codes_BHWR = _at_least_float32(codes_BRHW).movedim(1, -1)
            map_BHWC = codes_BHWR @ self.basis_RC.to(codes_BHWR.dtype) + self.mean_C
        return map_BHWC.movedim(-1, 1)

    def to(self, device: torch.device | str) -> Encoder:
        """Return the encoder on ``device``."""
        return Encoder(self.mean_C.to(device), self.basis_RC.to(device))


@torch.no_grad()
def fit_pca(maps: Iterable[Tensor], rank: int) -> Encoder:
    """Return the encoder with ``rank`` components, fitted to all positions of ``maps``, batches [B, C, H, W].

    One batch at a time is kept in memory. The same batches give the same encoder. Raises ValueError if there are no
    maps, if they are not finite, or if ``rank`` is not in 1 … C.
    """
    mean_C, covariance_CC = _moments(maps, rank)
    _, vectors_CC = torch.linalg.eigh(covariance_CC)
    # ``eigh`` sorts by ascending eigenvalue, so the largest variance comes last.
    basis_RC = vectors_CC.flip(1)[:, :rank].T
    # The sign of an eigenvector is arbitrary. Each one's largest entry is made positive, so that the result is unique.
    largest_R1 = basis_RC.gather(1, basis_RC.abs().argmax(1, keepdim=True))
    return Encoder(mean_C.float(), (basis_RC * largest_R1.sign()).float().contiguous())


def _moments(maps: Iterable[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return the mean [C] and the covariance [C, C] over all positions, summed in float64."""
    count, sum_C, products_CC = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for map_BCHW in maps:
        rows_NC = _positions(map_BCHW)
        channels = rows_NC.shape[1]
        if not 1 <= rank <= channels:
            raise ValueError(f"an encoder of {channels} channels has 1 to {channels} components, not {rank}")
        count, sum_C, products_CC = count + len(rows_NC), sum_C + rows_NC.sum(0), products_CC + rows_NC.T @ rows_NC
    if not count:
        raise ValueError("there are no maps to fit an encoder to")
    mean_C = sum_C / count
    covariance_CC = products_CC / count - mean_C.outer(mean_C)
    if not covariance_CC.isfinite().all():
        raise ValueError("the maps contain NaN or inf; no encoder can be fitted to them")
    return mean_C, covariance_CC


@torch.no_grad()
def unexplained(encoder: Encoder, maps: Iterable[Tensor]) -> float:
    """Return the share, in 0 … 1, of the maps' variance around the encoder's mean that encoding loses.

    It is Σ‖x − decode(encode(x))‖² / Σ‖x − mean‖² over all positions, in float64; 0 if there is no variance.
    """
    lost = total = 0.0
    for map_BCHW in maps:
        rows_NC = _positions(map_BCHW)
        lost += (rows_NC - encoder.decode(encoder.encode(rows_NC))).square().sum().item()
        total += (rows_NC - encoder.mean_C).square().sum().item()
    return lost / total if total else 0.0


def save_encoder(encoder: Encoder, path: Path) -> str:
    """Write the encoder as a safetensors file, atomically, and return the file's sha256."""
    content = to_bytes({name: tensor.cpu().contiguous() for name, tensor in encoder._asdict().items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_encoder(path: Path) -> Encoder:
    """Return the encoder that ``save_encoder`` wrote, on the CPU.

    Raises FileNotFoundError if there is no file, and ValueError if the file contains something else.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as an encoder ({error}); write it again") from None
    if found.keys() != set(Encoder._fields) or not _fits(encoder := Encoder(**found)):
        contents = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in sorted(found.items())) or "nothing"
        expected = "mean_C [C] and basis_RC [R, C] in float32"
        raise ValueError(f"{path}: not an encoder: expected {expected}, found {contents}; write it again")
    return encoder


def _fits(encoder: Encoder) -> bool:
    """Return whether mean and basis have matching shapes and are float32."""
    mean_C, basis_RC = encoder
    shapes_fit = mean_C.ndim == 1 and basis_RC.ndim == 2 and basis_RC.shape[1] == len(mean_C) >= len(basis_RC) >= 1
    return shapes_fit and mean_C.dtype == basis_RC.dtype == torch.float32


def _positions(map_BCHW: Tensor) -> Tensor:
    """Return the channel vectors at all positions [N, C], in float64."""
    return map_BCHW.movedim(1, -1).flatten(0, -2).double()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which matrix products keep the precision of their factors."""
    return torch.autocast(x.device.type, enabled=False)
