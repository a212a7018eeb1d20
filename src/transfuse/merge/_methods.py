"""The static merges as classes: their arguments are fields, checked before any work; see `_static` for the functions.

Tensors come in pieces of a few rows, so that a model never has to be in memory; what a method must know about a
whole tensor (an angle) or the whole model (the size of its largest changes) it gathers in a pass before. Sums are
taken in float32, or in float64 where a model is of that.

    linear           sum_i w_i theta_i / sum_i w_i                                        (model soups, 2203.05482)
    slerp            sin((1-t) a)/sin(a) theta_1 + sin(t a)/sin(a) theta_2, a the angle between the two
    task_arithmetic  theta_0 + lambda sum_i w_i tau_i, tau_i = theta_i - theta_0              (2212.04089)
    ties             tau_i trimmed to the largest `density` of its magnitudes; per element the sign of their sum;
                     the mean over those that have this sign; theta_0 + lambda mean           (2306.01708)
    dare_linear      task arithmetic of tau_i with a random `density` kept and divided by it  (2311.03099)
    dare_ties        the same dropping in place of the trimming of ties
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.fields import suggest
from ._checks import check_density, check_scaling, check_types, check_weights, spread
from ._static import (
    disjoint_mean,
    drop,
    generators,
    kth_magnitudes,
    slerp_coefficients,
    task_vectors,
    trim,
    weighted_sum,
)  # fmt: skip

__all__ = [
    "METHODS",
    "DareLinear",
    "DareTies",
    "Linear",
    "Piece",
    "Slerp",
    "StaticMerge",
    "TaskArithmetic",
    "Ties",
    "make_static",
]


class Piece(NamedTuple):
    """The same elements of one tensor, flat: in the base (None without one), and in every model."""

    base: Tensor | None
    models: Sequence[Tensor]


Pieces = Callable[[], Iterable[Piece]]
"""A tensor's pieces from first to last; can be gone through again."""

Tie = Literal["none", "positive"]
_SIGNS = {"none": 0.0, "positive": 1.0}  # elected where changes cancel


@dataclass(frozen=True, kw_only=True)
class StaticMerge:
    """A way to merge; its fields are its arguments.

    Attributes:
        needs_base: Whether it works on differences to a base.
        passes: How often a tensor is read.
    """

    needs_base: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """How often every tensor is read."""
        return 1

    def check(self, count: int) -> None:
        """Refuse arguments out of range, or that do not fit `count` models.

        Raises:
            BadInput: the message names the argument.
        """

    def survey(self, tensors: Callable[[], Iterable[Pieces]], count: int) -> Any:
        """What it must know about the whole model, handed to `begin`."""
        return None

    def begin(self, name: str, pieces: Pieces, count: int, survey: Any) -> Any:
        """What it must know about the tensor `name`, handed to `combine`."""
        return None

    def combine(self, piece: Piece, state: Any) -> Tensor:
        """The merged rows, float32 or float64."""
        raise BadInput("method", type(self).__name__, "merges nothing", f"use one of {', '.join(METHODS)}")


@dataclass(frozen=True, kw_only=True)
class Linear(StaticMerge):
    """The weighted mean of the models.

    Args:
        weights: One per model; None for equal ones.
        normalize: Divide by their sum.
    """

    weights: Sequence[float] | None = None
    normalize: bool = True

    def check(self, count: int) -> None:
        check_weights(self.weights, count, self.normalize)

    def combine(self, piece: Piece, state: Any) -> Tensor:
        weights = spread(self.weights, len(piece.models))
        total = sum(weights) if self.normalize else 1.0
        return weighted_sum(piece.models, [weight / total for weight in weights])


