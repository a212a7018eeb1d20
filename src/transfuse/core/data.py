"""Knowledge as plain records: facts, documents, questions. Read from JSONL, JSON, Parquet or `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadInput, CorruptFile
from .files import sha256_json

__all__ = [
    "QA",
    "Document",
    "Fact",
    "read_documents",
    "read_facts",
    "read_qa",
    "read_rows",
    "records_hash",
]

Source = "str | os.PathLike[str] | Iterable[Any]"

_NOT_JSON = (ValueError, RecursionError)  # what json.loads raises: also for huge numbers and for deep nesting


@dataclass(frozen=True)
class Fact:
    """One fact as an editing request.

    Attributes:
        subject: The entity, a substring of `prompt`.
        prompt: Text that the target completes, without a trailing space ("The capital of France is").
        target: The wanted continuation, without a leading space ("Paris").
        paraphrases: Other prompts with the same answer.
        neighbours: Prompts about other subjects whose answers must not change. Those answers need not be this fact's
            `ground_truth`.
        ground_truth: The model's or the world's answer before the edit, when known.
        portability: Prompts whose answers follow from the fact, as (group, prompt, accepted answers).
        id: Optional identifier; messages name it.
        neighbour_answers: The neighbours' answers, one each, None for those that are not known; empty when none is.
    """

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    ground_truth: str | None = None
    portability: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    id: str | None = None
    neighbour_answers: tuple[str | None, ...] = ()

    @property
    def label(self) -> str:
        """How messages name this fact."""
        return self.id or self.prompt

    @property
    def answered_neighbours(self) -> tuple[tuple[str, str | None], ...]:
        """Each neighbour with its answer, None where that is not known."""
        answers = self.neighbour_answers or (None,) * len(self.neighbours)
        return tuple(zip(self.neighbours, answers, strict=True))


@dataclass(frozen=True)
class Document:
    """A text with an optional title and identifier."""

    text: str
    title: str = ""
    id: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of title and text."""
        return sha256_json([self.title, self.text])


@dataclass(frozen=True)
class QA:
    """A question, its accepted answers, and optionally where the answer stands and other wordings."""

    question: str
    answers: tuple[str, ...]
    document_ids: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    id: str | None = None


Record = TypeVar("Record", Fact, Document, QA)


