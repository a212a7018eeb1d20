"""MEMIT: write many facts at once into the MLP down-projections of a few consecutive blocks.

:arxiv: 2210.07229
:moves: facts -> the weights of a few layers
:access: weights
:reversible: yes
:context: no

As in ROME, an MLP's down-projection W maps a key (its input at the subject's last token) to what it adds to the
residual stream. For each fact, MEMIT finds the state z of that stream, after the *last* of the chosen layers and
at the same token, that makes the model say the target. Then, from the first of these layers to the last, it
collects the keys K `[m, E]` of all E facts and their present states after the last layer, spreads what is missing,
R `[d, E]`, over the layers that are left, and solves

    W <- W + R K^T (lam C + K K^T)^-1,     C = E[k k^T],

in float64. Each layer sees the model as the layers before it left it: what they brought the state nearer to z
is not brought again. Where the MLP's output is normalised before it joins the stream (gemma3, olmo2), z is the last
down-projection's output, as in ROME.

Where this differs from published code: keys are the plain mean over the prompt and the sampled prefixes
(`prompt_share=0.5` gives the bare prompt half the weight, as published); with fewer facts than key dimensions the
same solution comes from an E x E system and one factorisation of C; several facts are searched in one batch; a
layer's keys are computed from the cached input of the layer changed before it, not from the beginning.

    from transfuse.edit import edit
    with edit(model, tokenizer, facts, method="memit") as handle:
        ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.taps import capture, replay
from ..core.tensors import Factor
from ._base import Editor, WeightEdit
from ._contexts import Chunk, subject_end
from ._layers import check_number, depth
from ._objective import Objective
from ._sites import Site, edit_of, find_sites
from ._statistics import BackgroundCache, check_statistics
from ._values import Found, editing, mean_keys, search

__all__ = ["MEMIT", "memit_update"]

DEPTHS = (0.15, 0.3)
"""Relative depths of the first and last edited block when `layers` is None."""


def memit_update(
    keys: torch.Tensor, residual: torch.Tensor, factor: Factor | None, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change `left @ right` = R K^T (lam C + K K^T)^-1 of one layer (equation 14).

    With `lam` = 0 it is the limit: the change of least C-norm for which W K grows by R (least squares where
    there are more facts than key dimensions).

    Args:
        keys: K, `[m, E]`.
        residual: R, `[d, E]`.
        factor: C, `[m, m]`, factorised; None for the identity.
        lam: Weight of what the layer stores already, in units of one fact.

    Returns:
        `(left [d, r], right [r, m])` in float64, r = min(E, d).

    Raises:
        BadInput: `lam` is negative; or it is 0 and keys are linearly dependent (two facts share a key).
    """
    check_number("lam", lam, least=0)
    wide, gap = keys.double(), residual.double()
    width, count = wide.shape
    if count <= width:
        solved = wide if factor is None else factor.solve(wide)  # C^-1 K
        inner = wide.T @ solved
        inner.diagonal().add_(lam)
        right = _factor(inner, lam).solve(solved.T)  # (lam I + K^T C^-1 K)^-1 K^T C^-1
    else:
        spread = torch.eye(width, dtype=wide.dtype, device=wide.device) if factor is None else factor.matrix
        right = _factor(lam * spread + wide @ wide.T, lam).solve(wide).T
    if count > len(gap):
        return torch.eye(len(gap), dtype=gap.dtype, device=gap.device), gap @ right
    return gap, right


def _factor(matrix: torch.Tensor, lam: float) -> Factor:
    try:
        return Factor((matrix + matrix.T) / 2)
    except BadInput as error:
        raise BadInput(
            "lam",
            lam,
            "is too small for keys that are linearly dependent",
            "raise it, or edit each subject once",
        ) from error


