"""Layers whose weights differ from example to example by a weighted sum of stored changes, never made explicit.

    y = x W^T + sum_t w_t (x V_t) diag(S_t) U_t^T                  w [B, T], U_t [m, r], S_t [r], V_t [n, r]

Small tensors (norms, biases) are mixed as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput, NotApplicable

__all__ = ["Exclusive", "Routing", "attach", "low_rank_mix"]

Exclusive = Mapping[str, Tensor]
"""What the tasks add to one tensor: `U` [T, m, r], `S` [T, r], `V` [T, n, r], or `delta` [T, *shape]."""


class Routing:
    """The weights of the examples now being computed; None for the shared model alone."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Routing:
        return memo.setdefault(id(self), Routing())

    def of(self, rows: int) -> Tensor:
        """Weights `[rows, T]`: beams and flattened tokens follow their example.

        Raises:
            BadInput: `rows` is no multiple of the examples.
        """
        assert self.weights is not None
        count = len(self.weights)
        if rows % count:
            raise BadInput(
                "routing", tuple(self.weights.shape), f"does not fit {rows} rows", "give a row per example"
            )
        return self.weights if rows == count else self.weights.repeat_interleave(rows // count, 0)


def low_rank_mix(x: Tensor, weights: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """sum_t w_t (x V_t) diag(S_t) U_t^T for each example.

    Args:
        x: `[B, ..., n]`.
        weights: `[B, T]`.
        u: `[m, T * r]`, the U_t side by side.
        s: `[T, r]`.
        v: `[n, T * r]`.

    Returns:
        `[B, ..., m]`.
    """
    return (x @ v * _scales(x, weights, s)) @ u.T


def _scales(x: Tensor, weights: Tensor, s: Tensor) -> Tensor:
    """w_t S_t `[B, 1, ..., T * r]`."""
    scaled = (weights.to(s.dtype)[:, :, None] * s).flatten(1)
    return scaled.view(len(scaled), *[1] * (x.dim() - 2), scaled.shape[1])


def _beside(stack: Tensor) -> Tensor:
    """`[T, n, r]` -> `[n, T * r]`."""
    return stack.transpose(0, 1).flatten(1).contiguous()


class _Mixed(nn.Module):
    """A layer with the parameters of another, and what the tasks add to its weight and bias."""

    weight: Tensor
    bias: Tensor | None
    bias_delta: Tensor | None
    U: Tensor
    S: Tensor
    V: Tensor
    delta: Tensor

    def __init__(self, layer: nn.Module, changes: Mapping[str, Exclusive], routing: Routing):
        super().__init__()
        self.routing = routing
        self.train(layer.training)
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if "bias" not in self._parameters:
            self.bias = None
        weight = changes.get("weight", {})
        like: Any = layer.weight
        self.dense = "delta" in weight
        for part, tensor in weight.items():
            ready = tensor if part in ("S", "delta") else _beside(tensor)
            self.register_buffer(part, ready.to(like.device, like.dtype), persistent=False)
        self.mixes_weight = bool(weight)
        bias = changes.get("bias", {}).get("delta")
        self.register_buffer(
            "bias_delta", None if bias is None else bias.to(like.device, like.dtype), persistent=False
        )

    def _bias(self, y: Tensor, weights: Tensor, axis: int = -1) -> Tensor:
        if self.bias_delta is None:
            return y
        mixed = weights.to(y.dtype) @ self.bias_delta
        shape = [len(mixed)] + [1] * (y.dim() - 1)
        shape[axis] = mixed.shape[1]
        return y + mixed.view(shape)


class _MixedLinear(_Mixed):
    """A linear layer, weight `[m, n]`, or with `transposed` one that stores it `[n, m]` (GPT-2's Conv1D)."""

    def __init__(self, layer: nn.Module, changes: Mapping[str, Exclusive], routing: Routing):
        super().__init__(layer, changes, routing)
        self.transposed = isinstance(layer, Conv1D)
        shape = reversed(self.weight.shape) if self.transposed else self.weight.shape
        self.out_features, self.in_features = shape

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        if self.routing.weights is None:
            return y
        w = self.routing.of(len(x))
        if self.mixes_weight and self.dense:
            order = "b...n,tnm,bt->b...m" if self.transposed else "b...n,tmn,bt->b...m"
            y = y + torch.einsum(order, x, self.delta, w.to(x.dtype))
        elif self.mixes_weight:
            u, v = (self.V, self.U) if self.transposed else (self.U, self.V)
            y = y + low_rank_mix(x, w, u, self.S, v)
        return self._bias(y, w)


class _MixedEmbedding(_Mixed):
    """An embedding `[V, d]`; some models multiply what it gives by a number."""

    embed_scale: Tensor | None

    def __init__(self, layer: nn.Module, changes: Mapping[str, Exclusive], routing: Routing):
        super().__init__(layer, changes, routing)
        source: Any = layer
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            source.num_embeddings, source.embedding_dim, source.padding_idx
        )  # fmt: skip
        scale = getattr(layer, "embed_scale", None)
        self.register_buffer(
            "embed_scale", None if scale is None else torch.as_tensor(scale), persistent=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        y = F.embedding(ids, self.weight)
        if self.routing.weights is not None:
            count = len(self.routing.weights)
            if (
                ids.dim() == 1
                and count > 1
                and bool((self.routing.weights != self.routing.weights[:1]).any())
            ):
                problem = "has ids without an axis of examples: positions, or tokens?"
                raise NotApplicable(
                    "embedding", tuple(ids.shape), problem, "exclude it, or give one example at a time"
                )
            if len(ids) == 1 and count > 1:  # positions, the same for every example
                ids, y = ids.expand(count, *ids.shape[1:]), y.expand(count, *y.shape[1:])
            w = self.routing.of(len(ids))
            if self.dense:
                rows = torch.stack([F.embedding(ids, change) for change in self.delta], 1)
                y = y + torch.einsum("bt...,bt->b...", rows, w.to(rows.dtype))
            else:
                found = F.embedding(ids, self.U)
                y = y + (found * _scales(found, w, self.S)) @ self.V.T
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)


class _MixedConv(_Mixed):
    """A 2-d convolution: V_t are kernels, U_t mixes their outputs."""

    def __init__(self, layer: nn.Module, changes: Mapping[str, Exclusive], routing: Routing):
        super().__init__(layer, changes, routing)
        source: Any = layer
        self.options = {"stride": source.stride, "padding": source.padding, "dilation": source.dilation}

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, **self.options)
        if self.routing.weights is None:
            return y
        w = self.routing.of(len(x))
        if self.mixes_weight and self.dense:
            each = [F.conv2d(x, change, None, **self.options) for change in self.delta]
            y = y + torch.einsum("tb...,bt->b...", torch.stack(each), w.to(x.dtype))
        elif self.mixes_weight:
            inner = F.conv2d(x, self.V.T.reshape(-1, *self.weight.shape[1:]), None, **self.options)
            scaled = inner * _scales(inner, w, self.S).view(len(x), -1, 1, 1)
            y = y + torch.einsum("bk...,mk->bm...", scaled, self.U)
        return self._bias(y, w, axis=1)


