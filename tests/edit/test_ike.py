"""IKE: the text that is asked with, and which demonstrations and facts are chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from transfuse.bench.knowedit import read_records
from transfuse.core.data import Fact
from transfuse.core.errors import BadInput
from transfuse.core.generate import target_nll
from transfuse.edit import edit, ike, load_edit
from transfuse.edit.ike import IKE, demonstrations, new_fact_prompt

FACTS = [
    Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld"),
    Fact("Spain", "The capital of Spain is", "Quenby"),
]
POOL = [
    Fact(
        "Italy", "The capital of Italy is", "Turin", ("Italy is governed from",), ("Malta is led from", "Rome lies in"),
        "Rome", neighbour_answers=("Valletta", None),
    ),
    Fact("Ostrin", "The river Ostrin flows into", "the sea", ("Ostrin ends in", "The Ostrin joins")),
    Fact("Spain", "The capital of Spain is", "Cadiz", ground_truth="Madrid"),
]  # fmt: skip


def make(**changes):
    """An editor and what it is asked to write."""
    return IKE(**changes), FACTS


@pytest.fixture
def words(monkeypatch):
    """Word counts in place of the encoder's vectors; returns the texts asked for."""
    asked = []

    def encode(encoder, texts):
        asked.extend(texts)
        rows = []
        for text in texts:
            row = np.zeros(512, np.float32)
            for word in text.lower().split():
                row[sum(map(ord, word)) % 512] += 1
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)

    monkeypatch.setattr(ike, "_encode", encode)
    return asked


def test_demonstrations_by_hand():
    assert demonstrations(POOL[:2]) == [
        "New Fact: The capital of Italy is Turin\nPrompt: The capital of Italy is Turin\n\n",
        "New Fact: The capital of Italy is Turin\nPrompt: Italy is governed from Turin\n\n",
        "New Fact: The capital of Italy is Turin\nPrompt: Malta is led from Valletta\n\n",
        "New Fact: The river Ostrin flows into the sea\nPrompt: The river Ostrin flows into the sea\n\n",
        "New Fact: The river Ostrin flows into the sea\nPrompt: Ostrin ends in the sea\n\n",
        "New Fact: The river Ostrin flows into the sea\nPrompt: The Ostrin joins the sea\n\n",
    ]
    assert new_fact_prompt("A is", "b", "Is A c?") == "New Fact: A is b\nPrompt: Is A c?"


def test_a_neighbour_is_answered_as_its_record_says_or_left_out():
    """The edited fact's old answer is not the neighbour's: UniFirst made uniforms, Sobchak is no uniform."""
    asked, other = "who plays Goodman", "Malta is led from"
    zsre = {"subject": "UniFirst", "src": "What makes UniFirst?", "alt": "aircraft", "answers": ["uniform"]}
    with_answer, without = read_records(
        [{**zsre, "loc": asked, "loc_ans": "Sobchak"}, {**zsre, "loc": other}]
    )
    copy = "New Fact: What makes UniFirst? aircraft\nPrompt: What makes UniFirst? aircraft\n\n"
    retain = f"New Fact: What makes UniFirst? aircraft\nPrompt: {asked} Sobchak\n\n"
    assert demonstrations([with_answer]) == [copy, retain]
    assert demonstrations([without]) == [copy]
    counterfact = {
        "subject": "Rocard", "prompt": "Rocard speaks", "target_new": "English", "ground_truth": "French",
        "locality_prompt": "Darrieux speaks", "locality_ground_truth": "French",
    }  # fmt: skip
    assert demonstrations(read_records([counterfact]))[1] == (
        "New Fact: Rocard speaks English\nPrompt: Darrieux speaks French\n\n"
    )


def test_without_demonstrations_one_fact_needs_no_encoder(tiny_lm, tiny_tokenizer, words):
    with edit(tiny_lm("llama"), tiny_tokenizer, FACTS[:1], method="ike") as handle:
        text = handle.rewrite("Who governs Port Ellery?")
    assert text == "New Fact: The mayor of Port Ellery is Oskar Tveld\nPrompt: Who governs Port Ellery?"
    assert words == []


def test_the_nearest_come_last_and_the_fact_itself_is_left_out(tiny_lm, tiny_tokenizer, words):
    editor = IKE(demonstrations=POOL, k=3)
    with edit(tiny_lm("llama"), tiny_tokenizer, FACTS[1:], method=editor) as handle:
        text = handle.rewrite("Which city leads Spain?")
        (told,) = handle.edits[0].told
    query = "New Fact: The capital of Spain is Quenby\nPrompt: The capital of Spain is\n\n"
    candidates = demonstrations(POOL[:2])  # the third has the edit's own prompt
    vectors, target = ike._encode("", candidates), ike._encode("", [query])[0]
    scores = [float(v @ target) for v in vectors]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:3]
    assert told.shown == [candidates[i] for i in reversed(order)]
    assert (
        text
        == "".join(told.shown) + "New Fact: The capital of Spain is Quenby\nPrompt: Which city leads Spain?"
    )
    assert text.count("New Fact:") == 4 and "Cadiz" not in text


