"""Several (model, prompt) streams decoded in step: one token is chosen from all, and all of them read it.

Each stream keeps its own mask, positions and KV cache. Prompts are read stream by stream, so that a short
prompt beside a long one costs what it costs alone; after that, streams of one model share a single forward
pass per token, their caches aligned on the right. What the streams say is joined by a `combine` function, and
only then do the usual processors and warpers of transformers act.

Beams: a prompt is read once and copied to its beams. What is joined is turned into log-probabilities before
processors and length penalty see it, so that scores that are not normalised (sums and differences of logits)
are compared fairly between texts of different length.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .beams import Beams, BeamSettings, Found
from .errors import BadInput, NotApplicable
from .groups import Group, Reading
from .remote import BlackBox
from .runs import evaluating
from .streams import DRAWN_BEAMS, Stream, check_generation, checked, distinct, once, vocabulary_of

__all__ = ["Combine", "Followed", "Stream", "decode", "decode_prepared", "follow"]

Rest = ParamSpec("Rest")
Result = TypeVar("Result")

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


def _evaluated(
    function: Callable[Concatenate[Sequence[Stream], Rest], Result],
) -> Callable[Concatenate[Sequence[Stream], Rest], Result]:
    """`function` without gradients, the streams' models in evaluation mode for as long as it runs."""

    @functools.wraps(function)
    def run(streams: Sequence[Stream], *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for stream in streams:
                if not isinstance(stream.model, BlackBox):
                    stack.enter_context(evaluating(stream.model))
            return function(streams, *args, **kwargs)

    return run


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


@_evaluated
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
    num_beams: int = 1,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> Tensor:
    """Choose up to `max_new_tokens` tokens for each row of prompts.

    Per step: one forward per model, `combine` over the streams' last logits in float32, the processors (which
    see the first stream's ids as given and what was generated), then argmax or one draw from softmax. A row
    that has emitted an end token receives `pad_token_id` until all rows have ended.

    With beams, `combine` takes and gives `[B * num_beams, V]`, the beams of a row side by side; its scores go
    through log-softmax before the processors.

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
        on_tokens: Called after each step with the chosen tokens `[B]`; see `core.streaming`.
        on_scores: Called after each step with the processed scores `[B, V]`.
        use_cache: False reads the whole text again at each step: slow, for verification.
        num_beams: Above 1: beam search, deterministic.
        num_return_sequences: R, how many of a row's beams are returned.
        length_penalty: Exponent of the length that a beam's summed log-probabilities are divided by.
        early_stopping: When a row's search ends, see `core.beams.BeamSettings`.

    Returns:
        `[B, T]` int64, T <= `max_new_tokens`, the new tokens only; with beams `[B * R, T]`, best first.

    Raises:
        BadInput: no stream, unequal rows, an empty prompt, or more tokens than a model has positions; beam
            settings out of range.
        IncompatibleModels: a model that scores fewer tokens than the first stream's (more are cut off).
        NotApplicable: an encoder-decoder model, or one with PEFT's virtual tokens; beams that are drawn or streamed.
    """
    if max_new_tokens < 1:
        raise BadInput("max_new_tokens", max_new_tokens, "is not a length", "give 1 or more")
    settings = BeamSettings(num_beams, num_return_sequences, length_penalty, early_stopping)
    settings.check()
    ends = _listed(eos_token_id)
    padding = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    if num_beams > 1:
        found = _search(
            streams, combine, settings, max_new_tokens=max_new_tokens, ends=ends, padding=padding,
            processors=logits_processor, criteria=stopping_criteria, do_sample=do_sample,
            on_tokens=on_tokens, on_scores=on_scores, use_cache=use_cache,
        )  # fmt: skip
        return found.tokens
    reading = _reading(streams, max_new_tokens, use_cache=use_cache)
    sequence = streams[0].input_ids
    end_tokens = torch.tensor(ends, dtype=torch.long, device=sequence.device)
    prompt_length = sequence.shape[1]
    processors = LogitsProcessorList() if logits_processor is None else logits_processor
    unfinished = torch.ones_like(sequence[:, 0], dtype=torch.bool)
    while True:
        scores = processors(sequence, combine(reading.logits))
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
        reading.advance(tokens, live=unfinished)


def _listed(tokens: int | Sequence[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def _reading(streams: Sequence[Stream], new_tokens: int, *, beams: int = 1, use_cache: bool) -> Reading:
    """The streams, once checked, with their prompts read; rows that repeat are read once."""
    read, copies = distinct(checked(streams, new_tokens))
    device, width = streams[0].input_ids.device, vocabulary_of(streams[0].model)
    return Reading(read, width=width, device=device, copies=copies * beams, use_cache=use_cache)


@_evaluated
def _search(
    streams: Sequence[Stream],
    combine: Combine,
    settings: BeamSettings,
    *,
    max_new_tokens: int,
    ends: list[int],
    padding: int,
    processors: LogitsProcessorList | None,
    criteria: StoppingCriteriaList | None,
    do_sample: bool,
    on_tokens: Any,
    on_scores: Callable[[Tensor], Any] | None,
    use_cache: bool,
) -> Found:
    """`decode` with beams."""
    if do_sample:
        raise NotApplicable("do_sample", True, *DRAWN_BEAMS)
    if on_tokens is not None:
        raise NotApplicable(
            "on_tokens",
            "set",
            "cannot follow beams: which text wins shows at the end",
            "decode without beams",
        )
    reading = _reading(streams, max_new_tokens, beams=settings.size, use_cache=use_cache)
    prompts = streams[0].input_ids
    beams = Beams(prompts, settings, limit=max_new_tokens, ends=len(ends), padding=padding)
    end_tokens = torch.tensor(ends, dtype=torch.long, device=prompts.device)
    while True:
        scores = combine(reading.logits).log_softmax(-1)
        scores = scores if processors is None else processors(beams.texts, scores)
        if on_scores is not None:
            on_scores(scores)

        def stops(texts: Tensor, scores: Tensor = scores) -> Tensor:
            stopped = torch.isin(texts[:, -1], end_tokens)
            if criteria:
                stopped = stopped | criteria(texts, (scores,))
            return stopped | (texts.shape[1] - prompts.shape[1] >= max_new_tokens)

        tokens, rows = beams.advance(scores, stops)
        if beams.over:
            return beams.found()
        reading.advance(tokens, rows, live=beams.live)


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
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """`decode` for a `custom_generate` callable: takes what transformers' `generate` prepared and hands over.

    transformers repeats each prompt for `num_return_sequences` or for its beams before it calls; the other
    streams are to be repeated as often: `stream.repeated(copies(config))`. `combine` gets all those rows, so
    that settings kept per row fit. What it records per step is in the order of the rows of that step: with
    beams, `beam_indices` of the output says which row each returned token came from.

    Args:
        streams: The first holds the ids and mask given to the callable; the others as many rows.
        combine: As for `decode`.
        logits_processor: As prepared.
        stopping_criteria: As prepared; end tokens and the length limit are among them.
        config: The generation configuration in force.
        model_kwargs: What else was prepared for the first stream alone; it is not used, only checked.
        generator: As for `decode`.
        on_tokens: As for `decode`. (transformers does not pass its `streamer` on to such callables:
            `core.streaming.RowStreamers` does the same.)

    Returns:
        `[B, T]` prompts and new tokens, or the usual output object if the configuration asks for it.

    Raises:
        NotApplicable: beams that are drawn, assisted decoding, a cache or other input of the first stream alone.
        BadInput, IncompatibleModels: as `decode`; with beams also streams that are not so repeated.
    """
    check_generation(config)
    for name, value in model_kwargs.items():
        filled = name == "past_key_values" and value is not None and value.get_seq_length() > 0
        if filled or (isinstance(value, Tensor) and name not in ("attention_mask", "position_ids")):
            raise NotApplicable(
                name, type(value).__name__, "belongs to one stream", "give each stream its token ids and mask"
            )
    prompt, scores = streams[0].input_ids, list[Tensor]()
    limit = config.max_length - prompt.shape[1]
    padding = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
    ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()
    on_scores = scores.append if config.output_scores else None
    use_cache = config.use_cache is not False
    if (config.num_beams or 1) == 1:
        tokens = decode(
            streams, combine, max_new_tokens=limit, eos_token_id=ends, pad_token_id=padding,
            logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            do_sample=bool(config.do_sample), generator=generator, on_tokens=on_tokens, on_scores=on_scores,
            use_cache=use_cache,
        )  # fmt: skip
        sequences = torch.cat([prompt, tokens], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(scores) or None)
    settings = BeamSettings(
        config.num_beams, config.num_return_sequences, config.length_penalty, config.early_stopping
    )
    settings.check()
    # transformers' search takes a padding token 0 for none and pads with the first end token: so does this.
    found = _search(
        once(streams, config.num_beams), combine, settings, max_new_tokens=limit, ends=ends,
        padding=padding or (ends[0] if ends else 0), processors=logits_processor, criteria=stopping_criteria,
        do_sample=False, on_tokens=on_tokens, on_scores=on_scores, use_cache=use_cache,
    )  # fmt: skip
    prompts = prompt[:: config.num_beams].repeat_interleave(config.num_return_sequences, dim=0)
    sequences = torch.cat([prompts, found.tokens], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=found.scores if config.output_scores else None,
        scores=tuple(scores) or None,
        beam_indices=found.rows,
    )


@_evaluated
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
        group = Group(stream, use_cache=False)
        group.append(forced[:, :-1])
        kept.append(group.forward(steps)[..., : vocabulary_of(streams[0].model)].to(device))
    predictions, logprobs = [], []
    for t in range(steps):
        sequence = torch.cat([streams[0].input_ids, forced[:, :t]], dim=1)
        scores = processors(sequence, combine([logits[:, t].float() for logits in kept]))
        predictions.append(scores.argmax(-1))
        logprobs.append(scores.log_softmax(-1).gather(1, forced[:, t : t + 1])[:, 0])
    return Followed(torch.stack(predictions, 1), torch.stack(logprobs, 1))
