"""Editors: new or changed facts moved from records into a pretrained model, reversibly."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.data import Fact
    from ._base import EditHandle, Editor
    from ._locate import Located, locate

__all__ = ["Located", "edit", "editor", "load_edit", "locate", "transfer"]


def __getattr__(name: str) -> Any:
    if name in ("Located", "locate"):  # on first use: they import torch
        from . import _locate

        return getattr(_locate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def editor(method: str, **hparams: Any) -> Editor:
    """The editor called `method` ("rome", "memit", "ft-m", ...), with its hyperparameters.

    Raises:
        BadInput: unknown method or hyperparameter; near names are suggested.
    """
    from .. import catalogue
    from ..core.errors import BadInput

    found = catalogue.find(method)
    if found.family != "edit":
        raise BadInput(
            "method",
            method,
            f"is not an editor but of the family {found.family}",
            "see: transfuse methods --family edit",
        )
    cls = catalogue.get(found.slug)
    known = list(inspect.signature(cls).parameters)
    for name, value in hparams.items():
        if name not in known:
            raise BadInput(name, value, f"is not an argument of {method}", f"use {', '.join(known)}")
    made: Editor = cls(**hparams)
    return made


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Fact | Iterable[Any] | os.PathLike[str],
    *,
    method: str | Editor = "memit",
    mode: str = "batch",
    **hparams: Any,
) -> EditHandle:
    """Write facts into a model, in place, and return the handle that can roll back and save.

    Args:
        model: The model to edit; it stays the same object.
        tokenizer: Its tokenizer.
        facts: One fact, or records as `core.data.read_facts` takes them.
        method: An editor's slug, or an editor.
        mode: "batch": editors that can take all facts at once do; the others go fact by fact. "sequential": one
            after another, each on the model the earlier edits left.
        **hparams: The editor's hyperparameters, when `method` is a slug.

    Returns:
        A handle with `rollback()`, `save(folder)`, `rewrite(prompt)`; as a context manager it rolls back.

    Raises:
        BadInput: wrong facts, method, mode or hyperparameters; nothing was changed.
        TrainingDiverged: a loss became NaN; the model is as before.
    """
    import torch

    from ..core.data import Fact, read_facts
    from ..core.errors import BadInput
    from ..core.models import fingerprint
    from ._base import EditHandle, Editor

    if mode not in ("batch", "sequential"):
        raise BadInput("mode", mode, "is unknown", 'use "batch" or "sequential"')
    if isinstance(method, str):
        slug, worker = method.replace("_", "-"), editor(method, **hparams)
    elif hparams:
        raise BadInput(
            "hparams", sorted(hparams), "are given beside an editor object", "give them to the editor"
        )
    elif not isinstance(method, Editor):
        raise BadInput("method", method, "is neither a slug nor an editor", 'give "rome", or ROME(...)')
    else:
        slug, worker = type(method).__module__.rpartition(".")[2].replace("_", "-"), method
    chosen: Sequence[Fact] = read_facts([facts] if isinstance(facts, Fact) else facts)
    worker.check(model, tokenizer, chosen)
    hyperparameters = {name: value for name, value in vars(worker).items() if not name.startswith("_")}
    handle = EditHandle(
        model, tokenizer, method=slug, arguments=hyperparameters, facts=chosen, base=fingerprint(model)
    )
    groups = [list(chosen)] if mode == "batch" and worker.batched else [[fact] for fact in chosen]
    try:
        with torch.inference_mode(False):  # where the caller is inside it, nothing could be trained
            for group in groups:
                handle.add(worker.fit(model, tokenizer, group))
    except BaseException:
        handle.rollback()
        raise
    return handle


def load_edit(
    folder: str | os.PathLike[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> EditHandle:
    """Apply a saved delta to the model it was made for.

    Raises:
        BadInput: the folder holds no edit.
        CorruptFile: a file is missing, truncated, not safetensors, or not an edit's.
        IncompatibleModels: `model` is not the base the edit was made on.
    """
    from ..core.data import read_facts
    from ..core.errors import BadInput, CorruptFile, IncompatibleModels
    from ..core.files import read_tensors
    from ..core.lineage import read_lineage
    from ..core.models import fingerprint
    from ._base import Edit, EditHandle

    path = Path(folder)
    files = sorted(path.glob("edit-*.safetensors"))
    if not files:
        raise BadInput("folder", str(path), "holds no saved edit", "give a folder written by EditHandle.save")
    lineage = read_lineage(path)
    base = fingerprint(model)
    stored = [read_tensors(file) for file in files]
    for number, (file, (_, header)) in enumerate(zip(files, stored, strict=True)):
        if not {"kind", "meta", "base"} <= header.keys():
            raise CorruptFile(
                "folder", str(file), "is not an edit's", "give a folder written by EditHandle.save"
            )
        if file.name != f"edit-{number:05d}.safetensors" or header.get("of", len(files)) != len(files):
            raise CorruptFile("folder", str(path), "does not hold all of its edits", "copy or save it again")
    made_on = stored[0][1]["base"]
    if made_on != base:
        raise IncompatibleModels(
            "model", base[:12], f"is not the model this edit was made on ({made_on[:12]})", "load that model"
        )
    handle = EditHandle(
        model, tokenizer, method=lineage["method"], arguments=lineage["arguments"],
        facts=read_facts(lineage["inputs"]["facts"]), base=base,
    )  # fmt: skip
    from .. import catalogue

    if any(header["kind"] not in Edit.kinds for _, header in stored):
        catalogue.get(lineage["method"])  # importing the editor registers its kind of edit
    try:
        for tensors, header in stored:
            handle.add(Edit.kinds[header["kind"]].restore(tensors, header["meta"]))
    except BaseException:
        handle.rollback()
        raise
    return handle


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    facts: str | os.PathLike[str],
    method: Editor,
    output: str | os.PathLike[str],
    mode: str = "batch",
) -> Path:
    """What `transfuse run` does with an editor: edit, save the delta to `output`, leave the model unchanged."""
    from ..core.files import check_writable

    check_writable(output)
    with edit(model, tokenizer, facts, method=method, mode=mode) as handle:
        return handle.save(output)
