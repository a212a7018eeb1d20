"""Where an output folder came from: `transfuse.json` and a model card, with the facts about this machine."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import BadInput, CorruptFile
from .files import atomic_write, sha256_file, sha256_json

__all__ = [
    "amend_lineage",
    "git_state",
    "hardware",
    "input_hash",
    "jsonable",
    "read_lineage",
    "versions",
    "write_lineage",
]

FILE = "transfuse.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
_ROOT = Path(__file__).resolve().parents[3]  # of the checkout, when this is one


def write_lineage(
    folder: str | os.PathLike[str],
    *,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    measurements: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    summary: str = "",
    usage: str = "",
) -> Path:
    """Write `transfuse.json` and the model card `README.md` into an existing folder, each atomically.

    Args:
        folder: The output folder, or the temporary one that will become it.
        method: Slug of the method that made its contents.
        arguments: The method's arguments. Values JSON cannot hold are stored as their text.
        inputs: What went in, by name: data, or a path. Hashes are stored beside them (see `input_hash`).
        seed: Of the run, where there is one.
        measurements: Figures worth keeping. NaN and infinity become null.
        base_model: Name or folder of the model that was changed, for the card.
        summary: One or two sentences for the card.
        usage: Python lines that load the folder, for the card.

    Returns:
        Path of `transfuse.json`.

    Raises:
        BadInput: the folder does not exist.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BadInput("folder", str(path), "is not a folder", "make it first")
    given = dict(inputs or {})
    record = {
        "method": method,
        "arguments": arguments or {},
        "inputs": given,
        "input_sha256": {name: input_hash(value) for name, value in given.items() if value is not None},
        "seed": seed,
        "base_model": base_model,
        "measurements": measurements or {},
        "versions": versions(),
        "hardware": hardware(),
        "git": git_state(),
        "summary": summary,
        "usage": usage,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return _write(path, record)


def amend_lineage(folder: str | os.PathLike[str], **values: Any) -> Path:
    """Set entries of a folder's record (`seed`, `base_model`, `run`, ...) and write record and card again.

    Raises:
        BadInput: the folder has no record.
        CorruptFile: its record cannot be read, or is not a whole one.
    """
    try:
        return _write(Path(folder), {**read_lineage(folder), **values})
    except KeyError as error:
        place = str(Path(folder) / FILE)
        raise CorruptFile("lineage", place, f"lacks {error}", "make the folder again") from error


def _write(folder: Path, values: Mapping[str, Any]) -> Path:
    record = jsonable(values)
    # The card goes first: a folder with transfuse.json in it is complete.
    atomic_write(folder / "README.md", _card(record))
    atomic_write(folder / FILE, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / FILE


def read_lineage(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record that `write_lineage` left in a folder.

    Raises:
        BadInput: there is none.
        CorruptFile: it cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise BadInput("folder", str(folder), f"holds no {FILE}", "give a folder that transfuse wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile("lineage", str(path), f"is not JSON ({error})", "make the folder again") from error
    if not isinstance(record, dict) or not isinstance(record.get("method"), str):
        raise CorruptFile("lineage", str(path), "names no method", "make the folder again")
    return record


def input_hash(value: Any) -> str:
    """SHA-256 of an input.

    Of the bytes of a file; of the files of a folder (a `Path`); of each item where a list, tuple or mapping holds a
    `Path`; of all values of an array or tensor and all rows of a `datasets.Dataset`; of anything else as JSON.
    """
    if _holds_path(value) and not isinstance(value, os.PathLike):
        if isinstance(value, Mapping):
            return sha256_json({str(key): input_hash(item) for key, item in value.items()})
        return sha256_json([input_hash(item) for item in value])
    if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
        return sha256_file(value)
    if isinstance(value, os.PathLike) and os.path.isdir(value):
        folder = Path(value)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return sha256_json([(str(p.relative_to(folder)), sha256_file(p)) for p in files])
    for rows in ("tolist", "to_list"):
        if hasattr(value, rows):
            return sha256_json(jsonable(getattr(value, rows)()))
    return sha256_json(jsonable(value))


def _holds_path(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_path(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_path(item) for item in value)
    return isinstance(value, os.PathLike)


def jsonable(value: Any) -> Any:
    """`value` with what strict JSON cannot hold replaced: NaN by null, tuples by lists, the rest by text.

    In texts "?" stands for what UTF-8 cannot hold (bytes of a file's name that are no text).
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {jsonable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "item") and (getattr(value, "size", None) == 1 or getattr(value, "ndim", None) == 0):
        return jsonable(value.item())  # one number of numpy or torch
    return jsonable(os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def versions() -> dict[str, str]:
    """Versions of Python, transfuse and the libraries under it that are installed; imports none of them."""
    package = sys.modules[__name__.partition(".")[0]]
    found = {"python": platform.python_version(), "transfuse": package.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes, and GPUs where torch has been imported and sees any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": memory,
        "gpus": gpus,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Revision of the checkout this package runs from, and whether its sources differ from it; else None.

    Records under `evidence/results` do not count as a difference: writing one must not taint the next.
    """
    if not (_ROOT / ".git").exists() or Path(__file__).resolve().parents[1] != _ROOT / "src" / "transfuse":
        return None
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return None
    changed = _git("status", "--porcelain", "--", "src", "evidence", ":(exclude)evidence/results")
    return {"revision": revision, "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each figure there is: named by group and name, an interval behind its mean."""
    lines: dict[str, Any] = {}
    for name, value in measured.items():
        if value is None:
            continue
        if not isinstance(value, Mapping):
            lines[name] = value
        elif {"mean", "low", "high"} <= value.keys():
            ends = [_brief(value[end]) for end in ("mean", "low", "high")]
            lines[name] = "{} ({} to {})".format(*ends)
        else:
            lines |= {f"{name}, {part}": figure for part, figure in _figures(value).items()}
    return lines


def _card(record: Mapping[str, Any]) -> str:
    """The model card: YAML front matter, then what was done, with what, and what was measured."""
    import yaml

    front: dict[str, Any] = {"library_name": "transfuse", "tags": ["transfuse", record["method"]]}
    if record["base_model"]:
        front["base_model"] = record["base_model"]
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {record['method']}" + (f" on {record['base_model']}" if record["base_model"] else ""), ""]
    if record["summary"]:
        lines += [record["summary"], ""]
    if record["usage"]:
        lines += ["```python", record["usage"].strip(), "```", ""]
    hashes = record["input_sha256"]
    inputs = {name: f"{_brief(value)} (SHA-256 {hashes[name][:16]})"
              for name, value in record["inputs"].items() if name in hashes}  # fmt: skip
    for title, rows in (
        ("Measured", _figures(record["measurements"])),
        ("Made from", inputs),
        ("Arguments", record["arguments"]),
    ):
        if rows:
            cells = [f"| {name} | {_brief(value)} |" for name, value in rows.items()]
            lines += [f"## {title}", "", "| | |", "|---|---|", *cells, ""]
    made = [f"{name} {number}" for name, number in record["versions"].items()]
    machine = record["hardware"]
    where = ", ".join([machine["cpu"], f"{machine['cores']} cores", *machine["gpus"]])
    lines += [
        "## How it was made",
        "",
        f"Seed: {record['seed']}. Created {record['created']} with {', '.join(made)} on {where}.",
    ]
    lines += ["", f"The whole record is in `{FILE}`."]
    return "\n".join(lines) + "\n"


def _brief(value: Any) -> str:
    """One table cell."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} items"
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return (text if len(text) <= 100 else text[:97] + "...").replace("|", "\\|")
