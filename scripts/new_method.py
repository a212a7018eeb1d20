"""Write the three files of a new method: module, test, evidence recipe. Each fails until it is filled in.

Usage: python scripts/new_method.py FAMILY NAME
"""

from __future__ import annotations

import difflib
import keyword
import re
import sys
from pathlib import Path

NOT_FAMILIES = ("core", "compare", "report")  # packages that hold no methods

MODULE = '''"""{title}: one sentence that says what it does.

:arxiv: fill in: 2401.01234 (leave the line out if there is no paper)
:moves: fill in: what -> where
:access: fill in: text, logits, hidden, weights, training data
:reversible: fill in: yes or no
:context: fill in: yes or no

What it does, in your own words; where it differs from the paper, and why; a short example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["{cls}", "{name}_step"]


def {name}_step(x: torch.Tensor) -> torch.Tensor:
    """The equations of the paper as a pure function.

    Args:
        x: Shape [batch, dim].

    Returns:
        Shape [batch, dim].
    """
    raise AssertionError("{slug}: write the equations of {name}_step")


class {cls}:
    """One sentence. Constructors only store; the family's contract says which methods follow.

    Args:
        strength: What it scales (the paper's default).
    """

    def __init__(self, *, strength: float = 1.0):
        self.strength = strength
'''

TEST = '''"""{slug}: what only this method must hold. What its whole family holds is in tests/contract/."""

from __future__ import annotations

import pytest


def test_values_by_hand():
    pytest.fail("{slug}: compare {name}_step with values worked out by hand, or with a slow loop")


def test_limits():
    pytest.fail("{slug}: what must come out when its strength is 0, or when the two sides are equal")


def test_masks_padding_and_batches():
    pytest.fail("{slug}: padding side and the split into batches must not change the result")


def test_bad_input():
    pytest.fail("{slug}: BadInput names argument, value and remedy, before any work is done")
'''

EVIDENCE = '''"""Evidence for {slug}: the paper's claim, the rule that decides, and the run."""

from __future__ import annotations

SLUG = "{slug}"

CLAIM = ""  # the paper's claim with its figures

RULE = ""  # "{name}.recall >= none.recall + 0.2 in 3/3 seeds"; stated before the first run, never loosened

NOTES = ""  # what was tried, filled in when the rule fails


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Measure the method and its baselines through the public API: `{{"<arm>": {{"<metric>": value}}}}`."""
    raise AssertionError("{slug}: write the measurement")
'''


def fail(message: str) -> None:
    """Stop with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(root: Path, family: str, name: str) -> list[Path]:
    """Write the files under `root` and return them; refuses to overwrite."""
    package = root / "src" / "transfuse"
    families = sorted(
        folder.name
        for folder in package.iterdir()
        if (folder / "__init__.py").is_file() and folder.name not in NOT_FAMILIES and folder.name[0] != "_"
    )
    if not family or not name:
        fail("FAMILY and NAME are needed; run: make new-method FAMILY=steer NAME=my_method")
    if family not in families:
        near = difflib.get_close_matches(family, families, n=1)
        fail(
            f"FAMILY = {family!r} does not exist; "
            + (f"did you mean {near[0]}?" if near else "choose one of: " + ", ".join(families))
        )
    name = name.lower().replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        fail(f"NAME = {name!r} is not a module name; use letters, digits and underscores")
    taken = [path for path in package.glob(f"*/{name}.py") if path.parent.name not in NOT_FAMILIES]
    words = {
        "name": name,
        "slug": name.replace("_", "-"),
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
    }
    files = {
        package / family / f"{name}.py": MODULE,
        root / "tests" / family / f"test_{name}.py": TEST,
        root / "evidence" / family / f"{name}.py": EVIDENCE,
    }
    for path in [*taken, *files]:
        if path.exists():
            fail(f"{path.relative_to(root)} exists already; choose another NAME, or remove it first")
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(**words), encoding="utf-8")
    return list(files)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        fail("usage: python scripts/new_method.py FAMILY NAME")
    checkout = Path(__file__).resolve().parents[1]
    print("Fill in what each file asks for; `make test` fails until all three are done:")
    for written in main(checkout, sys.argv[1], sys.argv[2]):
        print("  " + str(written.relative_to(checkout)))
