"""Checks of arguments that the ways to merge share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from ..core.errors import BadInput
from ..core.fields import check_arguments

__all__ = [
    "check_choice",
    "check_density",
    "check_scaling",
    "check_types",
    "check_weights",
    "spread",
]


def check_choice(name: str, value: Any, known: Any) -> None:
    """Refuse what is none of a `Literal`'s values.

    Raises:
        BadInput: names the argument.
    """
    if value not in get_args(known):
        raise BadInput(name, value, "is not known", f"use one of {', '.join(get_args(known))}")


def check_types(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class, checked against its fields; None is left out, arrays and iterators become lists.

    Raises:
        BadInput: an unknown name, another type, NaN or infinity.
    """
    given = {name: _plain(value) for name, value in values.items() if value is not None}
    for name, value in given.items():
        several = isinstance(value, (list, tuple))
        for i, each in enumerate(value if several else [value]):
            if isinstance(each, float) and not math.isfinite(each):
                where = f"{name}[{i}]" if several else name
                raise BadInput(where, each, "is not a finite number", "give a number like 0.5")
    return check_arguments(kind, given)


def _plain(value: Any) -> Any:
    if isinstance(value, Iterator):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def spread(values: float | Sequence[float] | None, count: int) -> list[float]:
    """One number per model."""
    if values is None:
        return [1.0] * count
    return [float(values)] * count if isinstance(values, (int, float)) else [float(value) for value in values]


def check_weights(
    weights: Sequence[float] | None, count: int, normalize: bool, *, positive: bool = False
) -> None:
    """Refuse weights that are not one finite number per model, or that sum to zero where they are divided by it."""
    if weights is None:
        return
    if len(weights) != count:
        raise BadInput("weights", list(weights), f"are not {count}", "give one weight per model")
    for i, weight in enumerate(weights):
        if not math.isfinite(weight) or (positive and weight <= 0):
            problem = "is not a positive number" if positive else "is not a finite number"
            raise BadInput(f"weights[{i}]", weight, problem, "give a number like 0.5")
    if normalize and abs(sum(weights)) < 1e-12:
        raise BadInput("weights", list(weights), "sum to zero", "pass normalize=False, or other weights")


def check_density(density: float | Sequence[float], count: int) -> None:
    """Refuse shares out of (0, 1]."""
    if not isinstance(density, (int, float)) and len(density) != count:
        raise BadInput("density", list(density), f"are not {count}", "give one number, or one per model")
    for share in spread(density, count):
        if not 0 < share <= 1:
            raise BadInput("density", share, "is not in (0, 1]", "give the share of the changes to keep, 0.2")


def check_scaling(scaling: float) -> None:
    """Refuse NaN and infinity."""
    if not math.isfinite(scaling):
        raise BadInput("scaling", scaling, "is not a finite number", "give a number like 0.4")
