"""sparkle: the table of states by hand and against a slow reference, tries, links, queries that run, decoding."""

from __future__ import annotations

import copy
import itertools
import json
import random
import warnings

import numpy as np
import pyoxigraph as ox
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LogitsProcessorList

from transfuse.core.errors import BadInput, CorruptFile, MissingExtra, NotApplicable
from transfuse.core.generate import generate_texts
from transfuse.core.training import generator, seeded
from transfuse.steer._graph_index import RDFS_LABEL, local_name
from transfuse.steer._graph_trie import Strings, Trie
from transfuse.steer.sparkle import (
    RDF_TYPE,
    GraphConstraint,
    KGIndex,
    QueryResult,
    Sparkle,
    SparqlConstraint,
    Text,
    add_query_tokens,
    answer_f1,
    answer_questions,
    execute,
    extend,
    hits_at_1,
    linearise,
    score,
    start_of,
    to_sparql,
)

E, P = "http://kg/e/", "http://kg/p/"
TRIPLES = [
    (E + "Paris", P + "country", E + "France"),
    (E + "Paris", RDF_TYPE, E + "City"),
    (E + "Paris_Texas", P + "country", E + "USA"),
    (E + "France", P + "capital", E + "Paris"),
    (E + "France", P + "population", Text("68")),
    (E + "USA", P + "population", Text("333")),
]
LABELS = [
    (E + "Paris", RDFS_LABEL, Text("Paris", "en")),
    (E + "Paris", RDFS_LABEL, Text("Parigi", "it")),
    (E + "Paris_Texas", RDFS_LABEL, Text("Paris [Texas]")),
    (E + "City", RDFS_LABEL, Text("town")),
]
QUESTIONS = ["The capital of France is", "Who built the bridge over the river?", "A mayor"]


def graph(triples=TRIPLES):
    store = ox.Store()
    for s, p, o in triples:
        tail = ox.Literal(o.value, language=o.language or None) if isinstance(o, Text) else ox.NamedNode(o)
        store.add(ox.Quad(ox.NamedNode(s), ox.NamedNode(p), tail))
    return store


def extended(model, tokenizer, variables=("uri", "x")):
    """`extend`, and rows that differ: as near their mean as they come, all new words would tie."""
    with seeded(0):
        tokens = extend(model, tokenizer, variables)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            old, new = layer.weight.data[:400], layer.weight.data[400:]
            new.copy_(old.mean(0) + 0.2 * old.std() * torch.randn_like(new))
    return tokens


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    own = copy.deepcopy(tokenizer)
    extended(model, own)
    index = KGIndex.from_triples(TRIPLES + LABELS, own)
    method = Sparkle(model, own, index, graph(), prompt="Q: {question} A:", max_triples=2)
    return method, (QUESTIONS,), [f"Q: {question} A:" for question in QUESTIONS]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    own = copy.deepcopy(tiny_tokenizer)
    add_query_tokens(own)
    return own


@pytest.fixture
def index(tokenizer):
    return KGIndex.from_triples(TRIPLES + LABELS, tokenizer)


@pytest.fixture
def store():
    return graph(TRIPLES + LABELS)


def names_of(index, kind):
    names = getattr(index, kind)
    return [names.labels[i] for i in range(len(names))]


# --- names and links ----------------------------------------------------------------------------------------


def test_names_are_those_of_the_graph(index):
    assert sorted(names_of(index, "entities")) == ["france", "paris (town)", "paris texas", "town", "usa"]
    assert sorted(names_of(index, "relations")) == ["capital", "country", "population", "type"]
    assert local_name("http://x/y#Some_%C3%A9tat/") == "Some état"


def test_numbers_iris_and_names_belong_together(index, tokenizer):
    t = index.tokens
    for names in (index.entities, index.relations):
        for i in range(len(names)):
            assert names.number(names.iris[i]) == i
            ids = [t.wrap_open, *tokenizer(names.labels[i])["input_ids"], t.wrap_close]
            assert names.trie.find(ids) == i
            assert names.trie.find(ids[:-1]) == -1
        assert names.number("http://nowhere") == -1
    assert [list(Strings.of(["a", "", "é"]))[i] for i in range(3)] == ["a", "", "é"]


def test_links_are_those_of_the_triples(index):
    def labels(trie, names):
        return {names.labels[trie.entry(i)] for i in range(len(trie))}

    entities, relations = index.entities, index.relations
    expected = {
        "Paris": {"country", "type"},
        "France": {"capital", "population"},
        "USA": {"population"},
        "City": set(),
    }
    for entity, found in expected.items():
        assert labels(index.relations_of(entities.number(E + entity)), relations) == found
    tails = {"country": {"france", "usa"}, "capital": {"paris (town)"}, "population": set()}
    for relation, found in tails.items():
        assert labels(index.tails_of(relations.number(P + relation)), entities) == found
    assert labels(index.heads, entities) == {"paris (town)", "paris texas", "france", "usa"}
    assert labels(index.linking, relations) == {"country", "capital", "type"}
    assert index.relations_of(0) is index.relations_of(0)  # made once


def test_taken_names_get_their_iri_whatever_the_order(tokenizer):
    triples = [(E + name, P + "is", E + "thing") for name in ("b", "a", "c")]
    same = dict.fromkeys((E + "a", E + "b", E + "c"), "Rex")
    same |= {P + "is": "rel", P + "was": "rel"}
    triples += [(E + "a", P + "was", E + "b")]
    for order in (triples, triples[::-1]):
        index = KGIndex.from_triples(order, tokenizer, labels=same)
        assert {index.entities.iris[i]: index.entities.labels[i] for i in range(4)} == {
            E + "a": "rex", E + "b": f"rex {E}b", E + "c": f"rex {E}c", E + "thing": "thing"
        }  # fmt: skip
        assert sorted(names_of(index, "relations")) == ["rel", f"rel {P}was"]
    for label in ("[]", "  "):  # nothing is left of the label
        index = KGIndex.from_triples([(E + "a", P + "is", E + "b")], tokenizer, labels={E + "a": label})
        assert E + "a" in names_of(index, "entities")
    with pytest.warns(UserWarning, match="spells a special token"):
        index = KGIndex.from_triples(
            [(E + "a", P + "is", E + "b")], tokenizer, labels={P + "is": "x brack_open"}
        )
    assert names_of(index, "relations") == [P + "is"]


