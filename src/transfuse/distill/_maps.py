"""Feature maps and token sequences of image networks, brought to one form, and the graph of their tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import BadInput, IncompatibleModels

__all__ = [
    "exact",
    "full_precision",
    "knn_graph",
    "same_grid",
    "sample_positions",
    "squared_distances",
    "take",
    "tokens_from_map",
]


def exact(x: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast inside: products of float32 tensors stay in float32, on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def squared_distances(tokens: Tensor) -> Tensor:
    """Squared Euclidean distances `[M, M]` of tokens `[M, D]`, in float32 at least.

    The product is made in float64: in float32 nodes far from the mean would lose the distances to their neighbours.
    """
    given = exact(tokens)
    with full_precision(given):
        x = given.double()
        x = x - x.mean(0).detach()
        norms = x.square().sum(-1)
        return (norms[:, None] + norms[None, :] - 2.0 * x @ x.T).clamp_min(0.0).to(given.dtype)


def knn_graph(
    tokens: Tensor, *, k: int = 8, sigma: float | Literal["auto"] = "auto"
) -> tuple[Tensor, Tensor]:
    """The weighted k-nearest-neighbour graph of a network's nodes.

    Args:
        tokens: Nodes `[M, D]`.
        k: Neighbours of a node; itself is none.
        sigma: Width of the kernel, in squared feature units; "auto" is the mean squared distance to the neighbours,
            without gradient.

    Returns:
        A `[M, M]`, where A_ij > 0 if i is a neighbour of j, and the edges, bool `[M, M]`.

    Raises:
        BadInput: fewer than two nodes, or k does not leave a node out.
    """
    count = len(tokens)
    if count < 2:
        raise BadInput("tokens", count, "node makes no graph", "use more images or more tokens per image")
    if not 1 <= k < count:
        remedy = "use a smaller k, larger batches, or drop the last short batch (dataloader_drop_last)"
        raise BadInput("k", k, f"is not from 1 to {count - 1}, with {count} nodes in the batch", remedy)
    squared = squared_distances(tokens)
    with torch.no_grad():
        apart = squared.masked_fill(torch.eye(count, dtype=torch.bool, device=squared.device), torch.inf)
        near, neighbours = apart.topk(k, dim=-1, largest=False)
        edges = torch.zeros_like(apart, dtype=torch.bool).scatter(-1, neighbours, True).T
        width = near.mean().clamp_min(1e-12) if sigma == "auto" else sigma
    return torch.exp(-squared / (2.0 * width)).masked_fill(~edges, 0.0), edges


def tokens_from_map(features: Tensor, patch: int = 1) -> Tensor:
    """Tokens of a feature map: squares of `patch` by `patch` positions, each flattened.

    Args:
        features: A map `[B, C, h, w]`, or tokens `[B, N, D]`, which stay as they are.
        patch: Side of a square; h and w are multiples of it. For tokens it is 1.

    Returns:
        `[B, (h / patch)(w / patch), C patch^2]`, row by row.

    Raises:
        BadInput: the map cannot be cut so.
    """
    shape = tuple(features.shape)
    if features.dim() == 3 and patch == 1:
        return features
    if features.dim() != 4 or patch < 1 or shape[2] % patch or shape[3] % patch:
        raise BadInput("patch", patch, f"does not cut features of shape {shape}", "use a divisor of the map")
    b, c, h, w = shape
    squares = features.reshape(b, c, h // patch, patch, w // patch, patch)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def sample_positions(images: int, tokens: int, count: int, random: torch.Generator) -> Tensor:
    """Places drawn without replacement, for each image by itself: int64 `[images, count]`, below `tokens`."""
    return torch.rand(images, tokens, generator=random).argsort(-1)[:, :count]


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens at the places, image after image: `[B, P, D]` and int64 `[B, n]` give `[B n, D]`."""
    index = positions.to(tokens.device).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index).flatten(0, 1)


def same_grid(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps of one size: finer ones are averaged down to the coarsest. Tokens of one number stay as they are.

    Args:
        features: Maps `[B, C, h, w]` or tokens `[B, N, D]`, widths may differ. Tokens that must be averaged, or go
            with maps, are laid out as a square.

    Returns:
        All maps, or all tokens.

    Raises:
        IncompatibleModels: tokens that have to be a square and are not.
    """
    if all(x.dim() == 3 for x in features) and len({x.shape[1] for x in features}) == 1:
        return list(features)
    maps = [_map(x) for x in features]
    height, width = min(x.shape[2] for x in maps), min(x.shape[3] for x in maps)
    return [
        x if x.shape[2:] == (height, width) else functional.adaptive_avg_pool2d(x, (height, width))
        for x in maps
    ]


def _map(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    side = math.isqrt(x.shape[1]) if x.dim() == 3 else 0
    if x.dim() != 3 or side * side != x.shape[1]:
        shape = tuple(x.shape)
        remedy = "tap maps [B, C, h, w] or tokens [B, N, D]; leave out tokens that are no patches"
        raise IncompatibleModels("features", shape, "are no map and no square of tokens", remedy)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
