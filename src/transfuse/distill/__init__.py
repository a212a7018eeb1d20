"""Distillation: what a teacher knows moved into a student's weights, by objectives on one trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._base import Objective, Signal, TokenObjective
    from ._distiller import Distiller
    from ._policy import AdaptivePolicy, Policy
    from ._store import LogitStore
    from ._students import Pruned, layer_map, prune

_HOMES = {
    "AdaptivePolicy": "_policy",
    "Distiller": "_distiller",
    "LogitStore": "_store",
    "Objective": "_base",
    "Policy": "_policy",
    "Pruned": "_students",
    "Signal": "_base",
    "TokenObjective": "_base",
    "layer_map": "_students",
    "prune": "_students",
}

__all__ = [
    "AdaptivePolicy",
    "Distiller",
    "LogitStore",
    "Objective",
    "Policy",
    "Pruned",
    "Signal",
    "TokenObjective",
    "layer_map",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: they import torch
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
