"""YAML recipes: read strictly, checked against Python signatures before any model is loaded, then run.

A run recipe names a model, one method, what the method's family needs (facts, documents, ...) and a folder:

    model: smollm2-135m
    method: {uses: rome, with: {layer: 12}}
    facts: facts.jsonl
    output: runs/rome

`with` holds the arguments of the method's class or function, under their own names and types; an argument
that is itself an object is written `{uses: family.module.Name, with: {...}}`. The other keys are arguments of
the family's `transfer` function. File names are relative to the recipe, `output` to the working folder.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import catalogue
from .core.errors import BadInput, NotApplicable
from .core.fields import (
    Node,
    at,
    beside,
    check_arguments,
    from_mapping,
    hints_of,
    parameters_of,
    suggest,
    takes_path,
    takes_text,
    uses_and_with,
)
from .core.files import check_writable, hash_weights, sha256_json
from .core.lineage import amend_lineage, input_hash, read_lineage, write_lineage
from .core.strict_yaml import load
from .core.workshop import finished, tell, workshop
from .explain import SUPPLIED

__all__ = ["Common", "Run", "build", "check", "from_mapping", "load", "run"]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A model cut out of another: `student: {prune: smollm2-135m, layers: 10}`.

    Attributes:
        prune: The model it is cut out of, as `transfuse.load` takes it.
        layers: Number of blocks kept, spread evenly; None for all.
        keep: Their numbers instead.
        intermediate: Width of the MLPs; None for the model's.
    """

    prune: str
    layers: int | None = None
    keep: list[int] | None = None
    intermediate: int | None = None


