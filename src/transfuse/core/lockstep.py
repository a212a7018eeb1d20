"""Several (model, prompt) streams decoded in step: one token is chosen from all, and all of them read it.

Each stream keeps its own mask, positions and KV cache. Prompts are read stream by stream, so that a short
prompt beside a long one costs what it costs alone; after that, streams of one model share a single forward
pass per token, their caches aligned on the right. What the streams say is joined by a `combine` function, and
only then do the usual processors and warpers of transformers act.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from .errors import BadInput, NotApplicable
from .streams import Stream, check_generation, checked, vocabulary_of

__all__ = ["Combine", "Followed", "Stream", "decode", "decode_prepared", "follow"]

Combine = Callable[[list[Tensor]], Tensor]
"""One `[B, V]` float32 tensor of next-token logits per stream -> scores `[B, V]`, row by row."""


class Followed(NamedTuple):
    """What the combined streams say about tokens that were given to them.

    Attributes:
        predictions: `[B, T]` int64, the highest-scoring token at each position.
        logprobs: `[B, T]` float32, natural log-probability of the given token under softmax of the scores.
    """

    predictions: Tensor
    logprobs: Tensor


def _accepts(model: PreTrainedModel, name: str) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


class _Group:
    """Streams of one model that share a forward pass: rows of stream 0, then of stream 1, ..."""

    def __init__(self, stream: Stream, use_cache: bool):
        self.model, self.ids, mask = stream
        self.mask: Tensor = torch.ones_like(self.ids) if mask is None else mask
        self.members, self.use_cache = 1, use_cache
        self.cache: Any = None
        self.padded = not bool(self.mask.all())
        self.takes_positions = _accepts(self.model, "position_ids")
        self.takes_keep = _accepts(self.model, "logits_to_keep")

    def forward(self, keep: int = 1) -> Tensor:
        """Logits `[rows, keep, V]` of the last `keep` positions, reading only what is not in the cache."""
        done = 0 if self.cache is None else self.ids.shape[1] - 1
        kwargs: dict[str, Any] = {"use_cache": self.use_cache}
        if self.takes_positions:
            kwargs["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, done:]
        if self.takes_keep:
            kwargs["logits_to_keep"] = keep
        if self.cache is not None:
            kwargs["past_key_values"] = self.cache
        # Without padding no mask is given, as in transformers' own loop: the plain causal kernels are faster.
        mask = self.mask if self.padded else None
        output = self.model(input_ids=self.ids[:, done:], attention_mask=mask, **kwargs)
        self.cache = getattr(output, "past_key_values", None) if self.use_cache else None
        return output.logits[:, -keep:]

    def append(self, tokens: Tensor) -> None:
        """Give every stream of the group the tokens `[B]` or `[B, T]` that were chosen."""
        tokens = tokens if tokens.dim() == 2 else tokens[:, None]
        tokens = tokens.to(self.ids.device).repeat(self.members, 1)
        self.ids = torch.cat([self.ids, tokens], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)

    def absorb(self, other: _Group) -> bool:
        """Take the streams of `other` into this group, padding the shorter cache on the left.

        Done where it saves time: reading the padding of the cache at every token must cost no more memory
        traffic than reading the weights a second time. Only caches of plain and sliding-window attention can
        be aligned.
        """
        if self.model is not other.model or self.ids.device != other.ids.device:
            return False
        if self.use_cache:
            pairs = _layer_pairs(self.cache, other.cache)
            if pairs is None or _padding_bytes(pairs) > _weight_bytes(self.model):
                return False
            length = max(self.ids.shape[1], other.ids.shape[1])
            for ours, theirs in pairs:
                ours.keys = _stack(ours.keys, theirs.keys, dim=-2)
                ours.values = _stack(ours.values, theirs.values, dim=-2)
                if ours.is_sliding:
                    ours.cumulative_length = length
        self.padded |= other.padded or self.ids.shape[1] != other.ids.shape[1]
        self.ids = _stack(self.ids, other.ids, dim=-1)
        self.mask = _stack(self.mask, other.mask, dim=-1)
        self.members += other.members
        return True


def _stack(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Rows of both, zeros put before the shorter of the two along `dim` (negative)."""
    width = max(first.shape[dim], second.shape[dim])
    behind = [0, 0] * (-1 - dim)
    padded = [torch.nn.functional.pad(t, [*behind, width - t.shape[dim], 0]) for t in (first, second)]
    return torch.cat(padded)


