"""What carriers may learn from and what is asked never mix."""

from __future__ import annotations

import json

import pytest
from comparison import FACTS

from transfuse.compare.carriers import carriers, find_carrier
from transfuse.compare.job import Source, bundled, read_knowledge
from transfuse.core.errors import BadInput, NotApplicable


@pytest.fixture
def facts(tmp_path):
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    return tmp_path


def test_paraphrases_taught_are_never_asked(facts):
    knowledge = read_knowledge(Source(facts="facts.jsonl", train_paraphrases=1), facts)
    first = knowledge.items[0]
    assert first.taught == ("Port Ellery has a mayor named",)
    assert first.asked == ("In Port Ellery the mayor is", "Port Ellery is led by")
    lesson = knowledge.lessons[0]
    assert set(vars(lesson)) == {"id", "prompt", "target", "paraphrases", "subject", "document"}
    assert not set(lesson.paraphrases) & set(first.asked)


def test_a_document_is_written_per_subject(facts):
    knowledge = read_knowledge(Source(facts="facts.jsonl"), facts)
    assert [d.id for d in knowledge.documents] == ["Port Ellery", "Quenby"]
    assert knowledge.documents[0].text == "The mayor of Port Ellery is Ines Varro."


def test_questions_with_documents(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "a", "text": "Ostrin is a river."}) + "\n")
    rows = [{"question": "What is Ostrin?", "answers": ["a river"], "document_ids": ["a"]}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    knowledge = read_knowledge(Source(documents="d.jsonl", questions="q.json"), tmp_path)
    assert knowledge.kind == "questions" and knowledge.items[0].document == "a"
    for name in ("rome", "memit", "grace", "ft-m"):  # editors need subjects
        with pytest.raises(NotApplicable, match="subjects"):
            find_carrier(name)().check(knowledge)
    rows[0]["document_ids"] = ["b"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match="'b'"):
        read_knowledge(Source(documents="d.jsonl", questions="q.json"), tmp_path)


def test_every_carrier_says_what_it_is():
    found = carriers()
    assert {
        "none",
        "gold-context",
        "bm25-context",
        "vector-context",
        "ck-plug",
        "lora",
        "kasa",
        "loramoe",
        "ft-m",
    } < set(found)
    assert {"parametric-rag", "parametric-rag-combine", "rome", "memit", "grace"} < set(found)
    for name, cls in found.items():
        assert cls.name == name and cls.title and cls.__doc__ and cls.access
        assert isinstance(vars(cls()), dict)


def test_bundled_sets_do_not_overlap():
    anchors = set(bundled("anchors.txt").splitlines())
    known = {json.loads(line)["prompt"] for line in bundled("known.jsonl").splitlines()}
    assert len(anchors) > 100 and len(known) >= 60
    assert not anchors & known
    assert len(bundled("neutral.txt").split()) > 800


def test_the_demo_teaches_nothing_it_tests():
    from pathlib import Path

    demo = Path(__file__).parents[2] / "examples" / "demo"
    knowledge = read_knowledge(Source(facts="facts.jsonl", train_paraphrases=2), demo)
    assert len(knowledge.items) == 24 and len(knowledge.documents) == 8
    anchors = set(bundled("anchors.txt").splitlines())
    known = {json.loads(line)["prompt"] for line in bundled("known.jsonl").splitlines()}
    for item in knowledge.items:
        assert len(item.taught) == len(item.asked) == 2 and len(item.neighbours) == 3
        assert not {*item.taught, item.prompt} & set(item.asked)
        assert not set(item.neighbours) & (anchors | known)
        assert all(item.subject in text for text in (item.prompt, *item.taught, *item.asked))
