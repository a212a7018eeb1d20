"""core.data: records from files, data sets and lists; every complaint names file, line and field."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import FrozenInstanceError, asdict, replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.core.data import (
    QA,
    Document,
    Fact,
    read_documents,
    read_facts,
    read_qa,
    read_rows,
    records_hash,
)
from transfuse.core.errors import BadInput, CorruptFile

FACTS = [
    Fact("Port Ellery", "The mayor of Port Ellery is", "Ines Varro", id="a"),
    Fact(
        "Åse Nguyễn",
        "Åse Nguyễn was born in",
        "東京",
        paraphrases=("The birthplace of Åse Nguyễn is",),
        neighbours=("Oskar Tveld was born in", "Ines Varro was born in"),
        ground_truth="Quenby",
        id="b",
        neighbour_answers=("Port Ellery", None),
    ),
    Fact("Ostrin", "The river Ostrin flows into", "the sea 🌊"),
]
DOCUMENTS = [Document("Two\nlines.  ", "A title", "d1"), Document("Ünal")]
QUESTIONS = [
    QA("Who built the bridge?", ("Oskar Tveld", "Tveld"), ("d1",), ("Whose bridge is it?",), ("Who?",), "q"),
    QA("When?", ("1687",)),
]
READERS = [(read_facts, FACTS), (read_documents, DOCUMENTS), (read_qa, QUESTIONS)]
GOOD = {"subject": "Ostrin", "prompt": "The river Ostrin flows into", "target": "the sea"}


def write(path, rows, *, end="\n", ascii_only=False):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def plain(record):
    return {name: value for name, value in asdict(record).items() if value not in (None, ())}


def stored(records, form, folder):
    """`records` in one of the forms that readers take."""
    rows = [asdict(record) for record in records]
    if form == "jsonl":
        return write(folder / "rows.jsonl", [plain(r) for r in records])
    if form == "ndjson, escaped":
        return str(write(folder / "rows.ndjson", rows, ascii_only=True))
    if form == "json":
        return write(folder / "rows.json", [json.dumps(rows, indent=1)])
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "portability"}
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
        return folder / "rows.parquet"
    if form == "dataset":
        return datasets.Dataset.from_dict(columns)
    if form == "generator":
        return (row for row in rows)
    return {"mappings": rows, "records": records, "mixed": [records[0], *rows[1:]]}[form]


FORMS = [
    "jsonl",
    "ndjson, escaped",
    "json",
    "parquet",
    "dataset",
    "generator",
    "mappings",
    "records",
    "mixed",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("reader", "records"), READERS)
def test_every_form_gives_the_same_records(tmp_path, reader, records, form):
    found = reader(stored(records, form, tmp_path))
    assert found == records
    assert records_hash(found) == records_hash(records)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_and_crlf(tmp_path, end):
    rows = ["", plain(FACTS[0]), "", "   \t", plain(FACTS[1]), ""]
    path = write(tmp_path / "facts.jsonl", rows, end=end)
    assert read_facts(path) == FACTS[:2]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().strip())  # a byte-order mark, no newline at the end
    assert read_facts(path) == FACTS[:2]
    bad = write(tmp_path / "bad.jsonl", ["", plain(FACTS[0]), "", {**GOOD, "target": ""}], end=end)
    with pytest.raises(BadInput, match=r"^bad\.jsonl:4: target = '' is empty; give some text$"):
        read_facts(bad)  # lines are counted as an editor counts them


def test_line_separators_inside_texts_are_kept(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    assert read_documents(write(tmp_path / "d.jsonl", [{"text": text}])) == [Document(text)]


def test_what_is_stripped():
    (fact,) = read_facts([{"subject": " Ostrin ", "prompt": " Ostrin is ", "target": " a river\n", "id": 7}])
    assert fact == Fact("Ostrin", "Ostrin is", "a river", id="7")
    (document,) = read_documents([{"text": "  kept \n", "title": ""}])
    assert document == Document("  kept \n")
    (question,) = read_qa([{"question": " Who? ", "answers": [" Ines "]}])
    assert question == QA("Who?", ("Ines",))


def test_unknown_fields_are_ignored_and_null_is_absent():
    rows = [{**GOOD, "case_id": 3, "requested_rewrite": {"a": [1]}, "paraphrases": None, "id": None}]
    assert read_facts(rows) == [Fact(**GOOD)]


def test_portability():
    groups = [["alias", "The mouth of Ostrin is", ["the sea", "sea"]], ("hop", "The Ostrin's sea is", [])]
    (fact,) = read_facts([{**GOOD, "portability": groups}])
    assert fact.portability == (
        ("alias", "The mouth of Ostrin is", ("the sea", "sea")),
        ("hop", "The Ostrin's sea is", ()),
    )
    assert read_facts([fact]) == [fact]


def test_neighbours_and_their_answers():
    two = {**GOOD, "neighbours": ["The Elbe flows into", "The Po flows into"]}
    (fact,) = read_facts([{**two, "neighbour_answers": [None, " the Adriatic "]}])
    assert fact.neighbour_answers == (None, "the Adriatic")
    assert fact.answered_neighbours == (
        ("The Elbe flows into", None),
        ("The Po flows into", "the Adriatic"),
    )
    assert read_facts([fact]) == [fact]
    plain = read_facts([two])[0]
    assert plain.answered_neighbours == (("The Elbe flows into", None), ("The Po flows into", None))
    for nothing in (None, [], [None, None]):
        assert read_facts([{**two, "neighbour_answers": nothing}]) == [plain]


BROKEN_FACTS = [
    ({"target": ""}, "target", "'' is empty; give some text"),
    ({"target": "  \n"}, "target", "is empty; give some text"),
    ({"target": None}, "target", "None is missing; add the field 'target'"),
    ({"subject": None}, "subject", "is missing; add the field 'subject'"),
    ({"prompt": None}, "prompt", "is missing; add the field 'prompt'"),
    ({"prompt": 3}, "prompt", "3 is int, not text; give a string"),
    ({"target": ["the sea"]}, "target", "is list, not text"),
    ({"target": True}, "target", "True is bool, not text"),
    ({"ground_truth": {"a": 1}}, "ground_truth", "is dict, not text"),
    ({"ground_truth": ""}, "ground_truth", "is empty"),
    ({"paraphrases": "one text"}, "paraphrases", "'one text' is not a list of texts; write it as"),
    ({"paraphrases": 5}, "paraphrases", "5 is not a list of texts"),
    ({"paraphrases": {"a": "b"}}, "paraphrases", "is not a list of texts"),
    ({"neighbours": ["good", 4]}, "neighbours[1]", "4 is int, not text"),
    ({"neighbours": ["good", "good", " "]}, "neighbours[2]", "is empty"),
    ({"neighbours": ["a"], "neighbour_answers": "b"}, "neighbour_answers", "'b' is not a list of texts"),
    ({"neighbours": ["a"], "neighbour_answers": [4]}, "neighbour_answers[0]", "4 is int, not text"),
    ({"neighbours": ["a", "b"], "neighbour_answers": [None, " "]}, "neighbour_answers[1]", "is empty"),
    (
        {"neighbours": ["a", "b"], "neighbour_answers": ["c"]},
        "neighbour_answers",
        "are 1 for 2 neighbours; give one",
    ),
    ({"neighbour_answers": ["c"]}, "neighbour_answers", "are 1 for 0 neighbours"),
    ({"subject": "ostrin"}, "subject", "'ostrin' is not in the prompt 'The river Ostrin flows into'; write"),
    ({"subject": "Ostrin ends"}, "subject", "is not in the prompt"),
    ({"portability": 4}, "portability", "4 is not a list of [group, prompt, answers]; write each as three"),
    ({"portability": [["alias", "a prompt"]]}, "portability", "is not a list of [group, prompt, answers]"),
    ({"portability": [["alias", 3, ["a"]]]}, "portability", "3 is int, not text"),
    ({"portability": [["alias", "a prompt", "a"]]}, "portability", "'a' is not a list of texts"),
]


@pytest.mark.parametrize(("change", "field", "says"), BROKEN_FACTS)
def test_a_broken_fact_is_placed(tmp_path, change, field, says):
    rows = [GOOD, {**GOOD, **change}]
    complaint = re.escape(says)
    with pytest.raises(BadInput, match=rf"^facts\[1\]: {re.escape(field)} = .*{complaint}"):
        read_facts(rows)
    with pytest.raises(BadInput, match=rf"^learnt\[1\]: {re.escape(field)} = .*{complaint}"):
        read_facts(rows, argument="learnt")
    path = write(tmp_path / "f.jsonl", [GOOD, "", {**GOOD, **change}])
    with pytest.raises(BadInput, match=rf"^f\.jsonl:3: {re.escape(field)} = .*{complaint}") as caught:
        read_facts(path)
    assert "\n" not in str(caught.value)
    path = write(tmp_path / "f.json", [json.dumps(rows)])
    with pytest.raises(BadInput, match=rf"^f\.json\[1\]: {re.escape(field)} = .*{complaint}"):
        read_facts(path)


@pytest.mark.parametrize("make", ["parquet", "dataset"])
def test_a_broken_row_of_a_table_is_placed(tmp_path, make):
    table = {name: [GOOD[name], GOOD[name]] for name in GOOD}
    for field, value, says in (("target", "", "is empty"), ("subject", None, "is missing")):
        columns = {**table, field: [GOOD[field], value]}
        if make == "parquet":
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "f.parquet")
            source, place = tmp_path / "f.parquet", r"f\.parquet\[1\]"
        else:
            source, place = datasets.Dataset.from_dict(columns), r"facts\[1\]"
        with pytest.raises(BadInput, match=rf"^{place}: {field} = .*{says}"):
            read_facts(source)
    numbers = datasets.Dataset.from_dict({**table, "target": [1, 2]})
    with pytest.raises(BadInput, match=r"^facts\[0\]: target = 1 is int, not text"):
        read_facts(numbers)


@pytest.mark.parametrize(
    ("reader", "row", "place"),
    [
        (read_documents, {"title": "x"}, "documents[0]: text = None is missing"),
        (read_documents, {"text": " "}, "documents[0]: text = ' ' is empty"),
        (read_documents, {"text": "a", "title": 3}, "documents[0]: title = 3 is int, not text"),
        (read_qa, {"answers": ["a"]}, "questions[0]: question = None is missing"),
        (read_qa, {"question": "a"}, "questions[0]: answers = None is missing"),
        (read_qa, {"question": "a", "answers": []}, "questions[0]: answers = [] is empty; give at least one"),
        (read_qa, {"question": "a", "answers": "b"}, "questions[0]: answers = 'b' is not a list of texts"),
        (read_qa, {"question": "a", "answers": ["b", ""]}, "questions[0]: answers[1] = '' is empty"),
        (read_qa, {"question": "a", "answers": ["b"], "document_ids": [1]}, "document_ids[0] = 1 is int"),
        (read_facts, "a text", "facts[0] = 'a text' is not a record; give an object with subject, prompt"),
        (read_facts, None, "facts[0] = None is not a record"),
        (read_facts, [1], "facts[0] = [1] is not a record"),
        (read_qa, FACTS[0], "is not a record; give an object with question, answers"),
        (read_facts, replace(FACTS[0], target=""), "facts[0]: target = '' is empty"),
        (read_facts, replace(FACTS[0], subject="Quenby"), "facts[0]: subject = 'Quenby' is not in the"),
    ],
)
def test_broken_records(reader, row, place):
    with pytest.raises(BadInput, match=re.escape(place)):
        reader([row])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"subject": "a"', "is not JSON (Expecting"),
        ("{'subject': 'a'}", "is not JSON (Expecting property name"),
        ('{"a": 1} {"b": 2}', "is not JSON (Extra data"),
        ("nonsense", "is not JSON (Expecting value"),
        ("1" * 5000, "is not JSON (Exceeds the limit"),
        ("[" * 100_000, "is not JSON (maximum recursion depth"),
    ],
)
def test_broken_json_names_the_line(tmp_path, line, says):
    path = write(tmp_path / "facts.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(CorruptFile, match=rf"^facts\.jsonl:3 = .*{re.escape(says)}.*; mend this line$"):
        read_facts(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"subject": "\xff"}\n')
    with pytest.raises(CorruptFile, match=r"^facts\.jsonl:2 = .*is not JSON"):
        read_facts(path)
    path = tmp_path / "facts.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(CorruptFile, match=r"^facts = .*facts\.json' is not JSON .*; mend the file"):
        read_facts(path)


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("facts.json", b"[{", CorruptFile, "is not JSON"),
        ("facts.json", b"[" + b"1" * 5000 + b"]", CorruptFile, "is not JSON"),
        ("facts.json", b"[" * 100_000, CorruptFile, "is not JSON"),
        ("facts.json", b'{"subject": "a"}', BadInput, "does not hold a list; give a JSON list"),
        ("facts.json", b"[]", BadInput, "is empty; give records"),
        ("facts.jsonl", b"", BadInput, "is empty; give records"),
        ("facts.jsonl", b"\n \r\n", BadInput, "is empty; give records"),
        ("facts.parquet", b"", CorruptFile, "is not Parquet"),
        ("facts.parquet", b"PAR1 and then nothing PAR1", CorruptFile, "is not Parquet"),
        ("facts.csv", b"subject\n", BadInput, "has an unknown ending; use .jsonl, .json or .parquet"),
        ("facts.pkl", b"cos\nsystem\n(S'false'\ntR.", BadInput, "has an unknown ending"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, error, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=rf"^facts = .*{re.escape(name)}' {re.escape(says)}"):
        read_facts(path)


def test_truncated_parquet(tmp_path):
    path = tmp_path / "facts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: [value] for name, value in GOOD.items()}), path)
    data = path.read_bytes()
    for size in (4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptFile, match=r"facts\.parquet' is not Parquet .*; restore the file"):
            read_facts(path)


def test_what_is_no_source(tmp_path):
    for missing in (tmp_path / "none.jsonl", "~nobody-at-all/facts.jsonl"):
        with pytest.raises(
            BadInput, match=r"^facts = .* does not exist; give a \.jsonl, \.json or \.parquet"
        ):
            read_facts(missing)
    with pytest.raises(BadInput, match=r"^facts = .* is a folder; give a \.jsonl, \.json or \.parquet"):
        read_facts(str(tmp_path))
    with pytest.raises(
        BadInput, match=r"^facts = 3 is not a list of records or a file; give a path or a list"
    ):
        read_facts(3)
    with pytest.raises(BadInput, match=r"^facts = \[\] is empty; give records"):
        read_facts(iter([]))
    with pytest.raises(BadInput, match=r"^facts\[0\] = 'subject' is not a record"):
        read_facts(GOOD)  # one record, not a list of them


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "facts.jsonl", [GOOD])
    assert read_facts("~/facts.jsonl") == [Fact(**GOOD)]


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "FACTS.JSON", "Facts.JSONL"])
def test_byte_order_marks_and_capital_endings(tmp_path, name):
    text = json.dumps(GOOD if name.lower().endswith("l") else [GOOD])
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_facts(tmp_path / name) == [Fact(**GOOD)]


def test_half_a_surrogate_pair_is_placed(tmp_path):
    path = write(tmp_path / "facts.jsonl", [GOOD, json.dumps({**GOOD, "target": "a\ud83d"})])
    with pytest.raises(BadInput, match=r"^facts\.jsonl:2: target = .* holds half a surrogate pair"):
        read_facts(path)


def test_an_identifier_used_twice_is_placed(tmp_path):
    rows = [{**GOOD, "id": 1}, GOOD, GOOD, {**GOOD, "id": "1"}]
    with pytest.raises(BadInput, match=r"^facts\[3\]: id = '1' was used at facts\[0\]; make it unique"):
        read_facts(rows)
    path = write(tmp_path / "f.jsonl", ["", rows[0], "", *rows[1:]])
    with pytest.raises(BadInput, match=r"^f\.jsonl:6: id = '1' was used at f\.jsonl:2; make it unique"):
        read_facts(path)


def test_read_rows_gives_places_and_reads_lazily(tmp_path):
    path = write(tmp_path / "f.jsonl", ["", {"a": 1}, [2], "{"])
    rows = iter(read_rows(path, "facts"))
    assert next(rows) == ("f.jsonl:2", {"a": 1})
    assert next(rows) == ("f.jsonl:3", [2])
    with pytest.raises(CorruptFile, match=r"^f\.jsonl:4 "):
        next(rows)
    assert list(read_rows(["x"], "facts")) == [("facts[0]", "x")]


def test_records_are_values():
    assert FACTS[0].label == "a" and FACTS[2].label == "The river Ostrin flows into"
    with pytest.raises(FrozenInstanceError):
        FACTS[0].target = "x"
    assert len({*FACTS, *read_facts(FACTS)}) == 3
    assert DOCUMENTS[0].hash == hashlib.sha256(b'["A title","Two\\nlines.  "]').hexdigest()
    assert DOCUMENTS[0].hash == replace(DOCUMENTS[0], id=None).hash != DOCUMENTS[1].hash


def test_records_hash_sees_every_field_and_the_order():
    hashes = {
        records_hash(records)
        for records in (
            FACTS,
            FACTS[::-1],
            FACTS[:2],
            *(
                [replace(FACTS[0], **{name: "x"}), *FACTS[1:]]
                for name in ("subject", "prompt", "target", "id")
            ),
            [replace(FACTS[0], paraphrases=("x",)), *FACTS[1:]],
            [replace(FACTS[0], neighbours=("x",)), *FACTS[1:]],
            [replace(FACTS[0], portability=(("g", "p", ("a",)),)), *FACTS[1:]],
            [FACTS[0], replace(FACTS[1], neighbour_answers=("Port Ellery", "Quenby")), FACTS[2]],
        )
    }
    assert len(hashes) == 11


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    before=st.text(st.characters(codec="utf-8"), max_size=5),
    subject=TEXT,
    target=TEXT,
    others=st.lists(TEXT, max_size=3),
    escape=st.booleans(),
)
def test_any_text_survives_jsonl(tmp_path_factory, before, subject, target, others, escape):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    row = {"subject": subject, "prompt": before + subject, "target": target, "paraphrases": others}
    write(path, [row], ascii_only=escape)
    wanted = Fact(
        subject.strip(), (before + subject).strip(), target.strip(), tuple(t.strip() for t in others)
    )
    assert read_facts(path) == read_facts([row]) == [wanted]
