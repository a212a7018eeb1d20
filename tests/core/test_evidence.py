"""core.evidence: the grammar of rules, how they are judged, and the record."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfuse.core import evidence, records
from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.evidence import parse_rules, read_record, run_evidence


def judge(text, *seeds):
    return [rule.judge(seeds) for rule in parse_rules(text)]


A, B, C = ({"m": {"x": x, "y": y}, "base": {"x": 1.0}} for x, y in ((2.0, 1.0), (3.0, 1.0), (0.5, 7.0)))


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("m.x > base.x", False),  # all three seeds by default; the third is below
        ("m.x > base.x in 2/3 seeds", True),
        ("m.x > base.x in 3/3 seeds", False),
        ("mean(m.x) > mean(base.x)", True),  # 5.5 / 3
        ("mean(m.x) >= 5.5 / 3", True),
        ("mean(m.x) > 1.84", False),
        ("mean(m.x) - 2 * mean(base.x) <= -(1 / 6) + 1e-9", True),
        ("mean(m.x * m.y) == 8.5 / 3", True),
        ("m.x <= mean(m.x) + 2", True),
        ("m.x >= mean(m.x) in 2/3 seeds", True),
        ("base.x == 1", True),
        ("base.x != 1", False),
        ("0.4 < m.x; m.y < 2 in 2/3 seeds", True),
        ("0.4 < m.x; m.y < 2", False),
        ("m.x / (base.x - base.x) > 0", False),  # division by zero is a missing figure
        ("m.x / (base.x - base.x) != 0", False),
    ],
)
def test_judged(text, passed):
    assert all(each["passed"] for each in judge(text, A, B, C)) is passed


def test_details_say_which_seed_and_by_how_much():
    (rule,) = judge("m.x - 1 >= base.x * 0.5 in 2/3 seeds", A, B, C)
    assert rule["held"] == 2 and rule["needed"] == 2
    assert rule["figures"][2] == {"left": -0.5, "right": 0.5, "held": False}
    (mean,) = judge("mean(m.x) > 0", A, B, C)
    assert len(mean["figures"]) == 1 and mean["figures"][0]["left"] == pytest.approx(5.5 / 3)


def test_share_scales_with_the_number_of_seeds():
    assert judge("m.x > base.x in 2/3 seeds", A)[0]["needed"] == 1
    assert judge("m.x > base.x in 2/3 seeds", *[A] * 5)[0]["needed"] == 4
    assert judge("m.x > base.x in 3/3 seeds", *[A] * 5)[0]["needed"] == 5


def test_missing_figures_fail():
    gone = {"m": {"x": math.nan}, "base": {"x": None}}
    for text in ("m.x > 0", "m.x < 0", "m.x != 0", "base.x != 0", "mean(m.x) != 0"):
        assert not judge(text, gone)[0]["passed"]


@given(st.recursive(
    st.sampled_from(["m.x", "m.y", "base.x", "2", "0.5"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
))  # fmt: skip
def test_arithmetic_is_pythons(expression):
    class Arm:
        def __init__(self, figures):
            self.__dict__.update(figures)

    expected = eval(expression, {"m": Arm(A["m"]), "base": Arm(A["base"])})
    (rule,) = judge(f"{expression} <= base.x", A)
    assert rule["figures"][0]["left"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "", " ; ", None, 3, "m.x", "m.x + 1", "m.x > 0 > -1", "m.x > 0 and m.y > 0", "1 < 2", "m.x >",
        "m > 0",
        "m.x.z > 0", "max(m.x) > 0", "mean(m.x, m.y) > 0", "mean(mean(m.x)) > 0", "m.x ** 2 > 0", "m.x > '0'",
        "m.x > True", "m['x'] > 0", "__import__('os').system('true') > 0", "(lambda: 1)() > m.x",
        "m.x in m.y",
        "m.x > 0 in 4/3 seeds", "m.x > 0 in 0/3 seeds", "mean(m.x) > 0 in 2/3 seeds", "m.x > 0 in 3 seeds",
    ],
)  # fmt: skip
def test_outside_the_grammar(text):
    with pytest.raises(BadInput, match="RULE"):
        parse_rules(text)


RECIPE = '''
SLUG = "toy-method"
CLAIM = """Better
    than nothing."""
NOTES = "tried twice"
RULE = {"quick": "toy.score >= none.score + 0.5 in 3/3 seeds", "full": "mean(toy.score) > 5; toy.score > 0"}
SEEDS = {"quick": 3, "full": 2}


def run(tier, seed):
    return {"toy": {"score": 1 + seed}, "none": {"score": seed / 2, "odd": float("nan")}}
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package folder with one method and an evidence folder with its recipe."""
    package = tmp_path / "src" / "transfuse"
    (package / "edit").mkdir(parents=True)
    (package / "edit" / "toy_method.py").write_text('"""Toy."""\n')
    root = tmp_path / "evidence"
    (root / "edit").mkdir(parents=True)
    (root / "edit" / "toy_method.py").write_text(RECIPE)
    (root / "edit" / "_helper.py").write_text("raise SystemError")
    monkeypatch.setattr(evidence, "PACKAGE", package)
    monkeypatch.setattr(records, "PACKAGE", package)
    return root


