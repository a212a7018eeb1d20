"""Whole numbers of a few bits, packed without gaps; and model folders whose matrices are stored that way.

A matrix of rounded weights is w = q s + m, or w = (q - m) s: whole numbers q of b bits, and a step s and an offset m
for each group of neighbours in a row. A packed folder holds `packed.safetensors` in place of the usual weights: for a
matrix `name` the bytes of `name|codes`, and `name|step`, `name|offset` `[rows, groups]`; every other tensor under its
own name. Bits, shape, the axis that rows run along and which of the two formulas it is stand in the file's header.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import BadInput, CorruptFile
from .files import read_tensors, write_tensors

__all__ = ["PACKED", "Codes", "pack_bits", "packed_state", "read_packed", "unpack_bits", "write_packed"]

PACKED = "packed.safetensors"
"""The file that makes a folder a packed one."""

_CHUNK = (
    1 << 20
)  # whole numbers spread into single bits at a time; a multiple of 8, so that bytes do not straddle


@dataclass(frozen=True)
class Codes:
    """A matrix (or a stack of them) of whole numbers with a step and an offset per group.

    Attributes:
        codes: q, uint8, `[rows, width]`; groups are neighbours in a row.
        step: s, floating, `[rows, groups]`.
        offset: m, as `step`, or uint8 where it is one of the codes.
        bits: b, so that 0 <= q < 2^b.
        shape: Of the tensor it stands for.
        axis: The axis of that tensor the rows run along (-1, the last, for weights of linear layers).
        centred: The offset is one of the codes: w = (q - m) s.
        group: Neighbours that share a step, where they do not fill the rows evenly: the last group is then shorter.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    bits: int
    shape: tuple[int, ...]
    axis: int = -1
    centred: bool = False
    group: int | None = None

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, of shape `shape`: q s + m in float32 at least, (q - m) s in the dtype of the steps."""
        wide = self.step.dtype if self.centred else torch.promote_types(self.step.dtype, torch.float32)
        rows, groups = self.step.shape
        if self.group is None:
            found = self.codes.view(rows, groups, -1).to(wide)
            step, offset = self.step.to(wide)[..., None], self.offset.to(wide)[..., None]
        else:
            found = self.codes.to(wide)
            owner = torch.arange(found.shape[1], device=found.device) // self.group
            step, offset = self.step.to(wide)[:, owner], self.offset.to(wide)[:, owner]
        found = (found - offset) * step if self.centred else found * step + offset
        moved = list(self.shape)
        moved.append(moved.pop(self.axis))
        return found.view(moved).movedim(-1, self.axis).to(dtype).contiguous()

    @property
    def bytes(self) -> int:
        """Size when packed: codes without gaps, steps and offsets in their dtype."""
        return (self.codes.numel() * self.bits + 7) // 8 + self.step.nbytes + self.offset.nbytes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits, one after the other, most significant bit first.

    Args:
        codes: uint8, any shape.
        bits: 1 to 8.

    Returns:
        uint8 `[ceil(n bits / 8)]`; the last byte is filled up with zeros.

    Raises:
        BadInput: a number that does not fit.
    """
    _check_bits(bits)
    flat = codes.detach().cpu().reshape(-1)
    if flat.dtype != torch.uint8 or (flat.numel() and int(flat.max()) >= 2**bits):
        raise BadInput("codes", str(flat.dtype), f"are not whole numbers of {bits} bits", "round them first")
    numbers = flat.numpy()
    pieces = [
        np.packbits(np.unpackbits(numbers[i : i + _CHUNK, None], axis=1)[:, 8 - bits :])
        for i in range(0, len(numbers), _CHUNK)
    ]
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, np.uint8))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` numbers that `pack_bits` packed, uint8 `[count]`.

    Raises:
        BadInput: there are not as many bytes as that takes.
    """
    _check_bits(bits)
    if packed.numel() != (count * bits + 7) // 8:
        raise BadInput(
            "packed", packed.numel(), f"bytes are not {count} x {bits} bits", "give the whole tensor"
        )
    raw = packed.cpu().numpy()
    numbers = np.empty(count, np.uint8)
    for i in range(0, count, _CHUNK):
        size = min(_CHUNK, count - i)
        piece = np.unpackbits(raw[i * bits // 8 : (i * bits + size * bits + 7) // 8], count=size * bits)
        spread = np.zeros((size, 8), np.uint8)
        spread[:, 8 - bits :] = piece.reshape(size, bits)
        numbers[i : i + size] = np.packbits(spread)
    return torch.from_numpy(numbers)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise BadInput("bits", bits, "is not a whole number from 1 to 8", "give a bit width")


def write_packed(
    folder: Path,
    matrices: Mapping[str, Codes],
    others: Mapping[str, Tensor],
    header: Mapping[str, Any] | None = None,
) -> Path:
    """Write `packed.safetensors`, atomically.

    Args:
        folder: Exists.
        matrices: By the names of the tensors they stand for.
        others: The tensors that were not rounded.
        header: Further facts for the file's header.
    """
    tensors, facts = dict(others), {}
    for name, each in matrices.items():
        tensors[f"{name}|codes"] = pack_bits(each.codes, each.bits)
        tensors[f"{name}|step"], tensors[f"{name}|offset"] = each.step, each.offset
        facts[name] = {
            "bits": each.bits, "shape": list(each.shape), "axis": each.axis, "centred": each.centred,
            **({} if each.group is None else {"group": each.group}),
        }  # fmt: skip
    write_tensors(folder / PACKED, tensors, {**(header or {}), "matrices": facts})
    return folder / PACKED


def read_packed(folder: str | os.PathLike[str]) -> tuple[dict[str, Codes], dict[str, Tensor], dict[str, Any]]:
    """What `write_packed` wrote: matrices, other tensors, header.

    Raises:
        BadInput: the folder holds no such file.
        CorruptFile: it cannot be read, or lacks a part.
    """
    path = Path(folder) / PACKED
    if not path.is_file():
        raise BadInput("folder", str(folder), f"holds no {PACKED}", "give the folder of a packed model")
    tensors, header = read_tensors(path)
    facts = header.pop("matrices", None)
    try:
        matrices = {}
        for name, fact in facts.items():
            shape, step = tuple(fact["shape"]), tensors.pop(f"{name}|step")
            codes = unpack_bits(tensors.pop(f"{name}|codes"), fact["bits"], int(np.prod(shape)))
            offset = tensors.pop(f"{name}|offset")
            codes = codes.view(step.shape[0], -1)
            matrices[name] = Codes(
                codes, step, offset, fact["bits"], shape, fact["axis"], fact["centred"], fact.get("group")
            )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFile("folder", str(path), f"is not whole ({error})", "save the model again") from error
    return matrices, tensors, header


def packed_state(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a packed folder as a state dict of ordinary tensors; the rounded ones in float32.

    Raises:
        BadInput, CorruptFile: as `read_packed`.
    """
    matrices, tensors, _ = read_packed(folder)
    return {**tensors, **{name: each.values() for name, each in matrices.items()}}
