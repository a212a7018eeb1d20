"""KnowEdit: figures against loops of single passes, record formats, protocol, and what must be left alone."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from transfuse.bench._base import summarise
from transfuse.bench.knowedit import evaluate_edits, portability_of, read_records, reply_success
from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, TrainingDiverged
from transfuse.core.generate import encode_pair
from transfuse.core.metrics import fluency
from transfuse.core.models import fingerprint
from transfuse.edit import edit
from transfuse.edit._base import Editor, PromptEdit
from transfuse.edit.ft_m import FTM

FACTS = [
    Fact(
        "Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld", ("Port Ellery is led by", "Its mayor is"),
        ("The mayor of Quenby is", "The river Ostrin"),
        portability=(
            ("Reasoning", "The bridge of the mayor", ("in Quenby", "the bridge")),
            ("Reasoning", "Who is Ines Varro?", ("a mayor",)),
            ("Alias", "The town Ellery's mayor", ("Tveld", "Oskar")),
        ),
        id="7",
    ),
    Fact("Spain", "The capital of Spain is", "Quenby", neighbours=("The capital of France is",)),
]  # fmt: skip


def make(**changes):
    """Arguments of a small evaluation."""
    return {"method": FTM(layer=3, lr=2e-2, steps=8), "generated_tokens": 6, "answer_tokens": 3, **changes}


def best(model, ids):
    return int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


def share(model, tokenizer, prompt, target):
    """Share of target tokens that are the argmax, each from a pass of its own."""
    before, after = encode_pair(tokenizer, prompt, target)
    return sum(best(model, before + after[:i]) == token for i, token in enumerate(after)) / len(after)


def continuation(model, tokenizer, prompt, count):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        ids = [*ids, best(model, ids)]
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)


def answers(model, tokenizer, prompt, text):
    before, after = encode_pair(tokenizer, prompt, text)
    return [best(model, before + after[:i]) for i in range(len(after))]


def test_figures_are_those_of_the_loops(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama", seed=3)
    said = {n: continuation(model, tiny_tokenizer, n, 3).strip() or "." for f in FACTS for n in f.neighbours}
    old = {n: answers(model, tiny_tokenizer, n, text) for n, text in said.items()}
    how = make()
    result = evaluate_edits(model, tiny_tokenizer, FACTS, **how)
    assert [r["record"] for r in result.records] == ["7", FACTS[1].prompt]
    for fact, record in zip(FACTS, result.records):
        with edit(model, tiny_tokenizer, fact, method=how["method"]):
            wanted = {
                "edit_success": share(model, tiny_tokenizer, fact.prompt, fact.target),
                "locality": sum(
                    sum(a == b for a, b in zip(old[n], answers(model, tiny_tokenizer, n, said[n])))
                    / len(old[n])
                    for n in fact.neighbours
                )
                / len(fact.neighbours),
                "fluency": fluency(continuation(model, tiny_tokenizer, fact.prompt, 6)),
            }
            text = continuation(model, tiny_tokenizer, fact.prompt, 6)
            wanted["exact_match"] = float(re.match(rf"{fact.target}(?!\w)", text.strip(), re.I) is not None)
            if fact.paraphrases:
                wanted["paraphrase_success"] = sum(
                    share(model, tiny_tokenizer, p, fact.target) for p in fact.paraphrases
                ) / len(fact.paraphrases)
            if fact.portability:
                each = [
                    max(share(model, tiny_tokenizer, p, a) for a in accepted)
                    for _, p, accepted in fact.portability
                ]
                wanted["portability"] = sum(each) / 3
                wanted["portability_reasoning"] = sum(each[:2]) / 2
                wanted["portability_alias"] = each[2]
        assert record.pop("seconds") > 0
        assert record.pop("text").strip() == text.strip()
        record.pop("record")
        assert record == pytest.approx(wanted)
    assert 0 < result.means["locality"] < 1  # not the same everywhere, or there was nothing to compare


def test_locality_reads_the_answer_of_the_record(tiny_lm, tiny_tokenizer):
    """One neighbour, three answers in three records: two told, the other the model's own."""
    model, neighbour = tiny_lm("llama", seed=3), "The capital of France is"
    told = ("Paris, since long ago", "the river Ostrin", None)
    facts = [
        Fact("Spain", "The capital of Spain is", "Quenby", (), (neighbour,), neighbour_answers=(answer,))
        for answer in told
    ]
    own = continuation(model, tiny_tokenizer, neighbour, 3).strip() or "."
    read = [answer or own for answer in told]
    old = [answers(model, tiny_tokenizer, neighbour, text) for text in read]
    how = make()
    result = evaluate_edits(model, tiny_tokenizer, facts, **how)
    with edit(model, tiny_tokenizer, facts[0], method=how["method"]):
        new = [answers(model, tiny_tokenizer, neighbour, text) for text in read]
    wanted = [sum(a == b for a, b in zip(o, n, strict=True)) / len(o) for o, n in zip(old, new, strict=True)]
    assert [record["locality"] for record in result.records] == pytest.approx(wanted)
    assert len(set(wanted)) > 1
    assert evaluate_edits(model, tiny_tokenizer, facts, **{**how, "method": None}).means["locality"] == 1.0


