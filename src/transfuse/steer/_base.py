"""What every steering method holds to.

An instance is a callable that transformers takes as `custom_generate`, so that everything `generate` prepares
(processors, warpers, stopping, lengths) acts on the steered scores. A method that joins streams says which
prompts they read and how their logits become one score per token; `core.lockstep` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

__all__ = ["Combining", "Steer"]


class Steer(ABC):
    """Base of the family: a way to decode that is the plain model's when neutral."""

    @abstractmethod
    def neutral(self) -> Steer:
        """A copy set so that it changes nothing: greedy output equals that of the first stream alone."""

    @abstractmethod
    def generate(self, *inputs: Any, **options: Any) -> Any:
        """Answers to texts, batched; `options` are those of transformers' `generate`."""

    @abstractmethod
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop behind `model.generate(..., custom_generate=self)`.

        Implementations name what their other streams need as keywords of their own (transformers reads the
        signature to route them here) and leave `attention_mask` to `model_kwargs`.
        """


class Combining(Steer):
    """A method that joins N streams; its `__call__` ends in `core.lockstep.decode_prepared`.

    Attributes:
        streams: N, how many `combine` takes.
    """

    streams: int

    @abstractmethod
    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores for the next token.

        Args:
            logits: One `[B, V]` float32 tensor per stream.

        Returns:
            `[B, V]` float32; row b depends on rows b alone, so that batches may be cut anywhere.
        """
