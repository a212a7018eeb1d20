"""Masks over a hidden feature: every channel is a token, tokens attend to each other, each gets a share of itself."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, NotApplicable

__all__ = ["FeatureMask1d", "FeatureMask2d", "mask_for", "masked_by"]

LARGE = 20_000_000  # weights of one embedding


class FeatureMask1d(nn.Module):
    """MaskNet of a vector (arXiv 2507.07015): an embedding into one token per channel, attention, a sigmoid.

    The embedding holds F * h * F weights, so it grows with the cube of the feature's width.

    Args:
        width: F, the number of channels.
        heads: Of the attention.
        factor: The token width h is floor(F / (factor * heads)) * heads.

    Raises:
        BadInput: no token width is left.
    """

    def __init__(self, width: int, *, heads: int = 3, factor: int = 2):
        super().__init__()
        if heads < 1 or factor < 1:
            raise BadInput("heads", heads, f"and factor = {factor} are not counts", "give 1 or more")
        self.width, self.token = width, width // (factor * heads) * heads
        if not self.token:
            problem = f"channels are too few for {heads} heads at factor {factor}"
            raise BadInput(
                "mask_layers", width, problem, "choose a wider layer, fewer heads or a smaller factor"
            )
        if width * width * self.token > LARGE:
            warnings.warn(
                f"a mask over {width} channels has {width * width * self.token / 1e6:.0f} M weights in its "
                "embedding; a larger factor or a narrower layer needs less",
                stacklevel=2,
            )
        self.embed = nn.Linear(width, self.token * width)
        self.attention = nn.MultiheadAttention(self.token, heads, batch_first=True)
        self.head = nn.Linear(self.token, 1)

    def forward(self, z: Tensor) -> Tensor:
        """From the feature `[B, F]` to its mask `[B, F]`, each entry between 0 and 1."""
        tokens = self.embed(z).reshape(len(z), self.width, self.token)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return torch.sigmoid(self.head(mixed).squeeze(-1))


class FeatureMask2d(nn.Module):
    """MaskNet of a map: it is reduced to a vector first.

    Args:
        width: F, the number of channels.
        heads: Of the attention.
        factor: See `FeatureMask1d`.
    """

    def __init__(self, width: int, *, heads: int = 3, factor: int = 2):
        super().__init__()
        self.mask = FeatureMask1d(width, heads=heads, factor=factor)
        self.reduce = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """From the map `[B, F, H, W]` to its mask `[B, F]`, the same at all places."""
        return self.mask(self.reduce(z).flatten(1))


def mask_for(z: Tensor, *, heads: int = 3, factor: int = 2) -> FeatureMask1d | FeatureMask2d:
    """The mask that fits a layer's output `[B, F]` or `[B, F, H, W]`; a map of one place counts as a vector.

    Raises:
        NotApplicable: an output of another kind.
    """
    if z.dim() not in (2, 4):
        raise NotApplicable(
            "mask_layers", tuple(z.shape), "is neither [B, F] nor [B, F, H, W]", "choose another"
        )
    spatial = z.dim() == 4 and z.shape[2:] != (1, 1)
    made = (FeatureMask2d if spatial else FeatureMask1d)(z.shape[1], heads=heads, factor=factor)
    return made.to(z.device)


def masked_by(mask: nn.Module, z: Tensor) -> Tensor:
    """The layer's output times its mask, in its shape and dtype."""
    weight = next(mask.parameters())
    seen = z.flatten(1) if isinstance(mask, FeatureMask1d) else z
    share = mask(seen.to(weight.dtype)).to(z.dtype)
    return z * share.reshape(*share.shape, *(1,) * (z.dim() - 2))