def test_things_that_cannot_be_told_apart_are_refused(tokenizer):
    """A tokenizer that drops what it does not know writes both the same."""
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    triples = [("e:x", "p:a", "e:xx"), ("e:", "p:a", "e:xxx")]
    with pytest.raises(BadInput, match="same tokens"):
        KGIndex.from_triples(triples, tokenizer, labels=dict.fromkeys(("e:x", "e:xx", "e:", "e:xxx"), "same"))


def test_from_store_reads_what_the_triples_say(store, index, tokenizer):
    store.add(ox.Quad(ox.BlankNode("b"), ox.NamedNode(P + "near"), ox.NamedNode(E + "USA")))
    store.add(ox.Quad(ox.NamedNode(E + "USA"), ox.NamedNode(P + "has"), ox.BlankNode("b")))
    store.add(
        ox.Quad(ox.NamedNode(E + "no"), ox.NamedNode(P + "no"), ox.NamedNode(E + "no"), ox.NamedNode("g:g"))
    )
    ours = KGIndex.from_store(store, tokenizer)
    assert names_of(ours, "entities") == names_of(index, "entities")
    assert set(names_of(ours, "relations")) == {*names_of(index, "relations"), "near", "has"}
    near, has = (ours.relations.number(P + name) for name in ("near", "has"))
    assert [ours.tails_of(near).entry(0)] == [ours.entities.number(E + "USA")]
    assert len(ours.tails_of(has)) == 0
    untyped = KGIndex.from_store(store, tokenizer, type_predicate=None, language="it")
    assert "parigi" in names_of(untyped, "entities")


def test_save_and_load(index, tokenizer, tiny_tokenizer, tmp_path):
    index.save(tmp_path / "kg")
    fresh = copy.deepcopy(tiny_tokenizer)
    again = KGIndex.load(tmp_path / "kg", fresh)
    assert len(fresh) == len(tokenizer)
    assert again.tokens == index.tokens
    assert again.nbytes == index.nbytes > 0
    for name, array in index._arrays().items():
        assert np.array_equal(again._arrays()[name], array), name
    flat = linearise(f"SELECT ?x WHERE {{ <{E}Paris> <{P}country> ?x }}", again)
    assert SparqlConstraint(again).accepts([*again.tokens.encode(fresh, flat), 2])
    fresh.add_tokens(["another"])
    with pytest.raises(BadInput, match="another vocabulary"):
        KGIndex.load(tmp_path / "kg", fresh)
    (tmp_path / "kg" / "index.json").write_text("{}")
    with pytest.raises(CorruptFile, match="holds no index"):
        KGIndex.load(tmp_path / "kg", tokenizer)


def test_the_trie_is_a_set_of_sequences():
    source = random.Random(0)
    rows = {(*source.choices(range(5), k=source.randrange(1, 5)), 9) for _ in range(400)}
    rows = sorted(rows)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    trie = Trie(np.array([token for row in rows for token in row], dtype=np.int32), starts)
    members = np.array(sorted(source.sample(range(len(rows)), 60)), dtype=np.int32)
    for part, known in ((trie, rows), (trie.subset(members), [rows[i] for i in members])):
        for prefix in {row[:n] for row in rows for n in range(len(row) + 1)}:
            node = part.root
            for token in prefix:
                node = node and part.step(node, token)
            follow = sorted(
                {row[len(prefix)] for row in known if row[: len(prefix)] == prefix and row != prefix}
            )
            assert (part.children(node).tolist() if node else []) == follow
            assert part.find(prefix) == (rows.index(prefix) if prefix in known else -1)
    assert trie.subset(members[:0]).children(trie.subset(members[:0]).root).tolist() == []


# --- the table of states ------------------------------------------------------------------------------------


