"""Routing traces: which experts each token visits, and how the experts of neighbouring layers go together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..core.errors import BadInput, NotApplicable
from ..core.generate import pad_batch
from ..core.taps import watch

__all__ = ["ExpertAffinity", "RoutingTrace", "collect_routing_trace", "expert_modules", "planted_trace"]

_INDICES = ("top_k_index", "router_indices")
_WEIGHTS = ("top_k_weights", "routing_weights")


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts tokens visited.

    Attributes:
        experts: Ids, int64 `[N, L, K]`: K experts in each of L layers for N tokens.
        weights: What their outputs are multiplied by, as shares that sum to 1 over K, float64 `[N, L, K]`.
        num_experts: Experts per layer.
        layers: Names of the modules that hold them; may be empty.
    """

    experts: NDArray[np.int64]
    weights: NDArray[np.float64]
    num_experts: tuple[int, ...]
    layers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, experts: Any, num_experts: int | Sequence[int], weights: Any = None, layers: Sequence[str] = ()
    ) -> RoutingTrace:
        """A trace from plain arrays, checked.

        Args:
            experts: Ids `[N, L]`, or `[N, L, K]` for routers that choose K.
            num_experts: Per layer, or one number for all.
            weights: Of the same shape; by default all K weigh alike.
            layers: Names of the layers.

        Raises:
            BadInput: no tokens, fewer than two layers, an id out of range (the first token and layer are named),
                weights of another shape.
        """
        ids = np.asarray(experts.cpu() if isinstance(experts, torch.Tensor) else experts)
        if ids.ndim == 2:
            ids = ids[:, :, None]
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise BadInput(
                "trace", f"{ids.dtype} {ids.shape}", "is not [N, L] or [N, L, K] of whole numbers", "mend it"
            )
        if len(ids) == 0 or ids.shape[2] == 0:
            raise BadInput("trace", ids.shape, "is empty", "profile some tokens")
        if ids.shape[1] < 2:
            raise BadInput(
                "trace", ids.shape, "has fewer than two layers of experts", "there is nothing to place"
            )
        each = list(num_experts) if isinstance(num_experts, Iterable) else [num_experts] * ids.shape[1]
        if not all(isinstance(count, Integral) for count in each):
            raise BadInput("num_experts", num_experts, "are not whole numbers", "mend it")
        counts = tuple(int(count) for count in each)
        if len(counts) != ids.shape[1] or min(counts) < 1:
            raise BadInput("num_experts", counts, f"is not one count per layer ({ids.shape[1]})", "mend it")
        wrong = (ids < 0) | (ids >= np.array(counts)[None, :, None])
        if wrong.any():
            token, layer, slot = (int(i) for i in np.argwhere(wrong)[0])
            where = f"trace[{token}, {layer}]"
            raise BadInput(
                where, int(ids[token, layer, slot]), f"is no expert of {counts[layer]}", "count from 0"
            )
        shares = _shares(weights, ids.shape)
        if not np.isfinite(shares).all() or (shares < 0).any():
            raise BadInput("weights", "a weight", "is negative or not finite", "give the router's weights")
        total = shares.sum(-1, keepdims=True)
        shares = np.where(total > 0, shares / np.where(total > 0, total, 1.0), 1.0 / ids.shape[2])
        return cls(ids.astype(np.int64), shares, counts, tuple(layers))

    def __len__(self) -> int:
        return len(self.experts)

    def part(self, start: int = 0, stop: int | None = None) -> RoutingTrace:
        """Some of the tokens."""
        rows = slice(start, stop)
        return RoutingTrace.of(self.experts[rows], self.num_experts, self.weights[rows], self.layers)

    def split(self, share: float = 0.8) -> tuple[RoutingTrace, RoutingTrace]:
        """The first share of the tokens, to profile, and the rest, to measure on."""
        cut = int(len(self) * share)
        return self.part(0, cut), self.part(cut)


