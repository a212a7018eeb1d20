"""Text from a local model under a grammar, with sampling that does not depend on the batch.

Constrained decoding is llguidance's: a JSON schema becomes a grammar, and each step masks every token that
cannot continue a valid text. Sampling uses the Gumbel-max trick: argmax(logits / T + g) with g standard
Gumbel noise is an exact draw from softmax(logits / T); a row's noise comes from that row's own generator.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

from ..errors import BadInput
from ..extras import require
from ..files import sha256_json
from ..generate import check_length, pad_batch, pad_id_of
from ..lockstep import decode
from ..streams import Stream
from ..training import generator

__all__ = ["generate_rows", "grammar", "grammar_tokenizer"]


def grammar_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A tokenizer as llguidance sees it (takes about 0.3 s at 49k tokens; keep it).

    Raises:
        BadInput: not a fast tokenizer, or no token that ends a text.
        MissingExtra: llguidance is not installed.
    """
    bridge = require("llguidance.hf", extra="serve")
    if not tokenizer.is_fast:
        raise BadInput(
            "tokenizer", type(tokenizer).__name__, "is not a fast tokenizer", "load one, or leave schema out"
        )
    ends = _end_tokens(model, tokenizer)
    if not ends:
        remedy = "set tokenizer.eos_token, or leave schema out"
        raise BadInput("tokenizer", type(tokenizer).__name__, "has no token that ends a text", remedy)
    size = max(len(tokenizer), model.config.get_text_config().vocab_size)
    return bridge.from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)


def grammar(grammar_tokens: Any, schema: Mapping[str, Any]) -> Any:
    """A matcher for JSON that satisfies `schema`, written without optional white space.

    Raises:
        BadInput: the schema uses something the grammar cannot express, or nothing satisfies it.
    """
    matcher = require("llguidance", extra="serve").LLMatcher
    text = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    made = matcher(grammar_tokens, text)
    if made.is_error():
        reason = made.get_error().strip().splitlines()[0]
        raise BadInput("schema", schema, f"cannot be enforced ({reason})", "use a simpler schema")
    return made


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    listed = model.generation_config.eos_token_id
    found = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(int(i) for i in [*found, tokenizer.eos_token_id] if i is not None))


class _Constrain(LogitsProcessor):
    """Mask, per row, the tokens its matcher forbids. A finished row is left alone."""

    def __init__(self, matchers: list[Any], width: int) -> None:
        self.matchers, self.width = matchers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for i, matcher in enumerate(self.matchers):
            if input_ids.shape[1] > self.width and not matcher.is_stopped():
                matcher.consume_token(int(input_ids[i, -1]))
            allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            keep = allowed[: scores.shape[1]].to(scores.device) > 0
            masked[i, : len(keep)] = scores[i, : len(keep)].masked_fill(~keep, -torch.inf)
        return masked


class _Gumbel(LogitsProcessor):
    """Divide by the temperature and add each row's own noise; the argmax is then the sample."""

    def __init__(self, temperature: float, generators: list[torch.Generator]) -> None:
        self.temperature, self.generators = temperature, generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack(
            [
                -torch.empty(scores.shape[1]).exponential_(generator=g).clamp_min_(1e-30).log()
                for g in self.generators
            ]
        )
        return scores.float() / self.temperature + noise.to(scores.device)


class _Stop(StoppingCriteria):
    """A row ends when its new text contains a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        hits = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(hits, dtype=torch.bool, device=input_ids.device)


def _row_seed(seed: int, row: Sequence[int], draw: int) -> int:
    return int(sha256_json([seed, list(row), draw])[:15], 16)


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    draws: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    matcher: Any = None,
) -> list[tuple[str, int, bool]]:
    """Continue rows of token ids.

    What the model's generation configuration sets (penalties, forbidden words, lengths) does not act, except for
    the tokens that end a text: such settings would bar what the grammar needs, and draw from another distribution.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Token ids of each prompt.
        max_new_tokens: Length limit, in tokens.
        batch_size: Rows per forward pass.
        temperature: 0 is greedy.
        top_k: Likeliest tokens that are sampled from, of those `matcher` allows; None for all.
        seed: Of the sampling; None takes one from the system.
        draws: Number of each row among its equals; with it, equal rows get different samples.
        stop: Texts that end a row; the returned text still holds what ended it.
        matcher: From `grammar`; each row gets its own copy.

    Returns:
        Per row: new text, tokens written (the end token included), and whether the limit ended it.

    Raises:
        BadInput: a row that leaves the model no room for the answer.
        NotApplicable: as `core.lockstep.decode`.
    """
    if seed is None:
        seed = secrets.randbits(48)
    check_length(model, max(map(len, rows), default=0) + max_new_tokens)
    ends, pad = _end_tokens(model, tokenizer), pad_id_of(tokenizer)
    results: list[tuple[str, int, bool]] = [("", 0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_batch([rows[i] for i in chosen], pad, side="left", device=model.device)
        width = ids.shape[1]
        processors = LogitsProcessorList()
        if matcher is not None:
            processors.append(_Constrain([matcher.deep_copy() for _ in chosen], width))
        if temperature > 0 and top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if temperature > 0:
            seeds = [_row_seed(seed, rows[i], draws[i] if draws else 0) for i in chosen]
            processors.append(_Gumbel(temperature, [generator(s) for s in seeds]))
        out = decode(
            [Stream(model, ids, mask)], lambda logits: logits[0], max_new_tokens=max_new_tokens,
            eos_token_id=ends, pad_token_id=pad, logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, stop, width)] if stop else []),
        ).tolist()  # fmt: skip
        for i, new in zip(chosen, out, strict=True):
            length = next((n + 1 for n, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:length], skip_special_tokens=True)
            if any(s in text for s in stop):  # what follows the stop text is padding
                heads = (
                    (n, tokenizer.decode(new[:n], skip_special_tokens=True)) for n in range(len(new) + 1)
                )
                length, text = next((n, head) for n, head in heads if any(s in head for s in stop))
            results[i] = text, length or len(new), length is None
    return results
