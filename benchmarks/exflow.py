"""Seconds to place experts, by solver and size, and what the placement costs on tokens that were not profiled.

Traces are planted: the next expert is a fixed successor with probability 0.8. The integer programme gets a time limit
and reports its gap. Prints a table; `--json FILE` writes it too.

    python benchmarks/exflow.py [--sizes 8x8x4 16x12x4 64x24x64] [--solvers descent bipartition] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from transfuse.core.errors import NotApplicable
from transfuse.core.lineage import hardware, versions
from transfuse.moe.exflow import (
    ExpertAffinity,
    Topology,
    greedy_placement,
    planted_trace,
    random_placement,
    solve_placement,
    vanilla_placement,
)

SIZES = ["8x4x4", "8x8x4", "8x32x4", "8x32x8", "16x12x4", "32x24x8", "64x24x8", "64x24x16", "64x24x64"]
SOLVERS = ["descent", "bipartition", "exact", "milp"]


def measured(size: str, solvers: list[str], tokens: int, limit: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of one size: experts x layers x devices."""
    experts, layers, devices = (int(part) for part in size.split("x"))
    profiled, rest = planted_trace(tokens, experts, layers, 0.8, seed=0).split(0.8)
    affinity, cluster = ExpertAffinity.from_trace(profiled), Topology(gpus_per_node=devices)
    rows = []
    baselines = {
        "vanilla": lambda: vanilla_placement(affinity.num_experts, cluster),
        "random": lambda: random_placement(affinity.num_experts, cluster),
        "greedy": lambda: greedy_placement(affinity, cluster),
    }
    for solver in [*baselines, *solvers]:
        seconds, plan = [], None
        try:
            for _ in range(1 if solver in ("milp", "exact") else repeats):
                start = time.perf_counter()
                plan = (
                    baselines[solver]()
                    if solver in baselines
                    else solve_placement(affinity, cluster, solver=solver, time_limit=limit)
                )
                seconds.append(time.perf_counter() - start)
        except NotApplicable as refused:
            rows.append({"size": size, "solver": solver, "refused": refused.problem})
            continue
        rows.append(
            {
                "size": size,
                "solver": solver,
                "seconds": statistics.median(seconds),
                "profiled": plan.expected_fraction(affinity),
                "held_out": plan.cross_device_fraction(rest),
                "gap": plan.facts.get("gap"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="experts x layers x devices")
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    parser.add_argument("--tokens", type=int, default=6250, help="of which four fifths are profiled")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for an integer programme")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    table = []
    print(f"{'E x L x G':>10}  {'solver':<12} {'seconds':>9} {'profiled':>9} {'held out':>9} {'gap':>6}")
    for size in options.sizes:
        for row in measured(size, options.solvers, options.tokens, options.limit, options.repeats):
            table.append(row)
            if "refused" in row:
                print(f"{size:>10}  {row['solver']:<12} {'too large':>9}")
                continue
            gap = "" if row["gap"] is None else f"{row['gap']:.2f}"
            figures = f"{row['seconds']:9.3f} {row['profiled']:9.4f} {row['held_out']:9.4f} {gap:>6}"
            print(f"{size:>10}  {row['solver']:<12} {figures}", flush=True)
    if options.json:
        record = {"rows": table, "versions": versions(), "hardware": hardware()}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
