"""Layerwise quantization: unimportant layers get fewer bits, so that the average lands on any target.

:arxiv: 2406.17415
:moves: a memory budget -> the number of bits of each layer
:access: hidden, weights
:reversible: no
:context: no
:extra: quantize

Integer bit widths are steps: 4 bits fit a device or they do not, and the next size is 3. Here the layers of a model
are ranked by importance; the important ones keep the higher width, the others get the lower one, as many as bring the
average to the target (30 layers at 4 bits and 10 at 2 make 3.5). What rounds the weights is up to a backend.

Importance of layer i with input x_i and output x_(i+1):

- LIM, layer input modification: minus the mean over tokens of cos(x_i, x_(i+1)). A layer that hardly turns its input
  is unimportant. Needs some text.
- ZD, distribution of z-scores: the share of the layer's pooled weights with (w - mean) / std > 1; the lower, the more
  important. Needs nothing.
- Sensitivity (not of the paper): by how much the loss rises when layer i alone is rounded. One forward pass over the
  calibration text per layer and width. It also feeds a knapsack over more than two widths.

With layer sizes s_i the average is sum_i s_i b_i / sum_i s_i. A step and an offset of 16 bits per group of g weights
come on top, 32 / g bits per weight; both figures are reported. `quantization_curve` lowers 0, 1, ..., L layers in any
order and measures each model, `pruning_curve` leaves the same layers out instead.

The paper has no code, and other implementations differ in three places: here cosines are per token and then averaged
(one cosine over the flattened tensor ranks visibly worse), weights of a layer are pooled before their z-scores, and
the z-scores count on one side. Rounding is asymmetric to the nearest within groups (`backend="rtn"`, values in
ordinary layers) or HQQ (`backend="hqq"`, hqq's own layers, packed in memory; `HqqConfig` of transformers cannot tell
one layer's bits from another's). `BitPlan` also speaks to GPTQModel, torchao and llama.cpp. Below 3 bits searches that
look at several layers together do better than any ranking of single ones.

    from transfuse import load
    from transfuse.quantize.layerwise_quant import LayerwiseQuant, windows

    model, tokenizer = load("smollm2-135m")
    rows = windows(tokenizer, open("text.txt").read(), 4, 128)
    quantized = LayerwiseQuant(target_bits=3.5).quantize(model, rows)
    quantized.plan.bits, quantized.report.after          # 4 or 2 for each layer; bytes
    quantized.save("runs/3.5-bit", tokenizer=tokenizer)
    quantized.plan.to_llamacpp_tensor_types()            # for llama-quantize --tensor-type
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import BadInput
from ._base import Calibration, Quantized, SizeReport, layer_slots, mean_loss, refuse_quantized, windows
from ._costs import Matrix, layer_bytes, matrices_of
from ._curve import Point, area, pruning_curve, quantization_curve
from ._plan import BitPlan, allocate_bits
from ._rounding import FULL, check_rounding, rtn
from ._scores import LayerScores, layer_importance, lim, orders_of, zd
from ._store import apply_bit_plan, load, plan_of, save

__all__ = [
    "BitPlan",
    "LayerScores",
    "LayerwiseQuant",
    "Point",
    "Quantized",
    "SizeReport",
    "allocate_bits",
    "apply_bit_plan",
    "area",
    "layer_importance",
    "lim",
    "load",
    "mean_loss",
    "orders_of",
    "plan_of",
    "pruning_curve",
    "quantization_curve",
    "rtn",
    "save",
    "windows",
    "zd",
]


@dataclass(frozen=True, kw_only=True)
class LayerwiseQuant:
    """Rank layers, choose their bits for a target, and round them.

    Attributes:
        target_bits: Average bits per weight of the layers' matrices, scales and offsets not counted; 3.5 where no
            target is given.
        target_bytes: In place of it: most bytes of the whole model, packed, as `SizeReport.after` counts them.
        choices: The widths; 16 leaves a layer as it is.
        importance: "lim", "zd" or "sensitivity".
        allocation: "greedy", or "knapsack" over the losses of "sensitivity".
        backend: "rtn" or "hqq".
        group_size: Weights that share a step and an offset; None for whole rows.
    """

    target_bits: float | None = None
    target_bytes: int | None = None
    choices: tuple[int, ...] = (4, 2)
    importance: Literal["lim", "zd", "sensitivity"] = "lim"
    allocation: Literal["greedy", "knapsack"] = "greedy"
    backend: Literal["rtn", "hqq"] = "rtn"
    group_size: int | None = 32

    @property
    def measures(self) -> bool:
        """Whether `quantize` needs calibration text."""
        return self.importance != "zd"

    def plan(self, model: Any, calib: Calibration | None = None) -> BitPlan:
        """The plan alone; the model is left as it is. Errors as in `quantize`."""
        refuse_quantized(model)
        layers = layer_slots(model)
        for width in self.choices:
            check_rounding(layers, [width] * len(layers), self.backend, self.group_size)
        matrices = matrices_of(layers)
        sizes = tuple(sum(m.weights for m in each) for each in matrices)
        target = None if self.target_bytes is None else self._within(matrices, _others(model, layers))
        options: dict[str, Any] = {
            "target_bits": self.target_bits, "target_bytes": target, "choices": self.choices, "backend": self.backend,
            "group_size": self.group_size,
        }  # fmt: skip
        even = LayerScores("", (0.0,) * len(layers), sizes, matrices=matrices)
        allocate_bits(even, **{**options, "choices": _ends(self.choices)})  # can it be met?
        scores = layer_importance(
            model, self.importance, calib, bits=[b for b in self.choices if b != FULL], backend=self.backend,
            group_size=self.group_size,
        )  # fmt: skip
        return allocate_bits(scores, method=self.allocation, **options)

    def _within(self, matrices: Sequence[Sequence[Matrix]], others: int) -> int:
        """Bytes that `target_bytes` leaves for the layers' matrices."""
        assert self.target_bytes is not None
        ends = [
            sum(layer_bytes(layer, bits, self.backend, self.group_size) for layer in matrices)
            for bits in self.choices
        ]
        if ends and self.target_bytes < others + min(ends):
            problem = f"is less than the whole model takes at {min(self.choices)} bits"
            raise BadInput("target_bytes", self.target_bytes, problem, f"use {others + min(ends)} or more")
        return self.target_bytes - others

    def quantize(self, model: Any, calib: Calibration | None = None) -> Quantized:
        """Round the layers of `model` in place.

        Args:
            model: A causal language model of transformers.
            calib: Token ids `[N, T]`, rows of ids, or batches; not needed for "zd". See `windows`.

        Raises:
            BadInput: a target out of reach, no calibration data, groups that do not divide a row, a model that is
                quantized already. Nothing has changed then.
            NotApplicable: matrices that the backend cannot hold.
            MissingExtra: hqq is not installed.
        """
        plan = self.plan(model, calib)
        return Quantized(model, plan, apply_bit_plan(model, plan))


def _ends(choices: Sequence[int]) -> tuple[int, ...]:
    return tuple(choices) if len(set(choices)) < 2 else (max(choices), min(choices))


def _others(model: Any, layers: Sequence[Sequence[Any]]) -> int:
    """Bytes of what is left alone."""
    inside = {id(slot.parameter) for slots in layers for slot in slots}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
