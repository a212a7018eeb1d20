"""What a task's expert has beyond the shared model, tensor by tensor: low-rank, sparse, or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import BadInput
from ._adapters import AdapterSource
from ._methods import TaskArithmetic
from ._plan import Plan
from ._static import drop, generators, kth_magnitudes, trim, wide_dtype

__all__ = ["Exclusives", "Rounding", "Strategy", "product_svd", "rank_of", "truncated_svd"]

Strategy = Literal["svd", "magnitude", "random"]
Rounding = Literal["round", "floor"]


def rank_of(rank: float, size: int, rounding: Rounding = "round") -> int:
    """How many of `size` singular directions are kept: `rank` itself, or below 1 that share of them; at least 1.

    Args:
        rank: A number of directions (1, 2, ...), or a share in (0, 1); 1.0 is all of them.
        size: min(m, n).
        rounding: To the nearest number; "floor" is int((1 - drop rate) * size) in floating point.

    Raises:
        BadInput: not positive, or neither a share nor a whole number.
    """
    whole = isinstance(rank, Integral)
    if isinstance(rank, bool) or not isinstance(rank, Real) or not rank > 0 or not (whole or rank <= 1):
        raise BadInput("rank", rank, "is neither a count nor a share", "give 8, or 0.1 for a tenth")
    if whole:
        return min(int(rank), size)
    count = round(rank * size) if rounding == "round" else int((1 - (1 - rank)) * size)
    return min(max(count, 1), size)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The best approximation of that rank: (U `[m, r]`, S `[r]`, V `[n, r]`, share of the squared norm kept)."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    whole = float(s.square().sum())
    return u[:, :rank], s[:rank], vh[:rank].T, float(s[:rank].square().sum()) / whole if whole else 1.0


def product_svd(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Sequence[float]], rank: int
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """`truncated_svd` of sum_i w_i L_i R_i for several rows of weights, without any of the matrices.

    The factors are orthogonalised once, which leaves a small matrix to decompose for each row.

    Args:
        factors: L_i `[m, k_i]` and R_i `[k_i, n]`.
        weights: Rows of one weight per pair of factors.
        rank: Directions kept; at most sum k_i.
    """
    left = torch.cat([a.double() for a, _ in factors], 1)
    right = torch.cat([b.double() for _, b in factors], 0)
    (q, upper), (p, lower) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    sizes = torch.tensor([b.shape[0] for _, b in factors])
    found = []
    for row in weights:
        scale = torch.tensor(row, dtype=torch.float64).repeat_interleave(sizes)
        u, s, vh = torch.linalg.svd(upper * scale @ lower.T, full_matrices=False)
        whole, count = float(s.square().sum()), min(rank, len(s))
        kept = float(s[:count].square().sum()) / whole if whole else 1.0
        found.append(((q @ u[:, :count]).float(), s[:count].float(), (p @ vh[:count].T).float(), kept))
    return found


@dataclass
class Exclusives:
    """Takes the exclusive part of every tensor and adds up how large it is.

    Args:
        plan: The static merge that made the shared model.
        rank: See `rank_of`.
        rounding: See `rank_of`.
        strategy: "svd", or "magnitude" or "random" for a share of a matrix's elements.
        seed: Of the random choice.

    Attributes:
        sums: Squared norms of the base, and per task of its change, of what is beyond the shared model, and of what
            is kept of that; float64 `[T, 4]`.
    """

    plan: Plan
    rank: float | int
    rounding: Rounding
    strategy: Strategy
    seed: int
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.strategy not in ("svd", "magnitude", "random"):
            raise BadInput("strategy", self.strategy, "is unknown", 'use "svd", "magnitude" or "random"')
        self.sums = torch.zeros(len(self.plan.models), 4, dtype=torch.float64)

    def of(self, name: str, shared: Tensor) -> dict[str, Tensor]:
        """`U`, `S`, `V` or `delta` of a tensor (see `_mixing.Exclusive`); nothing where no expert changed it.

        Args:
            name: Of the tensor.
            shared: The tensor in the shared model.
        """
        plan = self.plan
        assert plan.base is not None
        base = plan.base.tensor(name)
        self.sums[:, 0] += base.double().square().sum()
        if (products := self._of_products(name)) is not None:
            return products
        given = [model.tensor(name) for model in plan.models]
        dtype = wide_dtype([base, shared, *given])
        wide, middle, *experts = (tensor.to(dtype) for tensor in (base, shared, *given))
        if all(torch.equal(expert, wide) for expert in experts) and torch.equal(middle, wide):
            return {}
        factors, whole = [], []
        for i, (expert, random) in enumerate(
            zip(experts, generators(self.seed, name, len(experts)), strict=True)
        ):
            delta = expert - middle
            self._add(i, 1, expert - wide)
            self._add(i, 2, delta)
            if base.dim() >= 2 and self.strategy == "svd":
                flat = delta.flatten(1)
                factors.append(truncated_svd(flat, rank_of(self.rank, min(flat.shape), self.rounding))[:3])
                self._add(i, 3, factors[-1][1])
            else:
                whole.append(delta if base.dim() < 2 else self._sparse(delta, random))
                self._add(i, 3, whole[-1])
        if whole:
            return {"delta": torch.stack(whole).to(base.dtype)}
        return _stacked(factors, base.dtype)

    def _of_products(self, name: str) -> dict[str, Tensor] | None:
        """The same for experts that are all adapters on the base, through their factors."""
        plan, method, models = self.plan, self.plan.method, self.plan.models
        if self.strategy != "svd" or not isinstance(method, TaskArithmetic) or method.normalize:
            return None
        if not all(
            isinstance(m, AdapterSource) and m.base is plan.base and name not in m.replaced for m in models
        ):
            return None
        info = plan.infos[name]
        given: list[Any] = [model.factors(name) for model in models]  # type: ignore[attr-defined]
        if all(pair is None for pair in given):
            return {}
        none = (torch.zeros(info.shape[0], 0), torch.zeros(0, info.shape[1]))
        factors = [none if pair is None else pair for pair in given]
        shares = [method.scaling * w for w in (method.weights or [1.0] * len(models))]
        count = min(rank_of(self.rank, min(info.shape), self.rounding), sum(b.shape[0] for _, b in factors))
        rows = [[float(i == j) - share for j, share in enumerate(shares)] for i in range(len(models))]
        found = []
        for i, (u, s, v, kept) in enumerate(product_svd(factors, rows, count)):
            left, right = (part.double() for part in factors[i])
            found.append((u, s, v))
            self._add(i, 3, s)
            self.sums[i, 1] += ((left.T @ left) * (right @ right.T)).sum()
            self.sums[i, 2] += s.double().square().sum() / max(kept, 1e-300)
        return _stacked(found, info.dtype)

    def _sparse(self, delta: Tensor, random: torch.Generator) -> Tensor:
        counted = isinstance(self.rank, Integral)  # as in `rank_of`: 1 is one direction, 1.0 is all
        share = self.rank / min(delta.flatten(1).shape) if counted else self.rank
        share = min(share, 1.0)
        if self.strategy == "random":
            return drop(delta, share, random)
        return trim(delta, kth_magnitudes(lambda: [[delta]], [share])[0])

    def _add(self, task: int, column: int, tensor: Tensor) -> None:
        self.sums[task, column] += tensor.double().square().sum()

    def report(self, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """By task: the change relative to the base, what is beyond relative to the change, the energy kept."""
        found = {}
        for task, (base, change, beyond, kept) in zip(tasks, self.sums.tolist(), strict=True):
            found[task] = {
                "change": (change / base) ** 0.5 if base else 0.0,
                "beyond": (beyond / change) ** 0.5 if change else 0.0,
                "kept": kept / beyond if beyond else 1.0,
            }
        return found


def _stacked(factors: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {part: torch.stack(t).to(dtype) for part, t in zip("USV", zip(*factors, strict=True), strict=True)}
