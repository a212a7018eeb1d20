"""Streams for decoding in step: what a stream is, and every check of one before any model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from .errors import BadInput, IncompatibleModels, NotApplicable
from .remote import BlackBox

__all__ = [
    "Stream",
    "check_generation",
    "check_vocabularies",
    "checked",
    "copies",
    "distinct",
    "once",
    "unpadded",
    "vocabulary_of",
]

DRAWN_BEAMS = (
    "with beams draws texts that are neither the likeliest nor fair samples",
    "sample without beams, or search without sampling",
)


class Stream(NamedTuple):
    """One model reading one batch of prompts.

    Attributes:
        model: A decoder-only language model, or one behind a server.
        input_ids: `[B, T]` int64, padded on either side.
        attention_mask: `[B, T]`, 1 on tokens and 0 on padding; None where nothing is padded.
    """

    model: PreTrainedModel | BlackBox
    input_ids: Tensor
    attention_mask: Tensor | None = None

    def repeated(self, copies: int) -> Stream:
        """Each row `copies` times over, as transformers' `generate` does; see the function `copies`."""
        mask = self.attention_mask
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
        return Stream(self.model, self.input_ids.repeat_interleave(copies, dim=0), mask)


def unpadded(stream: Stream) -> list[list[int]]:
    """The prompts of a stream as lists of token ids, padding left out.

    Raises:
        NotApplicable: a model that cannot be a stream's, see `checked`.
    """
    _check_model(stream.model, "model")
    ids, mask = stream.input_ids, stream.attention_mask
    if mask is None:
        return ids.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]


