"""SPARQL to flat queries and back.

Covered are SELECT (variables or one COUNT) and ASK over basic graph patterns with FILTER, [NOT] EXISTS, ORDER BY and
LIMIT. Filters move behind the triples of their group, where the meaning is the same. `SELECT DISTINCT COUNT(?x)`,
which is no SPARQL 1.1 but found in data sets, is read as the count of distinct values.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from transfuse.core.errors import BadInput
from transfuse.steer._graph_index import RDF_TYPE, KGIndex
from transfuse.steer._graph_tokens import WORDS

__all__ = ["linearise", "to_sparql"]

_LEXEME = re.compile(
    r"""(?P<iri><[^<>"{}|^`\\\s]*>)
    |(?P<comment>\#[^\n]*)
    |(?P<text>(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')(?:@[\w-]+|\^\^(?:<[^>]*>|[\w-]*:\w+))?)
    |(?P<variable>[?$]\w+)
    |(?P<short>[\w-]*:[\w%-]*(?:\.[\w%-]+)*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<sign>\|\||&&|!=|<=|>=|[{}().;,*=<>!+/-])
    |(?P<space>\s+)""",
    re.VERBOSE,
)
_SPARQL = {
    "select_distinct": "SELECT DISTINCT", "select": "SELECT", "ask": "ASK", "where": "WHERE", "brack_open": "{",
    "brack_close": "}", "sep_dot": ".", "count": "COUNT", "attr_open": "(", "attr_close": ")",
    "order_by": "ORDER BY", "limit": "LIMIT", "filter": "FILTER", "exists": "EXISTS", "not_": "NOT",
    "expr_or": "||", "desc": "DESC",
}  # fmt: skip
_IN_FILTERS = {
    "(": "attr_open",
    ")": "attr_close",
    "||": "expr_or",
    "EXISTS": "exists",
    "NOT": "not_",
    "DESC": "desc",
}
_COUNT = re.compile(r"(SELECT(?: DISTINCT)?) COUNT \( (\?\w+) \) WHERE")

Lexeme = tuple[str, str]


def linearise(sparql: str, index: KGIndex, *, prefixes: Mapping[str, str] | None = None) -> str:
    """The flat string of a query: what a model learns to write.

    An IRI that the graph does not have stands as its own name, with a warning: no constraint will ever allow it.

    Args:
        sparql: The query.
        index: Names the IRIs.
        prefixes: Those the query uses without declaring them, `{"dbo": "http://dbpedia.org/ontology/"}`.

    Raises:
        BadInput: not such a query, or a variable the index does not know.
    """
    return _Reader(sparql, index, prefixes or {}).query()


class _Reader:
    def __init__(self, sparql: str, index: KGIndex, prefixes: Mapping[str, str]):
        self.sparql, self.index, self.prefixes = sparql, index, dict(prefixes)
        self.at, self.lexemes = 0, list(self._lexemes())

    def _lexemes(self) -> list[Lexeme]:
        found: list[Lexeme] = []
        place = 0
        while place < len(self.sparql):
            match = _LEXEME.match(self.sparql, place)
            if match is None:
                raise self._error(f"cannot be read from {self.sparql[place : place + 12]!r} on")
            place = match.end()
            kind = str(match.lastgroup)
            if kind not in ("space", "comment"):
                found.append((kind, match[0].upper() if kind == "word" and _known(match[0]) else match[0]))
        return found

    def _error(self, problem: str) -> BadInput:
        return BadInput("sparql", self.sparql, problem, "give a SELECT or ASK query of plain triple patterns")

    def peek(self) -> str:
        return self.lexemes[self.at][1] if self.at < len(self.lexemes) else ""

    def take(self, *expected: str) -> Lexeme:
        if self.at == len(self.lexemes) or (expected and self.peek() not in expected):
            raise self._error(f"has {self.peek()!r} where {' or '.join(expected) or 'more'} should be")
        self.at += 1
        return self.lexemes[self.at - 1]

    def skip(self, text: str) -> bool:
        found = self.peek() == text
        self.at += found
        return found

    # --- the parts of a query ---------------------------------------------------------------------------------

    def query(self) -> str:
        while self.skip("PREFIX"):
            name = self.take()[1]
            self.prefixes[name.rstrip(":")] = self.take()[1][1:-1]
        form, shown = self.take("SELECT", "ASK")[1], ""
        words = WORDS
        if form == "SELECT":
            distinct, shown = self.projection()
            start = words["select_distinct" if distinct else "select"]
        else:
            start = words["ask"]
        self.skip("WHERE")
        flat = start + shown + words["where"] + self.group()
        if self.skip("ORDER"):
            self.take("BY")
            flat += words["order_by"] + self.free(until=("LIMIT", "OFFSET", ""))
        if self.skip("LIMIT"):
            flat += f"{words['limit']} {self.take()[1]}"
        if self.at < len(self.lexemes):
            raise self._error(f"goes on with {self.peek()!r}")
        return flat

    def projection(self) -> tuple[bool, str]:
        distinct, shown = self.skip("DISTINCT"), ""
        while self.peek() not in ("WHERE", "{"):
            wrapped = self.skip("(")
            if not self.skip("COUNT"):
                shown += self.variable()
                continue
            self.take("(")
            distinct = self.skip("DISTINCT") or (distinct and not wrapped)
            shown += WORDS["count"] + WORDS["attr_open"] + self.variable() + WORDS["attr_close"]
            self.take(")")
            if wrapped:
                self.take("AS")
                self.take()
                self.take(")")
        if not shown:
            raise self._error("selects nothing")
        return distinct, shown

    def variable(self) -> str:
        kind, text = self.take()
        if kind != "variable":
            raise self._error(f"has {text!r} where a variable should be")
        if text[1:] not in self.index.tokens.variables:
            known = ", ".join(f"?{name}" for name in self.index.tokens.variables)
            raise BadInput(
                "sparql", self.sparql, f"uses {text}", f"use {known}, or index with more variables"
            )
        return f" var_{text[1:]}"

    def group(self) -> str:
        self.take("{")
        triples: list[str] = []
        filters = ""
        while not self.skip("}"):
            if self.skip("FILTER"):
                filters += WORDS["filter"] + self.filter()
                self.skip(".")
            else:
                triples += self.triples()
        if not triples:
            raise self._error("has a group without triples")
        inner = WORDS["sep_dot"].join(triples) + (WORDS["sep_dot"] + filters if filters else "")
        return WORDS["brack_open"] + inner + WORDS["brack_close"]

    def triples(self) -> list[str]:
        """One subject with its predicates and objects."""
        found: list[str] = []
        subject = self.term("entity")
        while True:
            relation = self.term("relation")
            found.append(subject + relation + self.term("entity"))
            while self.skip(","):
                found.append(subject + relation + self.term("entity"))
            if not self.skip(";"):
                break
        if not self.skip(".") and self.peek() not in ("}", "FILTER"):
            raise self._error(f"has {self.peek()!r} where a triple should end")
        return found

    def term(self, kind: str) -> str:
        if (
            self.lexemes[self.at : self.at + 1]
            and self.lexemes[self.at][0] == "variable"
            and kind == "entity"
        ):
            return self.variable()
        iri = self.iri(self.take())
        if iri is None:
            raise self._error(f"has {self.lexemes[self.at - 1][1]!r} as {kind}, which has no name")
        names = self.index.entities if kind == "entity" else self.index.relations
        number = names.number(iri)
        if number < 0:
            warnings.warn(f"{iri} is no {kind} of the graph: it stands as its own name", stacklevel=6)
        return WORDS["wrap_open"] + (iri if number < 0 else names.labels[number]) + WORDS["wrap_close"]

    def iri(self, lexeme: Lexeme) -> str | None:
        kind, text = lexeme
        if kind == "iri":
            return text[1:-1]
        if text == "a":
            return RDF_TYPE
        prefix, _, rest = text.partition(":")
        if kind != "short":
            return None
        if prefix not in self.prefixes:
            raise self._error(f"uses the prefix {prefix}: without saying what it means")
        return self.prefixes[prefix] + rest

    def filter(self) -> str:
        """The expression of a FILTER: EXISTS and its group, or everything up to the closing parenthesis."""
        flat = WORDS["not_"] if self.skip("NOT") else ""
        if self.skip("EXISTS"):
            return flat + WORDS["exists"] + self.group()
        if self.peek() != "(":
            flat += f" {self.take()[1]}"
        self.take("(")
        flat += WORDS["attr_open"] + self.free(until=(")",))
        self.take(")")
        return flat + WORDS["attr_close"]

    def free(self, until: Sequence[str]) -> str:
        """Words, variables and names up to one of `until`, outside of parentheses opened on the way."""
        flat, open_ = "", 0
        while open_ or self.peek() not in until:
            kind, text = self.take()
            open_ += (text == "(") - (text == ")")
            iri = self.iri((kind, text)) if kind in ("iri", "short") else None
            if kind == "variable":
                self.at -= 1
                flat += self.variable()
            elif text in _IN_FILTERS:
                flat += WORDS[_IN_FILTERS[text]] + (self.group() if text == "EXISTS" else "")
            elif iri is not None and (number := self.index.relations.number(iri)) >= 0:
                flat += WORDS["wrap_open"] + self.index.relations.labels[number] + WORDS["wrap_close"]
            else:
                flat += f" <{iri}>" if iri is not None else f" {text}"
        return flat


def _known(word: str) -> bool:
    return word.upper() in {
        "SELECT", "DISTINCT", "ASK", "WHERE", "COUNT", "AS", "ORDER", "BY", "ASC", "DESC", "LIMIT", "OFFSET",
        "FILTER", "EXISTS", "NOT", "PREFIX",
    }  # fmt: skip


def to_sparql(query: str | Sequence[int], index: KGIndex, tokenizer: PreTrainedTokenizerBase) -> str:
    """The executable query of a flat string or of its token ids (up to their end token).

    Names between wrap tokens become IRIs: relations in the second place of a triple, entities in the others; in
    filters, relations before entities.

    Raises:
        BadInput: a name the graph does not have, or one that does not end.
    """
    tokens = index.tokens
    ids = tokens.encode(tokenizer, query) if isinstance(query, str) else list(query)
    words = {getattr(tokens, name): text for name, text in _SPARQL.items()}
    words[tokens.wrap_close] = "]"  # where no name is open: it will not parse, and should not
    words |= {number: f"?{name}" for name, number in tokens.variables.items()}
    variables = frozenset(tokens.variables.values())
    parts: list[str] = []
    name: list[int] | None = None
    term, pattern = 0, False  # which term of a triple pattern comes next
    for run in tokens.runs(ids):
        if name is not None:
            name += [run] if isinstance(run, int) else run
            if run == tokens.wrap_close:
                kinds = [index.relations] if term == 1 else [index.entities]
                if not pattern:
                    kinds = [index.relations, index.entities]
                found = next((k.iris[n] for k in kinds if (n := k.trie.find(name)) >= 0), None)
                if found is None:
                    raise BadInput(
                        "query", tokens.decode(tokenizer, name), "is no name of the graph", "use a known one"
                    )
                parts.append(f"<{found}>")
                name, term = None, term + 1
        elif run == tokens.wrap_open:
            name = [run]
        elif not isinstance(run, int):
            parts.append(str(tokenizer.decode(run, skip_special_tokens=True)).strip())
        else:
            parts.append(words[run])
            term += run in variables
            if run in (tokens.brack_open, tokens.sep_dot):
                term, pattern = 0, True
            elif run in (tokens.brack_close, tokens.filter):
                pattern = False
    if name is not None:
        raise BadInput("query", tokens.decode(tokenizer, name), "is a name without end", "close it")
    return _COUNT.sub(_counting, " ".join(part for part in parts if part))


def _counting(match: re.Match[str]) -> str:
    distinct = "DISTINCT " if match[1].endswith("DISTINCT") else ""
    return f"SELECT (COUNT({distinct}{match[2]}) AS ?count) WHERE"
