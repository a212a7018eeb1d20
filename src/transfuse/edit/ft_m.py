"""FT-M: fine-tune one MLP down-projection on the target tokens, teacher-forced.

:arxiv: 2401.01286
:moves: one fact -> one weight matrix
:access: weights
:reversible: yes
:context: no

The study's strongest plain baseline. One down-projection is trained by Adam on

    L = -(1/n) sum_i log p(t_i | prompt, t_1 ... t_{i-1}),

the ordinary cross-entropy of the target's tokens with the prompt masked; nothing limits the change.

Beside the study's code: hidden states below the edited block are computed once and replayed; half-precision weights
are trained as a float32 copy, since steps of `lr` vanish in bf16's rounding. The default block is 21 of Llama-2's 32,
carried over by relative depth. Several facts given at once share one optimizer: `steps` passes, `batch_size` facts
per update, as theirs.

    with edit(model, tokenizer, facts, method="ft-m", layer=24) as handle:
        handle.save("delta")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._finetune import FineTune

__all__ = ["FTM", "target_loss"]


def target_loss(logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean over facts of the mean teacher-forced NLL of their target tokens.

    Args:
        logits: `[B, n, V]`, any float dtype; the last n_b positions of row b predict its n_b target tokens.
        targets: B lists of token ids, none longer than n.

    Returns:
        A scalar in nats, float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = [
        torch.nn.functional.cross_entropy(row[-len(ids) :], torch.tensor(ids, device=row.device))
        for row, ids in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).mean()


class FTM(FineTune):
    """Editor; see the module.

    Args:
        layer: Block to edit; None takes the one at 21/32 of the depth.
        module: Name of the weight's module inside the block; None takes the MLP's down-projection.
        lr: Adam's learning rate.
        steps: Passes over the facts.
        stop_below: No update for a mini-batch whose loss (nats per token) is below this; all below: done.
        batch_size: Facts per update.
    """

    reads_target = True

    def __init__(
        self,
        *,
        layer: int | None = None,
        module: str | None = None,
        lr: float = 5e-4,
        steps: int = 25,
        stop_below: float = 1e-2,
        batch_size: int = 1,
    ):
        super().__init__(
            layer=layer, module=module, lr=lr, steps=steps, stop_below=stop_below, batch_size=batch_size
        )

    def loss(self, logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
        """`target_loss`."""
        return target_loss(logits, targets)
