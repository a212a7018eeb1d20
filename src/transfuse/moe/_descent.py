"""Descent: one layer's best placement is a balanced assignment; layers in turn, then pairs of devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.extras import require
from ._exact import Devices, Flows, counts_of, exact, ways

__all__ = ["assign", "cost_of", "descend"]

TRADED = 300  # balanced placements of a layer on two devices up to which their trade is solved exactly


def assign(
    gain: NDArray[np.float64], *, penalty: float = 0.0, moved: NDArray[np.float64] | None = None
) -> Devices:
    """The balanced assignment of a layer's experts with the most gain, exactly (linear sum assignment).

    Args:
        gain: `[E, G]`, what an expert gains on a device.
        penalty: Above 0, devices need not be balanced: |experts - E/G| of each costs that much.
        moved: `[G, G]` distances between devices, with `gain` then the mass that goes to or comes from each device:
            what is minimised is the mass times its distance.

    Returns:
        Device of each expert, int64 `[E]`.
    """
    solve = require("scipy.optimize", extra="moe").linear_sum_assignment
    experts, devices = gain.shape
    cost = -gain if moved is None else gain @ moved.T
    each = experts // devices
    slots = each if penalty == 0 else experts
    wide = np.repeat(cost[:, :, None], slots, 2)  # a column per place on a device
    if penalty > 0:  # the first E/G places each bring a device closer to balance, the others take it away
        wide = wide + penalty * np.where(np.arange(slots) < each, -1.0, 1.0)
    _, columns = solve(wide.reshape(experts, devices * slots))
    found: Devices = columns.astype(np.int64) // slots
    return found


def cost_of(flows: Flows, devices: Sequence[Devices], apart: NDArray[np.float64]) -> float:
    """Mass of all moves, each times its distance `[G, G]`."""
    return sum(
        float((f * apart[here[:, None], there[None, :]]).sum())
        for f, here, there in zip(flows, devices, devices[1:])
    )


def descend(
    flows: Flows, groups: int, options: dict[str, Any], facts: dict[str, Any], start: list[Devices] | None,
    apart: NDArray[np.float64] | None = None,
) -> list[Devices]:  # fmt: skip
    """Sweep the layers from several starts, let devices trade on the best, and return it.

    Args:
        flows: F per pair of neighbouring layers.
        groups: Devices.
        options: `balance`, `restarts` and `seed`.
        facts: `sweeps` is added to.
        start: A placement to start from, too.
        apart: Distances between devices; by default all alike.
    """
    counts, draw = counts_of(flows), np.random.default_rng(options["seed"])
    plain = [np.arange(count) // (count // groups) for count in counts]
    far = 1.0 - np.eye(groups) if apart is None else apart
    # |experts - E/G| in units of the summed flow: the normaliser of the released objective, times L - 1.
    soft = [
        0.0 if options["balance"] == "hard" else len(flows) / (len(counts) * (c // groups)) for c in counts
    ]

    def total(devices: Sequence[Devices]) -> float:
        uneven = sum(
            p * np.abs(np.bincount(d, minlength=groups) - len(d) // groups).sum()
            for p, d in zip(soft, devices)
        )
        return cost_of(flows, devices, far) + float(uneven)

    def place(layer: int, devices: Sequence[Devices], both: bool = True) -> Devices:
        mass = np.zeros((counts[layer], groups))
        if layer > 0:
            mass += flows[layer - 1].T @ np.eye(groups)[devices[layer - 1]]
        if both and layer < len(flows):
            mass += flows[layer] @ np.eye(groups)[devices[layer + 1]]
        return assign(mass, penalty=soft[layer], moved=apart)

    def swept(devices: Sequence[Devices]) -> tuple[list[Devices], float]:
        devices, value = list(devices), total(devices)
        while True:
            facts["sweeps"] = facts.get("sweeps", 0) + 1
            for layer in range(len(counts)):
                devices[layer] = place(layer, devices)
            now = total(devices)
            if now >= value - 1e-12:
                return devices, now
            value = now

    starts: list[list[Devices]] = [list(start)] if start is not None else []
    greedy = list(plain)
    for layer in range(1, len(counts)):
        greedy[layer] = place(layer, greedy, both=False)
    starts += [list(plain), greedy]
    starts += [[draw.permutation(d) for d in plain] for _ in range(options["restarts"])]
    best, lowest = starts[0], math.inf
    for devices in starts:
        devices, value = swept(devices)
        if value < lowest - 1e-12:
            best, lowest = devices, value
    while apart is None and options["balance"] == "hard" and groups > 2:
        devices, value = swept(_trade(flows, best, groups, options))
        if value >= lowest - 1e-12:
            break
        best, lowest = devices, value
    return best


def _trade(flows: Flows, devices: Sequence[Devices], groups: int, options: dict[str, Any]) -> list[Devices]:
    """Let devices trade experts of all layers, two at a time: those first between which most tokens move.

    A sweep moves experts of one layer; whole chains of experts that belong together change device here.
    """
    devices, eye = list(devices), np.eye(groups)
    between = sum(eye[here].T @ f @ eye[there] for f, here, there in zip(flows, devices, devices[1:]))
    between = between + between.T
    pairs = sorted(itertools.combinations(range(groups), 2), key=lambda pair: -float(between[pair]))
    for one, two in pairs[: 4 * groups]:
        members = [np.flatnonzero((d == one) | (d == two)) for d in devices]
        inner = [f[np.ix_(here, there)] for f, here, there in zip(flows, members, members[1:])]
        now = [(d[chosen] == two).astype(np.int64) for d, chosen in zip(devices, members)]
        if max(ways(c, 2) for c in counts_of(inner)) <= TRADED:
            better = exact(inner, 2)
        else:
            better = descend(inner, 2, {**options, "restarts": 1}, {}, now)
        if cost_of(inner, better, 1.0 - np.eye(2)) < cost_of(inner, now, 1.0 - np.eye(2)) - 1e-12:
            for layer, chosen in enumerate(members):
                devices[layer] = devices[layer].copy()
                devices[layer][chosen] = np.where(better[layer] == 1, two, one)
    return devices
