"""Documents to adapters: the offline half of parametric RAG."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Document
from ..core.errors import BadInput, IncompatibleModels
from ..core.files import sha256_json
from ..core.models import fingerprint
from ..core.retrieval import passage_text
from ..core.runs import check_number, check_positive, evaluating
from ..core.training import encode_examples, optimise
from ._augment import Augmentation, Augmenter, Render, Triple, plan, prompt_for, target
from ._lora import Factors, LoraSlot, initial_factors, target_modules
from ._store import AdapterStore

__all__ = ["DocumentParameterizer"]

logger = logging.getLogger(__name__)

_WEIGHT_DECAY = 0.01  # AdamW's own default


class DocumentParameterizer:
    """Trains one adapter per document.

    Args:
        model: The frozen base model, in any floating dtype; adapters are float32.
        tokenizer: Its tokenizer.
        augmenter: Makes questions and rewrites: `LLMAugmenter`, or `Given` where they are known.
        rank: r.
        alpha: The adapters' scale is s = alpha / rank.
        targets: Last parts of the names of the adapted layers.
        lr: Learning rate of AdamW.
        epochs: Passes over a document's sequences.
        max_length: Longest sequence, in tokens.
        truncate: Cut the beginning of what is too long instead of refusing it.
        plan: "code" or "product", see `plan`.
        cot: Learn full-sentence answers, for questions that need several steps.
        render: How a question and its passages are put; by default the model's chat template. Must be the one
            questions are asked with later.
        initial: Where every document starts; by default drawn from `seed`. `store.initial()` extends a store,
            `warm_up(...)` gives one that knows the task.
        seed: Of the initialisation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        augmenter: Augmenter,
        *,
        rank: int = 2,
        alpha: float = 32.0,
        targets: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        lr: float = 3e-4,
        epochs: int = 1,
        max_length: int = 3000,
        truncate: bool = False,
        plan: Literal["code", "product"] = "code",
        cot: bool = False,
        render: Render | None = None,
        initial: Factors | None = None,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.augmenter = model, tokenizer, augmenter
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.lr, self.epochs, self.max_length, self.truncate = lr, epochs, max_length, truncate
        self.plan, self.cot, self.render, self.initial, self.seed = plan, cot, render, initial, seed

    def encode(
        self,
        documents: Sequence[Document],
        store: AdapterStore | str | os.PathLike[str],
        *,
        on_document: Callable[[int, int], None] | None = None,
    ) -> AdapterStore:
        """Train the adapters that `store` lacks. A killed run goes on with the first unfinished document.

        Args:
            documents: What to encode. A document whose text, title and material are in the store already is
                not trained again.
            store: The store or its folder.
            on_document: Called after each document with the number done and the number to do.

        Returns:
            The store. Documents without usable questions are in `store.skipped`.

        Raises:
            BadInput: a setting out of range, an empty document, a sequence beyond `max_length`, a document
                for which the augmenter gave no question, or no document that could be encoded.
            IncompatibleModels: the store belongs to another base model or initialisation, or `initial` does not fit.
            TrainingDiverged: a loss is not finite; finished documents stay.
        """
        chosen = self._checked(documents)
        store = store if isinstance(store, AdapterStore) else AdapterStore(store)
        initial = self._initial()
        keys = {d.hash: sha256_json(key) for d, key in zip(chosen, self.augmenter.keys(chosen), strict=True)}
        shared = self._shared()
        store.compare(shared, initial)
        todo = [document for document in chosen if not self._done(store, document, keys[document.hash])]
        augmented = zip(todo, self.augmenter.augment(todo), strict=True)
        batch = [self._examples(document, augmentation) for document, augmentation in augmented]
        store.bind(shared, initial)
        with evaluating(self.model), self._slot() as slot:
            for made, (document, examples) in enumerate(zip(todo, batch), 1):
                if examples is None:
                    store.skip(document)
                    logger.warning("no usable questions for %s; skipped", document.title or document.hash)
                else:
                    header = {"data": keys[document.hash], **self._train(slot, initial, examples)}
                    store.put(document, slot.factors(), header)
                if on_document is not None:
                    on_document(made, len(todo))
        if not any(document in store for document in chosen):
            raise BadInput(
                "documents", len(chosen), "gave no usable question at all", "use a better augmenter"
            )
        return store

    def warm_up(self, triples: Sequence[Triple]) -> Factors:
        """An initialisation that has seen the task: one pass over questions without passages.

        Each answer is followed by the end-of-text token, which documents' sequences lack. Give the result to a new
        parameterizer as `initial`.

        Args:
            triples: Questions and answers on other subjects (the paper: 600 to 2000 of them).

        Raises:
            BadInput: no triples, a setting out of range, or a sequence beyond `max_length`.
            IncompatibleModels: `initial` does not fit the model.
            TrainingDiverged: a loss is not finite.
        """
        if not triples:
            raise BadInput("triples", [], "is empty", "give questions with answers")
        sequences = [((), triple.question, target(triple, cot=self.cot)) for triple in triples]
        self._check()
        initial = self._initial()
        examples = self._encoded(sequences, end=True)
        with evaluating(self.model), self._slot() as slot:
            self._train(slot, initial, examples, epochs=1)
            return slot.factors()

    def _initial(self) -> Factors:
        """Where all documents start."""
        shapes = target_modules(self.model, self.targets)
        if self.initial is None:
            return initial_factors(shapes, rank=self.rank, seed=self.seed)
        wanted = {
            name: ((self.rank, inputs), (outputs, self.rank)) for name, (inputs, outputs) in shapes.items()
        }
        if wanted != {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in self.initial.items()}:
            raise IncompatibleModels(
                "initial", f"{len(self.initial)} modules", f"does not fit {len(shapes)} layers at rank {self.rank}",
                "give one made for this model with the same rank and targets",
            )  # fmt: skip
        return self.initial

    def _check(self) -> None:
        """Refuse settings that cannot work."""
        check_positive(rank=self.rank, epochs=self.epochs, max_length=self.max_length)
        for name in ("lr", "alpha"):
            check_number(name, getattr(self, name))
        if not isinstance(self.seed, int) or self.seed < 0:
            raise BadInput("seed", self.seed, "is not a whole number from 0", "give such a seed")
        if self.plan not in ("code", "product"):
            raise BadInput("plan", self.plan, "is unknown", 'use "code" or "product"')

    def _checked(self, documents: Sequence[Document]) -> list[Document]:
        """Refuse what cannot work before any work is done; duplicates are left out."""
        self._check()
        if not documents:
            raise BadInput("documents", [], "is empty", "give at least one document")
        limit = self._limit()
        for i, document in enumerate(documents):
            if not document.text.strip():
                raise BadInput(f"documents[{i}]: text", document.text, "is empty", "leave the document out")
            length = len(self.tokenizer(passage_text(document), verbose=False)["input_ids"])
            if length > limit and not self.truncate:
                raise BadInput(
                    f"documents[{i}]", f"{length} tokens", f"exceeds max_length = {limit}",
                    "split the document or pass truncate=True",
                )  # fmt: skip
        return list({document.hash: document for document in documents}.values())

    def _limit(self) -> int:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.max_length, positions or self.max_length)

    def _render(self) -> Render:
        return self.render or prompt_for(self.tokenizer, cot=self.cot)

    def _shared(self) -> dict[str, Any]:
        """What makes adapters of one store alike. Prompts are known by how they put a sample question."""
        render = self._render()
        sample = sha256_json([render("Who?", []), render("Who?", ["One.", "Two."])])
        return {
            "base": fingerprint(self.model),
            "lora": {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)},
            "recipe": {
                "lr": self.lr, "epochs": self.epochs, "max_length": self.max_length, "plan": self.plan,
                "cot": self.cot, "prompt": sample[:16],
            },
        }  # fmt: skip

    def _done(self, store: AdapterStore, document: Document, key: str) -> bool:
        return document in store and store.read(document)[1].get("data") == key

    def _examples(
        self, document: Document, augmentation: Augmentation | None
    ) -> list[dict[str, list[int]]] | None:
        if augmentation is None:
            return None
        if not augmentation.triples:
            raise BadInput(
                "augmenter", document.title or document.text[:40], "got no question and answer",
                "return at least one triple, or None to skip the document",
            )  # fmt: skip
        return self._encoded(plan(document, augmentation, kind=self.plan, cot=self.cot))

    def _encoded(
        self, sequences: Sequence[tuple[tuple[str, ...], str, str]], *, end: bool = False
    ) -> list[dict[str, list[int]]]:
        render = self._render()
        return encode_examples(
            self.tokenizer,
            [(render(question, passages), target) for passages, question, target in sequences],
            loss_on="all",
            max_length=self._limit(),
            truncate=self.truncate,
            end=end,
        )

    def _slot(self) -> LoraSlot:
        return LoraSlot(self.model, targets=self.targets, rank=self.rank, scale=self.alpha / self.rank)

    def _train(
        self,
        slot: LoraSlot,
        initial: Factors,
        examples: Sequence[dict[str, list[int]]],
        epochs: int | None = None,
    ) -> dict[str, Any]:
        """Fill `slot` with an adapter trained on `examples`; returns what to note down about it."""
        started = time.perf_counter()
        slot.fill(initial)
        rows = [torch.tensor([row["input_ids"]], device=self.model.device) for row in examples]
        labels = [torch.tensor([row["labels"]], device=self.model.device) for row in examples]
        turn = iter(range(10**9))

        def loss() -> torch.Tensor:
            i = next(turn) % len(rows)
            return self.model(input_ids=rows[i], labels=labels[i], use_cache=False).loss

        passes = epochs or self.epochs
        losses = optimise(
            slot.parameters(), loss, lr=self.lr, steps=passes * len(rows), optimizer="adamw",
            weight_decay=_WEIGHT_DECAY,
        )  # fmt: skip
        first, last = losses[: len(rows)], losses[-len(rows) :]
        return {
            "sequences": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in examples),
            "first_loss": sum(first) / len(first),
            "last_loss": sum(last) / len(last),
            "seconds": round(time.perf_counter() - started, 3),
        }
