"""What the matrices of a layer weigh at a number of bits, before anything is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._base import Slot
from ._rounding import FULL

__all__ = ["Matrix", "layer_bytes", "matrices_of"]

HALF = 2  # bytes of a step or an offset of round-to-nearest


class Matrix(NamedTuple):
    """What decides the size of a matrix: its weights, the length of its rows, and bytes of one weight as it is."""

    weights: int
    width: int
    itemsize: int


def matrices_of(layers: Sequence[Sequence[Slot]]) -> tuple[tuple[Matrix, ...], ...]:
    """The matrices of each layer."""
    return tuple(
        tuple(Matrix(slot.parameter.numel(), slot.width, slot.parameter.element_size()) for slot in slots)
        for slots in layers
    )


def layer_bytes(matrices: Sequence[Matrix], bits: int, backend: str, group_size: int | None) -> int:
    """Bytes of a layer's matrices, packed, with a step and an offset per group; at 16 bits as they are."""
    if bits == FULL:
        return sum(m.weights * m.itemsize for m in matrices)
    total = 0
    for m in matrices:
        groups = -(-m.weights // (m.width if group_size is None else group_size))
        number = m.itemsize if backend == "hqq" else HALF  # hqq keeps them in the weights' dtype
        total += (m.weights * bits + 7) // 8 + 2 * groups * number
    return total
