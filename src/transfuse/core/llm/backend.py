"""What every text backend shares: requests checked, answers parsed, tokens counted; and the scripted one."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import BadInput, NotApplicable
from ..extras import require
from ..files import sha256_json

__all__ = ["Backend", "Completion", "Options", "Row", "Scripted", "Usage", "completion", "parse_json"]

Messages = list[dict[str, str]]
Prompt = str | Messages

_ROLES = ("system", "user", "assistant")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: The new text, special tokens and stop strings left off.
        input_tokens: Tokens read; 0 where a server does not say.
        output_tokens: Tokens written; 0 where a server does not say.
        parsed: With a schema: the decoded JSON, or None when the text does not satisfy the schema.
        truncated: The answer ran into `max_tokens`.
        cached: It was read from a cache; nothing was asked.
        top: From `next_tokens`: the likeliest first tokens with their natural log-probabilities.
    """

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    parsed: Any = None
    truncated: bool = False
    cached: bool = False
    top: tuple[tuple[str, float], ...] = ()


@dataclass
class Usage:
    """Running totals: answers really asked for, their tokens read and written; answers read from a cache."""

    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached: int = 0

    def add(self, completions: Sequence[Completion]) -> None:
        """Count these answers in."""
        fresh = [completion for completion in completions if not completion.cached]
        self.answers += len(fresh)
        self.input_tokens += sum(c.input_tokens for c in fresh)
        self.output_tokens += sum(c.output_tokens for c in fresh)
        self.cached += len(completions) - len(fresh)


@dataclass(frozen=True)
class Options:
    """What every prompt of one call shares; the arguments of `Backend.complete`, checked.

    `top`, above 0: how many of the likeliest next tokens are asked for, in place of an answer.
    """

    max_tokens: int
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top: int = 0
    top_k: int | None = None


class Row(NamedTuple):
    """One prompt of a call. `draw` numbers equal prompts when sampling, so that each gets its own sample.

    Where next tokens are asked for, `messages` may also be the text to continue, or its token ids.
    """

    messages: Any
    draw: int = 0


