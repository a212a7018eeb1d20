"""Solving for a placement: descent by balanced assignments, halving, an integer programme, an exact one for few.

All minimise sum_l sum_ij F_l[i, j] [device of i != device of j] over balanced placements of each layer's experts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BadInput, NotApplicable
from ..core.runs import check_positive
from ._descent import cost_of, descend
from ._exact import Devices, Flows, counts_of, exact
from ._milp import programme
from ._placement import PlacementPlan, Topology, check_divides
from ._trace import ExpertAffinity, RoutingTrace

__all__ = ["Profiled", "profile_incrementally", "solve_placement"]

Balance = Literal["hard", "soft"]
Solver = Literal["descent", "bipartition", "milp", "exact"]


def solve_placement(
    affinity: ExpertAffinity,
    topology: Topology | None = None,
    *,
    solver: Solver = "descent",
    balance: Balance = "hard",
    hard_limit: float | None = None,
    staged: bool = True,
    warm: PlacementPlan | None = None,
    restarts: int = 20,
    time_limit: float = 60.0,
    seed: int = 0,
) -> PlacementPlan:
    """Place experts so that tokens change device as rarely as possible.

    "descent": with all other layers fixed, one layer's best placement is a balanced assignment; layers are swept until
    the cost stops falling, from several starts (the plain placement, the greedy one, random ones). On the best, pairs
    of devices trade experts of all layers at once, and it is swept again. "bipartition": recursive halving, log2(G)
    levels, each part on its own. "milp": the integer programme by HiGHS, which gives a bound and a gap, or the
    descent's placement if that is better when time is up; its relaxation says nothing (x = 1/G costs 0), so the gap
    closes for few experts only.
    "exact": dynamic programming over all balanced placements of a layer, where there are at most 5,000.

    With several nodes, experts are first divided among nodes and then, inside each, among its devices.

    Args:
        affinity: What was profiled.
        topology: The cluster; one node of 4 devices by default.
        solver: See above.
        balance: "hard" puts E / G experts of every layer on every device. "soft" adds
            1 / (L E/G) sum |experts on the device - E/G| to the cost (of the fraction of moves); by descent or milp.
        hard_limit: In place of hard balance (milp only): at least that share of E / G, rounded up, of every layer on
            every device, and as many experts in all on each.
        staged: With several nodes: False minimises a move's cost of 1 within a node and 2 between nodes at once
            (descent only).
        warm: A placement on the same cluster that the descent starts from as well; with several nodes it counts for
            the division among them (unless `staged` is False). The other solvers look at it no further.
        restarts: Random starts of descent.
        time_limit: Seconds per integer programme.
        seed: Of the random starts.

    Raises:
        BadInput: E does not divide among the devices; halving needs a power of two; unknown options; `warm` is of other
            experts or another cluster.
        NotApplicable: the case is too large for the solver, or the solver cannot do what is asked.
        MissingExtra: scipy is not installed.
    """
    cluster = topology or Topology()
    _check(affinity, cluster, solver, balance, hard_limit, staged, restarts)
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    options = {
        "balance": balance,
        "hard_limit": hard_limit,
        "restarts": restarts,
        "limit": time_limit,
        "seed": seed,
    }
    start = None if warm is None else _start(warm, affinity, cluster)
    flows, groups = affinity.flow, cluster.devices
    if solver == "bipartition":
        devices = _halve(flows, groups, options, facts)
    elif cluster.nodes == 1 or (solver == "descent" and not staged):
        apart = None if cluster.nodes == 1 else cluster.distances()
        devices = _solve(solver, flows, groups, options, facts, start, apart)
    else:
        inner = cluster.gpus_per_node
        nodes = None if start is None else [d // inner for d in start]
        found = _solve(solver, flows, cluster.nodes, options, facts, nodes)
        devices = [d * inner for d in found]
        for node in range(cluster.nodes):
            _inside(
                flows, found, node, inner, devices, lambda part: _solve(solver, part, inner, options, facts)
            )
    plan = PlacementPlan(tuple(devices), cluster, affinity.layers, solver)
    facts |= {"seconds": round(time.perf_counter() - started, 4), "tokens": affinity.tokens}
    return PlacementPlan(
        plan.devices, cluster, affinity.layers, solver, plan.expected_fraction(affinity), facts
    )


def _start(warm: PlacementPlan, affinity: ExpertAffinity, cluster: Topology) -> list[Devices]:
    counts = [len(d) for d in warm.devices]
    if counts != list(affinity.num_experts):
        raise BadInput("warm", counts, "is of other experts", "start from a plan of this model")
    if warm.topology != cluster:
        raise BadInput("warm", warm.topology, "is of another cluster", f"start from a plan for {cluster}")
    return list(warm.devices)


def _check(
    affinity: ExpertAffinity, cluster: Topology, solver: str, balance: str, hard_limit: float | None, staged: bool,
    restarts: int,
) -> None:  # fmt: skip
    if not isinstance(affinity, ExpertAffinity):
        remedy = "count one: ExpertAffinity.from_trace(...)"
        raise BadInput("affinity", type(affinity).__name__, "is no affinity", remedy)
    check_divides(affinity.num_experts, cluster.devices)
    if solver not in ("descent", "bipartition", "milp", "exact"):
        raise BadInput("solver", solver, "is not known", 'use "descent", "bipartition", "milp" or "exact"')
    if balance not in ("hard", "soft"):
        raise BadInput("balance", balance, "is not known", 'use "hard" or "soft"')
    if not isinstance(restarts, int) or restarts < 0:
        raise BadInput("restarts", restarts, "is not a count", "give 0 or more")
    if solver == "bipartition" and cluster.devices & (cluster.devices - 1):
        raise BadInput("devices", cluster.devices, "is no power of two", "use another solver")
    if balance == "soft" and (solver in ("bipartition", "exact") or cluster.nodes > 1):
        raise NotApplicable(
            "balance", balance, f"is not for {solver} or several nodes", "use descent on one node"
        )
    if hard_limit is not None and (
        solver != "milp" or balance != "hard" or not 0 < hard_limit <= 1 or cluster.nodes > 1
    ):
        raise NotApplicable("hard_limit", hard_limit, "is a share, for milp on one node", 'use solver="milp"')
    if not staged and solver != "descent":
        raise NotApplicable("staged", staged, "is for descent only", 'use solver="descent"')


def _solve(
    solver: str, flows: Flows, groups: int, options: dict[str, Any], facts: dict[str, Any],
    start: list[Devices] | None = None, apart: NDArray[np.float64] | None = None,
) -> list[Devices]:  # fmt: skip
    if groups == 1:
        return [np.zeros(count, dtype=np.int64) for count in counts_of(flows)]
    if solver == "milp":
        return _certified(flows, groups, options, facts)
    if solver == "exact":
        return exact(flows, groups)
    return descend(flows, groups, options, facts, start, apart)


def _certified(flows: Flows, groups: int, options: dict[str, Any], facts: dict[str, Any]) -> list[Devices]:
    """What the integer programme found, or the descent's placement where that is better, with the gap to the bound."""
    own: dict[str, Any] = {}
    found = programme(flows, groups, options, own)
    if options["balance"] == "hard" and options["hard_limit"] is None:
        other, far = descend(flows, groups, options, facts, None), 1.0 - np.eye(groups)
        costs = [cost_of(flows, each, far) / len(flows) for each in (found, other)]
        if costs[1] < costs[0] - 1e-12:
            found, own["gap"] = other, (costs[1] - own["bound"]) / costs[1]
    facts["gap"] = max(facts.get("gap", 0.0), own["gap"])
    facts.setdefault("bounds", []).append(own["bound"])
    facts["optimal"] = facts.get("optimal", True) and own["optimal"]
    return found


