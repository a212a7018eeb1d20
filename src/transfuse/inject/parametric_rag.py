"""Parametric RAG: a small adapter per document, summed into the model when a question retrieves the document.

:arxiv: 2501.15915
:moves: a document -> a LoRA on the feed-forward weights, attached when the document is retrieved
:access: weights
:reversible: yes
:context: no
:extra: retrieve

Offline, every document is rewritten and turned into question-answer triples, and a low-rank adapter of the
gate, up and down projections (r = 2, alpha = 32) is trained on them: AdamW at 3e-4, one sequence at a time,
in a fixed order, without a schedule. The loss covers all tokens, passage and question included, because the
passage itself is to be memorised. All documents start from one initialisation, whose hash their store keeps.
Online, the adapters of the k retrieved documents are summed into the frozen model and the question is
answered without a passage (`mode="parametric"`) or with the passages as well (`"combine"`); `"context"` is
the ordinary baseline.

Where it differs. The paper trains every rewrite with every question; its code, and `plan="code"` here, gives
passages to the first half of the questions only (`plan="product"` is the paper's). Sums are by rank
concatenation, equal to the sum of the updates. A global `scale` is added, and sums of more than five
adapters are refused when they raise the perplexity of a neutral text too far. The optional warm-up of the
initialisation is `DocumentParameterizer.warm_up`.

Expect less of the adapters alone than of reading the passage: on SmolLM2-135M the answer stays several times
less likely than with the passage in the prompt, while the combination of both is the best of the three.

    augmenter = LLMAugmenter(Local(model, tokenizer))
    store = DocumentParameterizer(model, tokenizer, augmenter).encode(docs, "adapters")
    rag = ParametricRAG(model, BM25(docs), store, tokenizer, mode="combine", k=3)
    rag.answer("Who is the mayor of Port Ellery").text
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Document
from ..core.errors import BadInput
from ..core.generate import generate_texts
from ..core.metrics import perplexity
from ..core.retrieval import Answer, Hit, Retriever, passage_text
from ..core.runs import check_positive, evaluating
from ._augment import (
    Augmentation,
    Given,
    LLMAugmenter,
    Render,
    Triple,
    chat_prompt,
    cloze_prompt,
    extract_answer,
    plain_prompt,
    plan,
    prompt_for,
)
from ._encode import DocumentParameterizer
from ._lora import AdapterHandle, LoraSlot, merge_adapters
from ._store import AdapterStore

__all__ = [
    "AdapterHandle",
    "AdapterStore",
    "Augmentation",
    "DocumentParameterizer",
    "Given",
    "LLMAugmenter",
    "ParametricRAG",
    "Triple",
    "chat_prompt",
    "cloze_prompt",
    "extract_answer",
    "merge_adapters",
    "plain_prompt",
    "plan",
]

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

_SAFE_SUM = 5  # adapters that are summed without a look at the perplexity
_NEUTRAL = (
    "Rain fell on the hills for most of the night, and by morning the streams had risen over the lower "
    "fields. The farmers moved their animals to higher ground and waited for the water to go down. In the "
    "village the shops opened late, because the road from the town was closed until noon. People talked "
    "about the weather, drank their coffee and went back to work when the sun came out again."
)


class ParametricRAG:
    """Answers questions with the retrieved documents in the weights, in the prompt, or in both.

    Args:
        model: The base model that the store was made for.
        retriever: Finds documents: `core.retrieval.BM25`, `VectorIndex`, or anything with `search`.
        store: The documents' adapters; None with `mode="context"`.
        tokenizer: The model's tokenizer.
        mode: "parametric": adapters only. "context": passages in the prompt only. "combine": both.
        k: Documents per question.
        render: How a question and its passages are put; the one the adapters were trained with.
        cot: Let the model reason before it answers (128 new tokens instead of 20).
        weights: One weight per retrieved document, best first; 1 each by default.
        scale: A further weight of the summed adapters.
        batch_size: Questions with the same documents answered at a time.
        perplexity_limit: More than five adapters are refused when they multiply the perplexity of a neutral
            text by more than this.
        neutral_text: That text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        retriever: Retriever,
        store: AdapterStore | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: Literal["parametric", "context", "combine"] = "parametric",
        k: int = 3,
        render: Render | None = None,
        cot: bool = False,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        batch_size: int = 16,
        perplexity_limit: float = 2.0,
        neutral_text: str = _NEUTRAL,
    ):
        self.model, self.retriever, self.store, self.tokenizer = model, retriever, store, tokenizer
        self.mode, self.k, self.render, self.cot = mode, k, render, cot
        self.weights = None if weights is None else tuple(weights)
        self.scale, self.batch_size = scale, batch_size
        self.perplexity_limit, self.neutral_text = perplexity_limit, neutral_text
        self._base_perplexity: float | None = None
        self._fits = False

    def answer(self, question: str, *, max_new_tokens: int | None = None) -> Answer:
        """Answer one question; see `answers`."""
        return self.answers([question], max_new_tokens=max_new_tokens)[0]

    def answers(self, questions: Sequence[str], *, max_new_tokens: int | None = None) -> list[Answer]:
        """Answer questions greedily. Those that retrieve the same documents share a batch.

        Args:
            questions: What to ask, as `render` expects it.
            max_new_tokens: Length limit; by default 20, with `cot` 128.

        Returns:
            One answer per question: the text as generated (`extract_answer` gives the paper's short form),
            the documents used, and a trace (mode, tokens read, adapters summed, perplexity ratio where measured).

        Raises:
            BadInput: an unknown mode, k beyond what can be retrieved, a document that was never encoded, or
                adapters that break the model together.
            IncompatibleModels: the store was made for another model.
        """
        check_positive(max_new_tokens=max_new_tokens)
        limit = max_new_tokens or (128 if self.cot else 20)

        def ask(prompts: Sequence[str], indices: Sequence[int], trace: dict[str, Any]) -> list[Answer]:
            texts = generate_texts(
                self.model, self.tokenizer, prompts, max_new_tokens=limit, batch_size=self.batch_size
            )
            return [
                Answer(
                    text, tuple(found[i]), trace | {"prompt_tokens": len(self.tokenizer(prompt)["input_ids"])}
                )
                for text, i, prompt in zip(texts, indices, prompts)
            ]

        found = self.retrieve(questions)
        return self._grouped(questions, found, ask)

    def measure(
        self, questions: Sequence[str], function: Callable[[Sequence[str], Sequence[int]], Sequence[Result]]
    ) -> list[Result]:
        """Run `function` under each question's documents, for scores of one's own.

        Args:
            questions: What to ask, as `render` expects it.
            function: Gets prompts that share their documents, and their places in `questions`, while the
                adapters are attached to the model; returns one result per prompt.

        Returns:
            The results in the order of `questions`. Errors as in `answers`.
        """
        return self._grouped(
            questions, self.retrieve(questions), lambda prompts, indices, trace: function(prompts, indices)
        )

    def retrieve(self, questions: Sequence[str]) -> list[list[Hit]]:
        """The k documents of each question, all different.

        A document that could not be encoded yields its place to the next, and so does one that repeats another: its
        adapter would be added twice.
        """
        self._check()
        skipped = self.store.skipped if self.store is not None else {}
        available = len(self.retriever.documents)
        wanted = max(self.k, min(self.k + len(skipped), available))
        while True:
            results = [self._different(hits, skipped) for hits in self.retriever.search(questions, wanted)]
            short = [i for i, kept in enumerate(results) if len(kept) < self.k]
            if not short:
                return results
            if wanted >= available:
                question, count = questions[short[0]], len(results[short[0]])
                raise BadInput(
                    "k", self.k, f"exceeds the {count} different documents that have adapters ({question[:40]!r})",
                    f"use k <= {count}",
                )  # fmt: skip
            wanted = min(2 * wanted, available)

    def _different(self, hits: Sequence[Hit], skipped: Collection[str]) -> list[Hit]:
        found: dict[str, Hit] = {}
        for hit in hits:
            if hit.document.hash not in skipped:
                found.setdefault(hit.document.hash, hit)
        return list(found.values())[: self.k]

    def _check(self) -> None:
        check_positive(k=self.k, batch_size=self.batch_size)
        if self.mode not in ("parametric", "context", "combine"):
            raise BadInput("mode", self.mode, "is unknown", 'use "parametric", "context" or "combine"')
        if self.mode != "context" and self.store is None:
            raise BadInput("store", None, f"is needed with mode={self.mode!r}", "encode the documents first")
        if self.weights is not None and len(self.weights) != self.k:
            raise BadInput("weights", self.weights, f"are not {self.k} numbers", "give one per document")

    def _grouped(
        self,
        questions: Sequence[str],
        found: Sequence[Sequence[Hit]],
        function: Callable[[Sequence[str], Sequence[int], dict[str, Any]], Sequence[Result]],
    ) -> list[Result]:
        """`function` over the questions, those with the same documents together."""
        render = self.render or prompt_for(self.tokenizer, cot=self.cot)
        shown = self.mode != "parametric"
        prompts = [
            render(question, [passage_text(hit.document) for hit in hits] if shown else [])
            for question, hits in zip(questions, found)
        ]
        results: dict[int, Result] = {}
        with evaluating(self.model):
            if self.mode == "context" or self.store is None:
                trace = {"mode": self.mode, "k": self.k, "adapters": 0}
                return list(function(prompts, range(len(prompts)), trace)) if prompts else []
            groups: dict[tuple[str, ...], list[int]] = {}
            for i, hits in enumerate(found):
                names = [hit.document.hash for hit in hits]
                groups.setdefault(tuple(names if self.weights else sorted(names)), []).append(i)
            with self._attached(self.store) as fill:
                for document in (hit.document for hits in found for hit in hits):
                    if document not in self.store:
                        self.store.get(document)  # raises, before any question is answered
                for indices in groups.values():
                    trace = fill([hit.document for hit in found[indices[0]]])
                    outcome = function([prompts[i] for i in indices], indices, trace)
                    results.update(zip(indices, outcome, strict=True))
        return [results[i] for i in range(len(prompts))]

    @contextlib.contextmanager
    def _attached(self, store: AdapterStore) -> Iterator[Callable[[Sequence[Document]], dict[str, Any]]]:
        """Yield a function that attaches a set of documents in place of the one before."""
        if not self._fits:  # a fingerprint of the weights: once
            store.check(self.model)
            self._fits = True
        lora = store.manifest["lora"]
        many = self.k > _SAFE_SUM
        if many and self._base_perplexity is None:
            self._base_perplexity = perplexity(self.model, self.tokenizer, self.neutral_text)
        with LoraSlot(self.model, targets=lora["targets"], rank=self.k * lora["rank"], scale=1.0) as slot:

            def fill(documents: Sequence[Document]) -> dict[str, Any]:
                # Without weights in the order of the hashes: one set of documents, one sum, to the last bit.
                ordered = list(documents) if self.weights else sorted(documents, key=lambda d: d.hash)
                slot.fill(store.merged(ordered, weights=self.weights, scale=self.scale))
                trace: dict[str, Any] = {"mode": self.mode, "k": self.k, "adapters": len(ordered)}
                if many:
                    trace["perplexity_ratio"] = self._ratio()
                return trace

            yield fill

    def _ratio(self) -> float:
        """Perplexity of the neutral text with the adapters over that without.

        Raises:
            BadInput: it exceeds the limit.
        """
        assert self._base_perplexity is not None
        ratio = perplexity(self.model, self.tokenizer, self.neutral_text) / self._base_perplexity
        logger.info("%d adapters: perplexity of the neutral text x %.3f", self.k, ratio)
        if not ratio <= self.perplexity_limit:
            raise BadInput(
                "k", self.k, f"adapters together multiply the perplexity of neutral text by {ratio:.3g} "
                f"(limit {self.perplexity_limit:g})", "use fewer documents or a smaller scale",
            )  # fmt: skip
        return ratio