@dataclass(frozen=True)
class Run:
    """A checked run recipe.

    Attributes:
        model: What `transfuse.load` takes, or what is cut out of such a model.
        method: The method with its checked arguments.
        slug: Its name.
        family: Its family.
        inputs: Checked arguments of the family's `transfer`.
        output: Folder of the result.
        seed: Of everything that draws random numbers.
        dtype: As `transfuse.load` takes it.
        device: As `transfuse.load` takes it.
    """

    model: str | Pruned
    method: Node
    slug: str
    family: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    output: Path = Path("runs/transfuse")
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def spec(self) -> str | dict[str, Any]:
        """The model as `core.pruning.load_or_prune` takes it."""
        return asdict(self.model) if isinstance(self.model, Pruned) else self.model

    @property
    def identity(self) -> str:
        """SHA-256 over all that decides the result: names, arguments, the contents of files and model folders."""
        spec: Any = self.spec
        models = {**spec, "prune": _weights(spec["prune"])} if isinstance(spec, dict) else _weights(spec)
        inputs = {name: input_hash(value) for name, value in self.inputs.items()}
        if self.inputs.get("teacher") is not None:
            inputs["teacher"] = _weights(self.inputs["teacher"])
        arguments = {name: input_hash(_described(value)) for name, value in self.method.arguments.items()}
        return sha256_json([models, self.slug, arguments, inputs, self.seed, self.dtype, self.device])


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every run recipe may hold.

    Attributes:
        model: A reference model's name, a folder, or a hub id; where there is a teacher it may be called
            `student`, and be cut out of another model: `{prune: smollm2-135m, layers: 10}`.
        output: Folder of the result; `runs/<name of the recipe>` by default.
        seed: Of everything that draws random numbers.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1" or "auto".
    """

    model: str | Pruned
    output: Path | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"


def check(
    recipe: str | os.PathLike[str] | Mapping[str, Any], *, output: str | os.PathLike[str] | None = None
) -> Run:
    """Check a run recipe: names, types, files; no model is loaded and nothing is written.

    Args:
        recipe: A YAML file, or what one would hold (file names are then relative to the working folder).
        output: Folder of the result, in place of the recipe's.

    Raises:
        BadInput: the message names the file, the dotted path of the field, its value and what to do.
    """
    mapping = load(recipe)
    path = None if isinstance(recipe, Mapping) else Path(recipe).expanduser()
    where, base = ("", Path()) if path is None else (f"{path.name}:", path.parent)
    if "carriers" in mapping:
        raise BadInput(
            where or "recipe", mapping["carriers"], "is a comparison", "run it with `transfuse compare`"
        )
    if "method" not in mapping:
        raise BadInput(at(where, "method"), None, "is missing", "add method: {uses: <slug>, with: {...}}")
    method, node = _method(mapping["method"], at(where, "method"), base)
    transfer = transfer_of(method)
    if "student" in mapping and "teacher" in parameters_of(transfer):
        if "model" in mapping:
            raise BadInput(at(where, "model"), mapping["model"], "is named by `student` too", "give only one")
        mapping = {"model" if key == "student" else key: value for key, value in mapping.items()}
    common = {f.name: mapping[f.name] for f in fields(Common) if f.name in mapping}
    rest = {key: value for key, value in mapping.items() if key not in common and key != "method"}
    needed = [name for name in parameters_of(transfer) if name not in SUPPLIED]
    known = [*needed, *(f.name for f in fields(Common)), "method"]
    for key in rest:
        if key not in needed:
            remedy = suggest(key, known, f"known here: {', '.join(known)}")
            raise BadInput(at(where, key), rest[key], "is not a known field", remedy)
    inputs = check_arguments(transfer, rest, where, given=SUPPLIED, resolve=find)
    for name, hint in hints_of(transfer).items():
        if name in inputs and inputs[name] is not None and takes_path(hint):
            inputs[name] = _existing(base, inputs[name], at(where, name))
    for name in required_inputs(method):
        if inputs.get(name) is None:
            raise BadInput(at(where, name), None, "is missing", f"{method.slug} reads them: add {name}")
    checked = from_mapping(Common, common, where)
    if not 0 <= checked.seed < 2**32:
        raise BadInput(at(where, "seed"), checked.seed, "is no seed", "give a number from 0 to 2**32 - 1")
    if isinstance(inputs.get("teacher"), str):
        inputs["teacher"] = _local(base, inputs["teacher"])
    model: Any = checked.model
    if isinstance(model, Pruned):
        model = replace(model, prune=_local(base, model.prune))
    else:
        model = _local(base, model)
    chosen = Path(output).expanduser() if output is not None else checked.output
    if chosen is None:
        chosen = Path("runs") / (path.stem if path else method.slug)
    return Run(
        model, node, method.slug, method.family, inputs, chosen, checked.seed, checked.dtype, checked.device
    )


def _local(base: Path, model: str) -> str:
    return str(base / model) if model and (base / model).is_dir() else model


def _weights(model: str) -> str:
    """What a model is known by: a folder's weights, which may change; any other model's name."""
    folder = Path(model).expanduser()
    return hash_weights(folder) if folder.is_dir() else model


def _method(value: Any, where: str, base: Path) -> tuple[catalogue.Method, Node]:
    """The method of `{uses, with}` (or a bare name) and its checked arguments."""
    name, given = (value, None) if isinstance(value, str) else uses_and_with(value, where)
    place = at(where, "uses")
    family, _, slug = name.removeprefix("transfuse.").replace("/", ".").rpartition(".")
    try:
        method = catalogue.find(slug)
    except BadInput as error:
        raise BadInput(place, name, error.problem, error.remedy) from None
    if family not in ("", method.family):
        raise BadInput(place, name, f"is in {method.family}", f"write {method.family}.{slug}")
    target = catalogue.get(method.slug)
    arguments = check_arguments(target, given, at(where, "with"), given=supplied(target), resolve=find)
    hints = hints_of(target)
    arguments = {key: beside(base, value, hints.get(key)) for key, value in arguments.items()}
    vet = getattr(_family(method), "vet", None)
    if vet is not None:  # what signatures do not tell
        vet(target, arguments, at(where, "with"))
    return method, Node(target, arguments, where)


def supplied(target: Callable[..., Any]) -> list[str]:
    """Parameters that `transfer` fills in: positional, without default, of a type that no name can be given for."""
    hints, kind = hints_of(target), inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [n for n, p in parameters_of(target).items() if p.kind is kind and p.default is p.empty]
    return [name for name in found if not takes_text(hints.get(name))]


def find(name: Any, where: str = "uses") -> Any:
    """The class or function behind a nested `uses`: a method's slug, or `family.module.Name` of this package.

    Only methods of the catalogue and public names (`__all__`) of transfuse modules can be reached: a recipe
    cannot call anything else.

    Raises:
        BadInput: there is no such thing.
    """
    if not isinstance(name, str):
        raise BadInput(where, name, "is not a name", "give a slug or family.module.Name")
    module, _, member = name.removeprefix("transfuse.").rpartition(".")
    if not module or module in catalogue.families():
        try:
            return catalogue.get(member)
        except BadInput as error:
            raise BadInput(where, name, error.problem, error.remedy) from None
    try:
        public = importlib.import_module(f"transfuse.{module}")
    except ModuleNotFoundError:
        raise BadInput(where, name, "is not in transfuse", "write family.module.Name") from None
    names = getattr(public, "__all__", [])
    if member not in names:
        remedy = suggest(member, names, f"use one of {', '.join(names)}")
        raise BadInput(where, name, f"is not public in {module}", remedy)
    return getattr(public, member)


def _family(method: catalogue.Method) -> Any:
    """The family's module, or None where another package has a family of its own."""
    try:
        return importlib.import_module(f"transfuse.{method.family}")
    except ModuleNotFoundError:
        return None


