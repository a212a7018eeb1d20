"""FT-L: fine-tune one MLP down-projection inside a small box around its old values.

:arxiv: 2401.01286
:moves: one fact -> one weight matrix
:access: weights
:reversible: yes
:context: no

The weakest sensible editor, kept as the study's baseline. One down-projection W is trained by Adam on

    L = -(1/n) sum_i log p(t_i | prompt),      |W - W0|_inf <= eps after each step,

where *every* target token t_1 ... t_n is asked for at the last position of the prompt: the target is never read, so
a target of several tokens is pulled towards its own bag of tokens. With targets of one token the loss is that of
`ft-m`, and the box is the whole difference.

Beside the study's code: the box is that of this module's `eps` and on by default (their published settings for
Llama turn it off); hidden states below the edited block are computed once and replayed; half-precision weights are
trained as a float32 copy, since steps of `lr` vanish in bf16's rounding, and the box holds for the rounded values that
are installed. The default block is 21 of Llama-2's 32, carried over by relative depth.

    with edit(model, tokenizer, facts, method="ft-l", layer=24) as handle:
        handle.save("delta")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ._finetune import FineTune, box
from ._layers import check_number

__all__ = ["FTL", "last_position_loss"]


def last_position_loss(logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean over facts of the mean NLL of all target tokens, each at the last prompt position.

    Args:
        logits: `[B, V]`, any float dtype; at the last token of each prompt.
        targets: B lists of token ids, of any lengths.

    Returns:
        A scalar in nats, float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    surprise = -torch.log_softmax(logits, dim=-1)
    return torch.stack([row[list(ids)].mean() for row, ids in zip(surprise, targets, strict=True)]).mean()


class FTL(FineTune):
    """Editor; see the module.

    Args:
        layer: Block to edit; None takes the one at 21/32 of the depth.
        module: Name of the weight's module inside the block; None takes the MLP's down-projection.
        lr: Adam's learning rate.
        steps: Passes over the facts.
        eps: Greatest change of any weight, in the weight's unit.
        stop_below: No update for a mini-batch whose loss (nats per token) is below this; all below: done.
        batch_size: Facts per update.
    """

    reads_target = False

    def __init__(
        self,
        *,
        layer: int | None = None,
        module: str | None = None,
        lr: float = 5e-4,
        steps: int = 25,
        eps: float = 5e-4,
        stop_below: float = 1e-2,
        batch_size: int = 1,
    ):
        super().__init__(
            layer=layer, module=module, lr=lr, steps=steps, stop_below=stop_below, batch_size=batch_size
        )
        self.eps = eps

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Refuse facts, weights and hyperparameters that cannot work."""
        check_number("eps", self.eps, least=0, above=True)
        super().check(model, tokenizer, facts)

    def loss(self, logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
        """`last_position_loss` at the last of the positions in `logits`."""
        return last_position_loss(logits[:, -1], targets)

    def bounds(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The box |W - W0|_inf <= eps."""
        return box(weight, self.eps)
