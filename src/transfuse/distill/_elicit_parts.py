"""What elicitation is made of: the requests, the filters, and how answers are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.batches import encode_examples
from ..core.errors import BadInput
from ..core.llm import Backend
from ..core.metrics import exact_match
from ..core.runs import check_positive

__all__ = ["Verifier", "final_answer", "preference_rows", "rouge_l", "tasks_in", "verdict_in"]

Verifier = Callable[[Mapping[str, Any], str], bool]
"""(row, answer) -> whether the answer is right."""

REASON = """{prompt}

Think step by step. Then give the result on a last line that begins with "Answer:"."""

EXPAND = """Here are tasks for an assistant.

{shown}

Write {count} more tasks. Each must differ from those above and from each other in topic and wording, and must be \
answerable from text alone. Number them from 1, one to a line, and write nothing else."""

EVOLVE = {
    "constraint": "adding one more condition or requirement",
    "depth": "asking for more depth and detail about what it asks",
    "concrete": "replacing a general idea in it by a more specific one",
    "reasoning": "making it need several steps of reasoning",
    "breadth": "making up a new one of the same field that is rarer, and about as long",
}

REWRITE = """Make the task below harder by {way}. Add at most 20 words. It must still make sense and have an answer. \
Reply with the new task alone.

Task: {prompt}"""

CURATE = """Write one {difficulty} question about {topic}{persona}. It must be answerable without further material. \
Reply with the question alone."""

JUDGE = """Which of two answers to the question is better: more correct, helpful and clear? Their order and length do \
not matter.

Question: {prompt}

Answer A: {first}

Answer B: {second}

Reply with A or B, or with "tie" if neither is better."""

CORRECT = """A student answered the question below. If the answer is right and complete, reply with the one word \
CORRECT. Otherwise reply with a corrected answer alone, as close to the student's as it can be.

Question: {prompt}

Student's answer: {answer}"""

SCORE = """Rate the answer below from 0 to 5. Give one point each if it is relevant to the question; if it covers much \
of it; if it answers what matters; if it is clear and written for the asker; if it is of expert quality without \
anything superfluous.

Question: {prompt}

Answer: {answer}

Reply with "Score:" and the number of points."""

_REFUSED = re.compile(r"\b(sorry|as an ai|cannot help)\b", re.IGNORECASE)


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F1 of two texts: the longest common subsequence of their lower-case words, from 0 to 1."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (first, second))
    if not a or not b:
        return 0.0
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # bit i is 0 where the common subsequence grew at word i of the first text
    for word in b:
        hits = row & where.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    common = len(a) - row.bit_count()
    return 2.0 * common / (len(a) + len(b))


def final_answer(text: str) -> str | None:
    """What follows the last "Answer:" (or "####") to the end of its line; None where there is none."""
    found = re.findall(r"(?:answer\s*:|####)[ \t*]*([^\n]+)", text, re.IGNORECASE)
    answer = found[-1].strip(" *`\t").rstrip(" *.`\t") if found else ""
    return answer or None


def verdict_in(text: str) -> str | None:
    """What a judge's reply says, "A", "B" or "tie"; None where that is not clear."""
    bare = text.strip().strip("\"'*.:() ")
    if re.search(r"\btie\b", bare, re.IGNORECASE):
        return "tie"
    if bare[:1] in ("A", "B") and not bare[1:2].isalnum():
        rest = set(re.findall(r"\b(A|B)\b", bare)) if len(bare) > 1 else {bare}
        return bare[0] if len(rest) == 1 else None
    found = set(re.findall(r"\b(?:[Aa]nswer|[Cc]hoice|[Bb]etter)\s*(?:is)?:?\s*(A|B)\b", bare))
    return found.pop() if len(found) == 1 else None


def score_in(text: str) -> float | None:
    """The number after "Score:", from 0 to 5 and not of another scale, or a reply that is such a number.

    Fractions count, as a judge gives them; bold type does not matter.
    """
    number = r"(\d+(?:\.\d+)?)(?!\.?\d)(?!\s*/\s*(?!5\b)\d)"
    found = re.search(rf"score[\s*_:=]*{number}", text, re.IGNORECASE) or re.fullmatch(
        rf"[\s*]*{number}[\s*]*(?:/\s*5)?[\s*]*\.?[\s*]*", text
    )
    return float(found.group(1)) if found and float(found.group(1)) <= 5 else None


def tasks_in(text: str) -> list[str]:
    """The items of a numbered or bulleted list, one to a line."""
    found = re.findall(r"^\s*(?:\d+\s*[.):]|[-*])\s+(.+?)\s*$", text, re.MULTILINE)
    return [item.strip(" *\"'") for item in found if item.strip(" *\"'")]


def usable_task(text: str) -> bool:
    """3 to 150 words, not a refusal, and none of the request's own words."""
    words = text.split()
    leaked = re.search(r"\b(new task|rewritten (?:task|prompt)|given (?:task|prompt))\b", text, re.IGNORECASE)
    return 3 <= len(words) <= 150 and not _REFUSED.search(text) and not leaked


