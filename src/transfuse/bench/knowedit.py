"""KnowEdit: how well facts were edited in, what follows from them, and what else changed.

:arxiv: 2401.01286
:moves: one fact -> a pretrained model, by any editor
:access: logits
:reversible: yes
:context: no

The study's record format, metrics and protocol for every editor of the `edit` family. Per fact, all figures in
[0, 1] but fluency:

- `edit_success`: share of target tokens that are the argmax after prompt and earlier target tokens;
- `paraphrase_success`: the same for its paraphrases;
- `portability`, `portability_<group>`: the same for what follows from the fact, by the best of the accepted answers;
- `locality`: for its neighbours, share of answer positions whose argmax is what it was before the edit. The answer
  that is read is the record's, as in the study's code (before and after the edit alike; whether it is right does not
  count); where a record has none, it is the unedited model's own greedy continuation;
- `exact_match`: 1 if the text generated from the prompt begins with the target. Teacher forcing flatters editors: the
  right first token may never be followed by the second. This figure is not flattered;
- `fluency`: n-gram entropy (`core.metrics.fluency`) of that text, a score of several hundred. The text is 100 new
  tokens (by default), chosen greedily. The study's code samples from the five likeliest tokens, up to 100 with the
  prompt, and scores prompt and text together: published figures are not comparable;
- `seconds`: to compute and apply the edit.

Modes: "single" edits, measures and rolls back fact by fact; "batch" and "sequential" edit all, then measure all.

Of the study's six data sets none is distributed with the library; `read_records` reads their format, and CounterFact
and zsRE as plain JSON.

    result = evaluate_edits(model, tokenizer, read_records("counterfact/edit.json")[:10], method="ft-m")
    result.summary["edit_success"].mean
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact, read_facts, read_rows
from ..core.errors import BadInput
from ..core.generate import generate_texts, predicted_tokens, target_matches
from ..core.metrics import fluency, normalise_answer
from ..core.runs import check_positive
from ..edit import editor
from ..edit._base import EditHandle, Editor, check_facts
from ._base import Evaluation, Interval, summarise

__all__ = ["Evaluation", "Interval", "evaluate_edits", "portability_of", "read_records", "reply_success"]

MODES = ("single", "sequential", "batch")


def read_records(source: str | os.PathLike[str] | Sequence[Any]) -> list[Fact]:
    """Read edit records: KnowEdit's own format, CounterFact and zsRE as JSON, or facts as they are.

    KnowEdit: `prompt`, `target_new`, `subject`, `rephrase_prompt`, `ground_truth`, `portability` and `locality` as
    groups of `{prompt, ground_truth}`. CounterFact: `rephrase_prompt`, `locality_prompt`, `locality_ground_truth`
    instead of the groups. zsRE: `src`, `alt`, `rephrase`, `answers`, `loc`, `loc_ans`. Other fields are ignored. A
    neighbour's answer is the first that is accepted.

    Raises:
        BadInput: a field is missing, empty or of the wrong type; the record's index and the field are named.
        CorruptFile: the file cannot be parsed.
    """
    return read_facts(
        [_translated(place, row) for place, row in read_rows(source, "records")], argument="records"
    )


def _translated(place: str, row: Any) -> Any:
    """A record's fields under the names of `Fact`."""
    if not isinstance(row, Mapping):
        return row
    fact = dict(row)
    for name, others in {
        "prompt": ("src",),
        "target": ("target_new", "alt"),
        "ground_truth": ("answers",),
        "id": ("case_id",),
    }.items():
        fact[name] = next((row[n] for n in (name, *others) if row.get(n) is not None), None)
    fact["ground_truth"] = _first(fact["ground_truth"])
    if row.get("paraphrases") is None:
        given: Any = next((row[n] for n in ("rephrase_prompt", "rephrase") if row.get(n)), [])
        fact["paraphrases"] = [given] if isinstance(given, str) else given
    if row.get("neighbours") is None:
        pairs = (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans"))
        given, known = next(((row[n], row.get(a)) for n, a in pairs if row.get(n)), ([], []))
        if isinstance(given, str):
            given, known = [given], [known]
        fact["neighbours"] = given
        fact["neighbour_answers"] = [_first(a) for a in ([known] if isinstance(known, str) else known or [])]
    if isinstance(row.get("locality"), Mapping):
        groups = _groups(place, row, "locality")
        before, known = fact["neighbours"], fact.get("neighbour_answers")
        fact["neighbours"] = [*before, *(prompt for _, prompt, _ in groups)]
        fact["neighbour_answers"] = [
            *(known or [None] * len(before)),
            *(_first(found) for _, _, found in groups),
        ]
    if isinstance(row.get("portability"), Mapping):
        # Without an answer there is nothing to score.
        fact["portability"] = [item for item in _groups(place, row, "portability") if item[2]]
    return fact


def _groups(place: str, row: Mapping[str, Any], field: str) -> list[tuple[str, str, list[str]]]:
    """(group, prompt, accepted answers) of a field that maps groups to lists of `{prompt, ground_truth}`."""
    found = []
    for group, items in row[field].items():
        for item in items or ():
            if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
                raise BadInput(
                    f"{place}: {field}.{group}", item, "has no prompt", "give {prompt, ground_truth}"
                )
            found.append((str(group), item["prompt"], _aliases(item.get("ground_truth"))))
    return found


def _aliases(value: Any) -> list[str]:
    """Texts of a text, a list, or a list of lists; empty ones left out."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    return (
        [text for item in value or () for text in _aliases(item)] if isinstance(value, (list, tuple)) else []
    )


def _first(value: Any) -> str | None:
    return next(iter(_aliases(value)), None)


def portability_of(shares: Sequence[tuple[str, Sequence[float]]]) -> dict[str, float]:
    """Portability overall and by group.

    Args:
        shares: For each prompt its group, and the share of right tokens of each accepted answer.

    Returns:
        `portability`, the mean over prompts of the best answer's share, and `portability_<group>` for each group.
    """
    groups: dict[str, list[float]] = {}
    for group, each in shares:
        groups.setdefault(f"portability_{group.lower()}", []).append(max(each))
    best = [value for values in groups.values() for value in values]
    means = {name: math.fsum(values) / len(values) for name, values in groups.items()}
    return {"portability": math.fsum(best) / len(best), **means} if best else {}


def reply_success(
    wanted_after: Sequence[float], unwanted_after: Sequence[float], wanted_before: Sequence[float]
) -> float:
    """ConvSent's edit success: the wanted replies gained on the unwanted ones, and did not become less likely.

    sigmoid(mean wanted - mean unwanted) * min(1, exp(mean wanted after - mean wanted before)).

    Args:
        wanted_after: Log-probabilities (nats) of the wanted replies' tokens under the edited model.
        unwanted_after: Of the unwanted replies' tokens, under the edited model.
        wanted_before: Of the wanted replies' tokens, under the unedited model.
    """
    wanted, unwanted, before = (
        math.fsum(values) / len(values) for values in (wanted_after, unwanted_after, wanted_before)
    )
    return 1 / (1 + math.exp(unwanted - wanted)) * min(1.0, math.exp(min(0.0, wanted - before)))


def evaluate_edits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: str | os.PathLike[str] | Sequence[Any],
    *,
    method: str | Editor | None,
    mode: str = "single",
    answer_tokens: int = 5,
    generated_tokens: int = 100,
    batch_size: int = 16,
    **hparams: Any,
) -> Evaluation:
    """Edit facts into a model and measure; the model is as before when this returns or raises.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        facts: Records, or what `read_records` takes.
        method: An editor's slug, an editor, or None for the unedited model.
        mode: "single", "sequential" or "batch".
        answer_tokens: Length of the model's own answers, in tokens: for neighbours whose answer no record tells.
        generated_tokens: Length of the text for `exact_match` and `fluency`; 0 leaves both out. Fluency grows with
            it: compare equal lengths only.
        batch_size: Rows per forward pass of the measurement.
        **hparams: The editor's hyperparameters, when `method` is a slug.

    Returns:
        The records' figures and their means with intervals.

    Raises:
        BadInput: wrong facts, method, mode or hyperparameters; nothing was done.
    """
    if mode not in MODES:
        raise BadInput("mode", mode, "is unknown", f"use {', '.join(MODES)}")
    worker = editor(method, **hparams) if isinstance(method, str) else method
    if hparams and not isinstance(method, str):
        raise BadInput(
            "hparams", sorted(hparams), "are given beside an editor object", "give them to the editor"
        )
    check_positive(
        answer_tokens=answer_tokens, generated_tokens=generated_tokens or None, batch_size=batch_size
    )
    facts = read_records(facts)
    check_facts(facts) if worker is None else worker.check(model, tokenizer, facts)
    scorer = _Scorer(model, tokenizer, facts, answer_tokens, generated_tokens, batch_size)
    if worker is None:
        return summarise(scorer.score(range(len(facts)), str))
    everything = list(range(len(facts)))
    groups = [[i] for i in everything] if mode == "single" else [everything]
    records = []
    for group in groups:
        chosen = [facts[i] for i in group]
        with EditHandle(model, tokenizer, method=type(worker).__name__, facts=chosen) as handle:
            begun = time.perf_counter()
            together = mode == "batch" and worker.batched
            for part in [chosen] if together else [[fact] for fact in chosen]:
                handle.add(worker.fit(model, tokenizer, part))
            seconds = (time.perf_counter() - begun) / len(group)
            records += [{**record, "seconds": seconds} for record in scorer.score(group, handle.rewrite)]
    return summarise(records)


class _Scorer:
    """Everything measured on facts; the unedited model's answers are computed once, at the beginning."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        answer_tokens: int,
        generated_tokens: int,
        batch_size: int,
    ):
        self.model, self.tokenizer, self.facts = model, tokenizer, facts
        self.generated_tokens, self.batch_size = generated_tokens, batch_size
        pairs = list(dict.fromkeys(pair for fact in facts for pair in fact.answered_neighbours))
        unknown = [neighbour for neighbour, answer in pairs if answer is None]
        # A model that stops at once still has one answer position: any filler shows its argmax there.
        own = [text.strip() or "." for text in self._generate(unknown, answer_tokens)]
        told = dict(zip(unknown, own, strict=True))
        answers = [told[neighbour] if answer is None else answer for neighbour, answer in pairs]
        before = predicted_tokens(model, tokenizer, [n for n, _ in pairs], answers, batch_size=batch_size)
        self.answers = dict(zip(pairs, answers, strict=True))
        self.before = dict(zip(pairs, before, strict=True))

    def _generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        return generate_texts(
            self.model, self.tokenizer, prompts, max_new_tokens=tokens, batch_size=self.batch_size
        )

    def score(self, group: Sequence[int], rewrite: Callable[[str], str]) -> list[dict[str, Any]]:
        """Figures of the facts in `group` under the model as it is now."""
        facts = [self.facts[i] for i in group]
        asked: list[tuple[str, str]] = []  # (prompt, answer), each once
        for fact in facts:
            asked += [(prompt, fact.target) for prompt in (fact.prompt, *fact.paraphrases)]
            asked += [(prompt, answer) for _, prompt, answers in fact.portability for answer in answers]
        asked = list(dict.fromkeys(asked))
        said = {prompt: rewrite(prompt) for prompt in {p for p, _ in asked}}
        hits = target_matches(
            self.model, self.tokenizer, [said[p] for p, _ in asked], [a for _, a in asked],
            batch_size=self.batch_size,
        )  # fmt: skip
        share = {pair: float(hit.float().mean()) for pair, hit in zip(asked, hits)}
        kept = self._locality(facts, rewrite)
        texts = [""] * len(facts)
        if self.generated_tokens:
            texts = self._generate([said[fact.prompt] for fact in facts], self.generated_tokens)
        records = []
        for fact, text in zip(facts, texts):
            record: dict[str, Any] = {
                "record": fact.label,
                "edit_success": share[fact.prompt, fact.target],
            }
            if fact.paraphrases:
                record["paraphrase_success"] = _mean([share[p, fact.target] for p in fact.paraphrases])
            record |= portability_of(
                [(of, [share[p, a] for a in answers]) for of, p, answers in fact.portability if answers]
            )
            if fact.neighbours:
                record["locality"] = _mean([kept[pair] for pair in fact.answered_neighbours])
            if self.generated_tokens:
                record["exact_match"] = float(_begins(text, fact.target))
                record["fluency"] = fluency(text)
                record["text"] = text
            records.append(record)
        return records

    def _locality(
        self, facts: Sequence[Fact], rewrite: Callable[[str], str]
    ) -> dict[tuple[str, str | None], float]:
        """Share of answer tokens predicted as before the edit, by neighbour and the record's answer."""
        pairs = list(dict.fromkeys(pair for fact in facts for pair in fact.answered_neighbours))
        after = predicted_tokens(
            self.model, self.tokenizer, [rewrite(n) for n, _ in pairs], [self.answers[pair] for pair in pairs],
            batch_size=self.batch_size,
        )  # fmt: skip
        return {pair: _equal_share(self.before[pair], now) for pair, now in zip(pairs, after, strict=True)}


def _equal_share(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of equal tokens. A rewritten prompt can split the answer otherwise; surplus tokens count as unequal."""
    length = min(len(before), len(after))
    return float((before[:length] == after[:length]).sum()) / max(len(before), len(after))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _begins(text: str, target: str) -> bool:
    """Whether the normalised text begins with the normalised target, as whole words."""
    return f"{normalise_answer(text)} ".startswith(f"{normalise_answer(target)} ")
