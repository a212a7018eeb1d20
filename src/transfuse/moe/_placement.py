"""Where experts live: the cluster, a placement on its devices, what it costs, and what it means for a model."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from ..core.files import atomic_write
from ..core.runs import evaluating
from ..core.training import generator
from ._descent import assign
from ._exact import Devices
from ._trace import ExpertAffinity, RoutingTrace, expert_modules

__all__ = [
    "PlacementPlan",
    "Topology",
    "check_divides",
    "greedy_placement",
    "load_plan",
    "random_placement",
    "vanilla_placement",
]

ROUTERS = ("gate", "router")  # names of the module beside the experts that chooses among them


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A cluster: `nodes` of `gpus_per_node` devices each, numbered node by node."""

    nodes: int = 1
    gpus_per_node: int = 4

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise BadInput(name, value, "is not a count", "give 1 or more")

    @property
    def devices(self) -> int:
        """G, all devices."""
        return self.nodes * self.gpus_per_node

    def distances(self) -> NDArray[np.float64]:
        """`[G, G]`: 0 on a device, 1 within a node, 2 between nodes, as the released code counts."""
        node = np.arange(self.devices) // self.gpus_per_node
        apart = np.where(node[:, None] == node[None, :], 1.0, 2.0)
        np.fill_diagonal(apart, 0.0)
        return apart


def check_divides(num_experts: Sequence[int], devices: int) -> None:
    """Raises BadInput where a layer's experts do not divide evenly among the devices."""
    for layer, count in enumerate(num_experts):
        if count % devices:
            raise BadInput(
                "num_experts", count, f"(layer {layer}) do not divide evenly among {devices} devices",
                f"use a number of devices that divides {math.gcd(*num_experts)}",
            )  # fmt: skip


