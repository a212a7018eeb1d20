"""core.shards: what is written is what safetensors reads, row by row, in any cut; damaged files are named."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transfuse.core import shards
from transfuse.core.errors import BadInput, CorruptFile, Unavailable
from transfuse.core.files import disk_guard
from transfuse.core.shards import INDEX, Checkpoint, ShardWriter, TensorInfo, check_space, row_blocks
from transfuse.core.training import generator


@pytest.fixture
def tensors():
    random = generator(0)
    return {
        "half": torch.randn(7, 5, generator=random).to(torch.bfloat16),
        "wide": torch.randn(3, 4, 2, generator=random),
        "odd": torch.randn(3, generator=random).half(),
        "ids": torch.arange(11),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }


def infos(tensors):
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def pieces(tensors, elements=6):
    def produce(name):
        info = TensorInfo(tensors[name].dtype, tuple(tensors[name].shape))
        for start, stop in row_blocks(info, elements):
            yield tensors[name][start:stop] if info.shape else tensors[name]

    return produce


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted
    )


@pytest.mark.parametrize("size", [10**9, 100, 40, 1])
def test_written_tensors_are_read_by_safetensors(tensors, tmp_path, size):
    writer = ShardWriter(tmp_path, infos(tensors), size)
    writer.write(pieces(tensors))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == sorted(writer.shards)
    found = {}
    for file in files:
        found.update(load_file(file))
        with safe_open(str(file), "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
    assert same(found, tensors)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
    else:
        assert not (tmp_path / INDEX).exists()
    for file, names in writer.shards.items():
        held = sum(tensors[name].nbytes for name in names)
        assert held <= size or len(names) == 1, file
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    assert same({name: checkpoint.tensor(name) for name in checkpoint.infos}, tensors)


def test_every_tensor_is_aligned(tensors, tmp_path):
    ShardWriter(tmp_path, infos(tensors)).write(pieces(tensors))
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


def test_rows_are_views_that_cannot_reach_the_file(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    rows = checkpoint.rows("half", 2, 5)
    assert torch.equal(rows, tensors["half"][2:5])
    rows.zero_()
    assert torch.equal(Checkpoint(tmp_path).rows("half", 2, 5), tensors["half"][2:5])


def test_pages_are_given_back(tmp_path, monkeypatch):
    """Going through a file leaves little of it in the process, and what is read stays right."""
    tensor = torch.arange(6_000_000, dtype=torch.float32).view(6000, 1000)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr(shards, "_KEPT", 1 << 20)

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    checkpoint = Checkpoint(tmp_path)
    before, most = resident(), 0
    for start, stop in row_blocks(checkpoint.infos["x"], 100_000):
        assert float(checkpoint.rows("x", start, stop)[-1, -1]) == stop * 1000 - 1
        most = max(most, resident() - before)
    assert most < tensor.nbytes / 3


def test_blocks_cover_a_tensor():
    for shape in [(7, 5), (1,), (), (3, 1000), (0, 4), (13,)]:
        info = TensorInfo(torch.float32, shape)
        blocks = list(row_blocks(info, 10))
        assert [b[0] for b in blocks] == [0, *(b[1] for b in blocks[:-1])][: len(blocks)]
        assert (blocks[-1][1] if blocks else 0) == info.rows


@pytest.mark.parametrize("fault", ["more", "less", "dtype"])
def test_what_was_not_announced_is_refused(tensors, tmp_path, fault):
    def produce(name):
        wrong = {"more": [tensors[name]] * 2, "less": [], "dtype": [tensors[name].double()]}[fault]
        return wrong if name == "half" else [tensors[name]]

    with pytest.raises(BadInput, match="half"):
        ShardWriter(tmp_path, infos(tensors)).write(produce)


def test_bad_arguments(tmp_path):
    with pytest.raises(BadInput, match="infos"):
        ShardWriter(tmp_path, {})
    with pytest.raises(BadInput, match="shard_bytes"):
        ShardWriter(tmp_path, {"a": TensorInfo(torch.float32, (1,))}, 0)


def test_a_full_disk_is_told(tensors, tmp_path, monkeypatch):
    def full(self):
        while (_ := self._queue.get()) is not None:
            self._error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards._Background, "_work", full)
    with pytest.raises(Unavailable, match="disk is full"), disk_guard(tmp_path):
        ShardWriter(tmp_path, infos(tensors)).write(pieces(tensors))


def test_room_is_checked(tmp_path):
    check_space(tmp_path / "new" / "deeper", 1)
    with pytest.raises(Unavailable, match="free"):
        check_space(tmp_path / "new", 10**18)


def test_damaged_checkpoints_are_named(tensors, tmp_path):
    with pytest.raises(BadInput, match="no safetensors"):
        Checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        Checkpoint(tmp_path)
    save_file(tensors, file)
    save_file({"half": tensors["half"]}, tmp_path / "other.safetensors")
    assert Checkpoint(tmp_path).infos.keys() == tensors.keys()  # a whole model, whatever lies beside it
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"half": "other.safetensors"}}))
    assert Checkpoint(tmp_path).infos.keys() == tensors.keys()  # as `from_pretrained` would
    (tmp_path / INDEX).unlink()
    file.rename(tmp_path / "model-1.safetensors")
    with pytest.raises(BadInput, match="holds half"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"half": "gone.safetensors"}}))
    with pytest.raises(CorruptFile, match=r"gone\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"half": "../model.safetensors"}}))
    with pytest.raises(CorruptFile, match="lacks"):
        Checkpoint(tmp_path)
    (tmp_path / "part.bin").write_bytes(b"")
    for name in ("part.bin", None):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"half": name}}))
        with pytest.raises(CorruptFile, match=f"lacks {name}"):
            Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CorruptFile, match="index"):
        Checkpoint(tmp_path)
