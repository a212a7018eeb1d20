"""The error tree. Each message is one line: what is wrong with which argument, and what to do about it."""

from __future__ import annotations

from typing import Any

__all__ = [
    "BadInput",
    "CorruptFile",
    "IncompatibleModels",
    "MissingExtra",
    "NotApplicable",
    "TrainingDiverged",
    "TransfuseError",
    "Unavailable",
]


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:58]}...{text[-59:]}"  # the end of a path names the file


class TransfuseError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 2


class BadInput(TransfuseError, ValueError):
    """An argument, recipe field or record that cannot be used.

    Args:
        argument: Its name as the user wrote it (`facts.jsonl:3: target`, `rank`, ...).
        value: The value found.
        problem: What is wrong with it, as the rest of a sentence ("is empty").
        remedy: What would be right, in the imperative.
    """

    def __init__(self, argument: str, value: Any, problem: str, remedy: str):
        self.argument, self.value, self.problem, self.remedy = argument, value, problem, remedy
        super().__init__(f"{argument} = {_shown(value)} {problem}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.problem, self.remedy)


class CorruptFile(BadInput):
    """A file that exists but cannot be trusted: truncated, wrong checksum, unsafe format."""


class IncompatibleModels(BadInput):
    """Two models, or a model and a delta, that do not fit together."""


class NotApplicable(BadInput):
    """A method that cannot take this kind of knowledge or model (an editor given documents, say)."""


class MissingExtra(TransfuseError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        self.package, self.extra = package, extra
        super().__init__(f'{package} is not installed; run: pip install "transfuse[{extra}]"')

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.package, self.extra)


class Unavailable(TransfuseError):
    """Something outside could not be reached: a model, a data set, a server."""


class TrainingDiverged(TransfuseError):
    """The loss became NaN or infinite; nothing was written."""
