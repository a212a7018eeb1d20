"""Streams that share a forward pass: caches aligned on the right, repeated for beams and put in their order."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .errors import NotApplicable
from .remote import BlackBox
from .streams import Stream
from .taps import contiguous_head

__all__ = ["Group", "Reading"]


def _accepts(model: PreTrainedModel, name: str) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


class Group:
    """Streams of one model that share a forward pass: rows of stream 0, then of stream 1, ...

    Args:
        stream: The first of them, as `checked` returns it.
        use_cache: False reads the whole text again each time.
    """

    def __init__(self, stream: Stream, use_cache: bool):
        self.model, self.ids, mask = stream
        self.mask: Tensor = torch.ones_like(self.ids) if mask is None else mask
        self.members, self.use_cache = 1, use_cache
        self.cache: Any = None
        self.padded = not bool(self.mask.all())
        self.added = 0  # tokens behind the prompts
        self.live: Tensor | None = None
        if not isinstance(self.model, BlackBox):
            self.takes_positions = _accepts(self.model, "position_ids")
            self.takes_keep = _accepts(self.model, "logits_to_keep")

    def forward(self, keep: int = 1) -> Tensor:
        """Logits `[rows, keep, V]` of the last `keep` positions, reading only what is not in the cache."""
        if isinstance(self.model, BlackBox):
            return self.model.scores(self.ids, self.mask, new=self.added, keep=keep, live=self.live)
        done = 0 if self.cache is None else self.ids.shape[1] - 1
        kwargs: dict[str, Any] = {"use_cache": self.use_cache}
        if self.takes_positions:
            kwargs["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, done:]
        if self.takes_keep:
            kwargs["logits_to_keep"] = keep
        if self.cache is not None:
            kwargs["past_key_values"] = self.cache
        # Without padding no mask is given, as in transformers' own loop: the plain causal kernels are faster.
        mask = self.mask if self.padded else None
        with contextlib.nullcontext() if done else contiguous_head(self.model):
            output = self.model(input_ids=self.ids[:, done:], attention_mask=mask, **kwargs)
        self.cache = getattr(output, "past_key_values", None) if self.use_cache else None
        return output.logits[:, -keep:]

    def append(self, tokens: Tensor, live: Tensor | None = None) -> None:
        """Give every stream of the group the tokens `[B]` or `[B, T]` that were chosen.

        `live`, `[B]` bool: the rows that matter. A server is asked about no others.
        """
        self.live = live
        tokens = tokens if tokens.dim() == 2 else tokens[:, None]
        tokens = tokens.to(self.ids.device).repeat(self.members, 1)
        self.added += tokens.shape[1]
        self.ids = torch.cat([self.ids, tokens], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)

    def select(self, rows: Tensor) -> None:
        """Put row `rows[i]` of every stream in place i; rows may be taken more than once, or not at all.

        Raises:
            NotApplicable: a cache that does not say how.
        """
        height = self.ids.shape[0] // self.members
        rows = rows.to(self.ids.device)
        if torch.equal(rows, torch.arange(height, device=rows.device)):
            return  # every beam goes on where it is: the cache need not be copied
        rows = torch.cat([rows + member * height for member in range(self.members)])
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is None:
            return
        if not isinstance(self.cache, Cache):
            raise NotApplicable(
                "streams",
                type(self.model).__name__,
                "keeps a cache whose rows cannot be put in the order of the beams",
                "set use_cache=False, or decode without beams",
            )
        self.cache.reorder_cache(rows)

    def absorb(self, other: Group) -> bool:
        """Take the streams of `other` into this group, padding the shorter cache on the left.

        Done where it saves time: reading the padding of the cache at every token must cost no more memory
        traffic than reading the weights a second time. Only caches of plain and sliding-window attention can
        be aligned. `other` loses its cache.
        """
        if self.model is not other.model or self.ids.device != other.ids.device:
            return False
        if isinstance(self.model, BlackBox):
            return False
        if self.use_cache:
            pairs = _layer_pairs(self.cache, other.cache)
            if pairs is None or _padding_bytes(pairs) > _weight_bytes(self.model):
                return False
            length = max(self.ids.shape[1], other.ids.shape[1])
            for ours, theirs in pairs:
                ours.keys = _stack(ours.keys, theirs.keys, dim=-2)
                ours.values = _stack(ours.values, theirs.values, dim=-2)
                theirs.keys = theirs.values = None
                if ours.is_sliding:
                    ours.cumulative_length = length
            other.cache = None
        self.padded |= other.padded or self.ids.shape[1] != other.ids.shape[1]
        self.ids = _stack(self.ids, other.ids, dim=-1)
        self.mask = _stack(self.mask, other.mask, dim=-1)
        self.members += other.members
        return True


def _stack(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Rows of both, zeros put before the shorter of the two along `dim` (negative)."""
    width = max(first.shape[dim], second.shape[dim])
    behind = [0, 0] * (-1 - dim)
    padded = [torch.nn.functional.pad(t, [*behind, width - t.shape[dim], 0]) for t in (first, second)]
    return torch.cat(padded)


