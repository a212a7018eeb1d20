"""Where a run works until its result is whole: a hidden folder beside the target, one run at a time."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import BadInput
from .files import locked
from .lineage import read_lineage

__all__ = ["finished", "tell", "workshop"]


def finished(target: Path, identity: str) -> bool:
    """Whether `target` is the result of the run of this identity.

    Raises:
        BadInput: something else is in its place.
    """
    if not target.is_dir() or not any(target.iterdir()):
        return False
    with contextlib.suppress(BadInput):
        if read_lineage(target).get("run", {}).get("identity") == identity:
            return True
    raise BadInput("output", str(target), "holds something else", "choose another folder, or remove this one")


@contextlib.contextmanager
def workshop(target: Path, identity: str, *, join: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target`, for one run at a time; an error leaves it only with checkpoints.

    Args:
        target: Where the result will be.
        identity: Of the run.
        join: This process helps another one, whose folder it is.
    """
    if join:
        yield target.parent / f".{target.name}.{identity[:12]}.work"
        return
    missing = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    work = target.parent / f".{target.name}.{identity[:12]}.work"
    try:
        with locked(work / "lock"):
            shutil.rmtree(work / "result", ignore_errors=True)
            if target.is_dir() and not any(target.iterdir()):
                target.rmdir()
            yield work
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        if not (work / "scratch").is_dir() or not any((work / "scratch").iterdir()):
            shutil.rmtree(work, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def tell(line: str) -> None:
    """One line on standard error, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
