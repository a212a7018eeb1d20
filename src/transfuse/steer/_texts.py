"""From texts to streams and back: prompts with and without context, batches, answers with their traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfuse.core import lockstep
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.generate import encode_pair, pad_batch, pad_id_of, plain_generation
from transfuse.core.streams import Stream

__all__ = ["Prompts", "Steered", "answer", "batches", "paired", "predict"]

_NOT_TEXT = {"assistant_model", "num_return_sequences", "return_dict_in_generate", "streamer"}

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt with context and of the same prompt without."""

Sides = list[tuple[Tensor, Tensor]]
"""Padded ids and masks `[B, T]` of each prompt that is read in its own rendering."""


class Steered(NamedTuple):
    """An answer with what the method recorded at each of its tokens.

    Attributes:
        text: The answer.
        tokens: `[T]` int64, the end token included where there is one.
        trace: Per recorded quantity `[T]`, in the method's order.
    """

    text: str
    tokens: Tensor
    trace: tuple[Tensor, ...]


class Prompts:
    """Writes a query down with its context and without, everything else being equal.

    Args:
        tokenizer: Of the model that reads them.
        template: Format string with `{context}` and `{query}`; without context the query stands alone.
        chat: Whether the text goes into the tokenizer's chat template.
        system: System message of the chat, in both prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, chat: bool, system: str | None):
        self.tokenizer, self.template, self.chat, self.system = tokenizer, template, chat, system

    def check(self) -> None:
        """Refuse what cannot be written down.

        Raises:
            BadInput: a template without its fields, a chat without a chat template, a system message outside.
        """
        for field in ("{context}", "{query}"):
            if field not in self.template:
                raise BadInput("prompt", self.template, f"lacks {field}", "name both fields in it")
        try:
            self.template.format(context="", query="")
        except (LookupError, ValueError):
            remedy = "write {{ and }} for braces that are text"
            raise BadInput("prompt", self.template, "has further fields or braces", remedy) from None
        if self.chat and not self.tokenizer.chat_template:
            raise BadInput("chat", True, "needs a chat template", "use chat=False with this tokenizer")
        if self.system is not None and not self.chat:
            raise BadInput("system", self.system, "belongs to a chat", "set chat=True or leave it out")

    def text(self, query: str, context: str) -> str:
        """The prompt as text."""
        text = self.template.format(context=context, query=query) if context.strip() else query
        if not self.chat:
            return text
        messages = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, query: str, context: str) -> Pair:
        """Token ids with context and without."""
        return self._ids(self.text(query, context)), self._ids(self.text(query, ""))

    def encode_target(self, query: str, context: str, target: str) -> tuple[Pair, list[int]]:
        """As `encode`, and the ids of a continuation: the same for both prompts.

        Raises:
            BadInput: the continuation is empty.
        """
        if not self.chat:
            alone, ids = encode_pair(self.tokenizer, query, target)
            return (encode_pair(self.tokenizer, self.text(query, context), target)[0], alone), ids
        if not target.strip():
            raise BadInput("continuations", target, "is empty", "give the text that should follow")
        return self.encode(query, context), self._ids(target.strip())

    def _ids(self, text: str) -> list[int]:
        # A chat template has written the special tokens already.
        return list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])


def paired(queries: str | Sequence[str], name: str, others: str | Sequence[str]) -> list[tuple[str, str]]:
    """Queries beside as many other texts.

    Raises:
        BadInput: naming `name`, when they do not pair.
    """
    if isinstance(queries, str) and isinstance(others, str):
        return [(queries, others)]
    if isinstance(queries, str) or isinstance(others, str) or len(queries) != len(others):
        raise BadInput(
            name, others, "does not pair with queries", "give two texts, or two lists of equal length"
        )
    if not queries:
        raise BadInput("queries", queries, "is empty", "give at least one query")
    return list(zip(queries, others))


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size`, like lengths together."""
    if size < 1:
        raise BadInput("batch_size", size, "holds no row", "give 1 or more")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _sides(rows: Sequence[Sequence[list[int]]], pad: int, device: torch.device) -> Sides:
    return [pad_batch(ids, pad, side="left", device=device) for ids in zip(*rows)]