class Slow:
    """The table again: lists of strings, states found by counting backwards, sets by looking at every triple."""

    def __init__(self, index, tokenizer, triples, mode):
        self.t, self.mode, self.triples = index.tokens, mode, triples
        texts = index.tokens.texts
        self.text = lambda i: texts.get(i, f"#{i}")
        self.size = index.tokens.size

        def spelt(names):
            found = {}
            for i in range(len(names)):
                middle = tokenizer(names.labels[i], add_special_tokens=False)["input_ids"]
                found[names.iris[i]] = (self.t.wrap_open, *middle, self.t.wrap_close)
            return found

        self.entities, self.relations = spelt(index.entities), spelt(index.relations)
        self.links = [x for x in triples if x[1] != RDFS_LABEL]

    def allowed(self, ids):
        t, words = self.t, [self.text(i) for i in ids]
        variables = set(t.variables.values())
        if not ids:
            return {t.select, t.select_distinct, t.ask}
        ask = words[0] == "ASK"
        if " WHERE" not in words:
            rest = {t.where, t.count, t.attr_open, t.attr_close} | variables
            return {t.where} if ask else rest - set(ids)
        if ids[-1] == t.where and ids.count(t.where) == 1:
            return {t.brack_open}
        if t.eos in ids:
            return {t.eos}
        last = max(i for i, w in enumerate(words) if w in (" brack_open", " sep_dot"))
        since, seen = ids[last + 1 :], words[last + 1 :]
        loose = [i for i, w in enumerate(words) if w in (" FILTER", " brack_close") and i > last]
        wraps = sum(w in (" [ ", " ]") for w in seen)
        inside = wraps % 2 == 1
        opened = max((i for i, w in enumerate(seen) if w == " [ "), default=-1)
        if loose:  # closing words may stand anywhere
            inside = opened > max([i for i, w in enumerate(seen) if w in (" ]", " FILTER", " brack_close")])
        name = tuple(since[opened:]) if inside else ()
        if loose:
            if inside:
                return self.after(name, self.relations.values())
            if words[-1] == " brack_close" and words.count(" brack_open") <= words.count(" brack_close"):
                return {t.order_by, t.eos}
            return set(range(self.size)) - {t.order_by}
        # Outside of names every variable counts two.
        count = wraps + 2 * sum(i in variables for i in since)
        if count == 6:
            return {t.sep_dot, t.brack_close}
        linked = self.mode == "full" and not ask
        head = since[0] in variables if since else None
        iri = None if head or count < 2 else self.read(since, self.entities)
        if count < 2:
            kept = {s for s, _, _ in self.links} if linked else set(self.entities)
            found = self.after(name, [v for k, v in self.entities.items() if k in kept])
            if inside or ask:
                return found
            return found | variables | ({t.filter} if words[-1] == " sep_dot" else set())
        if count < 4:
            kept = set(self.relations)
            if linked and head:
                kept = {p for _, p, o in self.links if not isinstance(o, Text)}
            elif linked:
                kept = {p for s, p, _ in self.links if s == iri}
            return self.after(name, [v for k, v in self.relations.items() if k in kept])
        if not ask and not head:
            return variables
        kept = set(self.entities)
        if linked:
            closed = [i for i, w in enumerate(seen) if w == " [ "]
            relation = self.read(since[closed[0] if head else closed[1] :], self.relations)
            kept = {o for _, p, o in self.links if p == relation and not isinstance(o, Text)}
        found = self.after(name, [v for k, v in self.entities.items() if k in kept])
        return found if inside or ask else found | variables

    def read(self, ids, names):
        end = ids.index(self.t.wrap_close)
        return next(iri for iri, spelt in names.items() if spelt == tuple(ids[: end + 1]))

    @staticmethod
    def after(name, rows):
        return {row[len(name)] for row in rows if row[: len(name)] == name and len(row) > len(name)}


@pytest.mark.parametrize("mode", ["full", "retrieval"])
def test_every_state_allows_what_the_slow_table_does(index, tokenizer, mode):
    slow = Slow(index, tokenizer, TRIPLES, mode)
    constraint, source, states = SparqlConstraint(index, mode=mode), random.Random(1), set()
    for _ in range(250):
        ids = []
        while len(ids) < 60 and (not ids or ids[-1] != index.tokens.eos):
            expected = slow.allowed(ids)
            assert set(constraint(0, torch.tensor(ids, dtype=torch.long))) == expected, tokenizer.decode(ids)
            states.add((constraint.state(ids).place, constraint.state(ids).wraps, constraint.state(ids).ask))
            # Words of the language more often than single bytes, so that walks get somewhere in free places too.
            words = sorted(expected & index.tokens.special - {0, 1}) or sorted(expected)
            ids.append(source.choice(words if source.random() < 0.8 else sorted(expected)))
        replayed = SparqlConstraint(index, mode=mode)
        assert replayed.accepts(ids)  # from its start, without what was remembered
        assert constraint.fallbacks == 0
    assert len(states) > 20


def walk(constraint, ids=()):
    """Every string the constraint lets end."""
    tokens = constraint.index.tokens
    for token in constraint.after(list(ids)).tokens.tolist():
        if token == tokens.eos:
            yield [*ids, token]
        else:
            yield from walk(constraint, (*ids, token))


def test_all_strict_queries_of_one_triple_run_and_none_is_missing(index, tokenizer, store):
    """By brute force: each query the constraint can write, beside each that the triples admit."""
    constraint = SparqlConstraint(index, grammar="strict", max_triples=1)
    found = [to_sparql(ids, index, tokenizer) for ids in walk(constraint)]
    assert len(found) == len(set(found))
    heads, entities = {s for s, _, _ in TRIPLES}, {s for s, _, _ in TRIPLES} | {E + "City"}
    links = {(s, p) for s, p, _ in TRIPLES}
    tails = {(p, o) for _, p, o in TRIPLES if not isinstance(o, Text)}
    relations = {p for _, p, _ in TRIPLES}
    select = [f"<{h}> <{r}> {v}" for h in heads for r in relations if (h, r) in links for v in ("?uri", "?x")]
    for v, (r, o) in itertools.product(("?uri", "?x"), tails):
        select.append(f"{v} <{r}> <{o}>")
    select += [
        f"{a} <{r}> {b}" for a in ("?uri", "?x") for b in ("?uri", "?x") for r in {p for p, _ in tails}
    ]
    shown = ["?uri", "?x", "?uri ?x", "?x ?uri", "(COUNT({}?uri) AS ?count)", "(COUNT({}?x) AS ?count)"]
    expected = {
        f"SELECT {'DISTINCT ' * (d and '(' not in each)}{each.format('DISTINCT ' * d)} WHERE {{ {triple} }}"
        for d in (0, 1) for each in shown for triple in select
    }  # fmt: skip
    expected |= {f"ASK WHERE {{ <{h}> <{r}> <{t}> }}" for h in entities for r in relations for t in entities}
    assert set(found) == expected
    for query in found:
        execute(store, query)  # raises where it cannot run
    # The first projected variable is bound in every SELECT that names it: a head and relation that are linked.
    bound = [q for q in found if q.startswith("SELECT ?uri WHERE") and "?x" not in q]
    assert all(execute(store, query) for query in bound if query.count("?uri") == 2)


