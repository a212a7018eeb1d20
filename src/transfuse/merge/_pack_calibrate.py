"""Making the pieces of a pack: what each tensor's change becomes, with GPTQ on inputs that pass through the model.

Blocks are taken in order, each fed by the compressed ones below it. In a block, group after group of singular columns
is rounded in all its layers: first their columns are put in as they are, then layers are rounded in the order in which
they are called, those that read the same input together. What follows therefore sees the rounding of what went before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import taps
from ..core.errors import BadInput
from ..core.tensors import SecondMoment
from ._exclusives import truncated_svd
from ._gptq import Rounded, gptq
from ._pack_pieces import FULL, Group, LowRank, ModulePolicy, Piece, Sparse, Whole, half

__all__ = ["calibration_batches", "compress"]

Batch = dict[str, Any]
_ROWS = 16  # of a calibration tensor at a time


def calibration_batches(model: nn.Module, calibration: Any) -> list[Batch]:
    """Keyword arguments for the model, batch by batch.

    Args:
        model: Whose first argument a plain tensor is.
        calibration: A tensor, tensors by name, or several of either (a data loader).

    Raises:
        BadInput: something else, or nothing.
    """
    if isinstance(calibration, (Tensor, Mapping)):
        calibration = [calibration]
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise BadInput(
            "calibration", type(calibration).__name__, "are no inputs", "give tensors, or tensors by name"
        )
    known = list(inspect.signature(model.forward).parameters)
    found: list[Batch] = []
    for each in calibration:
        if isinstance(each, Tensor):
            found += [{known[0]: rows} for rows in each.split(_ROWS)]
        elif isinstance(each, Mapping) or hasattr(each, "keys"):
            found.append({name: each[name] for name in each if name != "labels"})
        else:
            raise BadInput("calibration", type(each).__name__, "is no input", "give tensors by name")
    if not found:
        raise BadInput("calibration", "[]", "holds no inputs", "give some, or None for plain rounding")
    device = next(model.parameters()).device
    quiet = {"use_cache": False} if "use_cache" in known else {}
    return [
        {**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}, **quiet}
        for batch in found
    ]


@dataclass
class _Matrix:
    """A change that is decomposed, and how far its rounding has come.

    Attributes:
        name: Of the tensor.
        module: Of the layer it belongs to.
        shape: Of the tensor.
        transposed: See `LowRank`.
        u: `[m, r]`, float32.
        s: `[r]`, as it is stored.
        v: `[n, r]`.
        cuts: Groups (first column, column after the last, bits).
        sum: The change that the groups so far amount to, `[m, n]`.
        groups: These groups.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    transposed: bool
    u: Tensor
    s: Tensor
    v: Tensor
    cuts: list[tuple[int, int, int]]
    sum: Tensor
    groups: list[Group] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: str, delta: Tensor, transposed: bool, policy: ModulePolicy, operator: Any, device: Any
    ) -> _Matrix:
        flat = delta.T if transposed else delta.flatten(1)
        cuts = policy.groups(operator, min(flat.shape))
        u, s, v, _ = truncated_svd(flat.to(device), cuts[-1][1])
        scales = half(s)
        return cls(
            name, name.rpartition(".")[0], tuple(delta.shape), transposed, u, scales, v, cuts,
            torch.zeros(flat.shape, device=u.device),
        )  # fmt: skip

    def columns(self, number: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """U, S, V^T and bits of a group, before rounding."""
        start, stop, bits = self.cuts[number]
        return self.u[:, start:stop], self.s[start:stop].float(), self.v[:, start:stop].T, bits

    def round(self, number: int, moment: Tensor | None, policy: ModulePolicy) -> None:
        """Round a group: V on the layer's inputs, then U on what V, as rounded, makes of them."""
        u, s, v, bits = self.columns(number)
        left: Rounded | Tensor
        right: Rounded | Tensor
        if bits == FULL:
            left, right = half(u), half(v)
            u, v = left.float(), right.float()
        else:
            options = {
                "group_size": policy.group_size,
                "damp": policy.damp,
                "act_order": policy.act_order,
                "step_dtype": torch.float16,
            }
            right = gptq(v.contiguous(), moment, bits, **options)  # type: ignore[arg-type]
            v = right.values().to(u.device)
            inner = None
            if moment is not None:
                scaled = (s[:, None] * v).double()
                inner = scaled @ moment @ scaled.T
            left = gptq(u.contiguous(), inner, bits, **options)  # type: ignore[arg-type]
            u = left.values().to(v.device)
        self.sum.addmm_(u * s, v)
        self.groups.append(Group(bits, _on_cpu(left), _on_cpu(right)))

    def write(self, parameter: Tensor, base: Tensor, extra: Tensor | None = None) -> None:
        """Set a layer's weights to the base's plus the groups so far, and a further change."""
        delta = self.sum if extra is None else self.sum + extra
        shaped = (delta.T if self.transposed else delta).reshape(self.shape)
        parameter.data.copy_(base.to(torch.promote_types(base.dtype, torch.float32)) + shaped)

    def piece(self) -> LowRank:
        return LowRank(self.shape, self.transposed, self.s.cpu(), self.groups)


def _on_cpu(part: Rounded | Tensor) -> Rounded | Tensor:
    if isinstance(part, Tensor):
        return part.cpu().contiguous()
    codes = part.codes
    moved = {name: getattr(codes, name).cpu().contiguous() for name in ("codes", "step", "offset")}
    made = type(codes)(**{**codes.__dict__, **moved})
    return Rounded(made, None if part.owner is None else part.owner.cpu())


@torch.no_grad()
def compress(
    base: nn.Module,
    deltas: Iterable[tuple[str, Tensor]],
    policy: ModulePolicy,
    batches: Sequence[Batch] | None,
) -> dict[str, Piece]:
    """What every changed tensor becomes.

    Args:
        base: The untouched model; with batches a copy of it is run.
        deltas: Name and change, float32 on the CPU, one by one.
        policy: The operators.
        batches: From `calibration_batches`; None rounds to nearest.

    Returns:
        By name of the tensor; those that did not change, or that the policy leaves, are not in it.
    """
    modules, found = dict(base.named_modules()), dict[str, Piece]()
    device = next(base.parameters()).device
    matrices: list[_Matrix] = []
    for name, delta in deltas:
        operator = policy.operator(name, delta.dim())
        if operator == "leave" or not bool(delta.any()):
            continue
        if operator == "prune":
            found[name] = Sparse.of(delta, policy.share)
        elif operator == "whole":
            found[name] = Whole(half(delta))
        else:
            owner = modules.get(name.rpartition(".")[0])
            matrices.append(_Matrix.of(name, delta, isinstance(owner, Conv1D), policy, operator, device))
    layers = {
        m.module: m
        for m in matrices
        if m.name.endswith(".weight") and isinstance(modules.get(m.module), (nn.Linear, Conv1D))
    }

    def plainly(chosen: Iterable[_Matrix]) -> None:
        for matrix in chosen:
            for number in range(len(matrix.groups), len(matrix.cuts)):
                matrix.round(number, None, policy)
            found[matrix.name] = matrix.piece()

    plainly(m for m in matrices if layers.get(m.module) is not m)
    if batches is not None and layers:
        _Walk(base, found, layers, policy).through(batches)
    plainly(layers.values())  # those that no batch reached
    return found


class _Walk:
    """One way through a copy of the model, rounding its layers as it goes."""

    def __init__(
        self, base: nn.Module, found: Mapping[str, Piece], layers: Mapping[str, _Matrix], policy: ModulePolicy
    ):
        self.base, self.layers, self.policy = base, layers, policy
        self.model = copy.deepcopy(base).eval()
        try:
            self.blocks = taps.decoder_layers(self.model)
        except BadInput:
            self.blocks = []
        self.tupled = False
        own = self.model.state_dict()
        for name, piece in found.items():
            own[name].copy_(own[name].float() + piece.delta().to(own[name].device))

    def through(self, batches: Sequence[Batch]) -> None:
        """Round every layer that the first batch reaches."""
        stages, blocks = self._stages(batches[0]), self.blocks
        homes = {name: next((b for b in blocks if name.startswith(f"{b}.")), None) for name in self.layers}
        units: list[tuple[str | None, list[list[str]]]] = []
        for stage in stages:
            home = homes[stage[0]]
            if home is not None and units and units[-1][0] == home:
                units[-1][1].append(stage)
            else:
                units.append((home, [stage]))
        hidden: list[Tensor | None] | None = None
        at = 0
        for home, inside in units:
            if home is None:
                self._unit(batches, inside, None, None)
                continue
            if hidden is None:
                hidden = [self._see(batch, blocks[0], None, None) for batch in batches]
            while blocks[at] != home:
                at += 1
                hidden = [
                    self._see(b, blocks[at], blocks[at - 1], h) for b, h in zip(batches, hidden, strict=True)
                ]
            self._unit(batches, inside, home, hidden)

    def _stages(self, batch: Batch) -> list[list[str]]:
        """Layers in the order of their calls, those in a row that read one tensor together."""
        with (
            taps.capture(self.model, list(self.layers), inputs=True) as seen,
            taps.capture(self.model, self.blocks) as outputs,
        ):
            self.model(**batch)
        self.tupled = bool(outputs.tuples)
        found: list[list[str]] = []
        before: tuple[Any, ...] | None = None
        for name, tensor in seen.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place == before:
                found[-1].append(name)
            else:
                found.append([name])
            before = place
        return found

    def _see(self, batch: Batch, module: str, block: str | None, hidden: Tensor | None) -> Tensor | None:
        """A module's input; from a block on, where that block's own input is known. None where it is not reached."""
        with taps.capture(self.model, module, inputs=True, stop=True) as seen:
            if block is None or hidden is None:
                seen.run(**batch)
            else:
                with taps.replay(self.model, block, hidden, tupled=self.tupled):
                    seen.run(**batch)
        return seen.get(module)

    def _moment(
        self, batches: Sequence[Batch], module: str, block: str | None, hidden: Sequence[Tensor | None] | None
    ) -> Tensor | None:
        """2 E[x x^T] of a layer's inputs; padding does not count. None where no batch reaches it."""
        total: SecondMoment | None = None
        for number, batch in enumerate(batches):
            x = self._see(batch, module, block, None if hidden is None else hidden[number])
            if x is None:
                continue
            mask = batch.get("attention_mask")
            if mask is not None and tuple(mask.shape) == tuple(x.shape[:-1]):
                x = x[mask.bool()]
            x = x.flatten(0, -2)
            if total is None:
                total = SecondMoment(x.shape[1], device=x.device)
            total.add(x)
        return None if total is None else 2 * total.matrix

    def _unit(
        self,
        batches: Sequence[Batch],
        stages: Sequence[Sequence[str]],
        block: str | None,
        hidden: Sequence[Tensor | None] | None,
    ) -> None:
        """Round the layers of a block, group by group."""
        names = [name for stage in stages for name in stage]
        first: Tensor | None = None  # the first layers' inputs do not depend on what is rounded here
        for number in range(max(len(self.layers[name].cuts) for name in names)):
            for name in names:
                self._write(name, number)
            for place, stage in enumerate(stages):
                chosen = [name for name in stage if number < len(self.layers[name].cuts)]
                if not chosen:
                    continue
                if place == 0:
                    first = self._moment(batches, stage[0], block, hidden) if first is None else first
                moment = first if place == 0 else self._moment(batches, stage[0], block, hidden)
                for name in chosen:
                    self.layers[name].round(number, moment, self.policy)
                    self._write(name, None)

    def _write(self, name: str, number: int | None) -> None:
        """A layer's weights with the groups rounded so far, and with another one as it is."""
        matrix = self.layers[name]
        extra = None
        if number is not None and number < len(matrix.cuts):
            u, s, v, _ = matrix.columns(number)
            extra = (u * s) @ v
        weights = (self.model.get_submodule(name).weight, self.base.get_submodule(name).weight)
        matrix.write(*weights, extra)  # type: ignore[arg-type]
