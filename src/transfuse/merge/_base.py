"""What the methods of this family share.

A static merge (`merge`) needs no training and gives one set of weights. A method of this family goes further and
is one of three kinds:

- a *mixture* answers with weights that depend on the input: a module that is called, generates, saves and loads;
- a *pack* is what a model learnt, stored apart: it is applied to a base and removed again, bit for bit;
- a *training* fuses what several models say into one student.

Each is a class whose first argument is the model it starts from and which holds the rest of its arguments. For
`transfuse run` it has a method `transfer` (see `Transferable`) and says in `reads` which files it cannot do without;
others that it takes where they are given stand in `may_read`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from ..core.data import read_rows
from ..core.errors import BadInput

__all__ = ["Transferable", "by_task"]


@runtime_checkable
class Transferable(Protocol):
    """A method that makes a folder from a recipe.

    Attributes:
        reads: Which of the optional inputs of `transfuse.merge.transfer` it cannot do without.
    """

    reads: ClassVar[tuple[str, ...]]

    def transfer(
        self,
        tokenizer: Any,
        *,
        output: str | os.PathLike[str],
        scratch: Path | None,
        seed: int,
        **inputs: Any,
    ) -> Path:
        """Do the work and write the folder, with its lineage; `inputs` are files by the names in `reads`."""


def by_task(
    source: str | os.PathLike[str] | Iterable[Any], argument: str = "prompts"
) -> dict[str, list[str]]:
    """Texts by the task they belong to, in the order of first appearance.

    Args:
        source: A file or list of records `{"task": ..., "prompt": ...}`.
        argument: What messages call it.

    Raises:
        BadInput: a record of another form, or fewer than two tasks.
    """
    found: dict[str, list[str]] = {}
    for place, row in read_rows(source, argument):
        for key in ("task", "prompt"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise BadInput(place, row, f"has no {key}", 'write {"task": "...", "prompt": "..."}')
        found.setdefault(row["task"], []).append(row["prompt"])
    if len(found) < 2:
        raise BadInput(argument, list(found), "are fewer than two tasks", "give prompts of every task")
    return found