def copies(config: GenerationConfig) -> int:
    """How often transformers' `generate` repeats each prompt before it calls a `custom_generate` callable."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def once(streams: Sequence[Stream], copies: int) -> list[Stream]:
    """One row of each prompt that was repeated `copies` times.

    Raises:
        BadInput: rows that are not so repeated.
    """
    found: list[Stream] = []
    for n, (model, ids, mask) in enumerate(streams):
        for values in (ids, ids if mask is None else mask):
            if not torch.equal(values[::copies].repeat_interleave(copies, dim=0), values):
                raise BadInput(
                    f"streams[{n}].input_ids",
                    tuple(ids.shape),
                    f"is not {copies} rows of each prompt",
                    "repeat the rows of every stream as transformers does: stream.repeated(copies(config))",
                )
        found.append(Stream(model, ids[::copies], None if mask is None else mask[::copies]))
    return found


def distinct(streams: Sequence[Stream]) -> tuple[list[Stream], int]:
    """Streams without the rows that repeat, and how often each row stood there, side by side.

    Where rows do not repeat equally often in all streams, all are kept.
    """
    height = len(streams[0].input_ids)
    same = torch.ones(height - 1, dtype=torch.bool)  # row i + 1 is row i, in every stream
    for _, ids, mask in streams:
        for values in (ids, ids if mask is None else mask):
            same &= (values[1:] == values[:-1]).all(1).cpu()
    borders = (~same).nonzero().flatten().tolist()
    run = borders[0] + 1 if borders else height
    if height % run or borders != list(range(run - 1, height - 1, run)):
        return list(streams), 1
    return once(streams, run), run


def check_vocabularies(tokenizers: Sequence[Any]) -> None:
    """Refuse tokenizers that do not give every id of the first the same meaning.

    Ids that another tokenizer has beyond the first one's last are no hindrance: the streams' scores for them
    are cut off.

    Raises:
        IncompatibleModels: naming the sizes and the first id that differs.
    """
    first = {i: token for token, i in tokenizers[0].get_vocab().items()}
    for tokenizer in tokenizers[1:]:
        other = {i: token for token, i in tokenizer.get_vocab().items() if i <= max(first)}
        if other == first:
            continue
        at = min(i for i in first.keys() | other.keys() if first.get(i) != other.get(i))
        raise IncompatibleModels(
            "tokenizers",
            (len(first), len(tokenizer.get_vocab())),
            f"differ: token id {at} is {first.get(at)!r} in one and {other.get(at)!r} in another",
            "use models of one family, or methods that align tokens",
        )


def vocabulary_of(model: PreTrainedModel | BlackBox) -> int | None:
    """How many tokens the model scores; None where its configuration does not say."""
    if isinstance(model, BlackBox):
        return model.vocab_size
    return getattr(model.config.get_text_config(decoder=True), "vocab_size", None)


def check_generation(config: GenerationConfig) -> None:
    """Refuse ways of generating that cannot be right when several streams decode as one.

    Raises:
        NotApplicable: with the reason.
    """
    mode = config.get_generation_mode()
    reasons = {
        GenerationMode.ASSISTED_GENERATION: "drafted tokens would be checked against one stream alone",
    }
    if mode == GenerationMode.BEAM_SAMPLE:
        raise NotApplicable("generation mode", mode.value, *DRAWN_BEAMS)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH):
        reason = reasons.get(mode, "it selects tokens by looking inside one model")
        raise NotApplicable(
            "generation mode",
            mode.value,
            f"does not work with several streams: {reason}",
            "decode greedily, sample or search with beams",
        )
    if config.guidance_scale not in (None, 1, 1.0):
        raise NotApplicable(
            "guidance_scale",
            config.guidance_scale,
            "keeps a stream of its own beside the others",
            "leave it out and express the guidance in the combination",
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise NotApplicable(
            "cache_implementation",
            config.cache_implementation,
            "cannot hold several streams",
            "leave it out: each stream gets a dynamic cache",
        )


def _place(model: PreTrainedModel | BlackBox) -> tuple[int | None, torch.device]:
    """How many positions the model has, where that is known, and where it is."""
    if isinstance(model, BlackBox):
        return model.max_length, model.device
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None), next(model.parameters()).device


def _check_model(model: PreTrainedModel | BlackBox, name: str) -> None:
    if isinstance(model, BlackBox):
        return
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotApplicable(
            name,
            type(model).__name__,
            "reads its prompt with an encoder, which the streams' shared positions cannot describe",
            "use a decoder-only model",
        )
    # PEFT reads a learnt prompt or prefix with the model it wraps; while its `generate` runs, that model shows it.
    reader = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    if getattr(getattr(reader, "active_peft_config", None), "is_prompt_learning", False):
        raise NotApplicable(
            name,
            type(model).__name__,
            "has virtual tokens of PEFT before its prompt, which the streams' masks, positions and caches lack",
            "use an adapter in the layers (LoRA), or decode with the model's own generate",
        )


def checked(streams: Sequence[Stream], new_tokens: int) -> list[Stream]:
    """The streams with their padding on the left, none to spare, on their models' devices.

    Args:
        streams: At least one, all of one batch size.
        new_tokens: How many tokens will follow each prompt.

    Raises:
        BadInput: no stream, unequal rows, an empty prompt, or more tokens than a model has positions.
        IncompatibleModels: a model that scores fewer tokens than the first stream's.
        NotApplicable: an encoder-decoder model, or one that PEFT puts virtual tokens before.
    """
    if not streams:
        raise BadInput("streams", [], "is empty", "give at least one (model, prompt) stream")
    result: list[Stream] = []
    for n, (model, ids, mask) in enumerate(streams):
        name = f"streams[{n}].input_ids"
        if ids.dim() != 2 or ids.shape[0] == 0:
            raise BadInput(
                name, tuple(ids.shape), "is not a batch of prompts", "give int64 ids of shape [B, T], B >= 1"
            )
        if ids.shape[0] != streams[0].input_ids.shape[0]:
            raise BadInput(
                name,
                tuple(ids.shape),
                f"has {ids.shape[0]} rows where the first stream has {streams[0].input_ids.shape[0]}",
                "give every stream one prompt per row",
            )
        if mask is not None and mask.shape != ids.shape:
            raise BadInput(
                f"streams[{n}].attention_mask",
                tuple(mask.shape),
                f"is not shaped like the ids, {tuple(ids.shape)}",
                "give one 0 or 1 for each token",
            )
        mask = torch.ones_like(ids) if mask is None else (mask != 0).long()
        lengths = mask.sum(1)
        if int(lengths.min()) == 0:
            raise BadInput(
                name,
                ids[lengths.argmin()].tolist(),
                "is a prompt without tokens",
                "give each row one token or more",
            )
        _check_model(model, f"streams[{n}].model")
        if result and model is not result[0].model:
            scored, expected = vocabulary_of(model), vocabulary_of(result[0].model)
            if scored is None or expected is None or scored < expected:
                raise IncompatibleModels(
                    f"streams[{n}].model",
                    type(model).__name__,
                    f"scores {scored} tokens where the first stream scores {expected}",
                    "use models that share one vocabulary; only the first may have the fewer tokens",
                )
        width, (limit, device) = int(lengths.max()), _place(model)
        if limit is not None and width + new_tokens - 1 > limit:  # the last new token is never read
            raise BadInput(
                name,
                f"{width} tokens + {new_tokens} new",
                f"is more than the {limit} positions of {type(model).__name__}",
                f"shorten the prompt by {width + new_tokens - 1 - limit} tokens or ask for fewer new ones",
            )
        order = mask.argsort(dim=1, stable=True)[:, -width:]  # padding first, tokens in their order after it
        result.append(Stream(model, ids.gather(1, order).to(device), mask.gather(1, order).to(device)))
    return result