@dataclass(frozen=True, kw_only=True)
class Slerp(StaticMerge):
    """The point between two models on the arc about the origin, tensor by tensor.

    Args:
        t: 0 is the first model, 1 the second.
    """

    t: float = 0.5

    @property
    def passes(self) -> int:
        return 2

    def check(self, count: int) -> None:
        if count != 2:
            raise BadInput("models", count, "are not two", "slerp goes from one model to another")
        if not 0 <= self.t <= 1:
            raise BadInput("t", self.t, "is not between 0 and 1", "give the share of the second model")

    def begin(self, name: str, pieces: Pieces, count: int, survey: Any) -> tuple[float, float]:
        dot = a2 = b2 = 0.0
        for piece in pieces():
            a, b = (model.double().view(-1) for model in piece.models)
            dot, a2, b2 = dot + float(a @ b), a2 + float(a @ a), b2 + float(b @ b)
        return slerp_coefficients(dot, math.sqrt(a2), math.sqrt(b2), self.t)

    def combine(self, piece: Piece, state: tuple[float, float]) -> Tensor:
        return weighted_sum(piece.models, state)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(StaticMerge):
    """The base plus `scaling` times the sum of what the models add to it.

    Args:
        weights: One per model; None for 1 each.
        scaling: lambda. Best chosen on held-out data; 0.4 is the authors' choice where there are none.
        normalize: Divide by the sum of the weights.
    """

    needs_base: ClassVar[bool] = True
    weights: Sequence[float] | None = None
    scaling: float = 0.4
    normalize: bool = False

    def check(self, count: int) -> None:
        check_weights(self.weights, count, self.normalize)
        check_scaling(self.scaling)

    def combine(self, piece: Piece, state: Any) -> Tensor:
        weights = spread(self.weights, len(piece.models))
        total = sum(weights) if self.normalize else 1.0
        return _onto(piece, weighted_sum(_changes(piece), [w / total for w in weights]), self)


@dataclass(frozen=True, kw_only=True)
class Ties(StaticMerge):
    """Trim what the models add to the base, elect a sign per element, take the mean of those that have it.

    Args:
        weights: One per model; None for equal ones.
        density: Share of the elements kept, those of largest magnitude; one number or one per model.
        scaling: lambda.
        normalize: Divide by the weights of those that take part.
        scope: What the share is taken of: all elements of the "model", as in the paper, or each "tensor".
        tie: What is elected where the changes cancel: "none", the paper's sign of zero; or "positive", mergekit's.
    """

    needs_base: ClassVar[bool] = True
    weights: Sequence[float] | None = None
    density: float | Sequence[float] = 0.2
    scaling: float = 1.0
    normalize: bool = True
    scope: Literal["model", "tensor"] = "model"
    tie: Tie = "none"

    @property
    def passes(self) -> int:
        whole = self.density == 1 if isinstance(self.density, (int, float)) else set(self.density) == {1}
        return 1 if whole else 3

    def check(self, count: int) -> None:
        check_weights(self.weights, count, True, positive=True)
        check_density(self.density, count)
        check_scaling(self.scaling)
        if self.scope not in ("model", "tensor"):
            raise BadInput("scope", self.scope, "is unknown", 'use "model" or "tensor"')
        _check_tie(self.tie)

    def survey(self, tensors: Callable[[], Iterable[Pieces]], count: int) -> list[float] | None:
        if self.scope == "tensor":
            return None
        return self._thresholds(lambda: (piece for pieces in tensors() for piece in pieces()), count)

    def begin(self, name: str, pieces: Pieces, count: int, survey: list[float] | None) -> list[float]:
        return survey if survey is not None else self._thresholds(pieces, count)

    def combine(self, piece: Piece, state: list[float]) -> Tensor:
        kept = [trim(delta, threshold) for delta, threshold in zip(_changes(piece), state, strict=True)]
        weights = spread(self.weights, len(kept))
        return _onto(
            piece, disjoint_mean(kept, weights, normalize=self.normalize, tie=_SIGNS[self.tie]), self
        )

    def _thresholds(self, pieces: Pieces, count: int) -> list[float]:
        shares = spread(self.density, count)
        if all(share == 1 for share in shares):
            return [0.0] * count
        return kth_magnitudes(lambda: (_changes(piece) for piece in pieces()), shares)


