"""How important a layer is: by how much it changes its input, by its weights, or by what rounding it costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import taps
from ..core.errors import BadInput
from ._base import Slot, batches_of, layer_slots, mean_loss, module_names
from ._costs import Matrix, matrices_of
from ._rounding import FULL, Versions, check_rounding

__all__ = ["LayerScores", "Score", "layer_importance", "lim", "orders_of", "zd"]

Score = Literal["lim", "zd", "sensitivity"]


@dataclass(frozen=True)
class LayerScores:
    """What a measure says of each layer.

    Attributes:
        method: "lim", "zd" or "sensitivity".
        values: The measure itself, per layer.
        sizes: Weights in each layer's matrices.
        layers: Names of the layers.
        modules: Names of their matrices' modules, inside a layer.
        losses: Of "sensitivity": bits -> by how much the loss rises when this layer alone has them, in nats.
        matrices: The matrices of each layer, from which their size at any number of bits follows.
    """

    method: str
    values: tuple[float, ...]
    sizes: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    losses: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    matrices: tuple[tuple[Matrix, ...], ...] = ()

    @property
    def importance(self) -> tuple[float, ...]:
        """Higher for layers that should keep their bits: the values, or their negatives for ZD."""
        return tuple(-v for v in self.values) if self.method == "zd" else self.values

    def order(self) -> list[int]:
        """Numbers of the layers, the least important first: the order in which they are lowered."""
        importance = self.importance
        return sorted(range(len(importance)), key=lambda i: (importance[i], i))


def lim(before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
    """Layer input modification of one layer: minus the mean over tokens of cos(x_in, x_out), between -1 and 1.

    Args:
        before: Hidden states entering the layer, `[..., T, d]`.
        after: Those leaving it, the same shape.
        mask: `[..., T]`, 0 where there is no token.

    Returns:
        Scalar float64.
    """
    cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    if mask is None:
        return -cosines.mean()
    there = mask.to(cosines)
    return -(cosines * there).sum() / there.sum()


def zd(weights: Tensor | Sequence[Tensor]) -> float:
    """Share of a layer's pooled weights with (w - mean) / std > 1: one-sided, the standard deviation that of all.

    Weights that are all alike give 0, with a warning.
    """
    pool = [weights] if isinstance(weights, Tensor) else list(weights)
    count = sum(w.numel() for w in pool)
    mean = sum(float(w.double().sum()) for w in pool) / count
    variance = sum(float((w.double() - mean).square().sum()) for w in pool) / count
    edge = mean + math.sqrt(variance)
    largest = max(abs(float(w.max())) for w in pool)
    if math.sqrt(variance) <= 1e-12 * max(largest, abs(mean)):
        warnings.warn("the weights of a layer are all alike: its z-scores are taken as 0", stacklevel=2)
        return 0.0
    return sum(int((w.double() > edge).sum()) for w in pool) / count


def layer_importance(
    model: Any,
    method: Score = "lim",
    calib: Any = None,
    *,
    bits: int | Sequence[int] = 2,
    backend: str = "rtn",
    group_size: int | None = 32,
) -> LayerScores:
    """Score the layers of a model, which is left as it is.

    Args:
        model: A causal language model of transformers (for "lim" and "zd" any model with a stack of blocks).
        method: "lim" (needs `calib`), "zd" (needs nothing), or "sensitivity" (needs `calib`): by how much the loss
            rises when this layer alone is rounded.
        calib: Token ids `[N, T]`, rows of ids, or batches. The paper's text is not known; 4 windows of 128 tokens of
            plain prose are enough for a stable order.
        bits: Widths tried by "sensitivity"; the lowest one ranks the layers.
        backend: What rounds, for "sensitivity".
        group_size: Likewise.

    Raises:
        BadInput: unknown method, no calibration data where it is needed.
    """
    layers = layer_slots(model)
    names = taps.decoder_layers(model)
    sizes = tuple(sum(slot.parameter.numel() for slot in slots) for slots in layers)
    losses: dict[int, tuple[float, ...]] = {}
    if method == "zd":
        values = tuple(zd([slot.parameter.detach() for slot in slots]) for slots in layers)
    elif method == "lim":
        values = _lim_values(model, names, calib)
    elif method == "sensitivity":
        tried = sorted({bits} if isinstance(bits, int) else set(bits))
        losses = _sensitivities(model, layers, calib, tried, backend, group_size)
        values = losses[tried[0]]
    else:
        raise BadInput("method", method, "is not known", 'use "lim", "zd" or "sensitivity"')
    modules = module_names(names, layers)
    return LayerScores(method, values, sizes, tuple(names), modules, losses, matrices_of(layers))


@torch.no_grad()
def _lim_values(model: Any, names: Sequence[str], calib: Any) -> tuple[float, ...]:
    totals, tokens, training = [0.0] * len(names), 0, model.training
    model.eval()
    try:
        for batch in batches_of(calib, next(model.parameters()).device):
            mask, count = batch["attention_mask"], int(batch["attention_mask"].sum())
            # Hooks on the blocks: the last of `output_hidden_states` is normalised already.
            with (
                taps.capture(model, names, inputs=True) as before,
                taps.capture(model, names, stop=True) as after,
            ):
                after.run(**batch, use_cache=False)
            for i, name in enumerate(names):
                totals[i] += count * float(lim(before[name], after[name], mask))
            tokens += count
    finally:
        model.train(training)
    return tuple(total / tokens for total in totals)


def _sensitivities(
    model: Any,
    layers: Sequence[Sequence[Slot]],
    calib: Any,
    bits: Sequence[int],
    backend: str,
    group_size: int | None,
) -> dict[int, tuple[float, ...]]:
    for width in bits:
        check_rounding(layers, [width] * len(layers), backend, group_size)
    base = mean_loss(model, calib)
    found: dict[int, list[float]] = {width: [] for width in bits}
    with Versions(layers, backend, group_size, keep=False) as versions:
        for index in range(len(layers)):
            for width in bits:
                if width == FULL:
                    found[width].append(0.0)
                    continue
                with versions.only({index: width}):
                    found[width].append(mean_loss(model, calib) - base)
    return {width: tuple(values) for width, values in found.items()}


def orders_of(scores: LayerScores, *, random: int = 10, seed: int = 0) -> dict[str, list[int]]:
    """A score's order beside the ones it is compared with, each a list of layers in the order of lowering.

    Returns:
        The score's name, "reverse", "first_to_last", "last_to_first", and "random_0", "random_1", ...
    """
    from ..core.training import generator

    own, count, draw = scores.order(), len(scores.values), generator(seed)
    found = {
        scores.method: own,
        "reverse": own[::-1],
        "first_to_last": list(range(count)),
        "last_to_first": list(range(count))[::-1],
    }
    return {**found, **{f"random_{i}": torch.randperm(count, generator=draw).tolist() for i in range(random)}}
