"""More than thirty ways to be wrong: one line with a remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from comparison import FACTS

from transfuse import cli


def facts(**changes):
    return [{**FACTS[0], **changes}]


def without(name):
    return [{k: v for k, v in FACTS[0].items() if k != name}]


RECIPES = {
    "unknown field": {"modle": "x"},
    "model missing": {"model": None},
    "model unknown": {"model": "smollm3-135m"},
    "model a number": {"model": 7},
    "knowledge missing": {"knowledge": None},
    "knowledge empty": {"knowledge": {}},
    "facts and questions": {"knowledge": {"facts": "facts.jsonl", "questions": "facts.jsonl"}},
    "questions without documents": {"knowledge": {"questions": "facts.jsonl"}},
    "facts file missing": {"knowledge": {"facts": "nowhere.jsonl"}},
    "facts file of unknown kind": {"knowledge": {"facts": "facts.csv"}},
    "negative split": {"knowledge": {"facts": "facts.jsonl", "train_paraphrases": -1}},
    "split is text": {"knowledge": {"facts": "facts.jsonl", "train_paraphrases": "two"}},
    "no carriers": {"carriers": []},
    "carriers no list": {"carriers": "lora"},
    "unknown carrier": {"carriers": ["lorra"]},
    "carrier without uses": {"carriers": [{"with": {}}]},
    "carrier with extra field": {"carriers": [{"uses": "lora", "wiht": {}}]},
    "carrier twice": {"carriers": ["lora", "lora"]},
    "carrier named like a path": {"carriers": [{"uses": "lora", "name": "../x"}]},
    "unknown argument": {"carriers": [{"uses": "lora", "with": {"rnak": 4}}]},
    "argument of wrong type": {"carriers": [{"uses": "lora", "with": {"rank": "four"}}]},
    "k beyond the documents": {"carriers": [{"uses": "bm25-context", "with": {"k": 99}}]},
    "unknown hyperparameter": {"carriers": [{"uses": "rome", "with": {"settings": {"layr": 3}}}]},
    "unknown reference": {"reference": "golden"},
    "unknown constraint": {"constraints": {"max_latecny": 1}},
    "constraint of wrong type": {"constraints": {"reversible": "yes please"}},
    "unknown dtype": {"dtype": "float8"},
    "unknown device": {"device": "gpu"},
    "device not there": {"device": "cuda:9"},
    "neutral text missing": {"neutral": "nowhere.txt"},
    "known facts missing": {"known": "nowhere.jsonl"},
    "output is a file": {"output": "facts.jsonl"},
    "seed negative": {"seed": -1},
    "answers of no token": {"max_new_tokens": 0},
    "no carrier at a time": {"jobs": 0},
    "limit negative": {"constraints": {"max_latency": -1}},
    "share in percent": {"constraints": {"min_locality": 85}},
    "chat without a template": {"chat": True},
    "ck-plug's weight": {"carriers": [{"uses": "ck-plug", "with": {"alpha": 5.0}}]},
    "ck-plug's k": {"carriers": [{"uses": "ck-plug", "with": {"k": 99}}]},
    "document adapters of no rank": {"carriers": [{"uses": "parametric-rag", "with": {"rank": 0}}]},
    "unknown encoder": {"carriers": [{"uses": "vector-context", "with": {"encoder": "nowhere"}}]},
    "unknown small model": {"carriers": [{"uses": "proxy-tuning", "with": {"small": "nowhere"}}]},
    "small model of no block": {"carriers": [{"uses": "proxy-tuning", "with": {"layers": 0}}]},
    "neutral text not UTF-8": {"neutral": "latin.txt"},
}

RECORDS = {
    "no subject": without("subject"),
    "no prompt": without("prompt"),
    "no target": without("target"),
    "empty target": facts(target="  "),
    "target a number": facts(target=7),
    "subject not in prompt": facts(subject="Atlantis"),
    "paraphrases one text": facts(paraphrases="one"),
    "paraphrase empty": facts(paraphrases=["", "b"]),
    "not a record": ["text"],
    "no records": [],
    "id twice": [{**FACTS[0], "id": "a"}, {**FACTS[1], "id": "a"}],
}


def refuse(capsys, tmp_path, path):
    """Run the command; exactly one line of error, code 2, no output folder."""
    present = set(tmp_path.rglob("*"))
    code = cli.main(["compare", str(path)])
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    assert ";" in err or "did you mean" in err, f"no remedy: {err}"
    assert set(tmp_path.rglob("*")) == present
    return err


@pytest.mark.parametrize("change", RECIPES.values(), ids=RECIPES.keys())
def test_recipes(recipe, change, capsys, tmp_path):
    (tmp_path / "facts.csv").write_text("a,b\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") + b" word" * 60)
    path = recipe(**change)
    fields = {k: v for k, v in yaml.safe_load(path.read_text()).items() if v is not None}
    if change.get("output"):
        fields["output"] = str(tmp_path / change["output"])
    path.write_text(yaml.safe_dump(fields))
    refuse(capsys, tmp_path, path)


@pytest.mark.parametrize("rows", RECORDS.values(), ids=RECORDS.keys())
def test_facts(recipe, rows, capsys, tmp_path):
    path = recipe()
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    err = refuse(capsys, tmp_path, path)
    assert "facts" in err


@pytest.mark.parametrize(
    "text", ["model: [", "- a\n- b\n", "model: a\nmodel: b\n", ""], ids=["yaml", "list", "twice", "empty"]
)
def test_files_that_are_no_recipe(tmp_path, capsys, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refuse(capsys, tmp_path, path)


def test_folders_of_others_are_not_replaced(recipe, capsys, tmp_path):
    own = tmp_path / "out" / "carriers" / "gold-context" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert "gold-context" in refuse(capsys, tmp_path, recipe())


def test_broken_lines_name_file_and_line(recipe, capsys, tmp_path):
    path = recipe()
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACTS[0]) + "\n{broken\n")
    assert "facts.jsonl:2" in refuse(capsys, tmp_path, path)


def damaged(tiny_folder, tmp_path, harm):
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    harm(copy)
    return copy


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x07.")


def headless(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("harm", [truncate, pickled, headless], ids=lambda f: f.__name__)
def test_models(recipe, tiny_folder, capsys, tmp_path, harm):
    refuse(capsys, tmp_path, recipe(model=str(damaged(tiny_folder, tmp_path, harm))))


def test_a_pickle_file_is_no_model(recipe, capsys, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04K\x07.")
    assert "pickle" in refuse(capsys, tmp_path, recipe(model=str(tmp_path / "model.pt")))
