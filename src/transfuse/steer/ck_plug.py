"""CK-PLUG: a dial, token by token, between what a model remembers and what its context says.

:arxiv: 2503.15888
:moves: retrieved text -> the answer, as far as a dial allows
:access: logits
:reversible: yes
:context: yes

The same frozen model reads the question with and without its context. Where the context leaves the model
surer, decoding goes on as in plain retrieval-augmented generation. Where it makes the model less sure (the
confidence gain, entropy without minus entropy with context, is below `epsilon`), the context is taken to
contradict what the model knows, and the two next-token distributions are mixed anew: memory with weight
alpha, what the context alone contributes with weight 1 - alpha. At alpha = 1 memory answers, at 0 the
context, and 0.5 ranks tokens as plain reading of the context does. `alpha="adaptive"` sets the weight from
the two entropies.

    head     : tokens plausible to either stream (k best, or at least rho times as likely as the best)
    H_c, H_q : entropies with and without context, renormalised on the head
    gate     : H_q - H_c < epsilon
    scores   : alpha log p_q + (1 - alpha) (log p_c - log p_q) on the head, -inf elsewhere
    adaptive : alpha = H_c / (H_q + H_c)

Where the published code departs from the paper, the paper is followed. The code's gate fires when H_q < 2
H_c, which is on almost every token: `gate="repo"`. Its adaptive weights have the same ratio, hence the same
greedy output, at another temperature. It decides for one row at a time; here each row of a batch has its gate.

    model, tokenizer = transfuse.load("smollm2-135m")
    CKPlug(model, tokenizer, alpha=0.0).generate("The capital of France is", "France moved to Oslo.")
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

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
from transfuse.core.errors import BadInput
from transfuse.core.streams import Stream, copies, unpadded
from transfuse.steer._base import Combining
from transfuse.steer._texts import Prompts, Sides, Steered, answer, paired, predict

__all__ = ["CKPlug", "Mixed", "ck_plug_mix", "ck_plug_scores", "confidence_gain", "plausibility_head"]

Alpha = float | Literal["adaptive"]
_FLOOR = -1e4  # log-probability of tokens a stream rules out (-inf), so that differences stay numbers


class Mixed(NamedTuple):
    """One step for a batch.

    Attributes:
        scores: `[B, V]` float32.
        gain: `[B]` float32, confidence gain H_q - H_c in nats; negative where the context unsettles the
            model.
        conflict: `[B]` bool, whether the gate fired.
    """

    scores: Tensor
    gain: Tensor
    conflict: Tensor


def plausibility_head(logits: Tensor, *, top: int = 10, relative_top: float = 0.01) -> Tensor:
    """Tokens a stream takes seriously: its `top` best, and those `relative_top` times as likely as the best.

    Args:
        logits: `[..., V]` logits or log-probabilities.
        top: k >= 1; ties with the k-th are all kept.
        relative_top: rho in (0, 1], a ratio of probabilities.

    Returns: `[..., V]` bool.
    """
    best = logits.topk(min(top, logits.shape[-1]), dim=-1).values
    threshold = torch.minimum(best[..., -1:], best[..., :1] + math.log(relative_top))
    return (logits >= threshold) & (logits > -math.inf)  # with fewer than k possible tokens, the k-th is none


def _entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax, `[B, n]` -> `[B]`."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def ck_plug_mix(
    z_c: Tensor,
    z_q: Tensor,
    *,
    alpha: Alpha = 0.5,
    gate: Literal["paper", "repo"] = "paper",
    epsilon: float = 0.0,
    top: int = 10,
    relative_top: float = 0.01,
) -> Mixed:
    """Mix the next-token logits of the stream with context and of the stream without, row by row.

    Args:
        z_c: `[B, V]` logits with context, any floating dtype.
        z_q: `[B, V]` logits without context.
        alpha: Weight of memory in [0, 1], or "adaptive": H_c / (H_q + H_c) per row, 0.5 where both are 0.
        gate: "paper": a row conflicts if H_q - H_c < epsilon; "repo": if H_q - 2 H_c < epsilon.
        epsilon: Threshold in nats.
        top: k of the plausibility head.
        relative_top: rho of the plausibility head.

    Returns:
        Scores, gain and gate. Rows without conflict have exactly `z_c` as scores.

    Raises:
        BadInput: an argument out of range, or logits of unequal shape.
    """
    _check(alpha=alpha, gate=gate, epsilon=epsilon, top=top, relative_top=relative_top)
    if z_c.shape != z_q.shape or z_c.dim() != 2:
        raise BadInput("z_q", tuple(z_q.shape), f"differs from z_c {tuple(z_c.shape)}", "give [B, V] twice")
    z_c, z_q = z_c.float(), z_q.float()
    head = plausibility_head(z_c, top=top, relative_top=relative_top)
    head |= plausibility_head(z_q, top=top, relative_top=relative_top)
    # A head is some dozen tokens of a vocabulary: from here on, n columns that hold every row's head.
    columns = head.byte().topk(int(head.nonzero()[:, 0].bincount().max())).indices
    kept, c, q = (x.gather(1, columns) for x in (head, z_c, z_q))
    h_c, h_q = (_entropy(x.masked_fill(~kept, -math.inf)) for x in (c, q))
    gain = h_q - h_c
    conflict = (gain if gate == "paper" else gain - h_c) < epsilon
    l_c, l_q = (z.log_softmax(-1).gather(1, columns).clamp_min(_FLOOR) for z in (z_c, z_q))
    if alpha == "adaptive":
        total = h_q + h_c
        memory = torch.where(total > 0, h_c / total, 0.5)[:, None]
    else:
        memory = torch.full_like(l_c[:, :1], alpha)
    # The paper's sum with its terms collected: at 0.5 nothing of l_q is left, not even its rounding.
    mixed = ((1 - memory) * l_c + (2 * memory - 1) * l_q).masked_fill(~kept, -math.inf)
    mixes = conflict[:, None]
    scores = z_c.masked_fill(mixes, -math.inf).scatter_(1, columns, torch.where(mixes, mixed, c))
    return Mixed(scores, gain, conflict)


def ck_plug_scores(z_c: Tensor, z_q: Tensor, **settings: Any) -> Tensor:
    """The scores `[B, V]` of `ck_plug_mix`, which takes the same arguments."""
    return ck_plug_mix(z_c, z_q, **settings).scores


def _check(
    *, alpha: Alpha = 0.5, gate: str = "paper", epsilon: float = 0.0, top: int, relative_top: float
) -> None:
    if alpha != "adaptive" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise BadInput("alpha", alpha, "is not a weight", 'give a number from 0 to 1, or "adaptive"')
    if gate not in ("paper", "repo"):
        raise BadInput("gate", gate, "is unknown", 'use "paper" or "repo"')
    if math.isnan(epsilon):
        raise BadInput("epsilon", epsilon, "is not a threshold", "give nats; the paper uses 0 to -3")
    if top < 1:
        raise BadInput("top", top, "leaves no token", "give 1 or more")
    if not 0 < relative_top <= 1:
        raise BadInput("relative_top", relative_top, "is not a ratio", "give a number above 0, at most 1")


def confidence_gain(
    model: PreTrainedModel,
    query_ids: Tensor,
    context_ids: Tensor,
    *,
    top: int = 10,
    relative_top: float = 0.01,
) -> Tensor:
    """Where a context settles or unsettles a model: the confidence gain at every token two prompts share.

    An audit without generating. Append an answer to both prompts to see at which of its tokens the context
    speaks against the model's memory (negative values).

    Args:
        model: A causal language model.
        query_ids: `[S]` int64, the prompt without context.
        context_ids: `[S']` int64, the prompt with context, which ends in the same tokens.
        top: k of the plausibility head.
        relative_top: rho of the plausibility head.

    Returns:
        `[T]` float32 in nats for the T tokens of the common ending: entry t is about what follows token t.

    Raises:
        BadInput: the prompts have no common ending, or an argument is out of range.
    """
    _check(top=top, relative_top=relative_top)
    a, b = query_ids.flatten().tolist(), context_ids.flatten().tolist()
    shared = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))
    if shared == 0:
        problem = f"does not end like query_ids {a[-3:]}"
        raise BadInput("context_ids", b[-3:], problem, "let both end in the same question")
    gains: list[Tensor] = []

    def combine(logits: list[Tensor]) -> Tensor:
        gains.append(ck_plug_mix(logits[0], logits[1], top=top, relative_top=relative_top).gain)
        return logits[0]

    # Each prompt up to its first common token, then the rest of the ending as given tokens.
    streams = [Stream(model, torch.tensor([ids[: len(ids) - shared + 1]])) for ids in (b, a)]
    lockstep.follow(streams, combine, torch.tensor([[*a[len(a) - shared + 1 :], 0]]))
    return torch.cat(gains)


class CKPlug(Combining):
    """Answers that lean on memory or on the context, by one dial.

    As `model.generate(**inputs, custom_generate=CKPlug(model, tokenizer))` it takes `parametric_input_ids`
    and `parametric_attention_mask`, `[B, S]` prompts without context, beside the usual prompts with it.

    Args:
        model: A causal language model; it is not changed.
        tokenizer: Its tokenizer.
        alpha: Weight of memory where context and memory conflict, see `ck_plug_mix`.
        gate: "paper" or "repo", see `ck_plug_mix`.
        epsilon: Confidence gain in nats below which a token is in conflict; -inf never fires.
        top: k of the plausibility head.
        relative_top: rho of the plausibility head.
        prompt: How context and query are written down; the stream without context reads the query alone.
        chat: Put the text into the tokenizer's chat template, for both streams alike.
        system: System message of the chat.
    """

    streams = 2

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        alpha: Alpha = 0.5,
        gate: Literal["paper", "repo"] = "paper",
        epsilon: float = 0.0,
        top: int = 10,
        relative_top: float = 0.01,
        prompt: str = "Background:\n{context}\n\n{query}",
        chat: bool = False,
        system: str | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.alpha, self.gate, self.epsilon = alpha, gate, epsilon
        self.top, self.relative_top = top, relative_top
        self.prompt, self.chat, self.system = prompt, chat, system

    def neutral(self) -> CKPlug:
        """A copy whose gate never fires."""
        plain = copy.copy(self)
        plain.epsilon = -math.inf
        return plain

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores `[B, V]` from the logits with context and those without."""
        return ck_plug_scores(logits[0], logits[1], **self._settings())

    def generate(
        self,
        queries: str | Sequence[str],
        contexts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        details: bool = False,
        **generation: Any,
    ) -> str | Steered | list[str] | list[Steered]:
        """Answer each query with its context.

        Args:
            queries: One text or several.
            contexts: As many; an empty one falls back to plain decoding of its query, with a warning.
            max_new_tokens: Per answer.
            batch_size: Queries decoded together, two rows each.
            details: Return `Steered` in place of text; its trace holds gain and gate per token.
            **generation: For `__call__` (`generator`, `on_tokens`) or transformers' `generate`; greedy by default.

        Returns:
            One answer for one query given as text, else a list in the order given.

        Raises:
            BadInput: lists that do not pair, an argument out of range, a prompt too long.
            NotApplicable: assisted decoding and whatever else needs a single stream.
        """
        prompts = self._prompts()
        pairs = [prompts.encode(q, c) for q, c in paired(queries, "contexts", contexts)]
        answers = answer(
            self, self.model, self.tokenizer, pairs, extra=["parametric"],
            batch_size=batch_size, max_new_tokens=max_new_tokens, **generation,
        )  # fmt: skip
        results = answers if details else [a.text for a in answers]
        return results[0] if isinstance(queries, str) else results

    def follow(
        self,
        queries: str | Sequence[str],
        contexts: str | Sequence[str],
        continuations: str | Sequence[str],
        *,
        batch_size: int = 16,
    ) -> list[Tensor]:
        """What would be answered next at each token of given continuations (teacher forcing, greedy).

        Args:
            queries: One text or several.
            contexts: As many; an empty one falls back to plain decoding.
            continuations: As many; in plain text a space is put before them.
            batch_size: Queries read together.

        Returns:
            Per query `[T]` int64, the best token at each position of its continuation.

        Raises:
            BadInput: lists that do not pair, an empty continuation, an argument out of range, a long prompt.
        """
        prompts, pairs, targets = self._prompts(), [], []
        texts = paired(queries, "continuations", continuations)
        for (query, context), (_, target) in zip(paired(queries, "contexts", contexts), texts):
            pair, ids = prompts.encode_target(query, context, target)
            pairs.append(pair)
            targets.append(ids)
        device = self.model.device
        read = predict(self._read, self.tokenizer, pairs, targets, device=device, batch_size=batch_size)
        return [followed.predictions for followed in read]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        parametric_input_ids: Tensor | None = None,
        parametric_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[Tensor], Any] | None = None,
        trace: list[tuple[Tensor, ...]] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared.

        Args:
            model: The model that generates.
            input_ids: `[B, T]` prompts with context, as prepared.
            logits_processor: As prepared.
            stopping_criteria: As prepared.
            generation_config: As prepared.
            parametric_input_ids: `[B, S]` prompts without context; a row without any is decoded plainly.
            parametric_attention_mask: `[B, S]`; None where nothing is padded.
            generator: Source of draws when sampling.
            on_tokens: Called with the new tokens `[B]` of each step.
            trace: Receives `(gain [B], conflict [B])` of each step.
            **model_kwargs: As prepared.
        """
        self._prompts()
        if parametric_input_ids is None:
            raise BadInput("parametric_input_ids", None, "is missing", "give the prompts without context")
        reading = Stream(model, input_ids, model_kwargs.get("attention_mask"))
        memory = Stream(model, parametric_input_ids, parametric_attention_mask)
        streams = [reading, memory.repeated(copies(generation_config))]
        return lockstep.decode_prepared(
            streams, self._combiner(streams, trace), logits_processor, stopping_criteria,
            generation_config, model_kwargs, generator=generator, on_tokens=on_tokens,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("alpha", "gate", "epsilon", "top", "relative_top")}

    def _prompts(self) -> Prompts:
        """The writer of prompts, once every setting has been checked."""
        _check(**self._settings())
        prompts = Prompts(self.tokenizer, self.prompt, self.chat, self.system)
        prompts.check()
        return prompts

    def _read(self, sides: Sides) -> tuple[list[Stream], lockstep.Combine]:
        streams = [Stream(self.model, ids, mask) for ids, mask in sides]
        return streams, self._combiner(streams)

    def _combiner(
        self, streams: Sequence[Stream], trace: list[tuple[Tensor, ...]] | None = None
    ) -> lockstep.Combine:
        """`combine` that leaves rows without context alone, and records gain and gate."""
        absent = [with_context == alone for with_context, alone in zip(*map(unpadded, streams))]
        if count := sum(absent):
            warnings.warn(f"no context in {count} of {len(absent)} prompts: decoded plainly", stacklevel=2)
        plain = torch.tensor(absent, device=streams[0].input_ids.device)

        def combine(logits: list[Tensor]) -> Tensor:
            mixed = ck_plug_mix(logits[0], logits[1], **self._settings())
            if trace is not None:
                trace.append((mixed.gain, mixed.conflict & ~plain))
            return torch.where(plain[:, None], logits[0], mixed.scores)

        return combine
