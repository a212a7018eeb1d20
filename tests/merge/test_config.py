"""Merges from YAML: our form, mergekit's common kinds, and the command."""

from __future__ import annotations

import warnings

import pytest
import torch
import yaml

from transfuse import cli
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.shards import Checkpoint
from transfuse.merge import merge, read_config
from transfuse.merge._methods import DareLinear, DareTies, Linear, Slerp, TaskArithmetic, Ties


@pytest.fixture
def models(tiny_lm, tiny_tokenizer, tmp_path):
    for i, name in enumerate(("base", "one", "two")):
        tiny_lm("llama", seed=i, layers=1).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def written(folder, value):
    file = folder / "merge.yml"
    file.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return file


def test_our_form(models):
    file = written(
        models,
        {"base": "base", "models": ["one", "two"], "method": {"uses": "ties", "with": {"density": 0.5}},
         "dtype": "bfloat16", "exclude": ["norm"]},
    )  # fmt: skip
    given = read_config(file)
    assert given["method"] == Ties(density=0.5)
    assert given["base"] == str(models / "base") and given["models"] == [
        str(models / "one"),
        str(models / "two"),
    ]
    assert (given["dtype"], given["exclude"], given["vocabulary"]) == ("bfloat16", ["norm"], "same")
    assert read_config({"models": ["a/b+c/d"]})["method"] == Linear()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modles": []}, "did you mean 'models'"),
        ({"models": "one"}, "models"),
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"method": {"uses": "ties", "with": {"densty": 0.5}}}, "did you mean 'density'"),
        ({"method": {"uses": "ties", "density": 0.5}}, "density"),
        ({"method": {"uses": "ties", "with": {"density": 3}}}, "density"),
        ({"vocabulary": "union"}, "vocabulary"),
    ],
)
def test_our_form_is_strict(models, change, says):
    with pytest.raises(BadInput, match=says):
        read_config(written(models, {"base": "base", "models": ["one", "two"], **change}))