def items_of(items: Sequence[Any], *needed: str, argument: str = "items") -> list[dict[str, Any]]:
    """Rows as dicts with a non-empty text `prompt` and the columns needed; a plain text is a prompt.

    Whole numbers in `answer` and `target` become text; an empty answer is none.

    Raises:
        BadInput: no rows, one that lacks something, or a value that is no text.
    """
    if isinstance(items, (str, Mapping)) or len(items) == 0:
        raise BadInput(argument, items, "is not a list of rows", "give texts, or dicts with `prompt`")
    rows = []
    for i, item in enumerate(items):
        row = {"prompt": item} if isinstance(item, str) else dict(item)
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise BadInput(f"{argument}[{i}]", item, "has no prompt", "give a text, or a dict with `prompt`")
        missing = [name for name in needed if row.get(name) in (None, "", [])]
        if missing:
            raise BadInput(f"{argument}[{i}]", row["prompt"][:40], f"lacks `{missing[0]}`", "add it")
        rows.append(_as_texts(row, f"{argument}[{i}]"))
    return rows


def _as_texts(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with texts where texts are compared."""
    for name, several in (("answer", True), ("target", False), ("candidates", True)):
        value = row.get(name)
        if value in (None, "", []):
            row.pop(name, None)
            continue
        listed = several and isinstance(value, (list, tuple))
        texts = [_text(each) for each in (value if listed else [value])]
        if any(text is None for text in texts) or (name == "candidates" and not listed):
            wanted = "a list of texts" if name == "candidates" else "text"
            raise BadInput(f"{where}: {name}", value, f"is not {wanted}", "write out what is to be compared")
        row[name] = texts if listed else texts[0]
    return row


def _text(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def table(rows: Sequence[Mapping[str, Any]], *texts: str, numbers: Sequence[str] = ()) -> Any:
    """A `datasets.Dataset` of text columns and float columns, also where there is no row."""
    from datasets import Dataset, Features, Value

    kinds = {**{name: Value("string") for name in texts}, **{name: Value("float64") for name in numbers}}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in kinds}, features=Features(kinds))


def preference_rows(tokenizer: Any, pairs: Any, **options: Any) -> list[dict[str, Any]]:
    """Preferences as rows for `rank_collator`: two answers each, the chosen one with score 1.

    Args:
        tokenizer: The student's.
        pairs: Rows with `prompt`, `chosen`, `rejected`.
        **options: Of `core.batches.encode_examples`, e.g. `end=True`.
    """
    texts = [(row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected")]
    encoded = encode_examples(tokenizer, texts, **options)
    return [
        {
            "input_ids": [best["input_ids"], worst["input_ids"]],
            "labels": [best["labels"], worst["labels"]],
            "score": [1.0, 0.0],
        }
        for best, worst in zip(encoded[::2], encoded[1::2], strict=True)
    ]


def check_samples(samples: int, temperature: float, name: str = "samples") -> None:
    """Refuse several answers where all would be one; `name` is what the caller calls their number."""
    check_positive(**{name: samples})
    if samples > 1 and temperature == 0:
        raise BadInput(name, samples, "at temperature 0 are all the same", "give a temperature above 0")


def check_threshold(threshold: float) -> None:
    """Refuse a limit of ROUGE-L that is no share."""
    if not 0.0 < threshold <= 1.0:
        raise BadInput("threshold", threshold, "is not a share", "give a number above 0, to 1")


def accepted(row: Mapping[str, Any], final: str, verifier: Verifier | None) -> bool:
    """Whether a final answer is the row's; any is where the row has none."""
    if verifier is not None:
        return bool(verifier(row, final))
    return row.get("answer") is None or bool(exact_match(final, row["answer"]))


def is_right(reply: str, answer: str) -> bool:
    """Whether a corrector left the answer as it was."""
    bare = reply.strip().strip("\"'*. ")
    return bare.upper() == "CORRECT" or bare.split() == answer.strip().strip("\"'*. ").split()


def sampled(
    student: Backend,
    rows: list[dict[str, Any]],
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows with the student's different, finished answers as `candidates`."""
    check_samples(samples, temperature)
    asked = [row["prompt"] for row in rows for _ in range(samples)]
    replies = student.complete(asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
    found = []
    for i, row in enumerate(rows):
        texts = [r.text.strip() for r in replies[i * samples : (i + 1) * samples] if not r.truncated]
        found.append({**row, "candidates": [text for text in dict.fromkeys(texts) if text]})
    return found


def answered(
    teacher: Backend,
    rows: list[dict[str, str]],
    more: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Any:
    """New prompts with the teacher's answers as targets; empty and cut-off answers drop their row."""
    asked = [row["prompt"] for row in rows]
    replies = teacher.complete(asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
    full = [
        {**row, "target": reply.text.strip()}
        for row, reply in zip(rows, replies, strict=True)
        if reply.text.strip() and not reply.truncated
    ]
    return table(full, "prompt", "target", *more)
