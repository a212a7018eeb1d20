"""What the value search of ROME and MEMIT minimises."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ..core.errors import BadInput
from ._layers import check_number

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective:
    """What the search minimises, and how.

    Attributes:
        lr: Adam's learning rate.
        steps: Most updates.
        weight_decay: Weight of ||delta|| / ||v0||^2.
        kl_factor: Weight of the divergence between the edited model's predictions p and the unedited model's p0, on
            "{subject} is a" at the subject.
        clamp: ||delta|| <= clamp ||v0|| after each update.
        stop_below: A unit is finished when its loss is below this.
        kl: "reverse" for KL(p || p0), of ROME's equation 4 and its code; "forward" for KL(p0 || p).
    """

    lr: float
    steps: int
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_below: float
    kl: str = "reverse"

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            BadInput: a value out of its range; the argument is named.
        """
        if self.kl not in ("reverse", "forward"):
            raise BadInput("kl", self.kl, "is unknown", 'use "reverse" or "forward"')
        for name, value in asdict(self).items():
            if name != "kl":
                check_number(name, value, least=0, above=name in ("lr", "clamp"))
        check_number("steps", self.steps, least=1, whole=True)

    def drift(self, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """The divergence, nats `[N]`, of log-probabilities `before` and `now`, `[N, V]`."""
        first, second = (now, before) if self.kl == "reverse" else (before, now)
        return (first.exp() * (first - second)).sum(-1)