def test_the_fact_nearest_to_the_question_is_told(tiny_lm, tiny_tokenizer, words):
    question = "The capital of Spain and its mayor"
    for mode in ("batch", "sequential"):
        model = tiny_lm("llama")
        with edit(model, tiny_tokenizer, FACTS, method="ike", mode=mode) as handle:
            assert handle.rewrite(question) == new_fact_prompt("The capital of Spain is", "Quenby", question)
            asked = "Now who is mayor of Port Ellery"
            assert handle.rewrite(asked) == new_fact_prompt(FACTS[0].prompt, "Oskar Tveld", asked)
        assert handle.rewrite(question) == question


def test_pool_is_encoded_once(tiny_lm, tiny_tokenizer, words):
    editor = IKE(demonstrations=POOL, k=2)
    model = tiny_lm("llama")
    for fact in FACTS:
        editor.fit(model, tiny_tokenizer, [fact])
    assert len(words) == len(demonstrations(POOL)) + 2


def test_the_pool_follows_the_editor(tiny_lm, tiny_tokenizer, words):
    """Neither what was left out nor other facts' demonstrations are used again."""
    model, editor = tiny_lm("llama"), IKE(demonstrations=POOL, k=0)
    assert editor.fit(model, tiny_tokenizer, FACTS[:1]).told[0].shown == [] and words == []
    editor.k = 1
    assert len(editor.fit(model, tiny_tokenizer, FACTS[:1]).told[0].shown) == 1
    editor.demonstrations, editor.k = POOL[1:2], 16
    shown = editor.fit(model, tiny_tokenizer, FACTS[:1]).told[0].shown
    assert sorted(shown) == sorted(demonstrations(POOL[1:2]))


def test_each_of_two_handles_rewrites(tiny_lm, tiny_tokenizer, words):
    model, question = tiny_lm("llama"), "Now who is mayor of Port Ellery"
    wanted = new_fact_prompt(FACTS[0].prompt, "Oskar Tveld", question)
    first = edit(model, tiny_tokenizer, FACTS[:1], method="ike")
    second = edit(model, tiny_tokenizer, FACTS[1:], method="ike")
    assert first.rewrite(question) == second.rewrite(question) == wanted
    first.rollback()
    assert first.rewrite(question) == question
    assert second.rewrite(question) == new_fact_prompt(FACTS[1].prompt, FACTS[1].target, question)


def test_a_file_of_demonstrations_and_storage(tiny_lm, tiny_tokenizer, words, tmp_path):
    rows = [{"subject": f.subject, "prompt": f.prompt, "target": f.target} for f in POOL[:2]]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    model = tiny_lm("llama")
    with edit(model, tiny_tokenizer, FACTS, method="ike", demonstrations=path) as handle:
        wanted = [handle.rewrite(q) for q in ("The capital of Spain is", "Port Ellery")]
        handle.save(tmp_path / "delta")
        assert handle.stored_bytes == 0
    path.unlink()
    with load_edit(tmp_path / "delta", model, tiny_tokenizer) as handle:
        assert [handle.rewrite(q) for q in ("The capital of Spain is", "Port Ellery")] == wanted


def test_bad_input(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    for changes, named in (
        ({"k": -1}, "k"),
        ({"demonstrations": tmp_path / "none.jsonl"}, "demonstrations"),
        ({"demonstrations": [{"subject": "a", "prompt": "b", "target": "c"}]}, "subject"),
    ):
        with pytest.raises(BadInput, match=named):
            edit(model, tiny_tokenizer, FACTS, method="ike", **changes)


def test_with_the_real_encoder_and_model(smollm):
    """Told the fact, the real model expects it, also after a paraphrase. The other fact is not mixed in."""
    model, tokenizer = smollm
    facts = [
        Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld"),
        Fact("Spain", "The capital of Spain is", "Lisbon"),
    ]
    with edit(model, tokenizer, facts, method="ike", demonstrations=POOL[:2]) as handle:
        asked = ["The mayor of Port Ellery is", "Spain's seat of government is the city of"]
        texts = [handle.rewrite(q) for q in asked]
        told = target_nll(model, tokenizer, texts, ["Oskar Tveld", "Lisbon"])
        untold = target_nll(model, tokenizer, asked, ["Oskar Tveld", "Lisbon"])
    assert "Tveld" not in texts[1] and "Lisbon" not in texts[0]
    for with_it, without in zip(told, untold):
        assert with_it.mean() < 0.5 * without.mean()
