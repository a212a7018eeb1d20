"""The main job: several ways to move one body of knowledge into one model, measured side by side."""

from __future__ import annotations

from typing import Any

__all__ = ["compare"]


def compare(recipe: Any, *, output: Any = None, quiet: bool = False) -> list[dict[str, Any]]:
    """Run a comparison and write its records and report; see `transfuse.compare.run.compare`."""
    from .run import compare as run

    return run(recipe, output=output, quiet=quiet)
