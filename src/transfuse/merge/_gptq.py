"""GPTQ: a matrix rounded column by column, each column's error made good by the columns that are still to come."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.packed import Codes
from ..core.tensors import Factor

__all__ = ["Rounded", "gptq", "grid"]

_MOST_GROUPS = 256  # a column's group is a number of at most 8 bits


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix `[rows, width]`.

    Attributes:
        codes: Its columns, sorted by their group.
        owner: The group of each column, uint8 `[width]`; None where groups are neighbours.
    """

    codes: Codes
    owner: Tensor | None = None

    def values(self) -> Tensor:
        """The rounded numbers, float32 `[rows, width]`."""
        wide = torch.float64 if self.codes.step.dtype == torch.float64 else torch.float32
        found = replace(self.codes, step=self.codes.step.to(wide)).values(wide)
        if self.owner is None:
            return found
        whole = torch.empty_like(found)
        whole[:, self.owner.argsort(stable=True)] = found
        return whole

    @property
    def owner_bits(self) -> int:
        """Bits that the number of a group takes."""
        return max(1, (self.codes.step.shape[1] - 1).bit_length())


def grid(weight: Tensor, bits: int, step_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Step and zero point of each row: w ~ (q - zero) step with q in 0 ... 2^bits - 1, and 0 is hit exactly.

        step = (max - min) / (2^bits - 1) with min <= 0 <= max,    zero = round(-min / step)

    A row of zeros gets the grid of [-1, 1].

    Args:
        weight: `[rows, n]`, floating.
        bits: 1 to 8.
        step_dtype: Round the step to this dtype, in which it is stored; a step too small for it rounds to zeros.

    Returns:
        Two tensors `[rows]` in the dtype of `weight`.
    """
    most = 2**bits - 1
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    step = (high - low) / most
    if step_dtype is not None:
        step = step.to(step_dtype).to(weight.dtype)
        if not bool(torch.isfinite(step).all()):
            raise BadInput("weight", tuple(weight.shape), f"is too large for {step_dtype}", "scale it down")
    flat = step == 0
    step, low = torch.where(flat, 2 / most, step), torch.where(flat, -1.0, low)
    if step_dtype is not None:
        step = step.to(step_dtype).to(weight.dtype)
    return step, (-low / step).round().clamp(0, most)


def gptq(
    weight: Tensor,
    hessian: Tensor | None,
    bits: int,
    *,
    group_size: int | None = 128,
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    step_dtype: torch.dtype | None = None,
) -> Rounded:
    """Round a matrix so that its products with the inputs change little.

    With H^-1 = R^T R, R upper triangular, and column after column j:

        q_j = round(w_j / step) + zero,    e = (w_j - (q_j - zero) step) / R_jj,    w_k -= e R_jk for all k >= j

    Corrections reach beyond a block of columns when the block is done, and the grid of a group is taken from the
    columns as they are at the start of their block.

    Args:
        weight: `[rows, width]`, floating; it is left alone.
        hessian: (2 / N) sum x x^T over inputs x, `[width, width]`; None for plain rounding. Inputs that are always 0
            get a weight of 0.
        bits: 1 to 8.
        group_size: Columns that share a grid; None for all.
        damp: Share of the mean diagonal that is added to the diagonal.
        act_order: Columns of large inputs come first.
        block: Columns between corrections of the rest.
        step_dtype: Of the stored steps; by default that of the computation, float32 (float64 for float64 weights).

    Raises:
        BadInput: arguments out of range, shapes that do not fit, a Hessian that is not positive definite.
    """
    _check(weight, hessian, bits, group_size, damp)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    rows, width = wide.shape
    group = width if group_size is None else min(group_size, width)
    if -(-width // group) > _MOST_GROUPS:
        raise BadInput("group_size", group_size, f"makes too many groups of {width}", "give a larger one")
    order = torch.arange(width, device=wide.device)
    root = None
    if hessian is not None:
        order, root = _prepare(wide, hessian.to(wide.device, torch.float64, copy=True), damp, act_order)
        wide, root = wide[:, order], root.to(wide.dtype)
    codes = torch.empty(rows, width, dtype=torch.uint8, device=wide.device)
    steps: list[Tensor] = []
    zeros: list[Tensor] = []
    for start in range(0, width, block):
        stop = min(start + block, width)
        part = wide[:, start:stop].clone()
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            at = start + i
            if at % group == 0:
                step, zero = grid(wide[:, at : at + group], bits, step_dtype)
                steps.append(step)
                zeros.append(zero)
            column = part[:, i]
            numbers = ((column / step).round() + zero).clamp(0, 2**bits - 1)
            codes[:, at] = numbers.to(torch.uint8)
            if root is not None:
                errors[:, i] = (column - (numbers - zero) * step) / root[at, at]
                part[:, i:] -= torch.outer(errors[:, i], root[at, at:stop])
        if root is not None:
            wide[:, stop:] -= errors @ root[start:stop, stop:]
    made = Codes(
        codes, torch.stack(steps, 1).to(step_dtype or wide.dtype), torch.stack(zeros, 1).to(torch.uint8), bits,
        (rows, width), centred=True, group=group,
    )  # fmt: skip
    return _sorted(made, order, group)


def _check(weight: Tensor, hessian: Tensor | None, bits: int, group_size: int | None, damp: float) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        problem = "is no matrix of finite numbers"
        raise BadInput("weight", f"{weight.dtype} {tuple(weight.shape)}", problem, "give one")
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise BadInput("bits", bits, "is not a whole number from 1 to 8", "give a bit width")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise BadInput("group_size", group_size, "is not a count", "give 128, or None for whole rows")
    if not damp >= 0:
        raise BadInput("damp", damp, "is negative", "give 0.01")
    if hessian is not None and tuple(hessian.shape) != (weight.shape[1],) * 2:
        problem = f"does not fit weights {tuple(weight.shape)}"
        raise BadInput("hessian", tuple(hessian.shape), problem, "give the second moment of the inputs")


def _prepare(wide: Tensor, hessian: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The order of the columns, and R in that order; columns of dead inputs are set to 0 in `wide`."""
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    wide[:, dead] = 0.0
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return order, torch.linalg.cholesky(Factor(hessian, ridge=damp).solve(identity), upper=True)


def _sorted(made: Codes, order: Tensor, group: int) -> Rounded:
    """The same with the columns of each group in their original order."""
    width = len(order)
    owner = torch.empty(width, dtype=torch.uint8, device=order.device)
    place = torch.arange(width, device=order.device)
    owner[order] = (place // group).to(torch.uint8)
    back = torch.empty_like(order)
    back[order] = place
    together = owner.argsort(stable=True)
    codes = replace(made, codes=made.codes[:, back[together]])
    return Rounded(codes, None if torch.equal(together, place) else owner)
