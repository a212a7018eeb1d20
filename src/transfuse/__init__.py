"""transfuse moves knowledge between models, documents, graphs and clients, and measures what moved.

Nothing heavy is imported here; the names below are bound when first used.

    import transfuse

    model, tokenizer = transfuse.load("smollm2-135m")
    for method in transfuse.methods("edit"):
        print(method.slug, method.title)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import get, methods
    from .core.models import load

__all__ = ["__version__", "get", "load", "methods"]

__version__ = "0.1.0"

_HOMES = {"get": "catalogue", "methods": "catalogue", "load": "core.models"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
