"""Retrieval: BM25 against the formula, vectors against brute force, the stored index and its refusals."""

import json
import math
import shutil
import zlib

import numpy as np
import pytest

from transfuse.core import retrieval
from transfuse.core.data import Document
from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.retrieval import BM25, VectorIndex

TEXTS = [
    "harbour lamp keeper",
    "harbour harbour bridge of stone",
    "the keeper sold a lamp to the miller",
    "vitamin C and vitamin D",
    "windmill",
]
DOCUMENTS = [Document(text) for text in TEXTS]


class WordEncoder:
    """Random but fixed vector per word; a text is the sum of its words. Counts the texts it encodes."""

    def __init__(self, salt=0, width=16):
        self.salt, self.width, self.count = salt, width, 0

    def encode(self, texts):
        self.count += len(texts)
        rows = [
            sum(
                np.random.default_rng([self.salt, zlib.crc32(word.encode())]).normal(size=self.width)
                for word in text.split()
            )
            for text in texts
        ]
        return np.asarray(rows, dtype=np.float32)


def test_bm25_equals_the_formula():
    documents = [Document(t) for t in ("harbour lamp keeper", "harbour harbour bridge stone", "windmill")]
    k1, b = 1.2, 0.75
    lengths, average = [3, 4, 1], 8 / 3

    def weight(count, length, containing):
        inverse = math.log(1 + (3 - containing + 0.5) / (containing + 0.5))
        return inverse * count / (count + k1 * (1 - b + b * length / average))

    (hits,) = BM25(documents, k1=k1, b=b).search(["Harbour lamp?"], 3)
    assert [hit.document.text for hit in hits] == [documents[i].text for i in (0, 1, 2)]
    expected = [
        weight(1, lengths[0], 2) + weight(1, lengths[0], 1),
        weight(2, lengths[1], 2),
        0.0,
    ]
    assert [hit.score for hit in hits] == pytest.approx(expected, rel=1e-5)


def test_bm25_batch_is_the_single_searches_and_ties_keep_order():
    index = BM25(DOCUMENTS)
    queries = ["lamp", "C", "the of", "unheard words", "bridge keeper"]
    together = index.search(queries, 5)
    assert together == [index.search([query], 5)[0] for query in queries]
    assert together[1][0].document.text == TEXTS[3]  # one-letter words count
    for nothing in (together[2], together[3]):  # stop words only, unknown words only
        assert [hit.document.text for hit in nothing] == TEXTS
        assert {hit.score for hit in nothing} == {0.0}
    assert index.search([], 1) == []


def test_bm25_reads_titles():
    documents = [
        Document("It stands by the sea.", title="Ostrin lighthouse"),
        Document("It stands by a mill."),
    ]
    assert BM25(documents).search(["lighthouse"], 1)[0][0].document is documents[0]


def brute_force(encoder, documents, query, k):
    def unit(text):
        vector = encoder.encode([text])[0].astype(np.float64)
        return vector / np.linalg.norm(vector)

    scores = [float(unit(d.text) @ unit(query)) for d in documents]
    order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))[:k]
    return [documents[i] for i in order], [scores[i] for i in order]


def test_vectors_equal_brute_force_cosine(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    documents = [Document(" ".join(rng.choice(words, size=rng.integers(3, 30)))) for _ in range(120)]
    encoder = WordEncoder()
    queries = [" ".join(rng.choice(words, size=5)) for _ in range(7)]
    for folder in (None, tmp_path / "index"):
        index = VectorIndex(documents, encoder=encoder, folder=folder, batch_size=3)
        found = index.search(queries, 6)
        for query, hits in zip(queries, found, strict=True):
            expected, scores = brute_force(encoder, documents, query, 6)
            assert [hit.document for hit in hits] == expected
            assert [hit.score for hit in hits] == pytest.approx(scores, abs=1e-5)
        alone = index.search(queries[:1], 6)[0]
        assert [hit.document for hit in alone] == [hit.document for hit in found[0]]


def test_reopened_index_encodes_nothing_but_probe_and_queries(tmp_path):
    first = VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=tmp_path / "i")
    encoder = WordEncoder()
    again = VectorIndex(DOCUMENTS, encoder=encoder, folder=tmp_path / "i")
    assert encoder.count == 1
    assert again.search(["harbour lamp"], 5) == first.search(["harbour lamp"], 5)


def test_reopening_checks_documents_and_encoder(tmp_path):
    VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=tmp_path / "i")
    with pytest.raises(BadInput, match="other documents"):
        VectorIndex([*DOCUMENTS[:-1], Document("a windmill")], encoder=WordEncoder(), folder=tmp_path / "i")
    for other in (WordEncoder(salt=1), WordEncoder(width=8)):
        with pytest.raises(BadInput, match="another encoder"):
            VectorIndex(DOCUMENTS, encoder=other, folder=tmp_path / "i")