def answer(
    method: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[list[int]]],
    *,
    extra: Sequence[str] = (),
    batch_size: int,
    **generation: Any,
) -> list[Steered]:
    """Decode prompts with `model.generate(..., custom_generate=method)`.

    Args:
        method: Takes a list `trace`, to which it appends a tuple of tensors `[B, ...]` per step, and for each
            name in `extra` the keywords `<name>_input_ids` and `<name>_attention_mask`.
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Per query the token ids `model` reads, then those of each further rendering.
        extra: Names of the further renderings.
        batch_size: Prompts decoded together.
        **generation: For `generate`. Without any, decoding is greedy: of the model's `generation_config` only the
            end-of-text tokens count.

    Raises:
        NotApplicable: an option that does not give one text per prompt.
    """
    if refused := _NOT_TEXT & generation.keys():
        name = min(refused)
        raise NotApplicable(
            name,
            generation[name],
            "does not give one text per query",
            "use model.generate(custom_generate=...)",
        )
    options = {"top_k": 0, **generation} if generation.get("do_sample") else generation
    pad = options.get("pad_token_id", pad_id_of(tokenizer))
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    end_ids = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
    answers: dict[int, Steered] = {}
    for rows in batches([len(ids[0]) for ids in prompts], batch_size):
        (ids, mask), *others = _sides([prompts[i] for i in rows], pad_id_of(tokenizer), model.device)
        trace: list[tuple[Tensor, ...]] = []
        further: dict[str, Tensor] = {}
        for name, (other_ids, other_mask) in zip(extra, others, strict=True):
            further |= {f"{name}_input_ids": other_ids, f"{name}_attention_mask": other_mask}
        with plain_generation(model, pad=pad, ends=end_ids.tolist()):
            made = model.generate(
                input_ids=ids, attention_mask=mask, custom_generate=method, trace=trace,
                return_dict_in_generate=True, **further, **options,
            )  # fmt: skip
        output = getattr(made, "sequences", made)
        recorded = [torch.stack(steps, dim=1).cpu() for steps in zip(*trace)]
        if (origin := getattr(made, "beam_indices", None)) is not None:
            # Beams change places: a token's record is in the row that its beam had at that step.
            steps = torch.arange(origin.shape[1])
            recorded = [r[origin.cpu().clamp_min(0), steps] for r in recorded]
        for row, i in enumerate(rows):
            tokens = output[row, ids.shape[1] :].cpu()
            ended = torch.isin(tokens, end_ids).nonzero()
            tokens = tokens[: int(ended[0]) + 1] if len(ended) else tokens  # after its end a row is padding
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            answers[i] = Steered(text.lstrip(" "), tokens, tuple(r[row, : len(tokens)] for r in recorded))
    return [answers[i] for i in range(len(prompts))]


def predict(
    reader: Callable[[Sides], tuple[list[Stream], lockstep.Combine]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[list[int]]],
    targets: Sequence[list[int]],
    *,
    device: torch.device,
    batch_size: int,
) -> list[lockstep.Followed]:
    """What the streams say about given continuations (teacher forcing), each `[T]` for its target.

    Args:
        reader: From a batch's padded prompts to its streams and their combination.
        tokenizer: For padding.
        prompts: Per query the token ids of each rendering.
        targets: Per query the ids of the continuation.
        device: Where the prompts are put.
        batch_size: Prompts read together.
    """
    found: dict[int, lockstep.Followed] = {}
    pad = pad_id_of(tokenizer)
    for rows in batches([len(ids[0]) for ids in prompts], batch_size):
        streams, combine = reader(_sides([prompts[i] for i in rows], pad, device))
        forced, _ = pad_batch([targets[i] for i in rows], pad)
        followed = lockstep.follow(streams, combine, forced)
        for row, i in enumerate(rows):
            n = len(targets[i])
            found[i] = lockstep.Followed(
                followed.predictions[row, :n].cpu(), followed.logprobs[row, :n].cpu()
            )
    return [found[i] for i in range(len(prompts))]