@dataclass(frozen=True)
class PlacementPlan:
    """Which device each expert lives on.

    Attributes:
        devices: Per layer, the device of each expert, int64 `[E_l]`.
        topology: The cluster.
        layers: Names of the modules that hold the experts; may be empty.
        solver: What found it.
        cost: Of the affinity it was solved for: the expected share of moves that cross devices.
        facts: What the solver reports: seconds, sweeps, gap, ...
    """

    devices: tuple[Devices, ...]
    topology: Topology
    layers: tuple[str, ...] = ()
    solver: str = ""
    cost: float = math.nan
    facts: dict[str, Any] = field(default_factory=dict)

    # --- what it costs -------------------------------------------------------------------------------------

    def cross_device_fraction(self, trace: RoutingTrace | Any) -> float:
        """Mean over tokens and pairs of neighbouring layers of [the two experts live on different devices].

        With K experts per token, over all K^2 pairs, weighted by the product of their weights.
        """
        intra, inter = self._moves(trace)
        return float((intra + inter).mean())

    def intra_hops(self, trace: RoutingTrace | Any) -> float:
        """Moves of a token between devices of one node, over all layers, on average."""
        return float(self._moves(trace)[0].sum(1).mean())

    def inter_hops(self, trace: RoutingTrace | Any) -> float:
        """Moves of a token between nodes, over all layers, on average."""
        return float(self._moves(trace)[1].sum(1).mean())

    def released_cost(self, trace: RoutingTrace | Any) -> float:
        """What the released solver reports: a move within a node costs 1, one between nodes 2; per token."""
        intra, inter = self._moves(trace)
        return float((intra + 2 * inter).sum(1).mean())

    def expected_fraction(self, affinity: ExpertAffinity) -> float:
        """The fraction that an affinity predicts, equal to `cross_device_fraction` on the trace it was counted from."""
        self._check(affinity.num_experts)
        total = 0.0
        for f, here, there in zip(affinity.flow, self.devices, self.devices[1:]):
            total += float(f[here[:, None] != there[None, :]].sum())
        return total / len(affinity.flow)

    def _moves(self, trace: RoutingTrace | Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Moves within and between nodes, each `[N, L - 1]`."""
        if not isinstance(trace, RoutingTrace):
            trace = RoutingTrace.of(trace, [len(d) for d in self.devices])
        self._check(trace.num_experts)
        apart = self.topology.distances()
        intra, inter = (np.zeros((len(trace), len(self.devices) - 1)) for _ in range(2))
        at = np.stack([d[trace.experts[:, i]] for i, d in enumerate(self.devices)], 1)  # [N, L, K]
        for a in range(at.shape[2]):
            for b in range(at.shape[2]):
                far = apart[at[:, :-1, a], at[:, 1:, b]]
                mass = trace.weights[:, :-1, a] * trace.weights[:, 1:, b]
                intra += mass * (far == 1)
                inter += mass * (far == 2)
        return intra, inter

    def _check(self, counts: Sequence[int]) -> None:
        own = [len(d) for d in self.devices]
        if list(counts) != own:
            raise IncompatibleModels(
                "trace", list(counts), f"is of other experts than the plan's {own}", "solve again"
            )

    def loads(self) -> NDArray[np.int64]:
        """Experts per layer and device, `[L, G]`."""
        return np.stack([np.bincount(d, minlength=self.topology.devices) for d in self.devices])

    # --- what it means for a model -------------------------------------------------------------------------

    def order(self, layer: int) -> list[int]:
        """Old numbers of a layer's experts in their new order: by device, and by number on each."""
        return np.argsort(self.devices[layer], kind="stable").tolist()

    @torch.no_grad()
    def permute_experts(self, model: Any, *, inverse: bool = False) -> Any:
        """Reorder experts in place, so that equal contiguous shards realise the plan; the model says what it said.

        Expert weights, the router's rows and biases and every other tensor with one entry per expert move together;
        tensors that blocks share stay. Each block is tried on random tokens before and after.

        Args:
            model: The profiled model, or one of its architecture.
            inverse: Undo it.

        Returns:
            The model.

        Raises:
            IncompatibleModels: the plan is of another number of layers or experts.
            NotApplicable: devices hold unequal numbers of experts, or a router's choice depends on the experts'
                order (group-limited routing, logits of the layer below). The model is then as it was.
        """
        modules = expert_modules(model)
        counts = [int(m.num_experts) for m in modules.values()]  # type: ignore[arg-type]
        if counts != [len(d) for d in self.devices]:
            own = [len(d) for d in self.devices]
            raise IncompatibleModels(
                "model", counts, f"has other experts than the plan's {own}", "solve for it"
            )
        if (self.loads() * self.topology.devices != np.array(counts)[:, None]).any():
            raise NotApplicable(
                "plan", "loads", "are unequal: shards would not be", 'solve with balance="hard"'
            )
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in modules]
        for name, block in zip(modules, blocks):
            if any(getattr(router, "logit_residual", 0) for router in _routers(block)):
                problem = "adds logits of the layer below, whose experts have another order"
                raise NotApplicable("model", name, problem, "place a model with logit_residual = 0")
        shared = _shared(blocks)
        for name, module in modules.items():
            if any(id(tensor) in shared for tensor in _tensors(module, True)):
                problem = "has the experts of another layer too"
                raise NotApplicable("model", name, problem, "place a model whose layers have their own")
        done: list[tuple[torch.Tensor, int, list[int]]] = []
        for layer, ((name, module), block) in enumerate(zip(modules.items(), blocks)):
            order = self.order(layer)
            if inverse:
                order = np.argsort(order).tolist()
            before = _answers(block, model)
            changed = _reorder(block, module, order, shared)
            done += changed
            if not _alike(before, _answers(block, model)):
                for tensor, axis, used in reversed(done):
                    tensor.copy_(
                        tensor.index_select(axis, torch.tensor(np.argsort(used), device=tensor.device))
                    )
                problem = "answers otherwise when its experts change places"
                raise NotApplicable(
                    "model", name, problem, "its router looks at their order: it cannot be placed freely"
                )
        return model

    # --- files ---------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; `load_plan` reads it."""
        record = {
            "nodes": self.topology.nodes,
            "gpus_per_node": self.topology.gpus_per_node,
            "layers": list(self.layers),
            "devices": [d.tolist() for d in self.devices],
            "solver": self.solver,
            "cost": None if math.isnan(self.cost) else self.cost,
            "facts": self.facts,
        }
        atomic_write(path, json.dumps(record, indent=1) + "\n")
        return Path(path)