def _layer_pairs(first: Any, second: Any) -> list[tuple[Any, Any]] | None:
    """Matching cache layers, or None where their kind is not one that padding on the left leaves right."""
    if not (isinstance(first, Cache) and isinstance(second, Cache)) or len(first.layers) != len(
        second.layers
    ):
        return None
    pairs = list(zip(first.layers, second.layers))
    for ours, theirs in pairs:
        if type(ours) is not type(theirs) or type(ours) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return None
        if not (ours.is_initialized and theirs.is_initialized):
            return None
    return pairs


def _padding_bytes(pairs: list[tuple[Any, Any]]) -> int:
    total = 0
    for layers in pairs:
        width = max(layer.keys.shape[-2] for layer in layers)
        for layer in layers:
            missing = width - layer.keys.shape[-2]
            for stored in (layer.keys, layer.values):
                total += missing * stored[..., 0, :].numel() * stored.element_size()
    return total


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Reading:
    """All streams, read up to the last token that was chosen: one forward pass per model and token.

    Args:
        streams: As `checked` returns them.
        width: How many tokens are scored; what a model scores beyond is cut off.
        device: Where the logits go.
        copies: How many beams each prompt gets. A prompt is read once, what came of it is copied.
        use_cache: False reads the whole text again at each step.

    Attributes:
        logits: Per stream `[B * copies, V]` float32, what it says about the next token.
    """

    def __init__(
        self, streams: Sequence[Stream], *, width: int | None, device: Any, copies: int, use_cache: bool
    ):
        self.width, self.device = width, device
        self.logits: list[Tensor] = []
        self._groups: list[tuple[Group, list[int]]] = []
        rows = torch.arange(len(streams[0].input_ids)).repeat_interleave(copies)
        for n, stream in enumerate(streams):
            group = Group(stream, use_cache)
            logits = self._last(group, copy=True)  # a copy: else the logits of the whole prompt are kept
            self.logits.append(logits if copies == 1 else logits.repeat_interleave(copies, dim=0))
            group.select(rows)
            for host, members in self._groups:
                if host.absorb(group):
                    members.append(n)
                    break
            else:
                self._groups.append((group, [n]))

    def _last(self, group: Group, *, copy: bool = False) -> Tensor:
        return group.forward()[:, -1, : self.width].to(self.device, torch.float32, copy=copy)

    def advance(self, tokens: Tensor, rows: Tensor | None = None, live: Tensor | None = None) -> None:
        """Have all streams read the chosen tokens.

        Args:
            tokens: `[B * copies]` int64.
            rows: `[B * copies]` int64: token i is put after the text of row `rows[i]`.
            live: `[B * copies]` bool, the rows whose scores will matter.
        """
        for group, members in self._groups:
            if rows is not None:
                group.select(rows)
            group.append(tokens, live)
            for n, part in zip(members, self._last(group).chunk(len(members))):
                self.logits[n] = part