def _layer_pairs(first: Any, second: Any) -> list[tuple[Any, Any]] | None:
    """Matching cache layers, or None where their kind is not one that padding on the left leaves right."""
    if not (isinstance(first, Cache) and isinstance(second, Cache)) or len(first.layers) != len(
        second.layers
    ):
        return None
    pairs = list(zip(first.layers, second.layers))
    for ours, theirs in pairs:
        if type(ours) is not type(theirs) or type(ours) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return None
        if not (ours.is_initialized and theirs.is_initialized):
            return None
    return pairs


def _padding_bytes(pairs: list[tuple[Any, Any]]) -> int:
    total = 0
    for layers in pairs:
        width = max(layer.keys.shape[-2] for layer in layers)
        for layer in layers:
            missing = width - layer.keys.shape[-2]
            for stored in (layer.keys, layer.values):
                total += missing * stored[..., 0, :].numel() * stored.element_size()
    return total


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _grouped(groups: list[_Group]) -> list[tuple[_Group, list[int]]]:
    """Join the groups that may share a forward pass; each with the numbers of its streams."""
    joined: list[tuple[_Group, list[int]]] = []
    for n, group in enumerate(groups):
        for host, members in joined:
            if host.absorb(group):
                members.append(n)
                break
        else:
            joined.append((group, [n]))
    return joined


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def decode(
    streams: Sequence[Stream],
    combine: Combine,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], Any] | None = None,
    on_scores: Callable[[Tensor], Any] | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Choose up to `max_new_tokens` tokens for each row of prompts.

    Per step: one forward per model, `combine` over the streams' last logits in float32, the processors (which
    see the first stream's ids as given and what was generated), then argmax or one draw from softmax. A row
    that has emitted an end token receives `pad_token_id` until all rows have ended.

    Args:
        streams: B prompts each; the first one is what the processors see. Models may differ.
        combine: `[B, V]` float32 logits of each stream to scores `[B, V]`.
        max_new_tokens: At least 1.
        eos_token_id: Tokens that end a row; none: rows end by length or by `stopping_criteria`.
        pad_token_id: What ended rows receive; by default the first end token, or 0.
        logits_processor: Processors and warpers, run after the combination.
        stopping_criteria: Further criteria, called with the first stream's ids and the step's scores.
        do_sample: Draw instead of taking the best.
        generator: Source of the draws, on the first stream's device; None: the global one.
        on_tokens: Called after each step with the chosen tokens `[B]` (streaming).
        on_scores: Called after each step with the processed scores `[B, V]`.
        use_cache: False reads the whole text again at each step: slow, for verification.

    Returns:
        `[B, T]` int64, T <= `max_new_tokens`, the new tokens only.

    Raises:
        BadInput: no stream, unequal rows, an empty prompt, or more tokens than a model has positions.
        IncompatibleModels: a model that scores fewer tokens than the first stream's (more are cut off).
        NotApplicable: an encoder-decoder model.
    """
    if max_new_tokens < 1:
        raise BadInput("max_new_tokens", max_new_tokens, "is not a length", "give 1 or more")
    device = streams[0].input_ids.device if streams else None
    groups = [_Group(stream, use_cache) for stream in checked(streams, max_new_tokens)]
    ends = (
        []
        if eos_token_id is None
        else [eos_token_id]
        if isinstance(eos_token_id, int)
        else list(eos_token_id)
    )
    end_tokens = torch.tensor(ends, dtype=torch.long, device=device)
    padding = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    processors = LogitsProcessorList() if logits_processor is None else logits_processor
    sequence = streams[0].input_ids
    prompt_length, unfinished = sequence.shape[1], torch.ones_like(sequence[:, 0], dtype=torch.bool)

    width = vocabulary_of(streams[0].model)

    def last(group: _Group) -> Tensor:
        return group.forward()[:, -1, :width]

    logits = [last(group).to(device, torch.float32, copy=True) for group in groups]
    joined = _grouped(groups)
    while True:
        scores = processors(sequence, combine(logits))
        tokens = _drawn(scores, generator) if do_sample else scores.argmax(-1)
        tokens = torch.where(unfinished, tokens, padding)
        sequence = torch.cat([sequence, tokens[:, None]], dim=1)
        if on_tokens is not None:
            on_tokens(tokens)
        if on_scores is not None:
            on_scores(scores)
        unfinished = unfinished & ~torch.isin(tokens, end_tokens)
        if stopping_criteria:
            unfinished = unfinished & ~stopping_criteria(sequence, (scores,))
        if sequence.shape[1] - prompt_length >= max_new_tokens or not bool(unfinished.any()):
            return sequence[:, prompt_length:]
        for group, members in joined:
            group.append(tokens)
            parts = last(group).to(device, torch.float32).chunk(len(members))
            for n, part in zip(members, parts):
                logits[n] = part


def decode_prepared(
    streams: Sequence[Stream],
    combine: Combine,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], Any] | None = None,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`decode` for a `custom_generate` callable: takes what transformers' `generate` prepared and hands over.

    Args:
        streams: The first holds the ids and mask given to the callable; the others as many rows.
        combine: As for `decode`.
        logits_processor: As prepared.
        stopping_criteria: As prepared; end tokens and the length limit are among them.
        config: The generation configuration in force.
        model_kwargs: What else was prepared for the first stream alone; it is not used, only checked.
        generator: As for `decode`.
        on_tokens: As for `decode`. (transformers does not pass its `streamer` on to such callables:
            `on_tokens=streamer.put` does the same.)

    Returns:
        `[B, T]` prompts and new tokens, or the usual output object if the configuration asks for it.

    Raises:
        NotApplicable: beams, assisted decoding, a cache or other input of the first stream alone.
        BadInput, IncompatibleModels: as `decode`.
    """
    check_generation(config)
    for name, value in model_kwargs.items():
        filled = name == "past_key_values" and value is not None and value.get_seq_length() > 0
        if filled or (isinstance(value, Tensor) and name not in ("attention_mask", "position_ids")):
            raise NotApplicable(
                name, type(value).__name__, "belongs to one stream", "give each stream its token ids and mask"
            )
    prompt = streams[0].input_ids
    scores: list[Tensor] = []
    tokens = decode(
        streams,
        combine,
        max_new_tokens=config.max_length - prompt.shape[1],
        pad_token_id=None if config._pad_token_tensor is None else int(config._pad_token_tensor),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        do_sample=bool(config.do_sample),
        generator=generator,
        on_tokens=on_tokens,
        on_scores=scores.append if config.output_scores else None,
        use_cache=config.use_cache is not False,
    )
    sequences = torch.cat([prompt, tokens], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(scores) or None)


