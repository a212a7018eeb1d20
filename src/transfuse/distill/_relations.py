"""An objective on the relations that attention is made of: queries, keys and values among themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, NotApplicable
from ._base import Signal, is_causal
from ._features import LayerObjective

__all__ = ["AttentionRelation", "relation_sums", "relations"]

_KINDS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("c_attn",))


def relations(x: Tensor, heads: int, pairs: Tensor, kind: Literal["softmax", "raw"] = "softmax") -> Tensor:
    """Scaled products of a layer's queries (keys, values) among themselves (AutoDistil, arXiv 2201.12507).

    Args:
        x: `[B, T, W]`; the W mod heads last entries of each are dropped.
        heads: Number of relation heads.
        pairs: bool `[B, T, T]`: which key each query may see.
        kind: "softmax" over the keys, or "raw", the products.

    Returns:
        `[B, heads, T, T]`; 0 for pairs that are not seen.
    """
    width = x.shape[-1] // heads
    parts = x[..., : width * heads].unflatten(-1, (heads, width)).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / width**0.5
    unseen = ~pairs.unsqueeze(1)
    if kind == "raw":
        return scores.masked_fill(unseen, 0.0)
    return torch.softmax(scores.masked_fill(unseen, torch.finfo(scores.dtype).min), -1).masked_fill(
        unseen, 0.0
    )


def relation_sums(
    student: Tensor,
    teacher: Tensor,
    heads: int,
    pairs: Tensor,
    kind: Literal["softmax", "raw"] = "softmax",
) -> Tensor:
    """Sum over seen pairs, mean over heads, of the squared difference of the two models' relations.

    Args:
        student: `[B, T, W]`.
        teacher: `[B, T, W']`.
        heads: Number of relation heads.
        pairs: bool `[B, T, T]`.
        kind: See `relations`.

    Returns:
        Scalar.
    """
    ours, theirs = (relations(each, heads, pairs, kind) for each in (student, teacher))
    return (ours - theirs).square().sum() / heads


class AttentionRelation(LayerObjective):
    """Relations among queries, among keys and among values of a layer (AutoDistil, arXiv 2201.12507).

    sum over X in Q, K, V of weight_X (1/R) sum over heads of the mean over pairs (query, key) of
    (Rel_T(X) - Rel_S(X))^2, with Rel(X) = softmax(X X^T / sqrt(d) + mask). Queries and keys that are padding count
    nowhere. Q, K and V are the projections' outputs, before rotary positions and norms; where fewer keys and values
    serve several queries, they are repeated.

    Args:
        relation: "softmax", as in the paper, or "raw", without it, as in the authors' code.
        heads: Number of relation heads R; None for the teacher's attention heads.
        weights: Of Q, K and V.
        causal: Whether a token sees only itself and what is before; None for what the student does.
        layers: As for `LayerObjective`, but None is the last block of each.
        kd_weight: Weight of the sum.
        ce_weight: Weight of the cross-entropy with the labels.

    Raises:
        BadInput: an argument out of range.
        NotApplicable: projections of a kind not known here.
    """

    additive = True

    def __init__(
        self,
        *,
        relation: Literal["softmax", "raw"] = "softmax",
        heads: int | None = None,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        causal: bool | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(layers=layers, kd_weight=kd_weight, ce_weight=ce_weight)
        if relation not in ("softmax", "raw"):
            raise BadInput("relation", relation, "is not known", 'use "softmax" or "raw"')
        if heads is not None and heads < 1:
            raise BadInput("heads", heads, "is below 1", "give a positive number")
        if len(weights) != 3 or any(not 0 <= weight < float("inf") for weight in weights):
            raise BadInput("weights", weights, "are not three weights", "give those of Q, K and V")
        self.relation, self.heads, self.weights, self.causal = relation, heads, tuple(weights), causal
        self.attention_heads = (1, 1)

    def default(self, student: Any, ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
        """The last blocks."""
        return [(len(ours) - 1, len(theirs) - 1)]

    def prepare(
        self, student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None, theirs: Any = None
    ) -> None:
        """Name the projections, read the numbers of heads.

        Raises:
            NotApplicable: projections of a kind not known here.
        """
        super().prepare(student, teachers)
        models = (student, teachers[0])
        blocks = (self.student_taps, self.teacher_taps)
        named = [
            [name for block in stack for name in _projections(model, block)]
            for model, stack in zip(models, blocks, strict=True)
        ]
        self.student_taps, self.teacher_taps = (tuple(names) for names in named)
        self.attention_heads = _heads(student), _heads(teachers[0])
        if self.causal is None:
            self.causal = is_causal(student)

    def triples(self, signal: Signal, names: Sequence[str], heads: int) -> list[tuple[Tensor, ...]]:
        """Q, K and V `[B, T, W]` of each layer, in float32, of one width."""
        tensors = [
            part.to(torch.promote_types(part.dtype, torch.float32))
            for name in names
            for part in _thirds(signal.taps[name], name)
        ]
        found = []
        for i in range(0, len(tensors), 3):
            q = tensors[i]
            size = q.shape[-1] // heads
            found.append((q, *(_repeated(x, size, q.shape[-1]) for x in tensors[i + 1 : i + 3])))
        return found

    def seen(self, batch: Mapping[str, Any], like: Tensor) -> Tensor:
        """Bool `[B, T, T]`: pairs of a query and a key that both count."""
        mask = self.mask(batch, like)
        pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
        return pairs.tril() if self.causal else pairs

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The pairs that count."""
        if "attention_mask" not in batch:
            return {}
        mask = batch["attention_mask"]
        return {"pairs": self.seen(batch, mask.unsqueeze(-1)).sum()}

    def distance(self, student: Signal, teacher: Signal, batch: Mapping[str, Any]) -> Tensor:
        ours = self.triples(student, self.student_taps, self.attention_heads[0])
        theirs = self.triples(teacher, self.teacher_taps, self.attention_heads[1])
        heads = self.heads or self.attention_heads[1]
        narrow = min(each[0].shape[-1] for each in (*ours, *theirs))
        if heads > narrow:
            raise BadInput("heads", heads, f"exceeds the width {narrow}", "use fewer relation heads")
        mask = self.mask(batch, ours[0][0])
        pairs = self.seen(batch, ours[0][0])
        values = []
        for layer, other in zip(ours, theirs, strict=True):
            for weight, x, y in zip(self.weights, layer, other, strict=True):
                x, y = (each.masked_fill(~mask.unsqueeze(-1), 0.0) for each in (x, y.detach()))
                with torch.autocast(x.device.type, enabled=False):
                    values.append(weight * relation_sums(x, y.to(x.dtype), heads, pairs, self.relation))
        count = batch.get("pairs")
        if count is None:
            count = pairs.sum().clamp_min(1)
        return torch.stack(values).sum() / len(ours) / count


def _projections(model: nn.Module, block: str) -> list[str]:
    """Names of a block's projections to queries, keys and values; one name where one makes all three."""
    names = [name for name, _ in model.get_submodule(block).named_modules()]
    for kind in _KINDS:
        found = [f"{block}.{name}" for last in kind for name in names if name.rpartition(".")[2] == last]
        if len(found) == len(kind):
            return found
    raise NotApplicable(
        "layers", block, "has no query, key and value projections known here", "use HiddenStates"
    )


def _thirds(x: Tensor, name: str) -> tuple[Tensor, ...]:
    return x.chunk(3, dim=-1) if name.endswith("c_attn") else (x,)


def _heads(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(config.num_attention_heads)


def _repeated(x: Tensor, size: int, width: int) -> Tensor:
    """Heads of `size` repeated, each in place, to `width` in all."""
    if x.shape[-1] == width:
        return x
    return x.unflatten(-1, (-1, size)).repeat_interleave(width // x.shape[-1], dim=-2).flatten(-2)
