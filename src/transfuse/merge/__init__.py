"""Merging: several fine-tunes of one base made into one model, statically or by a mixture that depends on the input."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ._config import read_config
    from ._engine import merge
    from ._methods import METHODS, StaticMerge
    from ._plan import Plan, plan_merge

_HOMES = {
    "METHODS": "._methods",
    "Plan": "._plan",
    "StaticMerge": "._methods",
    "merge": "._engine",
    "plan_merge": "._plan",
    "read_config": "._config",
}

__all__ = [
    "METHODS",
    "Plan",
    "StaticMerge",
    "merge",
    "needs",
    "plan_merge",
    "read_config",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: they import torch
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def needs(target: Any) -> list[str]:
    """Which optional arguments of `transfer` a method cannot do without."""
    return list(getattr(target, "reads", ()))


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Callable[..., Any],
    output: str | os.PathLike[str],
    scratch: Path | None = None,
    seed: int = 0,
    prompts: str | os.PathLike[str] | None = None,
    texts: str | os.PathLike[str] | None = None,
) -> Path:
    """What `transfuse run` does with a merging method: make it around the model, let it write its folder.

    Static merges have a command of their own, `transfuse merge`.

    Args:
        model: The base of what is merged.
        tokenizer: Its tokenizer.
        method: Takes the model and returns an object with `transfer`.
        output: Folder of the result; replaced at once.
        scratch: Folder of the checkpoints from which an interrupted run goes on.
        seed: Of whatever is drawn.
        prompts: File of prompts with the task each belongs to, for methods that choose by the input.
        texts: File of training texts or examples, for methods that train.

    Raises:
        NotApplicable: a method that has no `transfer`, or a file that it does not read.
    """
    from ..core.errors import NotApplicable

    made = method(model)
    if not hasattr(made, "transfer"):
        raise NotApplicable("method", type(made).__name__, "has no single run", "call it from Python")
    inputs = {name: value for name, value in (("prompts", prompts), ("texts", texts)) if value is not None}
    known = (*made.reads, *getattr(made, "may_read", ()))
    for name, value in inputs.items():
        if name not in known:
            raise NotApplicable(name, str(value), f"is not read by {type(made).__name__}", "leave it out")
    found: Path = made.transfer(tokenizer, output=output, scratch=scratch, seed=seed, **inputs)
    return found
