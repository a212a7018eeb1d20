"""Atomic files and folders: a killed process leaves the old state or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, CorruptFile, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = [
    "atomic_dir",
    "atomic_write",
    "check_writable",
    "disk_guard",
    "hash_state",
    "hash_weights",
    "locked",
    "read_tensors",
    "sha256_file",
    "sha256_json",
    "write_tensors",
]


# No permission, or a file where a folder is needed, or the reverse.
_BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextlib.contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that says what to do.

    Errors of files that are neither above `path` nor beside or below it pass: they say nothing about `path`.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(f"{path}: the disk is full; free space or choose another folder") from error
        if number in _BARRED and not _elsewhere(error, path):
            raise BadInput(
                "path", str(path), "cannot be written", "choose a folder you can write to"
            ) from error
        raise


def _elsewhere(error: Exception, path: Path) -> bool:
    """Whether the error names a file that has nothing to do with `path`."""
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, bytes, os.PathLike)):
        return False
    named, ours = (Path(os.path.abspath(os.fsdecode(p))) for p in (name, path))
    return not (named.is_relative_to(ours.parent) or ours.is_relative_to(named))


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors, no OSError, gives it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error) if type(error).__name__ == "SafetensorError" else ""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def check_writable(folder: str | os.PathLike[str], argument: str = "output") -> Path:
    """Check, before any work is done, that `folder` (or its nearest existing parent) can be written.

    Raises:
        BadInput: it exists as a file, or cannot be written.
    """
    path = Path(os.path.expanduser(folder))
    parent = path
    while not parent.exists():
        if parent.parent == parent:
            break
        parent = parent.parent
    if not parent.is_dir():
        raise BadInput(argument, str(path), "is not a folder", "give a folder path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(argument, str(path), "cannot be written", "choose a folder you can write to")
    return path


def _beside(target: Path, ending: str) -> Path:
    """A hidden name in the folder of `target` that nothing has yet."""
    return target.parent / f".{target.name}.{secrets.token_hex(6)}{ending}"


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder, then rename; its mode is the umask's."""
    target = Path(path)
    with disk_guard(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        name = _beside(target, ".tmp")
        try:
            with open(name, "xb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str], *, mark: str | None = "transfuse.json") -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, on error it is removed.

    Args:
        path: The folder.
        mark: A file by which an earlier result is known; a folder that has other files and not this one is not
            replaced. None replaces whatever is there.

    Raises:
        BadInput: `path` holds what is no earlier result; or it is the current folder or one above it.
    """
    target = Path(path)
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
        if Path.cwd().is_relative_to(target.resolve()):
            raise BadInput("path", str(path), "holds the current folder", "choose a folder of its own")
    there = mark and target.is_dir() and not target.is_symlink() and any(target.iterdir())
    if there and not (target / str(mark)).is_file():
        raise BadInput(
            "path", str(path), f"holds files, and no {mark}: they would be lost",
            "choose another folder, or remove this one",
        )  # fmt: skip
    with disk_guard(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = _beside(target, ".tmp")
        work.mkdir()
        old = None
        try:
            yield work
            if target.is_dir() and not target.is_symlink() and _exchanged(work, target):
                return
            if target.exists():
                old = _beside(target, ".old")
                os.replace(target, old)
            os.replace(work, target)
        except BaseException:
            if old is not None and old.exists() and not target.exists():
                os.replace(old, target)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)  # after an exchange: the old content
            if old is not None and target.exists():
                _remove(old)


def _remove(path: Path) -> None:
    """What `path` names, be it a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system cannot (only Linux can, on most file systems)."""
    import ctypes

    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an exclusive advisory lock on `path` (created when missing) between processes."""
    import fcntl

    lock = Path(path)
    with disk_guard(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(stream, fcntl.LOCK_UN)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(stream)
        )


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 over the checksums of a model folder's configuration and weight files."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return sha256_json([(p.name, sha256_file(p)) for p in files])


def hash_state(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, whatever their order."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `tensors` as safetensors, atomically; `metadata` values are stored as JSON strings.

    Tensors that share memory (tied weights, views of one another) are each written in full.
    """
    from safetensors.torch import save

    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        ready[name] = plain = tensor.detach().cpu().contiguous()
        if (address := plain.untyped_storage().data_ptr()) in seen:
            ready[name] = plain.clone()  # the format refuses to store shared memory twice
        seen.add(address)
    atomic_write(path, save(ready, metadata=header or None))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file: tensors, and metadata decoded as `write_tensors` wrote them, others as text.

    Raises:
        CorruptFile: the file is truncated, or not safetensors (pickle files are never opened).
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise BadInput("path", str(path), "does not exist", "give a safetensors file")
    try:
        with safe_open(str(path), framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return tensors, {key: _decoded(value) for key, value in header.items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFile(
            "path", str(path), f"is not a readable safetensors file ({error})", "restore it or make it again"
        ) from error


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
