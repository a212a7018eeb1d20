"""The site builds without a warning, has a page per method, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from transfuse import catalogue

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_page_per_method(site):
    for method in catalogue.methods():
        text = (site / "methods" / f"{method.slug}.html").read_text()
        assert method.arxiv is None or method.arxiv in text
        assert f"methods/{method.slug}.html" in (site / "methods.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site):
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]+)|<link[^>]*rel=\"?stylesheet[^>]*href=\"?(https?:[^\s\">]+)"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 5
    assert [match for page in pages for match in loads.findall(page.read_text())] == []


def test_prose_is_not_read_as_markdown():
    pages = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    assert (
        pages["prose"]("W* <- W_0 [x], `a_b`\n\n    code * _x_")
        == "W\\* \\<- W\\_0 \\[x\\], `a_b`\n\n    code * _x_"
    )
    assert pages["table"](("a", "b"), [("x|y", 1)]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    assert pages["table"](("a", "b"), [("`x | y`", 1)]).splitlines()[-1] == "| `x | y` | 1 |"


def test_figures_of_a_record():
    pages = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    seeds = [{"arms": {"rome": {"success": value, "exact": 1.0}}} for value in (0.5, 1.0)]
    assert pages["figures"](seeds).splitlines()[-1] == "| rome | 0.75 (0.5 to 1) | 1 |"


def test_readme_shows_the_records():
    pages = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    text = (ROOT / "README.md").read_text()
    assert text == pages["readme"](text), "run: make readme"
