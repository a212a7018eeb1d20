"""RAPID: a reader of retrieved chunks drafts, a reader of the whole long document verifies.

:arxiv: 2502.20330
:moves: a long document -> the answer, with tokens drafted from its retrieved part
:access: logits
:reversible: yes
:context: yes
:extra: retrieve

Reading a long document costs at every token. Here a drafter, the same model or another of its vocabulary, reads
only the chunks that a retriever keeps for the question and writes up to gamma tokens ahead; the target, which
reads everything, scores them in one pass. What retrieval brings to the fore also counts when the drafts are
judged: the target's distribution p takes a step towards the drafter's q before the comparison.

    p^       : softmax(z / T + eta (q - p)); where p^_k < 0.1 max p^, p^_k := p_k (the tail)
    accepted : drafts x in order while r <= p^(x) / q(x), r uniform on [0, 1]
    then     : on rejection a token from norm(max(p - p^, p - q, 0)); without one, from p

At eta = 0 this is speculative sampling, and the output is distributed as the target's own. At eta > 0 it is not,
although the paper's appendix says so: it leans to the drafter by design. With p = (.6, .3, .1), q = (.2, .7, .1)
and eta = 1 the output is (.43, .47, .10). Nor is p^ always a distribution: where it is peaked, the tail rule
brings back a token that p likes (eta = 5: (.60, .92, .10), so every draft is accepted). `tail="paper"` does so;
`tail="renormalise"` divides by the sum. Without sampling, which the paper does not treat, p and q are taken at
T = 1, drafts are accepted while they are the best token of p^, and that token takes a rejected draft's place.

The official code could not be compared. Requests are decoded one at a time. Chunks that adjoin in the document
stay joined. A model asked several questions about one document reads it once.

    model, tokenizer = transfuse.load("smollm2-135m")
    RAPID(model, tokenizer).generate("Who built the bridge?", long_text, max_new_tokens=32)
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.streams import Stream, check_generation, check_vocabularies, checked, vocabulary_of
from transfuse.steer._base import Steer
from transfuse.steer._chunks import BM25ChunkRetriever, Chunk, ChunkRetriever
from transfuse.steer._drafting import Reader, Round, Speculated, Verdict, VerifyFn, round_flops, speculate
from transfuse.steer._texts import Prompts, answer, batches, paired

__all__ = [
    "RAPID", "BM25ChunkRetriever", "Chunk", "ChunkRetriever", "Reader", "Round", "Speculated", "Verdict",
    "corrected", "residual", "round_flops", "speculate", "verify",
]  # fmt: skip

Tail = Literal["paper", "renormalise"]
_TAIL = 0.1  # tokens less likely than this share of the likeliest keep their p


def corrected(
    z: Tensor, q: Tensor, eta: float = 10.0, temperature: float = 1.0, tail: Tail = "paper"
) -> Tensor:
    """p^ (Eq. 6 and 9): the target's distribution, one step of distillation nearer to the drafter's.

    softmax(z / T + eta (q - p)), p = softmax(z / T); then p^_k := p_k wherever p^_k < 0.1 max_j p^_j.

    Args:
        z: `[..., V]` target logits; -inf where a token is ruled out.
        q: `[..., V]` probabilities the drafts were drawn from.
        eta: Length of the step, >= 0.
        temperature: T > 0.
        tail: "paper": as written, so that the sum may exceed 1; "renormalise": divided by its sum.

    Returns:
        `[..., V]`, in float32 or wider.

    Raises:
        BadInput: an argument out of range, or shapes that differ.
    """
    _check(eta=eta, tail=tail)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise BadInput("temperature", temperature, "is not a temperature", "give a number above 0")
    if z.shape != q.shape:
        raise BadInput("q", tuple(q.shape), f"is not shaped like z, {tuple(z.shape)}", "give [..., V] twice")
    z, q = (x if x.dtype == torch.float64 else x.float() for x in (z, q))
    z = z / temperature
    p = z.softmax(-1)
    stepped = (z + eta * (q - p)).softmax(-1)
    stepped = torch.where(stepped < _TAIL * stepped.amax(-1, keepdim=True), p, stepped)
    return stepped if tail == "paper" else stepped / stepped.sum(-1, keepdim=True)


def residual(p: Tensor, stepped: Tensor, q: Tensor) -> Tensor:
    """What a rejected draft's place is drawn from (Eq. 10): norm(max(p - p^, p - q, 0)), `[..., V]`.

    Where that is zero throughout, which takes q = p, it is p.
    """
    rest = torch.maximum(p - stepped, p - q).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def verify(
    drafts: Tensor,
    q: Tensor,
    z: Tensor,
    *,
    eta: float = 10.0,
    tail: Tail = "paper",
    temperature: float = 1.0,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Judge the drafts of B independent rounds.

    Args:
        drafts: `[B, n]` int64, n >= 0.
        q: `[B, n, V]` probabilities each was drawn from.
        z: `[B, n + 1, V]` target logits where each was drafted, and after the last.
        eta: As in `corrected`.
        tail: As in `corrected`.
        temperature: Of p and p^; q is taken as it is.
        do_sample: False: a draft stays if it is the best token of p^, which takes its place if not; after n
            drafts the best token of z follows.
        generator: Source of draws, on the device of `z`.

    Returns:
        How many drafts stay, `[B]`, and the token after them, `[B]`.

    Raises:
        BadInput: as `corrected`, or shapes that do not belong together.
    """
    count, n = drafts.shape
    if z.shape[:2] != (count, n + 1) or q.shape[:2] != (count, n):
        raise BadInput(
            "z", tuple(z.shape), f"does not go with drafts {(count, n)} and q {tuple(q.shape)}",
            "give q [B, n, V] and z [B, n + 1, V]",
        )  # fmt: skip
    stepped = corrected(z[:, :n], q, eta, temperature, tail)
    rows = torch.arange(count, device=z.device)
    if not do_sample:
        # At eta = 0 the logits themselves decide: rounding may level what they tell apart.
        best = (z[:, :n] if eta == 0 else stepped).argmax(-1)
        accepted = (drafts == best).long().cumprod(1).sum(1)
        return Verdict(accepted, torch.cat([best, z[:, n:].argmax(-1)], dim=1)[rows, accepted])
    chance = torch.rand(count, n, generator=generator, dtype=stepped.dtype, device=z.device)
    of_drafts = [x.gather(-1, drafts[..., None])[..., 0] for x in (q, stepped)]
    kept = chance * of_drafts[0] < of_drafts[1]  # not <=: what has p^ = 0 is never kept
    accepted = kept.long().cumprod(1).sum(1)
    p = (z[rows, accepted].to(stepped.dtype) / temperature).softmax(-1)
    # After n accepted drafts nothing was rejected: with q = p the residual is p itself.
    stepped, q = (torch.cat([x.to(p.dtype), p[:, None]], dim=1)[rows, accepted] for x in (stepped, q))
    token = torch.multinomial(residual(p, stepped, q), 1, generator=generator)[:, 0]
    return Verdict(accepted, token)


