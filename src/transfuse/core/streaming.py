"""Tokens handed to transformers' streamers as they are chosen, each row to its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .errors import BadInput

__all__ = ["RowStreamers"]


class RowStreamers:
    """What decoding calls with each step's tokens: every row goes to a streamer of its own.

        streamer = TextIteratorStreamer(tokenizer)
        with RowStreamers([streamer], tokenizer.eos_token_id) as on_tokens:
            model.generate(**inputs, custom_generate=method, on_tokens=on_tokens)

    A streamer ends with its row. Leaving the block ends those whose rows ran to the length limit, or into an
    error, so that no reader waits for ever. Streamers see new tokens only: `skip_prompt` makes no difference.

    Args:
        streamers: One per row.
        ends: Tokens that end a row; they are handed on. Add the padding token where rows may end by other
            criteria: rows that have ended receive it.
    """

    def __init__(self, streamers: Sequence[BaseStreamer], ends: int | Sequence[int] | None = None):
        self.open: dict[int, BaseStreamer] = dict(enumerate(streamers))
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._rows, self._begun = len(self.open), False

    def __enter__(self) -> RowStreamers:
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def __call__(self, tokens: Tensor) -> None:
        """Give the tokens `[B]` of one step to the rows that have not ended.

        Raises:
            BadInput: more or fewer rows than streamers.
        """
        if len(tokens) != self._rows:
            problem = f"has {self._rows} streamers for {len(tokens)} rows"
            raise BadInput("on_tokens", "RowStreamers", problem, "give one per row")
        if not self._begun:
            self._begun = True
            for streamer in self.open.values():
                streamer.put(
                    torch.empty(0, dtype=torch.long)
                )  # a streamer takes what comes first for the prompt
        values = tokens.cpu()
        for row, streamer in list(self.open.items()):
            streamer.put(values[row : row + 1])
            if int(values[row]) in self.ends:
                self.open.pop(row).end()

    def end(self) -> None:
        """End the rows that are still open, all of them, also where one fails."""
        with contextlib.ExitStack() as ends:
            while self.open:
                ends.callback(self.open.popitem()[1].end)