def test_strict_queries_of_more_triples_run(index, tokenizer, store):
    constraint, source = SparqlConstraint(index, grammar="strict", max_triples=3), random.Random(5)
    dots = 0
    for _ in range(300):
        ids = []
        while not ids or ids[-1] != index.tokens.eos:
            ids.append(source.choice(constraint.after(ids).tokens.tolist()))
        query = to_sparql(ids, index, tokenizer)
        execute(store, query)
        dots = max(dots, query.count(" . "))
    assert dots == 2


def test_syntax_mode_takes_any_text_as_a_name(index, tokenizer):
    constraint = SparqlConstraint(index, mode="syntax")
    t = index.tokens
    ids = t.encode(
        tokenizer, "SELECT DISTINCT var_uri WHERE brack_open [ nothing known ] [ so ] var_uri brack_close"
    )
    assert constraint.accepts([*ids, t.eos])
    assert not SparqlConstraint(index).accepts(ids)
    opened = ids[: ids.index(t.wrap_open) + 1]
    assert set(constraint(0, torch.tensor(opened))) == set(range(t.size)) - t.special
    longer = [*opened, 50]
    assert set(constraint(0, torch.tensor(longer))) == set(range(t.size)) - t.special | {t.wrap_close}
    headed = ids[: ids.index(t.wrap_close) + 1]
    assert set(constraint(0, torch.tensor(headed))) == {t.wrap_open}
    second = [*headed, t.wrap_open, 50, t.wrap_close]
    assert set(constraint(0, torch.tensor(second))) == set(
        t.variables.values()
    )  # a name as head asks for its tail
    with pytest.raises(BadInput, match="no name of the graph"):
        to_sparql(ids, index, tokenizer)


def test_prefix_names_end_apart(index, tokenizer):
    """`paris (town)` and `paris texas` part after `paris`; `france` may only close after its last token."""
    t, constraint = index.tokens, SparqlConstraint(index)
    before = t.encode(tokenizer, "SELECT var_x WHERE brack_open [ paris")
    tokens = constraint.after(before).tokens.tolist()
    assert t.wrap_close not in tokens
    triples = [(E + "a", P + "is", E + "b"), (E + "b", P + "is", E + "a")]
    short = KGIndex.from_triples(triples, tokenizer, labels={E + "a": "paris", E + "b": "paris texas"})
    after = SparqlConstraint(short).after(
        short.tokens.encode(tokenizer, "SELECT var_x WHERE brack_open [ paris")
    )
    assert len(after.tokens) == 2
    assert t.wrap_close in after.tokens


def test_nothing_allowed_closes_and_is_counted(tokenizer):
    index = KGIndex.from_triples([(E + "a", P + "p", Text("only literals"))], tokenizer)
    t, constraint = index.tokens, SparqlConstraint(index)
    before = [*t.encode(tokenizer, "SELECT var_x WHERE brack_open var_x")]
    assert constraint(0, torch.tensor(before)) == [t.eos]  # no relation has an entity as tail
    assert constraint.fallbacks == 1
    assert constraint.accepts([*before, t.eos])
    astray = [*t.encode(tokenizer, "SELECT var_x WHERE brack_open"), t.wrap_open, 77]
    assert constraint(0, torch.tensor(astray)) == [t.wrap_close]
    assert constraint.fallbacks == 2
    assert not constraint.accepts(astray)
    masked = constraint.processor(0)(torch.tensor([before]), torch.zeros(1, t.size))
    assert masked.isfinite().nonzero()[:, 1].tolist() == [t.eos]


def test_leading_tokens_are_not_the_query(index, tokenizer):
    t = index.tokens
    constraint = SparqlConstraint(index, start=3)
    assert constraint(0, torch.tensor([5, 6])) == list(range(t.size))
    assert constraint(0, torch.tensor([5, 6, 7])) == sorted([t.select, t.select_distinct, t.ask])
    assert constraint(0, torch.tensor([5, 6, 7, t.ask])) == [t.where]
    scores = torch.randn(2, t.size + 7, generator=generator(0))  # a model may score more ids than there are
    early = constraint.processor()(torch.tensor([[5, 6], [5, 6]]), scores)
    assert torch.equal(early, scores)
    free = t.encode(tokenizer, "SELECT var_x WHERE brack_open var_x [ capital ] var_uri sep_dot FILTER")
    rows = torch.tensor([[5, 6, 7, *free], [5, 6, 7, *free[:-1], t.filter]])
    masked = constraint.processor()(rows, scores)
    kept = torch.ones(t.size + 7, dtype=torch.bool)
    kept[t.size :] = kept[t.order_by] = False
    assert torch.equal(masked.isfinite(), kept.expand(2, -1))
    assert torch.equal(masked[:, kept], scores[:, kept])


def test_settings_out_of_range_are_refused(index):
    for settings in ({"mode": "all"}, {"grammar": "loose"}, {"max_triples": 0}):
        with pytest.raises(BadInput, match=next(iter(settings))):
            SparqlConstraint(index, **settings)


class Path_(GraphConstraint):
    """Another schema: head, relation, tail, relation of that tail, ... as wrapped names."""

    def initial(self):
        trie = self.index.heads
        return trie, trie.root, None

    def advance(self, state, token):
        trie, node, head = state
        if token == self.index.tokens.eos:
            return None, None, None
        node = trie.step(node, token)
        number = -1 if node is None else trie.number(node)
        if number < 0:
            return trie, node, head
        if head is None:  # an entity is complete: its relations are next
            trie = self.index.relations_of(number)
            return trie, trie.root, number
        starts = self.index.links["tail_starts"]
        tails = self.index.links["relation_tails"][starts[number] : starts[number + 1]]
        trie = self.index.entities.trie.subset(tails)
        return trie, trie.root, None

    def allowed(self, state):
        from transfuse.steer._graph_constraint import Allowed

        trie, node, _ = state
        return Allowed(np.zeros(0, dtype=np.int64) if trie is None or node is None else trie.children(node))

    def closing(self, state):
        return self.index.tokens.eos


