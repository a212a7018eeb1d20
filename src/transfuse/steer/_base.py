"""What every steering method holds to.

A method says which prompts its streams read and how their logits become one score per token; `core.lockstep`
does the rest. An instance is a callable that transformers takes as `custom_generate`, so that everything
`generate` prepares (processors, warpers, stopping, lengths) acts on the combined scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

__all__ = ["Steer"]


class Steer(ABC):
    """Base of the family: combine N streams into one, and be the plain model when neutral."""

    @abstractmethod
    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores for the next token.

        Args:
            logits: One `[B, V]` float32 tensor per stream.

        Returns:
            `[B, V]` float32; row b depends on rows b alone, so that batches may be cut anywhere.
        """

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
        signature to route them here), leave `attention_mask` to `model_kwargs`, and end in
        `core.lockstep.decode_prepared`.
        """
