"""A simulated expert-parallel cluster: collectives, hops, bytes and time of two schedules for the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BadInput
from ._placement import PlacementPlan, Topology
from ._trace import RoutingTrace

__all__ = ["Link", "Traffic", "simulate_cluster"]

Schedule = Literal["vanilla", "coherent"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a message costs: `latency` seconds, and a second per `bandwidth` bytes."""

    latency: float
    bandwidth: float


NVLINK = Link(latency=5e-6, bandwidth=300e9)
NETWORK = Link(latency=2e-5, bandwidth=25e9)


@dataclass(frozen=True)
class Traffic:
    """What a forward pass over all tokens (one decoding iteration) sends.

    Attributes:
        all_to_alls: Collectives in which tokens change device.
        all_gathers: Collectives in which every device learns what the others made.
        intra_hops: Moves of token vectors between devices of one node, per token.
        inter_hops: The same between nodes.
        intra_bytes: Bytes of those moves, of all tokens.
        inter_bytes: The same between nodes.
        gathered_bytes: Bytes that all-gathers bring to devices.
        seconds: By the links: every collective lasts as long as its busiest device.
    """

    all_to_alls: int
    all_gathers: int
    intra_hops: float
    inter_hops: float
    intra_bytes: float
    inter_bytes: float
    gathered_bytes: float
    seconds: float

    @property
    def hops(self) -> float:
        """All moves of a token between devices."""
        return self.intra_hops + self.inter_hops


def simulate_cluster(
    plan: PlacementPlan,
    trace: RoutingTrace | Any,
    schedule: Schedule = "coherent",
    *,
    hidden_bytes: int = 2 * 4096,
    context_bytes: int = 8,
    home: Any = None,
    intra: Link = NVLINK,
    inter: Link = NETWORK,
) -> Traffic:
    """Send the tokens of a trace through a placement, one decoding iteration, and count what moves.

    "vanilla": a token's context lives on its home device. Every layer sends the token to its expert and the result back
    home: two all-to-alls per layer. "coherent": every device has every context. A token stays on the device of the
    expert it visited last, is sent on only if the next one lives elsewhere, and at the end one all-gather tells every
    device what was made: one all-to-all per layer. The first layer sends tokens from home in both.

    With K > 1 experts per token, copies go to each other device that holds one of them, and results are combined at
    home, or on the device of the weightiest expert; that is a second all-to-all in both schedules.

    Args:
        plan: Where experts live.
        trace: Which experts the tokens visit.
        schedule: See above.
        hidden_bytes: Of a token's vector.
        context_bytes: What the all-gather sends per token: its id, or with it the keys and values of all layers.
        home: Device of each token's context, `[N]`; by default tokens are dealt out in turn.
        intra: Links within a node.
        inter: Links between nodes.

    Raises:
        BadInput: an unknown schedule, negative sizes, or homes that are not a device for each token.
    """
    for name, size in (("hidden_bytes", hidden_bytes), ("context_bytes", context_bytes)):
        if not 0 <= size < math.inf:
            raise BadInput(name, size, "is no number of bytes", "give 0 or more")
    if schedule not in ("vanilla", "coherent"):
        raise BadInput("schedule", schedule, "is not known", 'use "vanilla" or "coherent"')
    if not isinstance(trace, RoutingTrace):
        trace = RoutingTrace.of(trace, [len(d) for d in plan.devices])
    plan._check(trace.num_experts)
    cluster, count = plan.topology, len(trace)
    at = np.arange(count) % cluster.devices if home is None else np.asarray(home)
    whole = np.issubdtype(at.dtype, np.integer)
    if not whole or at.shape != (count,) or at.min() < 0 or at.max() >= cluster.devices:
        problem = f"is not a device of {cluster.devices} for each of {count} tokens"
        raise BadInput("home", f"{at.dtype} {at.shape}", problem, "give a whole number for each")
    at = at.astype(np.int64)
    several = trace.experts.shape[2] > 1
    meter = _Meter(cluster, hidden_bytes, intra, inter)
    for layer, devices in enumerate(plan.devices):
        placed = devices[trace.experts[:, layer]]  # [N, K]
        meter.send(at, placed)
        if schedule == "vanilla":
            meter.send(placed, at)
        else:
            main = placed[np.arange(count), trace.weights[:, layer].argmax(1)]
            if several:
                meter.send(placed, main)
            at = main
    gathers = 0
    if schedule == "coherent":
        gathers = 1
        meter.gather(
            np.bincount(at, np.full(count, float(context_bytes)), cluster.devices).astype(np.float64)
        )
    return Traffic(
        meter.collectives, gathers, meter.moves[0] / count, meter.moves[1] / count, meter.moves[0] * hidden_bytes,
        meter.moves[1] * hidden_bytes, meter.gathered, meter.seconds,
    )  # fmt: skip


class _Meter:
    """Adds up collectives."""

    def __init__(self, cluster: Topology, size: int, intra: Link, inter: Link):
        self.apart, self.size, self.links = cluster.distances(), size, (intra, inter)
        self.collectives, self.moves, self.gathered, self.seconds = 0, [0.0, 0.0], 0.0, 0.0

    def send(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """One all-to-all. One side is `[N]`, the other `[N]` or `[N, K]`: one copy per device and token."""
        pairs = self._pairs(source, target)
        self.collectives += 1
        spent = 0.0
        for which, link in enumerate(self.links):
            sent = np.where(self.apart == which + 1, pairs, 0.0)
            self.moves[which] += float(sent.sum())
            busiest = max(float(sent.sum(1).max()), float(sent.sum(0).max()))
            if busiest:
                spent = max(spent, link.latency + busiest * self.size / link.bandwidth)
        self.seconds += spent

    def _pairs(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.float64]:
        """Vectors sent from device to device, `[G, G]`."""
        count = len(self.apart)
        found = np.zeros((count, count))
        many, one = (source, target) if source.ndim == 2 else (target, source)
        if many.ndim == 1:
            np.add.at(found, (source, target), 1.0)
            return found
        for k in range(many.shape[1]):
            first = (many[:, :k] != many[:, k : k + 1]).all(1)  # another copy went to that device already
            here, there = many[first, k], one[first]
            np.add.at(found, (here, there) if source.ndim == 2 else (there, here), 1.0)
        return found

    def gather(self, made: NDArray[np.float64]) -> None:
        """One all-gather of `made[d]` bytes from each device d to every other, over the slowest link there is."""
        total, count = float(made.sum()), len(made)
        if count == 1:
            return
        self.gathered += total * (count - 1)
        link = self.links[1] if (self.apart == 2).any() else self.links[0]
        self.seconds += link.latency + total / link.bandwidth
