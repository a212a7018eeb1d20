"""Beam search over joined scores: which texts go on, which have ended, and when nothing better can come.

Per row the n best texts are kept. Each step scores every continuation of each, looks at the best few, sets apart
those of the first n that have ended, and goes on with the n best of the others. A text of T new tokens ends with
(sum of its log-probabilities) / T^length_penalty. The rules, ties included, are those of transformers' own search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import BadInput

__all__ = ["Beams", "BeamSettings", "Found"]

_FAR = -1e9  # added to the score of what may not be chosen


class BeamSettings(NamedTuple):
    """How to search.

    Attributes:
        size: n, how many texts are kept per row.
        returned: How many of them are wanted, at most n.
        length_penalty: Above 0 favours long texts, below 0 short ones.
        early_stopping: True stops a row once n texts have ended. False stops it when no running text would get
            into the n at its present length; "never" when none would at any length up to the limit.
    """

    size: int
    returned: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def check(self) -> None:
        """Refuse what cannot be searched with.

        Raises:
            BadInput: a setting out of range.
        """
        if self.size < 1:
            raise BadInput("num_beams", self.size, "leaves no beam", "give 1 or more")
        if not 1 <= self.returned <= self.size:
            problem = f"is not between 1 and num_beams = {self.size}"
            raise BadInput("num_return_sequences", self.returned, problem, "keep as many beams as are wanted")
        if self.early_stopping not in (True, False, "never"):
            raise BadInput("early_stopping", self.early_stopping, "is unknown", 'use True, False or "never"')


class Found(NamedTuple):
    """The best texts of each row, best first: R per row.

    Attributes:
        tokens: `[B * R, T]` int64, new tokens only, padded behind the end.
        scores: `[B * R]` float32, what they were ranked by.
        rows: `[B * R, T]` int64, from which row of each step's scores a token was taken; -1 behind the end.
    """

    tokens: Tensor
    scores: Tensor
    rows: Tensor


def _taken(values: Tensor, which: Tensor) -> Tensor:
    """`values[b, which[b, k]]`, from `[B, n, ...]` and `[B, K]` to `[B, K, ...]`."""
    return values[torch.arange(len(values), device=values.device)[:, None], which]


class Beams:
    """The state of a search.

    Args:
        prompts: `[B, T]` int64.
        settings: How to search.
        limit: Most new tokens.
        ends: How many tokens end a text: each may take up n of the best continuations.
        padding: What shorter texts are filled up with.

    Attributes:
        over: Nothing better can come.
    """

    def __init__(self, prompts: Tensor, settings: BeamSettings, *, limit: int, ends: int, padding: int):
        self.settings, self.limit, self.padding = settings, limit, padding
        size, device = settings.size, prompts.device
        self.candidates = max(2, 1 + ends) * size
        self.running = prompts[:, None].repeat(1, size, 1)
        self.rows = prompts.new_empty(len(prompts), size, 0)
        self.scores = torch.full((len(prompts), size), _FAR, device=device)
        self.scores[:, 0] = 0.0  # at first all beams hold the same text: only one of them counts
        self.ended, self.ended_rows = self.rows, self.rows
        self.ended_scores = torch.full_like(self.scores, _FAR)
        self.full = torch.zeros_like(self.scores, dtype=torch.bool)  # places that a text has ended in
        self.open = torch.ones_like(self.full[:, :1])  # rows that may yet find better
        self.over = False

    @property
    def texts(self) -> Tensor:
        """`[B * n, t]`, prompts and what the running beams have added, as processors see them."""
        return self.running.flatten(0, 1)

    @property
    def live(self) -> Tensor:
        """`[B * n]` bool, the beams that may yet lead to something better."""
        return self.open.repeat_interleave(self.settings.size)

    def advance(self, logprobs: Tensor, stops: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            logprobs: `[B * n, V]` float32, of the next token of each running beam.
            stops: From texts `[m, t]` to `[m]` bool, which of them have ended.

        Returns:
            `[B * n]` and `[B * n]`: the token each beam goes on with, and the row it continues.
        """
        height, size, _ = self.running.shape
        total = logprobs.view(height, size, -1) + self.scores[..., None]
        scores, best = total.flatten(1).topk(self.candidates)
        beam, tokens = best // total.shape[-1], best % total.shape[-1]
        texts = torch.cat([_taken(self.running, beam), tokens[..., None]], dim=-1)
        row = beam + torch.arange(height, device=beam.device)[:, None] * size
        rows = torch.cat([_taken(self.rows, beam), row[..., None]], dim=-1)
        stopped = stops(texts.flatten(0, 1)).view(height, -1)

        self._keep(texts, rows, scores, stopped)
        self.scores, going = (scores + _FAR * stopped).topk(size)
        self.running, self.rows = _taken(texts, going), _taken(rows, going)
        self._close(bool(stopped.all()))
        return self.running[..., -1].flatten(), self.rows[..., -1].flatten()

    def _keep(self, texts: Tensor, rows: Tensor, scores: Tensor, stopped: Tensor) -> None:
        """Let those of the n best candidates that have ended compete with what ended before."""
        size, length = self.settings.size, rows.shape[-1]
        enters = stopped & (torch.arange(self.candidates, device=stopped.device) < size)
        barred = (~enters).float() + (~self.open)
        if self.settings.early_stopping is True:
            barred = barred + self.full.all(1, keepdim=True)
        scores = scores / length**self.settings.length_penalty + _FAR * barred
        self.ended_scores, best = torch.cat([self.ended_scores, scores], dim=1).topk(size)
        new = texts[..., -length:]
        self.ended = _taken(torch.cat([pad(self.ended, (0, 1), value=self.padding), new], dim=1), best)
        self.ended_rows = _taken(torch.cat([pad(self.ended_rows, (0, 1), value=-1), rows], dim=1), best)
        self.full = _taken(torch.cat([self.full, enters], dim=1), best)

    def _close(self, none_left: bool) -> None:
        """Close the rows whose best running text can no longer displace one that has ended."""
        length, penalty = self.rows.shape[-1], self.settings.length_penalty
        if self.settings.early_stopping == "never" and penalty > 0:
            length = self.limit
        reachable = self.scores[:, :1] / length**penalty
        worst = torch.where(self.full, self.ended_scores.min(1, keepdim=True).values, _FAR)
        self.open = self.open & (reachable > worst).any(1, keepdim=True)
        enough = self.settings.early_stopping is True and bool(self.full.all())
        self.over = none_left or enough or not bool(self.open.any())

    def found(self) -> Found:
        """What the search has come to."""
        wanted = self.settings.returned
        rows = self.ended_rows[:, :wanted].flatten(0, 1)
        length = int((rows >= 0).sum(1).max())
        tokens = self.ended[:, :wanted].flatten(0, 1)
        return Found(tokens[:, :length], self.ended_scores[:, :wanted].flatten(), rows[:, :length])