class _MixedVectors(nn.Module):
    """Any module whose changed tensors are vectors (norms): each example gets its own."""

    def __init__(self, layer: nn.Module, changes: Mapping[str, Exclusive], routing: Routing):
        super().__init__()
        self.inner, self.routing, self.names = layer, routing, list(changes)
        self.train(layer.training)
        for name, change in changes.items():
            own: Any = getattr(layer, name)
            self.register_buffer(f"delta_{name}", change["delta"].to(own.device, own.dtype), persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.routing.weights is None:
            return self.inner(x, *args, **kwargs)
        w = self.routing.of(len(x))
        values = {}
        for name in self.names:
            own, change = getattr(self.inner, name), getattr(self, f"delta_{name}")
            values[name] = own + torch.einsum("bt,t...->b...", w.to(own.dtype), change)

        def one(mine: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(self.inner, mine, (row[None], *args), kwargs)[0]

        return torch.vmap(one)(values, x)


def attach(model: nn.Module, exclusives: Mapping[str, Exclusive], routing: Routing) -> None:
    """Replace the layers of `model` whose tensors are in `exclusives`; a tensor that layers share is mixed in each.

    Raises:
        NotApplicable: a matrix in a layer of a kind that is not known here, or in one of several experts.
    """
    names: dict[int, str] = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    names.update(
        {id(tensor): name for name, tensor in model.named_parameters()}
    )  # of tied ones, the first name
    found: list[tuple[str, nn.Module, dict[str, Exclusive]]] = []
    for place, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        changes = {
            part: exclusives[names[id(tensor)]]
            for part, tensor in own.items()
            if tensor is not None and names.get(id(tensor)) in exclusives
        }
        if changes:
            _check_kind(place, module, changes)
            found.append((place, module, changes))
    for place, module, changes in found:
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, _kind(module)(module, changes, routing))


def _kind(module: nn.Module) -> type[nn.Module]:
    if type(module) in (nn.Linear, Conv1D):
        return _MixedLinear
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return _MixedEmbedding
    if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
        return _MixedConv
    return _MixedVectors


def _check_kind(place: str, module: nn.Module, changes: Mapping[str, Exclusive]) -> None:
    if not place:
        raise NotApplicable("experts", type(module).__name__, "is a single layer", "put it into a module")
    if place.endswith("relative_attention_bias"):
        raise NotApplicable("experts", place, "is read by distances, not by examples", "exclude it")
    if ".experts." in f".{place}.":
        raise NotApplicable(
            "experts", place, "is one of several experts: its rows are no examples", "exclude it"
        )
    if _kind(module) is not _MixedVectors:
        return
    for name, change in changes.items():
        if "delta" not in change or change["delta"].dim() > 2:
            raise NotApplicable(
                "experts", f"{place}.{name}", f"is a matrix of a {type(module).__name__}, which cannot be mixed",
                "exclude it",
            )  # fmt: skip
