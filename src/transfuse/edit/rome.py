"""ROME: write one fact into one MLP down-projection with a rank-one update.

:arxiv: 2202.05262
:moves: one fact -> one weight matrix
:access: weights
:reversible: yes
:context: no

An MLP's down-projection W is read as a memory: the key k is its input at the last token of the subject, the
value v its output there. ROME finds the value that makes the model say the target, and changes W by one
rank-one matrix, so that the key gives that value while other keys, weighted by how often they occur, change
as little as possible:

    W <- W + (v* - W k*) u^T / (u^T k*),     u = C^-1 k*,     C = E[k k^T].

k* is the mean key over the prompt alone and after 20 short prefixes sampled from the model. v* = v0 + delta,
delta by Adam (`edit._values`). C comes from text (`statistics`): by default text the model samples itself, so
that nothing has to be downloaded; with `statistics=None`, u = k*, the variant some later comparisons ran.

Where this differs from published code: after the edit W k* = v* holds for the mean key, as in the paper's equation
(`at_prompt=True` makes it hold for the bare prompt's key, as published); blocks below the edited one run once, and
above it only the tokens from the subject on; C is factorised in float64.

Facts are edited one at a time; in a run of edits, C and the prefixes are those of the unedited model: an editor takes
them when it first meets a model, and a model trained since needs a new editor.

    from transfuse.edit import edit
    with edit(model, tokenizer, facts, method="rome") as handle:
        ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.tensors import Factor
from ._base import Editor, WeightEdit
from ._layers import check_number, depth
from ._objective import Objective
from ._sites import edit_of, find_sites
from ._statistics import BackgroundCache, check_statistics
from ._values import editing, search

__all__ = ["ROME", "rome_update"]

DEPTH = 0.3
"""Relative depth of the edited block when `layer` is None."""


def rome_update(
    weight: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    factor: Factor | None = None,
    *,
    at: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank-one change `outer(scale, direction)` with which `weight` maps `key` to `value` (equation 2).

    Args:
        weight: W, `[d, m]`.
        key: k*, `[m]`.
        value: v*, `[d]`.
        factor: C = E[k k^T], `[m, m]`, factorised; None for the identity.
        at: The key k that is mapped to `value` in place of k*, `[m]`.

    Returns:
        `(direction [m], scale [d])` in float64: u of unit length, and (v* - W k) / (u^T k).

    Raises:
        BadInput: the key is zero.
    """
    wide = key.double()
    direction = wide if factor is None else factor.solve(wide)
    norm = direction.norm()
    if not float(norm) > 0:
        raise BadInput("key", "zero", "has no direction", "edit another layer")
    direction = direction / norm
    mapped = wide if at is None else at.double()
    scale = (value.double() - weight.double() @ mapped) / (direction @ mapped)
    return direction, scale


class ROME(Editor):
    """Rank-one model editing.

    The defaults of the search are those published for Llama-2-7B. The block is not: 0.3 of the depth is 10 of that
    model's 32, where 5 was published.

    Args:
        layer: Number of the edited block; None takes the block at 0.3 of the depth (`edit.locate` finds others).
        module: Name of the MLP's down-projection inside a block, where it cannot be guessed.
        statistics: Text for C: "self", a data set's name, a text file, a list of texts; None leaves C out.
        tokens: Tokens of that text.
        ridge: Share of C's mean diagonal added to its diagonal; needed with fewer tokens than key dimensions.
        prefixes: Number of sampled contexts beside the bare prompt.
        lr: Adam's learning rate for the value.
        steps: Most updates. The published code counts evaluations of the loss, and makes one update less.
        weight_decay: Weight of ||delta|| / ||v0||^2.
        kl_factor: Weight of the drift of "{subject} is a".
        kl: "reverse" measures the drift as KL(edited || unedited), as published; "forward" the other way round.
        clamp: Largest ||delta|| / ||v0||.
        stop_below: Loss at which the search ends.
        at_prompt: v* is what W gives for the bare prompt's key, not for the mean key.
        seed: Of prefixes and sampled text.
    """

    batched = False

    def __init__(
        self,
        *,
        layer: int | None = None,
        module: str | None = None,
        statistics: str | list[str] | None = "self",
        tokens: int = 8192,
        ridge: float = 0.0,
        prefixes: int = 20,
        lr: float = 0.5,
        steps: int = 25,
        weight_decay: float = 1e-3,
        kl_factor: float = 0.0625,
        kl: Literal["reverse", "forward"] = "reverse",
        clamp: float = 4.0,
        stop_below: float = 0.05,
        at_prompt: bool = False,
        seed: int = 0,
    ):
        self.layer, self.module = layer, module
        self.statistics, self.tokens, self.ridge = statistics, tokens, ridge
        self.prefixes, self.lr, self.steps = prefixes, lr, steps
        self.weight_decay, self.kl_factor, self.kl, self.clamp = weight_decay, kl_factor, kl, clamp
        self.stop_below, self.at_prompt, self.seed = stop_below, at_prompt, seed
        self._known = BackgroundCache()

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        super().check(model, tokenizer, facts)
        find_sites(model, [depth(model, self.layer, DEPTH)], self.module, writing=True)
        check_number("ridge", self.ridge, least=0)
        check_number("prefixes", self.prefixes, least=0, whole=True)
        self._objective().check()
        if self.statistics is not None:
            check_statistics(self.statistics, self.tokens)

    def _objective(self) -> Objective:
        return Objective(
            self.lr, self.steps, self.weight_decay, self.kl_factor, self.clamp, self.stop_below, self.kl
        )

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> WeightEdit:
        """The rank-one edit for the one fact in `facts`.

        Raises:
            BadInput: more than one fact, or see `check`.
            TrainingDiverged: the search met NaN.
        """
        self.check(model, tokenizer, facts)
        if len(facts) != 1:
            raise BadInput(
                "facts", len(facts), "are edited one at a time", 'use edit(...), or method="memit"'
            )
        (site,) = find_sites(model, [depth(model, self.layer, DEPTH)], self.module, writing=True)
        with editing(model):
            known = self._known.of(
                model, tokenizer, [site], statistics=self.statistics, tokens=self.tokens, ridge=self.ridge,
                prefixes=self.prefixes, module=self.module, seed=self.seed,
            )  # fmt: skip
            found = search(
                model, tokenizer, [facts], site, site, prefixes=known.prefixes, objective=self._objective()
            )
            value = (found.start + found.delta)[0]
            bias = site.bias(model)
            if bias is not None:  # values are outputs, bias included; W maps to what is left
                value = value - bias
            direction, scale = rome_update(
                site.matrix(model), found.keys[0], value, known.factors[site.index],
                at=found.bare[0] if self.at_prompt else None,
            )  # fmt: skip
        return edit_of([(site, scale[:, None], direction[None])])
