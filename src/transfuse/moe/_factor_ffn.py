"""The feed-forward block that FactorLLM cuts into experts, and the ways to group its neurons."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.runs import check_positive, evaluating
from transfuse.core.taps import decoder_layers
from transfuse.core.training import generator, seeded
from transfuse.moe._base import Latest, Routing

__all__ = ["FactorizedFFN", "Site", "Split", "balanced_kmeans", "find_ffns", "split_neurons"]

Split = Literal["contiguous", "random", "kmeans"]
SPLITS = ("contiguous", "random", "kmeans")

# Names of the matrices of a feed-forward block: (those that read the input), the one that writes the output.
LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class Site:
    """A dense feed-forward block: its number, name, module and layout."""

    index: int
    name: str
    module: nn.Module
    inward: tuple[str, ...]
    outward: str


def _weight(layer: Any) -> Tensor:
    """`[out, in]`, also of a layer that stores its weight transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def find_ffns(model: Any, layers: list[int] | None, *, check: bool = True) -> list[Site]:
    """The dense feed-forward blocks of a model's layers.

    Args:
        model: A transformers model.
        layers: Numbers of layers; None for all.
        check: Try each block on random input.

    Raises:
        BadInput: no such layer.
        NotApplicable: a layer without exactly one dense feed-forward block of a known kind.
    """
    names = decoder_layers(model)
    chosen = list(range(len(names))) if layers is None else list(layers)
    if (
        not chosen
        or sorted(set(chosen)) != sorted(chosen)
        or not 0 <= min(chosen) <= max(chosen) < len(names)
    ):
        raise BadInput("layers", layers, f"are not distinct layers of {len(names)}", "give their numbers")
    sites = []
    for index in chosen:
        block = model.get_submodule(names[index])
        found = [
            Site(index, f"{names[index]}.{name}", module, inward, outward)
            for name, module in block.named_modules()
            for inward, outward in LAYOUTS
            if name
            and all(isinstance(getattr(module, n, None), (nn.Linear, Conv1D)) for n in (*inward, outward))
        ]
        if len(found) != 1 or (check and not _is_ffn(found[0])):
            problem = "has no dense feed-forward block of a known kind"
            raise NotApplicable("model", names[index], problem, "give a Llama-, GPT- or Phi-like dense model")
        sites.append(found[0])
    return sites


@torch.no_grad()
def _is_ffn(site: Site) -> bool:
    """Whether the module computes what its matrices say, on four random vectors."""
    layer: Any = getattr(site.module, site.inward[0])
    weight = _weight(layer)
    x = torch.randn(4, weight.shape[1], generator=generator(0)).to(weight.device, weight.dtype)
    try:
        block = FactorizedFFN(site, experts=1, top_k=1)
        with evaluating(site.module):
            ours, theirs = block.dense(x).float(), site.module(x).float()
        tolerance = 0.1 if weight.dtype.itemsize == 2 else 1e-3
        return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12)
    except (
        AttributeError,
        RuntimeError,
        StopIteration,
        TypeError,
    ):  # its forward takes or does something else
        return False