class MEMIT(Editor):
    """Mass editing.

    The defaults of the search and `lam` are those published for Llama-2-7B. The blocks are not: 0.15 to 0.3 of the
    depth are 5 to 10 of that model's 32, where 4 to 8 were published.

    Args:
        layers: Numbers of the edited blocks, in rising order; None takes those from 0.15 to 0.3 of the depth.
        lam: Weight of C against the new keys: how many old keys one new one is worth.
        module: Name of the MLP's down-projection inside a block, where it cannot be guessed.
        statistics: Text for C: "self", a data set's name, a text file, a list of texts; None leaves C out.
        tokens: Tokens of that text.
        ridge: Share of C's mean diagonal added to its diagonal; needed with fewer tokens than key dimensions.
        prefixes: Number of sampled contexts beside the bare prompt.
        lr: Adam's learning rate for the values.
        steps: Most updates. The published code counts evaluations of the loss, and makes one update less.
        weight_decay: Weight of ||delta|| / ||z0||^2.
        kl_factor: Weight of the drift of "{subject} is a".
        kl: "reverse" measures the drift as KL(edited || unedited), as published; "forward" the other way round.
        clamp: Largest ||delta|| / ||z0||, z0 being the state before the edit.
        stop_below: Loss at which a fact's search ends.
        prompt_share: Weight of the bare prompt's key in a fact's mean key; None: that of every other context.
        per_subject: Facts about one subject share one delta, found on all of them: their keys are nearly equal, so
            that deltas found one by one would be averaged away. False is the published behaviour.
        batch_size: Facts (or subjects) searched together; results do not depend on it, memory and speed do.
        seed: Of prefixes and sampled text.
    """

    def __init__(
        self,
        *,
        layers: list[int] | None = None,
        lam: float = 15000.0,
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
        prompt_share: float | None = None,
        per_subject: bool = True,
        batch_size: int = 8,
        seed: int = 0,
    ):
        self.layers, self.lam, self.module = layers, lam, module
        self.statistics, self.tokens, self.ridge = statistics, tokens, ridge
        self.prefixes, self.lr, self.steps = prefixes, lr, steps
        self.weight_decay, self.kl_factor, self.kl, self.clamp = weight_decay, kl_factor, kl, clamp
        self.stop_below, self.prompt_share, self.seed = stop_below, prompt_share, seed
        self.per_subject, self.batch_size = per_subject, batch_size
        self._known = BackgroundCache()

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        super().check(model, tokenizer, facts)
        find_sites(model, self._layers(model), self.module, writing=True)
        check_number("lam", self.lam, least=0)
        check_number("ridge", self.ridge, least=0)
        check_number("prefixes", self.prefixes, least=0, whole=True)
        check_number("batch_size", self.batch_size, least=1, whole=True)
        if self.prompt_share is not None and not 0 <= self.prompt_share <= 1:
            raise BadInput("prompt_share", self.prompt_share, "is no share", "give 0 to 1, or None")
        self._objective().check()
        if self.statistics is not None:
            check_statistics(self.statistics, self.tokens)

    def _layers(self, model: PreTrainedModel) -> list[int]:
        if self.layers is None:
            first, last = (depth(model, None, fraction) for fraction in DEPTHS)
            return list(range(first, last + 1))
        if not self.layers or sorted(set(self.layers)) != list(self.layers):
            raise BadInput(
                "layers", self.layers, "are not in rising order", "give block numbers like [4, 5, 6]"
            )
        return list(self.layers)

    def _objective(self) -> Objective:
        return Objective(
            self.lr, self.steps, self.weight_decay, self.kl_factor, self.clamp, self.stop_below, self.kl
        )

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> WeightEdit:
        """The edit that writes all `facts`, one low-rank change per layer.

        Raises:
            BadInput: see `check`.
            TrainingDiverged: a search met NaN.
        """
        self.check(model, tokenizer, facts)
        sites = find_sites(model, self._layers(model), self.module, writing=True)
        with editing(model):
            known = self._known.of(
                model, tokenizer, sites, statistics=self.statistics, tokens=self.tokens, ridge=self.ridge,
                prefixes=self.prefixes, module=self.module, seed=self.seed,
            )  # fmt: skip
            units = self._units(facts)
            found = [
                search(
                    model, tokenizer, units[i : i + self.batch_size], sites[-1], sites[0],
                    prefixes=known.prefixes, objective=self._objective(), whole=True, share=self.prompt_share,
                )
                for i in range(0, len(units), self.batch_size)
            ]  # fmt: skip
            return self._write(model, sites, found, known.factors)

    def _units(self, facts: Sequence[Fact]) -> list[list[Fact]]:
        """What gets a value of its own: each fact, or all facts about one subject.

        Sorted by what follows the subject: rows of one length share a batch.
        """
        units: dict[object, list[Fact]] = {}
        for number, fact in enumerate(facts):
            units.setdefault(fact.subject.strip() if self.per_subject else number, []).append(fact)

        def tail(fact: Fact) -> int:
            return len(fact.prompt) - subject_end(fact) + len(fact.target)

        return sorted(units.values(), key=lambda unit: max(map(tail, unit)))

    @torch.no_grad()
    def _write(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        found: Sequence[Found],
        factors: dict[int, Factor | None],
    ) -> WeightEdit:
        wanted = torch.cat([each.start + each.delta for each in found])
        keys = torch.cat([each.keys for each in found])
        now = torch.cat([each.start for each in found])
        walks = [
            _Walk(each.chunk, each.hidden, len(each.start), each.place, each.tupled, self.prompt_share)
            for each in found
        ]
        updates = []
        applied: list[WeightEdit] = []
        try:
            for i, site in enumerate(sites):
                if i:
                    pairs = [walk.step(model, sites[i - 1], site) for walk in walks]
                    keys, now = (torch.cat(parts).to(wanted) for parts in zip(*pairs, strict=True))
                residual = (wanted - now) / (len(sites) - i)
                update = (site, *memit_update(keys.T, residual.T, factors[site.index], self.lam))
                updates.append(update)
                if i + 1 < len(sites):
                    applied.append(edit_of([update]))
                    applied[-1].attach(model)
        finally:
            for each in reversed(applied):
                each.detach(model)
        return edit_of(updates)


