"""What an editor has to know about a model once: how its keys are spread, and contexts in its own words."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.datasets import dataset_path, datasets_table
from ..core.errors import BadInput, CorruptFile
from ..core.files import locked, read_tensors, sha256_json, write_tensors
from ..core.generate import pad_batch, pad_id_of
from ..core.models import cache_dir, fingerprint
from ..core.taps import capture
from ..core.tensors import Factor, SecondMoment
from ._contexts import sample_ids, sample_prefixes
from ._layers import still
from ._sites import Site, find_sites

__all__ = ["Background", "BackgroundCache", "Covariance", "check_statistics", "covariance"]

_WINDOW = 64  # tokens of a row: about the length of what editors look at, and cheap to sample
_BATCH = 64  # rows per forward pass
_SAMPLED = 256  # rows sampled at a time


class Covariance(NamedTuple):
    """C = E[k k^T] of one down-projection.

    Attributes:
        matrix: float32 `[m, m]`, on the CPU.
        count: Number of keys it was taken from.
    """

    matrix: torch.Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count


def covariance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    *,
    text: str | os.PathLike[str] | Sequence[str] = "self",
    tokens: int = 8192,
    seed: int = 0,
    module: str | None = None,
    cache: bool = True,
) -> dict[int, Covariance]:
    """Second moment of the keys (inputs of the MLP down-projection) of several blocks, over running text.

    One pass over the text, in windows of 64 tokens, serves all blocks; no activation outlives its batch. The
    sums are float64. Results are kept under the user's cache, by the model's weights, block, the text's tokens and
    their count; a broken file there is made again.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        layers: Numbers of blocks.
        text: "self" for text that the model samples itself, the name of a data set ("wikitext-2/valid.txt"), a
            text file, or a list of texts.
        tokens: Most tokens read.
        seed: Of the sampling, with `text="self"`.
        module: Name of the down-projection inside a block, where it cannot be guessed.
        cache: Read and write the user's cache.

    Returns:
        For each block: the matrix, and how many keys it rests on.

    Raises:
        BadInput: unknown block or text; a weight that is no down-projection; NaN keys.
        Unavailable: the data set is not here and cannot be downloaded.
    """
    sites = find_sites(model, layers, module)
    check_statistics(text, tokens)
    what = _identity(tokenizer, text, tokens, seed)
    folder = cache_dir() / "statistics" / (fingerprint(model)[:16] if cache else "none")
    files = {
        site.index: folder
        / f"{site.index:03d}-{sha256_json([site.module, str(model.dtype), tokens, _WINDOW, what])[:16]}.safetensors"
        for site in sites
    }
    if not cache:
        return _measure(model, sites, _all_rows(model, tokenizer, text, tokens, seed), pad_id_of(tokenizer))
    with locked(folder.parent / f".{folder.name}.lock"):
        found = {i: kept for i, file in files.items() if (kept := _read(file)) is not None}
        missing = [site for site in sites if site.index not in found]
        if missing:
            rows = _kept_rows(folder, what, model, tokenizer, text, tokens, seed)
            made = _measure(model, missing, rows, pad_id_of(tokenizer))
            for i, result in made.items():
                write_tensors(files[i], {"covariance": result.matrix}, {"count": result.count, "text": what})
            found |= made
    return {site.index: found[site.index] for site in sites}


def check_statistics(text: Any, tokens: int) -> None:
    """Refuse, before any work, a text or token count that `covariance` cannot use.

    Raises:
        BadInput: unknown name, missing file, empty list, or a token count below 1.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise BadInput("tokens", tokens, "is not a number of tokens", "give 1 or more")
    if isinstance(text, (str, os.PathLike)):
        if text != "self" and not _named(text) and not Path(text).is_file():
            raise BadInput(
                "statistics", str(text), "is no text file and no known data set",
                'use "self", a .txt file, "wikitext-2/valid.txt" or a list of texts',
            )  # fmt: skip
    elif (
        not isinstance(text, Sequence) or not text or not all(isinstance(t, str) and t.strip() for t in text)
    ):
        raise BadInput("statistics", text, "is not a list of texts", 'use "self", a file, or texts')


def _named(text: str | os.PathLike[str]) -> bool:
    return any(row["name"] == text for row in datasets_table())


