"""Knowledge distillation of language models: the standard objectives by name.

:arxiv: 2402.13116
:moves: a teacher's distributions, states, texts and judgements -> a student's weights
:access: text, logits, hidden, training data
:reversible: no
:context: no

The survey takes distillation apart into two steps. First knowledge is ELICITED from a teacher: as text, as
distributions and states, or as judgements.

    labeling          `elicit.label`: answers, step-by-step answers; wrong final answers are dropped
    expansion         `elicit.expand`: Self-Instruct with a ROUGE-L filter, rewriting to harder tasks
    curation          `elicit.curate`: a grid of topics, personas and difficulties
    feature           a teacher model in `Distiller`; `LogitStore`, its top-k on disk; hidden states by taps
    feedback          `elicit.feedback`: preferences, corrections; `Policy`, its own samples judged by logits (GKD;
                      with `seq_kd` the teacher's samples in the other batches)
    self-knowledge    `elicit.self_train`: verified answers, self-rewarding pairs, own against given answers (SPIN)

Then it is DISTILLED by an objective. p is the teacher's distribution of the next token and q the student's; every loss
is a sum over labelled tokens divided by their number in the whole update, in float32, with the squared temperature as
a factor where there is a temperature.

    fine-tuning       cross-entropy -log q(y) on the data, or on texts of the teacher (SeqKD)
                      step-by-step  that of answers + lambda times that of rationales, each over its own tokens
    divergences       forward-kl  sum p (log p - log q)              reverse-kl  sum q (log q - log p)
                      total-variation  0.5 sum |p - q|               skew-kl  KL(p || a p + (1 - a) q), a = 0.1
                      jsd  b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q; b = 0 and 1 are the two KLs
                      skew-reverse-kl  KL(q || (1 - a) p + a q)
                      adaptive-kl  the two KLs, weighed by sum |p - q| on p's head and tail; no gradient in the weights
                      dkd  the target against the rest, and the rest among themselves
    similarity        of hidden states (MSE, L1, cosine, cross-entropy, MMD) and of attention relations
                      contrastive  each token's state in the teacher among those of the batch (InfoNCE)
    across tokenizers ULD: L1 of sorted probabilities of byte-aligned tokens; with shared tokens apart (GOLD)
    reinforcement     RewardRanking -log sigmoid(r_w - r_l), then RewardMinusKL; MiniLLM; OnPolicyReverseKL
    ranks             DPO, RRHF, PRO

Where the field's code and formulas part, this follows the formulas: the temperature counts in the loss, not in sampling
alone; what is padded never counts, the end of text does; logits of -inf give no NaN; adaptive KL's weights take no
gradient and belong to the token they were computed for. A stored top-k teacher is compared on its k tokens and one
class for the rest ("bucket"), or on the k alone, renormalised ("zero").

    from transfuse import load
    from transfuse.distill import Distiller, Policy, prune
    from transfuse.distill.survey_kd_llm import get

    teacher, tokenizer = load("smollm2-135m")
    Distiller(student=prune(teacher, layers=10), teacher=teacher, objective=get("jsd", beta=0.5),
              policy=Policy(fraction=0.5), processing_class=tokenizer, train_dataset=rows).train()
"""

from __future__ import annotations

from typing import Any

from ..core.errors import BadInput
from ..core.fields import suggest
from . import _elicit as elicit
from ._base import Objective
from ._contrastive import Contrastive
from ._cross import ULD, HybridULD
from ._features import MMD, HiddenStates
from ._minillm import MiniLLM, OnPolicyReverseKL, RewardMinusKL
from ._rank import DPO, PRO, RRHF, RewardRanking
from ._relations import AttentionRelation
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
from ._step_by_step import StepByStep

__all__ = ["OBJECTIVES", "elicit", "get", "survey_kd_llm"]

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
    "step-by-step": StepByStep,
    "uld": ULD,
    "hybrid-uld": HybridULD,
    "hidden-states": HiddenStates,
    "mmd": MMD,
    "contrastive": Contrastive,
    "attention-relation": AttentionRelation,
    "minillm": MiniLLM,
    "on-policy-reverse-kl": OnPolicyReverseKL,
    "reward-ranking": RewardRanking,
    "reward-minus-kl": RewardMinusKL,
    "dpo": DPO,
    "rrhf": RRHF,
    "pro": PRO,
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
