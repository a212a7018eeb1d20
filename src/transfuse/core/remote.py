r"""Models behind a server, of which only the likeliest next tokens can be seen, as streams for decoding in step.

    served = BlackBox(OpenAICompatible(url, "large"), tokenizer, top=20)
    decode([Stream(served, ids, mask), Stream(expert, ids, mask), Stream(antiexpert, ids, mask)], ...)

The server names k tokens and their log-probabilities; all others score -inf. A combination that adds the offsets of
local models to these scores so ranks the returned tokens alone, and softmax normalises over them.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import BadInput, IncompatibleModels, NotApplicable
from .tokens import pieces

if TYPE_CHECKING:
    from .llm import Backend

__all__ = ["BlackBox"]


class BlackBox:
    r"""A served model, in the place of a stream's model.

    Each new token costs a request per row; rows that have ended cost none. `backend.usage` counts them, and
    `cached(backend, folder)` keeps what was answered. A token that the server names counts if its name is exactly one
    token: the text of one token of the tokenizer, `token_id:<number>` or `bytes:<text with \xNN>`. Others are dropped.
    Servers that name sentencepiece tokens by text leave out their leading space: have those name numbers
    (vLLM: `extra_body={"return_tokens_as_token_ids": True}`; llama.cpp does without being asked).

    Args:
        backend: An `OpenAICompatible` backend, or one kept by `cached`.
        tokenizer: The served model's.
        top: k, how many tokens to ask for. OpenAI's completions give at most 5 and chats 20, vLLM 20 unless set.
        send: How the text so far is sent. "ids": as token numbers, which is exact. "text": as text, for the server to
            tokenize again. "chat": the prompt as the user's message and what was added as the assistant's, which the
            server must continue (vLLM does); the prompt is then plain text, without a chat template.
        system: System message of the chat.
        vocab_size: How many tokens are scored; by default the tokenizer's.
        max_length: Positions the served model has, if it is to be checked here.

    Attributes:
        device: Where its scores are made: the CPU.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top: int = 5,
        send: Literal["ids", "text", "chat"] = "ids",
        system: str | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
    ):
        if send not in ("ids", "text", "chat"):
            raise BadInput("send", send, "is unknown", 'use "ids", "text" or "chat"')
        if system is not None and send != "chat":
            raise BadInput("system", system, "belongs to a chat", 'use send="chat" or leave it out')
        self.backend, self.tokenizer, self.top = backend, tokenizer, top
        self.send, self.system, self.max_length = send, system, max_length
        self._pieces = tokenizer.get_vocab()
        self.vocab_size = max(self._pieces.values()) + 1 if vocab_size is None else vocab_size
        found, special = pieces(tokenizer)
        spelling = {number: piece for piece, number in self._pieces.items()}
        # Two tokens may stand for one string (a letter and its byte): the one spelt out comes first.
        order = sorted(spelling, key=lambda i: (bool(special[i]), spelling[i].startswith("<0x"), i))
        self._numbers: dict[bytes, int] = {}
        for number in order:
            self._numbers.setdefault(found[number], number)
        opening = tokenizer("")["input_ids"]
        self._opening = list(opening)

    def scores(
        self, ids: Tensor, mask: Tensor, *, new: int, keep: int = 1, live: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of what follows each of the last `keep` tokens.

        Args:
            ids: `[B, T]` int64, the texts so far.
            mask: `[B, T]`, 0 on padding.
            new: How many tokens at the end of each row do not belong to its prompt.
            keep: At most `new` + 1.
            live: `[B]` bool, the rows that are asked about; the others score 0 throughout.

        Returns:
            `[B, keep, V]` float32, -inf for tokens that were not returned.

        Raises:
            IncompatibleModels: of the tokens returned for a row, the tokenizer knows none.
            NotApplicable: a server that returns no log-probabilities.
            BadInput, Unavailable: as `Backend.next_tokens`.
        """
        result = torch.zeros(len(ids), keep, self.vocab_size)
        places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        added: dict[tuple[int, ...], int] = {}
        for b, (row, used) in enumerate(zip(ids.tolist(), mask.tolist())):
            if live is None or live[b]:
                text = [token for token, kept in zip(row, used) if kept]
                for k in range(keep):
                    behind = keep - 1 - k
                    prefix = tuple(text[: len(text) - behind])
                    places.setdefault(prefix, []).append((b, k))
                    added[prefix] = new - behind
        asked = [self._prompt(list(prefix), added[prefix]) for prefix in places]
        for answer, where in zip(self.backend.next_tokens(asked, top=self.top), places.values()):
            scores = self._scores(answer.top)
            for b, k in where:
                result[b, k] = scores
        return result

    def _prompt(self, ids: list[int], new: int) -> Any:
        if self.send == "ids":
            return ids
        if self.send == "text":
            opening = len(self._opening)  # special tokens that the server puts there again
            return self.tokenizer.decode(ids[opening:] if ids[:opening] == self._opening else ids)
        parts = [("user", ids[: len(ids) - new]), ("assistant", ids[len(ids) - new :])]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for role, part in parts:
            if part:
                text = str(self.tokenizer.decode(part, skip_special_tokens=True))
                messages.append({"role": role, "content": text})
        return messages

    def _scores(self, top: tuple[tuple[str, float], ...]) -> Tensor:
        if not top:
            raise NotApplicable(
                "backend",
                self.backend.identity,
                "returns no log-probabilities",
                'use a server that does so for send="ids" (completions) or send="chat"',
            )
        scores = torch.full((self.vocab_size,), -math.inf)
        for name, value in top:
            number = self._number(name)
            if number is not None and number < self.vocab_size:
                scores[number] = max(value, float(scores[number]))
        if not bool((scores > -math.inf).any()):
            raise IncompatibleModels(
                "tokenizer",
                [name for name, _ in top],
                "has none of the tokens that the server returned",
                "give the served model's tokenizer, or have the server return token ids",
            )
        return scores

    def _number(self, name: str) -> int | None:
        """The token that a name stands for; None where it is not exactly one."""
        if match := re.fullmatch(r"token_id:(\d+)", name):
            return int(match[1])
        data = name.encode()
        if name.startswith("bytes:") and "\\x" in name:
            escaped = re.split(r"(\\x[0-9a-fA-F]{2})", name.removeprefix("bytes:"))
            parts = (bytes.fromhex(p[2:]) if p.startswith("\\x") else p.encode() for p in escaped)
            data = b"".join(parts)
        return self._numbers.get(data, self._pieces.get(name))
