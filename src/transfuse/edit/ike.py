"""IKE: say the new fact in the prompt, after demonstrations of how to use such facts.

:arxiv: 2305.12740
:moves: one fact -> the prompt
:access: text
:reversible: yes
:context: yes
:extra: retrieve

No training and no change of the model: `handle.rewrite(question)` gives the prompt to ask with,

    New Fact: <p> <t>            16 demonstrations, the one nearest to the edit last
    Prompt: ...

    New Fact: <prompt> <target>
    Prompt: <question>

Demonstrations are made from other facts and are of three types: *copy* repeats the fact's own prompt with its target,
*update* asks a paraphrase and answers with the target, *retain* asks a neighbour and answers as before. The nearest by
cosine of all-MiniLM-L6-v2 embeddings are taken, whatever their type. The nearest last is the order of the original
repository; EasyEdit's is the reverse. A neighbour's answer is the one in the record (`Fact.neighbour_answers`, filled
from the study's, CounterFact's and zsRE's files by `bench.knowedit.read_records`); a neighbour without one gives no
*retain* demonstration. Without `demonstrations` the new fact stands alone.

With several edited facts the one whose prompt is nearest to the question is the new fact; the encoder is needed
for this and for demonstrations only. Every question is rewritten: the method itself has no sense of scope, and its
locality rests on the *retain* demonstrations.

    with edit(model, tokenizer, facts, method="ike", demonstrations="facts.jsonl") as handle:
        generate_texts(model, tokenizer, [handle.rewrite(q) for q in questions], max_new_tokens=10)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact, read_facts
from ..core.models import load_encoder
from ._base import Editor, PromptEdit, check_facts
from ._layers import check_number

__all__ = ["IKE", "demonstrations", "new_fact_prompt"]


def demonstrations(facts: Sequence[Fact]) -> list[str]:
    """All copy, update and retain demonstrations of `facts`, in that order for each fact.

    Neighbours whose answer is not known are left out.
    """
    found = []
    for fact in facts:
        uses = [(fact.prompt, fact.target)]
        uses += [(paraphrase, fact.target) for paraphrase in fact.paraphrases]
        uses += [(neighbour, answer) for neighbour, answer in fact.answered_neighbours if answer is not None]
        found += [
            f"{new_fact_prompt(fact.prompt, fact.target, prompt)} {answer}\n\n" for prompt, answer in uses
        ]
    return found


def new_fact_prompt(prompt: str, target: str, question: str) -> str:
    """The new fact, then the question, ready to be continued with the answer."""
    return f"New Fact: {prompt} {target}\nPrompt: {question}"


class Told(NamedTuple):
    """An edited fact: prompt, target, and the demonstrations that go before it, in order."""

    prompt: str
    target: str
    shown: list[str]


class Pool(NamedTuple):
    """Demonstrations, and what they were made from.

    Attributes:
        facts: The facts to demonstrate with.
        encoder: Name of the encoder.
        owners: The fact of each demonstration.
        texts: The demonstrations.
        vectors: `[n, width]`, unit length.
    """

    facts: list[Fact]
    encoder: str
    owners: list[Fact]
    texts: list[str]
    vectors: np.ndarray


_ENCODERS: dict[str, Any] = {}
_POOLS: weakref.WeakKeyDictionary[IKE, Pool] = weakref.WeakKeyDictionary()
_IN_PLACE: weakref.WeakKeyDictionary[PreTrainedModel, list[IkeEdit]] = weakref.WeakKeyDictionary()


def _encode(encoder: str, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors `[n, width]`, float32. An encoder is loaded once for each name."""
    if encoder not in _ENCODERS:
        _ENCODERS[encoder] = load_encoder(encoder)
    found = _ENCODERS[encoder].encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