def test_the_unedited_model(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    how = {**make(), "method": None}
    result = evaluate_edits(model, tiny_tokenizer, FACTS, **how)
    assert result.means["locality"] == 1.0
    assert "seconds" not in result.summary
    assert result.records[1]["edit_success"] == share(model, tiny_tokenizer, FACTS[1].prompt, FACTS[1].target)


def test_modes(tiny_lm, tiny_tokenizer):
    """Batch and sequential measure all facts on one edited model; single does so fact by fact."""
    model = tiny_lm("llama")
    before = fingerprint(model)
    found = {}
    for mode in ("single", "batch", "sequential"):
        found[mode] = evaluate_edits(model, tiny_tokenizer, FACTS, mode=mode, **make())
        assert fingerprint(model) == before
    alone = [evaluate_edits(model, tiny_tokenizer, [fact], **make()).records[0] for fact in FACTS]
    for record, other in zip(found["single"].records, alone):
        assert {k: v for k, v in record.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    for mode in ("batch", "sequential"):
        with edit(model, tiny_tokenizer, FACTS, mode=mode, method=make()["method"]):
            wanted = [share(model, tiny_tokenizer, f.prompt, f.target) for f in FACTS]
        assert [r["edit_success"] for r in found[mode].records] == wanted


def test_batch_size_does_not_matter(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    a, b = (
        evaluate_edits(model, tiny_tokenizer, FACTS, mode="batch", batch_size=size, **make())
        for size in (1, 7)
    )
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in a.records] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in b.records
    ]


class Told(PromptEdit):
    """Says something before every question."""

    kind = "test-told"

    def tensors(self):
        return {}

    @classmethod
    def restore(cls, tensors, meta):
        return cls()

    def rewrite(self, prompt):
        return f"In Quenby. {prompt}"


class Teller(Editor):
    """Its edit rewrites the prompt."""

    def fit(self, model, tokenizer, facts):
        return Told()


def test_edits_that_work_through_the_prompt(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama", seed=5)
    result = evaluate_edits(model, tiny_tokenizer, FACTS[1:], **make(method=Teller()))
    (record,) = result.records
    assert record["edit_success"] == share(
        model, tiny_tokenizer, "In Quenby. The capital of Spain is", "Quenby"
    )
    told = continuation(model, tiny_tokenizer, "In Quenby. The capital of Spain is", 6)
    assert record["text"].strip() == told.strip()
    assert result.means["locality"] < 1


def test_generation_can_be_left_out(tiny_lm, tiny_tokenizer):
    result = evaluate_edits(
        tiny_lm("llama"), tiny_tokenizer, FACTS, method="ft-m", layer=1, steps=0, generated_tokens=0
    )
    assert {"fluency", "exact_match"}.isdisjoint(result.summary) and result.means["locality"] == 1.0


def test_portability_by_hand():
    got = portability_of([("Reasoning", [0.0, 0.5]), ("Reasoning", [1.0]), ("Alias", [0.25, 0.0, 0.75])])
    assert got == {"portability": 0.75, "portability_reasoning": 0.75, "portability_alias": 0.75}
    assert portability_of([]) == {}


def test_reply_success_by_hand():
    sigmoid = 1 / (1 + math.exp(-1.5))
    assert reply_success([-1.0, -2.0], [-3.0], [-4.0]) == pytest.approx(sigmoid)  # wanted replies gained
    lost = reply_success([-1.0, -2.0], [-3.0], [-1.0])  # or lost half a nat
    assert lost == pytest.approx(sigmoid * math.exp(-0.5))
    assert reply_success([-1.0], [-1.0], [-1.0]) == 0.5


def test_summary_is_over_those_that_have_the_figure():
    result = summarise([{"record": "a", "x": 1.0, "y": 0}, {"record": "b", "x": 0.0}])
    assert result.summary["x"][0] == 0.5 and result.summary["x"].size == 2
    assert result.summary["y"] == (0.0, 0.0, 0.0, 1)
    assert result.summary["x"].low <= 0.5 <= result.summary["x"].high
    assert json.loads(json.dumps(result.to_dict()))["summary"]["x"]["mean"] == 0.5


# --- records ---------------------------------------------------------------------------------------------------


def test_formats(tmp_path):
    rows = [
        {
            "case_id": 3, "subject": "Spain", "prompt": "Spain's capital is", "target_new": "Rome",
            "ground_truth": "Madrid", "rephrase_prompt": "Spain is led from", "locality_prompt": "Italy's is",
            "locality_ground_truth": "Rome",
        },
        {
            "subject": "UniFirst", "src": "What does UniFirst make?", "pred": "uniform", "alt": "aircraft",
            "rephrase": "UniFirst's product?", "answers": ["uniform", "uniforms"], "loc": "nq question: who",
            "loc_ans": "x", "cond": "",
        },
        {
            "subject": "Leo", "prompt": "Leo is a citizen of", "target_new": "Syria", "ground_truth": [["USA", "US"]],
            "portability": {
                "Reasoning": [
                    {"prompt": "Leo's capital is", "ground_truth": [["Damascus", "Dimashq"]]},
                    {"prompt": "unanswered", "ground_truth": []},
                ],
                "Subject_Aliasing": [{"prompt": "Leonardo is from", "ground_truth": "Syria"}],
                "Logical_Generalization": None,
            },
            "locality": {
                "Relation_Specificity": [{"prompt": "Leo's mother is", "ground_truth": [["Irmelin", "Irma"]]}],
                "Forgetfulness": [{"prompt": "Leo lives in", "ground_truth": []}],
            },
        },
        {"subject": "a", "prompt": "a is", "target": "b", "paraphrases": ["so a is"], "neighbours": ["c is"]},
    ]  # fmt: skip
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    assert read_records(path) == read_records(rows)
    counterfact, zsre, knowedit, plain = read_records(path)
    assert counterfact == Fact(
        "Spain", "Spain's capital is", "Rome", ("Spain is led from",), ("Italy's is",), "Madrid", id="3",
        neighbour_answers=("Rome",),
    )  # fmt: skip
    assert zsre == Fact(
        "UniFirst", "What does UniFirst make?", "aircraft", ("UniFirst's product?",), ("nq question: who",), "uniform",
        neighbour_answers=("x",),
    )  # fmt: skip
    assert knowedit.portability == (
        ("Reasoning", "Leo's capital is", ("Damascus", "Dimashq")),
        ("Subject_Aliasing", "Leonardo is from", ("Syria",)),
    )
    assert knowedit.answered_neighbours == (("Leo's mother is", "Irmelin"), ("Leo lives in", None))
    assert knowedit.ground_truth == "USA"
    assert plain == Fact("a", "a is", "b", ("so a is",), ("c is",))
    assert read_records([plain]) == [plain]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"locality_prompt": ["c is", "d is"], "locality_ground_truth": ["e", ["f", "g"]]}, ("e", "f")),
        ({"locality_prompt": ["c is", "d is"]}, ()),
        ({"locality_prompt": "c is", "locality_ground_truth": ["e", "f"]}, ("e",)),
        ({"loc": "c is", "loc_ans": ""}, ()),
        ({"neighbours": ["c is"], "neighbour_answers": ["e"]}, ("e",)),
        (
            {"neighbours": ["c is"], "locality": {"x": [{"prompt": "d is", "ground_truth": "f"}]}},
            (None, "f"),
        ),
        (
            {
                "loc": "c is", "loc_ans": "e",
                "locality": {"x": [{"prompt": "d is", "ground_truth": [["f"]]}, {"prompt": "g is"}]},
            },
            ("e", "f", None),
        ),
    ],
)  # fmt: skip
def test_neighbours_keep_their_own_answers(fields, wanted):
    (fact,) = read_records([{"subject": "a", "prompt": "a is", "target_new": "b", **fields}])
    assert fact.neighbours[: len(wanted)] == ("c is", "d is", "g is")[: len(wanted)]
    assert fact.neighbour_answers == wanted


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"subject": "a", "prompt": "a is"}, "target"),
        ({"subject": "a", "prompt": "a is", "target_new": " "}, "target.*empty"),
        ({"subject": "b", "prompt": "a is", "target_new": "c"}, "subject = 'b' is not in the prompt"),
        (
            {"subject": "a", "prompt": "a is", "target_new": "c", "portability": {"x": [{"q": 1}]}},
            "portability.x",
        ),
        (
            {"subject": "a", "prompt": "a is", "target": "c", "loc": ["d", "e"], "loc_ans": "f"},
            "are 1 for 2 neighbours",
        ),
        ("text", "not a record"),
    ],
)
def test_bad_records(row, named):
    with pytest.raises(BadInput, match=named):
        read_records([{"subject": "a", "prompt": "a is", "target": "ok"}, row])


