"""ExFlow: experts that tokens visit one after the other are placed on the same device.

:arxiv: 2401.08383
:moves: a profiled trace of routing -> the device that each expert lives on
:access: hidden, weights
:reversible: yes
:context: no
:extra: moe

A token that used expert i in one layer tends to use one of few experts in the next. In expert parallelism, where a
layer's experts are spread over devices, that habit decides how often a token must move. Here it is profiled and
experts are placed by it; no weight changes its value and no answer changes.

With F_l[i, j] the share of tokens that use expert i in layer l and j in layer l + 1, and P(j | i) = F_l[i, j] /
sum_j F_l[i, j] the affinity, the placement minimises

    sum_l sum_ij F_l[i, j] [device of i in l differs from device of j in l + 1]

with E / G experts of every layer on each of G devices. Divided by L - 1 it is the fraction of moves that cross devices:
1 - 1/G for any placement where there is no affinity. Between nodes and within them links differ, so experts are first
divided among nodes, then inside each. It pays together with the context-coherent schedule: every device has every
sequence's context, so a token stays where its last expert was and is sent once per layer, or not at all, in place of
out and back (`simulate_cluster` counts both; `decode_on_processes` runs both, with equal logits).

The paper solves an integer programme with one cost variable per token and step by a commercial solver. One variable
per pair of experts has the same optimum (`solver="milp"`, by HiGHS), but the default is a descent: one layer at a time
is a balanced assignment, solved exactly, and then pairs of devices trade experts of all layers. It is faster by orders
of magnitude, and where `solver="exact"` can say so at or near the optimum. For routers with K > 1 experts per token the
released code has no case; here all K^2 pairs count, weighted by the product of the gates. Throughput figures of the
paper rest on an engine that was not released: this module profiles, solves, simulates and shows the schedule.

    from transfuse import load
    from transfuse.moe.exflow import Topology, exflow

    model, tokenizer = load("path/to/a-mixture-of-experts")
    plan = exflow(model, rows_of_token_ids, topology=Topology(nodes=2, gpus_per_node=4))
    plan.cost, plan.facts                        # fraction of moves across devices on the tokens profiled
    plan.permute_experts(model)                  # equal contiguous shards now realise the plan
    plan.save("plan.json")

Measure on tokens that were not profiled: with few tokens the optimum fits their accidents.
"""

from __future__ import annotations

from typing import Any, Literal

from ..core.errors import BadInput
from ._cluster import Link, Traffic, simulate_cluster
from ._descent import assign
from ._parallel import Decoded, decode_on_processes
from ._placement import (
    PlacementPlan,
    Topology,
    greedy_placement,
    load_plan,
    random_placement,
    vanilla_placement,
)
from ._solvers import Profiled, profile_incrementally, solve_placement
from ._trace import ExpertAffinity, RoutingTrace, collect_routing_trace, planted_trace

__all__ = [
    "Decoded",
    "ExpertAffinity",
    "Link",
    "PlacementPlan",
    "Profiled",
    "RoutingTrace",
    "Topology",
    "Traffic",
    "assign",
    "collect_routing_trace",
    "decode_on_processes",
    "exflow",
    "greedy_placement",
    "load_plan",
    "planted_trace",
    "profile_incrementally",
    "random_placement",
    "simulate_cluster",
    "solve_placement",
    "vanilla_placement",
]


def exflow(
    model: Any,
    batches: Any,
    *,
    topology: Topology | None = None,
    solver: Literal["descent", "bipartition", "milp", "exact"] = "descent",
    balance: Literal["hard", "soft"] = "hard",
    profile_tokens: int | None = 5000,
    incremental: bool = False,
    time_limit: float = 60.0,
    seed: int = 0,
) -> PlacementPlan:
    """Profile a model's routing on some text and place its experts.

    Args:
        model: A mixture of experts of transformers; it is left as it is.
        batches: Batches with `input_ids`, token ids `[B, T]`, or rows of ids.
        topology: The cluster; one node of 4 devices by default.
        solver: See `solve_placement`.
        balance: See `solve_placement`.
        profile_tokens: Tokens to profile at most (with `incremental`, at a time); None for all.
        incremental: Add as many tokens at a time until the placement is stable.
        time_limit: Seconds per integer programme.
        seed: Of the descent's random starts.

    Returns:
        The plan; `plan.cost` is the fraction of moves across devices on the tokens profiled.

    Raises:
        BadInput: experts do not divide evenly among the devices, no tokens, unknown options.
        NotApplicable: the model has fewer than two layers of experts, or the case is too large for the solver.
        MissingExtra: scipy is not installed.
    """
    if profile_tokens is not None and profile_tokens < 1:
        raise BadInput("profile_tokens", profile_tokens, "is not a count", "give 1 or more")
    options: dict[str, Any] = {"solver": solver, "balance": balance, "time_limit": time_limit, "seed": seed}
    if incremental:
        trace = collect_routing_trace(model, batches)
        return profile_incrementally(trace, topology, step=profile_tokens or len(trace), **options).plan
    trace = collect_routing_trace(model, batches, max_tokens=profile_tokens)
    return solve_placement(ExpertAffinity.from_trace(trace), topology, **options)
