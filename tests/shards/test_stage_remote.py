"""``shards/stage.py`` from a URL: every byte is checked, and what cannot be read is one line."""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards import remote, stage
from shards.manifest import MANIFEST
from shards.prepare_demo import main as draw

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 training and 10 validation images, five in all."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    words = ["--train", "40", "--val", "10", "--size", "16", "--jobs", "1", "--samples-per-shard", "10"]
    assert draw([str(folder), *words]) == 0
    return folder


@pytest.fixture
def bucket(source: Path) -> Iterator[str]:
    """The URL of a copy in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    yield "memory://bucket/shards"
    files.rm("/bucket", recursive=True)


def test_a_copy_from_memory_or_a_file_url_has_every_byte(source, bucket, tmp_path, contents, capsys):
    for url in (bucket, f"{bucket}/", f"file://{source}"):
        local = tmp_path / url.rpartition("://")[0] / str(len(url))
        assert stage.main([url, str(local)]) == 0
        copy = Path(capsys.readouterr().out.strip())
        assert copy == stage.copy_path(source, local)
        assert contents(copy) == contents(source)
        assert stage.main([url, str(local), "--look"]) == 0
        assert capsys.readouterr().out == f"{copy}\n"


def test_a_copy_over_http_has_every_byte(source: Path, tmp_path: Path, contents):
    pytest.importorskip("aiohttp")
    handler = functools.partial(_QuietHandler, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        copy = stage.stage_shards(url, tmp_path)
        server.shutdown()
    assert contents(copy) == contents(source)
    with pytest.raises(OSError, match=rf"{url}/manifest\.json cannot be read \(.*\): check the URL, the network"):
        stage.stage_shards(url, tmp_path)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_connection_that_breaks_leaves_no_copy_and_the_next_run_goes_on(source, bucket, tmp_path, contents):
    opened: list[str] = []
    real = fsspec.get_filesystem_class("memory").open

    def breaking(self: Any, path: str, *args: Any, **keys: Any) -> Any:
        opened.append(Path(path).name)
        if len([name for name in opened if name.endswith(".tar")]) == 3:
            raise ConnectionResetError("reset by peer")
        return real(self, path, *args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsspec.get_filesystem_class("memory"), "open", breaking)
        patch.setattr(stage, "STREAMS", 1)
        with pytest.raises(OSError, match=r"memory://bucket/shards/.*\.tar cannot be read \(reset by peer\): check"):
            stage.stage_shards(bucket, tmp_path)
        copy = stage.copy_path(source, tmp_path)
        assert not (copy / MANIFEST).exists()
        kept = {path.name: path.stat().st_ino for path in copy.glob("*.tar")}
        assert 2 <= len(kept) < len([*source.glob("*.tar")])
        opened.extend(["x.tar"] * 3)
        assert stage.stage_shards(bucket, tmp_path) == copy
    assert contents(copy) == contents(source)
    assert all((copy / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_file_of_other_bytes_is_refused(bucket: str, tmp_path: Path, capsys):
    files = fsspec.filesystem("memory")
    path = "/bucket/shards/train-000001.tar"
    files.pipe_file(path, files.cat_file(path)[:-1] + b"x")
    with pytest.raises(ValueError, match=r"memory://bucket/shards/train-000001\.tar has a sha256 that differs"):
        stage.main([bucket, str(tmp_path)])
    assert not stage.is_complete(stage.copy_path(bucket, tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"memory://nowhere/manifest\.json cannot be read \(no such file\): check the URL"),
        ("nonsense://a/b", r"nonsense://a/b: Protocol not known: nonsense; fsspec lists its protocols"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line_and_two(tmp_path: Path, run, url: str, message: str):
    done = run("stage.py", url, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    with pytest.raises((OSError, ValueError), match=message):
        stage.main([url, str(tmp_path)])


def test_a_missing_driver_is_one_line_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://b/x: the driver of s3:// is not installed; pip install s3fs"):
        stage.main(["s3://b/x", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"fsspec is not installed; pip install fsspec"):
        stage.main(["s3://b/x", str(tmp_path)])


def test_looking_for_the_copy_of_a_url_that_was_not_copied_is_an_error(bucket: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is not complete: copy memory://bucket/shards without --look first"):
        stage.main([bucket, str(tmp_path), "--look"])
    assert not list(tmp_path.iterdir())


def test_without_room_a_url_is_an_error(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=stage._RESERVE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"has 1\.1 GB free and 1\.1 GB are needed"):
        stage.main([bucket, str(tmp_path)])


def test_a_path_is_no_url():
    assert [remote.is_url(text) for text in ("a/b", "/a:b", "s3://a", "file:///a")] == [False, False, True, True]
