"""Carriers that leave the model alone and steer it by a small expert, which is taught the lessons in its place."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.errors import BadInput
from ..core.metrics import perplexity
from ..core.models import fingerprint, load
from ..core.pruning import prune
from ..core.streams import check_vocabularies
from ..core.taps import decoder_layers
from .adapters import LoRA
from .answerer import Answerer, Plain
from .carriers import Bench, Carrier

__all__: list[str] = []

ROWS = 64  # tokens whose logits of all models are joined at a time


class _SmallExpert(Carrier):
    """A small model is taught the lessons; what that did to its scores is added to the large one's.

    Args:
        small: A small model with the large one's tokenizer, as `transfuse.load` takes it; None: one that is cut
            out of the large one.
        layers: Blocks of the one that is cut out; None: a third of the large one's.
        rank, lr, epochs, rehearsal, batch_size: Of the adapter the small model is taught with, in all its blocks;
            see `lora`.
    """

    access = ("logits", "training data")
    usage = (
        "from peft import PeftModel\n\n"
        "# small: the recipe's `small`, or transfuse.core.pruning.prune(model, layers=...) with a third of the blocks\n"
        'expert = PeftModel.from_pretrained(small, "adapter")'
    )
    effort = 90.0

    def __init__(
        self, *, small: str | None = None, layers: int | None = None, rank: int = 16, lr: float = 2e-3,
        epochs: int = 12, rehearsal: float = 0.7, batch_size: int = 8,
    ):  # fmt: skip
        if small is not None and layers is not None:
            raise BadInput("layers", layers, "does not go with `small`", "give one of the two")
        if layers is not None and layers < 1:
            raise BadInput("layers", layers, "is below 1", "give a number of blocks to keep")
        self.small, self.layers = small, layers
        self.rank, self.lr, self.epochs = rank, lr, epochs
        self.rehearsal, self.batch_size = rehearsal, batch_size

    def check(self, knowledge: Any) -> None:
        """Numbers must be in their ranges."""
        self._teacher().check(knowledge)

    def needs(self) -> tuple[str, ...]:
        """The weights too, where the small model is cut out of them."""
        return self.access if self.small is not None else ("weights", *self.access)

    def models(self) -> tuple[str, ...]:
        """The small model, if it is one of its own."""
        return () if self.small is None else (self.small,)

    @abstractmethod
    def steered(self, bench: Bench, expert: Any, small: Any) -> Any:
        """The method, from the taught small model and the same untaught."""

    def install(self, bench: Bench) -> Answerer:
        """Teach a copy of the small model; the large one stays as it is."""
        small = self._small(bench)
        name = f"{self.layers} blocks" if self.small is None else fingerprint(self.small)
        taught = self._teacher().install(bench.beside(copy.deepcopy(small), name))
        assert isinstance(taught, Plain)
        return _Steered(bench, self.steered(bench, taught.model, small), taught)

    def _teacher(self) -> LoRA:
        return LoRA(
            rank=self.rank, alpha=2 * self.rank, lr=self.lr, epochs=self.epochs, rehearsal=self.rehearsal,
            batch_size=self.batch_size, depth=0.0,
        )  # fmt: skip

    def _small(self, bench: Bench) -> Any:
        if self.small is None:
            blocks = len(decoder_layers(bench.model))
            return prune(bench.model, layers=self.layers or max(1, blocks // 3))
        model, tokenizer = load(self.small, dtype=bench.model.dtype, device=bench.model.device)
        check_vocabularies([bench.tokenizer, tokenizer])
        return model


class ProxyTuningCarrier(_SmallExpert):
    """Proxy-tuning by a small expert.

    Args:
        alpha: Weight of the offset.
        small, layers, rank, lr, epochs, rehearsal, batch_size: The small expert, and how it is taught.
    """

    name, title, method = "proxy-tuning", "Proxy-tuning", "proxy-tuning"

    def __init__(
        self, *, alpha: float = 1.0, small: str | None = None, layers: int | None = None, rank: int = 16,
        lr: float = 2e-3, epochs: int = 12, rehearsal: float = 0.7, batch_size: int = 8,
    ):  # fmt: skip
        super().__init__(
            small=small, layers=layers, rank=rank, lr=lr, epochs=epochs, rehearsal=rehearsal,
            batch_size=batch_size,
        )  # fmt: skip
        self.alpha = alpha

    def steered(self, bench: Bench, expert: Any, small: Any) -> Any:
        """Three streams."""
        from ..steer.proxy_tuning import ProxyTuning

        return ProxyTuning(bench.model, bench.tokenizer, expert, small, alpha=self.alpha)


class FusionCarrier(_SmallExpert):
    """Dynamic logits fusion by a small expert, whose weight is found at each token."""

    name, title, method = "dynamic-logits-fusion", "Dynamic logits fusion", "dynamic-logits-fusion"
    effort = 120.0

    def steered(self, bench: Bench, expert: Any, small: Any) -> Any:
        """Three streams."""
        from ..steer.dynamic_logits_fusion import DynamicLogitsFusion

        return DynamicLogitsFusion(bench.model, bench.tokenizer, small, [expert])


class _Steered(Plain):
    """Answers of several models that decode as one."""

    def __init__(self, bench: Bench, steered: Any, taught: Plain):
        super().__init__(bench.model, bench.tokenizer, bench.prompts, taught.store)
        self.steered = steered

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        texts = [self.render(prompt) for prompt in prompts]
        answers: list[str] = self.steered.generate(texts, max_new_tokens=max_new_tokens, batch_size=24)
        return answers

    def predictions(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[torch.Tensor]:
        texts = [self.render(prompt) for prompt in prompts]
        found = self.steered.follow(texts, list(continuations), batch_size=24)
        return [followed.predictions for followed in found]

    def tokens_read(self, prompts: Sequence[str]) -> list[int]:
        return [count * self.steered.streams for count in super().tokens_read(prompts)]

    def perplexity(self, text: str) -> float:
        return perplexity(_Joined(self.steered), self.tokenizer, text)

    def save(self, folder: Path) -> None:
        """The small expert's adapter."""
        self.store(folder)


class _Joined(nn.Module):
    """Several models as one that returns the joined scores of a text."""

    def __init__(self, steered: Any):
        super().__init__()
        self.models, self.combine = nn.ModuleList(steered.models()), steered.combine
        self.eval()

    def get_output_embeddings(self) -> None:
        """None: there is no head that could be applied by itself."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        each = [model(input_ids=input_ids, **options).logits[0] for model in self.models]
        parts = zip(*(logits.split(ROWS) for logits in each), strict=True)
        return SimpleNamespace(logits=torch.cat([self.combine([z.float() for z in p]) for p in parts])[None])
