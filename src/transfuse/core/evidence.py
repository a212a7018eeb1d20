"""Measuring a paper's claim again: the recipe of a method is run, its rule judged, the record written.

A recipe is `evidence/<family>/<slug>.py` with `SLUG`, `CLAIM`, `RULE` and a function `run(tier, seed)` that
returns {arm: {metric: number}} for the method and its baselines.

A rule is a comparison of arithmetic over `arm.metric`, judged in every seed; `mean(...)` takes the mean over
seeds instead. ` in 2/3 seeds` asks for a share of the seeds only. Rules joined by `;` must all hold:

    own.nll <= 0.8 * closed.nll in 3/3 seeds; mean(own.f1) >= mean(closed.f1) + 0.1
"""

from __future__ import annotations

import ast
import datetime
import importlib.util
import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import BadInput, CorruptFile
from .fields import suggest
from .files import atomic_write, check_writable, sha256_file
from .lineage import git_state, hardware, jsonable, versions
from .records import PACKAGE, evidence_root, read_record, slug_of

__all__ = ["Rule", "evidence_root", "parse_rules", "read_record", "run_evidence"]

TIERS = ("quick", "full")
SEEDS = 3

_SHARE = re.compile(r"\s+in\s+(\d+)\s*/\s*(\d+)\s+seeds?$")
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip

Arms = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Rule:
    """One comparison of a rule text.

    Attributes:
        text: As written, without the share of seeds.
        left: Syntax tree left of the comparison, checked.
        compare: The comparison.
        right: Syntax tree right of it.
        share: (K, N) of ` in K/N seeds`, or None: all seeds.
    """

    text: str
    left: ast.expr
    compare: Callable[[float, float], bool]
    right: ast.expr
    share: tuple[int, int] | None

    def names(self) -> list[tuple[str, str]]:
        """The (arm, metric) pairs it reads."""
        return [
            _pair(n)
            for side in (self.left, self.right)
            for n in ast.walk(side)
            if isinstance(n, ast.Attribute)
        ]

    def per_seed(self) -> bool:
        """Whether it reads figures of single seeds, outside of any `mean`."""
        return any(_outside_mean(side) for side in (self.left, self.right))

    def judge(self, seeds: Sequence[Arms]) -> dict[str, Any]:
        """Evaluate over the seeds' figures.

        A figure that is missing (NaN) fails its comparison. With another number of seeds than N, the share
        K/N is asked for, rounded up.

        Returns:
            {"rule", "passed", "held", "needed", "figures": [{"left", "right", "held"}, ...]}: one figure per
            seed, or a single one for rules over means only.
        """
        figures = []
        for arms in seeds if self.per_seed() else seeds[:1]:
            left, right = (_value(side, arms, seeds) for side in (self.left, self.right))
            held = self.compare(left, right) and not math.isnan(left) and not math.isnan(right)
            figures.append({"left": left, "right": right, "held": held})
        times, count = sum(f["held"] for f in figures), len(figures)
        needed = math.ceil(count * self.share[0] / self.share[1]) if self.share else count
        verdict = {"rule": self.text, "passed": times >= needed, "held": times, "needed": needed}
        return {**verdict, "figures": figures}


def parse_rules(text: Any, where: str = "RULE") -> list[Rule]:
    """Parse a rule text; nothing in it is ever executed.

    Raises:
        BadInput: it is not of the grammar above; the message shows the part that is not.
    """
    if not isinstance(text, str) or not text.strip(" ;\n"):
        raise BadInput(where, text, "is not a rule", "write e.g. 'method.recall >= base.recall + 0.2'")
    return [_parse(" ".join(part.split()), where) for part in text.split(";") if part.strip()]