def test_another_schema_in_the_same_frame(index, tokenizer):
    constraint, source, paths = Path_(index), random.Random(0), set()
    for _ in range(60):
        ids = []
        while len(ids) < 40 and index.tokens.eos not in ids:
            ids.append(source.choice(constraint.after(ids).tokens.tolist()))
        paths.add(index.tokens.decode(tokenizer, ids)[:26])
    assert any(path.startswith("[ france ] [ capital ] [ p") for path in paths)
    assert constraint.fallbacks > 0  # an entity without relations ends the path


# --- queries as strings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparql", "flat", "back"),
    [
        (
            "select distinct ?uri where { <E/Paris> <P/country> ?uri . }",
            "SELECT DISTINCT var_uri WHERE brack_open [ paris (town) ] [ country ] var_uri brack_close",
            "SELECT DISTINCT ?uri WHERE { <E/Paris> <P/country> ?uri }",
        ),
        (
            "SELECT DISTINCT COUNT(?uri) WHERE {?uri a <E/City>; p:country <E/USA>, ?x}",
            "SELECT DISTINCT COUNT attr_open var_uri attr_close WHERE brack_open var_uri [ type ] [ town ] sep_dot "
            "var_uri [ country ] [ usa ] sep_dot var_uri [ country ] var_x brack_close",
            f"SELECT (COUNT(DISTINCT ?uri) AS ?count) WHERE {{ ?uri <{RDF_TYPE}> <E/City> . "
            "?uri <P/country> <E/USA> . ?uri <P/country> ?x }",
        ),
        (
            "PREFIX q: <P/> SELECT (COUNT(?x) AS ?n) { ?x q:country <E/USA> }",
            "SELECT COUNT attr_open var_x attr_close WHERE brack_open var_x [ country ] [ usa ] brack_close",
            "SELECT (COUNT(?x) AS ?count) WHERE { ?x <P/country> <E/USA> }",
        ),
        (
            "ASK { <E/USA> <P/capital> <E/Paris> }",
            "ASK WHERE brack_open [ usa ] [ capital ] [ paris (town) ] brack_close",
            "ASK WHERE { <E/USA> <P/capital> <E/Paris> }",
        ),
        (
            "SELECT ?x ?uri WHERE { FILTER(?x != <E/USA> || NOT EXISTS { ?uri p:capital ?x }) # why not\n"
            "?x p:population ?uri FILTER EXISTS { ?x <P/capital> ?uri } } ORDER BY DESC(?uri) LIMIT 1",
            "SELECT var_x var_uri WHERE brack_open var_x [ population ] var_uri sep_dot FILTER attr_open var_x != "
            "<E/USA> expr_or NOT EXISTS brack_open var_uri [ capital ] var_x brack_close attr_close FILTER EXISTS "
            "brack_open var_x [ capital ] var_uri brack_close brack_close ORDER BY DESC attr_open var_uri attr_close "
            "LIMIT 1",
            "SELECT ?x ?uri WHERE { ?x <P/population> ?uri . FILTER ( ?x != <E/USA> || NOT EXISTS { "
            "?uri <P/capital> ?x } ) FILTER EXISTS { ?x <P/capital> ?uri } } ORDER BY DESC ( ?uri ) LIMIT 1",
        ),
        (
            "SELECT ?x WHERE { ?uri <P/population> ?x FILTER regex(?x, 'a b') }",
            "SELECT var_x WHERE brack_open var_uri [ population ] var_x sep_dot FILTER regex attr_open var_x , "
            "'a b' attr_close brack_close",
            "SELECT ?x WHERE { ?uri <P/population> ?x . FILTER regex ( ?x , 'a b' ) }",
        ),
    ],
)
def test_queries_to_flat_strings_and_back(index, tokenizer, store, sparql, flat, back):
    sparql, flat, back = (s.replace("<E/", f"<{E}").replace("<P/", f"<{P}") for s in (sparql, flat, back))
    assert linearise(sparql, index, prefixes={"p": P}) == flat
    ids = index.tokens.encode(tokenizer, flat)
    assert (
        tokenizer(flat)["input_ids"] == ids
    )  # what a name's tokens are does not depend on what is around it
    assert index.tokens.decode(tokenizer, [*ids, index.tokens.eos, 50]) == flat
    assert to_sparql(ids, index, tokenizer) == to_sparql(flat, index, tokenizer) == back
    execute(store, back)
    assert SparqlConstraint(index).accepts([*ids, 2]) == (
        "population ] var_x sep" not in flat and "var_x [ pop" not in flat
    )


def test_unknown_iris_stand_as_their_own_name(index, tokenizer):
    with pytest.warns(UserWarning, match="no entity of the graph"):
        flat = linearise(f"SELECT ?x WHERE {{ <{E}Nowhere> <{P}country> ?x }}", index)
    assert f"[ {E}Nowhere ]" in flat
    with pytest.raises(BadInput, match="no name of the graph"):
        to_sparql(flat, index, tokenizer)


