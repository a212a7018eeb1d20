"""SPARKLE: questions become SPARQL queries that name only what a knowledge graph has and links.

:arxiv: 2407.01626
:moves: a knowledge graph -> the decoding of queries about it
:access: logits
:reversible: yes
:context: no
:extra: graph

A language model is trained to turn a question into a query, written as one line with names in place of IRIs:

    SELECT DISTINCT var_uri WHERE brack_open [ paris (city) ] [ country ] var_uri brack_close

While it writes, the graph says at every token what may follow: in place of a head only names of entities that have
relations, after it only relations of that head, after a variable and a relation only variables and tails of that
relation. All else gets the score -inf; beam search goes on as ever. Queries so written name what exists, and the
graph can be another one than in training. The beams are run on the graph in turn, and the first with an answer is
taken, else the first that ran. ASK queries may name anything, for a false triple must be expressible too. What a
variable stands for is not passed on: bound in one triple, it is free in the next.

    before WHERE   variables, COUNT and parentheses, each once
    head           variable, entity with relations (after a dot also FILTER)
    relation       head an entity: its relations; head a variable: relations with an entity as tail
    tail           head an entity: variable; head a variable: variable, tails of the relation
    triple ready   dot, closing bracket;  after the query: ORDER BY, end
    in a FILTER    anything but ORDER BY, relations as names

`mode="retrieval"` knows the names without the links, "syntax" the grammar without the names, "none" is the plain
model. `grammar="strict"` leaves out the free parts, so that every finished query runs. Differences: the published
scorer grants the gold answers to a query that equals the gold one, here everything is run; counts are read from the
only binding, as DISTINCT where the form says so; a name that two relations share gets its IRI, as with entities; a
filter goes on after a group inside it.

    index = KGIndex.from_store(store, tokenizer)
    Sparkle(model, tokenizer, index, store).answer("In which country is Paris?").answers
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from transfuse.core.batches import IGNORED
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.generate import check_length, pad_batch, pad_id_of
from transfuse.steer._answer_file import answer_questions
from transfuse.steer._answers import (
    QueryResult,
    Scores,
    answer_f1,
    execute,
    first_answered,
    hits_at_1,
    score,
)
from transfuse.steer._base import Steer
from transfuse.steer._flat_sparql import linearise, to_sparql
from transfuse.steer._graph_constraint import GraphConstraint, SparqlConstraint
from transfuse.steer._graph_index import RDF_TYPE, KGIndex, Text
from transfuse.steer._graph_tokens import QueryTokens, add_query_tokens, extend
from transfuse.steer._texts import batches

__all__ = [
    "RDF_TYPE",
    "GraphConstraint",
    "KGIndex",
    "QueryResult",
    "QueryTokens",
    "Scores",
    "Sparkle",
    "SparqlConstraint",
    "Text",
    "add_query_tokens",
    "answer_f1",
    "answer_questions",
    "execute",
    "extend",
    "hits_at_1",
    "linearise",
    "score",
    "start_of",
    "to_sparql",
]

Mode = Literal["full", "retrieval", "syntax", "none"]
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


def start_of(model: PreTrainedModel, prompt_length: int) -> int:
    """How many tokens of a row precede the query: `start` of a constraint for this model.

    Args:
        model: Decoder-only, or encoder-decoder.
        prompt_length: Tokens of the prompt with its padding; of no meaning for an encoder-decoder model, whose rows
            begin with a start token and, if the model forces it, a second one.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return prompt_length
    return 1 if model.generation_config.forced_bos_token_id is None else 2


