"""A cache is the same bytes however often its writing was interrupted, and by however many ranks it was written."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_on_ranks import BATCH, IMAGES, cache
from gloo_ranks import Ranks
from resolved import run_of
from safetensors.torch import load_file, save_file

from pipeline import cache_teacher
from pipeline.builders.teacher import build_live_teacher
from pipeline.caching import blocks
from pipeline.caching import write as writing
from pipeline.data.loader import create_loader
from pipeline.distributed import signals
from pipeline.errors import RecipeError
from pipeline.features import pca

Command = Callable[..., None]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_rows_are_the_teachers_answers_by_id_in_plain_numpy(written: Path, place: Path):
    run, device = run_of("all.yaml"), torch.device("cpu")
    recipe, config = run.recipe, run.recipe.teacher
    assert config is not None
    teacher = build_live_teacher(run, config, ["stage3", "stage2.preact"], device)
    loader = create_loader(
        recipe.data, batch=BATCH, accumulation=1, seed=3, rank=0, world=1, device=device, splits=("train",)
    )
    ids = np.arange(IMAGES)[::-1].copy()  # in another company than they were written in
    rows = np.argsort(loader.plan.readers["train"].samples["id"])[ids]
    for view in range(2):
        files = (written / f"view-{view:02d}.{kind}.npy" for kind in ("logits", "stage3", "stage2.preact"))
        logits, maps, before = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        assert logits.shape == (IMAGES, 20)
        for start, batch in zip(
            range(0, IMAGES, BATCH), loader.views((part, view) for part in rows.reshape(-1, BATCH)), strict=True
        ):
            outputs, part = teacher(batch), ids[start : start + BATCH]
            assert batch.ids_B.tolist() == part.tolist()
            np.testing.assert_allclose(logits[part], outputs.logits_BK.numpy(), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(maps[part], outputs.features["stage3"].numpy(), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(before[part], outputs.features["stage2.preact"].numpy(), rtol=1e-3, atol=1e-3)


def test_any_number_of_ranks_writes_the_same_bytes(written: Path, place: Path, several_ranks: Ranks):
    several_ranks(cache, place, ["all.yaml", "teacher.cache=cache", "block=24"])
    assert content(place / "cache") == content(written)


def test_views_and_kinds_can_be_added_later(written: Path, place: Path, run_cache: Command):
    run_cache("kd.yaml", "teacher.cache=cache", "views=1", "block=24")
    assert sorted(content(place / "cache")) == ["cache.json", "view-00.logits.npy", "view-00.logits.sha256.npy"]
    run_cache("all.yaml", "teacher.cache=cache", "views=1")
    run_cache("kd.yaml", "teacher.cache=cache", "views=2")  # in every kind that the cache has
    assert content(place / "cache") == content(written)


def test_stopped_by_a_signal_it_leaves_word_that_it_wants_to_go_on_and_goes_on(
    written: Path, place: Path, run_cache: Command, monkeypatch: pytest.MonkeyPatch
):
    words = ["all.yaml", "teacher.cache=cache", "block=24"]
    write, blocks_written = blocks.write_block, []

    def write_and_be_told(*args: object) -> None:
        blocks_written.append(args)
        write(*args)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(writing, "write_block", write_and_be_told)
    with pytest.raises(SystemExit) as end:
        run_cache(*words)
    assert end.value.code == 143
    assert len(blocks_written) == 1
    assert (place / "cache" / "preempted").is_file()
    monkeypatch.setattr(signals, "_requested", False)
    monkeypatch.setattr(writing, "write_block", write)
    run_cache(*words)
    assert content(place / "cache") == content(written)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["caching_on_ranks", "pipeline.cache_teacher"])  # which takes seconds


def start_writing(place: Path, folder: str) -> ForkServerProcess:
    words = ["ddkd.yaml", "views=60", "block=24", f"teacher.cache={folder}"]
    process = FORKS.Process(target=cache, args=(0, 1, place, words))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int | None:
    """Return the exit code, once there is one."""
    process.join()
    return process.exitcode


def marked(folder: Path) -> int:
    """Return how many blocks are marked as written."""
    found = 0
    for file in folder.glob("*.sha256.npy"):
        with suppress(FileNotFoundError):  # a writer takes digests away of which a kill left no data
            found += int(np.load(file).any(axis=1).sum())
    return found


@pytest.mark.endurance
def test_killed_ten_times_at_random_moments_it_ends_with_the_same_bytes(place: Path):
    assert ended(start_writing(place, "whole")) == 0
    rng, reached = random.Random(), []
    for _ in range(10):
        process = start_writing(place, "killed")
        before = marked(place / "killed")
        while marked(place / "killed") == before and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert ended(process) == -signal.SIGKILL
        reached.append(marked(place / "killed"))
    assert reached == sorted(set(reached))  # each went on, and none began again
    assert ended(start_writing(place, "killed")) == 0
    assert content(place / "killed") == content(place / "whole")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    copied: Path, run_cache: Command, monkeypatch: pytest.MonkeyPatch
):
    before = content(copied)
    usage = shutil.disk_usage(copied)
    monkeypatch.setattr(blocks.shutil, "disk_usage", lambda _: usage._replace(free=2**30 + 1000))
    told = r"needs 5\.8 kB more, but its disk has 1\.1 GB free, of which 1\.1 GB are reserved"
    with pytest.raises(RecipeError, match=told):
        run_cache("kd.yaml", "teacher.cache=logits", "encode={embedding: 4}", "kinds=embedding")
    assert content(copied.parent / "logits") == {}
    with pytest.raises(RecipeError, match=r"MB more"):
        run_cache("all.yaml", "teacher.cache=cache", "views=9")
    assert content(copied) == before


def test_a_teacher_worse_than_expected_is_not_cached(place: Path, run_cache: Command):
    with pytest.raises(RecipeError, match=r"expect: the teacher reaches"):
        run_cache("kd.yaml", "teacher.cache=cache", "teacher.expect=99")
    assert not (place / "cache").exists()


def test_an_answer_that_float16_does_not_hold_is_named(place: Path, run_cache: Command):
    state = load_file("teacher.safetensors")
    save_file({key: 1e6 * x if key.startswith("fc.") else x for key, x in state.items()}, "teacher.safetensors")
    with pytest.raises(RecipeError, match=r"the teacher's logits have values up to .*, but float16 ends at 65504"):
        run_cache("kd.yaml", "teacher.cache=cache")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kd.yaml"], r"teacher\.cache: the recipe names no folder"),
        (["kd.yaml", "teacher.cache=cache", "data.views=null"], r"views: give the number"),
        (["kd.yaml", "teacher.cache=cache", "views=0"], r"views: Input should be greater than 0, got 0"),
        (["kd.yaml", "teacher.cache=cache", "kinds=[stage9]"], r"no stage 'stage9'"),
        (["kd.yaml", "teacher.cache=cache", "encode={last: 65}"], r"stage3 has 64 channels"),
        (["kd.yaml", "teacher.cache=cache", "encode={last: 8, stage3: 4}"], r"stage3 has both 8 and 4 components"),
        (["kd.yaml", "teacher.cache=cache", "teacher.model=null", "teacher.weights=null"], r"no frozen network to run"),
    ],
)
def test_what_cannot_be_written_is_one_line(words: list[str], told: str, place: Path, run_cache: Command):
    with pytest.raises(RecipeError, match=told) as refusal:
        run_cache(*words)
    assert "\n" not in str(refusal.value)
    assert not (place / "cache").exists()


def test_a_folder_of_another_teachers_answers_is_not_continued(copied: Path, place: Path, run_cache: Command):
    before = content(copied)
    for words, told in (
        (["teacher.fold=false"], r"different settings: teacher\.network\.fold"),
        (["encode={last: 8}"], r"has stage3 as 64 × 4 × 4; keep this shape"),
        (["teacher.batch=6"], r"was written with teacher\.batch: 12, here 6"),
    ):
        with pytest.raises(RecipeError, match=told):
            run_cache("all.yaml", "teacher.cache=cache", *words)
    assert content(copied) == before


def test_maps_are_kept_as_principal_components_where_asked(place: Path, run_cache: Command, run_train: Command):
    run_cache("ddkd.yaml", "teacher.cache=cache", "encode={last: 16}", "block=24")
    kind = json.loads((place / "cache" / "cache.json").read_text())["kinds"]["stage3"]
    codes = np.load(place / "cache" / "view-00.stage3.npy")
    assert codes.shape == (IMAGES, 16, 4, 4)
    assert 0 < kind["encoded"]["unexplained"] < 1
    encoder = pca.load_encoder(place / "cache" / "stage3.encoder.safetensors")
    run_cache("ddkd.yaml", "teacher.cache=whole")
    maps = torch.from_numpy(np.load(place / "whole" / "view-00.stage3.npy")).float()
    lost = pca.unexplained(encoder, [maps])
    decoded = encoder.decode(torch.from_numpy(codes))
    left = (maps - decoded).square().sum() / (maps - encoder.mean_C[:, None, None]).square().sum()
    assert left.item() == pytest.approx(lost, rel=1e-2)
    run_train("ddkd.yaml", "teacher.cache=cache", "folder=encoded", "epochs=1")
    (place / "cache" / "stage3.encoder.safetensors").write_bytes(b"another")
    with pytest.raises(RecipeError, match=r"is missing or does not match the sha256 in cache\.json"):
        run_train("ddkd.yaml", "teacher.cache=cache", "folder=spoilt", "epochs=1")


def test_the_storage_of_each_choice_is_told_without_data_or_weights(capsys: pytest.CaptureFixture[str]):
    words = [
        "configs/imagenet/r50_mbv1.yaml",
        "method=ddkd",
        "teacher.cache=x",
        "views=10",
        "data.path=nowhere",
        "--dry-run",
    ]
    cache_teacher.main(words)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["*", "logits", "1000", "2,000", "2.6", "GB", "25.6", "GB"] in told
    assert ["*", "stage4", "2048", "×", "7", "×", "7", "200,704", "257.1", "GB", "2.6", "TB"] in told
    assert ["stage4", "256", "×", "7", "×", "7", "25,088", "32.1", "GB", "321.4", "GB"] in told
    cache_teacher.main([*words, "encode={last: 256}"])
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["*", "is", "written,", "together", "27,088", "34.7", "GB", "347.0", "GB"] in told
    cache_teacher.main(["configs/imagenet/r34_r18.yaml", *words[1:]])
    assert "64.3 GB" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fitnet", "diffkd"])
def test_a_detectors_maps_of_several_sizes_are_refused_with_their_bytes_and_of_one_size_listed(
    method: str, capsys: pytest.CaptureFixture[str]
):
    words = ["configs/demo_detection.yaml", f"method={method}", "data.path=nowhere", "data.samples=1000", "--dry-run"]
    several, one = "data.buckets=[[800, 1344], [1344, 800]]", "data.buckets=[[800, 1344]]"
    of_an_image = 2 * 32 * (100 * 168 + 50 * 84)  # float16, channels, cells of P3 and P4
    with pytest.raises(RecipeError, match=r"data\.buckets: .* all of 800 × 1344 a view would have 1\.3 GB;") as refused:
        cache_teacher.main([*words, several])
    assert "\n" not in str(refused.value)
    assert not capsys.readouterr().out
    cache_teacher.main([*words, one, "views=2"])
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["*", "is", "written,", "together", f"{of_an_image:,}", "1.3", "GB", "2.7", "GB"] in told
    with pytest.raises(RecipeError, match=r"teacher\.cache: images of several data\.buckets have maps"):
        cache_teacher.main([*words, several, "teacher.cache=cache"])
