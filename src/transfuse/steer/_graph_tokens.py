"""The words of a flat query as single tokens, and flat strings to ids and back.

A flat query is one line of words with their spaces, names of the graph between `[` and `]`:

    SELECT DISTINCT var_uri WHERE brack_open [ paris (city) ] [ country ] var_uri brack_close
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from transfuse.core.errors import BadInput

__all__ = ["QueryTokens", "add_query_tokens", "extend"]

WORDS = {
    "select_distinct": "SELECT DISTINCT",
    "select": "SELECT",
    "ask": "ASK",
    "where": " WHERE",
    "wrap_open": " [ ",
    "wrap_close": " ]",
    "brack_open": " brack_open",
    "brack_close": " brack_close",
    "sep_dot": " sep_dot",
    "count": " COUNT",
    "attr_open": " attr_open",
    "attr_close": " attr_close",
    "order_by": " ORDER BY",
    "limit": " LIMIT",
    "filter": " FILTER",
    "exists": " EXISTS",
    "not_": " NOT",
    "expr_or": " expr_or",
    "desc": " DESC",
}


@dataclass(frozen=True)
class QueryTokens:
    """Token ids of the query language in one tokenizer.

    Attributes:
        variables: Name of each variable (`uri` for `?uri`) -> its id.
        eos: The end of a query.
        size: Number of ids the tokenizer knows.
        special: Ids that no name holds: those of the language, end, padding and the like.
    """

    select_distinct: int
    select: int
    ask: int
    where: int
    wrap_open: int
    wrap_close: int
    brack_open: int
    brack_close: int
    sep_dot: int
    count: int
    attr_open: int
    attr_close: int
    order_by: int
    limit: int
    filter: int
    exists: int
    not_: int
    expr_or: int
    desc: int
    variables: dict[str, int]
    eos: int
    size: int
    special: frozenset[int] = field(repr=False)

    @cached_property
    def texts(self) -> dict[int, str]:
        """Each id of the language -> its text, spaces included."""
        words = {getattr(self, name): text for name, text in WORDS.items()}
        return words | {number: f" var_{name}" for name, number in self.variables.items()}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: number for number, text in self.texts.items()}

    @cached_property
    def _words(self) -> re.Pattern[str]:
        """Any word, the longest first, in a group, so that `split` keeps it."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self._numbers, key=len, reverse=True)))})")

    def encode(self, tokenizer: PreTrainedTokenizerBase, flat: str) -> list[int]:
        """Ids of a flat query. Names are encoded apart from what surrounds them, as the index encodes them."""
        ids: list[int] = []
        for piece in self._words.split(flat):
            if piece in self._numbers:
                ids.append(self._numbers[piece])
            elif piece.strip():
                ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """The text of ids, up to the end token."""
        parts = (
            self.texts[run] if isinstance(run, int) else _plain(tokenizer, run) for run in self.runs(ids)
        )
        return "".join(parts).lstrip(" ")

    def runs(self, ids: Sequence[int]) -> Iterator[int | list[int]]:
        """Words of the language one by one, what lies between them as lists; up to the end token."""
        run: list[int] = []
        for number in ids:
            if number == self.eos:
                break
            if number not in self.texts:
                run.append(number)
                continue
            if run:
                yield run
                run = []
            yield number
        if run:
            yield run

    def wrap(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[list[int] | None]:
        """Ids of each name between its wrap tokens; None where it is empty or spells a special token."""
        encoded = tokenizer(list(names), add_special_tokens=False)["input_ids"] if names else []
        return [
            [self.wrap_open, *ids, self.wrap_close] if ids and self.special.isdisjoint(ids) else None
            for ids in encoded
        ]

    def array(self, *names: str) -> np.ndarray:
        """Ids by attribute, int64, and those of all variables for `variables`."""
        found: list[int] = []
        for name in names:
            value = getattr(self, name)
            found += value.values() if name == "variables" else [value]
        return np.unique(np.asarray(found, dtype=np.int64))


def _plain(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def add_query_tokens(
    tokenizer: PreTrainedTokenizerBase, variables: Sequence[str] = ("uri", "x")
) -> QueryTokens:
    """Add what is missing of the language to a tokenizer and look up its ids.

    Args:
        tokenizer: Changed in place.
        variables: Names of the variables queries may use, without `?`.

    Raises:
        BadInput: a variable that is no name, a tokenizer without an end token, or one that splits a word.
    """
    if not variables:
        raise BadInput("variables", variables, "is empty", "name the variables of the queries")
    for name in variables:
        if not re.fullmatch(r"\w+", name):
            raise BadInput("variables", name, "is no variable", "use letters, digits and underscores, no ?")
    if tokenizer.eos_token_id is None:
        raise BadInput("tokenizer", type(tokenizer).__name__, "has no end token", "set its eos_token")
    texts = [*WORDS.values(), *(f" var_{name}" for name in variables)]
    vocabulary = tokenizer.get_vocab()
    # Not `special`: they are part of the text, which decoding with skip_special_tokens should show.
    missing = [AddedToken(text, normalized=False, special=False) for text in texts if text not in vocabulary]
    tokenizer.add_tokens(missing)
    ids = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in texts}
    for text, number in ids.items():
        if tokenizer(text, add_special_tokens=False)["input_ids"] != [number]:
            raise BadInput("tokenizer", text, "is not one token in it", "use a tokenizer that keeps it whole")
    words = {name: ids[text] for name, text in WORDS.items()}
    special = frozenset({*ids.values(), *tokenizer.all_special_ids})
    return QueryTokens(
        **words,
        variables={name: ids[f" var_{name}"] for name in variables},
        eos=int(tokenizer.eos_token_id),
        size=len(tokenizer),
        special=special,
    )


def extend(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variables: Sequence[str] = ("uri", "x")
) -> QueryTokens:
    """`add_query_tokens`, and rows for them in the model's embeddings, both in place. To be done before training.

    New rows start near the mean of the old ones; they depend on torch's random state.
    """
    tokens = add_query_tokens(tokenizer, variables)
    if model.get_input_embeddings().weight.shape[0] < tokens.size:
        model.resize_token_embeddings(tokens.size)
    return tokens