@pytest.mark.parametrize(
    ("sparql", "problem"),
    [
        ("SELECT ?x", "should be"),
        ("DESCRIBE <a>", "SELECT or ASK"),
        ("SELECT * WHERE { ?x <http://kg/p/country> ?uri }", "variable should be"),
        ("SELECT WHERE { ?x <http://kg/p/country> ?uri }", "selects nothing"),
        ("SELECT ?y WHERE { ?y <http://kg/p/country> ?uri }", "uses ?y"),
        ("SELECT ?x WHERE { ?x ?uri ?x }", "as relation"),
        ("SELECT ?x WHERE { ?x <http://kg/p/country> 'France' }", "as entity"),
        ("SELECT ?x WHERE { ?x z:country ?uri }", "prefix z"),
        ("SELECT ?x WHERE { OPTIONAL { ?x <http://kg/p/country> ?uri } }", "as entity"),
        ("SELECT ?x WHERE { ?x <http://kg/p/country> ?uri ?x }", "triple should end"),
        ("SELECT ?x WHERE { FILTER(?x) }", "without triples"),
        ("SELECT ?x WHERE { ?x <http://kg/p/country> ?uri } OFFSET 3", "goes on"),
        ("SELECT ?x WHERE { ?x <http://kg/p/country> \x00 }", "cannot be read"),
    ],
)
def test_other_queries_are_refused(index, sparql, problem):
    with pytest.raises(BadInput) as refused:
        linearise(sparql, index)
    assert problem in str(refused.value)


def test_broken_flat_strings_do_not_become_other_queries(index, tokenizer, store):
    with pytest.raises(BadInput, match="without end"):
        to_sparql("SELECT var_x WHERE brack_open [ france", index, tokenizer)
    with pytest.raises(BadInput, match="no name"):  # a relation in an entity's place
        to_sparql("SELECT var_x WHERE brack_open [ capital ] [ capital ] var_x brack_close", index, tokenizer)
    for flat in ("SELECT COUNT var_x WHERE brack_open var_x [ capital ] var_uri brack_close",
                 "SELECT var_x WHERE brack_open var_x [ capital ] var_uri ] brack_close",
                 "SELECT var_x WHERE brack_open var_x [ capital ] var_uri"):  # fmt: skip
        with pytest.raises(SyntaxError):
            execute(store, to_sparql(flat, index, tokenizer))


# --- answers and scores -------------------------------------------------------------------------------------


def test_answers_of_the_graph(store):
    assert execute(store, f"SELECT ?x {{ <{E}Paris> <{P}country> ?x }}") == (E + "France",)
    assert execute(store, f"ASK {{ <{E}Paris> <{P}country> <{E}USA> }}") == ("false",)
    assert execute(store, f"SELECT (COUNT(?x) AS ?n) {{ ?x <{P}country> ?y }}") == ("2",)
    assert execute(store, f"SELECT ?z {{ ?x <{P}country> ?y }}") == ()  # unbound
    pairs = execute(store, f"SELECT ?x ?y {{ ?x <{P}capital> ?y }}")
    assert pairs == ((E + "France", E + "Paris"),)
    assert execute(store, f"SELECT ?p {{ ?x <{P}population> ?p }} ORDER BY ?p") == ("333", "68")


def test_scores_by_hand():
    assert answer_f1(["a", "b", "c"], ["b", "d"]) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert (answer_f1(["a", "a"], ["a"]), answer_f1([], ["a"]), answer_f1(["a"], [])) == (1.0, 0.0, 0.0)
    assert hits_at_1(["a"], ["a"]) == 1.0
    assert hits_at_1([], ["a"]) == 0.0
    assert hits_at_1(["a", "b"], ["a"], draws=4000) == pytest.approx(0.5, abs=0.05)
    assert hits_at_1(["a", "b"], ["a"], seed=3) == hits_at_1(["b", "a"], ["a"], seed=3)

    def result(status, *answers):
        return QueryResult("q", answers, status, "f")

    results = [
        result("answered", "a", "b"),
        result("answered", "a"),
        result("empty"),
        result("inexecutable"),
        result("answered", "z"),
    ]
    gold = [[["a"], ["a", "b", "c"]], [["a"]], [["a"]], [[], ["a"]], [[]]]  # the last one has no gold answer
    found = score(results, gold)
    assert found.questions == 4
    assert found.f1 == pytest.approx((0.8 + 1 + 0 + 0) / 4)
    assert (found.exact_match, found.inexecutable, found.invalid) == (0.25, 0.25, 0.25)
    assert found.hits_at_1 == 0.5  # both answers are in the second parse
    # Of two parses the one of better F1 counts, though the other holds more of the answers.
    wide = [*"bcd", *(f"other {i}" for i in range(20))]
    found = score([result("answered", *"abcd")], [[["a"], wide]], draws=4000)
    assert found.f1 == pytest.approx(0.4) and found.hits_at_1 == pytest.approx(0.25, abs=0.05)
    with pytest.raises(BadInput, match="does not pair"):
        score(results, gold[:2])
    with pytest.raises(BadInput, match="no answers"):
        score(results[-1:], gold[-1:])
    with pytest.raises(BadInput, match="draws"):
        hits_at_1(["a"], ["a"], draws=0)


def test_beams_are_tried_in_turn(index, tokenizer, store):
    from transfuse.steer._answers import first_answered

    def ids(text):
        return index.tokens.encode(tokenizer, f"SELECT var_x WHERE brack_open {text} brack_close")

    broken, unknown = ids("var_x"), ids("[ nobody ] [ country ] var_x")
    nothing, some = ids("var_x [ capital ] [ usa ]"), ids("var_x [ country ] [ usa ]")
    other = ids("var_x [ country ] [ france ]")
    assert first_answered([broken, nothing, some, other], index, tokenizer, store).answers == (
        E + "Paris_Texas",
    )
    empty = first_answered([unknown, nothing, broken], index, tokenizer, store)
    assert (empty.status, empty.answers) == ("empty", ())
    assert f"<{P}capital> <{E}USA>" in empty.sparql
    failed = first_answered([unknown, broken], index, tokenizer, store)
    assert (failed.status, failed.sparql) == ("inexecutable", "SELECT ?x WHERE { ?x }")
    assert first_answered([unknown], index, tokenizer, store)[0::3] == (
        None,
        index.tokens.decode(tokenizer, unknown),
    )
    assert first_answered([], index, tokenizer, store).status == "inexecutable"


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2"])
def sparkle(request, tiny_lm, tiny_tokenizer):
    method = make(tiny_lm(request.param, layers=2), tiny_tokenizer)[0]
    method.prompt, method.grammar = "{question}", "strict"
    method.constraint = SparqlConstraint(method.index, grammar="strict", max_triples=2)
    method.beams = 4
    return method


