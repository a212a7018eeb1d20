"""A codebook beside one layer, and how it acts in the forward pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..core import taps
from ..core.errors import BadInput, IncompatibleModels
from ._base import RoutedEdit

__all__ = ["Codebook", "GraceEdit", "Met", "attached", "carry", "nearest"]


@dataclass(frozen=True)
class Codebook:
    """Entries in order of their making; float32.

    Attributes:
        keys: `[E, m]`.
        values: `[E, d]`.
        radii: `[E]`, in the unit of the layer's input.
        spans: int64 `[E]`, for how many tokens a value is used, the key token included.
        labels: Target token ids of each entry.
    """

    keys: torch.Tensor
    values: torch.Tensor
    radii: torch.Tensor
    spans: torch.Tensor
    labels: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def empty(cls, m: int, d: int, *, device: str | torch.device = "cpu") -> Codebook:
        """A codebook without entries, for keys of width `m` and values of width `d`."""
        none = torch.empty(0, device=device)
        return cls(none.view(0, m), none.view(0, d), none, none.long())

    def __len__(self) -> int:
        return len(self.labels)


def nearest(keys: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance to, and index of, the nearest key of each query.

    Args:
        keys: `[E, m]`, E >= 1.
        queries: `[..., m]`.

    Returns:
        `(distance [...], index [...])`, float32 and int64. The distance is taken on the difference itself, so that
        it is 0 for a query equal to its key.
    """
    keys, queries = keys.float(), queries.float()
    index = torch.cdist(queries.reshape(-1, keys.shape[1]), keys).argmin(-1).view(queries.shape[:-1])
    return (queries - keys[index]).norm(dim=-1), index


class Met(NamedTuple):
    """At each token: the entry last met (-1: none), and how many tokens ago (0: at this one). int64 `[B, T]`."""

    entry: torch.Tensor
    age: torch.Tensor


def carry(
    hit: torch.Tensor, index: torch.Tensor, spans: torch.Tensor, before: Met | None
) -> tuple[torch.Tensor, Met]:
    """Which entry's value stands at each token.

    Args:
        hit: bool `[B, T]`, tokens that meet a key.
        index: int64 `[B, T]`, the key each token is nearest to.
        spans: int64 `[E]`.
        before: What was met in the tokens before these (held in the KV cache), if any.

    Returns:
        int64 `[B, T]`, -1 where the layer's own output stands; and what was met in these tokens.
    """
    place = torch.arange(hit.shape[1], device=hit.device).expand_as(hit)
    last = torch.where(hit, place, -1).cummax(1).values
    entry = torch.where(last >= 0, index.gather(1, last.clamp_min(0)), -1)
    age = place - last
    if before is not None:
        entry = torch.where(last >= 0, entry, before.entry[:, -1:])
        age = torch.where(last >= 0, age, before.age[:, -1:] + 1 + place)
    reached = (entry >= 0) & (age < spans[entry.clamp_min(0)])
    return torch.where(reached, entry, -1), Met(entry, age)


_CACHES = ("past_key_values", "layer_past")  # a KV cache, as blocks call it
_NUMBERS = itertools.count()


class _Router:
    """The hooks of an attached codebook.

    What was met in the tokens of a KV cache is kept on that cache, token by token: a copy of the cache, as for a
    shared prefix, has it too, and a cache cut shorter goes on from its new end. Rows that beam search exchanges go
    unseen: they must have met the same keys, as the beams of one prompt have unless they write a key themselves.
    """

    def __init__(self, book: Codebook):
        self.book, self.number = book, next(_NUMBERS)
        self.shape: tuple[int, ...] = (0, 0)
        self.mask: torch.Tensor | None = None
        self.cache: Any = None
        self.past = 0
        self.queries = torch.empty(0)

    def begin(self, arguments: dict[str, Any]) -> None:
        """Note shape, padding and cache of a pass through the stack of blocks."""
        given = arguments.get("input_ids")
        given = arguments["inputs_embeds"] if given is None else given
        self.shape = tuple(given.shape[:2])
        mask = arguments.get("attention_mask")
        self.mask = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.mask = mask[:, -self.shape[1] :].bool()
        self.cache = arguments.get("past_key_values")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())

    def enter(self, arguments: dict[str, Any]) -> None:
        """Note the cache that the layer's block writes to: the model makes one itself where it was given none."""
        named = {**arguments, **arguments.get("kwargs", {})}
        self.cache = next((named[name] for name in _CACHES if named.get(name) is not None), self.cache)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep the layer's input."""
        self.queries = tensor.detach()
        return tensor

    def write(self, output: torch.Tensor) -> torch.Tensor:
        """Put values where keys are met."""
        rows, tokens = self.shape
        distance, index = nearest(self.book.keys, self.queries.reshape(rows, tokens, -1))
        hit = distance <= self.book.radii[index]
        if self.mask is not None:
            hit &= self.mask
        before = self._before(rows)
        entry, met = carry(hit, index, self.book.spans, before)
        if self.cache is not None:
            whole = met if before is None else Met(*(torch.cat(pair, 1) for pair in zip(before, met)))
            vars(self.cache).setdefault("met_keys", {})[self.number] = whole
        stands = entry >= 0
        if not bool(stands.any()):
            return output
        values = self.book.values.to(output.dtype)[entry.clamp_min(0)].view(output.shape)
        return torch.where(stands.view(*output.shape[:-1], 1), values, output)

    def _before(self, rows: int) -> Met | None:
        if self.past == 0:
            return None
        met = vars(self.cache).get("met_keys", {}).get(self.number)
        if met is None or met.entry.shape[1] < self.past or rows % len(met.entry):
            nothing = torch.full((rows, self.past), -1, device=self.queries.device)
            return Met(nothing, nothing)  # tokens from before the edit, or of other rows
        times = rows // len(met.entry)
        return Met(*(part[:, : self.past].repeat_interleave(times, 0) for part in met))


