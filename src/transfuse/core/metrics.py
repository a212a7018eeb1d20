"""Scores shared by methods, benchmarks and `compare`: intervals, answers, fluency, perplexity.

Everything but `perplexity` is plain Python and numpy; torch is imported inside it.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = [
    "MemoryRatio",
    "bootstrap_interval",
    "contains_answer",
    "exact_match",
    "fluency",
    "gap_closed",
    "memory_ratio",
    "normalise_answer",
    "perplexity",
    "token_f1",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"\w+|[^\w\s]")
# Scripts written without spaces between words (Thai, kana, Han): no word boundary is asked of them.
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
_VERDICTS = frozenset({"yes", "no", "noanswer"})
_LOSS_CHUNK = 128  # tokens whose logits exist at one time in `perplexity`


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` and its percentile bootstrap interval.

    Args:
        values: One figure per item, finite; a single value gives the degenerate interval (v, v, v).
        confidence: Coverage of the interval, strictly between 0 and 1.
        resamples: Bootstrap samples, each as long as `values`.
        seed: Of the resampling; equal seeds give equal intervals.

    Returns:
        (mean, low, high), all in the unit of `values`.

    Raises:
        BadInput: no value, a value that is not finite, or a confidence outside (0, 1).
    """
    import numpy as np

    try:
        figures = np.asarray(list(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadInput("values", values, "are not numbers", "give one figure per item") from error
    if figures.ndim != 1 or figures.size == 0:
        raise BadInput("values", list(values), "holds no figure", "give at least one number")
    if not np.isfinite(figures).all():
        raise BadInput(
            "values", list(values), "holds NaN or infinity", "leave such items out and report how many"
        )
    if not 0.0 < confidence < 1.0:
        raise BadInput(
            "confidence", confidence, "is not a probability", "give a number strictly between 0 and 1"
        )
    if resamples < 1:
        raise BadInput("resamples", resamples, "is not a count", "give 1 or more")
    mean = float(figures.mean())
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // figures.size)  # at most 16 MB of indices at a time
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picks = rng.integers(0, figures.size, size=(rows, figures.size))
        means[start : start + rows] = figures[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Rounding in the resampled means must not push the mean of equal values out of its own interval.
    return mean, min(float(low), mean), max(float(high), mean)


def gap_closed(method: float, base: float, reference: float) -> float:
    """Share of the distance from `base` to `reference` that `method` covers: 0 = base, 1 = reference.

    Not clipped: below 0 the method is worse than the base, above 1 better than the reference.
    NaN when `reference == base`, as there is then no gap to close.
    """
    return math.nan if reference == base else (method - base) / (reference - base)


def normalise_answer(text: str) -> str:
    """Lower-case, without punctuation, English articles and surplus white space; accents composed (NFC).

    Where that leaves nothing (the answer "A", or "+"), the last form that is not empty is kept, so that
    an empty string is never taken for a match.
    """
    lowered = " ".join(unicodedata.normalize("NFC", text.lower()).split())
    bare = "".join(c for c in lowered if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    bare = unicodedata.normalize("NFC", " ".join(bare.split()))
    return " ".join(_ARTICLES.sub(" ", bare).split()) or bare or lowered


def _aliases(answers: str | Sequence[str]) -> list[str]:
    accepted = [answers] if isinstance(answers, str) else list(answers)
    if not accepted or not all(isinstance(a, str) and a.strip() for a in accepted):
        raise BadInput("answers", answers, "has no text to compare with", "give one accepted answer or more")
    return [normalise_answer(a) for a in accepted]


def exact_match(prediction: str, answers: str | Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the accepted answers, else 0.0."""
    return float(normalise_answer(prediction) in _aliases(answers))


def token_f1(prediction: str, answers: str | Sequence[str]) -> float:
    """Largest F1 of shared words over the accepted answers, between 0 and 1.

    Words are those of `normalise_answer`, counted with multiplicity. When either side is "yes", "no" or
    "noanswer", anything but equality scores 0: a sentence that happens to hold a "no" is not half a "no".
    """
    guess = normalise_answer(prediction)
    return max(_f1(guess, answer) for answer in _aliases(answers))


def _f1(guess: str, answer: str) -> float:
    if guess != answer and (guess in _VERDICTS or answer in _VERDICTS):
        return 0.0
    ours, theirs = guess.split(), answer.split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * shared / (len(ours) + len(theirs)) if shared else 0.0


def contains_answer(prediction: str, answers: str | Sequence[str]) -> bool:
    """Whether the normalised prediction holds an accepted answer as whole words ("us" is not in "russia")."""
    guess = normalise_answer(prediction)
    return any(_holds(guess, answer) for answer in _aliases(answers))


def _holds(text: str, words: str) -> bool:
    """Whether `words` stand in `text` with no part of a longer word before or behind them."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not (_in_word(text[start - 1 : start]) or _in_word(text[end : end + 1])):
            return True
        start = text.find(words, start + 1)
    return False


def _in_word(character: str) -> bool:
    """Letters, digits, and the marks on letters (the vowel signs of Hindi, Arabic, ...); "" is none of them."""
    if not character or _UNSPACED.match(character):
        return False
    return character == "_" or character.isalnum() or unicodedata.category(character)[0] == "M"


def fluency(texts: str | Sequence[str]) -> float:
    """N-gram entropy of generated text: low when it repeats itself.

    For each text, H_n = -sum p log2 p over its n-grams of words and punctuation marks, upper and lower case
    apart; the score is 100 * (2/3 H_2 + 4/3 H_3) / 2, and the result its mean over `texts`. A text of fewer
    than n words has H_n = 0. It grows with the length of the text (at most log2 of the number of n-grams):
    compare equal lengths only.

    Raises:
        BadInput: no text.
    """
    several = [texts] if isinstance(texts, str) else list(texts)
    if not several:
        raise BadInput("texts", several, "is empty", "give at least one generated text")
    return sum(_ngram_score(text) for text in several) / len(several)


def _ngram_score(text: str) -> float:
    words = _WORDS.findall(text)
    weighted = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n))))
        total = sum(counts.values())
        weighted -= weight * sum(c / total * math.log2(c / total) for c in counts.values())
    return 100.0 * weighted / 2


class MemoryRatio(NamedTuple):
    """Whose answer was given: the model's own, or the context's (CK-PLUG, arXiv 2503.15888).

    Attributes:
        memory: ParR, share of outputs that contain the answer the model knew.
        context: ConR, share that contain the answer of the context.
        ratio: MR = ParR / (ParR + ConR); NaN when neither answer ever appears.
        both: Number of outputs counted on both sides (one answer inside the other, or both named).
        hit_rate: Share that contain at least one of the two.
    """

    memory: float
    context: float
    ratio: float
    both: int
    hit_rate: float


def memory_ratio(
    predictions: Sequence[str],
    memory_answers: Sequence[str | Sequence[str]],
    context_answers: Sequence[str | Sequence[str]],
) -> MemoryRatio:
    """Count outputs that follow the model's memory and outputs that follow the context.

    Args:
        predictions: N generated texts.
        memory_answers: For each, the answer (or its aliases) the model gives without context.
        context_answers: For each, the answer (or its aliases) that the context asserts.

    Raises:
        BadInput: no prediction, or lists of unequal length.
    """
    n = len(predictions)
    if n == 0:
        raise BadInput("predictions", predictions, "is empty", "give at least one output")
    for name, answers in (("memory_answers", memory_answers), ("context_answers", context_answers)):
        if isinstance(answers, str) or len(answers) != n:
            raise BadInput(name, answers, f"does not hold {n} items", "give one answer for each prediction")
    memory = [contains_answer(p, a) for p, a in zip(predictions, memory_answers)]
    context = [contains_answer(p, a) for p, a in zip(predictions, context_answers)]
    m, c = sum(memory), sum(context)
    both = sum(a and b for a, b in zip(memory, context))
    return MemoryRatio(m / n, c / n, m / (m + c) if m + c else math.nan, both, (m + c - both) / n)


def perplexity(model: Any, tokenizer: Any, text: str | Sequence[int], *, window: int = 512) -> float:
    """Exponential of the mean negative log-likelihood per token of `text`.

    The token ids are cut into windows without overlap in what is scored. Each window begins with the
    tokenizer's begin-of-text token where it adds one by itself, else with the token before it, so every token
    (but the very first) is scored once, with at most `window - 1` tokens of context. Logits exist for 128
    tokens at a time; the loss is summed in float64. NaN where the model's logits are.

    Args:
        model: A causal language model on any device; the modes (train/eval) of its modules are restored.
        tokenizer: Its tokenizer.
        text: At least two tokens long; or token ids, which are scored as they are, nothing put before them.
        window: Tokens per forward pass, the leading one included.

    Raises:
        BadInput: the text is too short, or the window is below 2.
    """
    import torch

    from .runs import evaluating

    if window < 2:
        raise BadInput("window", window, "leaves nothing to predict", "give 2 or more")
    begin: list[int] = []
    if isinstance(text, str):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        first = tokenizer("a")["input_ids"][:1]
        begin = first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []
    else:
        ids = list(text)
    position = 0 if begin else 1
    if len(ids) <= position:
        raise BadInput("text", text, "is too short to score", "give at least two tokens of text")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        logits_of = None
        while position < len(ids):
            body = ids[position : position + window - 1]
            row = torch.tensor([(begin or [ids[position - 1]]) + body], device=device)
            logits_of = logits_of or _chunked_head(model, row[:, :8])
            for start, logits in logits_of(row):
                wanted = row[0, start + 1 : start + 1 + logits.shape[0]]
                scored = logits[: wanted.shape[0]].float()
                loss = torch.nn.functional.cross_entropy(scored, wanted, reduction="none")
                total += loss.double().sum().item()
            count += len(body)
            position += len(body)
    mean = total / count
    return math.inf if mean >= 700 else math.exp(mean)


def _chunked_head(model: Any, probe: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """A function from ids [1, T] to pairs (first position, logits [<= 128, V]).

    The head is applied to hidden states chunk by chunk where that gives what the model itself returns (tried
    once, on `probe`). Models that do more to their logits (soft capping, scaling) run whole windows.
    """
    import torch

    def whole(row: torch.Tensor) -> Any:
        logits = model(input_ids=row, use_cache=False).logits[0, -row.shape[1] :]
        return ((s, logits[s : s + _LOSS_CHUNK]) for s in range(0, row.shape[1], _LOSS_CHUNK))

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, head = getattr(inner, "base_model", inner), inner.get_output_embeddings()
    if body is inner or head is None:
        return whole

    def chunked(row: torch.Tensor) -> Any:
        hidden = body(input_ids=row, use_cache=False)[0][0]
        return ((s, head(hidden[s : s + _LOSS_CHUNK])) for s in range(0, row.shape[1], _LOSS_CHUNK))

    ours = torch.cat([logits for _, logits in chunked(probe)]).float()
    theirs = torch.cat([logits for _, logits in whole(probe)]).float()
    same = ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2))
    return chunked if same else whole
