"""Knowledge distillation of language models: the standard objectives by name.

:arxiv: 2402.13116
:moves: a teacher's distributions, states, texts and judgements -> a student's weights
:access: text, logits, hidden, training data
:reversible: no
:context: no
"""

from __future__ import annotations

from typing import Any

from ..core.errors import BadInput
from ..core.fields import suggest
from ._base import Objective
from ._standard import (
    JSD,
    AdaptiveKL,
    CrossEntropy,
    DecoupledKD,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)

__all__ = ["OBJECTIVES", "get", "survey_kd_llm"]

OBJECTIVES: dict[str, type[Objective]] = {
    "forward-kl": ForwardKL,
    "reverse-kl": ReverseKL,
    "jsd": JSD,
    "skew-kl": SkewKL,
    "skew-reverse-kl": SkewReverseKL,
    "total-variation": TotalVariation,
    "adaptive-kl": AdaptiveKL,
    "dkd": DecoupledKD,
    "cross-entropy": CrossEntropy,
}
"""The standard objectives by name."""


def get(name: str, **arguments: Any) -> Objective:
    """The standard objective called `name`, e.g. `get("jsd", beta=0.1)`.

    Raises:
        BadInput: no such objective, or arguments it refuses.
    """
    if name not in OBJECTIVES:
        remedy = suggest(name, OBJECTIVES, f"use one of {', '.join(OBJECTIVES)}")
        raise BadInput("objective", name, "is unknown", remedy)
    return OBJECTIVES[name](**arguments)


def survey_kd_llm(*, objective: str = "forward-kl", arguments: dict[str, Any] | None = None) -> Objective:
    """The same for recipes: `{uses: survey-kd-llm, with: {objective: jsd, arguments: {beta: 0.1}}}`.

    Args:
        objective: A name of `OBJECTIVES`.
        arguments: Its arguments.
    """
    return get(objective, **(arguments or {}))
