"""The placement of experts as an integer programme.

x[l, e, d] is 1 where expert e of layer l lives on device d, y[l, i, j] where a pair with flow is split:

    minimise    sum F_l[i, j] y[l, i, j]
    subject to  y[l, i, j] >= |x[l, i, d] - x[l + 1, j, d]| for every device d,
                sum_d x[l, e, d] = 1,  sum_e x[l, e, d] = E / G.

The released solver has a cost variable per token and step; one per pair of experts has the same optimum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.errors import NotApplicable
from ..core.extras import require
from ._exact import Devices, Flows, counts_of

__all__ = ["programme"]

LARGEST = 2_000_000  # constraints that are still tried


def programme(flows: Flows, groups: int, options: dict[str, Any], facts: dict[str, Any]) -> list[Devices]:
    """Solve it by HiGHS.

    Args:
        flows: F per pair of neighbouring layers.
        groups: Devices.
        options: `balance`, `hard_limit`, and `limit`, the seconds it may take.
        facts: Gets `gap`, `bound` and `optimal`.

    Returns:
        Device of each expert, per layer.

    Raises:
        NotApplicable: too many constraints, or no placement was found in time.
    """
    optimize, sparse = (require(f"scipy.{name}", extra="moe") for name in ("optimize", "sparse"))
    counts = counts_of(flows)
    pairs = [(layer, i, j) for layer, f in enumerate(flows) for i, j in zip(*np.nonzero(f))]
    if 2 * groups * len(pairs) > LARGEST:
        problem = f"constraints are more than {LARGEST:,} for {len(pairs):,} pairs on {groups} devices"
        raise NotApplicable("solver", 2 * groups * len(pairs), problem, 'use solver="descent"')
    starts = np.concatenate([[0], np.cumsum([c * groups for c in counts])])
    placed, soft = int(starts[-1]), options["balance"] == "soft"
    width = placed + len(pairs) + (len(counts) * groups if soft else 0)

    def x(layer: int, expert: int, device: int) -> int:
        return int(starts[layer]) + expert * groups + device

    rows: list[tuple[list[int], list[float], float, float]] = []
    for layer, count in enumerate(counts):
        each = count // groups
        rows += [([x(layer, e, d) for d in range(groups)], [1.0] * groups, 1, 1) for e in range(count)]
        for d in range(groups):
            members = [x(layer, e, d) for e in range(count)]
            if soft:
                spare = placed + len(pairs) + layer * groups + d
                rows.append(([*members, spare], [1.0] * count + [1.0], each, np.inf))
                rows.append(([*members, spare], [1.0] * count + [-1.0], -np.inf, each))
            else:
                limit = options["hard_limit"]
                least, most = (each, each) if limit is None else (math.ceil(limit * each), np.inf)
                rows.append((members, [1.0] * count, least, most))
    if options["hard_limit"] is not None:
        whole = sum(counts) // groups
        for d in range(groups):
            members = [x(layer, e, d) for layer, c in enumerate(counts) for e in range(c)]
            rows.append((members, [1.0] * len(members), whole, whole))
    for index, (layer, i, j) in enumerate(pairs):
        split = placed + index
        for d in range(groups):
            here, there = x(layer, int(i), d), x(layer + 1, int(j), d)
            rows.append(([split, here, there], [1.0, -1.0, 1.0], 0, np.inf))
            rows.append(([split, here, there], [1.0, 1.0, -1.0], 0, np.inf))
    matrix = sparse.csr_matrix(
        (
            np.concatenate([r[1] for r in rows]),
            np.concatenate([r[0] for r in rows]),
            np.concatenate([[0], np.cumsum([len(r[0]) for r in rows])]),
        ),
        shape=(len(rows), width),
    )
    objective, whole_numbers = np.zeros(width), np.zeros(width)
    whole_numbers[:placed] = 1
    objective[placed : placed + len(pairs)] = [flows[layer][i, j] / len(flows) for layer, i, j in pairs]
    if soft:
        objective[placed + len(pairs) :] = np.repeat(
            [1 / (len(counts) * (c // groups)) for c in counts], groups
        )
    upper = np.concatenate([np.ones(placed + len(pairs)), np.full(width - placed - len(pairs), np.inf)])
    lower = np.zeros(width)
    lower[x(0, 0, 0)] = 1  # devices are alike: one expert's place is free to choose
    found = optimize.milp(
        objective, integrality=whole_numbers, bounds=optimize.Bounds(lower, upper),
        constraints=optimize.LinearConstraint(matrix, [r[2] for r in rows], [r[3] for r in rows]),
        options={"time_limit": options["limit"]},
    )  # fmt: skip
    if found.x is None:
        problem = f"found no placement in {options['limit']:g} s"
        raise NotApplicable("solver", "milp", problem, 'raise time_limit, or use solver="descent"')
    facts["gap"] = float(found.mip_gap or 0.0)
    facts["bound"] = float(found.mip_dual_bound or 0.0)
    facts["optimal"] = bool(found.status == 0)
    return [
        found.x[starts[i] : starts[i + 1]].reshape(count, groups).argmax(1).astype(np.int64)
        for i, count in enumerate(counts)
    ]