def _parse(part: str, where: str) -> Rule:
    match = _SHARE.search(part)
    share = (int(match[1]), int(match[2])) if match else None
    body = part[: match.start()] if match else part
    try:
        tree = ast.parse(body.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise BadInput(where, part, f"cannot be parsed ({error})", "see the grammar of rules") from error
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in _COMPARISONS:
        raise BadInput(
            where, part, "is not one comparison", "compare two sides with <, <=, >, >=, == or !=; join by ';'"
        )
    left, right = tree.left, tree.comparators[0]
    for side in (left, right):
        _check(side, where, inside_mean=False)
    rule = Rule(body.strip(), left, _COMPARISONS[type(tree.ops[0])], right, share)
    if not rule.names():
        raise BadInput(where, part, "reads no figure", "compare an `arm.metric`")
    if share and (not rule.per_seed() or not 0 < share[0] <= share[1]):
        raise BadInput(
            where, part, "asks for seeds it cannot have", "use `in K/N seeds` on per-seed figures, K <= N"
        )
    return rule


def _check(node: ast.expr, where: str, *, inside_mean: bool) -> None:
    """Accept numbers, `arm.metric`, + - * /, signs and `mean(...)`; refuse everything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check(node.left, where, inside_mean=inside_mean)
        _check(node.right, where, inside_mean=inside_mean)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        _check(node.operand, where, inside_mean=inside_mean)
    elif _is_mean(node) and not inside_mean:
        _check(node.args[0], where, inside_mean=True)  # type: ignore[attr-defined]
    elif not (
        (isinstance(node, ast.Constant) and type(node.value) in (int, float))
        or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    ):
        remedy = "use numbers, arm.metric, + - * / and mean(...)"
        raise BadInput(where, ast.unparse(node), "is not allowed in a rule", remedy)


def _is_mean(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "mean"
        and len(node.args) == 1 and not node.keywords
    )  # fmt: skip


def _outside_mean(node: ast.AST) -> bool:
    if _is_mean(node):
        return False
    return isinstance(node, ast.Attribute) or any(
        _outside_mean(child) for child in ast.iter_child_nodes(node)
    )


def _pair(node: ast.Attribute) -> tuple[str, str]:
    return node.value.id, node.attr  # type: ignore[attr-defined]


def _value(node: ast.expr, arms: Arms, seeds: Sequence[Arms]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, arms, seeds), _value(node.right, arms, seeds)
        if isinstance(node.op, ast.Div) and right == 0:
            return math.nan
        return _ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, arms, seeds)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        return math.fsum(_value(node.args[0], each, seeds) for each in seeds) / len(seeds)
    arm, metric = _pair(node)  # type: ignore[arg-type]
    found = arms[arm][metric]
    return math.nan if found is None else float(found)


def run_evidence(
    slug: str, tier: str = "quick", seeds: int | None = None, root: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Run a method's evidence recipe, judge its rule and write the record; tell progress on stderr.

    A failed rule is written as failed. The other tier's figures in an earlier record are kept. An error or an
    interruption in the recipe leaves the earlier record as it was.

    Args:
        slug: The method.
        tier: "quick" (about a minute) or "full" (minutes on a GPU, up to an hour on a CPU).
        seeds: Number of seeds, from 0 up; the recipe's `SEEDS[tier]` or 3 by default.
        root: Folder of recipes and records in place of `evidence_root()`.

    Returns:
        The record as written.

    Raises:
        BadInput: no such recipe, a rule outside the grammar, or one reading a figure `run` does not return.
    """
    if tier not in TIERS:
        raise BadInput("tier", tier, "is unknown", "use quick or full")
    base = evidence_root() if root is None else Path(root)
    recipe = _find(slug, base)
    results = Path("evidence/results") if base == PACKAGE / "_evidence" else base / "results"
    check_writable(results, "results")
    method = PACKAGE / recipe.parent.name / recipe.name
    if not method.is_file():
        raise BadInput(
            "slug", slug, f"has a recipe but no module {method.name}", "add the method, or rename the recipe"
        )
    # What is measured is the code as it is now: it may be edited while it runs.
    code = {"git": git_state(), "method_sha256": sha256_file(method), "recipe_sha256": sha256_file(recipe)}
    module = _import(recipe)
    text = module.RULE.get(tier) if isinstance(module.RULE, Mapping) else module.RULE
    rules = parse_rules(text, f"{recipe.name}: RULE")
    count = seeds if seeds is not None else getattr(module, "SEEDS", {}).get(tier, SEEDS)
    if type(count) is not int or count < 1:
        raise BadInput("seeds", count, "is not a count", "give 1 or more")

    started = time.perf_counter()
    runs: list[dict[str, Any]] = []
    for seed in range(count):
        begun = time.perf_counter()
        arms = _figures(module.run(tier, seed), recipe.name)
        _check_names(rules, arms, recipe.name)
        runs.append({"seed": seed, "arms": arms, "seconds": round(time.perf_counter() - begun, 3)})
        _tell(f"{module.SLUG} {tier}: seed {seed + 1}/{count} in {runs[-1]['seconds']:.1f} s")
    judged = [rule.judge([run["arms"] for run in runs]) for rule in rules]
    entry = {
        "rule": text,
        "tier": tier,
        "verdict": "passed" if all(each["passed"] for each in judged) else "failed",
        "rules": judged,
        "seeds": runs,
        "summary": _summary([run["arms"] for run in runs]),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "hardware": hardware(),
        **code,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    head = {
        "slug": slug_of(module.SLUG),
        "family": recipe.parent.name,
        "claim": " ".join(module.CLAIM.split()),
    }
    if getattr(module, "NOTES", ""):
        head["notes"] = " ".join(module.NOTES.split())
    try:  # only now: the other tier may have been measured meanwhile
        earlier = (read_record(slug, results.parent) or {"tiers": {}})["tiers"]
    except CorruptFile as error:
        _tell(f"{error}: its other tier is lost")
        earlier = {}
    record: dict[str, Any] = jsonable({**head, **entry, "tiers": {**earlier, tier: entry}})
    path = results / f"{head['slug']}.json"
    atomic_write(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    for each in judged:
        shown = next((f for f in each["figures"] if not f["held"]), each["figures"][0])
        state, share = "held" if each["passed"] else "FAILED", f"{each['held']}/{len(each['figures'])}"
        _tell(f"  {state} {share}: {each['rule']}  [{shown['left']:.4g} against {shown['right']:.4g}]")
    _tell(f"{head['slug']} {tier}: {entry['verdict']} in {entry['seconds']:.1f} s, written to {path}")
    return record


def _find(slug: str, root: Path) -> Path:
    found = {
        slug_of(path.stem): path
        for path in sorted(root.glob("[!_.]*/[!_.]*.py"))
        if path.parent.name != "results"
    }
    if slug_of(slug) not in found:
        remedy = suggest(slug_of(slug), found, f"recipes: {', '.join(found) or 'none'}")
        raise BadInput("slug", slug, f"has no recipe under {root}", remedy)
    return found[slug_of(slug)]


def _import(path: Path) -> ModuleType:
    name = f"transfuse_evidence_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the recipe look their module up here
    root = str(path.parents[1])
    if root not in sys.path:  # recipes share helpers in `_shared`
        sys.path.append(root)
    spec.loader.exec_module(module)
    for needed in ("SLUG", "CLAIM", "RULE", "run"):
        if not hasattr(module, needed):
            raise BadInput(path.name, needed, "is missing from the recipe", f"define {needed}")
    if slug_of(module.SLUG) != slug_of(path.stem):
        raise BadInput(
            f"{path.name}: SLUG", module.SLUG, "is not the file's name", f"use {slug_of(path.stem)!r}"
        )
    return module


def _figures(returned: Any, name: str) -> dict[str, dict[str, float]]:
    """What `run` returned, checked. Infinity is no figure either: a record cannot hold it."""

    def figure(value: Any) -> float:
        return found if math.isfinite(found := float(value)) else math.nan

    try:
        return {
            str(arm): {str(k): figure(v) for k, v in metrics.items()} for arm, metrics in returned.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        remedy = "return {arm: {metric: number}}"
        raise BadInput(f"{name}: run", returned, f"returned something else ({error})", remedy) from error


def _check_names(rules: Sequence[Rule], arms: Arms, name: str) -> None:
    known = [f"{arm}.{metric}" for arm, metrics in arms.items() for metric in metrics]
    for rule in rules:
        for arm, metric in rule.names():
            if f"{arm}.{metric}" not in known:
                remedy = suggest(f"{arm}.{metric}", known, f"figures: {', '.join(known)}")
                raise BadInput(
                    f"{name}: RULE", f"{arm}.{metric}", "is not among the figures of run()", remedy
                )


def _summary(seeds: Sequence[Arms]) -> dict[str, dict[str, float]]:
    """Means over the seeds that have the figure."""
    means: dict[str, dict[str, float]] = {}
    for arm, metric in dict.fromkeys(
        (a, m) for arms in seeds for a, metrics in arms.items() for m in metrics
    ):
        found = [arms[arm][metric] for arms in seeds if metric in arms.get(arm, {})]
        values = [v for v in found if v is not None and not math.isnan(v)]
        means.setdefault(arm, {})[metric] = math.fsum(values) / len(values) if values else math.nan
    return means


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