class FactorizedFFN(nn.Module):
    """A feed-forward block whose neurons are cut into experts of equal size, with a router.

    Keeps the matrices of the block it replaces under their names, neurons permuted: expert j owns rows
    `j f/E ... (j + 1) f/E` of those that read, and the same columns of the one that writes. Answers with
    `(E/K)` times the sum of the K chosen experts, and the writing matrix's bias once.

    Args:
        site: The block; its layers are taken over, not copied.
        experts: E.
        top_k: K.
    """

    permutation: Tensor

    def __init__(self, site: Site, *, experts: int, top_k: int):
        super().__init__()
        for name in (*site.inward, site.outward):
            self.add_module(name, getattr(site.module, name))
        self.inward, self.outward = site.inward, site.outward
        self.act = next(getattr(site.module, n) for n in ACTIVATIONS if hasattr(site.module, n))
        self.dropout = getattr(site.module, "dropout", None) or nn.Identity()
        down = _weight(getattr(self, self.outward))
        self.experts, self.top_k = experts, top_k
        self.width, self.inner = int(down.shape[0]), int(down.shape[1])
        self.router = nn.Linear(self.width, experts, device="meta")
        self.router.to_empty(device=down.device).to(down.dtype)
        self.register_buffer("permutation", torch.arange(self.inner, device=down.device))
        self.teacher: nn.Module | None = None
        self.straight_through = False
        self.latest, self.labels, self.heard = Latest(), Latest(), Latest()
        self.labeller: Any = None  # from (expert outputs [T, E, d], dense output [T, d]) to labels [T, E]
        self.listening = False  # stands in for the dense block, and hears its input

    def start(self, mlp: nn.Module, permutation: Tensor, seed: int, *, keep_teacher: bool) -> None:
        """Keep a frozen copy of `mlp`, permute the neurons and draw the router."""
        if keep_teacher:
            self.teacher = copy.deepcopy(mlp).requires_grad_(False)
        order = permutation.to(self.permutation.device)
        self.permutation.copy_(order)
        with torch.no_grad():
            for name in self.inward:
                layer: Any = getattr(self, name)
                halves = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0] // self.inner
                rows = torch.cat([order + i * self.inner for i in range(halves)])
                _weight(layer).copy_(_weight(layer)[rows].clone())
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias[rows].clone())
            down: Any = getattr(self, self.outward)
            _weight(down).copy_(_weight(down)[:, order].clone())
        with seeded(seed):
            self.router.reset_parameters()

    def reading(self) -> Tensor:
        """`[f, d]`: what each neuron reads (the gate's rows, where there is one)."""
        return _weight(getattr(self, self.inward[0]))[: self.inner]

    def hidden(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """Activations of neurons `part` for inputs `[T, d]`."""
        layers: list[Any] = [getattr(self, name) for name in self.inward]
        if len(layers) == 1 and len(_weight(layers[0])) == 2 * self.inner:  # gate and up in one matrix
            pairs = list(zip(_weight(layers[0]).chunk(2), _halves(layers[0].bias), strict=True))
        else:
            pairs = [(_weight(layer), layer.bias) for layer in layers]
        outs = [
            nn.functional.linear(x, weight[part], None if bias is None else bias[part])
            for weight, bias in pairs
        ]
        return self.act(outs[0]) * outs[1] if len(outs) == 2 else self.act(outs[0])

    def dense(self, x: Tensor) -> Tensor:
        """All experts together: the block that was factorised, for `[T, d]`."""
        down: Any = getattr(self, self.outward)
        return nn.functional.linear(self.hidden(x), _weight(down), down.bias)

    def outputs(self, hidden: Tensor) -> Tensor:
        """What each expert writes, `[T, E, d]`, from all neurons' activations `[T, f]`; without the bias."""
        down = _weight(getattr(self, self.outward)).view(self.width, self.experts, -1)
        return torch.einsum("tes,des->ted", hidden.view(len(hidden), self.experts, -1), down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, self.width)
        if self.listening:
            self._listen(x)
            return self._taught(x).view(shape)
        logits = self.router(x).float()
        indices = logits.topk(self.top_k).indices
        scale = self.experts / self.top_k
        weights = torch.full(indices.shape, scale, device=x.device)
        self.latest[:] = [Routing(logits, indices, weights)]
        if not self.heard:
            self.labels.clear()
        if self.top_k == self.experts:
            y = self.dense(x)
        elif self.training and (self.teacher is not None or self.straight_through):
            y = self._masked(x, logits, indices)
        else:
            y = self._sparse(x, indices)
        return self.dropout(y.view(shape))

    def _masked(self, x: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
        """All activations are needed for the labels: switch experts off by zeros instead of skipping them."""
        hidden = self.hidden(x)
        gates = torch.zeros_like(logits).scatter(1, indices, 1.0)
        if self.straight_through:
            p = logits.softmax(-1)
            gates = gates - p.detach() + p
        gates = (gates * (self.experts / self.top_k)).to(x.dtype)
        if self.teacher is not None and self.labeller is not None and not self.heard:
            with torch.no_grad():
                self.labels[:] = [self.labeller(self.outputs(hidden.detach()), self._target(x))]
        down: Any = getattr(self, self.outward)
        chosen = (hidden.view(len(x), self.experts, -1) * gates[..., None]).flatten(1)
        return nn.functional.linear(chosen, _weight(down), down.bias)

    def _sparse(self, x: Tensor, indices: Tensor) -> Tensor:
        down: Any = getattr(self, self.outward)
        size, y = self.inner // self.experts, torch.zeros_like(x)
        for j in range(self.experts):
            rows = (indices == j).any(-1).nonzero().squeeze(-1)
            if len(rows):
                part = slice(j * size, (j + 1) * size)
                written = nn.functional.linear(self.hidden(x[rows], part), _weight(down)[:, part])
                y = y.index_add(0, rows, written.to(y.dtype))  # autocast writes in half precision
        y = y * (self.experts / self.top_k)
        return y if down.bias is None else y + down.bias

    @torch.no_grad()
    def _taught(self, x: Tensor) -> Tensor:
        """The frozen block's output."""
        assert self.teacher is not None
        with evaluating(self.teacher):
            y: Tensor = self.teacher(x)
        return y

    def _target(self, x: Tensor) -> Tensor:
        """The frozen block's output without the bias, which no expert writes."""
        down: Any = getattr(self.teacher, self.outward)
        y = self._taught(x)
        return y if down.bias is None else y - down.bias

    @torch.no_grad()
    def _listen(self, x: Tensor) -> None:
        self.heard[:] = [x]
        self.labels[:] = [self.labeller(self.outputs(self.hidden(x)), self._target(x))]


def _halves(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if bias is None else bias.chunk(2)


def split_neurons(rows: Tensor, experts: int, split: Split, seed: int) -> Tensor:
    """The order of f neurons in which each run of f/E is an expert.

    Args:
        rows: `[f, d]`, what each neuron reads (its row of the gate matrix).
        experts: E, a divisor of f.
        split: "contiguous" keeps the order, "random" shuffles it, "kmeans" groups neurons whose rows are near each
            other, in groups of equal size.
        seed: Of the shuffle and of the first centres.

    Returns:
        int64 `[f]`: `order[i]` is the old number of the neuron that comes i-th.

    Raises:
        BadInput: an unknown split, or E does not divide f.
    """
    count = len(rows)
    if split not in SPLITS:
        raise BadInput("split", split, "is not known", f"use one of {', '.join(SPLITS)}")
    _check_share(count, "experts", experts)
    if split == "random":
        return torch.randperm(count, generator=generator(seed))
    if split == "kmeans":
        return balanced_kmeans(rows, experts, seed).sort(stable=True).indices
    return torch.arange(count)


def _check_share(count: int, name: str, parts: int) -> None:
    check_positive(**{name: parts})
    if count % parts:
        raise BadInput(name, parts, f"does not divide {count} rows", f"use a divisor of {count}")


@torch.no_grad()
def balanced_kmeans(rows: Tensor, clusters: int, seed: int, iterations: int = 20) -> Tensor:
    """Group vectors into clusters of equal size around means.

    In turns, centres are the means of their members, and members are dealt out: every vector without a cluster
    asks its nearest one that is not full, which takes the nearest of those that ask.

    Args:
        rows: `[n, d]`; n is a multiple of `clusters`.
        clusters: Number of clusters.
        seed: Of the first centres, which are `clusters` of the vectors.
        iterations: Most turns.

    Returns:
        int64 `[n]`: the cluster of each vector.

    Raises:
        BadInput: n is no multiple of `clusters`.
    """
    _check_share(len(rows), "clusters", clusters)
    x = rows.detach().float().cpu()
    size = len(x) // clusters
    centres = x[torch.randperm(len(x), generator=generator(seed))[:clusters]]
    labels = torch.full((len(x),), -1)
    for _ in range(iterations):
        before = labels
        distance = torch.cdist(x, centres)
        labels, free = torch.full((len(x),), -1), torch.full((clusters,), size)
        while bool((labels < 0).any()):
            open_ = distance.masked_fill(free[None, :] == 0, torch.inf)
            wish = open_.argmin(1)
            for j in range(clusters):
                asking = ((labels < 0) & (wish == j)).nonzero().squeeze(-1)
                taken = asking[distance[asking, j].argsort(stable=True)[: int(free[j])]]
                labels[taken] = j
                free[j] -= len(taken)
        if torch.equal(labels, before):
            break
        centres = torch.stack([x[labels == j].mean(0) for j in range(clusters)])
    return labels