@torch.no_grad()
def follow(
    streams: Sequence[Stream],
    combine: Combine,
    forced: Tensor,
    *,
    logits_processor: LogitsProcessorList | None = None,
) -> Followed:
    """Score given tokens as if they had been generated (teacher forcing), in one forward pass per stream.

    Rows of unequal length are padded on the right with any token: causal attention keeps what comes later out
    of what comes before, so only the padded positions of the result are without meaning.

    Args:
        streams: As for `decode`.
        combine: As for `decode`; called once per position.
        forced: `[B, T]` int64 continuations, T >= 1.
        logits_processor: Run after the combination, as in `decode`.

    Raises:
        BadInput, IncompatibleModels, NotApplicable: as `decode`; also for `forced` of another batch size.
    """
    if (
        forced.dim() != 2
        or forced.shape[1] == 0
        or (streams and forced.shape[0] != streams[0].input_ids.shape[0])
    ):
        raise BadInput(
            "forced",
            tuple(forced.shape),
            "does not continue the prompts",
            "give ids [B, T], T >= 1, one row per prompt",
        )
    device, steps = streams[0].input_ids.device if streams else None, forced.shape[1]
    forced = forced.to(device)
    processors = LogitsProcessorList() if logits_processor is None else logits_processor
    kept: list[Tensor] = []
    for stream in checked(streams, steps):
        group = _Group(stream, use_cache=False)
        group.append(forced[:, :-1])
        kept.append(group.forward(steps)[..., : vocabulary_of(streams[0].model)].to(device))
    predictions, logprobs = [], []
    for t in range(steps):
        sequence = torch.cat([streams[0].input_ids, forced[:, :t]], dim=1)
        scores = processors(sequence, combine([logits[:, t].float() for logits in kept]))
        predictions.append(scores.argmax(-1))
        logprobs.append(scores.log_softmax(-1).gather(1, forced[:, t : t + 1])[:, 0])
    return Followed(torch.stack(predictions, 1), torch.stack(logprobs, 1))
