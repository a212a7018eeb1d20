"""One way to ask a language model for text: a local model, an OpenAI-compatible server, a script for tests.

    backend = Local(*load("smollm2-135m"))
    backend = OpenAICompatible("http://localhost:8000/v1", "my-model", api_key_env="MY_KEY")
    [answer] = backend.complete(["Name a river."], max_tokens=20)
    [person] = cached(backend, "answers").complete(["Invent a person."], max_tokens=80, schema=SCHEMA)
    person.parsed["name"]
    [asked] = backend.next_tokens(["The capital of France is"], top=5)   # of a server
    asked.top                                                            # ((" Paris", -0.1), ...)

A prompt is a plain string (one user message) or a list of `{"role": ..., "content": ...}` messages. With
`schema`, a JSON schema, the answer comes back parsed; a local model is held to it token by token.
"""

from .backend import Backend, Completion, Scripted, Usage, parse_json
from .cache import cached
from .local import Local
from .server import OpenAICompatible

__all__ = ["Backend", "Completion", "Local", "OpenAICompatible", "Scripted", "Usage", "cached", "parse_json"]
