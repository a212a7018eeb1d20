"""`make new-method`: three files that fail until they are filled in."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from transfuse import catalogue, explain
from transfuse.core.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing but what the script needs."""
    for family in ("steer", "edit"):
        folder = tmp_path / "src" / "transfuse" / family
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "new_method.py", tmp_path / "scripts")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, family: str = "", name: str = "") -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "new-method", f"FAMILY={family}", f"NAME={name}", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def files(checkout: Path) -> set[str]:
    return {p.relative_to(checkout).as_posix() for p in checkout.rglob("*.py")}


WRITTEN = {"src/transfuse/steer/my_method.py", "tests/steer/test_my_method.py", "evidence/steer/my_method.py"}


@pytest.mark.parametrize("name", ["my_method", "my-method", "My_Method"])
def test_three_files_are_written(checkout, name):
    before = files(checkout)
    done = make(checkout, "steer", name)
    assert done.returncode == 0, done.stderr
    assert files(checkout) - before == WRITTEN
    assert all(name in done.stdout for name in WRITTEN)


def test_each_file_fails_until_filled_in(checkout):
    make(checkout, "steer", "my_method")
    module = checkout / "src/transfuse/steer/my_method.py"
    with pytest.raises(BadInput, match=r"steer/my_method\.py: access"):
        catalogue.read(module)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/steer/test_my_method.py"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "4 failed" in done.stdout
    assert "compare my_method_step with values worked out by hand" in done.stdout
    recipe: dict = {}
    exec((checkout / "evidence/steer/my_method.py").read_text(), recipe)
    assert recipe["CLAIM"] == recipe["RULE"] == ""
    with pytest.raises(AssertionError, match="write the measurement"):
        recipe["run"]("quick", 0)


def test_a_filled_in_module_is_a_method(checkout):
    make(checkout, "steer", "my_method")
    module = checkout / "src/transfuse/steer/my_method.py"
    text = module.read_text()
    for field, value in {
        "moves": "a -> b",
        "access": "logits",
        "reversible": "yes",
        "context": "no",
        "arxiv": "2401.01234",
    }.items():
        line = next(line for line in text.splitlines() if line.startswith(f":{field}:"))
        text = text.replace(line, f":{field}: {value}")
    module.write_text(text)
    method = catalogue.read(module)
    assert (method.slug, method.family) == ("my-method", "steer")
    assert explain.signature(method).name == "MyMethod"


def test_skeletons_are_clean(checkout):
    """They pass the linter, and leave no marks that the architecture rules forbid."""
    make(checkout, "steer", "my_method")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", *WRITTEN]
    done = subprocess.run(ruff, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in WRITTEN:
        text = (checkout / name).read_text()
        ast.parse(text)
        assert "NotImplemented" not in text
        assert "TO" + "DO" not in text


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        ("", "", "FAMILY and NAME are needed"),
        ("steer", "", "FAMILY and NAME are needed"),
        ("stear", "x", "did you mean steer?"),
        ("zzz", "x", "choose one of: edit, steer"),
        ("steer", "9lives", "is not a module name"),
        ("steer", "a b", "is not a module name"),
        ("steer", "../x", "is not a module name"),
        ("steer", "_x", "is not a module name"),
        ("steer", "class", "is not a module name"),
    ],
)
def test_bad_names_write_nothing(checkout, family, name, says):
    before = files(checkout)
    done = make(checkout, family, name)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert says in done.stderr
    assert files(checkout) == before


def test_nothing_is_overwritten(checkout):
    make(checkout, "steer", "my_method")
    module = checkout / "src/transfuse/steer/my_method.py"
    module.write_text("mine")
    for family in ("steer", "edit"):  # a slug is unique over all families
        done = make(checkout, family, "my_method")
        assert done.returncode == 2
        assert "exists already" in done.stderr
    assert module.read_text() == "mine"
    assert files(checkout) & {"tests/edit/test_my_method.py", "evidence/edit/my_method.py"} == set()
