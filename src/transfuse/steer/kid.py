"""KID: at every token, knowledge words that the text calls for are made likelier through the KV cache.

:arxiv: 2204.03084
:moves: terms of passages -> the text being written
:access: hidden, logits
:reversible: yes
:context: no

Knowledge Infused Decoding. Passages become a trie of knowledge terms, one string per relation, its subject
first. While a frozen model writes, the last entities of the text are looked up, and the words found are this
step's knowledge K. No token is read for them: the keys and values of what was read before are moved by a few
gradient steps, so that the first tokens w_j of the words in K become likelier, on a leash of KL to what the
model would have said.

    p     = softmax(logits(x_t | C)), with C the cache of what precedes the input token x_t
    p'    = softmax(logits(x_t | C + delta))
    J     = -log sum_{j in K} p'(w_j) + kl_scale KL(p' || p)
    steps times, per row and layer:  g = dJ/d delta,  m = max(m, |g|),  delta -= step_size g / m^gamma
    next  : p'^gm_scale p^(1 - gm_scale), repeated bigrams banned, 20 best tokens, nucleus of 0.92

The perturbed cache is kept, and the new token joins it. Where K is empty the step is a plain one. A token costs
about three passes forward and backward over itself, and one more forward.

Where the published code departs from the paper's intent, the intent is followed. The code reads x_t (at first
the whole prompt) a second time, behind itself in the cache; it takes words without the space before them, which
are other tokens (`leading_space=False` does so here); it counts a token as often as words begin with it
(`count_duplicates=True`); it looks up every entity of the text and steers to words already written
(`memory=10**9, limit=None, drop_written=False`); without knowledge it steers to the end token; its nucleus
removes next to nothing (`top_p=1.0`). Its relations come from open information extraction, its nouns from
spaCy; without those, a sentence is one relation and a noun is what is no stop word (`spacy_nouns` brings a
tagger, `KnowledgeTrie(strings)` takes relations made elsewhere).

    model, tokenizer = transfuse.load("smollm2-135m")
    trie = KnowledgeTrie.from_passages("Vaccines train the immune system with weakened germs.")
    KID(model, tokenizer, trie).generate("How do vaccines work? They", max_new_tokens=16)
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.metrics import perplexity
from transfuse.core.streams import Stream, check_generation, checked, copies, unpadded
from transfuse.steer._base import Combining
from transfuse.steer._cache_update import Infused, Reading, Targets, infuse, objective
from transfuse.steer._knowledge import Extractor, KnowledgeTrie, Source, TokenFinder, nouns, spacy_nouns
from transfuse.steer._texts import Prompts, Steered, answer, paired

__all__ = [
    "KID",
    "Infused",
    "KnowledgeTrie",
    "Source",
    "Targets",
    "TokenFinder",
    "geometric_mean",
    "infuse",
    "nouns",
    "objective",
    "spacy_nouns",
]


def geometric_mean(plain: Tensor, updated: Tensor, *, gm_scale: float = 0.99) -> Tensor:
    """Logits of the distribution proportional to p_updated^gm_scale p_plain^(1 - gm_scale).

    Args:
        plain: `[..., V]` logits.
        updated: `[..., V]` logits.
        gm_scale: Weight of `updated`, 0 to 1.

    Returns: `[..., V]`, at least float32; a token that either rules out (-inf) is ruled out.
    """
    if gm_scale in (0, 1):
        return updated.float() if gm_scale else plain.float()  # 0 times infinity
    return gm_scale * updated.float() + (1 - gm_scale) * plain.float()


class KID(Combining):
    """Text that takes up the terms of a knowledge source.

    As `model.generate(**inputs, custom_generate=KID(model, tokenizer, trie))` it takes the generation settings
    given there; those below are what its own `generate` asks for.

    Args:
        model: A causal language model with plain or sliding-window attention; it is not changed.
        tokenizer: Its tokenizer.
        trie: The knowledge; None: `generate` builds one per query from its context.
        steps: Gradient steps per token; 0 decodes plainly.
        step_size: eta. The paper's 0.01 is mild for models of the Llama kind; up to 0.1 is worth trying.
        kl_scale: lambda, the weight of KL; 0 steers as a bag of words does.
        gamma: Exponent of the gradient's norm.
        gm_scale: Weight of the updated distribution in the geometric mean.
        hops: How often words found are looked up in turn.
        memory: How many distinct entities of the text are looked up, those mentioned last.
        limit: Largest size of K, the most frequent words; None for no limit.
        drop_written: Leave out words that the text already holds.
        leading_space: Take words as they stand in running text; False as in the published code.
        count_duplicates: Count a token as often as words begin with it, as in the published code.
        extractor: Entities of a text, for tries built from contexts; `nouns` by default.
        no_repeat_ngram_size: Ban n-grams that the text already holds; 0 for none.
        repetition_penalty: 1 for none.
        temperature: When sampling.
        top_k: When sampling; 0 for all.
        top_p: When sampling; 1 for all.
        chat: Put queries into the tokenizer's chat template.
        system: System message of the chat.
    """

    streams = 2

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        trie: KnowledgeTrie | None = None,
        *,
        steps: int = 3,
        step_size: float = 0.01,
        kl_scale: float = 0.01,
        gamma: float = 1.5,
        gm_scale: float = 0.99,
        hops: int = 1,
        memory: int = 16,
        limit: int | None = 64,
        drop_written: bool = True,
        leading_space: bool = True,
        count_duplicates: bool = False,
        extractor: Extractor | None = None,
        no_repeat_ngram_size: int = 2,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 20,
        top_p: float = 0.92,
        chat: bool = False,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.trie = model, tokenizer, trie
        self.steps, self.step_size, self.kl_scale, self.gamma = steps, step_size, kl_scale, gamma
        self.gm_scale, self.hops, self.memory, self.limit = gm_scale, hops, memory, limit
        self.drop_written, self.leading_space = drop_written, leading_space
        self.count_duplicates, self.extractor = count_duplicates, extractor
        self.no_repeat_ngram_size, self.repetition_penalty = no_repeat_ngram_size, repetition_penalty
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.chat, self.system = chat, system

    def neutral(self) -> KID:
        """A copy that makes no step and keeps every token: the plain model, greedy or sampling."""
        plain = copy.copy(self)
        plain.steps, plain.no_repeat_ngram_size, plain.repetition_penalty = 0, 0, 1.0
        plain.temperature, plain.top_k, plain.top_p = 1.0, 0, 1.0
        return plain

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores `[B, V]` from the plain logits and the updated ones, see `geometric_mean`."""
        return geometric_mean(logits[0], logits[1], gm_scale=self.gm_scale)

    def generate(
        self,
        queries: str | Sequence[str],
        contexts: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        details: bool = False,
        candidates: int = 1,
        **generation: Any,
    ) -> str | Steered | list[str] | list[Steered]:
        """Continue each query.

        Args:
            queries: One text or several.
            contexts: Per query a passage or several, from which its trie is built if the instance has none;
                the model does not read them. One that names nothing leaves its query to plain decoding, with
                a warning.
            max_new_tokens: Per answer.
            batch_size: Queries decoded together.
            details: Return `Steered` in place of text. Its trace holds per token: size of K in tokens, J
                before and after the update (NaN without K), probability of K before and after.
            candidates: Answers drawn per query, of which the plain model's perplexity picks one.
            **generation: For `__call__` (`generator`, `on_tokens`) or transformers' `generate`, over the
                instance's settings; greedy by default, `do_sample=True` as in the paper.

        Returns:
            One answer for one query given as text, else a list in the order given.

        Raises:
            BadInput: neither trie nor contexts, lists that do not pair, an argument out of range, a prompt of
                one token or of too many, candidates without sampling.
            NotApplicable: beams, assisted decoding, a cache that cannot be perturbed.
        """
        prompts = self._prompts()
        if candidates < 1 or (candidates > 1 and not generation.get("do_sample")):
            raise BadInput("candidates", candidates, "cannot be drawn", "give 1, or more with do_sample=True")
        texts, sources = self._sources(queries, contexts)
        options = {n: getattr(self, n) for n in ("no_repeat_ngram_size", "repetition_penalty")}
        if generation.get("do_sample"):
            options |= {n: getattr(self, n) for n in ("temperature", "top_k", "top_p")}
        rows = [(prompts.encode(text, "")[0], [i]) for i, text in enumerate(texts)]
        drawn = [
            answer(
                functools.partial(self, sources=sources), self.model, self.tokenizer, rows, extra=["source"],
                batch_size=batch_size, max_new_tokens=max_new_tokens, **options | generation,
            )
            for _ in range(candidates)
        ]  # fmt: skip
        answers = drawn[0]
        if candidates > 1:
            surprise = functools.partial(perplexity, self.model, self.tokenizer, window=2**30)
            answers = [
                min(found, key=lambda a: surprise([*prompt, *a.tokens.tolist()]))  # in one window
                for (prompt, _), found in zip(rows, zip(*drawn))
            ]
        results = answers if details else [a.text for a in answers]
        return results[0] if isinstance(queries, str) else results

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        sources: Sequence[Source] | None = None,
        source_input_ids: Tensor | None = None,
        source_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[Tensor], Any] | None = None,
        trace: list[tuple[Tensor, ...]] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared.

        Args:
            model: The model that generates.
            input_ids: `[B, T]` prompts, as prepared.
            logits_processor: As prepared; they act on the geometric mean.
            stopping_criteria: As prepared.
            generation_config: As prepared.
            sources: What rows draw on; None: the instance's trie, and the prompt.
            source_input_ids: `[B, 1]` int64, which of `sources` a row draws on; None: each on its own.
            source_attention_mask: All ones.
            generator: Source of draws when sampling.
            on_tokens: Called with the new tokens `[B]` of each step.
            trace: Receives per step the tensors `[B]` that `generate` describes under `details`.
            **model_kwargs: As prepared.
        """
        self._prompts()
        check_generation(generation_config)
        if (beams := generation_config.num_beams or 1) > 1:
            problem = "would need perturbed caches that follow the beams"
            raise NotApplicable("num_beams", beams, problem, "decode greedily or sample")
        for name, value in model_kwargs.items():
            filled = name == "past_key_values" and value is not None and value.get_seq_length() > 0
            if filled or (isinstance(value, Tensor) and name not in ("attention_mask", "position_ids")):
                remedy = "give token ids and mask alone"
                raise NotApplicable(name, type(value).__name__, "is not read by this method", remedy)
        if sources is None:
            if self.trie is None:
                raise BadInput("trie", None, "is missing", "give one, or call generate with contexts")
            sources = [Source(self.trie)] * input_ids.shape[0]
        if source_input_ids is not None:
            taken = source_input_ids[:, 0].repeat_interleave(copies(generation_config))
            sources = [sources[i] for i in taken.tolist()]
        with torch.inference_mode(False), torch.no_grad():
            # Tensors made in inference mode cannot take part in a graph: the loop works on copies.
            mask = model_kwargs.get("attention_mask")
            prompts = Stream(model, input_ids.clone(), None if mask is None else mask.clone())
            return self._decode(
                prompts, sources, logits_processor, stopping_criteria, generation_config,
                generator=generator, on_tokens=on_tokens, trace=trace,
            )  # fmt: skip

    def _decode(
        self,
        prompts: Stream,
        sources: Sequence[Source],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        *,
        generator: torch.Generator | None,
        on_tokens: Callable[[Tensor], Any] | None,
        trace: list[tuple[Tensor, ...]] | None,
    ) -> Any:
        """The loop: rows end one by one and are padded, as in `core.lockstep.decode`."""
        new_tokens = config.max_length - prompts.input_ids.shape[1]
        stream = checked([prompts], new_tokens)[0]
        read = unpadded(stream)
        for ids in read:
            if len(ids) < 2:
                raise BadInput("prompt", ids, "has one token, hence no cache to perturb", "give two or more")
        mask = torch.ones_like(stream.input_ids) if stream.attention_mask is None else stream.attention_mask
        reading = Reading(stream.model, stream.input_ids, mask, use_cache=config.use_cache is not False)
        names = ("hops", "memory", "limit", "drop_written", "leading_space")
        finder = TokenFinder(self.tokenizer, **{n: getattr(self, n) for n in names})
        settings = {n: getattr(self, n) for n in ("steps", "step_size", "kl_scale", "gamma")}
        padding = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        sequence, kept = prompts.input_ids, []
        unfinished = torch.ones_like(sequence[:, 0], dtype=torch.bool)
        written: list[list[int]] = [[] for _ in read]
        for _ in range(new_tokens):
            rows = [
                finder(source, ids, new) if going else {}
                for source, ids, new, going in zip(sources, read, written, unfinished.tolist())
            ]
            targets = Targets.of(rows, stream.input_ids.device, counted=self.count_duplicates)
            found = reading.step(targets, **settings)
            if trace is not None:
                masses = [
                    torch.where(targets.active, targets.mass(z), 0) for z in (found.plain, found.logits)
                ]
                trace.append(((targets.weights > 0).sum(1), found.before, found.after, *masses))
            joined = self.combine([found.plain, found.logits])
            joined = torch.where(targets.active[:, None], joined, found.plain).to(sequence.device)
            scores = processors(sequence, joined)
            if config.output_scores:
                kept.append(scores)
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            else:
                tokens = scores.argmax(-1)
            tokens = torch.where(unfinished, tokens, padding)
            sequence = torch.cat([sequence, tokens[:, None]], dim=1)
            for new, token in zip(written, tokens.tolist()):
                new.append(token)
            if on_tokens is not None:
                on_tokens(tokens)
            unfinished = unfinished & ~criteria(sequence, (scores,))
            if not bool(unfinished.any()):
                break
            reading.append(tokens)
        if not config.return_dict_in_generate:
            return sequence
        return GenerateDecoderOnlyOutput(sequences=sequence, scores=tuple(kept) or None)

    def _sources(
        self, queries: str | Sequence[str], contexts: str | Sequence[str] | Sequence[Sequence[str]] | None
    ) -> tuple[list[str], list[Source]]:
        """Queries as a list, each with what it draws on."""
        texts: list[str] = [queries] if isinstance(queries, str) else list(queries)
        if self.trie is None and contexts is None:
            raise BadInput("contexts", None, "is missing, and there is no trie", "give passages or a trie")
        given: Any = [""] * len(texts) if contexts is None else contexts
        pairs = paired(
            texts, "contexts", [given] if isinstance(queries, str) and contexts is not None else given
        )
        topics = [text if self.chat else None for text in texts]
        if self.trie is not None:
            return texts, [Source(self.trie, topic) for topic in topics]
        sources = []
        for (_, passages), topic in zip(pairs, topics):
            try:
                trie = KnowledgeTrie.from_passages(passages, self.extractor)
            except BadInput:
                trie = None
            sources.append(Source(trie, topic))
        if count := sum(source.trie is None for source in sources):
            message = f"no knowledge in {count} of {len(texts)} contexts: decoded plainly"
            warnings.warn(message, stacklevel=3)
        return texts, sources

    def _prompts(self) -> Prompts:
        """The writer of prompts, once every setting has been checked."""
        ranges = [
            ("steps", self.steps >= 0, "give 0 or more"),
            ("step_size", 0 < self.step_size < math.inf, "give a number above 0; the paper uses 0.01"),
            ("kl_scale", 0 <= self.kl_scale < math.inf, "give 0 or more; the paper uses 0.01"),
            ("gamma", 0 <= self.gamma < math.inf, "give 0 or more; the paper uses 1.5"),
            ("gm_scale", 0 <= self.gm_scale <= 1, "give a number from 0 to 1"),
            ("hops", self.hops >= 1, "give 1 or more"),
            ("memory", self.memory >= 1, "give 1 or more"),
            ("limit", self.limit is None or self.limit >= 1, "give 1 or more, or None"),
        ]
        for name, right, remedy in ranges:
            if not right:
                raise BadInput(name, getattr(self, name), "is out of range", remedy)
        prompts = Prompts(self.tokenizer, "{context}{query}", self.chat, self.system)
        prompts.check()
        return prompts
