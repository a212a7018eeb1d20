"""Samples for objectives that learn from what the student writes, with what is to be remembered of each token."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import IGNORED, pad_collator
from ..core.errors import BadInput
from ..core.generate import pad_batch
from ..core.lockstep import decode
from ..core.runs import check_positive, evaluating
from ..core.streams import Stream, vocabulary_of
from ._base import Reader, logits_of, model_inputs
from ._likelihood import token_log_probs
from ._policy import Policy, continued, ends_of, pad_of, prompts_of

__all__ = ["Rollouts", "at_tokens", "mixed_logits"]


def mixed_logits(student: Tensor, teacher: Tensor, alpha: float, temperature: float = 1.0) -> Tensor:
    """log(alpha p + (1 - alpha) q) of tempered next-token logits `[B, V]`."""
    log_q, log_p = (torch.log_softmax(z / temperature, dim=-1) for z in (student, teacher))
    return torch.log(alpha * log_p.exp() + (1.0 - alpha) * log_q.exp())


class Rollouts(Policy):
    """Samples for `MiniLLM`: always the student's, or the mixture's, with what is to be remembered of them.

    Beside the columns of every policy a batch gets, `[B, T]` each, `old_log_probs` and `importance` of each token when
    it was sampled, `plain`, 1 on the tokens of plain text, and, with `reward`, `bonus`.

    Args:
        teacher: For mixed sampling and of the student's vocabulary; None samples from the student alone. It is neither
            trained nor in checkpoints.
        alpha: Share of the teacher in the mixture; None for 0.2, or 0 without a teacher.
        reuse: Updates made with the same samples before new ones are drawn (PPO's inner epochs); samples are not in
            checkpoints, a resumed run draws new ones, and so does another run or student.
        reward: What a whole sample is worth, beside the teacher's likelihood: a reward model with one output, or a
            function of the batch of samples to `[B]`. It counts at the sample's last token.
        plain: Rows of plain text, learnt whole where they have no `labels`; as many as there are samples, drawn at
            random, are put below them.
        max_new_tokens: Longest continuation.
        temperature: Of the sampling, on both sides of the mixture.
        prompt_tokens: Length of the prompt in rows whose tokens are all labelled.

    Raises:
        BadInput: alpha is not a share below 1, or above 0 without a teacher; reuse below 1.
    """

    def __init__(
        self,
        teacher: Any = None,
        *,
        alpha: float | None = None,
        reuse: int = 1,
        reward: nn.Module | Callable[[Mapping[str, Any]], Tensor] | None = None,
        plain: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        prompt_tokens: int | None = None,
    ):
        super().__init__(
            fraction=1.0, max_new_tokens=max_new_tokens, temperature=temperature, prompt_tokens=prompt_tokens
        )
        share = alpha if alpha is not None else 0.0 if teacher is None else 0.2
        if not 0.0 <= share < 1.0:
            raise BadInput("alpha", alpha, "is not a share below 1", "give the teacher's share, e.g. 0.2")
        if share > 0 and teacher is None:
            raise BadInput("alpha", alpha, "is the share of a teacher that is not there", "give the teacher")
        check_positive(reuse=reuse)
        if plain is not None and len(plain) == 0:
            raise BadInput("plain", "[]", "has no rows", "give some text, or None")
        self.alpha, self.reuse, self.plain = share, reuse, plain
        self._teacher, self._reward = (teacher,), (reward,)  # in tuples, so that they are no submodules
        self._kept: list[dict[str, Any]] = []
        self._progress, self._place, self._updates = -1.0, 0, -1
        self._student: tuple[nn.Module, ...] = ()  # in a tuple, like the teacher

    def replace(self, student: nn.Module, batch: dict[str, Any], *, progress: float) -> dict[str, Any]:
        """A batch of samples; those of an earlier update again while they have uses left."""
        if progress < self._progress or self._student != (student,):  # another run
            self._kept, self._progress, self._updates, self._student = [], -1.0, -1, (student,)
        if progress != self._progress:  # the first micro-batch of an update
            self._progress, self._place, self._updates = progress, 0, self._updates + 1
            if self._updates % self.reuse == 0:
                self._kept = []
        if self._place == len(self._kept):
            self._kept.append(self.sampled(student, batch))
        self._place += 1
        return dict(self._kept[self._place - 1])

    def sampled(self, student: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh samples on the batch's prompts, with plain text below them."""
        prompts = prompts_of(batch, self.prompt_tokens)
        device = next(student.parameters()).device
        with contextlib.ExitStack() as stack:
            for model in (student, *self._teacher):
                if model is not None:
                    stack.enter_context(evaluating(model))
            found = self._drawn(student, prompts, device)
            found.update(self._remembered(student, found))
            if self._reward[0] is not None:
                found["bonus"] = self._worth(found)
        return self._with_plain(found, pad_of(student))

    def _drawn(self, student: Any, prompts: list[list[int]], device: torch.device) -> dict[str, Any]:
        pad, stops = pad_of(student), ends_of(student)
        ids, mask = pad_batch(prompts, pad, side="left")
        (teacher,) = self._teacher
        writers = [student] if teacher is None or self.alpha == 0 else [student, teacher]
        # The first stream decides the width: of truncated vocabularies, the narrower one.
        narrower = len(writers) == 2 and self.vocabulary is not None and _width(teacher) < _width(student)
        streams = []
        for model in reversed(writers) if narrower else writers:
            home = next(model.parameters()).device
            streams.append(Stream(model, ids.to(home), mask.to(home)))

        def joined(logits: list[Tensor]) -> Tensor:
            cut = [each[..., : self.vocabulary] for each in (reversed(logits) if narrower else logits)]
            if len(cut) == 1:
                return cut[0] / self.temperature
            return mixed_logits(cut[0], cut[1], self.alpha, self.temperature)

        new = decode(
            streams, joined, max_new_tokens=self.max_new_tokens, eos_token_id=sorted(stops) or None,
            pad_token_id=pad, do_sample=True,
        ).tolist()  # fmt: skip
        return continued(prompts, new, stops, pad, device)

    def _remembered(self, student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What log q of the tokens is, and q over what they were drawn from."""
        (teacher,) = self._teacher
        labels, heat = batch["labels"], self.temperature
        with torch.no_grad():
            own = Reader(student).cut(self.vocabulary)(batch, grad=False)
            old = token_log_probs(own, labels)
            source = old if heat == 1.0 else token_log_probs(own, labels, temperature=heat)
            if teacher is not None and self.alpha > 0:
                read = Reader(teacher).cut(self.vocabulary)(batch, grad=False)
                theirs = token_log_probs(read, labels, temperature=heat)
                source = torch.log(self.alpha * theirs.exp() + (1.0 - self.alpha) * source.exp())
            weight = torch.exp(old - source)
        return {"old_log_probs": at_tokens(old), "importance": at_tokens(weight, 1.0)}

    def _worth(self, batch: dict[str, Any]) -> Tensor:
        """The rewards of whole samples, each at its last token."""
        (reward,) = self._reward
        with torch.no_grad():
            if isinstance(reward, nn.Module):
                home = next(reward.parameters()).device
                inputs = {name: value.to(home) for name, value in model_inputs(reward, batch).items()}
                with evaluating(reward):
                    values = logits_of(reward(**inputs))
            else:
                assert reward is not None
                values = reward(batch)
        count = len(batch["labels"])
        if values.numel() != count:
            problem = f"gave {tuple(values.shape)} for {count} samples"
            raise BadInput("reward", type(reward).__name__, problem, "return one number per sample")
        labelled = batch["labels"] != IGNORED
        last = labelled & (labelled.flip(1).cumsum(1).flip(1) == 1)
        return last * values.reshape(count, 1).to(batch["old_log_probs"])

    def _with_plain(self, batch: dict[str, Any], pad: int) -> dict[str, Any]:
        marked = {**batch, "plain": torch.zeros_like(batch["labels"])}
        if self.plain is None:
            return marked
        chosen = [self.plain[random.randrange(len(self.plain))] for _ in range(len(batch["labels"]))]
        texts = [{"input_ids": r["input_ids"], "labels": r.get("labels", r["input_ids"])} for r in chosen]
        more = pad_collator(pad)(texts)
        device = batch["labels"].device
        below = {name: value.to(device) for name, value in more.items()}
        below["old_log_probs"] = torch.zeros_like(below["labels"], dtype=batch["old_log_probs"].dtype)
        below["importance"] = torch.ones_like(below["old_log_probs"])
        below["plain"] = torch.ones_like(below["labels"])
        if "bonus" in marked:
            below["bonus"] = torch.zeros_like(below["old_log_probs"])
        fills = {"input_ids": pad, "labels": IGNORED}
        width = max(marked["labels"].shape[1], below["labels"].shape[1])
        return {
            name: torch.cat([widened(part[name], width, fills.get(name, 0)) for part in (marked, below)])
            for name in marked
        }


def _width(model: Any) -> int:
    return vocabulary_of(model) or 0


def at_tokens(values: Tensor, first: float = 0.0) -> Tensor:
    """From `[B, T - 1]` about the next token to `[B, T]` at that token."""
    return nn.functional.pad(values, (1, 0), value=first)


def widened(values: Tensor, width: int, fill: int) -> Tensor:
    """Filled up on the right to `width` columns."""
    return nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