class IkeEdit(PromptEdit):
    """Facts to be said in the prompt. The edits in place on one model choose among all their facts together.

    Args:
        told: The facts with their demonstrations.
        encoder: Sentence encoder that finds the fact nearest to a question.
    """

    kind = "ike"

    def __init__(self, *, told: Sequence[Told], encoder: str):
        self.told, self.encoder = list(told), encoder
        self._vectors: np.ndarray | None = None
        self._among: list[IkeEdit] = [self]

    def attach(self, model: PreTrainedModel) -> None:
        """Join the edits of this kind in place on the model."""
        self._among = _IN_PLACE.setdefault(model, [])
        self._among.append(self)

    def detach(self, model: PreTrainedModel) -> None:
        """Leave them."""
        if self in self._among:
            self._among.remove(self)
        self._among = [self]

    def rewrite(self, prompt: str) -> str:
        """Demonstrations, the new fact nearest to `prompt`, and `prompt`; a prompt that tells one of them stays."""
        facts = tuple(new_fact_prompt(f.prompt, f.target, "") for edit in self._among for f in edit.told)
        head, mark, _ = prompt.rpartition("\nPrompt: ")
        if (head + mark).endswith(facts):
            return prompt
        choices = [(edit, i) for edit in self._among for i in range(len(edit.told))]
        best = 0
        if len(choices) > 1:
            vectors = np.concatenate([edit._prompt_vectors() for edit in self._among])
            best = int((vectors @ _encode(self.encoder, [prompt])[0]).argmax())
        edit, index = choices[best]
        fact = edit.told[index]
        return "".join(fact.shown) + new_fact_prompt(fact.prompt, fact.target, prompt)

    def _prompt_vectors(self) -> np.ndarray:
        if self._vectors is None:
            self._vectors = _encode(self.encoder, [fact.prompt for fact in self.told])
        return self._vectors

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing: the facts are text."""
        return {}

    def meta(self) -> dict[str, Any]:
        """The facts, their demonstrations, the encoder's name."""
        return {"told": [list(fact) for fact in self.told], "encoder": self.encoder}

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> IkeEdit:
        """Rebuild from `meta`."""
        return cls(told=[Told(*fact) for fact in meta["told"]], encoder=meta["encoder"])


class IKE(Editor):
    """Editor; see the module.

    Args:
        demonstrations: Facts to demonstrate with, or a file of them (as `read_facts` takes it). A fact with the
            prompt of an edited one is left out.
        k: Demonstrations before the new fact.
        encoder: Sentence encoder, as `load_encoder` takes it.
    """

    def __init__(
        self,
        *,
        demonstrations: str | os.PathLike[str] | Sequence[Fact] = (),
        k: int = 16,
        encoder: str = "minilm",
    ):
        self.demonstrations, self.k, self.encoder = demonstrations, k, encoder

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Refuse facts, demonstrations and hyperparameters that cannot work."""
        check_facts(facts)
        check_number("k", self.k, least=0, whole=True)
        self._facts()

    def _facts(self) -> list[Fact]:
        given = self.demonstrations
        if not isinstance(given, (str, os.PathLike)) and not len(given):
            return []
        return read_facts(given, argument="demonstrations")

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> IkeEdit:
        """Choose each fact's demonstrations."""
        self.check(model, tokenizer, facts)
        return IkeEdit(told=[Told(f.prompt, f.target, self._nearest(f)) for f in facts], encoder=self.encoder)

    def _nearest(self, fact: Fact) -> list[str]:
        """The k demonstrations nearest to the edit, the nearest last."""
        if not self.k:
            return []
        _, _, owners, texts, vectors = self._pool()
        if not texts:
            return []
        query = _encode(self.encoder, [new_fact_prompt(fact.prompt, fact.target, fact.prompt) + "\n\n"])[0]
        order = np.argsort(-(vectors @ query), kind="stable")
        chosen = [texts[i] for i in order if owners[i].prompt != fact.prompt][: self.k]
        return chosen[::-1]

    def _pool(self) -> Pool:
        """Owner, text and vector of every demonstration; encoded once for this editor's facts and encoder."""
        facts, kept = self._facts(), _POOLS.get(self)
        if kept is None or (kept.facts, kept.encoder) != (facts, self.encoder):
            made = [(fact, text) for fact in facts for text in demonstrations([fact])]
            texts = [text for _, text in made]
            vectors = _encode(self.encoder, texts) if texts else np.empty((0, 0), np.float32)
            kept = _POOLS[self] = Pool(facts, self.encoder, [fact for fact, _ in made], texts, vectors)
        return kept