def transfer_of(method: catalogue.Method) -> Callable[..., Any]:
    """What the method's family does with a recipe."""
    home = _family(method)
    found = getattr(home, "transfer", None)
    suits = getattr(home, "suits", None)  # a family whose methods do not all run alike
    if found is None or (suits is not None and not suits(catalogue.get(method.slug))):
        raise NotApplicable(
            "method", method.slug, "has no single run", "call it from Python, or use transfuse compare"
        )
    return found


def required_inputs(method: catalogue.Method) -> list[str]:
    """Which optional arguments of the family's `transfer` this method cannot do without."""
    needs = getattr(_family(method), "needs", None)
    return [] if needs is None else needs(catalogue.get(method.slug))


def _existing(base: Path, value: str | Path, where: str) -> Path:
    path = base / Path(value).expanduser()
    if not path.exists():
        raise BadInput(where, str(value), "does not exist", f"give a path relative to {base.resolve()}")
    return path


def _described(value: Any) -> Any:
    if isinstance(value, Node):
        name = f"{value.target.__module__}.{value.target.__qualname__}"
        return {"uses": name, "with": {key: _described(item) for key, item in value.arguments.items()}}
    return value


def build(node: Node) -> Any:
    """Make the object a checked node describes.

    A method with positional parameters (the model, ...) is returned as a function that still takes them; any
    other is called.
    """
    if supplied(node.target):
        return functools.partial(node.target, **node.values())
    return node.build()


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any], *, output: str | os.PathLike[str] | None = None
) -> Path:
    """Run one transfer and leave its result, with its lineage, in the output folder; tell progress on stderr.

    The result appears at once, by a rename. A run that was interrupted goes on from its checkpoints where the
    method makes any; a finished one is not done again.

    Args:
        recipe: A YAML file or its contents; see the module's text.
        output: Folder of the result, in place of the recipe's.

    Returns:
        The output folder.

    Raises:
        BadInput: the recipe is wrong, or the output folder holds something else; nothing was written.
    """
    job = check(recipe, output=output)
    target, identity = check_writable(job.output), job.identity
    if finished(target, identity):
        tell(f"{job.slug}: already in {target}")
        return target
    method = build(job.method)

    from .core.pruning import load_or_prune
    from .core.training import seeded

    started = time.perf_counter()
    tell(f"{job.slug}: loading {job.model if isinstance(job.model, str) else job.model.prune}")
    model, tokenizer = load_or_prune(job.spec, dtype=job.dtype, device=job.device)
    rank = int(os.environ.get("RANK", "0"))  # set by `accelerate launch`: all work, the first one writes
    with workshop(target, identity, join=rank > 0) as work:
        if rank == 0 and finished(target, identity):  # another process made it while this one waited
            return target
        result = work / ("result" if rank == 0 else f"rank-{rank}")
        transfer = transfer_of(catalogue.find(job.slug))
        offered = {"output": result, "scratch": work / "scratch", "seed": job.seed}
        extra = {
            name: value for name, value in offered.items() if name in inspect.signature(transfer).parameters
        }
        tell(f"{job.slug}: working")
        with seeded(job.seed):
            transfer(model, tokenizer, method=method, **extra, **job.inputs)
        if rank > 0:
            return target
        if not (result / "transfuse.json").is_file():
            write_lineage(result, method=job.slug)
        arguments = {name: _described(value) for name, value in job.method.arguments.items()}
        seconds = round(time.perf_counter() - started, 3)
        amend_lineage(
            result,
            arguments={**arguments, **read_lineage(result)["arguments"]},
            seed=job.seed,
            base_model=job.model if isinstance(job.model, str) else job.model.prune,
            run={"identity": identity, "inputs": job.inputs, "seconds": seconds},
        )
        os.replace(result, target)
    tell(f"{job.slug}: done in {time.perf_counter() - started:.1f} s, see {target}")
    return target
