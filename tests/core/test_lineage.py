"""core.lineage: what is recorded, that it can be read back, and what the card says."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from transfuse.core import lineage
from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.lineage import amend_lineage, input_hash, jsonable, read_lineage, write_lineage


@dataclass
class Settings:
    rate: float = 0.1
    layers: tuple[int, ...] = (1, 2)


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'{"subject": "Quenby"}\n')
    return path


def test_round_trip(tmp_path, facts):
    out = tmp_path / "out"
    out.mkdir()
    write_lineage(
        out,
        method="rome",
        arguments={"layer": 5, "settings": Settings(), "dtype": sys.version_info.__class__},
        inputs={"facts": facts, "model": "smollm2-135m", "rows": [{"a": 1}], "none": None},
        seed=3,
        measurements={"recall": 0.75, "gap": math.nan},
        base_model="smollm2-135m",
        summary="One fact.",
        usage="load_edit(...)",
    )
    record = read_lineage(out)
    assert record["method"] == "rome" and record["seed"] == 3
    assert record["arguments"]["settings"] == {"rate": 0.1, "layers": [1, 2]}
    assert record["inputs"]["facts"] == str(facts) and record["inputs"]["rows"] == [{"a": 1}]
    assert record["measurements"] == {"recall": 0.75, "gap": None}
    assert record["input_sha256"]["facts"] == hashlib.sha256(facts.read_bytes()).hexdigest()
    assert "none" not in record["input_sha256"]
    for name in ("python", "torch", "transformers", "peft", "transfuse"):
        assert record["versions"][name]
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["memory_bytes"] > 2**28
    assert record["created"].endswith("+00:00")
    json.loads((out / "transfuse.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "transfuse.json"]


def test_card(tmp_path):
    write_lineage(
        tmp_path,
        method="memit",
        inputs={"facts": [{"subject": "s"}] * 12},
        measurements={
            "recall": 1 / 3,
            "locality": {"all": {"mean": 0.875, "low": 0.5, "high": 1.0, "n": 24}, "neighbours": None},
        },
        base_model="org/a: b",
        usage="x = 1",
    )
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "org/a: b" and "memit" in front["tags"]
    assert "| recall | 0.333333 |" in body and "| facts | 12 items (SHA-256 " in body
    assert "| locality, all | 0.875 (0.5 to 1) |" in body and "neighbours" not in body
    assert "```python\nx = 1\n```" in body and "torch" in body


def test_hashes_follow_the_content(tmp_path, facts):
    before = input_hash(facts)
    assert input_hash(str(facts)) == before
    facts.write_bytes(b"other")
    assert input_hash(facts) != before
    assert input_hash("smollm2-135m") == input_hash("smollm2-135m") != input_hash("smollm2-360m")
    assert input_hash({"a": 1, "b": 2}) == input_hash({"b": 2, "a": 1})
    assert input_hash("x" * 300) and input_hash("a\0b")  # text that no path could be
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("1")
    first = input_hash(folder)
    (folder / "sub" / "x").rename(folder / "sub" / "y")
    assert input_hash(folder) != first


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.frozensets(st.text())
        ),
        max_leaves=8,
    )
)
def test_anything_becomes_strict_json(value):
    text = json.dumps(jsonable(value), allow_nan=False)
    assert jsonable(json.loads(text)) == json.loads(text)


def test_scalars_of_numpy():
    import numpy as np

    assert jsonable(np.float32(0.5)) == 0.5 and jsonable(np.int64(3)) == 3
    assert jsonable(np.float64("nan")) is None
    assert jsonable(Path("a/b")) == "a/b"


def test_scalars_of_torch():
    import torch

    assert jsonable({"loss": torch.tensor(0.5), "n": torch.tensor(3)}) == {"loss": 0.5, "n": 3}


def test_hashes_see_every_value_of_arrays_and_data_sets():
    import datasets
    import numpy as np
    import torch

    for make in (
        np.asarray,
        torch.tensor,
        lambda values: datasets.Dataset.from_dict({"x": values}),
    ):
        values = list(range(5000))
        first = input_hash(make(values))
        assert first == input_hash(make(values))
        values[2500] = -1  # their text shows the two ends only, or the number of rows
        assert input_hash(make(values)) != first


@pytest.mark.parametrize("wrap", [lambda p: (p,), lambda p: {"a": p}, lambda p: [{"a": ("x", p)}]])
def test_hashes_follow_files_inside_of_values(facts, wrap):
    first = input_hash(wrap(facts))
    facts.write_bytes(b"other")
    assert input_hash(wrap(facts)) != first


def test_names_that_are_no_text_do_not_spoil_the_record(tmp_path):
    bad = "name-\udcff"  # how Python shows a byte that is not UTF-8
    write_lineage(
        tmp_path, method="x", arguments={"path": Path(bad), bad: [bad]}, base_model=bad, summary=bad
    )
    assert read_lineage(tmp_path)["arguments"] == {"path": "name-?", "name-?": ["name-?"]}
    assert "name-?" in (tmp_path / "README.md").read_text()


def test_bad_folders(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        write_lineage(tmp_path / "missing", method="x")
    with pytest.raises(BadInput, match=r"holds no transfuse\.json"):
        read_lineage(tmp_path)
    for content in ("{", "[]", '{"method": 3}'):
        (tmp_path / "transfuse.json").write_text(content)
        with pytest.raises(CorruptFile):
            read_lineage(tmp_path)
    (tmp_path / "transfuse.json").write_text('{"method": "x"}')
    with pytest.raises(CorruptFile, match="lacks 'base_model'; make the folder again"):
        amend_lineage(tmp_path, seed=1)


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        done = subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "src" / "transfuse" / "core"
    package.mkdir(parents=True)
    (package / "lineage.py").write_text("1")
    monkeypatch.setattr(lineage, "_ROOT", tmp_path)
    monkeypatch.setattr(lineage, "__file__", str(package / "lineage.py"))
    assert lineage.git_state() is None  # not a repository
    git("init", "-q")
    git("-c", "user.name=a", "-c", "user.email=a@b", "add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one")
    clean = {"revision": git("rev-parse", "HEAD"), "dirty": False}
    assert lineage.git_state() == clean
    (tmp_path / "evidence" / "results").mkdir(parents=True)
    (tmp_path / "evidence" / "results" / "a.json").write_text("{}")
    assert lineage.git_state() == clean
    (package / "lineage.py").write_text("2")
    assert lineage.git_state() == {**clean, "dirty": True}
    # Installed into the environment of somebody else's repository: not our checkout.
    monkeypatch.setattr(lineage, "__file__", str(tmp_path / ".venv" / "transfuse" / "core" / "lineage.py"))
    assert lineage.git_state() is None


def test_no_torch(tmp_path):
    code = (
        "import sys; from transfuse.core.lineage import write_lineage; "
        f"write_lineage({str(tmp_path)!r}, method='x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
