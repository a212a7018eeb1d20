"""Laziness: what is imported when, and how long the command line takes to start."""

from __future__ import annotations

import ast
import importlib.util
import json
import pkgutil
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import transfuse

PACKAGE = Path(transfuse.__file__).parent
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pandas", "rich", "matplotlib"}
OPTIONAL = [
    "lancedb",
    "bm25s",
    "sentence_transformers",
    "openai",
    "llguidance",
    "jsonschema",
    "matplotlib",
    "jinja2",
]
LIGHT = [
    "transfuse",
    "transfuse.catalogue",
    "transfuse.cli",
    "transfuse.explain",
    "transfuse.core",
    "transfuse.core.errors",
    "transfuse.core.extras",
    "transfuse.core.files",
    "transfuse.core.references",
]
BUDGET_SECONDS = 0.3


def loaded_after(code: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after `code`."""
    tail = "\nimport sys, json\nprint(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    assert loaded_after(f"import {module}") & HEAVY == set()


@pytest.mark.parametrize(
    "words",
    [["methods"], ["methods", "--json"], ["show", "ck-plug"], ["show", "ck-plug", "--yaml"], ["models"]],
)
def test_commands_that_look_things_up_import_nothing_heavy(words):
    code = f"from transfuse.cli import main\nassert main({words!r}) == 0"
    assert loaded_after(code) & HEAVY == set()


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a child; one thread, so an idle machine takes as long on the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["methods"], ["show", "ck-plug"], ["show", "ck-plug", "--yaml"]])
def test_start_of_the_command_line(words):
    command = [sys.executable, "-c", f"from transfuse.cli import main; raise SystemExit(main({words!r}))"]
    # The best of twenty: a busy machine adds processor time to the others.
    assert min(cpu_seconds(command) for _ in range(20)) < BUDGET_SECONDS


def test_start_of_the_package():
    command = [sys.executable, "-c", "import transfuse"]
    assert min(cpu_seconds(command) for _ in range(20)) < BUDGET_SECONDS


def test_every_module_imports_quietly_and_without_the_extras():
    """With the optional dependencies hidden all modules import, draw no random number, open no connection."""
    names = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "transfuse."))
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py" and "_evidence" not in f.parts]
    assert len(names) >= len(files) > 20
    code = f"""
import importlib, random, socket, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import numpy, torch, transformers, peft, accelerate, datasets

def refuse(*_, **__):
    raise AssertionError("a connection at import")

def state():
    return random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()

socket.socket.connect = refuse
before = state()
for name in {names!r}:
    importlib.import_module(name)
assert state() == before, "random numbers were drawn at import"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_extra_is_named():
    code = (
        "import sys\nsys.modules['lancedb'] = None\n"
        "from transfuse.core.extras import require\nfrom transfuse.core.errors import MissingExtra\n"
        "try:\n    require('lancedb', extra='retrieve')\n"
        "except MissingExtra as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == 'lancedb is not installed; run: pip install "transfuse[retrieve]"'


def test_what_programs_outside_the_package_import_is_there():
    """Benchmarks, recipes of evidence and scripts, which few runs touch, and the pages' examples."""
    root, lost = Path(__file__).resolve().parents[1], []
    programs = [
        (p, p.read_text()) for d in ("benchmarks", "evidence", "scripts") for p in (root / d).rglob("*.py")
    ]
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        programs += [
            (page, block) for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        ]
    for path, text in programs:
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("transfuse"):
                continue
            module = importlib.import_module(node.module)
            for each in node.names:
                part = f"{node.module}.{each.name}"
                if not hasattr(module, each.name) and importlib.util.find_spec(part) is None:
                    lost.append(f"{path.relative_to(root)}: {part}")
    assert len(programs) > 60 and not lost
