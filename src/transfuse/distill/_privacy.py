"""How likely each token is private: scores from patterns, a word list, a tagger, or what a teacher has memorised."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput
from ..core.runs import evaluating
from ._base import logits_of, model_inputs

__all__ = ["PATTERNS", "TokenPrivacyScorer", "detector_recall"]

PATTERNS = (
    r"[\w.+-]+@[\w-]+\.[\w.-]*\w",  # e-mail
    r"(?<![\d.])(?:\d[ -]?){12,18}\d(?!\d)",  # payment cards
    r"(?<![\w.])(?:\+\d{1,3}[ -]?|\+)?\(?\d{2,4}\)?(?:[ /-]\(?\d{2,4}\)?){2,4}(?!\d)",  # telephone numbers in groups
    r"(?:(?:\(\d{3}\) ?|(?<![\w.-])\d{3}\.)\d{3}[.-]|(?<![\w.-])\d{3}-)\d{4}(?![.-]?\d)",  # American ones
    r"(?<![\w.-])(?:\+\d{1,3}[ /-]?\(?\d{1,5}\)?|\(?0\d{1,5}\)?)[ /-]\d{5,}(?!\d)",  # area code, long number
    r"(?<![\w.])\d{3}-\d{2}-\d{4}(?!\d)",  # social security numbers
    r"(?<!\d)\d{6,}(?!\d)",  # long runs of digits
)
"""Regular expressions of personal data that look alike everywhere."""

Span = tuple[int, int, float]
"""First character, the one after the last, score."""


class TokenPrivacyScorer:
    """Scores in [0, 1] of the tokens themselves (not shifted), one list per row of token ids.

    Made by `from_regex`, `from_dictionary`, `from_ner`, `from_reference` or `from_rarity`; `a | b` takes the larger
    score of two. Spans are found in the text that the ids stand for; every token that shares a character with a span
    inherits its score, and spans that touch or overlap are one, with the larger score of the two.

        scorer = TokenPrivacyScorer.from_regex(tokenizer) | TokenPrivacyScorer.from_dictionary(tokenizer, ["Ines"])
        rows = scorer.annotate(rows)                       # adds the column `privacy` that the objective reads

    Args:
        score: From rows of token ids to as many lists of scores.
    """

    def __init__(self, score: Callable[[Sequence[Sequence[int]]], list[list[float]]]):
        self._score = score

    def __call__(self, rows: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Scores float32 `[B, L]` of rows of ids, 0 after the end of shorter ones."""
        found = [
            torch.tensor(values, dtype=torch.float32) for values in self._score([_ids(row) for row in rows])
        ]
        return nn.utils.rnn.pad_sequence(found, batch_first=True)

    def annotate(
        self, rows: Iterable[Mapping[str, Any]], *, batch_size: int = 64, column: str = "privacy"
    ) -> list[dict[str, Any]]:
        """The rows with a further column, one score per entry of `input_ids`."""
        kept = [dict(row) for row in rows]
        for start in range(0, len(kept), batch_size):
            part = kept[start : start + batch_size]
            for row, values in zip(part, self._score([_ids(row["input_ids"]) for row in part]), strict=True):
                row[column] = values
        return kept

    def __or__(self, other: TokenPrivacyScorer) -> TokenPrivacyScorer:
        def both(rows: Sequence[Sequence[int]]) -> list[list[float]]:
            pairs = zip(self._score(rows), other._score(rows), strict=True)
            return [[max(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]

        return TokenPrivacyScorer(both)

    @classmethod
    def from_spans(cls, tokenizer: Any, find: Callable[[str], Iterable[Span]]) -> TokenPrivacyScorer:
        """Scores from a function that finds private spans in a text.

        Args:
            tokenizer: A transformers tokenizer, or the text of every id.
            find: From a text to (start, end, score).
        """

        def score(rows: Sequence[Sequence[int]]) -> list[list[float]]:
            found = []
            for row in rows:
                text, offsets = pieces(tokenizer, row)
                found.append(_inherit(offsets, _joined(find(text))))
            return found

        return cls(score)

    @classmethod
    def from_regex(
        cls, tokenizer: Any, patterns: Sequence[str] = PATTERNS, *, score: float = 1.0
    ) -> TokenPrivacyScorer:
        """Scores from regular expressions.

        Args:
            tokenizer: A transformers tokenizer, or the text of every id.
            patterns: Expressions; a whole match is one span.
            score: Of what matches.

        Raises:
            BadInput: no pattern, one that is no expression, a score outside [0, 1].
        """
        _check_score("score", score)
        if not patterns or isinstance(patterns, str):
            raise BadInput(
                "patterns", patterns, "are not a list of expressions", "give one or more in a list"
            )
        try:
            compiled = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise BadInput("patterns", error.pattern, f"cannot be compiled ({error})", "mend it") from error

        def find(text: str) -> Iterable[Span]:
            return ((*match.span(), score) for expression in compiled for match in expression.finditer(text))

        return cls.from_spans(tokenizer, find)

    @classmethod
    def from_dictionary(
        cls, tokenizer: Any, words: Iterable[str] | Mapping[str, float], *, ignore_case: bool = True
    ) -> TokenPrivacyScorer:
        """Scores from a user's list of private words and phrases, matched as whole words.

        Args:
            tokenizer: A transformers tokenizer, or the text of every id.
            words: The words, or words with scores.
            ignore_case: Whether upper and lower case are the same.

        Raises:
            BadInput: no list, no word, an empty one, a score outside [0, 1].
        """
        _check_list("words", words, "list the private words")
        table = dict(words) if isinstance(words, Mapping) else dict.fromkeys(words, 1.0)
        if not table or any(not word.strip() for word in table):
            raise BadInput("words", sorted(table), "hold an empty word, or none", "list the private words")
        for word, value in table.items():
            _check_score(f"words[{word!r}]", value)
        flags = re.IGNORECASE if ignore_case else 0
        compiled = [
            (re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags), value) for word, value in table.items()
        ]

        def find(text: str) -> Iterable[Span]:
            return ((*match.span(), value) for form, value in compiled for match in form.finditer(text))

        return cls.from_spans(tokenizer, find)

    @classmethod
    def from_ner(
        cls, tokenizer: Any, pipeline: Callable[[str], Iterable[Mapping[str, Any]]],
        *, labels: Iterable[str] | None = None,
    ) -> TokenPrivacyScorer:  # fmt: skip
        """Scores from a tagger of names or personal data: the tagger's probability.

        Args:
            tokenizer: The language model's tokenizer, or the text of every id; the tagger has its own.
            pipeline: A token-classification pipeline of transformers, or anything that gives records with `start`,
                `end`, `score`, and `entity_group` or `entity`, aggregated or not.
            labels: Entity types that are private, without `B-` and `I-`; all by default.

        Raises:
            BadInput: labels that are no list.
        """
        _check_list("labels", labels, "list the private types")
        wanted = None if labels is None else set(labels)

        def find(text: str) -> Iterable[Span]:
            spans: list[Span] = []
            before = ""
            for entity in pipeline(text):
                tag = str(entity.get("entity_group", entity.get("entity", "")))
                kind = tag[2:] if tag[:2] in ("B-", "I-") else tag
                if kind == "O" or (wanted is not None and kind not in wanted):
                    continue
                start, end, score = int(entity["start"]), int(entity["end"]), float(entity["score"])
                if spans and tag[:2] == "I-" and kind == before and not text[spans[-1][1] : start].strip():
                    start, score = spans[-1][0], max(score, spans[-1][2])  # one entity goes on
                    spans.pop()
                spans.append((start, end, score))
                before = kind
            return spans

        return cls.from_spans(tokenizer, find)

    @classmethod
    def from_reference(
        cls, teacher: nn.Module, reference: nn.Module, *, kappa: float = 5.0, tokenizer: Any = None
    ) -> TokenPrivacyScorer:
        """Scores from what the teacher knows and a public model does not.

            r = clip((log p_teacher(y) - log p_reference(y)) / kappa, 0, 1)

        A row's first token, which nothing predicts, has 0, and so has one that both models rule out.

        Args:
            teacher: The language model that saw private text.
            reference: A public one with the same token ids.
            kappa: Difference, in nats, that counts as certainly private.
            tokenizer: A tokenizer, or the text of every id: all tokens of a word then inherit its largest score.

        Raises:
            BadInput: a kappa that is not positive.
        """
        if not kappa > 0:
            raise BadInput("kappa", kappa, "is not positive", "give a difference in nats")

        def score(rows: Sequence[Sequence[int]]) -> list[list[float]]:
            found = []
            for row in rows:
                ours, theirs = (_log_likelihoods(model, row) for model in (teacher, reference))
                gap = (ours - theirs).masked_fill((ours == -math.inf) & (theirs == -math.inf), 0.0)
                values = [0.0, *(gap / kappa).clamp(0, 1).tolist()]
                if tokenizer is not None:
                    text, offsets = pieces(tokenizer, row)
                    words = [match.span() for match in re.finditer(r"\S+", text)]
                    values = _spread(offsets, words, values)
                found.append(values)
            return found

        return cls(score)

    @classmethod
    def from_rarity(cls, rows: Iterable[Sequence[int]]) -> TokenPrivacyScorer:
        """Scores from how few of the given rows hold a token: log(N / n) / log N; 1 for one that none or one holds.

        Raises:
            BadInput: fewer than two rows.
        """
        sets = [set(_ids(row)) for row in rows]
        if len(sets) < 2:
            raise BadInput("rows", len(sets), "are too few to tell what is rare", "give the training rows")
        counts = Counter(token for each in sets for token in each)
        whole = math.log(len(sets))

        def score(rows: Sequence[Sequence[int]]) -> list[list[float]]:
            return [[1.0 - math.log(max(counts[token], 1)) / whole for token in row] for row in rows]

        return cls(score)


def detector_recall(scores: Tensor, private: Tensor, *, threshold: float = 0.5) -> float:
    """Share of the truly private tokens that a scorer finds. What it misses is distilled like any other token.

    Args:
        scores: `[B, L]`.
        private: Bool of the same shape, from a hand-labelled sample.
        threshold: Least score that counts as found.

    Raises:
        BadInput: shapes that differ, or no private token.
    """
    if scores.shape != private.shape or not bool(private.any()):
        problem = f"does not mark private tokens of scores {tuple(scores.shape)}"
        raise BadInput("private", tuple(private.shape), problem, "give one flag per score, some of them set")
    return float((scores[private.bool()] >= threshold).double().mean())


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text that ids stand for, and the characters `(start, end)` of each.

    Args:
        tokenizer: A transformers tokenizer, or a sequence or mapping with the text of every id.
        ids: Of one row.
    """
    if not hasattr(tokenizer, "decode"):
        parts = [tokenizer[i] for i in ids]
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        return "".join(parts), list(itertools.pairwise(ends))

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text = decode(ids)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return text, [(int(a), int(b)) for a, b in again["offset_mapping"]]
    # Ids that are not how the text would be tokenised: see how the text grows with each. A character made of
    # several tokens belongs to all of them.
    grown = [_agreement(decode(ids[:i]), text) for i in range(len(ids) + 1)]
    return text, [(a, max(b, a + 1)) for a, b in itertools.pairwise(grown)]


def _agreement(a: str, b: str) -> int:
    """Number of leading characters that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _ids(row: Iterable[Any]) -> list[int]:
    """Token ids as numbers; those of a tensor are tensors, and two equal ones of these are different keys."""
    return row.tolist() if isinstance(row, Tensor) else [int(token) for token in row]


def _check_list(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, str | bytes):
        raise BadInput(name, value, "is one text and no list", remedy)


def _check_score(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise BadInput(name, value, "is not between 0 and 1", "give a likelihood of being private")


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans that touch or overlap as one, with the larger score."""
    found: list[Span] = []
    for start, end, score in sorted(spans):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            first, last, high = found.pop()
            start, end, score = first, max(last, end), max(high, score)
        found.append((start, end, score))
    return found


def _inherit(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[float]:
    """The largest score of the spans that each token shares a character with."""
    return [max((s for a, b, s in spans if a < end and start < b), default=0.0) for start, end in offsets]


def _spread(
    offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]], values: Sequence[float]
) -> list[float]:
    """Each token's largest score within the words it belongs to."""
    spans = [
        (a, b, max((v for (start, end), v in zip(offsets, values) if a < end and start < b), default=0.0))
        for a, b in words
    ]
    inherited = _inherit(offsets, spans)
    return [max(own, more) for own, more in zip(values, inherited)]


@torch.no_grad()
def _log_likelihoods(model: nn.Module, row: Sequence[int]) -> Tensor:
    """What each token of a row but the first has as log p, float32 `[L - 1]`, in evaluation mode."""
    with evaluating(model):
        ids = torch.tensor([list(row)], device=next(model.parameters()).device)
        logits = logits_of(model(**model_inputs(model, {"input_ids": ids})))
    log_p = torch.log_softmax(logits[0, :-1].float(), -1)
    return log_p.gather(-1, ids[0, 1:, None]).squeeze(-1).cpu()
