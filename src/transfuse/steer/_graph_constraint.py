"""Decoding that a graph constrains: which tokens may follow what was generated so far.

`GraphConstraint` is the frame for any schema: a state per prefix, one step per token, the tokens a state allows. It
serves as transformers' `prefix_allowed_tokens_fn` and makes a faster processor. `SparqlConstraint` is the grammar
of flat queries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor

from transfuse.core.errors import BadInput
from transfuse.steer._graph_index import KGIndex
from transfuse.steer._graph_trie import Node, Trie

__all__ = ["Allowed", "GraphConstraint", "SparqlConstraint"]

State = TypeVar("State")
_PREFIXES = 50_000  # states that are kept


class Allowed(NamedTuple):
    """What may follow.

    Attributes:
        tokens: int64, rising.
        others: The tokens are those that may not follow.
    """

    tokens: np.ndarray
    others: bool = False

    def holds(self, token: int) -> bool:
        """Whether a token may follow."""
        i = int(np.searchsorted(self.tokens, token))
        return (i < len(self.tokens) and self.tokens[i] == token) != self.others


class GraphConstraint(ABC, Generic[State]):
    """A function from generated tokens to those that may follow.

    As `prefix_allowed_tokens_fn` of transformers it takes a row of a batch with its first `start` tokens.

    Args:
        index: The graph.
        start: Number of leading tokens that are not the query's: the prompt of a decoder-only model, the start
            tokens of an encoder-decoder one (two where the model forces a first token).

    Attributes:
        fallbacks: How often nothing could follow and a name or the query was closed instead.
    """

    def __init__(self, index: KGIndex, *, start: int = 0):
        self.index, self.start = index, start
        self.fallbacks = 0
        self._states: dict[tuple[int, ...], State] = {}

    @abstractmethod
    def initial(self) -> State:
        """The state before the first token."""

    @abstractmethod
    def advance(self, state: State, token: int) -> State:
        """The state one token on, whether or not that token was allowed."""

    @abstractmethod
    def allowed(self, state: State) -> Allowed:
        """What may follow in a state; may be empty."""

    @abstractmethod
    def closing(self, state: State) -> int:
        """The token to take where nothing is allowed."""

    def state(self, ids: Sequence[int]) -> State:
        """The state after the ids of a query."""
        prefix = tuple(ids)
        known = self._states.get(prefix)
        if known is not None:
            return known
        cut = len(prefix)
        while cut and prefix[:cut] not in self._states:
            cut -= 1
        state = self._states[prefix[:cut]] if cut else self.initial()
        for token in prefix[cut:]:
            state = self.advance(state, token)
        if len(self._states) >= _PREFIXES:
            self._states.clear()
        self._states[prefix] = state
        return state

    def after(self, ids: Sequence[int]) -> Allowed:
        """What may follow the ids of a query, never empty."""
        state = self.state(ids)
        found = self.allowed(state)
        if not len(found.tokens) and not found.others:
            self.fallbacks += 1
            return Allowed(np.array([self.closing(state)]))
        return found

    def accepts(self, ids: Sequence[int]) -> bool:
        """Whether each token was allowed where it stands: also says if training targets can be generated."""
        state = self.initial()
        for token in ids:
            found = self.allowed(state)
            if not found.holds(token) and (len(found.tokens) or found.others or token != self.closing(state)):
                return False
            state = self.advance(state, token)
        return True

    def __call__(self, batch_id: int, input_ids: Tensor) -> list[int]:
        """The ids that may follow a row `[T]` int64."""
        ids: list[int] = input_ids.tolist()
        size = self.index.tokens.size
        if len(ids) < self.start:
            return list(range(size))
        found = self.after(ids[self.start :])
        if not found.others:
            return [int(token) for token in found.tokens]
        free = np.ones(size, dtype=bool)
        free[found.tokens] = False
        return [int(token) for token in np.flatnonzero(free)]

    def processor(self, start: int | None = None) -> LogitsProcessor:
        """The constraint as a logits processor: scores of what is not allowed become -inf.

        Args:
            start: As of the class; by default its own.
        """
        return _Mask(self, self.start if start is None else start)


class _Mask(LogitsProcessor):
    def __init__(self, constraint: GraphConstraint[Any], start: int):
        self.constraint, self.start = constraint, start

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.start:
            return scores
        masked = torch.full_like(scores, -math.inf)
        size = min(self.constraint.index.tokens.size, scores.shape[1])
        for b, ids in enumerate(input_ids[:, self.start :].tolist()):
            found = self.constraint.after(ids)
            tokens = torch.from_numpy(found.tokens).to(scores.device)
            if found.others:
                masked[b, :size] = scores[b, :size]
                masked[b, tokens] = -math.inf
            else:
                masked[b, tokens] = scores[b, tokens]
        return masked


class Query(NamedTuple):
    """Where a flat query stands.

    Attributes:
        place: "form", "variables", "where", "triple", "closed" (right after a group), "free" (in a filter or after
            the query) or "end".
        ask: Whether it is an ASK query.
        used: Tokens between the form and WHERE.
        last: The last token.
        depth: Open groups.
        triples: Triples begun in the group.
        wraps: Wrap tokens in the triple, a variable counting two: 0, 1 head; 2, 3 relation; 4, 5 tail; 6 complete.
        opened: Whether a name is open.
        names: The trie it is read from; None where names are free.
        node: Its place in it; None where it has left it.
        length: Tokens of the open name, the opening one included.
        head: Number of the head, -1 for a name the trie does not have; None for a variable.
        relation: Number of the relation.
    """

    place: str = "form"
    ask: bool = False
    used: tuple[int, ...] = ()
    last: int = -1
    depth: int = 0
    triples: int = 0
    wraps: int = 0
    opened: bool = False
    names: Trie | None = None
    node: Node | None = None
    length: int = 0
    head: int | None = None
    relation: int = -1


class SparqlConstraint(GraphConstraint[Query]):
    """The grammar of flat queries (see `_graph_tokens`), with names that the graph has and links.

    Args:
        index: The graph.
        mode: "full": names and links; "retrieval": any name of the graph, no links; "syntax": any text as a name.
        grammar: "paper": as published, where filters and what follows a query are free, and the words between form
            and WHERE come in any order; "strict": only graph patterns, in an order that always parses.
        max_triples: Most triples of a group; None for no limit.
        start: As of `GraphConstraint`.

    Raises:
        BadInput: an argument out of range.
    """

    def __init__(
        self,
        index: KGIndex,
        *,
        mode: Literal["full", "retrieval", "syntax"] = "full",
        grammar: Literal["paper", "strict"] = "paper",
        max_triples: int | None = None,
        start: int = 0,
    ):
        super().__init__(index, start=start)
        if mode not in ("full", "retrieval", "syntax"):
            raise BadInput("mode", mode, "is unknown", 'use "full", "retrieval" or "syntax"')
        if grammar not in ("paper", "strict"):
            raise BadInput("grammar", grammar, "is unknown", 'use "paper" or "strict"')
        if max_triples is not None and max_triples < 1:
            raise BadInput("max_triples", max_triples, "leaves no query", "give 1 or more, or None")
        self.mode, self.grammar, self.max_triples = mode, grammar, max_triples
        self._sets: dict[tuple[str, ...], np.ndarray] = {}
        self._variables = frozenset(index.tokens.variables.values())
        self._no_name = np.asarray(sorted(index.tokens.special), dtype=np.int64)

    def initial(self) -> Query:
        """Nothing generated yet."""
        return Query()

    def closing(self, state: Query) -> int:
        """The end of the open name, else of the query."""
        return self.index.tokens.wrap_close if state.opened else self.index.tokens.eos

    # --- states -----------------------------------------------------------------------------------------------

    def advance(self, state: Query, token: int) -> Query:
        """One token on."""
        t = self.index.tokens
        state = state._replace(last=token)
        if state.place == "end" or token == t.eos:
            return state._replace(place="end", opened=False)
        if state.place == "form":
            return state._replace(place="variables", ask=token == t.ask)
        if state.place == "variables":
            if token == t.where:
                return state._replace(place="where")
            return state._replace(used=(*state.used, token))
        if token in (t.brack_open, t.sep_dot):
            begun = 0 if token == t.brack_open else state.triples
            depth = state.depth + (token == t.brack_open)
            return state._replace(
                place="triple", depth=depth, triples=begun + 1, wraps=0, opened=False, head=None, relation=-1
            )
        if token == t.brack_close:
            return state._replace(place="closed", depth=state.depth - 1, opened=False)
        if token == t.filter:
            return state._replace(place="free", opened=False)
        if state.place == "closed":
            state = state._replace(place="free")
        if token == t.wrap_open:
            names = self._names(state)
            node = names.step(names.root, token) if names is not None else None
            return state._replace(opened=True, wraps=state.wraps + 1, names=names, node=node, length=1)
        if not state.opened:
            bound = state.place == "triple" and token in self._variables
            return state._replace(wraps=state.wraps + 2) if bound else state
        if state.names is not None and state.node is not None:
            state = state._replace(node=state.names.step(state.node, token))
        if token != t.wrap_close:
            return state._replace(length=state.length + 1)
        number = -1 if state.names is None or state.node is None else state.names.number(state.node)
        if state.place == "triple" and state.wraps == 1:
            state = state._replace(head=number)
        if state.place == "triple" and state.wraps == 3:
            state = state._replace(relation=number)
        return state._replace(opened=False, wraps=state.wraps + 1, names=None, node=None)

    def _names(self, state: Query) -> Trie | None:
        """The trie of the name that opens next; None where names are free text."""
        index, linked = self.index, self.mode == "full" and not state.ask
        if self.mode == "syntax":
            return None
        if state.place != "triple":
            return index.relations.trie
        if state.wraps < 2:
            return index.heads if linked else index.entities.trie
        if state.wraps < 4:
            if not linked:
                return index.relations.trie
            if state.head is None:
                return index.linking
            return index.relations_of(state.head) if state.head >= 0 else index.relations.trie
        return index.tails_of(state.relation) if linked and state.relation >= 0 else index.entities.trie

    # --- what a state allows ----------------------------------------------------------------------------------

    def allowed(self, state: Query) -> Allowed:
        """The tokens of the table of states."""
        t = self.index.tokens
        if state.place == "form":
            return Allowed(self._set("ask", "select", "select_distinct"))
        if state.place == "end":
            return Allowed(self._set("eos"))
        if state.place == "variables":
            return Allowed(self._between(state))
        if state.place == "where":
            return Allowed(self._set("brack_open"))
        if state.opened:
            return self._inside(state)
        if state.place == "closed" and state.depth <= 0:
            return Allowed(self._set("eos") if self.grammar == "strict" else self._set("eos", "order_by"))
        if state.place in ("free", "closed"):
            return Allowed(self._set("order_by"), others=True)
        if state.wraps >= 6:
            full = self.max_triples is not None and state.triples >= self.max_triples
            return Allowed(self._set("brack_close") if full else self._set("brack_close", "sep_dot"))
        names = self._names(state)
        opens = np.array([t.wrap_open]) if names is None else names.children(names.root)
        if state.ask or 2 <= state.wraps < 4:
            return Allowed(opens)
        found = self._set("variables")
        if state.wraps < 2:
            found = np.union1d(found, opens)
            if state.last == t.sep_dot and self.grammar == "paper":
                found = np.union1d(found, self._set("filter"))
        elif state.head is None:  # a head that is a name asks for its tail
            found = np.union1d(found, opens)
        return Allowed(found)

    def _set(self, *names: str) -> np.ndarray:
        if names not in self._sets:
            self._sets[names] = self.index.tokens.array(*names)
        return self._sets[names]

    def _inside(self, state: Query) -> Allowed:
        if self.mode != "syntax":
            if state.names is None or state.node is None:
                return Allowed(np.zeros(0, dtype=np.int64))
            return Allowed(state.names.children(state.node))
        banned = self._no_name
        if state.length > 1:
            banned = banned[banned != self.index.tokens.wrap_close]
        return Allowed(banned, others=True)

    def _between(self, state: Query) -> np.ndarray:
        """What may stand between form and WHERE."""
        t, used = self.index.tokens, state.used
        if state.ask:
            return self._set("where")
        if self.grammar == "paper":
            return np.setdiff1d(
                self._set("variables", "where", "count", "attr_open", "attr_close"),
                np.asarray(used, dtype=np.int64),
            )
        if not used:
            return self._set("variables", "count")
        if used[0] != t.count:
            return np.setdiff1d(self._set("variables", "where"), np.asarray(used, dtype=np.int64))
        return self._set(
            *(("attr_open",), ("variables",), ("attr_close",), ("where",))[min(len(used), 4) - 1]
        )
