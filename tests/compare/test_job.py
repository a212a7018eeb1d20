"""What carriers may learn from and what is asked never mix."""

from __future__ import annotations

import copy
import json

import pytest
from comparison import FACTS

from transfuse.compare.answerer import Prompts
from transfuse.compare.carriers import Bench, carriers, find_carrier
from transfuse.compare.job import Recipe, Source, bundled, read_job, read_knowledge
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
    assert set(vars(lesson)) == {"id", "prompt", "target", "paraphrases", "subject", "documents"}
    assert not set(lesson.paraphrases) & set(first.asked)


def rows(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_wordings_are_there_once_and_never_taught_and_asked(tmp_path):
    first, second = FACTS
    again = [*second["paraphrases"], second["paraphrases"][0], second["prompt"], first["paraphrases"][0]]
    rows(tmp_path / "facts.jsonl", first, {**second, "paraphrases": again})
    items = read_knowledge(Source(facts="facts.jsonl", train_paraphrases=1), tmp_path).items
    assert items[1].taught == ("Quenby lies on the river",)
    assert items[1].asked == ("Through Quenby runs the", "In Quenby flows the")
    taught = {text for item in items for text in (item.prompt, *item.taught)}
    assert not taught & {text for item in items for text in item.asked}


def test_documents_of_facts_go_by_id_or_title(tmp_path, tiny_tokenizer):
    rows(tmp_path / "facts.jsonl", *FACTS)
    texts = [{"id": "Quenby", "text": "It lies on the Ostrin."}, {"title": "Port Ellery", "text": "Led by Ines Varro."},
             {"id": "d2", "text": "Nothing."}, {"id": "x", "title": "Quenby", "text": "A town."}]  # fmt: skip
    rows(tmp_path / "documents.jsonl", *texts)
    source = Source(facts="facts.jsonl", documents="documents.jsonl")
    knowledge = read_knowledge(source, tmp_path)
    assert len({d.id for d in knowledge.documents}) == 4
    assert [[d.text for d in knowledge.about(item)] for item in knowledge.items] == [
        ["Led by Ines Varro."],
        ["It lies on the Ostrin.", "A town."],
    ]
    find_carrier("gold-context")().check(knowledge)
    rows(tmp_path / "documents.jsonl", texts[2])
    with pytest.raises(NotApplicable, match="id or title"):
        find_carrier("gold-context")().check(read_knowledge(source, tmp_path))


def test_gold_context_is_every_document_of_a_question_with_its_title(tmp_path, tiny_lm, tiny_tokenizer):
    rows(
        tmp_path / "d.jsonl",
        {"id": "a", "title": "Ostrin", "text": "A river."},
        {"id": "b", "text": "{query}!"},
    )
    rows(
        tmp_path / "q.jsonl", {"question": "What is it?", "answers": ["a river"], "document_ids": ["b", "a"]}
    )
    recipe = Recipe(model="-", knowledge=Source(documents="d.jsonl", questions="q.jsonl"), carriers=["lora"])
    bench = Bench(tiny_lm("llama"), tiny_tokenizer, read_job(recipe, tmp_path, tmp_path / "out"))
    read = find_carrier("gold-context")().install(bench).render("What is it?")
    assert read == "Ostrin\nA river.\n{query}!\n\nQuestion: What is it?\nAnswer:"
    find_carrier("parametric-rag")().check(bench.knowledge)  # the question teaches both


def test_a_chat_begins_once(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chatty = copy.deepcopy(tiny_tokenizer)
    chatty.chat_template = "{{ bos_token }}{{ messages[0].content }}\n"
    begin = chatty.bos_token_id
    assert chatty(Prompts(chatty, "facts", True)("Quenby"))["input_ids"][0] == begin
    chatty._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    ids = chatty(Prompts(chatty, "facts", True)("Quenby"))["input_ids"]
    assert ids[0] == begin and begin not in ids[1:]


def test_a_document_is_written_per_subject(facts):
    knowledge = read_knowledge(Source(facts="facts.jsonl"), facts)
    assert [d.id for d in knowledge.documents] == ["Port Ellery", "Quenby"]
    assert knowledge.documents[0].text == "The mayor of Port Ellery is Ines Varro."


def test_questions_with_documents(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "a", "text": "Ostrin is a river."}) + "\n")
    rows = [{"question": "What is Ostrin?", "answers": ["a river"], "document_ids": ["a"]}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    knowledge = read_knowledge(Source(documents="d.jsonl", questions="q.json"), tmp_path)
    assert knowledge.kind == "questions" and knowledge.items[0].documents == ("a",)
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