def kit(kind, rows=({"weight": 1.0}, {"weight": 0.5}), base="base", **rest):
    listed = [
        {"model": name, "parameters": dict(row)} for name, row in zip(("one", "two"), rows, strict=True)
    ]
    return {"merge_method": kind, "models": listed, **({"base_model": base} if base else {}), **rest}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (kit("linear", base=None), Linear(weights=[1.0, 0.5], normalize=True)),
        (
            kit("linear", base="one", parameters={"normalize": False}),
            Linear(weights=[1.0, 0.5], normalize=False),
        ),
        (kit("task_arithmetic"), TaskArithmetic(weights=[1.0, 0.5], scaling=1.0, normalize=False)),
        (
            kit("ties", ({"weight": 1, "density": 0.5}, {"weight": 0.5}), parameters={"lambda": 0.7}),
            Ties(
                weights=[1.0, 0.5],
                density=[0.5, 1.0],
                scaling=0.7,
                normalize=True,
                scope="tensor",
                tie="positive",
            ),
        ),
        (
            kit("dare_ties", parameters={"density": 0.25, "normalize": 1}),
            DareTies(weights=[1.0, 0.5], density=[0.25, 0.25], scaling=1.0, normalize=True, tie="positive"),
        ),
        (
            kit("dare_linear", parameters={"density": 0.25, "rescale": False}),
            DareLinear(weights=[1.0, 0.5], density=[0.25, 0.25], scaling=1.0, normalize=False, rescale=False),
        ),
        (kit("slerp", ({}, {}), base="two", parameters={"t": 0.3}), Slerp(t=0.3)),
    ],
    ids=["linear", "sum", "task-arithmetic", "ties", "dare-ties", "dare-linear", "slerp"],
)
def test_mergekit_kinds(models, config, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = read_config(written(models, config))
    assert given["method"] == wanted
    names = ["two", "one"] if config["merge_method"] == "slerp" else ["one", "two"]
    assert given["models"] == [str(models / name) for name in names]


def test_mergekit_base_among_the_models_adds_nothing(models):
    config = kit("ties")
    config["models"].insert(0, {"model": "base"})
    assert read_config(written(models, config))["models"] == [str(models / "one"), str(models / "two")]


def test_mergekit_base_that_is_not_listed_is_one_of_the_models(models):
    """mergekit's plan.py: "Base model specified but not in input models - adding", with the shared parameters."""
    config = kit("linear", ({"weight": 1.0}, {}), parameters={"weight": 0.25})
    given = read_config(written(models, config))
    assert given["models"] == [str(models / name) for name in ("one", "two", "base")]
    assert given["method"] == Linear(weights=[1.0, 0.25, 0.25])
    config = {**kit("slerp", ({}, {}), parameters={"t": 0.5})}
    config["models"] = config["models"][:1]
    assert read_config(written(models, config))["models"] == [str(models / "base"), str(models / "one")]
    config["models"] = [{"model": "base"}]
    with pytest.raises(BadInput, match="are not two"):
        read_config(written(models, config))


def test_what_mergekit_has_and_we_do_not_need_is_told(models):
    config = kit(
        "ties",
        parameters={"int8_mask": True},
        chat_template="auto",
        dtype="bfloat16",
        tokenizer_source="base",
    )
    with pytest.warns(UserWarning) as told:
        given = read_config(written(models, config))
    assert {str(w.message).split(" is ignored")[0] for w in told} == {
        "merge.yml: parameters.int8_mask", "merge.yml: chat_template"
    }  # fmt: skip
    assert (given["dtype"], given["vocabulary"]) == ("bfloat16", "base")


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"merge_method": "ties", "slices": []}, NotApplicable, "slices"),
        (kit("ties", tokenizer={"source": "union"}), NotApplicable, "tokenizer"),
        (kit("ties", tokenizer_source="union"), NotApplicable, "tokenizer_source"),
        (kit("model_stock"), BadInput, "merge_method"),
        (kit("tie"), BadInput, "did you mean 'ties'"),
        (kit(["ties"]), BadInput, "merge_method"),
        (
            kit("linear"),
            BadInput,
            "base_model = 'base' is one of the models that are averaged, and has no weight",
        ),
        (kit("ties", ({"weight": [0, 1]}, {"weight": 1})), NotApplicable, r"models\[0\]\.parameters\.weight"),
        (kit("ties", ({"density": 0.5}, {"weight": 1})), BadInput, r"models\[0\]\.parameters\.weight"),
        (kit("ties", ({"weight": 1, "gamma": 1}, {"weight": 1})), BadInput, "gamma"),
        (kit("slerp", ({}, {}), base="two"), BadInput, "parameters.t"),
        (kit("slerp", ({}, {}), parameters={"t": 0.5}), BadInput, "not among the models"),
        (kit("ties", ({"weight": 1, "density": 2}, {"weight": 1})), BadInput, "density"),
        ({"merge_method": "ties", "models": ["one"]}, BadInput, r"models\[0\]"),
    ],
)
def test_mergekit_parts_that_are_not_offered_are_named(models, config, error, says):
    with pytest.raises(error, match=says):
        read_config(written(models, config))


def test_the_command(models, capsys, monkeypatch):
    monkeypatch.chdir(models)
    file = written(models, kit("task_arithmetic"))
    assert cli.main(["merge", str(file), "--dry-run"]) == 0
    assert "task_arithmetic" in capsys.readouterr().out and not (models / "out").exists()
    assert cli.main(["merge", str(file)]) == 2
    assert "--output" in capsys.readouterr().err
    assert cli.main(["merge", str(file), "--output", "out"]) == 0
    found = Checkpoint(models / "out")
    wanted = merge(
        base=models / "base", models=[models / "one", models / "two"], method="task_arithmetic",
        weights=[1.0, 0.5], scaling=1.0,
    )  # fmt: skip
    assert all(torch.equal(found.tensor(name), wanted[name]) for name in wanted)
    assert cli.main(["merge", str(file), "--output", "out"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["merge", "missing.yml", "--output", "out2"]) == 2


def test_the_output_may_stand_in_the_file(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    file = written(models, {"models": ["one", "two"], "output": "made"})
    assert cli.main(["merge", str(file)]) == 0
    assert (models / "made" / "transfuse.json").is_file()
