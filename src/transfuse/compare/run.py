"""Running a comparison: check everything, measure carrier by carrier, keep what is done, write the report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..core.errors import BadInput, NotApplicable, Unavailable
from ..core.extras import require
from ..core.fields import check_arguments, from_mapping
from ..core.files import atomic_write, check_writable, sha256_json
from ..core.records import slug_of
from .carriers import Carrier, find_carrier
from .job import Job, Recipe, read_job
from .measure import closed
from .plan import recommend
from .table import Table
from .workers import Task, cores_here, run_tasks

__all__ = ["compare"]


@dataclass(frozen=True)
class Plan:
    """One carrier to run: class, checked arguments, and the label of its record and folder."""

    uses: str
    label: str
    cls: type[Carrier]
    arguments: dict[str, Any]
    refused: str | None = None


def compare(
    recipe: str | os.PathLike[str] | Mapping[str, Any], *, output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Move one body of knowledge into one model in several ways, and measure each.

    Carriers whose folder in `output` was made by the same recipe, inputs and version are not run again, so an
    interrupted comparison goes on where it was. A carrier that fails is reported; the others go on.

    Args:
        recipe: A YAML file or a mapping with the fields of `Recipe`. File names in it are relative to the file.
        output: Folder to write to, in place of the recipe's.
        quiet: Print nothing.

    Returns:
        The records, one per carrier, in the recipe's order; the same as in `records.jsonl`.

    Raises:
        BadInput: anything wrong with the recipe or its files; nothing was written.
    """
    from ..recipe import load

    raw = load(recipe)
    base = Path.cwd() if isinstance(recipe, Mapping) else Path(recipe).expanduser().resolve().parent
    where = "" if isinstance(recipe, Mapping) else f"{Path(recipe).name}:"
    checked = from_mapping(Recipe, raw, where)
    if output is not None:
        checked = replace(checked, output=os.fspath(output))
    if checked.jobs is not None and checked.jobs < 1:
        raise BadInput(
            f"{where} jobs".strip(), checked.jobs, "is below 1", "give a number of carriers at a time"
        )
    folder = check_writable(checked.output).resolve()
    job = read_job(checked, base, folder)
    plans = _plans(checked, job)
    require("matplotlib", extra="report")  # now, not after an hour of measuring
    require("jinja2", extra="report")
    _check_model(checked)
    if not any(plan.refused is None for plan in plans):
        raise BadInput(
            "carriers", checked.carriers, "cannot carry this knowledge", plans[0].refused or "use others"
        )
    with _only_one(folder):
        return _run(job, plans, base, raw, quiet)


def _plans(recipe: Recipe, job: Job) -> list[Plan]:
    """Check every carrier's name and arguments; the untouched model comes first and the reference is always there."""
    entries: list[Any] = list(recipe.carriers)
    if not entries:
        raise BadInput("carriers", [], "is empty", "name at least one carrier")
    names = [e if isinstance(e, str) else e.get("uses") for e in entries]
    for needed in (slug_of(recipe.reference), "none"):
        if needed not in [slug_of(n) for n in names if isinstance(n, str)]:
            entries.insert(0, needed)
    plans: list[Plan] = []
    for i, entry in enumerate(entries):
        where = f"carriers[{i}]"
        node: dict[str, Any] = {"uses": entry} if isinstance(entry, str) else dict(entry)
        if unknown := set(node) - {"uses", "with", "name"}:
            raise BadInput(where, sorted(unknown)[0], "is not a known field", "use `uses`, `with` and `name`")
        if not isinstance(node.get("uses"), str):
            raise BadInput(f"{where}.uses", node.get("uses"), "is no carrier's name", "write {uses: lora}")
        cls = find_carrier(node["uses"], where)
        arguments = check_arguments(cls, node.get("with"), f"{where}.with")
        label = slug_of(str(node.get("name") or cls.name))
        if not label.replace("-", "").replace(".", "").isalnum():
            raise BadInput(
                f"{where}.name", label, "cannot be a folder's name", "use letters, digits and hyphens"
            )
        if label in [plan.label for plan in plans]:
            raise BadInput(where, label, "is there twice", "give each a `name` of its own")
        refused = None
        try:
            cls(**arguments).check(job.knowledge)
        except NotApplicable as error:
            refused = str(error)
        plans.append(Plan(cls.name, label, cls, arguments, refused))
    return sorted(plans, key=lambda plan: _rank(plan, recipe))