_ATTACHED: weakref.WeakKeyDictionary[PreTrainedModel, list[GraceEdit]] = weakref.WeakKeyDictionary()


class GraceEdit(RoutedEdit):
    """Entries added to, and changed in, the codebook of one layer. Codebooks of one layer join into one.

    Args:
        module: Name of the layer.
        before: Entries the codebook had.
        touched: Indices of the entries whose value or label is new.
        keys: `[n, m]`, of the entries from `before` on.
        values: `[len(touched), d]`.
        radii: `[before + n]`.
        spans: `[before + n]`.
        labels: Of the entries in `touched`.
    """

    kind = "grace"

    def __init__(
        self,
        *,
        module: str,
        before: int,
        touched: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        radii: torch.Tensor,
        spans: torch.Tensor,
        labels: Sequence[Sequence[int]],
    ):
        self.module, self.before, self.touched = module, before, tuple(touched)
        self.keys, self.values, self.radii, self.spans = keys, values, radii, spans
        self.labels = tuple(tuple(label) for label in labels)
        self.book: Codebook | None = None
        self._hooks = ExitStack()

    def attach(self, model: PreTrainedModel) -> None:
        """Join the layer's codebook and act in every forward pass from now on."""
        below = attached(model, self.module)
        known = below[-1].book if below else Codebook.empty(self.keys.shape[1], self.values.shape[1])
        assert known is not None
        layer = model.get_submodule(self.module)
        if len(known) != self.before:
            raise IncompatibleModels(
                "edit", f"{len(known)} entries", f"in place where {self.before} were when it was made",
                "apply the edits in the order of their making",
            )  # fmt: skip
        labels = list(known.labels) + [()] * (len(self.radii) - len(known))
        values = torch.cat([known.values.cpu(), torch.zeros(len(self.keys), self.values.shape[1])])
        for index, value, label in zip(self.touched, self.values, self.labels, strict=True):
            values[index], labels[index] = value, label
        device = next(layer.parameters()).device
        self.book = Codebook(
            torch.cat([known.keys, self.keys.to(device)]) if len(known) else self.keys.to(device),
            values.to(device), self.radii.to(device), self.spans.to(device), tuple(labels),
        )  # fmt: skip
        if below:
            below[-1]._hooks.close()
        self._open(model)
        _ATTACHED.setdefault(model, []).append(self)

    def _open(self, model: PreTrainedModel) -> None:
        assert self.book is not None
        router = _Router(self.book)
        stack = taps.decoder_layers(model)[0].rpartition(".")[0].rpartition(".")[0]
        block = next(name for name in taps.decoder_layers(model) if self.module.startswith(f"{name}."))
        self._hooks.enter_context(taps.watch(model.get_submodule(stack), router.begin))
        self._hooks.enter_context(taps.watch(model.get_submodule(block), router.enter))
        self._hooks.enter_context(taps.replace(model, {self.module: router.read}, inputs=True))
        self._hooks.enter_context(taps.replace(model, {self.module: router.write}))

    def detach(self, model: PreTrainedModel) -> None:
        """Leave the codebook as it was before this edit."""
        here = attached(model, self.module)
        if not here or here[-1] is not self:
            raise BadInput("edit", self.module, "has later edits on top of it", "roll those back first")
        self._hooks.close()
        self.book = None
        _ATTACHED[model].remove(self)
        if len(here) > 1:
            here[-2]._open(model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Keys, values, radii and spans."""
        return {"keys": self.keys, "values": self.values, "radii": self.radii, "spans": self.spans}

    def meta(self) -> dict[str, Any]:
        """Layer, position in the codebook, labels."""
        return {
            "module": self.module,
            "before": self.before,
            "touched": list(self.touched),
            "labels": [list(label) for label in self.labels],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> GraceEdit:
        """Rebuild from `tensors` and `meta`."""
        parts: dict[str, Any] = {**meta, **tensors}
        return cls(**parts)


def attached(model: PreTrainedModel, module: str) -> list[GraceEdit]:
    """The edits of `module` in place, oldest first; the last one holds the joint codebook."""
    return [edit for edit in _ATTACHED.get(model, []) if edit.module == module]
