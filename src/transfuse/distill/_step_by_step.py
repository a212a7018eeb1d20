"""Distilling step by step (arXiv 2305.02301): learn a teacher's answers, and apart from them its reasons.

    L = mean over answer tokens of -log q(y) + rationale_weight * mean over rationale tokens of -log q(y)

Each mean is over its own tokens of the whole update, so that long rationales do not drown short answers. The column
`rationale` marks the tokens. A rationale and its answer may be one sequence, or, as in the paper, two tasks told apart
by their prompts, so that no rationale has to be written when the student is used:

    answers = encode_examples(tokenizer, [("[label] " + x, y) for x, y, _ in labelled], end=True)
    reasons = encode_examples(tokenizer, [("[rationale] " + x, r) for x, _, r in labelled], end=True)
    rows = [{**row, "rationale": [0] * len(row["labels"])} for row in answers]
    rows += [{**row, "rationale": [1] * len(row["labels"])} for row in reasons]
    Distiller(student=student, objective=StepByStep(), train_dataset=rows, processing_class=tokenizer)

The authors' code takes both tasks of every example into each batch and weighs them alpha and 1 - alpha (0.5 each): at
rationale_weight = 1 that is half of this loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.batches import IGNORED
from ..core.errors import BadInput
from ._base import Objective, Signal, TokenObjective

__all__ = ["StepByStep"]


class StepByStep(Objective):
    """Cross-entropy of answers plus that of rationales, each a mean over its own tokens of the whole update.

    Reads the column `rationale`, 0 or 1 per token of `labels` at the same places: 1 on those of a rationale. A part
    without a token is 0.

    Args:
        rationale_weight: lambda, the weight of the rationales.

    Raises:
        BadInput: a weight that is not a number from 0 up; in training, marks that are missing or of another shape.
    """

    needs_teacher = False
    needs_logits = False
    additive = True
    columns = ("rationale",)

    def __init__(self, *, rationale_weight: float = 1.0):
        super().__init__()
        if not 0.0 <= rationale_weight < float("inf"):
            raise BadInput("rationale_weight", rationale_weight, "is not a weight", "give a number from 0 up")
        self.rationale_weight = rationale_weight
        self.parts = _Parts(rationale_weight)

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Predicted tokens of answers and of rationales."""
        answer, rationale = _kinds(batch)
        return {"answer_tokens": answer.sum(), "rationale_tokens": rationale.sum()}

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        counts = {name: batch.get(name, own).clamp_min(1) for name, own in self.totals(batch).items()}
        shares = {
            f"{name}_share": kind.double() / counts[f"{name}_tokens"]
            for name, kind in zip(("answer", "rationale"), _kinds(batch), strict=True)
        }
        return self.parts(student, None, {**batch, **shares, "items": 1})


def _kinds(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which tokens are predicted and of an answer, and which are predicted and of a rationale, `[B, T]` bool.

    Raises:
        BadInput: no marks, or of another shape.
    """
    labels, marks = batch["labels"], batch.get("rationale")
    if marks is None or marks.shape != labels.shape:
        shown = None if marks is None else tuple(marks.shape)
        problem = f"is not one mark per label {tuple(labels.shape)}"
        raise BadInput("rationale", shown, problem, "add a column of 0 and 1; samples of a policy have none")
    predicted = labels != IGNORED
    predicted[:, 0] = False  # nothing comes before a first token
    return predicted & ~marks.bool(), predicted & marks.bool()


class _Parts(TokenObjective):
    """The terms of each token; the columns hold 1 / n on a part's n tokens and 0 elsewhere."""

    columns = ("answer_share", "rationale_share")
    needs_teacher = False

    def __init__(self, rationale_weight: float):
        super().__init__(kd_weight=0.0, ce_weight=1.0)
        self.rationale_weight = rationale_weight

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        return self.combine(student, teacher, labels, **columns)["loss"]

    def combine(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        **columns: Tensor,
    ) -> dict[str, Tensor]:
        """The shares of both parts, "answer" and "rationale", beside "loss", `[n]` each."""
        cost = nn.functional.cross_entropy(student, labels, reduction="none")
        answer, rationale = (
            cost * columns[f"{name}_share"].to(cost.dtype) for name in ("answer", "rationale")
        )
        return {"loss": answer + self.rationale_weight * rationale, "answer": answer, "rationale": rationale}
