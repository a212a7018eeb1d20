"""Two readers of one answer: a drafter writes a few tokens ahead, the target reads them in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.streams import vocabulary_of
from transfuse.steer._texts import Steered

__all__ = [
    "ACCEPTED", "BONUS", "REPLACED", "Reader", "Round", "Speculated", "Verdict", "VerifyFn", "round_flops",
    "speculate",
]  # fmt: skip

ACCEPTED, REPLACED, BONUS = 0, 1, 2
"""Where a token comes from: a draft, a rejected draft's place, or the target after a round without rejection."""


class Verdict(NamedTuple):
    """What a round comes to, for each of B rounds.

    Attributes:
        accepted: `[B]` int64, how many drafts are accepted, from the first on.
        token: `[B]` int64, the token that follows them.
    """

    accepted: Tensor
    token: Tensor


class VerifyFn(Protocol):
    """Decides how many drafts of a round stay, and what follows them.

    Takes drafts `[B, n]`, their distributions q `[B, n, V]` and the target's scores z `[B, n + 1, V]`, both
    after the warpers and at temperature 1; with `do_sample=False` without chance.
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, z: Tensor, *, do_sample: bool, generator: torch.Generator | None
    ) -> Verdict: ...


class Round(NamedTuple):
    """One round of drafting and verifying.

    Attributes:
        tokens: What it added to the answer.
        origins: For each of them `ACCEPTED`, `REPLACED` or `BONUS`.
        drafted: How many tokens were drafted.
    """

    tokens: list[int]
    origins: list[int]
    drafted: int


class Speculated(NamedTuple):
    """An answer and how it came about.

    Attributes:
        text: The answer.
        tokens: `[T]` int64, the end token included where there is one.
        origins: `[T]` int64: 0 an accepted draft, 1 in place of a rejected one, 2 after a round of accepted drafts.
        rounds: Passes of the target after its prompt; without drafts it takes one per token.
        drafted: Tokens drafted.
        prompt_tokens: Of the whole prompt, and of the drafter's.
    """

    text: str
    tokens: Tensor
    origins: Tensor
    rounds: int
    drafted: int
    prompt_tokens: tuple[int, int]

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; NaN where none was drafted."""
        return int((self.origins == ACCEPTED).sum()) / self.drafted if self.drafted else math.nan

    @property
    def passes_per_token(self) -> float:
        """Target passes per token of the answer."""
        return self.rounds / len(self.tokens)

    @classmethod
    def of(cls, steered: Steered, prompt: int, short: int) -> Speculated:
        """From an answer whose trace holds each token's origin, its round, and the tokens drafted in that."""
        origins, numbers, drafted = steered.trace
        first = numbers.diff(prepend=numbers.new_tensor([-1])) > 0  # a round's first token
        return cls(
            steered.text,
            steered.tokens,
            origins,
            int(first.sum()),
            int(drafted[first].sum()),
            (prompt, short),
        )


class Reader:
    """A model and the one text it reads, with the cache of what it has read.

    The cache holds every layer at full length, sliding windows included: what is taken back may uncover
    tokens that had left the window. Attention masks keep the windows.

    Args:
        model: A causal language model.
        use_cache: False reads the whole text at each call, for verification.
        chunk: Most tokens of a long text read in one pass.

    Raises:
        NotApplicable: a model whose state cannot be taken back, a recurrent one.
    """

    def __init__(self, model: PreTrainedModel, *, use_cache: bool = True, chunk: int = 2048):
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if strange := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            name = min(kind.__name__ for kind in strange)
            raise NotApplicable(
                "model", type(model).__name__, f"keeps a state ({name}) from which drafts cannot be taken back",
                "use a model with plain or sliding-window attention",
            )  # fmt: skip
        self.model, self.use_cache, self.chunk = model, use_cache, chunk
        self.width = vocabulary_of(model)
        self.ids = torch.empty((1, 0), dtype=torch.long, device=next(model.parameters()).device)
        self._keeps = model._supports_logits_to_keep()
        self._cache = DynamicCache()
        self._read = 0

    def start(self, ids: Tensor) -> None:
        """Turn to another text `[1, T]`; of the last one, what both begin with stays read.

        The new text's last token is read again at least, as nothing else is kept of its logits.
        """
        ids = ids.to(self.ids.device)
        width = min(ids.shape[1], self.ids.shape[1])
        differs = (ids[:, :width] != self.ids[:, :width]).nonzero()
        self.cut(min(int(differs[0, 1]) if len(differs) else width, ids.shape[1] - 1))
        self.ids = ids

    def append(self, tokens: Tensor) -> None:
        """Add tokens `[1, n]` to the text."""
        self.ids = torch.cat([self.ids, tokens.to(self.ids.device)], dim=1)

    def cut(self, length: int) -> None:
        """Take back what comes after the first `length` tokens."""
        self.ids = self.ids[:, :length]
        if self._read > length:
            self._cache.crop(length - self._read)
            self._read = length

    def logits(self, keep: int) -> Tensor:
        """Logits `[1, keep, V]` in float32 at the last `keep` tokens, none of which may have been read."""
        length = self.ids.shape[1]
        if not self.use_cache:
            return self._forward(0, length, keep)
        while length - self._read > max(self.chunk, keep):
            self._forward(self._read, min(self._read + self.chunk, length - keep), 1)
        return self._forward(self._read, length, keep)

    def _forward(self, start: int, stop: int, keep: int) -> Tensor:
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        if self.use_cache:
            options["past_key_values"] = self._cache
        output = self.model(input_ids=self.ids[:, start:stop], use_cache=self.use_cache, **options)
        self._read = stop if self.use_cache else 0
        return output.logits[:, -keep:].float()


