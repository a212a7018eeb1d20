"""What a pack holds of one tensor's change: low-rank factors in few bits, its largest entries, or the whole of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.packed import Codes, pack_bits, unpack_bits
from ..core.runs import check_number
from ._gptq import Rounded
from ._static import kth_magnitudes, trim

__all__ = ["Group", "LowRank", "ModulePolicy", "Operator", "Piece", "Sparse", "Whole", "half", "read_piece"]

Operator = Literal["attention", "mlp", "prune", "whole", "leave"]

FULL = 16
"""The number of bits that means: factors are kept in 16-bit floating point."""

_INDEX_BITS = 32


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_group(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_is_count, pair)):
        return False
    return pair[0] >= 1 and pair[1] in (*range(1, 9), FULL)


@dataclass(frozen=True)
class ModulePolicy:
    """Which operator compresses the change of which tensor, and how strongly.

    Args:
        attention: Groups of singular columns of attention projections, the largest singular values first: (columns,
            bits), bits being 1 to 8, or 16 for factors that are not rounded. Together their columns are the rank;
            where a matrix has fewer, the last ones are cut off.
        mlp: The same of MLP projections.
        share: Of a pruned tensor's entries, those kept: the largest in magnitude.
        rules: Operator by regular expression; the first that is found in a tensor's name decides. "attention" and
            "mlp" decompose, "prune" keeps the largest entries, "whole" keeps all in 16 bits, "leave" keeps nothing.
        other: Operator of matrices that no rule names. Vectors (norms, biases) that no rule leaves out or prunes are
            kept whole.
        group_size: Neighbouring numbers that share a grid; None for whole rows.
        damp: Of GPTQ, as a share of the Hessian's mean diagonal.
        act_order: GPTQ takes the columns of large inputs first.
    """

    attention: Sequence[tuple[int, int]] = ((20, 8), (180, 4), (800, 2))
    mlp: Sequence[tuple[int, int]] = ((20, 8), (180, 4), (1200, 2))
    share: float = 0.1
    rules: Mapping[str, Operator] = field(
        default_factory=lambda: {r"embed|wte|wpe|lm_head": "prune", r"attn|attention": "attention"}
    )
    other: Operator = "mlp"
    group_size: int | None = 128
    damp: float = 0.01
    act_order: bool = True

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            BadInput: names the argument.
        """
        for name in ("attention", "mlp"):
            groups = getattr(self, name)
            if not isinstance(groups, Sequence) or not groups or not all(map(_is_group, groups)):
                raise BadInput(name, groups, "are not pairs (columns, bits)", "write [[20, 8], [180, 4]]")
            if [bits for _, bits in groups] != sorted((bits for _, bits in groups), reverse=True):
                raise BadInput(name, groups, "have rising bits", "large singular values take the most bits")
        check_number("share", self.share, remedy="give the share of entries kept, 0.1")
        if self.share > 1:
            raise BadInput("share", self.share, "is not in (0, 1]", "give the share of entries kept, 0.1")
        if self.group_size is not None and (not _is_count(self.group_size) or self.group_size < 1):
            raise BadInput(
                "group_size", self.group_size, "is not a count", "give 128, or null for whole rows"
            )
        check_number("damp", self.damp, zero=True, remedy="give 0.01")
        for pattern, operator in [*self.rules.items(), ("", self.other)]:
            if operator not in get_args(Operator):
                raise BadInput("rules", operator, "is unknown", f"use {', '.join(get_args(Operator))}")
            try:
                re.compile(pattern)
            except re.error as error:
                problem = f"is no regular expression ({error})"
                raise BadInput("rules", pattern, problem, "write e.g. 'lm_head'") from error

    def operator(self, name: str, dims: int) -> Operator:
        """What is done with a tensor of that name and number of axes."""
        found = next((operator for pattern, operator in self.rules.items() if re.search(pattern, name)), None)
        if dims < 2 and found not in ("prune", "leave"):
            return "whole"
        return self.other if found is None else found

    def groups(self, operator: Operator, rank: int) -> list[tuple[int, int, int]]:
        """(first column, column after the last, bits) of a matrix that has `rank` singular values."""
        found, start = [], 0
        for count, bits in self.attention if operator == "attention" else self.mlp:
            stop = min(start + count, rank)
            if stop > start:
                found.append((start, stop, bits))
            start = stop
        return found


def half(tensor: Tensor) -> Tensor:
    """In float16; in bfloat16 where that overflows."""
    found = tensor.to(torch.float16)
    return found if bool(torch.isfinite(found).all()) else tensor.to(torch.bfloat16)


@dataclass(frozen=True)
class Group:
    """Some singular columns at one number of bits.

    Attributes:
        bits: 1 to 8, or 16.
        u: U `[m, c]`, rounded, or in 16 bits.
        v: V^T `[c, n]`, likewise.
    """

    bits: int
    u: Rounded | Tensor
    v: Rounded | Tensor


