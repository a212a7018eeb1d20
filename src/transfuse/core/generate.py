"""Batched greedy answers and teacher-forced scores of causal language models, in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import BadInput
from .runs import evaluating
from .taps import contiguous_head

__all__ = [
    "chat_text",
    "encode_pair",
    "generate_ids",
    "generate_texts",
    "pad_batch",
    "plain_generation",
    "predicted_tokens",
    "target_matches",
    "target_nll",
]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its continuation, one space between them.

    The two are tokenised together and split where the target's characters begin, so that the pieces are those the
    model would see in running text; the space belongs to the target. Tokenizers without offsets, and tokens that
    straddle the border, fall back to tokenising the two apart.

    Raises:
        BadInput: the target is empty.
    """
    prompt, target = prompt.rstrip(" "), target.strip()
    if not target:
        raise BadInput("target", target, "is empty", "give the text that should follow the prompt")
    gap = "" if not prompt or prompt[-1].isspace() else " "
    if tokenizer.is_fast:
        whole = tokenizer(prompt + gap + target, return_offsets_mapping=True)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        # A space that is a token of its own may have no width: byte-level tokenizers trim it off.
        cut = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if cut < len(ids) and offsets[cut][0] >= len(prompt) and cut > 0:
            end = len(ids)
            while end > cut and offsets[end - 1][0] == offsets[end - 1][1]:
                end -= 1  # a special token appended by the tokenizer is not part of the answer
            return list(ids[:cut]), list(ids[cut:end])
    before = tokenizer(prompt)["input_ids"]
    return list(before), list(tokenizer(gap + target, add_special_tokens=False)["input_ids"])


def pad_batch(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: str = "right", device: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of token ids to one length.

    Returns:
        `(input_ids, attention_mask)`, both int64 `[B, T]`.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, or the end-of-text id where there is none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def check_length(model: PreTrainedModel, tokens: int, argument: str = "prompt") -> None:
    """Refuse a sequence longer than the model's positions.

    Raises:
        BadInput: `tokens` exceeds `max_position_embeddings`.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise BadInput(
            argument, f"{tokens} tokens", f"exceeds the model's {limit} positions", "shorten the text"
        )


def chat_text(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """A user's message in the tokenizer's chat template, up to where the reply begins.

    Without the begin-of-text token that the tokenizer puts before every text anyway.
    """
    message = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    begin = tokenizer.bos_token
    adds = bool(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(str(begin)) if adds else text


def _check_context(rows: Sequence[Sequence[int]]) -> None:
    for i, row in enumerate(rows):
        if not row:
            raise BadInput(
                f"prompts[{i}]", "", "has no tokens, so nothing predicts what follows", "give some text"
            )


@contextlib.contextmanager
def plain_generation(model: torch.nn.Module, *, pad: int, ends: Collection[int]) -> Iterator[None]:
    """Neutral settings in the place of the model's own, which `generate` merges into whatever it is given.

    A model's penalties, beams and forbidden tokens would otherwise decide what it answers: a repetition penalty keeps
    it from saying what its prompt says.

    Args:
        model: A model, or something around one.
        pad: The padding token.
        ends: Tokens that end a row.
    """
    holders: list[Any] = [each for each in model.modules() if "generation_config" in vars(each)]
    kept = [each.generation_config for each in holders]
    for each, own in zip(holders, kept, strict=True):
        each.generation_config = GenerationConfig(
            pad_token_id=pad, eos_token_id=sorted(ends) or None, bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )  # fmt: skip
    try:
        yield
    finally:
        for each, own in zip(holders, kept, strict=True):
            each.generation_config = own


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Token ids of greedy continuations, in the order of `prompts`; a text's end is its last token.

    Greedy whatever the model's `generation_config` says; only its end-of-text tokens count. Batches are left-padded
    and grouped by length.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain texts, already rendered (chat template included, if one is wanted).
        max_new_tokens: Length limit of each continuation, in tokens.
        batch_size: Rows per forward pass.

    Raises:
        BadInput: a prompt without tokens; one that leaves no room for the answer.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    _check_context(rows)
    check_length(model, max(map(len, rows), default=0) + max_new_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[list[int]] = [[] for _ in rows]
    pad, ends = pad_id_of(tokenizer), _end_ids(model)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_batch([rows[i] for i in chosen], pad, side="left", device=model.device)
        with evaluating(model), contiguous_head(model), plain_generation(model, pad=pad, ends=ends):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for i, new in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            length = next((n + 1 for n, token in enumerate(new) if token in ends), len(new))
            found[i] = new[:length]
    return found


def _end_ids(model: PreTrainedModel) -> set[int]:
    """Tokens at which `generate` ends a row; what comes after them is padding."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy continuations as texts, special tokens removed, leading space kept off.

    Arguments and errors as in `generate_ids`.
    """
    new = generate_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ") for ids in new]


@torch.no_grad()  # results may be weights of a loss, which inference tensors cannot
def _forced(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], pad: int, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per pair: (argmax int64 [n], negative log-likelihoods float32 [n]) at its n target tokens."""
    _check_context([before for before, _ in pairs])
    results: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_batch(
            [pairs[i][0] + pairs[i][1] for i in chosen], pad, side="left", device=model.device
        )
        check_length(model, ids.shape[1])
        longest = max(len(pairs[i][1]) for i in chosen)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with evaluating(model), contiguous_head(model):
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=longest + 1,
            )
        logits = out.logits[:, :-1].float()  # [b, longest, V]: only the positions that predict a target token
        gold = ids[:, -longest:]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), gold, reduction="none")
        best = logits.argmax(-1)
        for row, i in enumerate(chosen):
            n = len(pairs[i][1])
            results[i] = best[row, longest - n :].cpu(), nll[row, longest - n :].cpu()
    return results


def target_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Teacher-forced hits: for each target token, is it the argmax after prompt and earlier target tokens?

    Returns:
        One bool tensor `[n_i]` per prompt, n_i being the number of target tokens.
    """
    pairs = [encode_pair(tokenizer, p, t) for p, t in zip(prompts, targets, strict=True)]
    found = _forced(model, pairs, pad_id_of(tokenizer), batch_size)
    return [best == torch.tensor(pair[1]) for (best, _), pair in zip(found, pairs, strict=True)]


def predicted_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Teacher-forced argmax token ids (int64 `[n_i]`) at the places of each target's tokens."""
    pairs = [encode_pair(tokenizer, p, t) for p, t in zip(prompts, targets, strict=True)]
    return [best for best, _ in _forced(model, pairs, pad_id_of(tokenizer), batch_size)]


def target_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Negative log-likelihood (nats, float32) of every target token; one tensor `[n_i]` per prompt."""
    pairs = [encode_pair(tokenizer, p, t) for p, t in zip(prompts, targets, strict=True)]
    return [nll for _, nll in _forced(model, pairs, pad_id_of(tokenizer), batch_size)]