def load_plan(path: str | os.PathLike[str]) -> PlacementPlan:
    """A plan that `save` wrote.

    Raises:
        BadInput: no such file.
        CorruptFile: it is no plan.
    """
    if not Path(path).is_file():
        raise BadInput("path", str(path), "does not exist", "give a plan's file")
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        topology = Topology(nodes=record["nodes"], gpus_per_node=record["gpus_per_node"])
        devices = tuple(np.array(d, dtype=np.int64) for d in record["devices"])
        if len(devices) < 2 or any(
            d.ndim != 1 or d.min() < 0 or d.max() >= topology.devices for d in devices
        ):
            raise ValueError("devices out of range")
        cost = math.nan if record["cost"] is None else float(record["cost"])
        return PlacementPlan(
            devices, topology, tuple(record["layers"]), record["solver"], cost, dict(record["facts"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            "path", str(path), f"is no placement plan ({error})", "solve and save again"
        ) from error


# --- models ------------------------------------------------------------------------------------------------


def _answers(block: nn.Module, model: Any) -> torch.Tensor | None:
    """What a block says to random tokens; None if it cannot be called alone."""
    width, first = model.config.get_text_config().hidden_size, next(block.parameters())
    x = torch.randn(1, 32, width, generator=generator(0)).to(first.device, first.dtype)
    try:
        with evaluating(block):
            out = block(x)
    except (TypeError, RuntimeError, ValueError):
        return None
    return (out[0] if isinstance(out, tuple) else out).float().reshape(-1, width)


def _alike(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    if before is None or after is None:
        return before is after
    far = (before - after).norm(dim=-1) > 0.02 * before.norm(dim=-1) + 1e-12
    return bool(far.float().mean() <= 0.1)  # in half precision a close call may go the other way


def _routers(block: nn.Module) -> list[nn.Module]:
    return [module for name, module in block.named_children() if name in ROUTERS]


def _shared(blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of the tensors that more than one block holds."""
    counts = Counter(id(tensor) for block in blocks for tensor in _tensors(block, True))
    return {key for key, count in counts.items() if count > 1}


def _of_router(router: nn.Module) -> list[torch.Tensor]:
    """A router's tensors that may have one entry per expert: all, unless it names them."""
    named = getattr(router, "per_expert", None)
    return _tensors(router, True) if named is None else [getattr(router, name) for name in named]


def _reorder(
    block: nn.Module, experts: nn.Module, order: list[int], shared: Set[int]
) -> list[tuple[torch.Tensor, int, list[int]]]:
    """Reorder every tensor of a block that has one entry per expert; what was changed, along which axis, how."""
    count, found = len(order), []
    for tensor in _tensors(experts, True):
        stacked = tensor.dim() > 1 and tensor.shape[0] % count == 0
        if tensor.dim() and (tensor.shape[0] == count or stacked):
            size = tensor.shape[0] // count  # some keep all experts' rows one under the other
            found.append((tensor, 0, [e * size + i for e in order for i in range(size)]))
    routers = [tensor for router in _routers(block) for tensor in _of_router(router)]
    for tensor in [t for t in [*routers, *_tensors(block, False)] if id(t) not in shared]:
        axis = next((i for i in (0, tensor.dim() - 1) if tensor.dim() and tensor.shape[i] == count), None)
        if axis is not None:
            found.append((tensor, axis, order))
    for tensor, axis, used in found:
        tensor.copy_(tensor.index_select(axis, torch.tensor(used, device=tensor.device)))
    return found


def _tensors(module: nn.Module, recurse: bool) -> list[torch.Tensor]:
    return [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]


# --- baselines ---------------------------------------------------------------------------------------------


def vanilla_placement(num_experts: Sequence[int], topology: Topology) -> PlacementPlan:
    """Expert e of every layer on device floor(e / (E / G)): what frameworks do by themselves."""
    check_divides(num_experts, topology.devices)
    devices = tuple(np.arange(count) // (count // topology.devices) for count in num_experts)
    return PlacementPlan(devices, topology, solver="vanilla")


def random_placement(num_experts: Sequence[int], topology: Topology, *, seed: int = 0) -> PlacementPlan:
    """A balanced placement at random, layer by layer."""
    plain, draw = vanilla_placement(num_experts, topology), np.random.default_rng(seed)
    return PlacementPlan(tuple(draw.permutation(d) for d in plain.devices), topology, solver="random")


def greedy_placement(affinity: ExpertAffinity, topology: Topology) -> PlacementPlan:
    """One pass: the first layer as it is, then each layer as well as the one before it allows."""
    devices = list(vanilla_placement(affinity.num_experts, topology).devices)
    for layer, flow in enumerate(affinity.flow):
        there = np.eye(topology.devices)[devices[layer]]  # [E_l, G]
        devices[layer + 1] = assign(flow.T @ there)
    plan = PlacementPlan(tuple(devices), topology, affinity.layers, "greedy")
    return PlacementPlan(plan.devices, topology, affinity.layers, "greedy", plan.expected_fraction(affinity))
