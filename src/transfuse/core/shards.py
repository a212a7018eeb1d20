"""Safetensors checkpoints larger than memory: read by memory map a few rows at a time, written as shards in one go.

`Checkpoint` knows every tensor's dtype and shape without reading any, and hands out rows as views of the map;
pages that were used are given back, so that the process does not grow with the file. `ShardWriter` knows the
layout of its files before the first tensor is made, and appends tensors row by row: no shard is ever in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import BadInput, CorruptFile, Unavailable

__all__ = [
    "INDEX",
    "SHARD_BYTES",
    "Checkpoint",
    "ShardWriter",
    "TensorInfo",
    "check_folder",
    "check_space",
    "refuse_pickles",
    "row_blocks",
    "weight_files",
]

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in a file, at most, unless one tensor is larger."""

_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_KEPT = 32 << 20  # bytes of a map that may stay in memory after use
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorInfo(NamedTuple):
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize


def row_blocks(info: TensorInfo, elements: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive rows that cover a tensor, each block of about `elements` elements."""
    step = max(1, elements * info.rows // max(info.numel, 1))
    for start in range(0, info.rows, step):
        yield start, min(start + step, info.rows)


class _File:
    """One safetensors file under a private memory map: what is written to a view does not reach the disk."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt"):  # it checks lengths and offsets
                pass
            with open(path, "rb") as stream:
                size = struct.unpack("<Q", stream.read(8))[0]
                header = json.loads(stream.read(size))
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            remedy = "copy or download it again"
            raise CorruptFile("model", str(path), f"is not readable ({error})", remedy) from error
        self.path = path
        header.pop("__metadata__", None)
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise BadInput(
                    "model",
                    f"{path.name}: {name}",
                    f"has dtype {entry['dtype']}",
                    "save it as bf16 or float32",
                )
            self.infos[name] = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._starts[name] = 8 + size + entry["data_offsets"][0]
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.infos[name]
        if not info.numel:
            return torch.empty(info.shape, dtype=info.dtype)
        wide = info.numel // info.rows  # elements of a row
        count = (stop - start) * wide
        flat = torch.frombuffer(
            self._map, dtype=info.dtype, count=count,
            offset=self._starts[name] + start * wide * info.dtype.itemsize,
        )  # fmt: skip
        return flat.view(stop - start, *info.shape[1:]) if info.shape else flat.view(())

    def drop(self) -> None:
        """Give the pages back. Views stay valid: a page that is touched again is read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, those that `from_pretrained` would read where it can read them.

    `model.safetensors` comes before shards of another save; without either, all files count.

    Raises:
        BadInput: there are none.
        CorruptFile: an index that cannot be read, or that names a file that is missing or lies elsewhere.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({str(name) for name in found})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptFile("model", str(index), f"is not an index ({error})", "save it again") from error
        for name in names:
            inside = Path(name).name == name and name.endswith(".safetensors")
            if not (inside and (folder / name).is_file()):
                raise CorruptFile("model", str(folder), f"lacks {name}", "copy or download it again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput("model", str(folder), "holds no safetensors", "save the model as safetensors")
    return files


def check_folder(folder: Path) -> None:
    """Refuse a model folder without configuration or weights, or with pickle weights only.

    Raises:
        BadInput, CorruptFile: as said; also as `weight_files`.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            remedy = "load its base model, then peft.PeftModel.from_pretrained(model, folder)"
            raise BadInput("model", str(folder), "is an adapter, not a whole model", remedy)
        raise BadInput("model", str(folder), "has no config.json", "give a transformers model folder")
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        refuse_pickles(folder)
        problem, remedy = "has no .safetensors weights", "save the model with save_pretrained"
        raise BadInput("model", str(folder), problem, remedy)
    weight_files(folder)


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickle files.

    Raises:
        CorruptFile: it is one.
    """
    unsafe = [path.name for pattern in _UNSAFE for path in folder.glob(pattern)]
    if unsafe and not any(folder.glob("*.safetensors")):
        problem = f"has only pickle weights ({unsafe[0]}), which are never opened"
        raise CorruptFile("model", str(folder), problem, "save the model as safetensors")


class Checkpoint:
    """The tensors of a model folder (or of one safetensors file), read when asked for.

    Args:
        path: Folder with `*.safetensors`, in one file or in shards, or such a file.

    Attributes:
        path: The same.
        infos: Name -> dtype and shape, in the order of the files.

    Raises:
        BadInput: no safetensors there; a tensor that two files hold; a dtype that is not known.
        CorruptFile: a file that cannot be read, or one that the index names and that is missing.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._where: dict[str, _File] = {}
        self._touched: dict[Path, _File] = {}
        self._used = 0
        self.infos: dict[str, TensorInfo] = {}
        for file in [self.path] if self.path.is_file() else weight_files(self.path):
            opened = _File(file)
            for name, info in opened.infos.items():
                if name in self._where:
                    raise BadInput(
                        "model", str(file), f"holds {name}, which {self._where[name].path.name} holds too",
                        "remove the files of another save",
                    )  # fmt: skip
                self._where[name], self.infos[name] = opened, info

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop - 1` of a tensor, in its own dtype; a view of the map: read, do not keep."""
        file = self._where[name]
        found = file.rows(name, start, stop)
        self._touched[file.path] = file
        self._used += found.nbytes
        if self._used > _KEPT:
            for each in self._touched.values():
                each.drop()
            self._touched.clear()
            self._used = 0
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of a whole tensor."""
        return self.rows(name, 0, self.infos[name].rows).clone()


class ShardWriter:
    """Writes tensors, one after the other, as `model.safetensors` or as shards with their index.

    Tensors are laid out in the order given, those of wide dtypes first within a file (which keeps every tensor
    aligned). A thread of its own writes, so that the next rows are computed meanwhile.

    Args:
        folder: Exists; take a temporary one (`files.atomic_dir`).
        infos: Name -> dtype and shape of all that will be written.
        shard_bytes: Largest file, unless one tensor is larger.

    Attributes:
        shards: Per file, its name and the names of its tensors in the order they must come.

    Raises:
        BadInput: nothing to write, or a size below 1.
    """

    def __init__(
        self, folder: str | os.PathLike[str], infos: Mapping[str, TensorInfo], shard_bytes: int = SHARD_BYTES
    ):
        if not infos:
            raise BadInput("infos", 0, "leave nothing to write", "give tensors")
        if shard_bytes < 1:
            raise BadInput("shard_bytes", shard_bytes, "is below 1", "give a size in bytes, 5_000_000_000")
        self.folder, self.infos = Path(folder), dict(infos)
        groups: list[list[str]] = [[]]
        size = 0
        for name, info in infos.items():
            if groups[-1] and size + info.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += info.nbytes
        for group in groups:
            group.sort(key=lambda name: -infos[name].dtype.itemsize)
        count = len(groups)
        self.shards = {
            "model.safetensors" if count == 1 else f"model-{i:05}-of-{count:05}.safetensors": group
            for i, group in enumerate(groups, 1)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def write(self, produce: Callable[[str], Iterable[torch.Tensor]]) -> None:
        """Write every file, and the index where there are several.

        Args:
            produce: For a name, the tensor's rows from first to last, in pieces; called in the order of `shards`.

        Raises:
            BadInput: the pieces have another dtype, or more or fewer bytes, than was announced.
        """
        for file, names in self.shards.items():
            with open(self.folder / file, "wb", buffering=0) as raw, _Background(raw) as out:
                out.put(self._header(names))
                for name in names:
                    info = self.infos[name]
                    left = info.nbytes
                    for piece in produce(name):
                        left -= piece.nbytes
                        if piece.dtype != info.dtype or left < 0:
                            break
                        out.put(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
                    if left:
                        raise BadInput(name, left, "bytes are left", f"give {info.shape} of {info.dtype}")
        if len(self.shards) > 1:
            where = {name: file for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _header(self, names: Iterable[str]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            info = self.infos[name]
            start, end = end, end + info.nbytes
            entries[name] = {
                "dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]
            }  # fmt: skip
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class _Background:
    """Writes what is put, in order, in a thread of its own; an error of the thread is raised at the next call."""

    def __init__(self, stream: Any, waiting: int = 8):
        self._stream = stream
        self._error: BaseException | None = None
        self._queue: queue.Queue[Any] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def put(self, data: bytes | memoryview) -> None:
        self._check()
        self._queue.put(data)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the queue is emptied, so that the other side does not wait
            try:
                view = memoryview(data)
                while view.nbytes:
                    view = view[self._stream.write(view) :]
            except BaseException as error:
                self._error = error


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse, before any work, what the disk of `folder` (or of its nearest existing parent) has no room for.

    Raises:
        Unavailable: it has not.
    """
    place = folder
    while not place.exists() and place.parent != place:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise Unavailable(
            f"{folder}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free space or choose another folder"
        )
