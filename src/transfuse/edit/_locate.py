"""Causal tracing: which blocks carry what a model knows about a subject (arXiv 2202.05262, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.generate import target_matches
from ..core.taps import capture, decoder_layers, replace
from ..core.training import generator
from ._base import check_facts
from ._contexts import encode, subject_end, subject_token
from ._layers import check_number, down_projection, still

__all__ = ["Located", "locate"]


@dataclass(frozen=True)
class Located:
    """Result of `locate`.

    Attributes:
        layers: For each block, how much of the answer's probability comes back when this block (and its window)
            is restored: the average indirect effect, in [-1, 1].
        total: Average total effect: the probability lost by corrupting the subject.
        used: Facts that were traced, those the model knows.
        skipped: Facts it does not know.
    """

    layers: tuple[float, ...]
    total: float
    used: int
    skipped: int

    @property
    def best(self) -> int:
        """The block with the largest effect."""
        return max(range(len(self.layers)), key=self.layers.__getitem__)


@torch.no_grad()
def locate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    *,
    kind: Literal["mlp", "hidden"] = "mlp",
    window: int | None = None,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    module: str | None = None,
    batch_size: int = 64,
) -> Located:
    """Trace where facts are recalled: corrupt the subject, restore one place, see how much of the answer returns.

    Gaussian noise is added to the embeddings of the subject's tokens. In each of `samples` corrupted passes,
    the state at the subject's last token is put back to its clean value, block by block; the effect of a block is
    the answer's probability then minus that of the corrupted pass. The answer is a fact's `ground_truth`,
    or its `target` where there is none; facts whose answer is not the model's own are skipped.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer (fast).
        facts: What to trace; some tens give a clear picture.
        kind: Restore the MLPs' outputs ("mlp"), or the whole residual stream ("hidden").
        window: Blocks restored together, around each (an even number has one more below it than above, as published);
            None for a fifth of the depth ("mlp") or 1 ("hidden").
        noise: Standard deviation of the noise, in standard deviations of the subjects' embeddings.
        samples: Corrupted passes per fact.
        seed: Of the noise.
        module: Name of the MLP's down-projection inside a block, where it cannot be guessed.
        batch_size: Rows per forward pass.

    Raises:
        BadInput: wrong facts or arguments; or the model knows none of the facts.
    """
    check_facts(facts)
    if kind not in ("mlp", "hidden"):
        raise BadInput("kind", kind, "is unknown", 'use "mlp" or "hidden"')
    blocks = decoder_layers(model)
    if window is None:
        window = max(1, round(len(blocks) * 10 / 48)) if kind == "mlp" else 1  # the paper's 10 of 48
    for name, value in (("window", window), ("samples", samples), ("batch_size", batch_size)):
        check_number(name, value, least=1, whole=True)
    check_number("noise", noise, least=0, above=True)
    places = (
        [down_projection(model, i, module) for i in range(len(blocks))] if kind == "mlp" else list(blocks)
    )
    answers = [fact.ground_truth or fact.target for fact in facts]
    with still(model):
        hits = target_matches(model, tokenizer, [fact.prompt for fact in facts], answers)
        known = [
            _encode(tokenizer, fact, answer)
            for fact, answer, hit in zip(facts, answers, hits, strict=True)
            if bool(hit.all())
        ]
        if not known:
            raise BadInput(
                "facts", f"{len(facts)} facts", "are none that the model knows", "give facts it answers right"
            )
        deviation = noise * float(
            torch.cat([_embedded(model, ids)[first : last + 1] for ids, first, last, _ in known]).std()
        )
        random = generator(seed, model.device)
        tracer = _Tracer(model, places, window, deviation, samples, batch_size, random)
        effects = torch.stack([tracer.trace(*one) for one in known])
    mean = effects.mean(0)
    return Located(tuple(mean[:-1].tolist()), float(mean[-1]), len(known), len(facts) - len(known))


def _encode(
    tokenizer: PreTrainedTokenizerBase, fact: Fact, answer: str
) -> tuple[list[int], int, int, list[int]]:
    """Tokens read, first and last token of the subject, tokens of the answer."""
    before, after, text = encode(tokenizer, fact.prompt, answer)
    end = subject_end(fact)
    last = subject_token(tokenizer, text, end, before)
    first = subject_token(tokenizer, text, end - len(fact.subject.strip()) + 1, before, first=True)
    return before + after[:-1], first, last, after


def _embedded(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float()


@dataclass
class _Tracer:
    model: PreTrainedModel
    places: list[str]
    window: int
    deviation: float
    samples: int
    batch_size: int
    random: torch.Generator

    def trace(self, ids: list[int], first: int, last: int, answer: list[int]) -> torch.Tensor:
        """Indirect effect of each place, then the total effect: `[L + 1]` float64."""
        count = len(self.places)
        # The model goes on with copies: some (falcon) add the attention's output to the MLP's in place.
        with (
            capture(self.model, self.places) as clean,
            replace(self.model, dict.fromkeys(self.places, torch.clone)),
        ):
            whole = self.score(ids, 1, answer)
        kept = torch.stack([clean[place].reshape(len(ids), -1)[last] for place in self.places])
        width = self.model.get_input_embeddings().weight.shape[1]
        shape = (self.samples, last + 1 - first, width)
        noise = self.deviation * torch.randn(*shape, generator=self.random, device=kept.device)
        embeddings = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings())
        low = torch.arange(count) - self.window // 2
        probabilities = []
        # Job j restores the window around place j; the last job restores nothing.
        jobs = [(j, s) for j in range(count + 1) for s in range(self.samples)]
        for i in range(0, len(jobs), self.batch_size):
            part = jobs[i : i + self.batch_size]
            chosen = noise[[s for _, s in part]]

            def corrupt(value: torch.Tensor, chosen: torch.Tensor = chosen) -> torch.Tensor:
                value = value.clone()
                value[:, first : last + 1] += chosen.to(value.dtype)
                return value

            changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {embeddings: corrupt}
            for number, place in enumerate(self.places):
                rows = [
                    r
                    for r, (j, _) in enumerate(part)
                    if j < count and 0 <= number - int(low[j]) < self.window
                ]
                if rows:
                    changes[place] = _restore(rows, last, kept[number], len(part))
            with replace(self.model, changes):
                probabilities.append(self.score(ids, len(part), answer))
        restored = torch.cat(probabilities).unflatten(0, (count + 1, self.samples)).mean(1)
        corrupted = restored[-1]
        return torch.cat([restored[:-1] - corrupted, whole - corrupted])

    def score(self, ids: list[int], rows: int, answer: list[int]) -> torch.Tensor:
        """Probability of the whole answer in each of `rows` equal rows, float64 `[rows]`."""
        batch = torch.tensor([ids], device=self.model.device).expand(rows, -1)
        out = self.model(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            use_cache=False,
            logits_to_keep=len(answer),
        )
        logs = out.logits[:, -len(answer) :].double().log_softmax(-1)
        gold = torch.tensor(answer, device=logs.device).expand(rows, -1)
        return logs.gather(-1, gold[..., None])[..., 0].sum(-1).exp()


def _restore(
    rows: list[int], token: int, state: torch.Tensor, count: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put `state` at `token` of some of the `count` rows."""

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.view(count, -1, value.shape[-1])[rows, token] = state  # OPT's MLP gives [B T, width]
        return value

    return put
