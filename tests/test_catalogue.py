"""The catalogue: field lists, lookup, other packages' methods, verdicts; and every method's companions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import yaml

import transfuse
from transfuse import catalogue, explain, recipe
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.core.files import sha256_file
from transfuse.schema import recipe_schema

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transfuse"
FILES = sorted(
    path
    for family in catalogue.families()
    for path in (PACKAGE / family).glob("*.py")
    if not path.name.startswith("_")
)

GOOD = '''"""Echo: repeat what was said.

:arxiv: 2401.00001
:moves: a sentence -> the next sentence
:access: text, training data
:reversible: yes
:context: no

The body.
"""

from __future__ import annotations

__all__ = ["Echo", "echo_step"]


def echo_step(x):
    return x


class Echo:
    """Repeats.

    Args:
        times: How often.
        mark: What stands between,
            if anything.
    """

    def __init__(self, *, times: int = 2, mark: str | None = None, model: object):
        self.times, self.mark, self.model = times, mark, model
'''


@pytest.fixture
def write(tmp_path):
    """Write a module `steer/<name>.py` in a temporary folder and return its path."""

    def _write(text: str, name: str = "echo") -> Path:
        path = tmp_path / "steer" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return _write


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An evidence folder of our own."""
    (tmp_path / "evidence" / "results").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "evidence_root", lambda: tmp_path / "evidence")
    return tmp_path / "evidence" / "results"


# --- the methods that are there ---------------------------------------------------------------------


def test_all_methods_are_listed():
    listed = {method.path for method in catalogue.methods() if method.package == "transfuse"}
    assert listed == set(FILES)
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_method_is_well_formed(path):
    """Field list, public names, signature and documentation of every argument."""
    method = catalogue.read(path)
    assert method.title.count("\n") == 0 and len(method.title) <= 110
    assert len(method.body) > 100, "the docstring's body says what the method does"
    found = explain.signature(method)
    undocumented = [parameter.name for parameter in found.parameters if not parameter.text]
    assert not undocumented, f"{found.name}: arguments without a text: {undocumented}"
    main = catalogue.get(method.slug)
    assert main.__name__ == found.name
    assert main.__doc__


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_method_has_its_companions(path):
    """A test, an evidence recipe, and a record made with the file as it is now: quick always, full where measured."""
    method = catalogue.read(path)
    test = ROOT / "tests" / method.family / f"test_{path.stem}.py"
    recipe = ROOT / "evidence" / method.family / f"{path.stem}.py"
    assert test.is_file(), f"write {test.relative_to(ROOT)}"
    verdicts = method.evidence
    assert recipe.is_file(), f"write {recipe.relative_to(ROOT)}"
    assert verdicts["quick"] in ("passed", "failed"), f"quick: {verdicts['quick']}; measure again"
    assert verdicts["full"] != "outdated", "full: outdated; measure again"


def test_no_record_without_a_method():
    slugs = {method.slug for method in catalogue.methods()}
    records = {path.stem for path in (catalogue.evidence_root() / "results").glob("*.json")}
    assert records <= slugs


# --- reading a field list ---------------------------------------------------------------------------


def test_a_good_file(write):
    method = catalogue.read(write(GOOD))
    assert method.slug == "echo"
    assert method.family == "steer"
    assert method.title == "Echo: repeat what was said"
    assert method.arxiv == "2401.00001"
    assert method.access == ("text", "training data")
    assert method.reversible is True
    assert method.context is False
    assert method.extra is None
    assert method.module == "transfuse.steer.echo"
    assert method.body == "The body."
    json.dumps(method.describe())


def test_continued_fields_comments_and_raw_docstrings(write):
    text = "# A comment.\n# Another.\n\nr" + GOOD.replace("a sentence -> ", "a sentence\n    -> ")
    method = catalogue.read(write(text))
    assert method.moves == "a sentence -> the next sentence"


