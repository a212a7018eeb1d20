"""The two kinds of adapters: PEFT tuners of language models, and those of other networks."""

from __future__ import annotations

from typing import Any

from . import RUNS

__all__ = ["suits"]


def suits(target: Any) -> bool:
    """Whether the family's `transfer` runs a method, given its main object: a function that returns a `PeftModel`."""
    return RUNS in str(getattr(target, "__annotations__", {}).get("return", ""))