def test_record(house, capsys):
    record = run_evidence("toy_method")
    assert record == json.loads((house / "results" / "toy-method.json").read_text())
    assert record == read_record("toy-method")
    assert record["slug"] == "toy-method" and record["family"] == "edit"
    assert record["claim"] == "Better than nothing." and record["notes"] == "tried twice"
    assert record["tier"] == "quick" and record["verdict"] == "passed"
    assert record["rule"] == "toy.score >= none.score + 0.5 in 3/3 seeds"
    assert [run["seed"] for run in record["seeds"]] == [0, 1, 2]
    assert record["seeds"][1]["arms"] == {"toy": {"score": 2.0}, "none": {"score": 0.5, "odd": None}}
    assert record["summary"] == {"toy": {"score": 2.0}, "none": {"score": 0.5, "odd": None}}
    method = (house.parent / "src/transfuse/edit/toy_method.py").read_bytes()
    assert record["method_sha256"] == hashlib.sha256(method).hexdigest()
    assert record["recipe_sha256"] == hashlib.sha256(RECIPE.encode()).hexdigest()
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1 and record["seconds"] >= 0
    assert "git" in record and record["created"]
    told = capsys.readouterr()
    assert told.out == "" and "seed 3/3" in told.err and "held 3/3" in told.err


def test_both_tiers_are_kept_and_a_failure_is_written(house, capsys):
    run_evidence("toy-method")
    record = run_evidence("toy-method", "full")
    assert record["verdict"] == "failed" and record["tier"] == "full" and len(record["seeds"]) == 2
    assert [rule["passed"] for rule in record["rules"]] == [False, True]
    assert record["rules"][0]["figures"] == [{"left": 1.5, "right": 5.0, "held": False}]
    assert "FAILED 0/1: mean(toy.score) > 5  [1.5 against 5]" in capsys.readouterr().err
    assert record["tiers"]["quick"]["verdict"] == "passed" and record["tiers"]["full"]["verdict"] == "failed"
    again = run_evidence("toy-method", "quick", seeds=1)
    assert len(again["seeds"]) == 1 and again["tiers"]["full"] == record["tiers"]["full"]


def test_what_changes_during_the_run(house):
    """The record is of the code that ran, and keeps what was measured of the other tier meanwhile."""
    run_evidence("toy-method", "full")
    method, recipe = house.parent / "src/transfuse/edit/toy_method.py", house / "edit" / "toy_method.py"
    started = method.read_bytes()
    meddle = f"""
    import json, pathlib
    pathlib.Path({str(method)!r}).write_text("edited")
    path = pathlib.Path({str(house / "results" / "toy-method.json")!r})
    record = json.loads(path.read_text())
    record["tiers"]["full"]["seconds"] = 77.0
    path.write_text(json.dumps(record))
    return"""
    recipe.write_text(RECIPE.replace("    return", meddle))
    record = run_evidence("toy-method", seeds=1)
    assert record["method_sha256"] == hashlib.sha256(started).hexdigest()
    assert record["tiers"]["full"]["seconds"] == 77.0


