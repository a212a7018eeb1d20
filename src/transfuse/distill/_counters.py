"""Density counters: the paper's network, narrow copies, what they cost, their targets and their counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, NotApplicable
from ..core.training import seeded
from ._base import frozen, logits_of

__all__ = ["CSRNET_TAPS", "CSRNet", "DensityCounter", "cost", "he", "shrink_density", "slim"]

CSRNET_TAPS = ("frontend.1", "frontend.4", "frontend.9", "frontend.16", "backend.1", "backend.7")
"""SKT's taps: ReLU of conv1_1, the three max-pools, ReLU of the first and the fourth dilated convolution."""


def shrink_density(density: Tensor, stride: int = 8, *, clamp: bool = True) -> Tensor:
    """A density map on the grid of a counter's output: cubic interpolation times the area of a cell.

    Sizes are halved with rounding up as often as ceil-mode pooling does.

    Args:
        density: `[B, 1, H, W]`, dots blurred so that an object sums to 1.
        stride: A power of 2.
        clamp: Set undershoots of the interpolation to 0; the authors' code keeps them, `SKT` refuses them.

    Returns:
        `[B, 1, ceil(H / stride), ceil(W / stride)]` with about the same sum.

    Raises:
        BadInput: `stride` is not a power of 2.
    """
    if stride < 1 or stride & (stride - 1):
        raise BadInput("stride", stride, "is not a power of 2", "give the counter's stride")
    size = tuple(density.shape[-2:])
    for _ in range(stride.bit_length() - 1):
        size = tuple(math.ceil(n / 2) for n in size)
    small = nn.functional.interpolate(density, size=size, mode="bicubic", align_corners=False)
    small = small * stride**2
    return small.clamp_min(0.0) if clamp else small


class CSRNet(nn.Module):
    """The paper's teacher (arXiv 1802.10062): ten convolutions of VGG-16, six dilated ones, a map at stride 8.

    Its state can be filled from trained weights of that architecture; here it starts at random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frontend = _stack(3, (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512), 1)
        self.backend = _stack(512, (512, 512, 512, 256, 128, 64), 2)
        self.output_layer = nn.Conv2d(64, 1, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """From images `[B, 3, H, W]`, normalised as ImageNet's, to density `[B, 1, H/8, W/8]`, rounded up."""
        return self.output_layer(self.backend(self.frontend(pixel_values)))


def _stack(before: int, widths: Sequence[int], dilation: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            before = width
        else:
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(*layers)


def slim(model: nn.Module, ratio: float = 4.0, *, seed: int = 0) -> nn.Module:
    """A fresh network of the same wiring and names with 1/ratio of the channels; `model` is left alone.

    Every width is divided and rounded, but for the first convolution's input and the last one's output. Weights are
    He normal by fan-out, biases 0.

    Args:
        model: A network of convolutions, batch norms and layers without weights, defined in order.
        ratio: From 1 up: 4 keeps a quarter.
        seed: Of the weights.

    Raises:
        BadInput: `ratio` below 1.
        NotApplicable: other layers with weights, or grouped convolutions (but depthwise ones).
    """
    if not ratio >= 1:
        raise BadInput("ratio", ratio, "is below 1", "say 4 for a quarter of the channels")
    student = copy.deepcopy(model)
    layers = [(name, module) for name, module in student.named_modules() if not list(module.children())]
    convs = [module for _, module in layers if isinstance(module, nn.Conv2d)]
    if not convs:
        raise NotApplicable(
            "model", type(model).__name__, "has no convolutions", "give a convolutional counter"
        )
    with seeded(seed):
        for name, module in layers:
            put: nn.Module
            if isinstance(module, nn.Conv2d):
                put = _slim_conv(name, module, ratio, first=module is convs[0], last=module is convs[-1])
            elif isinstance(module, nn.BatchNorm2d):
                put = nn.BatchNorm2d(
                    _part(module.num_features, ratio), module.eps, module.momentum, module.affine,
                    module.track_running_stats,
                )  # fmt: skip
            elif any(True for _ in module.parameters()):
                kind = type(module).__name__
                raise NotApplicable(
                    "model", f"{name}: {kind}", "has weights of a kind not known here", "build it"
                )
            else:
                continue
            like = next(module.parameters(), next(module.buffers(), torch.empty(0)))
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, put.to(device=like.device, dtype=like.dtype))
    return student


def _slim_conv(name: str, module: nn.Conv2d, ratio: float, *, first: bool, last: bool) -> nn.Conv2d:
    before = module.in_channels if first else _part(module.in_channels, ratio)
    after = module.out_channels if last else _part(module.out_channels, ratio)
    if module.groups not in (1, module.in_channels) or (module.groups > 1 and after % before):
        raise NotApplicable(
            "model", name, f"has {module.groups} groups", "use plain or depthwise convolutions"
        )
    made = nn.Conv2d(
        before, after, module.kernel_size, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
        before if module.groups > 1 else 1, module.bias is not None, module.padding_mode,
    )  # fmt: skip
    he(made)
    return made


def _part(width: int, ratio: float) -> int:
    return max(1, math.floor(width / ratio + 0.5))


def he(layer: nn.Conv2d) -> None:
    """He normal weights by fan-out, no bias."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def cost(model: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Parameters and multiply-adds of one pass over an input of `shape` `(B, C, H, W)`; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(*shape, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


class DensityCounter:
    """Counts objects with a density network.

    Args:
        model: Returns maps `[B, 1, h, w]`.
        scale: What the density targets were multiplied by.
    """

    def __init__(self, model: nn.Module, *, scale: float = 1.0):
        if not scale > 0:
            raise BadInput("scale", scale, "is not positive", "give the factor of the targets")
        self.model, self.scale = model, scale

    def predict(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Counts, float32 `[B]`: the sum of each map.

        Args:
            images: `[B, C, H, W]`, or a list of `[C, H, W]` of any sizes; of none, there are no counts.
        """
        if not len(images):
            return torch.zeros(0)
        device = next(self.model.parameters()).device
        batches = [images] if isinstance(images, Tensor) else [each.unsqueeze(0) for each in images]
        with frozen(self.model), torch.no_grad():
            maps = [logits_of(self.model(batch.to(device))) for batch in batches]
        return torch.cat([each.float().flatten(1).sum(1) for each in maps]) / self.scale