def _rank(plan: Plan, recipe: Recipe) -> int:
    """What all others are measured against comes first."""
    first = ["none", slug_of(recipe.reference)]
    return first.index(plan.uses) if plan.uses in first else len(first)


def _check_model(recipe: Recipe) -> None:
    """Find the model (downloading it now, if it must be) before any work is done."""
    from ..core.models import check_spec

    check_spec(recipe.model, dtype=recipe.dtype, device=recipe.device)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder where another comparison is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                "output", str(folder), "is in use by another comparison", "wait, or use another folder"
            ) from None
        yield


def _run(
    job: Job, plans: list[Plan], base: Path, raw: Mapping[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    from ..core.models import fingerprint

    started = time.time()
    model = fingerprint(job.recipe.model)
    keys = {plan.label: _key(plan, job, model) for plan in plans}
    records: dict[str, dict[str, Any]] = {}
    for plan in plans:
        if plan.refused is not None:
            records[plan.label] = _missed(plan, "not applicable", plan.refused)
        elif (found := _finished(job.folder / "carriers" / plan.label, keys[plan.label])) is not None:
            records[plan.label] = found
    answers = job.folder / "work" / f"base-{keys['none'][:12]}.json"  # what the others are measured against
    if "none" in records and not answers.is_file():
        del records["none"]
    todo = [plan for plan in plans if plan.label not in records]
    if not answers.is_file():
        todo = [plan for plan in plans if plan.refused is None]
        records = {label: r for label, r in records.items() if r["status"] == "not applicable"}
    table = Table(job, [plan.label for plan in plans], quiet=quiet)
    with table:
        for record in _complete(job, plans, records):
            table.add(record, cached=True)

        def request(plan: Plan) -> dict[str, Any]:
            return {
                "recipe": {**asdict(job.recipe), "carriers": []},
                "base": str(base),
                "answers": str(answers),
                "output": str(job.folder),
                "carrier": {
                    "uses": plan.uses,
                    "label": plan.label,
                    "with": plan.arguments,
                    "title": _title(plan),
                },
                "key": keys[plan.label],
                "model": model,
            }

        def finish(plan: Plan, outcome: dict[str, Any]) -> None:
            if "record" in outcome:
                records[plan.label] = outcome["record"]
            else:
                records[plan.label] = _missed(plan, outcome["status"], outcome["failed"])
                if plan.uses == "none":
                    raise Unavailable(f"the untouched model could not be measured: {outcome['failed']}")
            written = {r["carrier"]: r for r in _write_records(job, plans, records)}
            table.add(written[plan.label])

        # The long ones early, so that no process is left with one at the end.
        todo.sort(key=lambda plan: (_rank(plan, job.recipe), -plan.cls.effort))
        tasks = [Task(plan.label, plan, plan.cls.effort, plan.cls.shares) for plan in todo]
        run_tasks(tasks, request, finish, table, log=job.folder / "worker.log", jobs=_jobs(job.recipe))
    done = _write_records(job, plans, records)
    _write_report(job, done, model, raw, time.time() - started)
    table.close(job.folder / "report.html")
    return done


def _jobs(recipe: Recipe) -> int:
    """Carriers at a time: as the recipe says, else two on a CPU that has the cores, one on a GPU."""
    if recipe.jobs is not None:
        return recipe.jobs
    return 2 if recipe.device == "cpu" and cores_here() > 1 else 1


def _title(plan: Plan) -> str:
    return plan.cls.title if plan.label == plan.cls.name else f"{plan.cls.title} ({plan.label})"


def _key(plan: Plan, job: Job, model: str) -> str:
    """Hash of all that decides a carrier's record."""
    return sha256_json([plan.uses, plan.arguments, job.settings, model, __version__])


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record in `folder`, if the same key made it."""
    try:
        record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return record if record.get("key") == key else None


def _missed(plan: Plan, status: str, reason: str) -> dict[str, Any]:
    """The record of a carrier that could not be measured."""
    empty = dict.fromkeys(
        ("gap_closed", "perplexity", "perplexity_ratio", "install_seconds", "install_peak_bytes", "stored_bytes",
         "latency_seconds", "tokens_read", "folder")
    )  # fmt: skip
    return {
        "carrier": plan.label,
        "uses": plan.uses,
        "title": _title(plan),
        "status": status,
        "reason": reason,
        "baseline": False,
        "uses_context": plan.cls.uses_context,
        "access": list(plan.cls.access),
        "reversible": plan.cls.reversible,
        "method": plan.cls.method,
        "arguments": plan.arguments,
        "recall": {"prompt": None, "paraphrase": None},
        "locality": {"neighbours": None, "unrelated": None, "all": None},
        "samples": [],
        **empty,
    }


def _complete(job: Job, plans: list[Plan], records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in the recipe's order, with what depends on other carriers filled in."""
    ordered = [dict(records[plan.label]) for plan in plans if plan.label in records]
    by_use = {r["uses"]: r for r in ordered if r["status"] == "done"}
    base, reference = by_use.get("none"), by_use.get(slug_of(job.recipe.reference))
    for record in ordered:
        record.setdefault("gap_closed", None)
        if record["status"] == "done" and base and reference:
            record["gap_closed"] = closed(record["per_item"], base["per_item"], reference["per_item"])
    return ordered


def _write_records(job: Job, plans: list[Plan], records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write `records.jsonl`."""
    ordered = _complete(job, plans, records)
    lines = [json.dumps({k: v for k, v in r.items() if k != "key"}, default=str) for r in ordered]
    atomic_write(job.folder / "records.jsonl", "\n".join(lines) + "\n")
    return ordered


def _write_report(
    job: Job, records: list[dict[str, Any]], model: str, raw: Mapping[str, Any], seconds: float
) -> None:
    from ..core.lineage import hardware, versions
    from ..core.references import REFERENCES
    from ..report import write_report

    recipe, knowledge = job.recipe, job.knowledge
    known = REFERENCES.get(recipe.model)
    asked = [len(item.asked) for item in knowledge.items]
    context = {
        "title": recipe.title,
        "model": {
            "spec": recipe.model,
            "parameters": known.parameters if known else None,
            "dtype": next((r["dtype"] for r in records if r.get("dtype")), recipe.dtype),
            "fingerprint": model,
            "licence": known.licence if known else None,
        },
        "knowledge": {
            knowledge.kind: len(knowledge.items),
            "documents": len(knowledge.documents),
            "source": recipe.knowledge.facts or recipe.knowledge.questions,
            "sha256": knowledge.hash,
            "paraphrases_tested": sum(asked),
            "paraphrases_taught": sum(len(item.taught) for item in knowledge.items),
        },
        "constraints": {k: v for k, v in asdict(recipe.constraints).items() if v is not None},
        "recommendation": recommend(records, recipe.constraints, slug_of(recipe.reference)),
        "reference": slug_of(recipe.reference),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": sum(r.get("seconds") or 0.0 for r in records) or seconds,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": yaml.safe_dump(json.loads(json.dumps(raw, default=str)), sort_keys=False),
    }
    atomic_write(job.folder / "comparison.json", json.dumps(context, indent=1, default=str))
    write_report(records, context, job.folder)
