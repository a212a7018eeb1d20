"""A bit plan: how many bits each layer has, for a target of average bits or of bytes, and its form for other tools."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.errors import BadInput
from ..core.runs import check_positive
from ._costs import layer_bytes
from ._rounding import BACKENDS, FULL
from ._scores import LayerScores

__all__ = ["BitPlan", "Method", "allocate_bits"]

Method = Literal["greedy", "knapsack"]

_GGML = {1: "iq1_s", 2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0", FULL: "bf16"}
SCALE_BITS = 16  # of a step, and of an offset


@dataclass(frozen=True)
class BitPlan:
    """Bits per layer.

    Attributes:
        bits: Of each layer; 16 leaves a layer as it is.
        sizes: Weights in each layer's matrices.
        layers: Names of the layers.
        modules: Names of their matrices' modules, inside a layer.
        group_size: Weights that share a step and an offset; None for whole rows.
        backend: What rounds: "rtn" or "hqq".
        scored: What ranked the layers.
        stored: Bytes of each layer's matrices, packed, with steps and offsets; empty where the model is not known.
    """

    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    layers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    group_size: int | None = 32
    backend: str = "rtn"
    scored: str = ""
    stored: tuple[int, ...] = ()

    @property
    def average_bits(self) -> float:
        """sum_i s_i b_i / sum_i s_i: codes only."""
        return sum(s * b for s, b in zip(self.sizes, self.bits, strict=True)) / sum(self.sizes)

    @property
    def stored_bits(self) -> float:
        """The same with steps and offsets, from `stored`; layers of 16 bits count in the model's own dtype.

        A plan made from sizes alone takes 16 bits for a step, an offset and a weight left as it is, one bit more for
        groups of 32, and counts nothing more for whole rows.
        """
        if self.stored:
            return 8 * sum(self.stored) / sum(self.sizes)
        extra = 0.0 if self.group_size is None else 2 * SCALE_BITS / self.group_size
        rounded = sum(s for s, b in zip(self.sizes, self.bits, strict=True) if b != FULL)
        return self.average_bits + extra * rounded / sum(self.sizes)

    @property
    def lowered(self) -> list[int]:
        """Numbers of the layers below the highest width of the plan."""
        return [i for i, b in enumerate(self.bits) if b < max(self.bits)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        found = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> BitPlan:
        """The plan that `to_dict` described.

        Raises:
            BadInput: something is missing or of the wrong kind.
        """
        try:
            given = {"stored": (), **mapping}  # plans of earlier versions lack it
            fields: dict[str, Any] = {f.name: given[f.name] for f in dataclasses.fields(cls)}
            fields = {
                key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
            }
            plan = cls(**fields)
            if len(plan.bits) != len(plan.sizes) or not all(isinstance(b, int) for b in plan.bits):
                raise ValueError("bits and sizes do not match")
            if plan.stored and len(plan.stored) != len(plan.bits):
                raise ValueError("stored and sizes do not match")
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                "plan", dict(mapping), f"is no bit plan ({error})", "give what to_dict returned"
            ) from error

    # --- for other tools -----------------------------------------------------------------------------------

    def _widths(self) -> dict[int, list[int]]:
        if not self.layers:
            raise BadInput("layers", self.layers, "are not named", "make the plan from a model's scores")
        found: dict[int, list[int]] = {}
        for index, width in enumerate(self.bits):
            found.setdefault(width, []).append(index)
        return dict(sorted(found.items(), reverse=True))

    def _pattern(self, layers: Sequence[int]) -> str:
        stack = self.layers[0].rpartition(".")[0]
        numbers = "|".join(self.layers[i].rpartition(".")[2] for i in layers)
        return rf"{re.escape(stack)}\.(?:{numbers})\."

    def to_gptqmodel_dynamic(self) -> dict[str, Any]:
        """Arguments of GPTQModel's `QuantizeConfig`: `bits`, `group_size` and `dynamic`.

        The highest width is the configuration's own; layers at others are matched by "+:" and a regular expression
        that is held against the beginning of a module's name, layers that stay as they are by "-:".
        """
        widths = self._widths()
        own = max(b for b in widths if b != FULL) if set(widths) - {FULL} else 8
        group = -1 if self.group_size is None else self.group_size
        dynamic: dict[str, Any] = {}
        for width, layers in widths.items():
            if width == FULL:
                dynamic[f"-:^{self._pattern(layers)}.*"] = {}
            elif width != own:
                dynamic[f"+:^{self._pattern(layers)}.*"] = {"bits": width, "group_size": group}
        return {"bits": own, "group_size": group, "dynamic": dynamic}

    def to_torchao_fqn_config(self) -> dict[str, Any]:
        """A torchao `FqnToConfig` in the form that `torchao.core.config.config_from_dict` reads.

        Each width is one regular expression over names of linear layers, with an asymmetric weight-only integer
        configuration. `quantize_(model, config_from_dict(...), filter_fn=None)` applies it.
        """
        granularity: dict[str, Any] = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        if self.group_size is not None:
            granularity = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": self.group_size}}
        modules = "|".join(re.escape(name) for name in self.modules)
        entries = {
            f"re:{self._pattern(layers)}(?:{modules})": {
                "_type": "IntxWeightOnlyConfig",
                "_version": 2,
                "_data": {
                    "weight_dtype": {"_type": "torch.dtype", "_data": f"int{width}"},
                    "granularity": granularity,
                    "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
                },
            }
            for width, layers in self._widths().items()
            if width != FULL
        }
        return {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": entries}}

    def to_llamacpp_tensor_types(self, types: Mapping[int, str] | None = None) -> list[str]:
        r"""Values of llama-quantize's `--tensor-type`, or lines of its `--tensor-type-file`: `blk\.(3|7)\.=q2_k`.

        The pattern matches all of a layer's matrices; llama.cpp leaves norms alone by itself.

        Args:
            types: Width -> ggml type, in place of the K-quants (2: q2_k, ... 6: q6_k, 8: q8_0, 16: bf16).

        Raises:
            BadInput: a width without a type.
        """
        known = {**_GGML, **(types or {})}
        lines = []
        for width, layers in self._widths().items():
            if width not in known:
                raise BadInput("types", width, "bits have no ggml type", f"name one: types={{{width}: ...}}")
            lines.append(rf"blk\.({'|'.join(map(str, layers))})\.={known[width]}")
        return lines


def allocate_bits(
    scores: LayerScores | Sequence[float],
    target_bits: float | None = None,
    choices: Sequence[int] = (4, 2),
    sizes: Sequence[int] | None = None,
    *,
    target_bytes: int | None = None,
    method: Method = "greedy",
    group_size: int | None = 32,
    backend: str = "rtn",
    within: bool | None = None,
) -> BitPlan:
    """Choose each layer's bits: the most important layers keep the higher width, the others get the lower one.

    Greedy, of two widths: layers are lowered from the least important on. With equal sizes, their number is
    L (b_hi - B) / (b_hi - b_lo) rounded to the nearest (a half upwards), so that the average may exceed the target
    B by less than a layer's share; with unequal sizes it is the smallest that brings the average to B or below.
    Knapsack, of any number of widths: the least sum of the layers' losses with an average of at most B, exactly.

    Args:
        scores: From `layer_importance`, or one importance per layer, higher for more important.
        target_bits: B, average bits per weight of the codes. 3.5 where no target is given.
        choices: The widths; 16 leaves a layer as it is.
        sizes: Weights per layer; those of the scores, or all equal.
        target_bytes: In place of `target_bits`: most bytes for the layers' matrices, packed, with steps and offsets.
            Exact for scores of a model; for numbers see `BitPlan.stored_bits`.
        method: "greedy" or "knapsack".
        group_size: Weights that share a step and an offset; None for whole rows.
        backend: What will round: "rtn" or "hqq".
        within: True never to exceed the target, False to round to the nearest number of layers; None as above, and
            True for a target in bytes.

    Raises:
        BadInput: a target outside of the choices' range, unusable choices, sizes or groups, an unknown backend, or a
            knapsack without losses.
    """
    check_positive(group_size=group_size)
    if backend not in BACKENDS:
        raise BadInput("backend", backend, "is not known", f"use one of {', '.join(BACKENDS)}")
    known = scores if isinstance(scores, LayerScores) else None
    importance = list(known.importance if known else scores)  # type: ignore[arg-type]
    widths = sorted(set(choices), reverse=True)
    if not importance or not all(math.isfinite(x) for x in importance):
        raise BadInput("scores", importance, "are not numbers of layers", "give one importance per layer")
    if len(widths) < 2 or len(widths) != len(choices) or not all(_is_width(b) for b in widths):
        raise BadInput(
            "choices", list(choices), "are not different widths", "give two or more of 1 to 8 and 16"
        )
    matrices = known.matrices if known and sizes is None else ()
    if sizes is None:
        sizes = known.sizes if known and known.sizes else [1] * len(importance)
    if len(sizes) != len(importance) or min(sizes) < 1:
        raise BadInput(
            "sizes", list(sizes), f"are not {len(importance)} sizes of layers", "give one per layer"
        )
    if target_bits is not None and target_bytes is not None:
        raise BadInput(
            "target_bytes", target_bytes, f"and target_bits = {target_bits} are two targets", "give one"
        )
    weighed = [{b: layer_bytes(layer, b, backend, group_size) for b in widths} for layer in matrices]
    if target_bytes is None:
        spent: list[dict[int, float]] = [{b: s * b for b in widths} for s in sizes]
    elif weighed:
        spent = [{b: 8 * each[b] for b in widths} for each in weighed]
    else:
        extra = 0.0 if group_size is None else 2 * SCALE_BITS / group_size
        spent = [{b: s * (b if b == FULL else b + extra) for b in widths} for s in sizes]
    if target_bytes is not None:
        budget, within = 8.0 * target_bytes, True if within is None else within
    else:
        budget = (3.5 if target_bits is None else target_bits) * sum(sizes)
    least, most = (sum(s[b] for s in spent) for b in (widths[-1], widths[0]))
    slack = 0.0 if target_bytes is not None and weighed else 1e-9 * most  # bytes are whole numbers
    if not least - slack <= budget or (target_bytes is None and budget > most + slack):
        named, value = (
            ("target_bytes", target_bytes) if target_bytes is not None else ("target_bits", target_bits)
        )
        low, high = math.ceil(least / sum(sizes) * 1e4) / 1e4, most / sum(sizes)
        remedy = f"use {low:g} to {high:g}" if target_bytes is None else f"use {math.ceil(least / 8)} or more"
        raise BadInput(named, value, f"is outside of what {widths} bits give", remedy)
    if method == "greedy":
        bits = _greedy(importance, widths, spent, budget + slack, within)
    elif method == "knapsack":
        bits = _knapsack(known, widths, spent, budget + slack)
    else:
        raise BadInput("method", method, "is not known", 'use "greedy" or "knapsack"')
    return BitPlan(
        tuple(bits), tuple(sizes), known.layers if known else (), known.modules if known else (), group_size, backend,
        known.method if known else "", tuple(each[b] for each, b in zip(weighed, bits)),
    )  # fmt: skip


def _is_width(bits: Any) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and (1 <= bits <= 8 or bits == FULL)


def _greedy(
    importance: Sequence[float], widths: Sequence[int], spent: Sequence[Mapping[int, float]], budget: float,
    within: bool | None,
) -> list[int]:  # fmt: skip
    if len(widths) != 2:
        raise BadInput(
            "choices", list(widths), "are more than the greedy choice takes", 'use method="knapsack"'
        )
    high, low = widths
    order = sorted(range(len(importance)), key=lambda i: (importance[i], i))
    total = sum(each[high] for each in spent)
    equal = len({each[high] for each in spent}) == 1
    if not within if within is not None else equal:
        saved = (sum(each[high] - each[low] for each in spent)) / len(spent)
        count = math.floor((total - budget) / saved + 0.5 + 1e-6)
    else:
        count = 0
        while total > budget:
            total -= spent[order[count]][high] - spent[order[count]][low]
            count += 1
    lowered = set(order[: max(count, 0)])
    return [low if i in lowered else high for i in range(len(importance))]


def _knapsack(
    scores: LayerScores | None, widths: Sequence[int], spent: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """The multiple-choice knapsack, by keeping of each cost only the states that no cheaper one beats."""
    losses = dict(scores.losses) if scores is not None else {}
    losses.setdefault(FULL, (0.0,) * len(spent))
    if missing := [b for b in widths if b not in losses]:
        raise BadInput(
            "scores", scores.method if scores else "numbers", f"hold no losses at {missing} bits",
            'measure them: layer_importance(model, "sensitivity", calib, bits=choices)',
        )  # fmt: skip
    rest = np.cumsum([0.0, *(min(each.values()) for each in reversed(spent))])[::-1]  # cheapest way to finish
    costs, values, steps = np.zeros(1), np.zeros(1), []
    for index, each in enumerate(spent):
        cost = np.concatenate([costs + each[b] for b in widths])
        value = np.concatenate([values + losses[b][index] for b in widths])
        order = np.lexsort((value, cost))
        best = np.minimum.accumulate(value[order])
        kept = np.flatnonzero(
            (value[order] < np.concatenate([[np.inf], best[:-1]])) & (cost[order] + rest[index + 1] <= budget)
        )
        chosen = order[kept]
        steps.append(chosen)
        costs, values = cost[chosen], value[chosen]
    state, bits = int(np.argmin(values)), []
    for index in range(len(spent) - 1, -1, -1):
        previous = 1 if index == 0 else len(steps[index - 1])
        which, state = divmod(int(steps[index][state]), previous)
        bits.append(widths[which])
    return bits[::-1]