@pytest.mark.parametrize(
    ("old", "new", "field", "word"),
    [
        (":moves: a sentence -> the next sentence\n", "", "moves", "missing"),
        (":access: text, training data", ":access: text, telepathy", "access", "telepathy"),
        (":access: text, training data", ":access:", "access", "empty"),
        (":reversible: yes", ":reversible: perhaps", "reversible", "perhaps"),
        (":context: no", ":context: No", "context", "yes or no"),
        (":arxiv: 2401.00001", ":arxiv: arXiv:2401.00001", "arxiv", "2202.05262"),
        (":arxiv:", ":axriv:", "axriv", "did you mean 'arxiv'"),
        (":context: no", ":context: no\n:context: yes", "context", "twice"),
        (":context: no", ":context: no\nand so on", "docstring", "is not a field"),
        (":context: no", ":context: no\n:family: steer", "family", "unknown"),
    ],
)
def test_a_malformed_field_is_named(write, old, new, field, word):
    assert old in GOOD
    with pytest.raises(BadInput) as caught:
        catalogue.read(write(GOOD.replace(old, new, 1)))
    assert caught.value.argument == f"steer/echo.py: {field}"
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x = 1\n", '"""\n"""\n', "def f(:\n", "\0"])
def test_a_file_without_a_docstring(write, text):
    with pytest.raises(BadInput, match=r"steer/echo\.py"):
        catalogue.read(write(text))


# --- lookup -----------------------------------------------------------------------------------------


def test_both_spellings():
    slug = next(m.slug for m in catalogue.methods() if "-" in m.slug)
    assert catalogue.find(slug) == catalogue.find(slug.replace("-", "_")) == catalogue.find(slug.upper())


def test_typos_are_answered_with_names():
    with pytest.raises(BadInput, match="did you mean 'ck-plug'"):
        catalogue.find("ckplug")
    with pytest.raises(BadInput, match="did you mean 'edit'"):
        catalogue.methods("edits")
    with pytest.raises(BadInput, match="choose one of"):
        catalogue.find("zzzzzzzzzz")


@pytest.mark.parametrize("slug", [None, 3, Path])
def test_what_is_no_name(slug):
    with pytest.raises(BadInput, match="is not a name"):
        transfuse.get(slug)


def test_get_imports_the_main_object():
    assert transfuse.get("ck_plug").__name__ == "CKPlug"
    assert transfuse.get("ck-plug") is transfuse.get("ck_plug")


def test_main_name_prefers_the_name_that_spells_the_slug():
    assert catalogue.main_name("ft-l", ["FTL", "ft_l_step"]) == "FTL"
    assert catalogue.main_name("ft-l", ["Aaa", "FTL"]) == "FTL"
    assert catalogue.main_name("ft-l", ["Editor", "step"]) == "Editor"


def test_the_package_offers_what_it_promises():
    assert {"get", "load", "methods", "__version__"} == set(transfuse.__all__) <= set(dir(transfuse))
    with pytest.raises(AttributeError, match="no attribute 'mehtods'"):
        _ = transfuse.mehtods


# --- methods of other packages ----------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one entry point on the path, the way an installed package looks."""

    def _install(text: str, entry: str = "echo = other_pkg.deep.echo_module") -> None:
        package = tmp_path / "site" / "other_pkg"
        (package / "deep").mkdir(parents=True)
        for folder in (package, package / "deep"):
            (folder / "__init__.py").write_text("raise SystemExit('the package was imported')\n")
        (package / "deep" / "echo_module.py").write_text(text)
        info = tmp_path / "site" / "other_pkg-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-pkg\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{catalogue.ENTRY_POINTS}]\n{entry}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")

    return _install


def test_another_packages_method_is_found_without_importing_it(install):
    install(GOOD.replace(":context: no", ":context: no\n:family: mumble"))
    method = catalogue.find("echo")
    assert (method.package, method.module) == ("other-pkg", "other_pkg.deep.echo_module")
    assert method in catalogue.methods("mumble")
    assert method.evidence == {"quick": "not measured", "full": "not measured"}
    assert "other_pkg" not in sys.modules


def test_another_packages_faults_do_not_take_the_catalogue_down(install):
    install(GOOD)  # lacks :family:
    with pytest.warns(UserWarning, match=r"other-pkg: method 'echo' left out: .*family"):
        assert [m.slug for m in catalogue.methods() if m.package != "transfuse"] == []


@pytest.mark.parametrize("entry", ["echo = no_such_pkg.x", "echo = other_pkg.no_such"])
def test_an_entry_point_to_nowhere(install, entry):
    install(GOOD, entry)
    with pytest.warns(UserWarning, match="no module named"):
        catalogue.methods()


def test_a_malformed_entry_point(install):
    install(GOOD, "echo = (no module)")
    with pytest.warns(UserWarning, match="other-pkg: method 'echo' left out"):
        assert {m.package for m in catalogue.methods()} == {"transfuse"}


@pytest.fixture
def install_module(install, tmp_path):
    """The same as one module that lies in no package, imported anew."""

    def _install(text: str) -> Path:
        install(text, "echo = echo_module")
        sys.modules.pop("echo_module", None)
        module = tmp_path / "site" / "other_pkg" / "deep" / "echo_module.py"
        return module.rename(tmp_path / "site" / "echo_module.py")

    return _install


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ('import no_such_library\n__all__ = ["Echo"]', "of other-pkg cannot be imported .*no_such_library"),
        ("", "__all__ = .* names nothing that is defined there"),
        ('__all__ = ["Eco"]', "names nothing that is defined there"),
    ],
)
def test_another_packages_broken_module(install_module, new, says):
    """One line that says whose fault it is; the schema of all recipes does without it."""
    text = GOOD.replace(":context: no", ":context: no\n:family: steer")
    install_module(text.replace('__all__ = ["Echo", "echo_step"]', new))
    with pytest.raises(BadInput, match=says):
        catalogue.get("echo")
    with pytest.warns(UserWarning, match="other-pkg: method 'echo' left out"):
        assert "ck-plug" in json.dumps(recipe_schema())


