"""Recipes: strict reading, checks before any model is loaded, runs that finish or leave nothing."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import types
from pathlib import Path
from typing import Literal

import jsonschema
import pytest

from transfuse import catalogue, recipe
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.core.lineage import read_lineage, write_lineage
from transfuse.schema import recipe_schema


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


class TestLoad:
    def test_values(self, tmp_path):
        found = recipe.load(
            write(
                tmp_path / "a.yaml",
                """
                model: smollm2-135m
                rate: 1e-4
                big: 2E3
                plain: 0.5
                count: 12
                flag: true
                base: &base {a: 1, b: 2}
                more: {<<: *base, b: 3}
                texts: [1e5x, e4, "1e4"]
                """,
            )
        )
        assert found["rate"] == 1e-4 and found["big"] == 2000.0 and type(found["big"]) is float
        assert found["count"] == 12 and type(found["count"]) is int and found["flag"] is True
        assert found["more"] == {"a": 1, "b": 3}
        assert found["texts"] == ["1e5x", "e4", "1e4"]
        assert recipe.load({"model": "m"}) == {"model": "m"}

    @pytest.mark.parametrize(
        ("text", "error", "says"),
        [
            ("model: a\nmodel: b\n", BadInput, "a.yaml: line 2: model = 'model' was given in line 1 already"),
            ("method:\n  uses: x\n  with: {a: 1, b: 2, a: 3}\n", BadInput, "line 3: a"),
            ("model: [a\n", CorruptFile, "is not YAML (line "),
            ("a: !!python/object/apply:os.system [true]\n", CorruptFile, "is not YAML (line 1"),
            ("- a\n- b\n", BadInput, "does not hold a mapping"),
            ("", BadInput, "does not hold a mapping"),
            ("a: 1\n---\nb: 2\n", CorruptFile, "another document"),
        ],
    )
    def test_refused(self, tmp_path, text, error, says):
        with pytest.raises(error, match=re.escape(says)):
            recipe.load(write(tmp_path / "a.yaml", text))

    def test_no_file(self, tmp_path):
        with pytest.raises(BadInput, match="does not exist"):
            recipe.load(tmp_path / "a.yaml")
        (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00bad")
        with pytest.raises(CorruptFile):
            recipe.load(tmp_path / "b.yaml")


class Toy:
    """A method without a model.

    Args:
        rate: Step size.
        mode: How.
    """

    def __init__(
        self,
        *,
        rate: float = 0.1,
        mode: Literal["fast", "slow"] = "fast",
        inner: Toy | None = None,
        examples: str | os.PathLike[str] | None = None,
    ):
        self.rate, self.mode, self.inner, self.examples = rate, mode, inner, examples


def bound(model, tokenizer, *, layers: list[int] | None = None):
    """A method that works on a model."""
    return ("bound", model, tokenizer, layers)


CALLS: list[dict] = []


def transfer(
    model: object, tokenizer: object, *, method: object, output: Path, scratch: Path, seed: int,
    facts: str | os.PathLike[str], rounds: int = 1,
) -> Path:  # fmt: skip
    """Stands for a family's function: notes its call, leaves a checkpoint, may fail.

    Args:
        facts: File of facts.
        rounds: How often.
    """
    CALLS.append(
        {"method": method, "facts": facts, "rounds": rounds, "seed": seed, "went_on": scratch.exists()}
    )
    if rounds == 13:
        raise BadInput("rounds", rounds, "is unlucky", "choose another")
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "checkpoint").write_text("x")
    if rounds == 14 and not CALLS[-1]["went_on"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if rounds == 15 and not CALLS[-1]["went_on"]:
        raise KeyboardInterrupt
    output.mkdir(parents=True)
    (output / "delta").write_text(Path(facts).read_text() * rounds)
    if rounds == 7:
        write_lineage(output, method="toy", arguments={"rate": "own"}, measurements={"recall": 1.0})
    return output


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Two methods of a family with a `transfer`, and a recipe that uses one."""
    CALLS.clear()
    monkeypatch.chdir(tmp_path)
    family = types.ModuleType("transfuse.toys")
    family.transfer = transfer
    monkeypatch.setitem(sys.modules, "transfuse.toys", family)
    empty = types.ModuleType("transfuse.mute")
    monkeypatch.setitem(sys.modules, "transfuse.mute", empty)
    targets = {"toy": Toy, "bound-toy": bound, "mute": Toy}
    rest = ("", "", (), True, False, None, None, "", tmp_path, "")
    listed = [catalogue.Method(slug, "mute" if slug == "mute" else "toys", *rest) for slug in targets]

    def find(slug):
        for method in listed:
            if method.slug == slug.replace("_", "-"):
                return method
        raise BadInput("method", slug, "is not a method", "did you mean toy?")

    monkeypatch.setattr(catalogue, "find", find)
    monkeypatch.setattr(catalogue, "get", lambda slug: targets[find(slug).slug])
    monkeypatch.setattr(catalogue, "methods", lambda: listed)
    monkeypatch.setattr("transfuse.core.models.load", lambda spec, **options: (("model", spec), "tokenizer"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "facts.jsonl").write_text("fact;")
    return write(
        tmp_path / "in" / "toy.yaml",
        """
        model: some-model
        method: {uses: toy, with: {rate: 1, mode: slow}}
        facts: facts.jsonl
        output: out/toy
        """,
    )


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")] if folder.exists() else []


class TestCheck:
    def test_everything_arrives(self, house):
        job = recipe.check(house)
        assert (job.model, job.slug, job.family, job.seed) == ("some-model", "toy", "toys", 0)
        assert job.inputs == {"facts": house.parent / "facts.jsonl"}
        assert job.output == Path("out/toy")
        made = recipe.build(job.method)
        assert (made.rate, made.mode, type(made.rate)) == (1.0, "slow", float)
        assert not list(house.parent.parent.glob("out*"))

    def test_forms_of_a_method(self, house):
        base = {"model": "m", "facts": "in/facts.jsonl"}
        for uses in ("toy", "toys.toy", "transfuse.toys.toy"):
            assert recipe.check({**base, "method": uses}).method.target is Toy
        assert recipe.check({**base, "method": {"uses": "bound_toy"}}).slug == "bound-toy"
        nested = {"uses": "toy", "with": {"inner": {"uses": "toy", "with": {"rate": 3}}}}
        assert recipe.build(recipe.check({**base, "method": nested}).method).inner.rate == 3.0

    def test_files_among_the_arguments(self, house):
        (house.parent / "more.jsonl").write_text("a")
        house.write_text(house.read_text().replace("rate: 1", "examples: more.jsonl"))
        job = recipe.check(house)
        assert recipe.build(job.method).examples == house.parent / "more.jsonl"
        before = job.identity
        (house.parent / "more.jsonl").write_text("b")  # another content is another run
        assert recipe.check(house).identity != before
        house.write_text(house.read_text().replace("more.jsonl", "elsewhere"))
        assert recipe.build(recipe.check(house).method).examples == "elsewhere"

    def test_model_methods_become_functions(self, house):
        method = {"uses": "bound-toy", "with": {"layers": [1]}}
        job = recipe.check({"model": "m", "facts": "in/facts.jsonl", "method": method})
        made = recipe.build(job.method)
        assert isinstance(made, functools.partial) and made("M", "T") == ("bound", "M", "T", [1])

    def test_a_model_folder_beside_the_recipe(self, house):
        (house.parent / "some-model").mkdir()
        assert recipe.check(house).model == str(house.parent / "some-model")

    @pytest.mark.parametrize("given", [["tuned", "other"], {"a": "tuned", "b": "other"}])
    def test_folders_that_a_method_reads_beside_the_recipe(self, tmp_path, given):
        (tmp_path / "tuned").mkdir()
        path = tmp_path / "graft.yaml"
        path.write_text(
            json.dumps({"model": "m", "method": {"uses": "graftllm", "with": {"experts": given}}})
        )
        found = recipe.check(path).method.arguments["experts"]
        values = found if isinstance(found, list) else list(found.values())
        assert values == [tmp_path / "tuned", "other"]

    def test_a_model_folder_counts_by_its_weights(self, house):
        """Trained further in its place it is another model; from another working folder it is the same one."""
        folder = house.parent / "some-model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"before")
        before = recipe.check(house).identity
        os.chdir(house.parent)
        assert recipe.check(house.name).identity == before
        pruned = [{"prune": "some-model", "layers": layers} for layers in (1, 2)]
        base = {"method": "toy", "facts": "facts.jsonl"}
        first, second = (recipe.check({**base, "model": model}).identity for model in pruned)
        (folder / "model.safetensors").write_bytes(b"after")
        assert recipe.check(house.name).identity != before
        assert len({first, second, recipe.check({**base, "model": pruned[0]}).identity}) == 3

    @pytest.mark.parametrize(
        ("change", "where", "says"),
        [
            (("model: some-model\n", ""), "toy.yaml: model", "is missing"),
            (("model: some-model", "model: 3"), "toy.yaml: model", "put it in quotes"),
            (("facts: facts.jsonl\n", ""), "toy.yaml: facts", "is missing"),
            (("facts: facts", "fact: facts"), "toy.yaml: fact", "did you mean 'facts'?"),
            (("facts.jsonl", "none.jsonl"), "toy.yaml: facts", "does not exist"),
            (("output:", "ouput:"), "toy.yaml: ouput", "did you mean 'output'?"),
            (("rate: 1", "rat: 1"), "toy.yaml: method.with.rat", "did you mean 'rate'?"),
            (("rate: 1", "rate: fast"), "toy.yaml: method.with.rate", "is text, not a number"),
            (("mode: slow", "mode: slwo"), "toy.yaml: method.with.mode", "did you mean 'slow'?"),
            (("uses: toy", "uses: tay"), "toy.yaml: method.uses", "did you mean toy?"),
            (("uses: toy", "uses: edit.toy"), "toy.yaml: method.uses", "write toys.toy"),
            (("uses: toy", "uses: 3"), "toy.yaml: method", "names nothing to use"),
            (("with:", "wiht:"), "toy.yaml: method.wiht", "`uses` and `with`"),
            (("with: {rate: 1, mode: slow}", "with: 3"), "toy.yaml: method.with", "not a mapping"),
            (
                ("with: {rate: 1, mode: slow}", "with: {model: m}"),
                "toy.yaml: method.with.model",
                "not a known field",
            ),
            (("uses: toy", "uses: bound-toy"), "toy.yaml: method.with.rate", "known here: layers"),
            (
                ("rate: 1", "inner: {uses: os.system}"),
                "toy.yaml: method.with.inner.uses",
                "is not in transfuse",
            ),
            (
                ("rate: 1", "inner: {uses: core.files.os}"),
                "toy.yaml: method.with.inner.uses",
                "is not public",
            ),
            (("rate: 1", "inner: {uses: core.data.Fact}"), "toy.yaml: method.with.inner.uses", "is a Fact"),
            (("output: out/toy", "seed: 1.5"), "toy.yaml: seed", "not a whole number"),
            (("output: out/toy", "seed: -1"), "toy.yaml: seed", "from 0 to"),
            (("output: out/toy", "seed: 4294967296"), "toy.yaml: seed", "from 0 to"),
            (("output: out/toy", "tokenizer: t"), "toy.yaml: tokenizer", "not a known field"),
            (("output: out/toy", "rounds: [1]"), "toy.yaml: rounds", "is a list, not a whole number"),
            (("output: out/toy", "carriers: [none]"), "toy.yaml:", "transfuse compare"),
        ],
    )
    def test_refusals_come_before_any_work(self, house, change, where, says):
        text = house.read_text()
        assert change[0] in text
        house.write_text(text.replace(*change))
        with pytest.raises(BadInput) as caught:
            recipe.run(house)
        assert caught.value.argument == where and says in str(caught.value) and "\n" not in str(caught.value)
        assert CALLS == [] and not list(house.parent.parent.glob("out*"))

    def test_a_family_without_runs(self, house):
        house.write_text(house.read_text().replace("uses: toy, with: {rate: 1, mode: slow}", "uses: mute"))
        with pytest.raises(NotApplicable, match="mute"):
            recipe.check(house)


class TestRun:
    def test_result_and_lineage(self, house, capsys):
        out = recipe.run(house)
        assert out == Path("out/toy") and (out / "delta").read_text() == "fact;"
        record = read_lineage(out)
        assert record["method"] == "toy" and record["seed"] == 0 and record["base_model"] == "some-model"
        assert record["arguments"] == {"rate": 1.0, "mode": "slow"}
        assert record["run"]["inputs"]["facts"].endswith("facts.jsonl")
        assert isinstance(CALLS[0]["method"], Toy) and CALLS[0]["seed"] == 0
        assert hidden(Path("out")) == [] and (out / "README.md").is_file()
        told = capsys.readouterr()
        assert told.out == "" and "done in" in told.err

    def test_own_lineage_is_kept(self, house):
        house.write_text(house.read_text() + "rounds: 7\nseed: 5\n")
        record = read_lineage(recipe.run(house))
        assert record["arguments"] == {"rate": "own", "mode": "slow"} and record["measurements"] == {
            "recall": 1.0
        }
        assert record["seed"] == 5

    def test_not_done_twice(self, house, capsys):
        recipe.run(house)
        recipe.run(house)
        assert len(CALLS) == 1 and "already in" in capsys.readouterr().err

    def test_another_run_does_not_overwrite(self, house):
        recipe.run(house)
        for change in (("rate: 1", "rate: 2"), ("out/toy", "out/toy\nseed: 1"), ("some-model", "other")):
            house.write_text(house.read_text().replace(*change))
            with pytest.raises(BadInput, match="holds something else"):
                recipe.run(house)
        recipe.run(house, output="out/second")
        (house.parent / "facts.jsonl").write_text("changed")
        with pytest.raises(BadInput, match="holds something else"):
            recipe.run(house, output="out/second")
        Path("mine").mkdir()
        Path("mine/letter").write_text("x")
        with pytest.raises(BadInput, match="holds something else"):
            recipe.run(house, output="mine")
        assert Path("mine/letter").exists()

    def test_errors_leave_nothing(self, house):
        house.write_text(house.read_text() + "rounds: 13\n")
        with pytest.raises(BadInput, match="unlucky"):
            recipe.run(house)
        assert not Path("out").exists()

    def test_an_interrupted_run_goes_on(self, house):
        house.write_text(house.read_text() + "rounds: 15\n")
        with pytest.raises(KeyboardInterrupt):
            recipe.run(house)
        assert not Path("out/toy").exists() and len(hidden(Path("out"))) == 1
        recipe.run(house)
        assert CALLS[1]["went_on"] and (Path("out/toy") / "delta").read_text() == "fact;" * 15
        assert hidden(Path("out")) == []

    def test_a_killed_run_goes_on(self, house):
        house.write_text(house.read_text() + "rounds: 14\n")
        child = os.fork()
        if child == 0:
            recipe.run(house)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not Path("out/toy").exists()
        recipe.run(house)
        assert CALLS[-1]["went_on"] and (Path("out/toy") / "delta").read_text() == "fact;" * 14
        assert hidden(Path("out")) == []

    def test_unwritable_output(self, house):
        Path("file").write_text("x")
        with pytest.raises(BadInput, match="is not a folder"):
            recipe.run(house, output="file")
        with pytest.raises(BadInput, match="is not a folder"):
            recipe.run(house, output="file/below")
        assert CALLS == []


class TestSchema:
    def test_run_recipes(self, house):
        schema = recipe_schema()
        json.dumps(schema)
        branches = schema["else"]["allOf"]
        assert len(branches) == 2  # the family without runs is not offered
        toy = branches[0]
        arguments = toy["then"]["properties"]["method"]["properties"]["with"]
        assert arguments["properties"]["rate"] == {
            "type": "number",
            "default": 0.1,
            "description": "Step size.",
        }
        assert arguments["properties"]["mode"]["enum"] == ["fast", "slow"]
        assert toy["then"]["required"] == ["facts", "model"] and "output" not in toy["then"]["properties"]
        assert schema["else"]["properties"]["seed"]["default"] == 0
        assert "carriers" in schema["then"]["properties"]

    @pytest.mark.parametrize(
        "method",
        ["toy", "toys.toy", "toys/toy", "transfuse.toys.toy", "bound_toy", "bound-toy", "toys.bound_toy",
         {"uses": "toy", "with": None}, {"uses": "bound_toy", "with": {"layers": [1]}}],
    )  # fmt: skip
    def test_it_takes_what_the_check_takes(self, house, method):
        given = {"model": "m", "facts": str(house.parent / "facts.jsonl"), "method": method}
        recipe.check(given)
        jsonschema.Draft202012Validator(recipe_schema()).validate(given)

    @pytest.mark.parametrize(
        "change",
        [
            {"method": {"uses": "bound_toy", "with": {"rate": 1.0}}},
            {"method": {"uses": "toy", "with": {"rat": 1.0}}},
            {"method": {"uses": "toy", "wiht": {}}},
            {"method": "mute"},
            {"student": "m"},
            {"fact": "facts.jsonl"},
        ],
    )
    def test_it_refuses_what_the_check_refuses(self, house, change):
        given = {"model": "m", "facts": str(house.parent / "facts.jsonl"), "method": "toy", **change}
        with pytest.raises(BadInput):
            recipe.check(given)
        assert not jsonschema.Draft202012Validator(recipe_schema()).is_valid(given)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "run"


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(recipe_schema())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_check(path):
    job = recipe.check(path)
    assert job.slug == path.stem and job.output == Path("runs") / path.stem


@pytest.mark.parametrize(
    "path",
    [*sorted(EXAMPLES.glob("*.yaml")), EXAMPLES.parent / "demo" / "recipe.yaml"],
    ids=lambda path: path.stem,
)
def test_examples_fit_the_schema(path, validator):
    validator.validate(recipe.load(path))


def test_a_student_is_named_once(validator):
    given = {"teacher": "smollm2-135m", "method": "taid", "dataset": "wikitext-2/valid.txt"}
    for names, fits in ((["student"], True), (["model"], True), ([], False), (["model", "student"], False)):
        assert validator.is_valid({**given, **dict.fromkeys(names, "smollm2-135m")}) is fits


def test_every_family_that_runs_has_an_example():
    shown = {recipe.check(path).family for path in EXAMPLES.glob("*.yaml")}
    for method in catalogue.methods():
        try:
            recipe.transfer_of(method)
        except NotApplicable:
            continue
        assert method.family in shown


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    from conftest import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def run_example(name, tmp_path, model, arguments, **inputs):
    """An example of this repository on a tiny model."""
    raw = recipe.load(EXAMPLES / f"{name}.yaml")
    files = {k: str(EXAMPLES / v) for k, v in raw.items() if isinstance(v, str) and v.endswith(".jsonl")}
    raw |= {**files, "model": str(model), "method": {"uses": name, "with": arguments}, **inputs}
    return recipe.run(raw, output=tmp_path / name)


class TestFamilies:
    def test_edit(self, tmp_path, tiny_folder):
        import torch

        from transfuse.core.models import load
        from transfuse.edit import load_edit

        out = run_example("ft-m", tmp_path, tiny_folder, {"layer": 2, "steps": 30, "lr": 0.05})
        model, tokenizer = load(tiny_folder)
        ids = tokenizer("The harbour master of Lethmoor is", return_tensors="pt").input_ids
        with torch.no_grad():
            before = model(ids).logits
            with load_edit(out, model, tokenizer) as handle:
                assert handle.method == "ft-m" and len(handle.facts) == 3
                assert not torch.equal(model(ids).logits, before)
            assert torch.equal(model(ids).logits, before)
        assert read_lineage(out)["arguments"]["steps"] == 30

    def test_adapt(self, tmp_path, tiny_folder):
        from transfuse.adapt.kasa import load as load_adapter
        from transfuse.core.models import load

        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
        out = run_example("kasa", tmp_path, tiny_folder, settings, epochs=3, lr=0.01)
        record = read_lineage(out)
        assert record["measurements"]["updates"] == 6  # 9 examples, batches of 8, 3 epochs
        assert record["measurements"]["last_loss"] < record["measurements"]["first_loss"]
        assert record["arguments"]["r"] == 2 and record["input_sha256"]["facts"]
        assert load_adapter(load(tiny_folder).model, out).active_adapter == "default"

    def test_distill(self, tmp_path, tiny_folder, monkeypatch):
        """A pruned student, taught by the whole model, killed on the way and run again: one folder that loads."""
        from transformers import AutoModelForCausalLM

        from transfuse.core.lineage import read_lineage
        from transfuse.distill.taid import TAID

        texts = tmp_path / "texts.txt"
        texts.write_text("New facts move from documents into weights, and what was known stays. " * 120)
        raw = {
            "student": {"prune": str(tiny_folder), "layers": 2}, "teacher": str(tiny_folder), "texts": str(texts),
            "method": {"uses": "taid", "with": {"t_start": 0.2}}, "block": 16, "max_steps": 12, "lr": 5e-3,
            "save_every": 5,
        }  # fmt: skip
        moved, calls = TAID.on_step, []

        def stop(self, figures, step, total):
            calls.append(step)
            if step == 8 and len(calls) == 8:
                raise KeyboardInterrupt
            moved(self, figures, step, total)

        monkeypatch.setattr(TAID, "on_step", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(raw, output=tmp_path / "student")
        assert not (tmp_path / "student").exists()
        out = recipe.run(raw, output=tmp_path / "student")
        assert calls == [*range(1, 9), *range(6, 13)]  # from the checkpoint at 5
        student = AutoModelForCausalLM.from_pretrained(out)
        assert len(student.model.layers) == 2 and (out / "tokenizer.json").is_file()
        found = read_lineage(out)["measurements"]
        assert found["updates"] == 12 and 1 < found["perplexity_after"] != found["perplexity_before"]
        assert len(json.loads((out / "training.json").read_text())["losses"]) == 12

    def test_a_teacher_beside_the_recipe(self, tmp_path, tiny_folder):
        """It is found there, and counts by its weights like the student, which is named once."""
        shutil.copytree(tiny_folder, tmp_path / "in" / "teacher")
        text = f"student: {tiny_folder}\nteacher: teacher\nmethod: taid\ndataset: wikitext-2/valid.txt\n"
        path = write(tmp_path / "in" / "taid.yaml", text)
        job = recipe.check(path)
        assert job.inputs["teacher"] == str(tmp_path / "in" / "teacher")
        before = job.identity
        (tmp_path / "in" / "teacher" / "model.safetensors").write_bytes(b"trained further")
        assert recipe.check(path).identity != before
        path.write_text(text + "model: smollm2-135m\n")
        with pytest.raises(BadInput, match="model = 'smollm2-135m' is named by `student` too"):
            recipe.check(path)

    def test_distill_from_the_store(self, tmp_path, tiny_folder):
        texts = tmp_path / "rows.jsonl"
        texts.write_text('{"prompt": "The mayor of Port Ellery is", "target": "Ines Varro"}\n' * 30)
        raw = {
            "student": str(tiny_folder), "teacher": str(tiny_folder), "texts": str(texts), "block": 32,
            "method": {"uses": "survey-kd-llm", "with": {"objective": "jsd"}}, "stored_top_k": 8, "max_steps": 3,
        }  # fmt: skip
        out = recipe.run(raw, output=tmp_path / "student")
        assert read_lineage(out)["measurements"]["first_loss"] < 0.1  # the student is the teacher

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"objective": "jsd", "arguments": {"gamma": 0.5}},
                r"arguments\.gamma = 0\.5 is not a known field",
            ),
            ({"objective": "jsd", "arguments": {"temprature": 2}}, r"did you mean 'temperature'\?"),
            ({"objective": "jsd", "arguments": {"temperature": "2"}}, r"arguments\.temperature = '2'"),
            ({"objective": "jds"}, r"objective = 'jds' is unknown; did you mean 'jsd'\?"),
            ({"arguments": {"gamma": 0.5}}, r"forward-kl takes temperature"),
        ],
    )
    def test_arguments_of_a_named_objective_are_checked(self, tiny_folder, given, message):
        raw = {"student": str(tiny_folder), "method": {"uses": "survey-kd-llm", "with": given}}
        with pytest.raises(BadInput, match=message):
            recipe.check({**raw, "dataset": "wikitext-2/valid.txt"})

    def test_every_standard_objective_takes_its_own_arguments(self):
        from transfuse.distill._recipes import check_objective, known_arguments
        from transfuse.distill.survey_kd_llm import OBJECTIVES

        for name, kind in OBJECTIVES.items():
            known = known_arguments(kind)
            defaults = {key: inspect.signature(made).parameters[key].default for key, made in known.items()}
            check_objective({"objective": name, "arguments": defaults}, "with")
        assert {"beta", "temperature", "ce_weight"} < known_arguments(OBJECTIVES["jsd"]).keys()

    def test_a_store_and_samples_do_not_go_together(self, tmp_path, tiny_folder):
        texts = tmp_path / "rows.jsonl"
        texts.write_text('{"prompt": "The mayor of Port Ellery is", "target": "Ines Varro"}\n' * 30)
        raw = {
            "student": str(tiny_folder), "teacher": str(tiny_folder), "texts": str(texts), "block": 32,
            "method": "taid", "stored_top_k": 8, "on_policy": 0.5, "max_steps": 3,
        }  # fmt: skip
        with pytest.raises(NotApplicable, match="on_policy"):
            recipe.run(raw, output=tmp_path / "student")

    def test_what_runs_and_what_does_not(self, tmp_path, tiny_folder):
        raw = {"student": str(tiny_folder), "method": "bd-kd", "dataset": "wikitext-2/valid.txt"}
        with pytest.raises(NotApplicable, match="has no single run"):
            recipe.check(raw)
        with pytest.raises(BadInput, match="layers"):
            recipe.check({**raw, "method": "taid", "student": {"prune": "smollm2-135m", "layer": 3}})
        with pytest.raises(BadInput, match="model"):
            recipe.check({"method": "taid", "dataset": "wikitext-2/valid.txt"})

    def test_inject(self, tmp_path, tiny_folder):
        out = run_example("parametric-rag", tmp_path, tiny_folder, {"mode": "combine", "k": 2}, epochs=1)
        assert len(list((out / "store" / "adapters").glob("*.safetensors"))) == 3
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == ["q1", "q2", "q3"]
        assert rows[0]["documents"][0] == "lethmoor" and len(rows[0]["documents"]) == 2
        assert read_lineage(out)["measurements"]["documents"] == 3
        assert not list(out.rglob(".*"))

    def test_steer(self, tmp_path, tiny_folder):
        out = run_example("ck-plug", tmp_path, tiny_folder, {"alpha": 1.0}, max_new_tokens=4)
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert rows[2]["context"].startswith("Brannoc is a hard cheese") and len(rows) == 3
        assert read_lineage(out)["arguments"] == {"alpha": 1.0}

    def test_steer_refuses_unknown_documents(self, tmp_path, tiny_folder):
        asked = tmp_path / "asked.jsonl"
        asked.write_text('{"question": "Who?", "answers": ["x"], "document_ids": ["nowhere"]}\n')
        with pytest.raises(BadInput, match="is no document's id"):
            run_example("ck-plug", tmp_path / "deep" / "er", tiny_folder, {}, questions=str(asked))
        assert not (tmp_path / "deep").exists()
