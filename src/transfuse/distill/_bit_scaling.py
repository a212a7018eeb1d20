"""The law of quality per bit: what a model's size in bits buys, and how much error a discrete token forgives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.errors import BadInput
from ..core.runs import evaluating
from ._base import logits_of, model_inputs
from ._fake_quant import fake_quant, matrices

__all__ = ["BitScaling", "bit_scaling", "perturbation_tolerance"]


@dataclass
class BitScaling:
    """Quality against size, for several models and bit widths.

    Attributes:
        rows: One dict per model and width: `model` (its number), `bits`, `parameters`, `total_bits`,
            `compute_bits`, `metric`.
        exponents: Width -> (a, b) of the fit log metric = a + b log total_bits over the models; NaN for one model.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    exponents: dict[int, tuple[float, float]] = field(default_factory=dict)

    def predicted(self, bits: int, total_bits: float) -> float:
        """What a width's power law says of a size."""
        a, b = self.exponents[bits]
        return math.exp(a + b * math.log(total_bits))

    def best(self, total_bits: float) -> int:
        """The width whose power law is lowest at a size, smaller metrics being better.

        Raises:
            BadInput: there is no power law, as of one model.
        """
        if any(math.isnan(slope) for _, slope in self.exponents.values()) or not self.exponents:
            count = len({row["model"] for row in self.rows})
            raise BadInput(
                "models", count, "of one size have no power law", "measure several, or read `rows`"
            )
        return min(self.exponents, key=lambda bits: self.predicted(bits, total_bits))

    def envelope(self) -> list[dict[str, float]]:
        """The measured rows that no smaller or equal one beats, by rising size."""
        kept: list[dict[str, float]] = []
        for row in sorted(self.rows, key=lambda row: (row["total_bits"], row["metric"])):
            if not kept or row["metric"] < kept[-1]["metric"]:
                kept.append(row)
        return kept


def bit_scaling(
    models: Sequence[nn.Module],
    bits: Sequence[int],
    metric: Callable[[nn.Module], float],
    *,
    quantizer: Callable[[nn.Module, int], nn.Module] | None = None,
    activation_bits: int | None = None,
    other_bits: int = 16,
) -> BitScaling:
    """Measure the law of quality per bit.

    Total bits are width times quantized weights, plus `other_bits` times the remaining parameters. Compute bits are
    those of one token (one place of an image): 2 times width times the activations' bits per weight of linear,
    convolution and recurrent layers, W4A16 for width 4 and activations in 16 bits.

    Args:
        models: Full-precision models of several sizes; not changed.
        bits: Widths.
        metric: From a quantized model to a positive figure that is better when smaller.
        quantizer: From a copy of a model and a width to the quantized model; by default rounding to nearest, of the
            inputs of those layers too where `activation_bits` is given. One of your own sees to the activations itself.
        activation_bits: Of the activations; None for 16, and none is rounded.
        other_bits: Of what is not quantized.

    Raises:
        BadInput: no model or width; a metric that is not positive; activation bits that are not from 1 to 16.
    """
    if not models or not bits:
        raise BadInput("models", len(models), f"and {len(bits)} widths span no table", "give both")
    if activation_bits is not None and not 1 <= activation_bits <= 16:
        raise BadInput("activation_bits", activation_bits, "is not a number from 1 to 16", "give a bit width")
    found = BitScaling()
    rounding = quantizer or (lambda model, width: fake_quant(model, bits=width, activations=activation_bits))
    across = 16 if activation_bits is None else activation_bits
    for width in bits:
        points = []
        for i, model in enumerate(models):
            whole = sum(p.numel() for p in model.parameters())
            sizes = {id(getattr(m, n)): (m, getattr(m, n).numel()) for _, m, n in matrices(model)}
            rounded = sum(count for _, count in sizes.values())
            multiplied = sum(count for m, count in sizes.values() if not isinstance(m, nn.Embedding))
            value = float(metric(rounding(copy.deepcopy(model), width)))
            if not value > 0:
                raise BadInput("metric", value, "has no logarithm", "return a positive figure")
            size = width * rounded + other_bits * (whole - rounded)
            points.append((math.log(size), math.log(value)))
            found.rows.append({
                "model": i, "bits": width, "parameters": whole, "total_bits": size,
                "compute_bits": 2 * multiplied * width * across, "metric": value,
            })  # fmt: skip
        found.exponents[width] = _line(points)
    return found


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: intercept and slope; NaN where there is no spread."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        return math.nan, math.nan
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    return float(y.mean()) - slope * float(x.mean()), slope


@torch.no_grad()
def perturbation_tolerance(
    model: nn.Module, quantized: nn.Module, batch: Mapping[str, Tensor], *, layer: str, random: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """How much of a latent error survives the choice of a discrete token.

    Both models read the same batch and draw each next token with the same random numbers (Gumbel noise).

    Args:
        model: In full precision.
        quantized: Its quantized copy.
        batch: The models' inputs.
        layer: Name of the module whose output is the latent.
        random: Draws the noise; on the device of the batch.

    Returns:
        `latent_error`, |h_q - h| / |h| over all tokens; `unchanged`, the share of tokens drawn alike; `unchanged_top`,
        the share of equal likeliest tokens.
    """
    seen, logits = [], []
    for each in (model, quantized):
        with evaluating(each), taps.capture(each, layer) as store:
            logits.append(logits_of(each(**model_inputs(each, batch))).float())
        seen.append(store[layer].float())
    uniform = torch.empty_like(logits[0]).uniform_(generator=random).clamp_min(1e-20)
    gumbel = -torch.log(-torch.log(uniform))
    drawn = [(z + gumbel).argmax(-1) for z in logits]
    return {
        "latent_error": float((seen[1] - seen[0]).norm() / seen[0].norm()),
        "unchanged": float((drawn[0] == drawn[1]).double().mean()),
        "unchanged_top": float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()),
    }
