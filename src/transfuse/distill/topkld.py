"""TopKLD: a model teaches its own quantized copy, one way on the likely tokens and the other way on the rest.

:arxiv: 2501.06218
:moves: a full-precision model's next-token distributions -> its low-bit copy
:access: logits, weights, training data
:reversible: no
:context: no

The student is the teacher with rounded weights (`fake_quant`), trained through the rounding. With p the teacher's and q
the student's next-token distribution, and A the k tokens with the largest p, a token's loss is

    sum over A of D(p, q) + tail_weight * sum outside A of D(q, p),      D(a, b) = a log(a / b) - a + b

the forward divergence on the head, which is what sampling sees, and the reverse one on the tail. D carries the masses
that a partial sum needs: without them a sum over A alone is negative where q puts too much there, and is not least at
q = p. So every part is at least 0, and 0 only where p = q. `variant="head_reverse"` swaps the two directions;
"full_forward_plus_head_reverse" is KL(p || q) + tail_weight * sum over A of D(q, p). Of tokens with equal p at the
edge of A, the smaller ids are in.

No code is published, and the paper's own split of head and tail could not be confirmed: what is known of it is that
the top k of sampling separate explicit from implicit knowledge, and that both directions of KL are balanced. k is the
model's sampling top-k (900 of 4096 in VAR, the default).

`distil_qat` trains, by the family's `Distiller`; `bit_scaling` fits quality against total bits; with
`perturbation_tolerance` one sees how much of a latent error survives the choice of a discrete token.

    from transfuse.distill.topkld import TopKLD, distil_qat

    student, losses = distil_qat(
        teacher=model, objective=TopKLD(k=50), train_dataset=rows, bits=3, skip=["lm_head"], args=args
    )
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.divergence import floored, kl_terms
from ..core.errors import BadInput
from ._base import TokenObjective
from ._bit_scaling import BitScaling, bit_scaling, perturbation_tolerance
from ._fake_quant import bake, distil_qat, fake_quant, quantize

__all__ = [
    "BitScaling",
    "TopKLD",
    "bake",
    "bit_scaling",
    "distil_qat",
    "fake_quant",
    "head_mask",
    "mass_terms",
    "perturbation_tolerance",
    "quantize",
    "topk_terms",
]

VARIANTS = ("head_forward", "head_reverse", "full_forward_plus_head_reverse")
Variant = Literal["head_forward", "head_reverse", "full_forward_plus_head_reverse"]


def head_mask(log_p: Tensor, k: int) -> Tensor:
    """The k largest entries of the last axis, bool `[..., V]`; of equal ones the first.

    Raises:
        BadInput: k is not between 1 and V - 1.
    """
    width = log_p.shape[-1]
    if not 1 <= k < width:
        raise BadInput("k", k, f"is not between 1 and {width - 1}", "leave head and tail a token at least")
    edge = log_p.topk(k, dim=-1).values[..., -1:]
    above, level = log_p > edge, log_p == edge
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def mass_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """D(a, b) = a log(a / b) - a + b, elementwise, from log-probabilities `[..., V]`: b where a is 0.

    Where b is 0 and a is not, log b is floored, so that D is finite (`core.divergence`).
    """
    a = log_a.exp()
    absent = a == 0  # also where it is too small for its dtype
    return a * (log_a.masked_fill(absent, 0.0) - floored(log_b)) - a + log_b.exp()


def topk_terms(log_q: Tensor, log_p: Tensor, head: Tensor, variant: Variant, tail_weight: float) -> Tensor:
    """The loss of each token.

    Args:
        log_q: The student's log-probabilities `[..., V]`.
        log_p: The teacher's.
        head: Bool `[..., V]`: the set A.
        variant: "head_forward", "head_reverse" or "full_forward_plus_head_reverse".
        tail_weight: Weight of the second part.

    Returns:
        `[...]`.
    """

    def over(which: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        # Entries left out are made equal first: an infinite one times 0 would be NaN.
        return mass_terms(log_a.masked_fill(~which, 0.0), log_b.masked_fill(~which, 0.0)).sum(-1)

    if variant == "full_forward_plus_head_reverse":
        return kl_terms(log_p, log_q) + tail_weight * over(head, log_q, log_p)
    if variant == "head_reverse":
        return over(head, log_q, log_p) + tail_weight * over(~head, log_p, log_q)
    return over(head, log_p, log_q) + tail_weight * over(~head, log_q, log_p)


class TopKLD(TokenObjective):
    """Forward KL on the teacher's k likeliest tokens and reverse KL on the others, or as the variant says.

    With a stored teacher the k must be among its stored tokens; what it did not store belongs to the tail.

    Args:
        k: Size of the head; the k of top-k sampling.
        variant: "head_forward", "head_reverse" or "full_forward_plus_head_reverse".
        tail_weight: Weight of the second part.
        kd_weight: Weight of the sum.
        ce_weight: Weight of the cross-entropy with the labels.
        rest: For a stored teacher, see `TokenObjective`.
        compile: Use `torch.compile`.

    Raises:
        BadInput: an argument out of range; in training, a k that is not below the vocabulary.
    """

    def __init__(
        self,
        *,
        k: int = 900,
        variant: Variant = "head_forward",
        tail_weight: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        rest: Literal["bucket", "zero"] = "bucket",
        compile: bool = False,
    ):
        super().__init__(kd_weight=kd_weight, ce_weight=ce_weight, rest=rest, compile=compile)
        if not isinstance(k, int) or k < 1:
            raise BadInput("k", k, "is not a number of tokens", "give 1 or more")
        if variant not in VARIANTS:
            raise BadInput("variant", variant, "is not known", f"use one of {', '.join(VARIANTS)}")
        if not tail_weight >= 0:
            raise BadInput("tail_weight", tail_weight, "is negative", "give 0 or more")
        self.k, self.variant, self.tail_weight = k, variant, tail_weight

    def combine(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        **columns: Tensor,
    ) -> dict[str, Tensor]:
        """As everywhere; a stored teacher's tokens are told from its rest."""
        if ids is not None:
            columns["stored"] = ids
        return super().combine(student, teacher, labels, ids, log_probs, **columns)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
        stored = columns.get("stored")
        if stored is None:
            head = head_mask(log_p, self.k)
        else:  # sorted by falling probability; a class for the rest may follow
            if not self.k < log_p.shape[-1] or self.k > stored.shape[-1]:
                problem = f"does not fit a teacher with {stored.shape[-1]} stored tokens"
                raise BadInput("k", self.k, problem, "store more, or take a smaller k")
            head = torch.zeros_like(log_p, dtype=torch.bool)
            head[:, : self.k] = True
        return topk_terms(log_q, log_p, head, self.variant, self.tail_weight)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"k={self.k}, variant={self.variant}, tail_weight={self.tail_weight}"