def _texts(text: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    if not isinstance(text, (str, os.PathLike)):
        return list(text)
    path = dataset_path(str(text)) if _named(text) else Path(text)
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise CorruptFile("statistics", str(path), "is not UTF-8 text", "give a plain text file") from error


def _identity(
    tokenizer: PreTrainedTokenizerBase,
    text: str | os.PathLike[str] | Sequence[str],
    tokens: int,
    seed: int,
) -> str:
    """What decides the tokens read, the model apart: the tokens themselves, or how the model is made to write them."""
    if text == "self":
        return f"self:{seed}:{_first_id(tokenizer)}:{tokenizer.eos_token_id}"
    return sha256_json(list(_upto(tokens, _cut(tokenizer, _texts(text)))))


def _read(file: Path) -> Covariance | None:
    if not file.is_file():
        return None
    try:
        tensors, header = read_tensors(file)
        return Covariance(tensors["covariance"], int(header["count"]))
    except (CorruptFile, KeyError):
        return None


@torch.no_grad()
def _measure(
    model: PreTrainedModel, sites: Sequence[Site], rows: list[list[int]], pad: int
) -> dict[int, Covariance]:
    moments = {site.index: SecondMoment(site.inner, device=model.device) for site in sites}
    with still(model), capture(model, [site.module for site in sites], inputs=True, stop=True) as seen:
        for i in range(0, len(rows), _BATCH):
            _add(seen, sites, moments, rows[i : i + _BATCH], pad)
    return {i: Covariance(moment.matrix.float().cpu(), moment.count) for i, moment in moments.items()}


def _add(
    seen: Any, sites: Sequence[Site], moments: dict[int, SecondMoment], rows: list[list[int]], pad: int
) -> None:
    ids, mask = pad_batch(rows, pad, device=seen.model.device)
    seen.run(input_ids=ids, attention_mask=mask, use_cache=False)
    for site in sites:
        keys = seen.pop(site.module)
        moments[site.index].add(keys.reshape(-1, keys.shape[-1])[mask.bool().flatten()])


def _kept_rows(
    folder: Path,
    what: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | os.PathLike[str] | Sequence[str],
    tokens: int,
    seed: int,
) -> list[list[int]]:
    """As `_rows`; what the model has sampled is kept beside the statistics: other blocks need the same text."""
    if text != "self":
        return _all_rows(model, tokenizer, text, tokens, seed)
    file = folder / f"self-{sha256_json([str(model.dtype), tokens, _WINDOW, what])[:16]}.safetensors"
    try:
        kept, _ = read_tensors(file)
        return [row[row >= 0].tolist() for row in kept["ids"]]
    except (BadInput, KeyError):
        rows = _all_rows(model, tokenizer, text, tokens, seed)
    ids = torch.full((len(rows), _WINDOW), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    write_tensors(file, {"ids": ids})
    return rows


@torch.no_grad()
def _all_rows(model: PreTrainedModel, *rest: Any) -> list[list[int]]:
    """`_rows` as a list, in evaluation mode."""
    with still(model):
        return list(_rows(model, *rest))


def _rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | os.PathLike[str] | Sequence[str],
    tokens: int,
    seed: int,
) -> Iterator[list[int]]:
    """Windows of token ids, `tokens` in all, each beginning as the tokenizer begins a text."""
    source = _sampled(model, tokenizer, tokens, seed) if text == "self" else _cut(tokenizer, _texts(text))
    return _upto(tokens, source)


def _upto(tokens: int, rows: Iterator[list[int]]) -> Iterator[list[int]]:
    left = tokens
    for row in rows:
        yield row[:left]
        left -= len(row)
        if left <= 0:
            return


def _cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    start = _start(tokenizer)
    size = _WINDOW - len(start)
    for text in texts:
        for piece in range(0, len(text), 1 << 16):  # tokenising megabytes at once is slow and not needed
            ids = tokenizer(text[piece : piece + (1 << 16)], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            for i in range(0, len(ids), size):
                yield [*start, *ids[i : i + size]]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: the begin-of-text token, or nothing."""
    first = list(tokenizer("a")["input_ids"][:1])
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _first_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return next((int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


def _sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int
) -> Iterator[list[int]]:
    """Rows sampled from the model, each after its begin-of-text (or else end-of-text) token."""
    start = _first_id(tokenizer)
    if start is None:
        raise BadInput(
            "statistics", "self", "needs a tokenizer with a bos or eos token", "give texts instead"
        )
    made, block = 0, 0
    while made < tokens:
        rows = min(_SAMPLED, -(-(tokens - made) // _WINDOW))
        starts = [[start]] * rows
        for row in sample_ids(model, tokenizer, starts, new_tokens=_WINDOW - 1, seed=seed + block):
            made += len(row)
            yield row
        block += 1


class Background(NamedTuple):
    """What editing needs besides the facts: contexts, and per block the factorised C (None: left out)."""

    prefixes: tuple[str, ...]
    factors: dict[int, Factor | None]
    settings: tuple[Any, ...]  # under which they were taken


class BackgroundCache:
    """One editor's `Background` of each model it met, taken when it first met it with these settings.

    In a run of edits the statistics are therefore those of the model before the first, as in the papers. For a model
    that was trained in between, take a new editor.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[PreTrainedModel, Background] = weakref.WeakKeyDictionary()

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: Sequence[Site],
        *,
        statistics: str | os.PathLike[str] | Sequence[str] | None,
        tokens: int,
        ridge: float,
        prefixes: int,
        module: str | None,
        seed: int,
    ) -> Background:
        """The background for `sites`, computed or remembered.

        Raises:
            BadInput: fewer tokens than key dimensions without a ridge, or see `covariance`.
        """
        text = statistics if isinstance(statistics, (str, os.PathLike, type(None))) else tuple(statistics)
        settings = (tokenizer, text, tokens, ridge, prefixes, module, seed, model.device, model.dtype)
        kept = self._kept.get(model)
        if kept is None or kept.settings != settings:
            kept = Background(sample_prefixes(model, tokenizer, count=prefixes, seed=seed), {}, settings)
        missing = [site.index for site in sites if site.index not in kept.factors]
        if missing and statistics is not None:
            found = covariance(
                model, tokenizer, missing, text=statistics, tokens=tokens, seed=seed, module=module
            )
            for site in sites:
                if site.index in found:
                    kept.factors[site.index] = _factor(site, found[site.index], ridge, model.device)
        for index in missing:
            kept.factors.setdefault(index, None)
        self._kept[model] = kept
        return kept


def _factor(site: Site, found: Covariance, ridge: float, device: torch.device) -> Factor:
    if found.count < site.inner and not ridge:
        raise BadInput(
            "tokens", found.count, f"are fewer than the {site.inner} key dimensions of {site.module}",
            f"use {2 * site.inner} or more, or set ridge=1e-2",
        )  # fmt: skip
    return Factor(found.matrix.to(device), ridge=ridge)
