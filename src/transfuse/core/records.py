"""Evidence records on disk: where they are, and reading one. Cheap to import: nothing but JSON and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CorruptFile

__all__ = ["PACKAGE", "evidence_root", "read_record", "slug_of"]

PACKAGE = Path(__file__).resolve().parents[1]


def slug_of(name: str) -> str:
    """`CK_Plug` -> `ck-plug`."""
    return name.strip().lower().replace("_", "-")


def evidence_root() -> Path:
    """Folder of recipes and records: the copy inside an installed package, else the checkout's `evidence`."""
    packaged = PACKAGE / "_evidence"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "evidence"


def read_record(slug: str, root: Path | None = None) -> dict[str, Any] | None:
    """The record of `slug` (`ck-plug` or `ck_plug`), or None if it was never measured.

    Args:
        slug: The method.
        root: Folder of recipes and records in place of `evidence_root()`.

    Raises:
        CorruptFile: the record cannot be read.
    """
    path = (root or evidence_root()) / "results" / f"{slug_of(slug)}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptFile("record", str(path), f"is not JSON ({error})", "measure again") from error
    if not isinstance(found, dict) or not isinstance(found.get("tiers"), dict):
        raise CorruptFile("record", str(path), "holds no tiers", "measure again")
    return found
