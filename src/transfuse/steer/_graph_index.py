"""What a constraint knows of a graph: its names as tries, and which of them are linked.

Entities and relations are numbered in the order of their token ids. Two tables hold the links: the relations of
each head, and the entities that are tails of each relation (literals are tails of none). The tries of one head's
relations and of one relation's tails are views of the two tries, made when first asked for.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.extras import require
from transfuse.core.files import atomic_dir, atomic_write, read_tensors, sha256_json, write_tensors
from transfuse.steer._graph_tokens import QueryTokens, add_query_tokens
from transfuse.steer._graph_trie import Names, Strings, Trie

__all__ = ["RDFS_LABEL", "RDF_TYPE", "KGIndex", "Text", "local_name"]

RDF_TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
RDFS_LABEL = "http://www.w3.org/2000/01/rdf-schema#label"
_CHUNK = 20_000  # names tokenised together
_KEPT = 4096  # tries of single heads or relations that are kept


class Text(NamedTuple):
    """A literal as the object of a triple."""

    value: str
    language: str = ""


Triple = tuple[str, str, str | Text]
"""Subject and predicate IRI; object IRI or literal. A blank node begins with `_:`."""


def local_name(iri: str) -> str:
    """What stands for a label where there is none: the last part of an IRI, read as text."""
    return unquote(re.split(r"[/#]", iri.rstrip("/#"))[-1]).replace("_", " ")


class KGIndex:
    """Tries of names and tables of links.

    Args:
        tokens: Ids of the query language.
        entities: Names of the entities.
        relations: Names of the relations.
        links: int64 arrays `head_starts` `[E + 1]` and `tail_starts` `[R + 1]`, int32 arrays `head_relations` and
            `relation_tails`: the relations of head h are `head_relations[head_starts[h] : head_starts[h + 1]]`,
            rising, and likewise the tails of a relation.
        vocabulary: Hash of the tokenizer's vocabulary.
    """

    def __init__(
        self,
        tokens: QueryTokens,
        entities: Names,
        relations: Names,
        links: Mapping[str, np.ndarray],
        vocabulary: str,
    ):
        self.tokens, self.entities, self.relations = tokens, entities, relations
        self.links, self.vocabulary = dict(links), vocabulary
        self._tries: dict[tuple[str, int], Trie] = {}

    @classmethod
    def from_triples(
        cls,
        triples: Iterable[Triple],
        tokenizer: PreTrainedTokenizerBase,
        *,
        variables: Sequence[str] = ("uri", "x"),
        labels: Mapping[str, str] | None = None,
        label_predicate: str = RDFS_LABEL,
        type_predicate: str | None = RDF_TYPE,
        language: str = "en",
    ) -> KGIndex:
        """Index a stream of triples; they are read once and not kept.

        An entity's name is its label in lower case, without square brackets, with the labels of its types behind
        it: `paris (city)`. A relation's name is its label. Where a name is taken, the IRI is appended; IRIs are
        named in alphabetical order, so that the order of the triples does not matter.

        Args:
            triples: Subject, predicate and object; literals as `Text`.
            tokenizer: The words of the query language are added to it where they are missing.
            variables: Names of the variables queries may use.
            labels: IRI -> label; goes before the labels of the graph.
            label_predicate: Its triples give labels (without one: `local_name`) and are no links.
            type_predicate: Its triples give types; they are links as well. None leaves types out of the names.
            language: Labels in it, or in none, are preferred.

        Raises:
            BadInput: no triples, or two things that cannot be told apart by their tokens.
        """
        entities: dict[str, int] = {}
        relations: dict[str, int] = {}
        heads, edges, tails = array("i"), array("i"), array("i")
        preferred: dict[str, str] = {}
        spare: dict[str, str] = {}
        for subject, predicate, obj in triples:
            literal = isinstance(obj, Text)
            if predicate == label_predicate and isinstance(obj, Text):
                (preferred if obj.language in ("", language) else spare).setdefault(subject, obj.value)
                continue
            heads.append(-1 if subject.startswith("_:") else entities.setdefault(subject, len(entities)))
            edges.append(relations.setdefault(predicate, len(relations)))
            named = not literal and not str(obj).startswith("_:")
            tails.append(entities.setdefault(str(obj), len(entities)) if named else -1)
        if not edges or not entities:
            raise BadInput("triples", len(edges), "link no entity", "give triples of IRIs")
        tokens = add_query_tokens(tokenizer, variables)
        h, r, t = (np.frombuffer(each, dtype=np.int32) for each in (heads, edges, tails))

        def label(iri: str) -> str:
            found = (labels or {}).get(iri) or preferred.get(iri) or spare.get(iri) or local_name(iri)
            return " ".join(found.replace("[", " ").replace("]", " ").split())

        kinds: dict[str, list[str]] = {}
        if type_predicate in relations:
            iris = list(entities)
            typed = r == relations[str(type_predicate)]
            for a, b in zip(h[typed].tolist(), t[typed].tolist()):
                if a >= 0 and b >= 0:
                    kinds.setdefault(iris[a], []).append(label(iris[b]))

        def entity_name(iri: str) -> str:
            types = ", ".join(sorted(set(kinds.get(iri, ()))))
            return f"{label(iri).lower()} ({types})" if types else label(iri).lower()

        found_entities, entity_rank = _named(entities, entity_name, tokenizer, tokens)
        found_relations, relation_rank = _named(relations, label, tokenizer, tokens)
        links = _links(
            np.where(h >= 0, entity_rank[h], -1), relation_rank[r], np.where(t >= 0, entity_rank[t], -1),
            len(entities), len(relations),
        )  # fmt: skip
        return cls(tokens, found_entities, found_relations, links, _vocabulary(tokenizer))

    @classmethod
    def from_store(cls, store: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> KGIndex:
        """Index the default graph of a `pyoxigraph.Store`; options as of `from_triples`."""
        return cls.from_triples(_triples(store), tokenizer, **options)

    # --- links ------------------------------------------------------------------------------------------------

    @cached_property
    def heads(self) -> Trie:
        """Entities that have a relation."""
        return self.entities.trie.subset(np.flatnonzero(np.diff(self.links["head_starts"])))

    @cached_property
    def linking(self) -> Trie:
        """Relations that have an entity as tail."""
        return self.relations.trie.subset(np.flatnonzero(np.diff(self.links["tail_starts"])))

    def relations_of(self, head: int) -> Trie:
        """The relations of an entity, by number."""
        return self._linked("head", head, self.relations.trie)

    def tails_of(self, relation: int) -> Trie:
        """The entities that are tails of a relation, by number."""
        return self._linked("tail", relation, self.entities.trie)

    def _linked(self, side: str, number: int, names: Trie) -> Trie:
        found = self._tries.get((side, number))
        if found is None:
            starts = self.links[f"{side}_starts"]
            members = self.links["head_relations" if side == "head" else "relation_tails"]
            found = names.subset(members[starts[number] : starts[number + 1]])
            if len(self._tries) >= _KEPT:
                self._tries.clear()
            self._tries[side, number] = found
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(each.nbytes for each in self._arrays().values())

    # --- on disk ----------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = {"entities": self.entities.arrays(), "relations": self.relations.arrays()}
        named = {f"{kind}.{name}": a for kind, arrays in parts.items() for name, a in arrays.items()}
        return named | {f"links.{name}": a for name, a in self.links.items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `index.safetensors` and `index.json` into a folder, replaced at once."""
        with atomic_dir(folder, mark="index.json") as made:
            arrays = {name: torch.from_numpy(np.array(a)) for name, a in self._arrays().items()}
            write_tensors(made / "index.safetensors", arrays)
            about = {"variables": list(self.tokens.variables), "vocabulary": self.vocabulary}
            atomic_write(made / "index.json", json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> KGIndex:
        """Read what `save` wrote.

        Raises:
            BadInput: the tokenizer is not the one the index was made with.
            CorruptFile: a file is missing or damaged.
        """
        path = Path(folder)
        try:
            about = json.loads((path / "index.json").read_text(encoding="utf-8"))
            variables, vocabulary = list(about["variables"]), str(about["vocabulary"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile("folder", str(path), f"holds no index ({error})", "save it again") from error
        tokens = add_query_tokens(tokenizer, variables)
        if _vocabulary(tokenizer) != vocabulary:
            raise BadInput(
                "tokenizer", type(tokenizer).__name__, "has another vocabulary than the index",
                "use the tokenizer the index was made with",
            )  # fmt: skip
        tensors, _ = read_tensors(path / "index.safetensors")
        parts: dict[str, dict[str, np.ndarray]] = {"entities": {}, "relations": {}, "links": {}}
        try:
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                parts[kind][rest] = tensor.numpy()
            entities, relations = (Names.of_arrays(parts[kind]) for kind in ("entities", "relations"))
            return cls(tokens, entities, relations, parts["links"], vocabulary)
        except KeyError as error:
            raise CorruptFile("folder", str(path), f"lacks {error}", "save the index again") from error


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return sha256_json(sorted(tokenizer.get_vocab().items()))


def _triples(store: Any) -> Iterator[Triple]:
    ox = require("pyoxigraph", extra="graph")

    def term(node: Any) -> str:
        return node.value if isinstance(node, ox.NamedNode) else f"_:{node.value}"

    for quad in store.quads_for_pattern(None, None, None, ox.DefaultGraph()):
        subject, obj = quad.subject, quad.object
        if isinstance(subject, ox.Triple) or isinstance(obj, ox.Triple):
            continue  # statements about statements have no name
        literal = isinstance(obj, ox.Literal)
        yield (
            term(subject),
            quad.predicate.value,
            Text(obj.value, obj.language or "") if literal else term(obj),
        )


def _named(
    found: Mapping[str, int], name_of: Any, tokenizer: PreTrainedTokenizerBase, tokens: QueryTokens
) -> tuple[Names, np.ndarray]:
    """Name things, and say which number each of the old ones (`found`: IRI -> old number) gets."""
    iris = sorted(found)
    names = [name_of(iri) for iri in iris]
    keys = _keys(names, iris, tokenizer, tokens)
    for _ in range(3):
        order = sorted(range(len(keys)), key=keys.__getitem__)  # equal ones stay in the order of their IRIs
        taken = [b for a, b in zip(order, order[1:]) if keys[a] == keys[b]]  # noqa: RUF007
        if not taken:
            break
        for i in taken:
            names[i] = f"{names[i]} {iris[i]}"
        longer = _keys([names[i] for i in taken], [iris[i] for i in taken], tokenizer, tokens)
        for i, key in zip(taken, longer, strict=True):
            keys[i] = key
    else:
        same = [iris[i] for i in range(len(keys)) if keys[i] == keys[taken[0]]]
        raise BadInput("labels", same[:2], "have the same tokens, IRI included", "give one another label")
    starts = np.zeros(len(keys) + 1, dtype=np.int64)
    np.cumsum([len(keys[i]) // 4 for i in order], out=starts[1:])
    data = np.frombuffer(b"".join(keys[i] for i in order), dtype=">i4").astype(np.int32)
    rank = np.empty(len(keys), dtype=np.int32)
    rank[order] = np.arange(len(keys), dtype=np.int32)
    names_of = Strings.of([names[i] for i in order])
    made = Names(Trie(data, starts), Strings.of([iris[i] for i in order]), names_of, rank)
    by_old = np.empty(len(keys), dtype=np.int32)
    by_old[np.fromiter((found[iri] for iri in iris), dtype=np.int64, count=len(iris))] = rank
    return made, by_old


def _keys(
    names: list[str], iris: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: QueryTokens
) -> list[bytes]:
    """Wrapped ids of each name as bytes that sort as the ids do. What cannot be a name becomes its IRI, in place."""
    keys: list[bytes] = []
    for start in range(0, len(names), _CHUNK):
        part = tokens.wrap(tokenizer, names[start : start + _CHUNK])
        for i, ids in enumerate(part, start):
            if ids is None:
                if names[i]:
                    warnings.warn(
                        f"{names[i]!r} spells a special token: {iris[i]} goes by its IRI", stacklevel=5
                    )
                names[i] = iris[i]
                ids = tokens.wrap(tokenizer, [iris[i]])[0]
            if ids is None:
                raise BadInput("labels", iris[i], "cannot be a name: it spells a special token", "label it")
            keys.append(np.asarray(ids, dtype=">i4").tobytes())
    return keys


def _links(
    h: np.ndarray, r: np.ndarray, t: np.ndarray, entities: int, relations: int
) -> dict[str, np.ndarray]:
    """The two tables, rows sorted and each pair once; -1 stands for a head or tail without a name."""
    tables: dict[str, np.ndarray] = {}
    for side, rows, columns, height, width, name in (
        ("head", h, r, entities, relations, "head_relations"),
        ("tail", r, t, relations, entities, "relation_tails"),
    ):
        valid = (rows >= 0) & (columns >= 0)
        pairs = np.unique(rows[valid].astype(np.int64) * width + columns[valid])
        tables[f"{side}_starts"] = np.searchsorted(pairs, np.arange(height + 1, dtype=np.int64) * width)
        tables[name] = (pairs % width).astype(np.int32)
    return tables