def _shares(weights: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Weights of a trace's shape, where the last axis may be left out if it has one entry."""
    if weights is None:
        return np.ones(shape)
    found = np.asarray(
        weights.detach().cpu() if isinstance(weights, torch.Tensor) else weights, dtype=np.float64
    )
    if found.shape not in (shape, *([shape[:2]] if shape[2] == 1 else [])):
        raise BadInput("weights", found.shape, f"are not {shape}", "give one for each id of the trace")
    return found.reshape(shape)


@dataclass(frozen=True)
class ExpertAffinity:
    """How often a token goes from expert i of a layer to expert j of the next.

    Attributes:
        flow: Per pair of neighbouring layers, F `[E_l, E_(l+1)]` float64, sums to 1: the share of tokens. With K
            experts per token, all K^2 pairs count, each by the product of their weights.
        tokens: Number of tokens behind it.
        layers: Names of the modules; may be empty.
    """

    flow: tuple[NDArray[np.float64], ...]
    tokens: int
    layers: tuple[str, ...] = ()

    @classmethod
    def from_trace(
        cls, trace: RoutingTrace | Any, num_experts: int | Sequence[int] | None = None
    ) -> ExpertAffinity:
        """Count a trace, or an array `[N, L]` of expert ids.

        Raises:
            BadInput: as `RoutingTrace.of`.
        """
        if not isinstance(trace, RoutingTrace):
            if num_experts is None:
                raise BadInput("num_experts", None, "is missing", "say how many experts a layer has")
            trace = RoutingTrace.of(trace, num_experts)
        flow = []
        for layer in range(trace.experts.shape[1] - 1):
            rows, columns = trace.num_experts[layer : layer + 2]
            found = np.zeros(rows * columns)
            for a in range(trace.experts.shape[2]):
                for b in range(trace.experts.shape[2]):
                    pairs = trace.experts[:, layer, a] * columns + trace.experts[:, layer + 1, b]
                    mass = trace.weights[:, layer, a] * trace.weights[:, layer + 1, b]
                    found += np.bincount(pairs, mass, rows * columns)
            flow.append(found.reshape(rows, columns) / len(trace))
        return cls(tuple(flow), len(trace), trace.layers)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts per layer."""
        return (*(f.shape[0] for f in self.flow), self.flow[-1].shape[1])

    def conditional(self, layer: int) -> NDArray[np.float64]:
        """P(j in layer + 1 | i in layer), rows sum to 1; an expert nobody visited has a row of zeros."""
        total = self.flow[layer].sum(1, keepdims=True)
        return np.divide(self.flow[layer], total, out=np.zeros_like(self.flow[layer]), where=total > 0)

    def concentration(self) -> list[float]:
        """Per pair of layers, the share of tokens that take their expert's most frequent successor.

        1 / E where successors are all alike.
        """
        return [float(f.max(1).sum()) for f in self.flow]


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a transformers model that hold routed experts, by name: those called with indices and weights.

    Raises:
        NotApplicable: there are fewer than two.
    """
    import inspect

    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "num_experts", None), int) and hasattr(module, "forward"):
            names = inspect.signature(module.forward).parameters
            if any(key in names for key in _INDICES) and any(key in names for key in _WEIGHTS):
                found[name] = module
    if len(found) < 2:
        problem = f"has {len(found)} layers of experts that are called with indices and weights"
        raise NotApplicable(
            "model", type(model).__name__, problem, "give a mixture of experts of transformers"
        )
    return found


