"""core.packed: whole numbers of a few bits without gaps, and model folders that hold them."""

from __future__ import annotations

import math

import pytest
import torch

from transfuse.core import packed as home
from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.packed import Codes, pack_bits, packed_state, read_packed, unpack_bits, write_packed
from transfuse.core.training import generator


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
def test_packed_bits(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=generator(count)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    text = "".join(format(c, f"0{bits}b") for c in codes.tolist())
    text += "0" * (-len(text) % 8)
    assert packed.tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def test_packed_bits_over_many_chunks(monkeypatch):
    codes = torch.randint(0, 8, (1000,), generator=generator(2)).to(torch.uint8)
    whole = pack_bits(codes, 3)
    monkeypatch.setattr(home, "_CHUNK", 64)
    assert torch.equal(pack_bits(codes, 3), whole) and torch.equal(unpack_bits(whole, 3, 1000), codes)
    with pytest.raises(BadInput, match="whole numbers of 2 bits"):
        pack_bits(codes, 2)
    with pytest.raises(BadInput, match="bytes are not"):
        unpack_bits(whole[:-1], 3, 1000)


@pytest.mark.parametrize("centred", [True, False])
def test_values_and_files(tmp_path, centred):
    draw = generator(3)
    codes = torch.randint(0, 8, (6, 8), generator=draw).to(torch.uint8)
    step, offset = torch.rand(6, 2, generator=draw), torch.rand(6, 2, generator=draw)
    made = Codes(codes, step, offset, 3, (8, 2, 3), 0, centred)
    values = made.values()
    for row in range(6):
        for column in range(8):
            q, s, m = int(codes[row, column]), float(step[row, column // 4]), float(offset[row, column // 4])
            wanted = (q - m) * s if centred else q * s + m
            assert float(values[column, row // 3, row % 3]) == pytest.approx(wanted, rel=1e-6)
    assert made.bytes == 18 + 2 * 12 * 4
    write_packed(tmp_path, {"a.weight": made}, {"b": torch.arange(3.0)}, {"note": [1]})
    matrices, others, header = read_packed(tmp_path)
    assert torch.equal(matrices["a.weight"].values(), values) and header == {"note": [1]}
    state = packed_state(tmp_path)
    assert set(state) == {"a.weight", "b"} and torch.equal(state["b"], others["b"])
    with pytest.raises(BadInput, match="holds no packed"):
        read_packed(tmp_path / "nowhere")
    write_packed(tmp_path, {}, {"b": torch.arange(3.0)})
    file = tmp_path / home.PACKED
    from transfuse.core.files import write_tensors

    write_tensors(file, {"a.weight|codes": pack_bits(codes, 3)}, {"matrices": {"a.weight": {"bits": 3}}})
    with pytest.raises(CorruptFile, match="not whole"):
        read_packed(tmp_path)


def test_a_last_group_that_is_shorter(tmp_path):
    """Seven columns in groups of three; zeros are whole numbers of one byte."""
    draw = generator(4)
    codes = torch.randint(0, 4, (5, 7), generator=draw).to(torch.uint8)
    step = torch.rand(5, 3, generator=draw).half()
    zero = torch.randint(0, 4, (5, 3), generator=draw).to(torch.uint8)
    made = Codes(codes, step, zero, 2, (5, 7), centred=True, group=3)
    values = made.values()
    for row in range(5):
        for column in range(7):
            q, s, m = int(codes[row, column]), float(step[row, column // 3]), int(zero[row, column // 3])
            assert float(values[row, column]) == pytest.approx((q - m) * s, rel=1e-3)
    assert made.bytes == math.ceil(35 * 2 / 8) + 15 * 2 + 15
    write_packed(tmp_path, {"w": made}, {})
    again = read_packed(tmp_path)[0]["w"]
    assert again.group == 3 and again.offset.dtype == torch.uint8 and torch.equal(again.values(), values)