def test_another_packages_method_has_the_recipes_of_its_family(install_module, tmp_path):
    """A family that is not here has none."""
    text = GOOD.replace(", model: object", "").replace(", model\n", ", None\n")
    text = text.replace(":context: no", ":context: no\n:extra: fast\n:family: steer")
    module = install_module(text)
    assert 'pip install "other-pkg[fast]"' in explain.page("echo")
    shown = yaml.safe_load(explain.recipe("echo"))
    assert shown["method"] == {"uses": "echo", "with": {"times": 2, "mark": None}} and "questions" in shown
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "Who?", "answers": ["x"]}\n')
    assert recipe.check({**shown, "questions": str(asked)}).family == "steer"
    module.write_text(text.replace(":family: steer", ":family: mumble"))
    assert "no single run" in explain.recipe("echo")
    with pytest.raises(NotApplicable, match="has no single run"):
        recipe.check({"model": "m", "method": "echo"})


def test_a_slug_cannot_be_taken_over(install):
    text = GOOD.replace(":context: no", ":context: no\n:family: steer")
    install(text, "ck-plug = other_pkg.deep.echo_module")
    with pytest.warns(UserWarning, match="is taken"):
        listed = catalogue.methods()
    assert [m.package for m in listed if m.slug == "ck-plug"] == ["transfuse"]


# --- signatures and recipes -------------------------------------------------------------------------


def test_signature_of_a_class(write):
    found = explain.signature(catalogue.read(write(GOOD)))
    assert (found.name, found.kind) == ("Echo", "class")
    assert [(p.name, p.annotation, p.default) for p in found.parameters] == [
        ("times", "int", "2"),
        ("mark", "str | None", "None"),
        ("model", "object", None),
    ]
    assert not any(p.supplied for p in found.parameters)
    assert found.parameters[1].text == "What stands between, if anything."


def test_signature_follows_bases_constants_and_dataclasses(write):
    write(
        textwrap.dedent("""
        from dataclasses import dataclass
        @dataclass
        class Base:
            \"\"\"B.

            Attributes:
                rate: Speed.
            \"\"\"
            rate: float = 0.5
        """),
        "_base",
    )
    head = GOOD.split("from __future__")[0]
    tail = textwrap.dedent("""
        from dataclasses import dataclass
        from typing import ClassVar
        from ._base import Base
        __all__ = ["Echo"]
        STEPS = 7
        @dataclass
        class Echo(Base):
            \"\"\"E.

            Attributes:
                steps: How many.
            \"\"\"
            steps: int = STEPS
            kind: ClassVar[str] = "x"
        """)
    found = explain.signature(catalogue.read(write(head + tail)))
    assert [(p.name, p.default, p.text) for p in found.parameters] == [
        ("rate", "0.5", "Speed."),
        ("steps", "7", "How many."),
    ]


def test_signature_of_a_module_that_exports_nothing(write):
    method = catalogue.read(write(GOOD.split("from __future__")[0]))
    with pytest.raises(BadInput, match="__all__"):
        explain.signature(method)
    method = catalogue.read(
        write(GOOD.replace("class Echo", "class Other").replace("def echo_step", "def other"))
    )
    with pytest.raises(BadInput, match="names nothing"):
        explain.signature(method)


# --- verdicts ---------------------------------------------------------------------------------------


def test_verdicts_follow_the_file(write, elsewhere):
    path = write(GOOD)
    method = catalogue.read(path)
    assert method.evidence == {"quick": "not measured", "full": "not measured"}
    tiers = {"quick": {"verdict": "passed", "method_sha256": sha256_file(path)}}
    (elsewhere / "echo.json").write_text(json.dumps({"slug": "echo", "tiers": tiers}))
    assert method.evidence == {"quick": "passed", "full": "not measured"}
    path.write_text(GOOD + "\n# changed\n")
    assert catalogue.read(path).evidence == {"quick": "outdated", "full": "not measured"}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_unreadable_record(write, elsewhere, text):
    (elsewhere / "echo.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"echo\.json"):
        _ = catalogue.read(write(GOOD)).evidence


# --- the wheel --------------------------------------------------------------------------------------


def test_a_wheel_carries_recipes_and_records(tmp_path):
    """Unpacked anywhere, the package shows the same catalogue and verdicts as the checkout."""
    checkout = tmp_path / "checkout"
    for name in ("src", "evidence"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=checkout, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import json, transfuse; from transfuse import catalogue;"
        "print(json.dumps([str(catalogue.evidence_root()), [m.describe() for m in catalogue.methods()]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    root, listed = json.loads(done.stdout)
    assert Path(root) == tmp_path / "site" / "transfuse" / "_evidence"
    assert listed == json.loads(json.dumps([m.describe() for m in catalogue.methods()]))

    def files(folder: Path, pattern: str = "*") -> set[Path]:
        found = {p.relative_to(folder) for p in folder.rglob(pattern) if p.is_file()}
        return {p for p in found if "__pycache__" not in p.parts}

    assert files(Path(root), "*.py") == files(ROOT / "evidence", "*.py")
    packed = files(tmp_path / "site" / "transfuse")
    assert {p for p in packed if p.parts[0] != "_evidence"} == files(PACKAGE)
