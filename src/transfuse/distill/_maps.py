"""Feature maps and token sequences of image networks, brought to one form."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import BadInput, IncompatibleModels

__all__ = ["exact", "full_precision", "same_grid", "sample_positions", "take", "tokens_from_map"]


def exact(x: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast inside: products of float32 tensors stay in float32, on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


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
