"""Small data sets as tensors. Images are float32 in [0, 1], `[N, channels, H, W]`; classes int64 `[N]`."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import itertools
import re

import numpy as np
import torch
from torch import Tensor

from transfuse.core.datasets import dataset_path
from transfuse.core.training import generator


@functools.cache
def animal_shapes() -> tuple[Tensor, Tensor]:
    """Animal-Shape-MNIST: 10,000 silhouettes 28x28, 10 classes.

    The files are pickles of one numpy array each. They are not unpickled: the array's bytes are cut out.
    """
    images = _payload("animal-shape-mnist/images.gz", np.uint8, 10_000 * 28 * 28).reshape(-1, 1, 28, 28)
    labels = _payload("animal-shape-mnist/labels.gz", np.dtype("<i8"), 10_000)
    return torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def _payload(name: str, dtype: type | np.dtype, count: int) -> np.ndarray:
    raw = gzip.decompress(dataset_path(name).read_bytes())
    size = count * np.dtype(dtype).itemsize
    start = raw.index(b"B" + size.to_bytes(4, "little")) + 5  # the opcode of a byte string, and its length
    return np.frombuffer(raw[start : start + size], dtype=dtype)


@functools.cache
def mnist_5k() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits, 500 per class."""
    with gzip.open(dataset_path("mnist-5k.csv.gz")) as stream:
        table = np.loadtxt(io.TextIOWrapper(stream), delimiter=",", dtype=np.int64)
    images = torch.from_numpy(table[:, :-1].astype(np.float32) / 255).view(-1, 1, 28, 28)
    return images, torch.from_numpy(table[:, -1].copy())


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits as vectors `[N, 64]` in [0, 1], in their own order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


@functools.cache
def cifar10(part: str = "train", count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` images of CIFAR-10's part, in the file's fixed shuffle: `[N, 3, 32, 32]`."""
    return _pictures(f"cifar10-{part}.parquet", count)


def _pictures(name: str, count: int | None) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(dataset_path(name)).slice(0, count)
    arrays = [
        np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()
    ]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor(table["label"].to_pylist())


@functools.cache
def long_text() -> str:
    """English prose that comes with every Python: its help topics (about 464 thousand characters)."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return re.sub(r"[^\x20-\x7e\n]", "", text)


def split(count: int, parts: tuple[int, ...], seed: int) -> list[Tensor]:
    """Shuffled, disjoint index sets of the given sizes."""
    order = torch.randperm(count, generator=generator(seed))
    ends = list(itertools.accumulate(parts))
    return [order[end - size : end] for size, end in zip(parts, ends, strict=True)]


def rows(*columns: Tensor, names: tuple[str, ...] = ("pixel_values", "labels")) -> list[dict[str, Tensor]]:
    """Tensors as the rows that a Trainer takes."""
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def table(name: str) -> list[list[str]]:
    """A tab-separated data set."""
    with dataset_path(name).open(encoding="utf-8") as stream:
        return list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