def read_rows(source: Any, argument: str) -> Iterable[tuple[str, Any]]:
    """(place, raw record) pairs of a file (.jsonl, .json, .parquet) or a list; messages show the place.

    Raises:
        BadInput: no such file, or not a list of records; `argument` is named.
        CorruptFile: the file cannot be parsed.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise BadInput(argument, str(path), problem, "give a .jsonl, .json or .parquet file")
        ending = path.suffix.lower()
        if ending in (".jsonl", ".ndjson"):
            yield from _jsonl(path)
        elif ending == ".json":
            try:
                loaded = json.loads(path.read_text(encoding="utf-8-sig"))
            except _NOT_JSON as error:
                raise CorruptFile(argument, str(path), f"is not JSON ({error})", "mend the file") from error
            if not isinstance(loaded, list):
                raise BadInput(argument, str(path), "does not hold a list", "give a JSON list of records")
            yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(loaded))
        elif ending == ".parquet":
            yield from _parquet(path, argument)
        else:
            raise BadInput(argument, str(path), "has an unknown ending", "use .jsonl, .json or .parquet")
    elif isinstance(source, Iterable):
        yield from ((f"{argument}[{i}]", row) for i, row in enumerate(source))
    else:
        raise BadInput(argument, source, "is not a list of records or a file", "give a path or a list")


def _jsonl(path: Path) -> Iterable[tuple[str, Any]]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                yield place, json.loads(line)
            except _NOT_JSON as error:
                raise CorruptFile(place, line[:60], f"is not JSON ({error})", "mend this line") from error


def _parquet(path: Path, argument: str) -> Iterable[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise CorruptFile(argument, str(path), f"is not Parquet ({error})", "restore the file") from error
    yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(rows))


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{place}: {name}", value, f"is {type(value).__name__}, not text", "give a string")
    if not value.strip():
        raise BadInput(f"{place}: {name}", value, "is empty", "give some text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can hold half a pair, tokenizers cannot
            raise BadInput(
                f"{place}: {name}", value, "holds half a surrogate pair, which is no text", "mend its escapes"
            ) from error
    return value.strip() if name != "text" else value


def _texts(place: str, name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadInput(f"{place}: {name}", value, "is not a list of texts", 'write it as ["...", "..."]')
    return tuple(_text(place, f"{name}[{i}]", item) for i, item in enumerate(value))


def _answers(place: str, value: Any, neighbours: Sequence[str]) -> tuple[str | None, ...]:
    """One answer or None for each neighbour; empty where no answer is known."""
    name = "neighbour_answers"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _texts(place, name, value)
    answers = tuple(None if a is None else _text(place, f"{name}[{i}]", a) for i, a in enumerate(value))
    if answers and len(answers) != len(neighbours):
        raise BadInput(
            f"{place}: {name}", value, f"are {len(answers)} for {len(neighbours)} neighbours",
            "give one for each, null where it is not known",
        )  # fmt: skip
    return answers if any(answers) else ()


def _portability(place: str, value: Any) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    try:
        return tuple(
            (str(g), _text(place, "portability", p), _texts(place, "portability", a)) for g, p, a in value
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{place}: portability",
            value,
            "is not a list of [group, prompt, answers]",
            "write each as three items",
        ) from error


def _read(source: Any, kind: type[Record], argument: str) -> list[Record]:
    places, records = [], []
    for place, raw in read_rows(source, argument):
        places.append(place)
        records.append(_record(place, raw, kind))
    if not records:
        shown = os.fspath(source) if isinstance(source, (str, os.PathLike)) else []
        raise BadInput(argument, shown, "is empty", "give records")
    seen: dict[str, str] = {}
    for place, record in zip(places, records, strict=True):
        if record.id is not None and record.id in seen:
            raise BadInput(f"{place}: id", record.id, f"was used at {seen[record.id]}", "make it unique")
        if record.id is not None:
            seen[record.id] = place
    return records


def _record(place: str, raw: Any, kind: type[Record]) -> Record:
    if isinstance(raw, kind):
        raw = asdict(raw)
    if not isinstance(raw, Mapping):
        raise BadInput(
            place, raw, "is not a record", f"give an object with {', '.join(f.name for f in fields(kind))}"
        )
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, field in known.items():
        value = raw.get(name)
        if value is None:
            if field.default is MISSING:
                raise BadInput(f"{place}: {name}", None, "is missing", f"add the field {name!r}")
            continue
        if name == "portability":
            values[name] = _portability(place, value)
        elif name == "neighbour_answers":
            values[name] = _answers(place, value, values.get("neighbours", ()))
        elif str(field.type).startswith("tuple"):
            values[name] = _texts(place, name, value)
        elif name == "title" and value == "":
            values[name] = ""
        elif name == "id":
            values[name] = str(value)
        else:
            values[name] = _text(place, name, value)
    if kind is Fact and values["subject"] not in values["prompt"]:
        raise BadInput(
            f"{place}: subject", values["subject"], f"is not in the prompt {values['prompt']!r}",
            "write the subject exactly as it stands in the prompt",
        )  # fmt: skip
    if kind is QA and not values["answers"]:
        raise BadInput(f"{place}: answers", [], "is empty", "give at least one accepted answer")
    return kind(**values)


def read_facts(source: Any, *, argument: str = "facts") -> list[Fact]:
    """Read facts from a file (.jsonl, .json, .parquet), a `datasets.Dataset`, or a list of mappings or `Fact`.

    Unknown fields are ignored, so that richer records can be used as they are.

    Raises:
        BadInput: a field is missing, empty or of the wrong type, or the subject is not in the prompt; the
            message names file, line (or index) and field.
        CorruptFile: the file cannot be parsed.
    """
    return _read(source, Fact, argument)


def read_documents(source: Any, *, argument: str = "documents") -> list[Document]:
    """Read documents; errors as in `read_facts`."""
    return _read(source, Document, argument)


def read_qa(source: Any, *, argument: str = "questions") -> list[QA]:
    """Read questions with accepted answers; errors as in `read_facts`."""
    return _read(source, QA, argument)


def records_hash(records: Sequence[Fact | Document | QA]) -> str:
    """SHA-256 over the records' fields, in order."""
    return sha256_json([asdict(record) for record in records])