@dataclass(frozen=True)
class LowRank:
    """U diag(S) V^T, group by group.

    Attributes:
        shape: Of the tensor; axes after the first are one.
        transposed: Rows run over inputs (`Conv1D`): it is the transpose that was decomposed.
        scales: S `[r]` in 16 bits.
        groups: The columns.
    """

    shape: tuple[int, ...]
    transposed: bool
    scales: Tensor
    groups: Sequence[Group]

    def delta(self) -> Tensor:
        """The change, float32, of shape `shape`."""
        m, rest = self.shape[0], math.prod(self.shape[1:])
        found = torch.zeros((rest, m) if self.transposed else (m, rest))
        start = 0
        for group in self.groups:
            u, v = (t.values() if isinstance(t, Rounded) else t.float() for t in (group.u, group.v))
            found.addmm_(u * self.scales[start : start + len(v)].float(), v)
            start += len(v)
        return (found.T if self.transposed else found).reshape(self.shape)

    def stored(self, name: str) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        """What of it is written: rounded matrices, and tensors."""
        codes: dict[str, Codes] = {}
        tensors = {f"{name}/S": self.scales}
        for number, group in enumerate(self.groups):
            for letter, part in (("U", group.u), ("V", group.v)):
                key = f"{name}/{number}/{letter}"
                if isinstance(part, Tensor):
                    tensors[key] = part
                    continue
                codes[key] = part.codes
                if part.owner is not None:
                    tensors[f"{key}/owner"] = pack_bits(part.owner, part.owner_bits)
        return codes, tensors

    def facts(self) -> dict[str, Any]:
        """What the header says of it."""
        groups = [[len(g.v) if isinstance(g.v, Tensor) else g.v.codes.shape[0], g.bits] for g in self.groups]
        return {"operator": "svd", "shape": list(self.shape), "transposed": self.transposed, "groups": groups}


@dataclass(frozen=True)
class Sparse:
    """The largest entries.

    Attributes:
        shape: Of the tensor.
        where: Their places in the flattened tensor, int32 (int64 beyond 2^31), or one bit per entry, packed.
        entries: Their changes in 16 bits.
    """

    shape: tuple[int, ...]
    where: Tensor
    entries: Tensor

    @classmethod
    def of(cls, delta: Tensor, share: float) -> Sparse:
        """Keep that share of the entries of a tensor, at most those that are not 0."""
        flat = trim(delta.flatten(), kth_magnitudes(lambda: [[delta.flatten()]], [share])[0])
        places = flat.nonzero().squeeze(-1)
        if len(places) * _INDEX_BITS < flat.numel():
            where = places.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
        else:
            where = pack_bits((flat != 0).to(torch.uint8), 1)
        return cls(tuple(delta.shape), where, half(flat[places]))

    def delta(self) -> Tensor:
        """The change, float32, of shape `shape`."""
        count = math.prod(self.shape)
        found = torch.zeros(count)
        packed = self.where.dtype == torch.uint8
        where = unpack_bits(self.where, 1, count).bool() if packed else self.where.long()
        found[where] = self.entries.float()
        return found.view(self.shape)

    def stored(self, name: str) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        """What of it is written."""
        return {}, {f"{name}/where": self.where, f"{name}/entries": self.entries}

    def facts(self) -> dict[str, Any]:
        """What the header says of it."""
        return {"operator": "prune", "shape": list(self.shape)}


@dataclass(frozen=True)
class Whole:
    """All of it, in 16 bits.

    Attributes:
        values: The change.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.values.shape)

    def delta(self) -> Tensor:
        """The change, float32."""
        return self.values.float()

    def stored(self, name: str) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        """What of it is written."""
        return {}, {f"{name}/delta": self.values}

    def facts(self) -> dict[str, Any]:
        """What the header says of it."""
        return {"operator": "whole", "shape": list(self.shape)}


Piece = LowRank | Sparse | Whole


def read_piece(
    name: str, facts: Mapping[str, Any], codes: Mapping[str, Codes], tensors: Mapping[str, Tensor]
) -> Piece:
    """The piece that `stored` and `facts` describe; KeyError, TypeError or ValueError where they do not fit."""
    shape = tuple(facts["shape"])
    if facts["operator"] == "whole":
        return Whole(tensors[f"{name}/delta"].view(shape))
    if facts["operator"] == "prune":
        return Sparse(shape, tensors[f"{name}/where"], tensors[f"{name}/entries"])

    def part(key: str) -> Rounded | Tensor:
        if key not in codes:
            return tensors[key]
        made = Rounded(codes[key])
        packed = tensors.get(f"{key}/owner")
        if packed is None:
            return made
        return Rounded(made.codes, unpack_bits(packed, made.owner_bits, made.codes.shape[1]))

    groups = [
        Group(int(bits), part(f"{name}/{number}/U"), part(f"{name}/{number}/V"))
        for number, (_, bits) in enumerate(facts["groups"])
    ]
    return LowRank(shape, bool(facts["transposed"]), tensors[f"{name}/S"], groups)
