"""Running a comparison: check everything, measure carrier by carrier, keep what is done, write the report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..core.errors import BadInput, NotApplicable, Unavailable
from ..core.extras import require
from ..core.fields import beside, check_arguments, from_mapping
from ..core.files import atomic_write, check_writable, disk_guard, sha256_file, sha256_json
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
    """One carrier to run: itself, the arguments it was made with, and the label of its record and folder."""

    uses: str
    label: str
    carrier: Carrier
    arguments: dict[str, Any]
    refused: str | None = None


def compare(
    recipe: str | os.PathLike[str] | Mapping[str, Any], *, output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Move one body of knowledge into one model in several ways, and measure each.

    Carriers whose folder in `output` was made by the same recipe, inputs, models, number of jobs and version are not
    run again, so an interrupted comparison goes on where it was. A carrier that fails is reported; the others go on.

    Args:
        recipe: A YAML file or a mapping with the fields of `Recipe`. File names in it are relative to the file,
            `output` to the working folder.
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
    checked = replace(checked, model=os.fspath(beside(base, checked.model, Path)))
    if output is not None:
        checked = replace(checked, output=os.fspath(output))
    folder = check_writable(checked.output).resolve()
    job = read_job(checked, base, folder)
    plans = _plans(checked, job, base)
    require("matplotlib", extra="report")  # now, not after an hour of measuring
    require("jinja2", extra="report")
    _check_models(checked, plans)
    for plan in plans:
        found = folder / "carriers" / plan.label
        if found.exists() and not (found / "transfuse.json").is_file():
            raise BadInput(
                "output", str(found), "was not made by a comparison", "choose another output folder"
            )
    if not any(plan.refused is None for plan in plans):
        raise BadInput(
            "carriers", checked.carriers, "cannot carry this knowledge", plans[0].refused or "use others"
        )
    with _only_one(folder):
        return _run(job, plans, base, raw, quiet)


def _plans(recipe: Recipe, job: Job, base: Path) -> list[Plan]:
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
        named = cls(**arguments).models()
        for key, value in arguments.items():
            if isinstance(value, str) and value in named:
                arguments[key] = os.fspath(beside(base, value, Path))
        label = slug_of(str(node.get("name") or cls.name))
        if not label.replace("-", "").replace(".", "").isalnum():
            raise BadInput(
                f"{where}.name", label, "cannot be a folder's name", "use letters, digits and hyphens"
            )
        if label in [plan.label for plan in plans]:
            raise BadInput(where, label, "is there twice", "give each a `name` of its own")
        carrier, refused = cls(**arguments), None
        try:
            carrier.check(job.knowledge)
        except NotApplicable as error:
            refused = str(error)
        plans.append(Plan(cls.name, label, carrier, arguments, refused))
    return sorted(plans, key=lambda plan: _rank(plan, recipe))


def _rank(plan: Plan, recipe: Recipe) -> int:
    """What all others are measured against comes first."""
    first = ["none", slug_of(recipe.reference)]
    return first.index(plan.uses) if plan.uses in first else len(first)


def _check_models(recipe: Recipe, plans: list[Plan]) -> None:
    """Find the models (downloading them now, if it must be) before any work is done."""
    from ..core.models import check_spec, load_tokenizer

    check_spec(recipe.model, dtype=recipe.dtype, device=recipe.device)
    if recipe.chat and not load_tokenizer(recipe.model).chat_template:
        raise BadInput("chat", True, "needs a tokenizer with a chat template", "leave it out for this model")
    for plan in plans:
        for name in plan.carrier.models():
            check_spec(name)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder where another comparison is at work."""
    with disk_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "a+b")  # noqa: SIM115  closed below
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                "output", str(folder), "is in use by another comparison", "wait, or use another folder"
            ) from None
        _sweep(folder)
        try:
            yield
        finally:
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what carriers that were killed had begun to write."""
    for left in [*(folder / "carriers").glob(".*.tmp"), *(folder / "carriers").glob(".*.old")]:
        shutil.rmtree(left, ignore_errors=True)


def _run(
    job: Job, plans: list[Plan], base: Path, raw: Mapping[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    from ..core.models import fingerprint

    started = time.time()
    model = fingerprint(job.recipe.model)
    files = _text_files(job.recipe.model)
    keys = {plan.label: _key(plan, job, [model, files]) for plan in plans}
    records: dict[str, dict[str, Any]] = {}
    for plan in plans:
        if plan.refused is not None:
            records[plan.label] = _missed(plan, "not applicable", plan.refused)
        elif (found := _finished(job.folder / "carriers" / plan.label, keys[plan.label])) is not None:
            records[plan.label] = found
    base_key = next(keys[plan.label] for plan in plans if plan.uses == "none")
    answers = job.folder / "work" / f"base-{base_key[:12]}.json"  # what the others are measured against
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
                "recipe": {**asdict(job.recipe), "carriers": [{"uses": plan.uses, "with": plan.arguments}]},
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
                "files": files,
                "settings": job.settings,
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
        todo.sort(key=lambda plan: (_rank(plan, job.recipe), -plan.carrier.effort))
        tasks = [Task(plan.label, plan, plan.carrier.effort, plan.carrier.shares) for plan in todo]
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
    title = plan.carrier.title
    return title if plan.label == plan.uses else f"{title} ({plan.label})"


def _key(plan: Plan, job: Job, model: list[str]) -> str:
    """Hash of all that decides a carrier's record. Latencies depend on how many carriers run side by side."""
    from ..core.models import fingerprint

    others = [[fingerprint(name), _text_files(name)] for name in plan.carrier.models()]
    parts = [plan.uses, plan.arguments, job.settings, model, others, _jobs(job.recipe), __version__]
    return sha256_json(parts)


def _text_files(model: str) -> str:
    """Hash of what a model's folder holds besides weights: tokenizer, chat template, generation settings."""
    from ..core.models import resolve

    kinds = {".json", ".jinja", ".model", ".txt"}
    files = sorted(p for p in resolve(model).iterdir() if p.suffix in kinds and p.is_file())
    return sha256_json([(p.name, sha256_file(p)) for p in files])


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record in `folder`, if the same key made it."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


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
        "uses_context": plan.carrier.uses_context,
        "access": list(plan.carrier.needs()),
        "reversible": plan.carrier.reversible,
        "method": plan.carrier.method,
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
        "recipe": yaml.safe_dump(
            json.loads(json.dumps(raw, default=str)), sort_keys=False, allow_unicode=True
        ),
    }
    atomic_write(job.folder / "comparison.json", json.dumps(context, indent=1, default=str))
    write_report(records, context, job.folder)