def test_infinity_is_no_figure(house):
    """A record cannot hold it, so no rule may rest on it."""
    recipe = house / "edit" / "toy_method.py"
    recipe.write_text(RECIPE.replace('{"score": 1 + seed}', '{"score": (-1) ** seed * float("inf")}'))
    assert run_evidence("toy-method")["summary"]["toy"] == {"score": None}
    recipe.write_text(RECIPE.replace("1 + seed", '1 + seed if seed else float("inf")'))
    record = run_evidence("toy-method")
    assert record["verdict"] == "failed" and record["rules"][0]["held"] == 2
    assert record["summary"]["toy"] == {"score": 2.5}  # of the seeds that have it


def test_a_crash_leaves_the_record(house):
    run_evidence("toy-method")
    before = (house / "results" / "toy-method.json").read_bytes()
    recipe = house / "edit" / "toy_method.py"
    recipe.write_text(
        RECIPE.replace("    return", "    if seed:\n        raise KeyboardInterrupt\n    return")
    )
    with pytest.raises(KeyboardInterrupt):
        run_evidence("toy-method")
    assert (house / "results" / "toy-method.json").read_bytes() == before
    assert [p.name for p in (house / "results").iterdir()] == ["toy-method.json"]


def test_a_corrupt_record_is_replaced(house, capsys):
    (house / "results").mkdir()
    (house / "results" / "toy-method.json").write_text('{"tiers": ')
    with pytest.raises(CorruptFile):
        read_record("toy-method")
    run_evidence("toy-method")
    assert read_record("toy-method")["verdict"] == "passed"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("toy.score >=", "toy.scores >="), "did you mean 'toy.score'?"),
        (('SLUG = "toy-method"', 'SLUG = "tay-method"'), "is not the file's name"),
        (("CLAIM", "CLAIMS"), "define CLAIM"),
        (('{"quick":', '{"fast":'), "is not a rule"),
        (('{"score": 1 + seed}', '{"score": "high"}'), "metric: number"),
        (("return", "return [1]\n    return"), "metric: number"),
    ],
)
def test_bad_recipes(house, change, says):
    text = RECIPE.replace(*change)
    assert text != RECIPE
    (house / "edit" / "toy_method.py").write_text(text)
    with pytest.raises(BadInput, match=says.replace("?", r"\?")):
        run_evidence("toy-method")
    assert not (house / "results").exists()


def test_bad_arguments(house):
    with pytest.raises(BadInput, match="did you mean 'toy-method'"):
        run_evidence("toy-metod")
    with pytest.raises(BadInput, match="quick or full"):
        run_evidence("toy-method", "fast")
    for seeds in (0, 2.5, "2", True):
        with pytest.raises(BadInput, match="seeds"):
            run_evidence("toy-method", seeds=seeds)
    (house.parent / "src/transfuse/edit/toy_method.py").unlink()
    with pytest.raises(BadInput, match=r"no module toy_method\.py"):
        run_evidence("toy-method")


def test_packaged_recipes_write_to_the_working_folder(house, monkeypatch, tmp_path):
    packaged = house.parent / "src" / "transfuse" / "_evidence"
    house.rename(packaged)
    monkeypatch.chdir(tmp_path)
    assert evidence.evidence_root() == packaged
    run_evidence("toy-method")
    assert (tmp_path / "evidence" / "results" / "toy-method.json").is_file()
    assert not (packaged / "results").exists()


def test_reading_records_needs_no_torch():
    code = (
        "import sys; from transfuse.core.evidence import read_record; read_record('rome'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_recipe_of_this_repository_has_a_sound_rule():
    recipes = sorted(evidence.evidence_root().glob("[!_.]*/[!_.]*.py"))
    for path in recipes:
        module = evidence._import(path)
        rules = module.RULE if isinstance(module.RULE, dict) else dict.fromkeys(evidence.TIERS, module.RULE)
        assert set(rules) == set(evidence.TIERS), path.name
        for text in rules.values():
            assert parse_rules(text, path.name)
        assert module.CLAIM.strip()
