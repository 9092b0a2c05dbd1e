"""The encoder of feature maps: against the singular values of numpy, streamed, and to a file and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.features.pca import Encoder, fit_pca, load_encoder, save_encoder, unexplained

CHANNELS = 6


def maps(rows: int = 10, seed: int = 0) -> Tensor:
    """Return maps [rows, 6, 3, 2] of float64 whose channels depend on one another and are not around zero."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(rows, 3, 2, CHANNELS)) * 2.0 ** -np.arange(CHANNELS)
    rotation, _ = np.linalg.qr(random.normal(size=(CHANNELS, CHANNELS)))
    return torch.from_numpy(mixed @ rotation + random.normal(size=CHANNELS)).movedim(-1, 1)


def positions(map_BCHW: Tensor) -> np.ndarray:
    return map_BCHW.movedim(1, -1).reshape(-1, map_BCHW.shape[1]).numpy()


def orthonormality(encoder: Encoder) -> Tensor:
    return encoder.basis_RC @ encoder.basis_RC.T


@pytest.mark.parametrize("rank", range(1, CHANNELS + 1))
def test_components_are_the_leading_right_singular_vectors_of_the_centred_positions(rank: int):
    rows = positions(maps())
    _, _, expected = np.linalg.svd(rows - rows.mean(0))
    encoder = fit_pca([maps()], rank)
    assert encoder.mean_C.numpy() == pytest.approx(rows.mean(0), abs=1e-6)
    # A component is its vector up to the sign, and the sign is told by its largest entry.
    assert np.abs(encoder.basis_RC.numpy() @ expected[:rank].T) == pytest.approx(np.eye(rank), abs=1e-5)
    assert (encoder.basis_RC.gather(1, encoder.basis_RC.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.allclose(orthonormality(encoder), torch.eye(rank), atol=1e-6)


@pytest.mark.parametrize("rank", range(1, CHANNELS + 1))
def test_what_encoding_loses_is_the_share_of_the_discarded_eigenvalues(rank: int):
    rows = positions(maps())
    eigenvalues = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    share = eigenvalues[rank:].sum() / eigenvalues.sum()
    assert unexplained(fit_pca([maps()], rank), maps().split(3)) == pytest.approx(share, rel=1e-6, abs=1e-12)


def test_as_many_components_as_channels_lose_nothing():
    encoder = fit_pca([maps()], CHANNELS)
    again = encoder.decode(encoder.encode(maps()))
    assert torch.allclose(again, maps(), atol=1e-6)
    assert unexplained(encoder, [maps()]) < 1e-12


def test_maps_without_variance_lose_none():
    flat = torch.full((4, CHANNELS, 2, 2), 3.0)
    assert unexplained(fit_pca([flat], 1), [flat]) == 0


@given(st.lists(st.integers(1, 9), max_size=4))
def test_batches_of_any_split_give_the_same_encoder(cuts: list[int]):
    whole = fit_pca([maps()], 4)
    split = fit_pca(maps().tensor_split(sorted(cuts)), 4)  # a batch may be empty
    for ours, theirs in zip(split, whole, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_one_batch_at_a_time_is_asked_for():
    asked = iter(maps().split(2))
    with pytest.raises(ValueError, match="components"):
        fit_pca(asked, CHANNELS + 1)
    assert len(list(asked)) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_even_under_autocast(dtype: torch.dtype):
    half = maps().to(dtype)
    encoder = fit_pca([half], 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoder, fit_pca([half.double()], 4), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        codes = encoder.encode(half)
        again = encoder.decode(codes)
    assert codes.dtype == again.dtype == torch.float32
    assert torch.equal(codes, encoder.encode(half.float()))
    assert torch.equal(again, encoder.decode(codes))
    assert encoder.decode(codes.to(dtype)).dtype == torch.float32
    assert encoder.decode(encoder.encode(maps())).dtype == torch.float64


def test_vectors_are_maps_of_one_position():
    vectors = maps()[:, :, 0, 0]
    as_maps = vectors[:, :, None, None]
    encoder = fit_pca([vectors], 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoder, fit_pca([as_maps], 4), strict=True))
    codes = encoder.encode(vectors)
    assert codes.shape == (10, 4)
    assert torch.allclose(codes, encoder.encode(as_maps)[:, :, 0, 0])
    assert torch.allclose(encoder.decode(codes), encoder.decode(codes[:, :, None, None])[:, :, 0, 0])
    assert unexplained(encoder, [vectors]) == pytest.approx(unexplained(encoder, [as_maps]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_decoded_map_has_its_channels_last_in_memory(memory_format: torch.memory_format):
    encoder = fit_pca([maps()], 4)
    codes = encoder.encode(maps()).contiguous(memory_format=memory_format)
    assert encoder.decode(codes).is_contiguous(memory_format=torch.channels_last)
    assert encoder.decode(codes).shape == (10, CHANNELS, 3, 2)


@pytest.mark.parametrize("rank", [0, -1, CHANNELS + 1])
def test_a_rank_that_is_none_is_refused_in_one_line(rank: int):
    with pytest.raises(ValueError, match=f"^an encoder of 6 channels has 1 to 6 components, not {rank}$"):
        fit_pca([maps()], rank)


def test_no_maps_and_maps_that_are_not_finite_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^there are no maps to fit an encoder to$"):
        fit_pca([], 4)
    with pytest.raises(ValueError, match=r"^the maps contain NaN or inf; [^\n]*$"):
        fit_pca([maps(), torch.full((1, CHANNELS, 3, 2), torch.inf)], 4)


def test_an_encoder_comes_back_from_its_file_and_leaves_nothing_beside_it(tmp_path: Path):
    encoder = fit_pca([maps()], 4)
    save_encoder(encoder.to("cpu"), tmp_path / "last.safetensors")
    again = load_encoder(tmp_path / "last.safetensors")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, encoder, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


MEAN, BASIS = torch.zeros(CHANNELS), torch.eye(CHANNELS)[:4].contiguous()


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"mean_C": MEAN},
        {"mean_C": MEAN, "basis": BASIS},
        {"mean_C": MEAN, "basis_RC": BASIS, "more": MEAN.clone()},
        {"mean_C": MEAN.half(), "basis_RC": BASIS.half()},
        {"mean_C": MEAN[:5], "basis_RC": BASIS},
        {"mean_C": MEAN, "basis_RC": BASIS[0].clone()},
        {"mean_C": MEAN, "basis_RC": torch.zeros(7, CHANNELS)},
        {"mean_C": MEAN, "basis_RC": torch.zeros(0, CHANNELS)},
    ],
)
def test_a_file_of_other_tensors_is_refused_in_one_line(tmp_path: Path, held: dict[str, Tensor]):
    safetensors.torch.save_file(held, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: not an encoder: expected [^\n]* found [^\n]+$"):
        load_encoder(tmp_path / "other.safetensors")


def test_a_file_that_is_cut_short_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    save_encoder(fit_pca([maps()], 4), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors: cannot be read as an encoder [^\n]*$"):
        load_encoder(path)
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "none.safetensors")