@torch.no_grad()
def collect_routing_trace(model: Any, batches: Any, *, max_tokens: int | None = None) -> RoutingTrace:
    """Run a mixture-of-experts model and write down which experts its tokens visit.

    What is read is what each layer's experts are called with, so that every rule of routing is covered. Dense layers
    between are skipped; shared experts, which all tokens visit, are not counted. Padding takes no part.

    Args:
        model: Of transformers, such as Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss.
        batches: Batches with `input_ids` and perhaps `attention_mask`, token ids `[B, T]`, or rows of ids.
        max_tokens: Stop after that many.

    Raises:
        NotApplicable: the model has no such layers, a layer saw other tokens than the first, or calls its experts more
            than once (Chain-of-Experts): rounds of one layer cannot be placed apart.
        BadInput: no tokens.
    """
    modules = expert_modules(model)
    calls: dict[str, list[dict[str, Any]]] = {}
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}
    count, training, device = 0, model.training, next(model.parameters()).device
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(watch(module, lambda given, name=name: calls[name].append(given)))  # type: ignore[misc]
            for ids, mask in _batches(batches):
                calls = {name: [] for name in modules}
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                real = mask.reshape(-1).bool()
                for name in modules:
                    chosen, weights = _decision(name, calls[name])
                    if chosen is None or weights is None or len(chosen) != len(real):
                        problem = "did not see every token of the batch"
                        raise NotApplicable(
                            "model", name, problem, "give a decoder whose every layer sees all tokens"
                        )
                    kept[name].append((chosen[real], weights[real]))
                count += int(real.sum())
                if max_tokens is not None and count >= max_tokens:
                    break
    finally:
        model.train(training)
    if count == 0:
        raise BadInput("batches", [], "hold no token", "give some text")
    width = max(part[0].shape[1] for parts in kept.values() for part in parts)
    ids_of, weights_of = (
        np.stack([np.concatenate([_wide(part[i], width, i) for part in parts]) for parts in kept.values()], 1)
        for i in (0, 1)
    )
    counts = [int(module.num_experts) for module in modules.values()]  # type: ignore[arg-type]
    return RoutingTrace.of(
        ids_of[:max_tokens].astype(np.int64), counts, weights_of[:max_tokens], list(modules)
    )


def _decision(
    name: str, calls: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if len(calls) > 1:
        problem = f"calls its experts {len(calls)} times in a pass"
        raise NotApplicable("model", name, problem, "give a model that routes once per layer")
    given = calls[0] if calls else {}
    chosen = next((given[key] for key in _INDICES if key in given), None)
    weights = next((given[key] for key in _WEIGHTS if key in given), None)
    if chosen is None or weights is None:
        return None, None
    return tuple(t.detach().reshape(-1, t.shape[-1]).cpu() for t in (chosen, weights.float()))


def _wide(part: torch.Tensor, width: int, which: int) -> NDArray[Any]:
    """Layers that choose fewer experts than others are filled up with their first, at no weight."""
    found: NDArray[Any] = part.numpy().astype(np.float64)
    if found.shape[1] < width:
        extra = found[:, :1].repeat(width - found.shape[1], 1) * (1 - which)
        found = np.concatenate([found, extra], 1)
    return found


def _batches(batches: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(batches, (torch.Tensor, Mapping)):
        batches = [batches]
    rows: list[Any] = []
    for part in batches:
        ids = part["input_ids"] if isinstance(part, Mapping) else part
        if isinstance(ids, torch.Tensor) and ids.dim() == 2:
            mask = part.get("attention_mask") if isinstance(part, Mapping) else None
            yield ids, torch.ones_like(ids) if mask is None else mask
        elif isinstance(ids, (Sequence, torch.Tensor)) and not isinstance(ids, str) and len(ids):
            rows.append([int(i) for i in ids])
        else:
            raise BadInput(
                "batches", type(part).__name__, "is no batch of token ids", "give [B, T], or rows of ids"
            )
    for start in range(0, len(rows), 8):
        yield pad_batch(rows[start : start + 8], 0)


def planted_trace(tokens: int, experts: int, layers: int, follow: float, *, seed: int = 0) -> RoutingTrace:
    """A made-up trace whose affinity is known: the next expert is a fixed successor with probability `follow`.

    Each layer has a random successor for each of its experts (a permutation); otherwise the next is drawn evenly.

    Args:
        tokens: N.
        experts: E, of each layer.
        layers: L.
        follow: From 0 (no affinity) to 1.
        seed: Of everything drawn.
    """
    if not 0 <= follow <= 1:
        raise BadInput("follow", follow, "is no probability", "give a number from 0 to 1")
    draw = np.random.default_rng(seed)
    ids = np.empty((tokens, layers), dtype=np.int64)
    ids[:, 0] = draw.integers(0, experts, tokens)
    for layer in range(1, layers):
        successor = draw.permutation(experts)
        followed = draw.random(tokens) < follow
        ids[:, layer] = np.where(followed, successor[ids[:, layer - 1]], draw.integers(0, experts, tokens))
    return RoutingTrace.of(ids, experts)