# --- parts -------------------------------------------------------------------------------------------------


def _inside(
    flows: Flows, parts: Sequence[Devices], part: int, width: int, devices: list[Devices],
    solve: Callable[[Flows], list[Devices]],
) -> None:  # fmt: skip
    """Place the experts of one part among its `width` devices: their numbers are added to `devices` in place."""
    members = [np.flatnonzero(p == part) for p in parts]
    inner = solve([f[np.ix_(here, there)] for f, here, there in zip(flows, members, members[1:])])
    for layer, chosen in enumerate(members):
        devices[layer] = devices[layer].copy()
        devices[layer][chosen] += inner[layer]
    assert width > int(max(d.max() for d in inner))


def _halve(flows: Flows, groups: int, options: dict[str, Any], facts: dict[str, Any]) -> list[Devices]:
    """Recursive halving: at each level every part is divided in two on its own."""
    devices = [np.zeros(count, dtype=np.int64) for count in counts_of(flows)]
    for level in range(int(math.log2(groups))):
        parts = [d.copy() for d in devices]
        devices = [2 * d for d in devices]
        for part in range(2**level):
            _inside(flows, parts, part, 2, devices, lambda inner: descend(inner, 2, options, facts, None))
    return devices


# --- profiling ---------------------------------------------------------------------------------------------


class Profiled(NamedTuple):
    """What incremental profiling gives.

    Attributes:
        plan: The best placement on the tokens profiled by then, which is the last or the one before it.
        tokens: How many tokens it took.
        stable: Whether it stopped because the placement did.
        history: (tokens, cost of the placement so far, cost of the one solved for), on the tokens profiled by then.
    """

    plan: PlacementPlan
    tokens: int
    stable: bool
    history: list[tuple[int, float, float]]


def profile_incrementally(
    trace: RoutingTrace,
    topology: Topology | None = None,
    *,
    step: int = 5000,
    tolerance: float = 0.01,
    **options: Any,
) -> Profiled:
    """Solve on the first `step` tokens, add as many at a time, and stop when the placement is stable.

    Each solve starts from the placement before (as far as `solve_placement` uses `warm`), which stays if the new one
    costs more. It is stable when a new one would lower the expected share of moves, on all tokens so far, by no more
    than `tolerance` of itself.

    Args:
        trace: All tokens there are.
        topology: The cluster.
        step: Tokens added at a time.
        tolerance: See above.
        **options: Of `solve_placement`.

    Raises:
        BadInput: as `solve_placement`; a step below 1; no `RoutingTrace`.
    """
    check_positive(step=step)
    if not isinstance(trace, RoutingTrace):
        remedy = "make one: RoutingTrace.of(ids, num_experts)"
        raise BadInput("trace", type(trace).__name__, "is no trace", remedy)
    plan, history, used = None, [], 0
    while used < len(trace):
        used = min(used + step, len(trace))
        affinity = ExpertAffinity.from_trace(trace.part(0, used))
        fresh = solve_placement(affinity, topology, warm=plan, **options)
        before = math.nan if plan is None else plan.expected_fraction(affinity)
        history.append((used, before, fresh.cost))
        stable = plan is not None and before - fresh.cost <= tolerance * before
        if plan is None or fresh.cost <= before:
            plan = fresh
        else:
            plan = dataclasses.replace(plan, cost=before, facts={**plan.facts, "tokens": affinity.tokens})
        if stable:
            return Profiled(plan, used, True, history)
    assert plan is not None
    return Profiled(plan, used, False, history)
