"""Proxy-tuning: a large model decodes as if tuned, by what tuning did to the logits of a small one.

:arxiv: 2401.08565
:moves: what tuning taught a small model -> a large model's answers
:access: logits
:reversible: yes
:context: no

Three frozen models with one vocabulary decode in step: the large model, a small tuned one (the expert) and the
same small one before its tuning (the anti-expert). What tuning changed in the small one's logits is added to
the large one's; the token chosen from the sum is read by all three.

    scores = base + alpha (expert - antiexpert)            p ~ p_base (p_expert / p_antiexpert)^alpha

alpha is 1 in all the paper's main results; 0 is the large model alone, and the paper looks at 0.2 to 2. Users'
processors, temperature and top-k or top-p act on the sum. The expert may read the request in a rendering of its
own (its chat template); the anti-expert reads what the large model reads. Of a model known only by the
log-probabilities of a few tokens, one token can be steered: `proxy_answers`.

The published code crops the expert alone to the large model's vocabulary and looks for "chat" in its path to
pick a template. Here both are cropped, too few tokens are an error, and the template is an argument. A token
that the expert or the anti-expert rules out (-inf) keeps the large model's logit; there the difference of the
code would be no number.

    model, tokenizer = transfuse.load("large")
    ProxyTuning(model, tokenizer, "small-tuned", "small").generate("Which river runs through Quenby?")
"""

from __future__ import annotations

import copy
import math
import os

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfuse.core.errors import BadInput
from transfuse.steer._experts import Model, WithExperts, cropped

__all__ = ["ProxyTuning", "offset_scores", "proxy_answers"]


def offset_scores(base: Tensor, expert: Tensor, antiexpert: Tensor, alpha: float = 1.0) -> Tensor:
    """The steered logits, base + alpha (expert - antiexpert), in float32.

    Args:
        base: `[..., V]` logits or log-probabilities of the large model, any floating dtype.
        expert: `[..., V or more]` logits of the tuned small model; what is beyond V is cut off.
        antiexpert: `[..., V or more]` logits of the untuned small model.
        alpha: Weight of the offset, 0 or more.

    Returns:
        `[..., V]` float32 (float64 for float64 base). Where expert or antiexpert is -inf the offset is 0.

    Raises:
        IncompatibleModels: expert or antiexpert scores fewer than V tokens.
        BadInput: alpha is NaN, infinite or negative; rows that do not pair.
    """
    _check_alpha(alpha)
    plain, tuned, untuned = cropped(base, expert=expert, antiexpert=antiexpert)
    absent = (tuned == -math.inf) | (untuned == -math.inf)
    return plain + alpha * (tuned - untuned).masked_fill(absent, 0.0)


def proxy_answers(
    logprobs: Tensor, tokens: Tensor, expert: Tensor, antiexpert: Tensor, alpha: float = 1.0
) -> Tensor:
    """Steer one token of a model that tells no more than the log-probabilities of some tokens.

    The offsets of these tokens are added to their log-probabilities, which are renormalised over them: all
    other tokens are taken to be impossible.

    Args:
        logprobs: `[B, K]` natural log-probabilities, the K best or those of given answers.
        tokens: `[B, K]` or `[K]` int64, which tokens they belong to.
        expert: `[B, V]` logits of the tuned small model.
        antiexpert: `[B, V]` logits of the untuned small model.
        alpha: As in `offset_scores`.

    Returns:
        `[B, K]` float32 log-probabilities that sum to 1 over the K tokens.

    Raises:
        BadInput: no token, ids outside the small models' vocabularies, rows that do not pair, alpha out of
            range.
    """
    width = min(expert.shape[-1], antiexpert.shape[-1])
    if logprobs.dim() != 2 or 0 in logprobs.shape:
        raise BadInput("logprobs", tuple(logprobs.shape), "holds no tokens", "give [B, K], B and K above 0")
    if tokens.shape not in (logprobs.shape, logprobs.shape[1:]):
        raise BadInput(
            "tokens", tuple(tokens.shape), f"does not name those of logprobs {tuple(logprobs.shape)}",
            "give one id per log-probability",
        )  # fmt: skip
    if int(tokens.min()) < 0 or int(tokens.max()) >= width:
        wrong = next(t for t in tokens.flatten().tolist() if not 0 <= t < width)
        raise BadInput("tokens", wrong, f"is no id below {width}", "use models that share one vocabulary")
    for name, logits in (("expert", expert), ("antiexpert", antiexpert)):
        if logits.shape[:-1] != logprobs.shape[:1]:
            raise BadInput(
                name, tuple(logits.shape), f"has not {len(logprobs)} rows", "give one [V] per row of logprobs"
            )
    chosen = tokens.expand(logprobs.shape).to(expert.device)
    parts = [z.gather(1, chosen.to(z.device)).to(logprobs.device) for z in (expert, antiexpert)]
    return offset_scores(logprobs, parts[0], parts[1], alpha).log_softmax(-1)


def _check_alpha(alpha: float) -> None:
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0):
        remedy = "give a number from 0 up, 1 by default; to turn the effect round, swap the two small models"
        raise BadInput("alpha", alpha, "is not a weight", remedy)


class ProxyTuning(WithExperts):
    """A large model steered by a small expert and the same small model before its tuning.

    As `model.generate(**inputs, custom_generate=ProxyTuning(...))` it takes `expert_input_ids` and
    `expert_attention_mask`, `[B, S]` prompts in the expert's own rendering, beside the usual prompts.

    Args:
        model: The large causal language model; it is not changed.
        tokenizer: Its tokenizer.
        expert: The small tuned model: a model, (model, tokenizer), or what `transfuse.load` takes. One that is
            loaded here gets the large model's dtype and device.
        antiexpert: The small model before its tuning, given likewise.
        alpha: Weight of the offset, see `offset_scores`.
        prompt: How a query is written down, with `{query}`.
        chat: Put the text into the large model's chat template, for large model and anti-expert.
        system: System message of that chat.
        expert_template: How the expert alone is asked: a text with `{query}`, or "chat" for the chat template
            of its tokenizer; None: as the others are.
    """

    streams = 3

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        expert: PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike[str],
        antiexpert: PreTrainedModel
        | tuple[PreTrainedModel, PreTrainedTokenizerBase]
        | str
        | os.PathLike[str],
        *,
        alpha: float = 1.0,
        prompt: str = "{query}",
        chat: bool = False,
        system: str | None = None,
        expert_template: str | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.expert, self.antiexpert, self.alpha = expert, antiexpert, alpha
        self.prompt, self.chat, self.system = prompt, chat, system
        self.expert_template = expert_template
        self._ready = {}

    def neutral(self) -> ProxyTuning:
        """A copy with alpha 0."""
        plain = copy.copy(self)
        plain.alpha = 0.0
        return plain

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores `[B, V]` from the logits of large model, expert and anti-expert."""
        return offset_scores(logits[0], logits[1], logits[2], self.alpha)

    def _check(self) -> None:
        _check_alpha(self.alpha)

    def _others(self) -> list[tuple[str, Model, bool]]:
        return [("expert", self.expert, True), ("antiexpert", self.antiexpert, False)]