class Sparkle(Steer):
    """Questions answered by queries that the graph helps to write.

    As `model.generate(**inputs, custom_generate=sparkle)` it constrains greedy search, sampling and beam search.

    Args:
        model: Trained to write flat queries, decoder-only or encoder-decoder; it is not changed.
        tokenizer: Its tokenizer, which knows the words of the query language (`extend`).
        index: The graph's names and links, made with this tokenizer.
        store: The graph, a `pyoxigraph.Store`; None if queries are written only.
        beams: Queries tried per question.
        mode: "full", "retrieval", "syntax" or "none", see above.
        grammar: "paper" or "strict", see `SparqlConstraint`.
        max_triples: Most triples of a group.
        prompt: How a question is put to a decoder-only model.

    Attributes:
        constraint: The `SparqlConstraint`; its `fallbacks` count dead ends. None in mode "none".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: KGIndex,
        store: Any = None,
        *,
        beams: int = 10,
        mode: Mode = "full",
        grammar: Literal["paper", "strict"] = "paper",
        max_triples: int | None = None,
        prompt: str = "{question}",
    ):
        self.model, self.tokenizer, self.index, self.store = model, tokenizer, index, store
        self.beams, self.mode, self.grammar = beams, mode, grammar
        self.max_triples, self.prompt = max_triples, prompt
        self.constraint = (
            None
            if mode == "none"
            else SparqlConstraint(index, mode=mode, grammar=grammar, max_triples=max_triples)
        )

    def neutral(self) -> Sparkle:
        """A copy without constraint."""
        plain = copy.copy(self)
        plain.mode, plain.constraint = "none", None
        return plain

    # --- training ---------------------------------------------------------------------------------------------

    def examples(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, list[int]]]:
        """Rows for `core.training.fit`: question and SPARQL query to ids and labels, the prompt masked.

        Raises:
            BadInput: a query that cannot be linearised (see `linearise`).
        """
        rows = []
        for question, sparql in pairs:
            prompt = self._encode(question)
            target = self.index.tokens.encode(self.tokenizer, linearise(sparql, self.index))
            target = [*target, self.index.tokens.eos]
            if self.model.config.is_encoder_decoder:
                rows.append({"input_ids": prompt, "labels": target})
            else:
                rows.append(
                    {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target},
                )
        return rows

    # --- answering --------------------------------------------------------------------------------------------

    def answer(
        self,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        **generation: Any,
    ) -> QueryResult | list[QueryResult]:
        """Write queries by beam search and run them.

        Args:
            questions: One or several.
            max_new_tokens: Most tokens of a query.
            batch_size: Questions decoded together, `beams` rows each.
            **generation: For transformers' `generate`.

        Returns:
            One result for a question given as text, else a list in the order given.

        Raises:
            BadInput: no store, no question, an argument out of range, a prompt too long.
        """
        if self.store is None:
            raise BadInput("store", None, "is missing", "give the graph that answers the queries")
        if self.beams < 1:
            raise BadInput("beams", self.beams, "leaves no query", "give 1 or more")
        options = {"num_beams": self.beams, "num_return_sequences": self.beams} | generation
        decoded = self._decode(_listed(questions), max_new_tokens, batch_size, **options)
        end = self.index.tokens.eos  # with more beams than queries, some come back with nothing before it
        decoded = [[ids for ids in beams if ids and ids[0] != end] for beams in decoded]
        found = [first_answered(beams, self.index, self.tokenizer, self.store) for beams in decoded]
        return found[0] if isinstance(questions, str) else found

    def generate(
        self,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        **generation: Any,
    ) -> str | list[str]:
        """Write one flat query per question and run nothing; greedy by default.

        Args:
            questions: One or several.
            max_new_tokens: Most tokens of a query.
            batch_size: Questions decoded together.
            **generation: For transformers' `generate`: `num_beams`, `do_sample`, ...

        Returns:
            One text for a question given as text, else a list in the order given.

        Raises:
            BadInput: no question, a prompt too long, an index of another tokenizer.
            NotApplicable: ways to decode other than greedy search, sampling and beam search.
        """
        decoded = self._decode(_listed(questions), max_new_tokens, batch_size, **generation)
        texts = [self.index.tokens.decode(self.tokenizer, beams[0]) for beams in decoded]
        return texts[0] if isinstance(questions, str) else texts

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared.

        Args:
            model: The model that generates.
            input_ids: `[B, T]`, the prompts or the decoder's start.
            logits_processor: As prepared.
            stopping_criteria: As prepared.
            generation_config: As prepared.
            **model_kwargs: As prepared.

        Raises:
            NotApplicable: assisted decoding and other ways that do not go token by token through the scores.
        """
        kind = generation_config.get_generation_mode()
        if kind not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, *_BEAMS):
            raise NotApplicable(
                "generation mode",
                kind.value,
                "does not check every token",
                "use greedy search, beams or samples",
            )
        if generation_config.guidance_scale not in (None, 1, 1.0):
            raise NotApplicable(
                "guidance_scale", generation_config.guidance_scale, "reads a second prompt", "leave it out"
            )
        processors = LogitsProcessorList(logits_processor)
        if self.constraint is not None:
            start = start_of(model, input_ids.shape[1])
            own: list[LogitsProcessor] = [self.constraint.processor(start)]
            if kind in _BEAMS:
                own.append(_OneStart(generation_config.num_beams, start))
            processors = LogitsProcessorList([*own, *processors])  # top-k and the like choose among the rest
        decode = model._beam_search if kind in _BEAMS else model._sample
        return decode(input_ids, processors, stopping_criteria, generation_config, **model_kwargs)

    # --- parts ------------------------------------------------------------------------------------------------

    def _encode(self, question: str) -> list[int]:
        text = question if self.model.config.is_encoder_decoder else self.prompt.format(question=question)
        ids = list(self.tokenizer(text)["input_ids"])
        if not ids:
            raise BadInput("questions", question, "has no tokens", "ask something")
        return ids

    def _decode(
        self, questions: Sequence[str], max_new_tokens: int, batch_size: int, **generation: Any
    ) -> list[list[list[int]]]:
        """Per question the ids of each returned query, end token included, best first."""
        model, tokens = self.model, self.index.tokens
        coded = bool(model.config.is_encoder_decoder)
        if "{question}" not in self.prompt:
            raise BadInput("prompt", self.prompt, "lacks {question}", "say where the question goes")
        rows_known = model.get_output_embeddings().weight.shape[0]
        if self.mode != "none" and rows_known < tokens.size:
            raise BadInput(
                "model", f"{rows_known} tokens", f"knows fewer than its tokenizer's {tokens.size}",
                "call extend(model, tokenizer) and train it",
            )  # fmt: skip
        prompts = [self._encode(question) for question in questions]
        pad = pad_id_of(self.tokenizer)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        stops = self._stops()
        options |= {"pad_token_id": pad, "eos_token_id": stops, "max_new_tokens": max_new_tokens}
        if generation.get("do_sample"):
            options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        options |= generation
        each = int(options.get("num_return_sequences") or 1)
        found: list[list[list[int]]] = [[] for _ in prompts]
        for rows in batches([len(ids) for ids in prompts], batch_size):
            ids, mask = pad_batch(
                [prompts[i] for i in rows], pad, side="right" if coded else "left", device=model.device
            )
            check_length(model, ids.shape[1] + (0 if coded else max_new_tokens), "questions")
            output = model.generate(input_ids=ids, attention_mask=mask, custom_generate=self, **options)
            new = output[:, start_of(model, ids.shape[1]) :].tolist()
            for place, i in enumerate(rows):
                found[i] = [_cut(row, stops) for row in new[place * each : (place + 1) * each]]
        return found

    def _stops(self) -> list[int]:
        """Where a query ends: the tokenizer's end token, which the constraint knows, and the model's own."""
        ends = self.model.generation_config.eos_token_id
        own = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return sorted({self.index.tokens.eos, *own})


def _cut(ids: list[int], stops: Sequence[int]) -> list[int]:
    return ids[: next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))]


class _OneStart(LogitsProcessor):
    """Let the first token come from the first beam alone.

    Beam search keeps the others, which hold the same prompt, behind it by 1e9. Where a constraint leaves fewer tokens
    than beams they go on all the same, at scores that float32 no longer tells apart.
    """

    def __init__(self, beams: int, start: int):
        self.beams, self.start = beams, start

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.start:
            return scores
        surplus = torch.arange(len(scores), device=scores.device) % self.beams != 0
        return scores.masked_fill(surplus[:, None], -math.inf)


def _listed(questions: str | Sequence[str]) -> Sequence[str]:
    found = [questions] if isinstance(questions, str) else questions
    if not found:
        raise BadInput("questions", questions, "is empty", "ask something")
    return found
