"""Recipes that name a standard objective: its arguments, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import BadInput
from ..core.fields import at, check_value, hints_of, parameters_of, suggest
from .survey_kd_llm import OBJECTIVES, get

__all__ = ["check_objective", "known_arguments"]


def known_arguments(kind: type) -> dict[str, Callable[..., Any]]:
    """The arguments that a class takes by name, each with the constructor that declares it.

    Where a constructor hands further ones on, those of the class above are among them.
    """
    found: dict[str, Callable[..., Any]] = {}
    for each in kind.__mro__:
        made = vars(each).get("__init__")
        if made is None:
            continue
        for name in parameters_of(made):
            if name != "self":
                found.setdefault(name, made)
        kinds = {parameter.kind for parameter in inspect.signature(made).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def check_objective(arguments: Mapping[str, Any], where: str) -> None:
    """Check `{objective: name, arguments: {...}}`.

    Args:
        arguments: As in a recipe; without `objective` the default one is meant.
        where: What messages call them.

    Raises:
        BadInput: an unknown objective or argument, with the nearest name, or a value of another type.
    """
    name = arguments.get("objective", "forward-kl")
    if name not in OBJECTIVES:
        try:
            get(name)
        except BadInput as error:
            raise BadInput(at(where, error.argument), error.value, error.problem, error.remedy) from None
    known, place = known_arguments(OBJECTIVES[name]), at(where, "arguments")
    for key, value in (arguments.get("arguments") or {}).items():
        if key not in known:
            remedy = suggest(key, known, f"{name} takes {', '.join(known) or 'none'}")
            raise BadInput(at(place, key), value, "is not a known field", remedy)
        check_value(value, hints_of(known[key]).get(key, Any), at(place, key))