class Backend(ABC):
    """What answers. Subclasses write `identity` and `_answer`; callers use `complete` and `usage`.

    Attributes:
        usage: What was asked so far.
        ranks: Whether `next_tokens` can be asked.
        takes_top_k: Whether `top_k` can be asked for without knowing more of what answers.
    """

    ranks = False
    takes_top_k = True

    def __init__(self) -> None:
        self.usage = Usage()

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names what answers, so that two backends with one identity may share cached answers."""

    @abstractmethod
    def _answer(self, rows: list[Row], options: Options) -> list[Completion]:
        """One completion per row, in order."""

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> list[Completion]:
        """Answer every prompt.

        Args:
            prompts: Strings (one user message each) or lists of messages.
            max_tokens: Length limit of each answer, in tokens.
            temperature: 0 takes the likeliest token each time; above 0 samples.
            top_k: Sample from this many likeliest tokens only; None from all (of a server: as it is set up). It is not
                in the OpenAI protocol: servers that know it are vLLM, llama.cpp and others.
            schema: A JSON schema the answer must satisfy.
            stop: Texts that end an answer; they are left off.
            seed: Of the sampling. Equal prompts of one call still get different samples.

        Returns:
            One `Completion` per prompt, in order.

        Raises:
            BadInput: an argument that cannot be used, or a server that refuses the request.
            Unavailable: the server cannot be reached, or kept failing.
        """
        options = _options(max_tokens, temperature, top_k, schema, stop, seed)
        seen: Counter[str] = Counter()
        rows = []
        for i, prompt in enumerate(_listed(prompts)):
            messages = _messages(prompt, i)
            key = json.dumps(messages)
            rows.append(Row(messages, seen[key] if options.temperature > 0 else 0))
            seen[key] += 1
        completions = self._answer(rows, options) if rows else []
        self.usage.add(completions)
        return completions

    def next_tokens(self, prompts: Sequence[str | list[int] | Messages], *, top: int) -> list[Completion]:
        """Ask which tokens are likeliest to come next. One token is written for each prompt.

        Args:
            prompts: Each a text that goes on, its token ids, or messages; a last message of the assistant goes
                on too, if the server can do that.
            top: How many tokens, at least 1; servers have limits.

        Returns:
            One `Completion` per prompt, in order; see its `top`. Tokens are named as the server names them: by
            their text, by number (`token_id:17`), or by bytes in hexadecimal escapes (after `bytes:`).

        Raises:
            NotApplicable: a backend that does not tell probabilities.
            BadInput, Unavailable: as `complete`.
        """
        if not self.ranks:
            remedy = "use a server that speaks the OpenAI protocol"
            raise NotApplicable("backend", type(self).__name__, "does not tell log-probabilities", remedy)
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise BadInput("top", top, "is not a whole number from 1", "give how many tokens are wanted")
        rows = [Row(_continued(prompt, i)) for i, prompt in enumerate(_listed(prompts))]
        completions = self._answer(rows, Options(1, top=top)) if rows else []
        self.usage.add(completions)
        return completions


def _listed(prompts: Sequence[Any]) -> Sequence[Any]:
    if isinstance(prompts, (str, Mapping)):
        raise BadInput("prompts", prompts, "is one prompt", "give a list of prompts")
    return prompts


def _continued(prompt: Any, index: int) -> Any:
    """A prompt of `next_tokens`: text, token ids or messages."""
    if isinstance(prompt, str):
        _check_unicode(f"prompts[{index}]", prompt)
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    return _messages(prompt, index)


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(where, text, "holds half a character (a lone surrogate)", "repair the text") from error


def _messages(prompt: Prompt, index: int) -> Messages:
    where = f"prompts[{index}]"
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise BadInput(where, prompt, "is not a prompt", "give a text or a list of messages")
    for message in prompt:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise BadInput(where, message, "is not a message", "give {'role': ..., 'content': ...}")
        if message["role"] not in _ROLES:
            raise BadInput(where, message["role"], "is not a role", f"use {', '.join(_ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise BadInput(where, message["content"], "is empty or not text", "give the message's text")
        _check_unicode(where, message["content"])
    return [dict(message) for message in prompt]


def _options(
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    schema: Any,
    stop: Sequence[str] | None,
    seed: int | None,
) -> Options:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise BadInput("max_tokens", max_tokens, "is not a whole number from 1", "give a length in tokens")
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise BadInput("temperature", temperature, "is not a number from 0", "use 0 for the likeliest answer")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise BadInput("top_k", top_k, "is not a whole number from 1", "give such a number, or None for all")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop or ()):
        raise BadInput("stop", stop, "is not a list of non-empty texts", 'give a list such as ["\\n"]')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise BadInput("seed", seed, "is not a whole number from 0", "give such a seed, or None")
    if schema is not None:
        _validator(schema)
    return Options(max_tokens, float(temperature), schema, tuple(stop or ()), seed, top_k=top_k)


def _validator(schema: Any) -> Any:
    jsonschema = require("jsonschema", extra="serve")
    try:
        cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        cls.check_schema(schema)
        return cls(schema)
    except (jsonschema.SchemaError, TypeError) as error:
        reason = getattr(error, "message", str(error))
        raise BadInput("schema", schema, f"is not a JSON schema ({reason})", "correct the schema") from error


def parse_json(text: str, schema: Mapping[str, Any]) -> Any:
    """The JSON value in `text` (alone or in a Markdown code fence).

    None when `schema` is not met, and for what JSON and UTF-8 cannot write again: infinite numbers, half characters.
    """
    fence = re.search(r"```(?:json)?\s*\n\s*", text)
    try:
        value, end = _DECODER.raw_decode(text, fence.end()) if fence else (json.loads(text), 0)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        closed = fence is None or text[end:].lstrip().startswith("```")
        return value if closed and _validator(schema).is_valid(value) else None
    except (ValueError, RecursionError):
        return None


def completion(text: str, read: int, written: int, truncated: bool, options: Options) -> Completion:
    """A backend's raw text as a `Completion`: cut at the first stop text, parsed when a schema is set."""
    # A server may cut a text inside a character; what is left of it can be neither stored nor tokenized.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    cuts = [at for at in (text.find(stop) for stop in options.stop) if at >= 0]
    text = text[: min(cuts)] if cuts else text
    parsed = None if options.schema is None else parse_json(text, options.schema)
    return Completion(text, read, written, parsed, truncated and not cuts)


class Scripted(Backend):
    """Answers written beforehand, for tests: a list used up in order, or a function of the last message.

    Tokens are counted as words. `requests` keeps what was asked.
    """

    def __init__(self, responses: Sequence[str] | Callable[[str], str]) -> None:
        super().__init__()
        self.responses = responses
        self.requests: list[Messages] = []

    @property
    def identity(self) -> str:
        """The answers, or the function's name."""
        script = self.responses
        return f"scripted:{script.__qualname__ if callable(script) else sha256_json(list(script))}"

    def _answer(self, rows: list[Row], options: Options) -> list[Completion]:
        completions = []
        for messages, _ in rows:
            if callable(self.responses):
                text = self.responses(messages[-1]["content"])
            elif len(self.requests) < len(self.responses):
                text = self.responses[len(self.requests)]
            else:
                raise BadInput("responses", len(self.responses), "are used up", "script one per prompt")
            self.requests.append(messages)
            words = text.split()
            read = sum(len(message["content"].split()) for message in messages)
            short = len(words) > options.max_tokens
            text = " ".join(words[: options.max_tokens]) if short else text
            completions.append(completion(text, read, min(len(words), options.max_tokens), short, options))
        return completions
