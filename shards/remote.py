"""Folders of shards to copy from: on a mounted disk, or at a URL that fsspec can read, such as ``s3://bucket/shards``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp requests"}
_DRIVERS |= {"https": _DRIVERS["http"], "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
"""Packages that fsspec needs for a protocol."""


class SourceFolder(Protocol):
    """A folder whose files can be read. Its text is its path or URL."""

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of a file, ``size`` at a time. Raises OSError if it cannot be read."""
        ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises OSError if it cannot be read."""
        ...


class LocalFolder:
    """A folder on a mounted disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of a file, ``size`` at a time. Raises OSError if it cannot be read."""
        with (self._folder / name).open("rb") as file:
            while chunk := file.read(size):
                yield chunk

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises OSError if it cannot be read."""
        return (self._folder / name).stat().st_size


class RemoteFolder:
    """A folder at a URL. Raises OSError for every error of the driver, and ValueError if there is no driver."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files, self._path = _connect(self._url)

    def __str__(self) -> str:
        return self._url

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of a file, ``size`` at a time. Raises OSError if it cannot be read."""
        url = f"{self._url}/{name}"
        with _errors(url):
            file = self._files.open(f"{self._path}/{name}", "rb")
        with file:
            while True:
                with _errors(url):
                    chunk = file.read(size)
                if not chunk:
                    return
                yield chunk

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises OSError if it cannot be read."""
        with _errors(f"{self._url}/{name}"):
            return int(self._files.size(f"{self._path}/{name}") or 0)


def is_url(source: Path | str) -> bool:
    """Return whether a source is a URL, and not a path."""
    return isinstance(source, str) and "://" in source


def connect_source(source: Path | str) -> SourceFolder:
    """Return the folder at a path or URL. Raises ValueError if a package is missing for the URL."""
    return RemoteFolder(source) if isinstance(source, str) and is_url(source) else LocalFolder(Path(source))


def _connect(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it."""
    try:
        import fsspec.core
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{url}: fsspec is not installed; pip install fsspec (or this project's extra 'data')"
        ) from error
    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        packages = _DRIVERS.get(protocol)
        advice = f"pip install {packages}" if packages else str(error)
        raise ValueError(f"{url}: the driver of {protocol}:// is not installed; {advice}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; fsspec lists its protocols in fsspec.available_protocols()") from error
    except Exception as error:  # each driver raises exceptions of its own
        raise _unreachable(url, error) from error


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each driver raises exceptions of its own
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: BaseException) -> OSError:
    # A driver may report an unknown host as a missing file, which the host's error has caused.
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) or not reason:
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
    return OSError(f"{url} cannot be read ({reason}): check the URL, the network and your credentials")