@torch.no_grad()
def speculate(
    target: Reader,
    drafter: Reader,
    verify_fn: VerifyFn,
    *,
    gamma: int,
    stop: Callable[[Tensor, Tensor], bool],
    do_sample: bool = False,
    processors: Callable[[Tensor, Tensor], Tensor] = lambda text, scores: scores,
    width: int | None = None,
    generator: torch.Generator | None = None,
    on_round: Callable[[Round, Tensor], Any] | None = None,
) -> list[Round]:
    """Write on from the readers' texts until `stop` says so.

    Per round the drafter writes up to `gamma` tokens, fewer if `stop` would end the answer there, and the target
    scores all of them in one pass. Both readers end at the same answer, the last token of which may be unread.

    Args:
        target: Has the long prompt as its text.
        drafter: Has the short prompt; it may be of the same model.
        verify_fn: Decides what is accepted.
        gamma: Most drafts of a round; 0 for plain decoding by the target.
        stop: From the target's text `[1, T]`, its last token new, and the scores `[1, V]` of that token to whether
            the answer ends with it.
        do_sample: Draw the drafts, and let `verify_fn` draw.
        processors: Processors and warpers, for both models: from the target's text and scores `[1, V]` to scores.
        width: How many tokens the models share; the target's vocabulary by default.
        generator: Source of draws on the target's device.
        on_round: Called after each round with it and with the target's scores `[n, V]` at its tokens.

    Returns:
        The rounds.
    """
    width, device = target.width if width is None else width, target.ids.device
    rounds: list[Round] = []
    ended = False
    while not ended:
        start, draft_start = target.ids.shape[1], drafter.ids.shape[1]
        text, qs = target.ids, []
        for _ in range(gamma):
            scores = processors(text, drafter.logits(1)[:, 0, :width].to(device))
            qs.append(scores.softmax(-1))
            token = (
                torch.multinomial(qs[-1], 1, generator=generator) if do_sample else scores.argmax(-1)[:, None]
            )
            text = torch.cat([text, token], dim=1)
            drafter.append(token)
            if stop(text, scores):
                break
        n, drafts = len(qs), text[:, start:]
        target.append(drafts)
        z = target.logits(n + 1)[..., :width]
        z = torch.stack([processors(text[:, : start + t], z[:, t]) for t in range(n + 1)], dim=1)
        q = torch.stack(qs, dim=1) if qs else z[:, :0]
        verdict = verify_fn(drafts, q, z, do_sample=do_sample, generator=generator)
        accepted, token = int(verdict.accepted), verdict.token[:, None]
        added = torch.cat([drafts[:, :accepted], token.to(device)], dim=1)
        origins = [ACCEPTED] * accepted + [REPLACED if accepted < n else BONUS]
        text = torch.cat([text[:, :start], added], dim=1)
        for t in range(accepted + 1):
            if stop(text[:, : start + t + 1], z[:, t]):
                added, origins, ended = added[:, : t + 1], origins[: t + 1], True
                break
        for reader, length in ((target, start), (drafter, draft_start)):
            reader.cut(length + min(accepted, added.shape[1]))
            reader.append(added[:, accepted:])
        rounds.append(Round(added[0].tolist(), origins, n))
        if on_round is not None:
            on_round(rounds[-1], z[0, : added.shape[1]])
    return rounds


def round_flops(
    target: int, drafter: int, length: int, retrieved: int, *, gamma: int = 10, acceptance: float = 1.0
) -> float:
    """The paper's cost model: operations of a round, over what the round yields.

    (2 gamma D L_R + gamma^2 D + 2 N (L + gamma)) / acceptance. With `drafter=0, gamma=0` it is what the model
    sets against it, 2 N L for a token of the target alone.

    Args:
        target: N, parameters of the target.
        drafter: D, parameters of the drafter.
        length: L, tokens of the whole context.
        retrieved: L_R, tokens of the retrieved context.
        gamma: Drafts per round.
        acceptance: Expected tokens a round yields.

    Raises:
        BadInput: no acceptance.
    """
    if not acceptance > 0:
        raise BadInput("acceptance", acceptance, "yields nothing", "give a number above 0")
    drafting = 2 * gamma * drafter * retrieved + gamma**2 * drafter
    return (drafting + 2 * target * (length + gamma)) / acceptance