@dataclass(frozen=True, kw_only=True)
class _Dare(StaticMerge):
    needs_base: ClassVar[bool] = True
    weights: Sequence[float] | None = None
    density: float | Sequence[float] = 0.1
    scaling: float = 1.0
    normalize: bool = False
    rescale: bool = True
    seed: int = 0

    def begin(self, name: str, pieces: Pieces, count: int, survey: Any) -> list[torch.Generator]:
        return generators(self.seed, name, count)

    def _dropped(self, piece: Piece, state: list[torch.Generator]) -> list[Tensor]:
        shares = spread(self.density, len(piece.models))
        return [
            drop(delta, share, random, rescale=self.rescale)
            for delta, share, random in zip(_changes(piece), shares, state, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DareLinear(_Dare):
    """Task arithmetic of changes of which a random share is kept and scaled up.

    Args:
        weights: One per model; None for 1 each.
        density: Share kept; one number or one per model. The paper drops 90 % or more.
        scaling: lambda of task arithmetic.
        normalize: Divide by the sum of the weights.
        rescale: Divide what is kept by `density`, so that its expectation is the whole.
        seed: With the tensor's name and the model's place, decides what is kept.
    """

    scaling: float = 0.4

    def check(self, count: int) -> None:
        check_weights(self.weights, count, self.normalize)
        check_density(self.density, count)
        check_scaling(self.scaling)

    def combine(self, piece: Piece, state: list[torch.Generator]) -> Tensor:
        weights = spread(self.weights, len(piece.models))
        total = sum(weights) if self.normalize else 1.0
        return _onto(piece, weighted_sum(self._dropped(piece, state), [w / total for w in weights]), self)


@dataclass(frozen=True, kw_only=True)
class DareTies(_Dare):
    """TIES whose trimming is a random choice, scaled up.

    Args:
        weights: One per model; None for equal ones.
        density: Share kept; one number or one per model. The paper drops 90 % or more.
        scaling: lambda of TIES.
        normalize: Divide by the weights of those that take part.
        rescale: Divide what is kept by `density`.
        seed: With the tensor's name and the model's place, decides what is kept.
        tie: As of TIES.
    """

    normalize: bool = True
    tie: Tie = "none"

    def check(self, count: int) -> None:
        _check_tie(self.tie)
        check_weights(self.weights, count, True, positive=True)
        check_density(self.density, count)
        check_scaling(self.scaling)

    def combine(self, piece: Piece, state: list[torch.Generator]) -> Tensor:
        weights, tie = spread(self.weights, len(piece.models)), _SIGNS[self.tie]
        kept = self._dropped(piece, state)
        return _onto(piece, disjoint_mean(kept, weights, normalize=self.normalize, tie=tie), self)


METHODS: Mapping[str, type[StaticMerge]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
}


def make_static(method: str | StaticMerge, arguments: Mapping[str, Any], count: int) -> StaticMerge:
    """The method called `method` with its arguments, checked for `count` models.

    Raises:
        BadInput: an unknown method or argument (near names are suggested), or a value out of range.
    """
    if isinstance(method, StaticMerge):
        if arguments:
            name, value = next(iter(arguments.items()))
            raise BadInput(name, value, "is given beside a method that has its arguments", "leave it out")
        made = method
        if type(made) in METHODS.values():
            check_types(type(made), vars(made))
    else:
        found = METHODS.get(str(method).replace("-", "_"))
        if found is None:
            remedy = suggest(method, METHODS, f"use one of {', '.join(METHODS)}")
            raise BadInput("method", method, "is not a static merge", remedy)
        made = found(**check_types(found, arguments))
    if count < 1:
        raise BadInput("models", count, "are none", "give the models to merge")
    made.check(count)
    return made


def _changes(piece: Piece) -> list[Tensor]:
    assert piece.base is not None
    return task_vectors(piece.base, piece.models)


def _onto(piece: Piece, change: Tensor, method: Any) -> Tensor:
    assert piece.base is not None
    return change.mul_(method.scaling).add_(piece.base.to(change.dtype))


def _check_tie(tie: str) -> None:
    if tie not in _SIGNS:
        raise BadInput("tie", tie, "is unknown", 'use "none" or "positive"')
