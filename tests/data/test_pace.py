"""What tuning found is taken where a recipe leaves it open, and changes no pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shard_factory import CPU, config_of, join, open_loader

from pipeline.batch import Progress
from pipeline.data.jpeg_engine import has_engine
from pipeline.data.loader import Config
from pipeline.data.loader_settings import LoaderSettings, cores, remember, tuned_path
from shards.manifest import read_manifest

FOUND = LoaderSettings(threads=cores() + 2, prefetch=3)
DEFAULT = LoaderSettings(threads=cores(), prefetch=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(photo_shards: Path) -> Config:
    return config_of(photo_shards, threads=None)


def remembered_for(config: Config) -> None:
    remember(FOUND, config, read_manifest(Path(config.path)), CPU)


def pace_in(config: Config, **keys: object) -> LoaderSettings:
    return open_loader(config.model_copy(update=keys)).settings


def test_what_was_found_is_taken_and_what_the_recipe_says_itself_wins(config: Config):
    assert pace_in(config) == DEFAULT
    remembered_for(config)
    assert pace_in(config) == FOUND
    assert pace_in(config, threads=1) == LoaderSettings(threads=1, prefetch=3)
    assert pace_in(config, prefetch=1) == LoaderSettings(threads=FOUND.threads, prefetch=1)


def test_what_was_found_is_for_such_images_on_as_many_cores_alone(
    config: Config, small_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    remembered_for(config)
    assert pace_in(config, size=24) == DEFAULT
    assert pace_in(config_of(small_shards, crop="pad", threads=None)) == DEFAULT
    remembered_for(config.model_copy(update={"size": 24}))
    assert pace_in(config, size=24) == pace_in(config) == FOUND
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores() * 2))
    assert pace_in(config) == LoaderSettings(threads=1, prefetch=2)


def test_a_task_that_slurm_binds_has_its_cores_for_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 3  # by torchrun all ranks have all cores
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert cores() == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")  # bound to none, they share what the job has
    assert cores() == 3


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[1, 2]", '{"a processor": {"threads": 0, "prefetch": 2}}', '{"a": {"depth": 3}}', None]
)
def test_a_file_that_is_no_such_thing_is_passed_over_with_a_line(
    config: Config, content: str | None, capsys: pytest.CaptureFixture[str]
):
    path = tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text(content) if content is not None else path.mkdir()
    assert pace_in(config) == DEFAULT
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {path} is ignored")
    assert pace_in(config, threads=1, prefetch=1) == LoaderSettings(threads=1, prefetch=1)
    assert capsys.readouterr().out == ""  # it was not asked


def test_a_file_that_is_no_such_thing_is_written_anew(config: Config):
    tuned_path().parent.mkdir(parents=True)
    tuned_path().write_text("no JSON")
    remembered_for(config)
    assert pace_in(config) == FOUND


def check_pixels(config: Config, device: torch.device) -> None:
    def everything(**keys: object) -> tuple[LoaderSettings, list]:
        loader = open_loader(config.model_copy(update=keys), batch=6, device=device)
        batch = join(loader.stream(Progress(loader.steps_per_epoch), 2))
        return loader.settings, list(batch[:3])

    paced = [everything(), everything(threads=1, prefetch=1)]
    remember(FOUND, config, read_manifest(Path(config.path)), device)
    paced += [everything(), everything(threads=2, prefetch=4)]
    assert len({(pace.threads, pace.prefetch) for pace, _ in paced}) == 4
    expected = paced[0][1]
    for _, found in paced[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_no_pixel_depends_on_the_pace_given_or_remembered(config: Config):
    check_pixels(config, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0, 1])
def test_no_pixel_of_a_gpu_depends_on_the_pace(config: Config, hw_decoder_load: int):
    if hw_decoder_load and not has_engine(torch.device("cuda")):
        pytest.skip("needs a GPU with a JPEG engine")
    check_pixels(config.model_copy(update={"hw_decoder_load": hw_decoder_load}), torch.device("cuda"))