def _check(*, eta: float = 0.0, tail: str = "paper", gamma: int = 1, prefill_tokens: int = 1) -> None:
    if not (eta >= 0 and math.isfinite(eta)):
        raise BadInput(
            "eta", eta, "is not a step towards the drafter", "give 0 or more; the paper uses 5 to 50"
        )
    if tail not in ("paper", "renormalise"):
        raise BadInput("tail", tail, "is unknown", 'use "paper" or "renormalise"')
    if gamma < 0:
        raise BadInput(
            "gamma", gamma, "is not a number of drafts", "give 0 (none) or more; the paper uses 10"
        )
    if prefill_tokens < 1:
        raise BadInput("prefill_tokens", prefill_tokens, "reads nothing", "give 1 or more")


class RAPID(Steer):
    """Answers from long documents, drafted by a reader of what was retrieved from them.

    As `model.generate(**inputs, custom_generate=RAPID(model, tokenizer))` it takes `drafter_input_ids` and
    `drafter_attention_mask`, the `[1, S]` prompt with the short context, beside the usual prompt with the whole.

    Args:
        model: The target, a causal language model; it is not changed.
        tokenizer: Its tokenizer.
        drafter: Another model of the same vocabulary; None: the target itself (self-speculation).
        drafter_tokenizer: Needed where the models score different numbers of tokens, to see that they agree.
        retriever: From `(query, context, tokenizer)` to the short context; None: `ChunkRetriever()`.
        gamma: Most tokens drafted per round; 0 decodes with the target alone.
        eta: Step of p towards q; 0 leaves the target's distribution as it is.
        tail: "paper" or "renormalise", see `corrected`.
        verify_fn: What to use in place of `verify`; `eta` and `tail` do not matter then.
        prompt: How context and query are written down, for both readers.
        chat: Put the text into the tokenizer's chat template.
        system: System message of the chat.
        prefill_tokens: Most tokens of a prompt read in one pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drafter: PreTrainedModel | None = None,
        drafter_tokenizer: PreTrainedTokenizerBase | None = None,
        retriever: Callable[[str, str, PreTrainedTokenizerBase], str] | None = None,
        gamma: int = 10,
        eta: float = 10.0,
        tail: Tail = "paper",
        verify_fn: VerifyFn | None = None,
        prompt: str = "{context}\n\n{query}",
        chat: bool = False,
        system: str | None = None,
        prefill_tokens: int = 2048,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.drafter, self.drafter_tokenizer = drafter, drafter_tokenizer
        self.retriever = ChunkRetriever() if retriever is None else retriever
        self.gamma, self.eta, self.tail, self.verify_fn = gamma, eta, tail, verify_fn
        self.prompt, self.chat, self.system = prompt, chat, system
        self.prefill_tokens = prefill_tokens

    def neutral(self) -> RAPID:
        """A copy at eta = 0: its output is the target's own, greedily the same, drawn as likely."""
        plain = copy.copy(self)
        plain.eta, plain.verify_fn = 0.0, None
        return plain

    def generate(
        self,
        queries: str | Sequence[str],
        contexts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 1,
        details: bool = False,
        **generation: Any,
    ) -> str | Speculated | list[str] | list[Speculated]:
        """Answer each query from its long context.

        Args:
            queries: One text or several.
            contexts: As many; an empty one leaves the query alone, for both readers.
            max_new_tokens: Per answer.
            batch_size: Taken for the family's sake: answers are decoded one at a time.
            details: Return `Speculated` in place of text.
            **generation: For `__call__` (`generator`, `on_tokens`, `readers`) or `generate`; greedy by default.

        Returns:
            One answer for one query given as text, else a list in the order given.

        Raises:
            BadInput: lists that do not pair, an argument out of range, a prompt too long.
            IncompatibleModels: models of different vocabularies.
            NotApplicable: beams, assisted decoding and whatever else needs a single stream.
        """
        prompts = self._prompts()
        self._width(self.model)
        pairs = paired(queries, "contexts", contexts)
        batches([len(context) for _, context in pairs], batch_size)
        sides = []
        for query, context in pairs:
            if not context.strip():
                warnings.warn("a context is empty: its query is decoded plainly", stacklevel=2)
            short = self.retriever(query, context, self.tokenizer) if context.strip() else ""
            sides.append((prompts.encode(query, context)[0], prompts.encode(query, short)[0]))
        generation.setdefault("readers", {})
        answers = answer(
            self, self.model, self.tokenizer, sides, extra=["drafter"], batch_size=1,
            max_new_tokens=max_new_tokens, **generation,
        )  # fmt: skip
        if not details:
            return answers[0].text if isinstance(queries, str) else [a.text for a in answers]
        results = [Speculated.of(a, *map(len, side)) for a, side in zip(answers, sides)]
        return results[0] if isinstance(queries, str) else results

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        drafter_input_ids: Tensor | None = None,
        drafter_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[Tensor], Any] | None = None,
        trace: list[tuple[Tensor, ...]] | None = None,
        readers: dict[str, Reader] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared.

        Args:
            model: The target.
            input_ids: `[1, T]` prompt with the whole context, as prepared.
            logits_processor: As prepared; both models' scores go through it.
            stopping_criteria: As prepared.
            generation_config: As prepared.
            drafter_input_ids: `[1, S]` prompt with the short context.
            drafter_attention_mask: `[1, S]`; None where nothing is padded.
            generator: Source of draws when sampling.
            on_tokens: Called with the new tokens `[n]` of each round.
            trace: Receives `(origin [1], number of the round [1], tokens drafted in it [1])` of each token.
            readers: Both readers with their caches, kept here for the next call, which reads only what is new.
                One model and cache setting per dictionary.
            **model_kwargs: As prepared.
        """
        self._prompts()
        width = self._width(model)
        check_generation(generation_config)
        if generation_config.num_beams != 1:
            beams = generation_config.num_beams
            raise NotApplicable(
                "num_beams", beams, "would each need drafts of their own", "decode without beams"
            )
        if drafter_input_ids is None:
            raise BadInput("drafter_input_ids", None, "is missing", "give the prompt with the short context")
        for name, ids in (("input_ids", input_ids), ("drafter_input_ids", drafter_input_ids)):
            if ids.shape[0] != 1:
                raise BadInput(
                    name, tuple(ids.shape), "is a batch, whose rows would accept different numbers of drafts",
                    "decode one prompt at a time",
                )  # fmt: skip
        for name, value in model_kwargs.items():
            filled = name == "past_key_values" and value is not None and value.get_seq_length() > 0
            if filled or (isinstance(value, Tensor) and name not in ("attention_mask", "position_ids")):
                raise NotApplicable(name, type(value).__name__, "belongs to one reader", "leave it out")
        new = generation_config.max_length - input_ids.shape[1]
        texts = {
            "target": Stream(model, input_ids, model_kwargs.get("attention_mask")),
            "drafter": Stream(self.drafter or model, drafter_input_ids, drafter_attention_mask),
        }
        # The last new token is read as well where it was drafted, hence one position more.
        texts = {name: checked([stream], new + 1)[0] for name, stream in texts.items()}
        kept = {} if readers is None else readers
        for name, stream in texts.items():
            if name not in kept or kept[name].model is not stream.model:
                cached = generation_config.use_cache is not False
                kept[name] = Reader(stream.model, use_cache=cached, chunk=self.prefill_tokens)
            kept[name].start(stream.input_ids)
        offset = texts["target"].input_ids.shape[1]
        rounds: list[Round] = []
        scores: list[Tensor] = []

        def given(text: Tensor) -> Tensor:
            """The text as processors and criteria expect it: after the prompt as prepared, padding included."""
            return torch.cat([input_ids, text[:, offset:].to(input_ids.device)], dim=1)

        def on_round(made: Round, z: Tensor) -> None:
            if trace is not None:
                facts = [(origin, len(rounds), made.drafted) for origin in made.origins]
                trace.extend(tuple(torch.tensor([fact]) for fact in row) for row in facts)
            rounds.append(made)
            scores.extend(z[:, None])
            if on_tokens is not None:
                on_tokens(torch.tensor(made.tokens, device=input_ids.device))

        rule = self.verify_fn or partial(verify, eta=self.eta, tail=self.tail)
        speculate(
            kept["target"], kept["drafter"], rule, gamma=self.gamma,
            stop=lambda text, last: bool(stopping_criteria(given(text), (last,)).any()),
            do_sample=bool(generation_config.do_sample),
            processors=lambda text, last: logits_processor(given(text), last),
            width=width, generator=generator, on_round=on_round,
        )  # fmt: skip
        sequences = given(kept["target"].ids)
        if not generation_config.return_dict_in_generate:
            return sequences
        shown = scores if generation_config.output_scores else []
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(shown) or None)

    def _prompts(self) -> Prompts:
        """The writer of prompts, once every setting has been checked."""
        _check(eta=self.eta, tail=self.tail, gamma=self.gamma, prefill_tokens=self.prefill_tokens)
        if isinstance(self.retriever, ChunkRetriever):
            self.retriever.check()
        prompts = Prompts(self.tokenizer, self.prompt, self.chat, self.system)
        prompts.check()
        return prompts

    def _width(self, target: PreTrainedModel) -> int | None:
        """How many tokens both models score."""
        wide, own = vocabulary_of(target), vocabulary_of(self.drafter or target)
        if self.drafter_tokenizer is not None:
            check_vocabularies([self.tokenizer, self.drafter_tokenizer])
        if wide == own:
            return wide
        known = max(self.tokenizer.get_vocab().values()) + 1
        if self.drafter_tokenizer is None or wide is None or own is None or min(wide, own) < known:
            raise IncompatibleModels(
                "drafter", type(self.drafter).__name__, f"scores {own} tokens where the target scores {wide}",
                "use models of one vocabulary; where the rest is padding, give drafter_tokenizer as well",
            )  # fmt: skip
        return min(wide, own)