def bart(tokenizer, forced=None):
    config = AutoConfig.for_model(
        "bart", vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    with seeded(0):
        model = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(20.0)
    model.generation_config.forced_bos_token_id = forced
    return model.eval()


@torch.no_grad()
def slow_beams(model, ids, constraint, beams, steps, eos):
    """Beam search over Python lists: full forwards, -inf outside the allowed set, scores over length."""
    running, finished = [(0.0, [])], []
    for _ in range(steps):
        grown = []
        for total, new in running:
            logits = model(torch.tensor([[*ids, *new]])).logits[0, -1].float().log_softmax(-1)
            for token in constraint.after(new).tokens.tolist():
                grown.append((total + float(logits[token]), [*new, token]))
        grown.sort(key=lambda pair: -pair[0])
        finished += [(s / len(new), new) for s, new in grown[:beams] if new[-1] == eos]
        running = [pair for pair in grown[: 2 * beams] if pair[1][-1] != eos][:beams]
    return [new for _, new in sorted(finished, key=lambda pair: -pair[0])]


def test_beams_are_the_slow_search(sparkle):
    options = {"num_beams": 3, "num_return_sequences": 3, "early_stopping": "never"}
    for question in QUESTIONS[:2]:
        found = sparkle._decode([question], 60, 1, **options)[0]
        ids = sparkle.tokenizer(question)["input_ids"]
        fresh = SparqlConstraint(sparkle.index, grammar="strict", max_triples=2)
        assert found == slow_beams(sparkle.model, ids, fresh, 3, 60, sparkle.index.tokens.eos)[:3]


def test_every_beam_of_an_untrained_model_runs(sparkle):
    results = sparkle.answer(QUESTIONS, max_new_tokens=100)
    assert {r.status for r in results} <= {"answered", "empty"}
    for beams in sparkle._decode(QUESTIONS, 100, 3, num_beams=4, num_return_sequences=4):
        for ids in beams:
            assert ids[-1] == sparkle.index.tokens.eos
            execute(sparkle.store, to_sparql(ids, sparkle.index, sparkle.tokenizer))
    assert sparkle.constraint.fallbacks == 0
    one = sparkle.answer(QUESTIONS[0], max_new_tokens=100)
    assert one == results[0]
    assert one.sparql == to_sparql(one.flat, sparkle.index, sparkle.tokenizer)
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"use_cache": False}):
        assert sparkle.answer(QUESTIONS, max_new_tokens=100, **options) == results


def test_more_beams_than_queries(tiny_lm, tiny_tokenizer):
    """One head, relation and variable: what the surplus beams write is dropped, not run."""
    tokenizer, model = copy.deepcopy(tiny_tokenizer), tiny_lm("llama", layers=2)
    extended(model, tokenizer, ["x"])
    triples = [(E + "a", P + "p", Text("7"))]
    index = KGIndex.from_triples(triples, tokenizer, variables=["x"])
    method = Sparkle(model, tokenizer, index, graph(triples), beams=40, grammar="strict", max_triples=1)
    queries = {to_sparql(ids, index, tokenizer) for ids in walk(method.constraint)}
    assert len(queries) < 40
    result = method.answer("The mayor", max_new_tokens=30)
    assert result.sparql in queries
    assert result.status == "answered"


def test_modes_differ_and_none_is_the_plain_model(sparkle):
    plain = sparkle.neutral()
    assert plain.constraint is None
    texts = generate_texts(sparkle.model, sparkle.tokenizer, QUESTIONS, max_new_tokens=8)
    assert plain.generate(QUESTIONS, max_new_tokens=8) == texts
    assert sparkle.constraint is not None
    assert plain.answer(QUESTIONS[0], max_new_tokens=8).status == "inexecutable"
    inputs = sparkle.tokenizer(QUESTIONS[0], return_tensors="pt")
    direct = sparkle.model.generate(**inputs, custom_generate=sparkle, max_new_tokens=40, do_sample=False)
    text = sparkle.index.tokens.decode(sparkle.tokenizer, direct[0, inputs["input_ids"].shape[1] :].tolist())
    assert sparkle.generate(QUESTIONS[0], max_new_tokens=40) == text
    fn = SparqlConstraint(sparkle.index, grammar="strict", max_triples=2, start=inputs["input_ids"].shape[1])
    through = sparkle.model.generate(
        **inputs, prefix_allowed_tokens_fn=fn, max_new_tokens=40, do_sample=False
    )
    assert torch.equal(through, direct)
    sparkle.model.generation_config.eos_token_id = (
        None  # a query ends at the tokenizer's end token all the same
    )
    assert sparkle.generate(QUESTIONS[0], max_new_tokens=40) == text
    drawn = [sparkle.generate(QUESTIONS[0], max_new_tokens=90, do_sample=True) for _ in range(8)]
    assert len(set(drawn)) > 1
    for each in drawn:
        assert sparkle.constraint.accepts(sparkle.index.tokens.encode(sparkle.tokenizer, each))


