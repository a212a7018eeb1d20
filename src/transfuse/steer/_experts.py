"""Small experts beside a large model: how they are given and asked, and the decoding that reads them all."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from transfuse.core import lockstep
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.models import Loaded, load
from transfuse.core.streams import Stream, check_vocabularies, copies
from transfuse.steer._base import Combining
from transfuse.steer._texts import Prompts, Sides, Steered, answer, paired, predict

__all__ = ["Model", "WithExperts", "cropped"]

Model: TypeAlias = PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike[str]
"""A model (its tokenizer is then taken to be the large model's), one with its tokenizer, or what
`transfuse.load` takes."""

Details = bool | Literal["logits"]


def cropped(base: Tensor, **others: Tensor) -> list[Tensor]:
    """The other models' logits cut to the tokens that `base` scores, in its dtype and at least float32.

    Args:
        base: `[..., V]`.
        **others: `[..., V or more]` under their names in messages.

    Raises:
        IncompatibleModels: fewer than V tokens.
        BadInput: other rows.
    """
    dtype, width = torch.promote_types(base.dtype, torch.float32), base.shape[-1]
    for name, logits in others.items():
        if logits.shape[-1] < width:
            raise IncompatibleModels(
                name,
                tuple(logits.shape),
                f"scores fewer than the {width} tokens of base",
                "use models that share one vocabulary; only the large one may have the fewer tokens",
            )
        if logits.shape[:-1] != base.shape[:-1]:
            raise BadInput(
                name, tuple(logits.shape), f"does not go with base {tuple(base.shape)}", "give the same rows"
            )
    return [base.to(dtype), *(logits[..., :width].to(base.device, dtype) for logits in others.values())]


class WithExperts(Combining):
    """A method whose first stream is a large model and whose others are small models.

    As `model.generate(**inputs, custom_generate=method)` it takes `expert_input_ids` and
    `expert_attention_mask`, `[B, S]` prompts in the experts' own rendering; without them all read alike.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: str
    chat: bool
    system: str | None
    expert_template: str | None
    _ready: dict[str, tuple[Model, Loaded]]  # as given, and ready; shared by copies: nothing is loaded twice

    @abstractmethod
    def _check(self) -> None:
        """Refuse settings that cannot be used."""

    @abstractmethod
    def _others(self) -> list[tuple[str, Model, bool]]:
        """The models after the first: name of the argument, model as given, whether it has its own prompt."""

    def _step(self, logits: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scores `[B, V]`, and what is noted about the step, `[B, ...]` each."""
        return self.combine(logits), ()

    def generate(
        self,
        queries: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        details: Details = False,
        **generation: Any,
    ) -> str | Steered | list[str] | list[Steered]:
        """Answer each query.

        Args:
            queries: One text or several.
            max_new_tokens: Per answer.
            batch_size: Queries decoded together.
            details: Return `Steered` in place of text. Its trace begins with `[T]`, by how much the method
                changed the probability of each token that was chosen: combined minus the large model alone,
                before processors and warpers. What the method notes itself follows; with "logits" the float32
                logits `[T, V]` of every stream come last, in the order in which `combine` takes them.
            **generation: For `__call__` (`generator`, `on_tokens`) or transformers' `generate`; greedy by default.

        Returns:
            One answer for one query given as text, else a list in the order given.

        Raises:
            BadInput: no query, an argument out of range, a prompt too long for one of the models.
            IncompatibleModels: vocabularies that differ.
            NotApplicable: details of beams; whatever needs a single stream.
        """
        renderings = self._renderings()
        texts = [query for query, _ in paired(queries, "queries", queries)]
        rows = [[prompts.encode(_asked(t, q), "")[1] for t, prompts in renderings] for q in texts]
        answers = answer(
            self, self.model, self.tokenizer, rows, extra=["expert"][: len(renderings) - 1],
            batch_size=batch_size, max_new_tokens=max_new_tokens, details=details, **generation,
        )  # fmt: skip
        results = answers if details else [a.text for a in answers]
        return results[0] if isinstance(queries, str) else results

    def follow(
        self, queries: str | Sequence[str], continuations: str | Sequence[str], *, batch_size: int = 16
    ) -> list[lockstep.Followed]:
        """What the combination says about given continuations (teacher forcing).

        Args:
            queries: One text or several.
            continuations: As many; in plain text a space is put before them.
            batch_size: Queries read together.

        Returns:
            Per query the best token and the log-probability in nats of the given one, `[T]` each, T being the
            tokens of the continuation.

        Raises:
            BadInput: lists that do not pair, an empty continuation, an argument out of range, a long prompt.
            IncompatibleModels: vocabularies that differ.
        """
        renderings, rows, targets = self._renderings(), [], []
        for query, target in paired(queries, "continuations", continuations):
            read = [prompts.encode_target(_asked(t, query), "", target) for t, prompts in renderings]
            rows.append([pair[1] for pair, _ in read])
            targets.append(read[0][1])
        return predict(
            self._read, self.tokenizer, rows, targets, device=self.model.device, batch_size=batch_size
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[Tensor], Any] | None = None,
        trace: list[tuple[Tensor, ...]] | None = None,
        details: Details = False,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared.

        Args:
            model: The model that generates.
            input_ids: `[B, T]` prompts, as prepared.
            logits_processor: As prepared.
            stopping_criteria: As prepared.
            generation_config: As prepared.
            expert_input_ids: `[B, S]` prompts of the experts; None where they read what the large model reads.
            expert_attention_mask: `[B, S]`; None where nothing is padded.
            generator: Source of draws when sampling.
            on_tokens: Called with the new tokens `[B]` of each step.
            trace: Receives of each step what `details` asks for.
            details: See `generate`.
            **model_kwargs: As prepared.
        """
        self._check()
        if details not in (False, True, "logits"):
            raise BadInput("details", details, "is unknown", 'use False, True or "logits"')
        if details and generation_config.num_beams > 1:
            raise NotApplicable(
                "details", details, "are not kept of beams: which text wins shows at the end",
                "decode without beams, or score the answer with follow",
            )  # fmt: skip
        read = Stream(model, input_ids, model_kwargs.get("attention_mask"))
        own = read
        if expert_input_ids is not None:
            own = Stream(model, expert_input_ids, expert_attention_mask)
            own = own.repeated(copies(generation_config))
        combine: lockstep.Combine = self.combine
        if trace is not None and details:
            combine, on_tokens = self._traced(trace, details == "logits", on_tokens)
        return lockstep.decode_prepared(
            self._streams(read, own), combine, logits_processor, stopping_criteria, generation_config,
            model_kwargs, generator=generator, on_tokens=on_tokens,
        )  # fmt: skip

    def models(self) -> list[PreTrainedModel]:
        """The models of all streams, in the order in which `combine` takes their logits."""
        return [self.model, *(small.model for small in self._loaded())]

    def _traced(
        self, trace: list[tuple[Tensor, ...]], keep: bool, on_tokens: Callable[[Tensor], Any] | None
    ) -> tuple[lockstep.Combine, Callable[[Tensor], Any]]:
        """`combine` and `on_tokens` that between them note each step: a token is known only once chosen."""
        now: list[Tensor] = []
        noted: list[Tensor] = []

        def combine(logits: list[Tensor]) -> Tensor:
            scores, notes = self._step(logits)
            now[:] = [scores.softmax(-1), logits[0].softmax(-1)]
            noted[:] = [*notes, *(logits if keep else ())]
            return scores

        def told(tokens: Tensor) -> None:
            combined, plain = (p.gather(1, tokens[:, None])[:, 0] for p in now)
            trace.append((combined - plain, *noted))
            if on_tokens is not None:
                on_tokens(tokens)

        return combine, told

    def _loaded(self) -> list[Loaded]:
        """The models after the first with their tokenizers, loaded where they were given by name."""
        found = []
        for name, given, _ in self._others():
            if name not in self._ready or self._ready[name][0] is not given:
                if isinstance(given, (str, os.PathLike)):
                    ready = load(given, dtype=self.model.dtype, device=self.model.device)
                else:
                    ready = Loaded(*given) if isinstance(given, tuple) else Loaded(given, self.tokenizer)
                self._ready[name] = given, ready
            found.append(self._ready[name][1])
        tokenizers = [each.tokenizer for each in found if each.tokenizer is not self.tokenizer]
        check_vocabularies([self.tokenizer, *tokenizers])
        return found

    def _renderings(self) -> list[tuple[str, Prompts]]:
        """How queries are written down, for the large model and, if they differ, for the experts; checked."""
        self._check()
        renderings = [(self.prompt, Prompts(self.tokenizer, "{context}{query}", self.chat, self.system))]
        small = next(
            small for small, (_, _, own) in zip(self._loaded(), self._others(), strict=True) if own
        ).tokenizer
        if self.expert_template == "chat":
            renderings.append(("{query}", Prompts(small, "{context}{query}", True, None)))
        elif self.expert_template is not None:
            renderings.append((self.expert_template, Prompts(small, "{context}{query}", False, None)))
        for name, (template, prompts) in zip(("prompt", "expert_template"), renderings):
            if "{query}" not in template:
                remedy = "name the field in it" + (' or say "chat"' if name == "expert_template" else "")
                raise BadInput(name, template, "lacks {query}", remedy)
            prompts.check()
        return renderings

    def _streams(self, read: Stream, own: Stream) -> list[Stream]:
        given = zip(self._loaded(), self._others(), strict=True)
        return [
            read,
            *((own if apart else read)._replace(model=small.model) for small, (_, _, apart) in given),
        ]

    def _read(self, sides: Sides) -> tuple[list[Stream], lockstep.Combine]:
        read, own = (Stream(self.model, *side) for side in (sides[0], sides[-1]))
        return self._streams(read, own), self.combine


def _asked(template: str, query: str) -> str:
    # Not `format`: other braces in a template (queries, code) are its own.
    return template.replace("{query}", query)