@dataclass
class _Walk:
    """Context rows on their way up: the input of the block changed last, which is where the next pass begins.

    Attributes:
        chunk: Rows up to the subject, the bare prompt first for each fact.
        hidden: Input of that block, `[B, T, d]`.
        facts: Number of facts in the rows.
        place: Name of the module whose output the values are.
        tupled: The model's blocks return tuples.
        share: As `mean_keys` takes it.
    """

    chunk: Chunk
    hidden: torch.Tensor
    facts: int
    place: str
    tupled: bool
    share: float | None = None

    def step(self, model: PreTrainedModel, changed: Site, site: Site) -> tuple[torch.Tensor, ...]:
        """Run from `changed`'s block to `site`'s keys, and the bare prompts on to the values.

        Returns:
            `(keys [E, m], values [E, d])`, float32 or wider.
        """
        cut = self.chunk.cut
        with (
            replay(model, changed.block, self.hidden, tupled=self.tupled),
            capture(model, [site.block, site.module], inputs=True, stop=True) as seen,
        ):
            seen.run(**self.chunk.inputs(), use_cache=False)
        self.hidden = seen[site.block]
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        keys = mean_keys(self.chunk.unflat(seen[site.module])[:, cut].to(wide), self.facts, self.share)
        bare = torch.arange(0, len(self.hidden), len(self.hidden) // self.facts, device=self.hidden.device)
        begin = int(self.chunk.mask[bare].argmax(1).min())  # the other rows' prefixes are padding here
        prompts = self.chunk.select(bare, columns=slice(begin, None))
        with (
            replay(model, site.block, self.hidden[bare, begin:], tupled=self.tupled),
            capture(model, self.place, stop=True) as values,
        ):
            values.run(**prompts.inputs(), use_cache=False)
        return keys, prompts.unflat(values[self.place])[:, -1].to(wide)