@pytest.mark.parametrize("forced", [None, 1])
def test_encoder_decoder_models(tokenizer, index, store, forced):
    model = bart(tokenizer, forced)
    assert start_of(model, 17) == (1 if forced is None else 2)
    method = Sparkle(model, tokenizer, index, store, beams=3, grammar="strict", max_triples=2)
    results = method.answer(QUESTIONS, max_new_tokens=100)
    assert {r.status for r in results} <= {"answered", "empty"}
    assert [method.answer(q, max_new_tokens=100) for q in QUESTIONS] == results
    inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
    fn = SparqlConstraint(index, grammar="strict", max_triples=2, start=start_of(model, 0))
    found = model.generate(**inputs, prefix_allowed_tokens_fn=fn, max_new_tokens=100, num_beams=3)
    flat = index.tokens.decode(tokenizer, found[0, start_of(model, 0) :].tolist())
    assert flat == method.generate(QUESTIONS[0], num_beams=3, max_new_tokens=100)
    rows = method.examples([("who?", f"SELECT ?x {{ <{E}Paris> <{P}country> ?x }}")])
    assert rows[0]["input_ids"] == tokenizer("who?")["input_ids"]
    assert rows[0]["labels"][-1] == 2


def test_training_rows(sparkle):
    question = "Where is Paris?"
    (row,) = sparkle.examples([(question, f"SELECT ?x {{ <{E}Paris> <{P}country> ?x }}")])
    prompt = sparkle.tokenizer(question)["input_ids"]
    target = row["labels"][len(prompt) :]
    assert row["input_ids"] == prompt + target
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert sparkle.constraint.accepts(target)
    assert target[-1] == sparkle.index.tokens.eos


def test_a_file_of_questions(sparkle, tmp_path):
    model, tokenizer = sparkle.model, sparkle.tokenizer
    (tmp_path / "kg.nt").write_bytes(
        sparkle.store.dump(format=ox.RdfFormat.N_TRIPLES, from_graph=ox.DefaultGraph())
    )
    (tmp_path / "qa.jsonl").write_text(
        "".join(
            json.dumps({"question": q, "answers": [E + "France"], "id": str(i)}) + "\n"
            for i, q in enumerate(QUESTIONS)
        )
    )
    paths = {"questions": tmp_path / "qa.jsonl", "graph": tmp_path / "kg.nt", "output": tmp_path / "out"}
    settings = {"beams": 2, "grammar": "strict", "max_triples": 1, "max_new_tokens": 60}
    answer_questions(model, tokenizer, **paths, **settings)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    index = KGIndex.from_store(sparkle.store, tokenizer)
    direct = Sparkle(model, tokenizer, index, sparkle.store, beams=2, grammar="strict", max_triples=1)
    for row, result in zip(rows, direct.answer(QUESTIONS, max_new_tokens=60)):
        assert (row["sparql"], row["status"]) == (result.sparql, result.status)
        assert sorted(row["answers"]) == sorted(json.loads(json.dumps(result.answers)))
    record = json.loads((tmp_path / "out" / "transfuse.json").read_text())
    assert record["method"] == "sparkle"
    assert record["measurements"]["questions"] == 3
    (tmp_path / "kg.nt").write_text("no triples here")
    with pytest.raises(BadInput, match="cannot be read"):
        answer_questions(model, tokenizer, **paths)
    with pytest.raises(BadInput, match="lacks words"):
        answer_questions(model, copy.deepcopy(tokenizer), variables=["new"], **paths)


def test_what_cannot_be_done_is_refused(sparkle, tiny_tokenizer, tiny_lm, monkeypatch):
    index, model = sparkle.index, sparkle.model
    for triples in ([], LABELS, [("_:a", P + "p", "_:b")]):
        with pytest.raises(BadInput, match="link no entity"):
            KGIndex.from_triples(triples, sparkle.tokenizer)
    for variables, problem in (((), "is empty"), (("?x",), "is no variable")):
        with pytest.raises(BadInput, match=problem):
            add_query_tokens(copy.deepcopy(tiny_tokenizer), variables)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(BadInput, match="no end token"):
        add_query_tokens(endless)
    small = Sparkle(tiny_lm("llama"), sparkle.tokenizer, index, sparkle.store)
    with pytest.raises(BadInput, match="knows fewer"):
        small.answer("who?")
    for change, problem in (({"store": None}, "is missing"), ({"beams": 0}, "leaves no query")):
        other = copy.copy(sparkle)
        vars(other).update(change)
        with pytest.raises(BadInput, match=problem):
            other.answer("who?")
    for questions, problem in (([], "is empty"), ("", "has no tokens"), ("word " * 400, "positions")):
        with pytest.raises(BadInput, match=problem):
            sparkle.generate(questions)
    with pytest.raises(BadInput, match=r"lacks \{question\}"):
        Sparkle(model, sparkle.tokenizer, index, prompt="Q").generate("who?")
    with pytest.raises(BadInput, match="mode"):
        Sparkle(model, sparkle.tokenizer, index, mode="half")
    for options in ({"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}):
        with pytest.raises(NotApplicable):
            sparkle.generate("who?", max_new_tokens=3, **options)
    import transfuse.core.extras as extras

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"transfuse\[graph\]"):
        execute(sparkle.store, "ASK { ?x ?y ?z }")


def test_half_precision_scores_are_masked_as_they_are(index):
    scores = torch.randn(1, index.tokens.size, generator=generator(0)).bfloat16()
    masked = LogitsProcessorList([SparqlConstraint(index).processor()])(
        torch.zeros(1, 0, dtype=torch.long), scores
    )
    kept = masked.isfinite()
    assert masked.dtype == torch.bfloat16
    assert int(kept.sum()) == 3
    assert torch.equal(masked[kept], scores[kept])


def test_no_warning_on_the_usual_path(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KGIndex.from_triples(TRIPLES + LABELS, tokenizer)
