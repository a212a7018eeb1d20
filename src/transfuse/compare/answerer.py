"""A model with the knowledge in it, as the measurements see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.generate import chat_text, generate_texts, predicted_tokens
from ..core.metrics import perplexity

__all__ = ["Answerer", "Plain", "Prompts"]


@dataclass(frozen=True)
class Prompts:
    """How a prompt, alone or with a context, is written down for the model."""

    tokenizer: PreTrainedTokenizerBase
    kind: str
    chat: bool

    @property
    def template(self) -> str:
        """How `{context}` and `{query}` are put together."""
        if self.kind == "facts":
            return "Read this text: {context}\n\nComplete the sentence with the text: {query}"
        return "{context}\n\n{query}"

    def query(self, prompt: str) -> str:
        """A fact's prompt as it is; a question with room for its answer."""
        return prompt if self.kind == "facts" else f"Question: {prompt}\nAnswer:"

    def __call__(self, prompt: str, context: str | None = None) -> str:
        """The text the model reads."""
        text = self.query(prompt)
        if context:
            text = self.template.format(context=context, query=text)
        return chat_text(self.tokenizer, text) if self.chat else text


class Answerer(ABC):
    """Answers prompts after the knowledge was moved."""

    @abstractmethod
    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers."""

    @abstractmethod
    def predictions(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[torch.Tensor]:
        """Teacher-forced argmax tokens (int64 `[n]`) at each token of the given continuations."""

    @abstractmethod
    def tokens_read(self, prompts: Sequence[str]) -> list[int]:
        """Prompt tokens the model reads before it answers."""

    @abstractmethod
    def perplexity(self, text: str) -> float:
        """Perplexity on neutral text, the knowledge in place."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what must be stored to answer again."""


class Plain(Answerer):
    """One model that reads one text per prompt.

    Args:
        model: The model, changed or not.
        tokenizer: Its tokenizer.
        render: Prompt -> the text the model reads.
        store: Writes what must be stored into a folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[str], str],
        store: Callable[[Path], Any] = lambda folder: None,
    ):
        self.model, self.tokenizer, self.render, self.store = model, tokenizer, render, store

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        texts = [self.render(p) for p in prompts]
        return generate_texts(self.model, self.tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=24)

    def predictions(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[torch.Tensor]:
        texts = [self.render(p) for p in prompts]
        return predicted_tokens(self.model, self.tokenizer, texts, continuations, batch_size=24)

    def tokens_read(self, prompts: Sequence[str]) -> list[int]:
        return [len(self.tokenizer(self.render(p))["input_ids"]) for p in prompts]

    def perplexity(self, text: str) -> float:
        return perplexity(self.model, self.tokenizer, text)

    def save(self, folder: Path) -> None:
        self.store(folder)
