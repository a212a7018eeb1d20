"""The best placement of few experts, exactly."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.errors import NotApplicable

__all__ = ["counts_of", "exact", "ways"]

Devices = NDArray[np.int64]
Flows = Sequence[NDArray[np.float64]]
ENUMERATED = 5_000  # balanced placements of one layer that are still looked at


def counts_of(flows: Flows) -> list[int]:
    """Experts per layer."""
    return [*(f.shape[0] for f in flows), flows[-1].shape[1]]


def exact(flows: Flows, groups: int) -> list[Devices]:
    """Layers meet only their neighbours, so the best chain of balanced placements is a shortest path."""
    counts = counts_of(flows)
    numbers = [ways(count, groups) for count in counts]
    if max(numbers) > ENUMERATED:
        problem = f"has {max(numbers):,} balanced placements of a layer, more than {ENUMERATED:,}"
        raise NotApplicable("solver", "exact", problem, 'use solver="descent", or "milp" for a bound')
    options, eye = {count: _balanced(count, groups) for count in set(counts)}, np.eye(groups)
    value, steps = np.zeros(len(options[counts[0]])), []
    for layer, flow in enumerate(flows):
        here, there = eye[options[counts[layer]]], eye[options[counts[layer + 1]]]  # [ways, E, G]
        kept = (flow.T @ here).reshape(len(here), -1) @ there.reshape(len(there), -1).T
        reached = value[:, None] - kept
        steps.append(reached.argmin(0))
        value = reached.min(0)
    state, devices = int(value.argmin()), []
    for layer in range(len(counts) - 1, -1, -1):
        devices.append(options[counts[layer]][state])
        if layer:
            state = int(steps[layer - 1][state])
    return devices[::-1]


def ways(count: int, groups: int) -> int:
    """Number of balanced placements of `count` experts."""
    return math.factorial(count) // math.factorial(count // groups) ** groups


@functools.cache
def _balanced(count: int, groups: int) -> NDArray[np.int64]:
    """Every balanced placement of `count` experts, `[ways, count]`."""
    if groups == 1:
        return np.zeros((1, count), dtype=np.int64)
    each, found = count // groups, []
    for chosen in itertools.combinations(range(count), each):
        rest = [e for e in range(count) if e not in chosen]
        for inner in _balanced(len(rest), groups - 1):
            row = np.zeros(count, dtype=np.int64)
            row[rest] = inner + 1
            found.append(row)
    return np.array(found)