def test_bad_arguments_come_before_any_work(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model was run"))
    for arguments, named in (
        ({"mode": "all"}, "mode"),
        ({"method": "ft-n"}, "ft-m"),
        ({"layer": 1}, "beside an editor"),
        ({"method": "ft-m", "layer": 99}, "layer"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"answer_tokens": 2.5}, "answer_tokens = 2.5"),
        ({"generated_tokens": -1}, "generated_tokens = -1"),
    ):
        with pytest.raises(BadInput, match=named):
            evaluate_edits(model, tiny_tokenizer, FACTS, **make(**arguments))
    for fact, named in (
        (Fact("a", "a is", ""), "target"),
        ({"subject": "a", "prompt": "a is"}, "target"),
        (Fact("a", "a is", "b", neighbour_answers=("c",)), "neighbour_answers.*are 1 for 0 neighbours"),
    ):
        for method in (make()["method"], None):
            with pytest.raises(BadInput, match=named):
                evaluate_edits(model, tiny_tokenizer, [fact], **make(method=method))


def test_an_error_midway_leaves_the_model(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    before = fingerprint(model)

    class Failing(FTM):
        def fit(self, model, tokenizer, facts):
            if facts[0] == FACTS[1]:
                raise TrainingDiverged("no")
            return super().fit(model, tokenizer, facts)

    for mode in ("single", "sequential"):
        with pytest.raises(TrainingDiverged):
            evaluate_edits(model, tiny_tokenizer, FACTS, **make(method=Failing(layer=1, steps=1), mode=mode))
        assert fingerprint(model) == before