def test_damaged_index_is_named_and_half_made_one_is_made_again(tmp_path):
    folder = tmp_path / "i"
    made = VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=folder).search(["lamp"], 3)
    (folder / "index.json").unlink()  # as after a kill between the vectors and the card
    assert VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=folder).search(["lamp"], 3) == made

    card = (folder / "index.json").read_text()
    (folder / "index.json").write_text(card[: len(card) // 2])
    with pytest.raises(CorruptFile, match=r"index\.json"):
        VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=folder)
    (folder / "index.json").write_text(json.dumps({**json.loads(card), "count": 4}))
    with pytest.raises(CorruptFile, match="5 vectors, not 4"):
        VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=folder)
    (folder / "index.json").write_text(card)
    shutil.rmtree(folder / "documents.lance" / "data")
    with pytest.raises(CorruptFile, match="lost vectors"):
        VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=folder).search(["lamp"], 1)


def test_many_documents_use_an_approximate_index(monkeypatch):
    rng = np.random.default_rng(1)
    documents = [Document(" ".join(f"w{i}" for i in rng.integers(0, 400, size=8))) for _ in range(600)]
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 500)
    encoder = WordEncoder()
    index = VectorIndex(documents, encoder=encoder)
    assert [i.index_type for i in index._table.list_indices()] == ["IvfFlat"]
    own = [index.search([d.text], 1)[0][0].document == d for d in documents[:50]]
    assert np.mean(own) >= 0.95


@pytest.mark.parametrize("kind", ["bm25", "vectors"])
def test_refusals(kind):
    def make(documents):
        return BM25(documents) if kind == "bm25" else VectorIndex(documents, encoder=WordEncoder())

    with pytest.raises(BadInput, match="documents"):
        make([])
    with pytest.raises(BadInput, match=r"documents\[1\]: text"):
        make([DOCUMENTS[0], Document(" \n")])
    index = make(DOCUMENTS)
    with pytest.raises(BadInput, match="k = 6 exceeds the 5 documents"):
        index.search(["lamp"], 6)
    for k in (0, -1, 1.5):
        with pytest.raises(BadInput, match="k = "):
            index.search(["lamp"], k)
    with pytest.raises(BadInput, match=r"queries\[1\]"):
        index.search(["lamp", "  "], 1)
    with pytest.raises(BadInput, match=r"queries\[0\] = 3 is int, not text"):
        index.search([3], 1)
    with pytest.raises(BadInput, match="k = True"):
        index.search(["lamp"], True)
    with pytest.raises(BadInput, match=r"write \[query\]"):
        index.search("lamp", 1)
    assert len(index.search(["lamp"], np.int64(2))[0]) == 2


@pytest.mark.parametrize(
    "arguments", [{"k1": -1.0}, {"k1": math.nan}, {"b": 3.0}, {"b": -0.1}, {"stopwords": "xx"}]
)
def test_bm25_refuses_what_has_no_meaning(arguments):
    with pytest.raises(BadInput, match=next(iter(arguments))):
        BM25(DOCUMENTS, **arguments)


def test_bm25_finds_a_word_however_its_accents_are_written():
    index = BM25([Document("a the"), Document("un caf\u00e9 noir"), Document("cafe\u0301 au lait")])
    for query in ("caf\u00e9", "cafe\u0301"):
        first, second, third = index.search([query], 3)[0]
        assert first.score > 0 and second.score > 0 and third.score == 0


def test_a_table_of_the_users_own_is_left_alone(tmp_path):
    import lancedb

    lancedb.connect(str(tmp_path)).create_table("documents", data=[{"mine": 1}])
    with pytest.raises(BadInput, match="holds a table 'documents' that is no index; choose another folder"):
        VectorIndex(DOCUMENTS, encoder=WordEncoder(), folder=tmp_path)
    assert lancedb.connect(str(tmp_path)).open_table("documents").to_arrow().column("mine").to_pylist() == [1]


def test_only_stop_words():
    with pytest.raises(BadInput, match="stopwords=None"):
        BM25([Document("the of and")])
    assert BM25([Document("the of and")], stopwords=None).search(["of"], 1)[0][0].score > 0


def test_encoder_with_zero_or_infinite_vectors_is_refused():
    class Broken(WordEncoder):
        def encode(self, texts):
            return np.full((len(texts), 4), self.width, dtype=np.float32)

    for value in (0, np.inf, np.nan):
        with pytest.raises(BadInput, match="encoder"):
            VectorIndex(DOCUMENTS, encoder=Broken(width=value))


def test_minilm_finds_by_meaning(tmp_path):
    documents = [
        Document("The physician wrote a prescription for the patient."),
        Document("The orchestra rehearsed the second movement."),
        Document("A freight train derailed near the junction."),
    ]
    index = VectorIndex(documents, folder=tmp_path / "i")
    found = index.search(["a doctor gave somebody medicine", "railway accident", "musicians practising"], 1)
    assert [hits[0].document for hits in found] == [documents[0], documents[2], documents[1]]
