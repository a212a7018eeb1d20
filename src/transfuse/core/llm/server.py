"""Any server that speaks the OpenAI protocol as a text backend: answers in chats, and likeliest next tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from ..errors import BadInput, Unavailable
from ..extras import require
from ..files import sha256_json
from .backend import Backend, Completion, Options, Row, completion

__all__ = ["OpenAICompatible"]

_TRIED_AGAIN = {408, 409, 429, *range(500, 600)}  # by the openai package, before it gives up


class OpenAICompatible(Backend):
    """A server that speaks the OpenAI chat protocol (vLLM, llama.cpp, Ollama, hosted services).

    Requests run side by side. Refusals for load (429), server errors and timeouts are tried again with
    exponential back-off and jitter, or when the server says so.

    Args:
        base_url: "http://localhost:8000/v1".
        model: The model's name on that server.
        api_key_env: Environment variable that holds the key; None where no key is needed.
        timeout: Seconds to wait for one answer.
        retries: Further tries of a failed request.
        concurrency: Requests in flight at one time.
        extra_body: Further fields of every request, such as vLLM's `{"return_tokens_as_token_ids": True}`.

    Raises:
        BadInput: the URL is not one, the variable is not set or holds no key, or a number is out of range.
        MissingExtra: openai is not installed.
    """

    ranks = True
    takes_top_k = False  # vLLM, llama.cpp and others know it, the protocol does not

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 8,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not _is_url(base_url):
            raise BadInput("base_url", base_url, "is not a URL", "give one like http://localhost:8000/v1")
        key = "none" if api_key_env is None else os.environ.get(api_key_env, "").strip()
        if not key:
            raise BadInput(
                "api_key_env", api_key_env, "is not set in the environment", "export the key in it"
            )
        if not key.isascii() or not key.isprintable():
            problem = "holds characters that no key has"
            raise BadInput("api_key_env", api_key_env, problem, "export the key alone in it")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInput(name, value, f"is not a whole number from {least}", "give such a number")
        if not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
            raise BadInput("timeout", timeout, "is not a time", "give a number of seconds above 0")
        self.base_url, self.model, self.concurrency = base_url.rstrip("/"), model, concurrency
        self.api_key_env, self.extra_body = api_key_env, dict(extra_body or {})
        self._openai = require("openai", extra="serve")
        self._client = self._openai.OpenAI(
            base_url=self.base_url,
            api_key=key,
            timeout=timeout,
            max_retries=retries,
        )

    @property
    def identity(self) -> str:
        """The server's address, the model's name there, and what else every request says."""
        extra = f":{json.dumps(self.extra_body, sort_keys=True)}" if self.extra_body else ""
        return f"openai:{self.base_url}:{self.model}{extra}"

    def _answer(self, rows: list[Row], options: Options) -> list[Completion]:
        with ThreadPoolExecutor(min(self.concurrency, len(rows))) as pool:
            futures = [pool.submit(self._request, row, options) for row in rows]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _request(self, row: Row, options: Options) -> Completion:
        body: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        if options.stop:
            body["stop"] = list(options.stop)
        if options.seed is not None:
            # Not seed + draw: the samples of neighbouring seeds would be the same ones.
            body["seed"] = int(sha256_json([options.seed, row.draw])[:7], 16) if row.draw else options.seed
        if options.schema is not None:
            wanted = {"name": "answer", "schema": options.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        chat = isinstance(row.messages, list) and isinstance(row.messages[0], dict)
        extra = dict(self.extra_body)
        if options.top_k is not None:
            extra["top_k"] = options.top_k
        if options.top and chat:
            body |= {"logprobs": True, "top_logprobs": options.top}
            if row.messages[-1]["role"] == "assistant":  # not in the protocol; vLLM's names
                extra |= {"continue_final_message": True, "add_generation_prompt": False}
        elif options.top:
            body["logprobs"] = options.top
        if extra:
            body["extra_body"] = extra
        try:
            return self._read(self._send(row.messages, body, chat), options)
        except self._openai.OpenAIError as error:
            raise self._explained(error) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._no_protocol() from error

    def _no_protocol(self) -> Unavailable:
        return Unavailable(f"{self.base_url} does not speak the chat protocol; check base_url")

    def _send(self, prompt: Any, body: dict[str, Any], chat: bool) -> Any:
        if not chat:
            return self._client.completions.create(model=self.model, prompt=prompt, **body)
        create = self._client.chat.completions.create
        try:
            return create(model=self.model, messages=prompt, **body)
        except self._openai.BadRequestError as error:  # newer services know the limit by another name only
            if "max_completion_tokens" not in str(error):
                raise
            body["max_completion_tokens"] = body.pop("max_tokens")
            return create(model=self.model, messages=prompt, **body)

    def _explained(self, error: Exception) -> Exception:
        """The package's error as ours, with what to do about it."""
        api, url = self._openai, self.base_url
        if isinstance(error, api.APITimeoutError):
            return Unavailable(f"{url} did not answer in time; raise timeout or lower concurrency")
        if isinstance(error, api.APIConnectionError):
            return Unavailable(f"{url} cannot be reached; start the server or check base_url")
        if isinstance(error, (api.AuthenticationError, api.PermissionDeniedError)):
            remedy = f"check the key in {self.api_key_env}" if self.api_key_env else "set api_key_env"
            return BadInput("api_key_env", self.api_key_env, f"was refused by {url}", remedy)
        if isinstance(error, api.NotFoundError):
            return BadInput("model", self.model, f"is not known to {url}", "use a name the server lists")
        if isinstance(error, api.APIStatusError) and error.status_code in _TRIED_AGAIN:
            remedy = "try later or lower concurrency"
            return Unavailable(f"{url} kept failing (status {error.status_code}); {remedy}")
        reason = " ".join(str(error).split())[:200]
        return BadInput("request", self.model, f"was refused by {url} ({reason})", "change what it names")

    def _read(self, response: Any, options: Options) -> Completion:
        try:  # the package takes a response as it comes: any part may be missing, or of another type
            choice, usage = response.choices[0], response.usage
            text = (choice.message.content if hasattr(choice, "message") else choice.text) or ""
            top = _ranking(choice.logprobs) if options.top else ()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._no_protocol() from error
        if not isinstance(text, str):
            raise self._no_protocol()
        read, written = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
        return replace(completion(text, read, written, choice.finish_reason == "length", options), top=top)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        return False


def _ranking(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """The likeliest tokens of the first place, in either form of the protocol: a mapping, or a list of records."""
    fields = logprobs.model_dump() if logprobs else {}
    if fields.get("content"):
        return tuple(
            (_named(entry), float(entry["logprob"])) for entry in fields["content"][0]["top_logprobs"]
        )
    places = fields.get("top_logprobs") or [None]
    return tuple((token, float(value)) for token, value in (places[0] or {}).items())


def _named(entry: Mapping[str, Any]) -> str:
    """A token's name: its number or its bytes, where the server tells them and the text does not say."""
    if entry.get("id") is not None:  # llama.cpp
        return f"token_id:{entry['id']}"
    data = bytes(entry.get("bytes") or ())
    if not data or data == entry["token"].encode():
        return str(entry["token"])
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
