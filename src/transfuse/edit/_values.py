"""Value search of ROME and MEMIT: the MLP's or block's output at the subject that makes a model say the target.

Three things keep it cheap, without changing what is computed:

- blocks up to the edited one run once; their result is cached and replayed,
- in the blocks above, tokens before the subject's last one cannot see the change (attention is causal): their
  keys and values are computed once, and each step runs the few tokens from the subject on,
- several facts (or subjects) share a batch, each with its own vector, its own loss and its own end.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.taps import capture, decoder_layers, replace, replay
from ..core.training import optimise
from ._contexts import Chunk, Row, essence_row, lay_out, rows_of
from ._layers import still
from ._objective import Objective
from ._sites import Site

__all__ = ["Found", "editing", "mean_keys", "search"]

_PROBE = 64.0  # large beside the rounding of a bf16 residual stream; less where float16 would overflow


@contextlib.contextmanager
def editing(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and no parameter that asks for a gradient; both put back at the end."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    with still(model):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


@dataclass(frozen=True)
class Found:
    """Result of a search for E facts; vectors are float32 (float64 for a float64 model).

    Attributes:
        place: Name of the module whose output the values are: the down-projection, or its block.
        start: v0, that output at the subject of the bare prompt, `[E, d]`.
        delta: What to add to it, `[E, d]`; equal for the facts of one unit.
        bare: The key at `key_site` after the bare prompt, `[E, m]`.
        keys: Its mean over the contexts, `[E, m]`.
        losses: Loss of each unit at its last evaluation, `[U]`.
        steps: Updates each unit took, int64 `[U]`.
        chunk: The context rows up to the subject, the bare prompt first for each fact.
        hidden: Input of `key_site`'s block on those rows, `[B, T, d]`.
        tupled: The model's blocks return tuples.
    """

    place: str
    start: torch.Tensor
    delta: torch.Tensor
    bare: torch.Tensor
    keys: torch.Tensor
    losses: torch.Tensor
    steps: torch.Tensor
    chunk: Chunk
    hidden: torch.Tensor
    tupled: bool


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    units: Sequence[Sequence[Fact]],
    site: Site,
    key_site: Site,
    *,
    prefixes: Sequence[str],
    objective: Objective,
    whole: bool = False,
    share: float | None = None,
) -> Found:
    """For each unit, the delta with which `v0 + delta` at `site`, at the subject's end, yields the target.

    delta minimises, by Adam from 0, the mean over contexts of the target tokens' mean negative log-likelihood
    + kl_factor KL(p || p0) + weight_decay ||delta|| / ||v0||^2. After each step, ||delta|| <= clamp ||v0||.

    Args:
        model: Inside `editing`.
        tokenizer: Its tokenizer.
        units: What gets one delta each, searched in one batch: single facts, or several about one subject. The
            result of each unit is that of a batch of one.
        site: Where the value goes; not in the last block.
        key_site: Where keys are collected; a block at or below `site`.
        prefixes: Contexts; the first must be "".
        objective: Loss and limits.
        whole: v0 is the output of the whole block, which is what MEMIT spreads over layers, in place of the
            down-projection's. Not where the MLP's output is normalised before it joins the block's (gemma3, olmo2):
            a change of the one is no change of the other there.
        share: As `mean_keys` takes it.

    Raises:
        TrainingDiverged: a loss or gradient is not finite.
    """
    contexts = [[row for fact in unit for row in rows_of(tokenizer, fact, prefixes)] for unit in units]
    rows = [row for own in contexts for row in own]
    owner = [number for number, own in enumerate(contexts) for _ in own]
    count = len(rows)
    rows += [essence_row(tokenizer, unit[0]) for unit in units]
    owner += range(len(units))
    chunk = lay_out(model, tokenizer, rows, owner)
    with (
        torch.no_grad(),
        capture(model, [site.block, key_site.block, key_site.module], inputs=True) as ins,
        capture(model, [site.module, site.block], stop=True) as outs,
        # The model goes on with a copy: some (falcon) add the attention's output to the MLP's in place.
        replace(model, {site.module: torch.clone}),
    ):
        outs.run(**chunk.inputs(), use_cache=False)
    ins[key_site.module], outs[site.module] = map(chunk.unflat, (ins[key_site.module], outs[site.module]))
    wide = torch.promote_types(outs[site.module].dtype, torch.float32)
    bare = torch.arange(0, count, len(prefixes), device=chunk.ids.device)
    above = _additive(model, chunk, site, ins[site.block], outs)
    place = site.block if whole and above else site.module
    start = outs[place][bare, chunk.cut].to(wide)
    keys = ins[key_site.module][:count, chunk.cut].to(wide)
    upper = _upper(model, chunk, site, ins[site.block], outs, above)
    sizes = torch.tensor([len(unit) for unit in units], dtype=wide, device=start.device)
    norms = torch.zeros_like(sizes).index_add(0, chunk.owner[bare], start.norm(dim=1)) / sizes
    task = _Task(upper, rows, owner, norms, start.shape[1], objective)
    task.minimise()
    before = chunk.select(torch.arange(count, device=bare.device), columns=slice(0, chunk.cut + 1))
    hidden = ins[key_site.block][:count, : chunk.cut + 1]
    delta = task.delta.detach()[chunk.owner[bare]]
    return Found(
        place, start, delta, keys[bare], mean_keys(keys, len(bare), share), task.losses, task.steps, before, hidden,
        upper.tupled,
    )  # fmt: skip


def mean_keys(keys: torch.Tensor, facts: int, share: float | None) -> torch.Tensor:
    """Each fact's mean key, `[E, m]`, of the keys after its contexts, `[E * contexts, m]`, the bare prompt's first.

    `share` is the bare prompt's weight in the mean; None gives every context the same.
    """
    each = keys.unflatten(0, (facts, -1))
    if share is None or each.shape[1] == 1:
        return each.mean(1)
    return share * each[:, 0] + (1 - share) * each[:, 1:].mean(1)


@dataclass(frozen=True)
class _Upper:
    """The part of the model that a value can change, on the columns from the subject on.

    Attributes:
        model: The model.
        chunk: Whole rows.
        layer: First block to run.
        index: Its number.
        inside: Name of the down-projection the value is added to, or None where it is added to `hidden`.
        hidden: Input of that block from column `cut` on, `[B, S, d]`.
        past: Keys and values of the earlier columns for the blocks from `index` on; empty without any.
        tupled: Blocks return tuples.
    """

    model: PreTrainedModel
    chunk: Chunk
    layer: str
    index: int
    inside: str | None
    hidden: torch.Tensor
    past: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    tupled: bool

    def select(self, rows: torch.Tensor) -> _Upper:
        """The same for some of the rows."""
        past = tuple((k[rows], v[rows]) for k, v in self.past)
        return _Upper(
            self.model, self.chunk.select(rows), self.layer, self.index, self.inside, self.hidden[rows], past,
            self.tupled,
        )  # fmt: skip

    def logits(self, change: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` at (rows, columns), int64 `[N]`; `change` `[B, d]` is added at the subject."""

        def add(value: torch.Tensor) -> torch.Tensor:
            whole = value.view(len(change), -1, value.shape[-1])
            first = (whole[:, 0] + change).to(value.dtype)
            return torch.cat([first[:, None], whole[:, 1:]], 1).view(value.shape)

        hidden = self.hidden if self.inside else add(self.hidden)
        changes = {self.inside: add} if self.inside else {}
        cut = self.chunk.cut
        past = DynamicCache()
        if self.past:
            for i in range(self.index):  # skipped blocks, whose entries only tell the mask its length
                past.update(*self.past[0], i)
            for i, pair in enumerate(self.past, self.index):
                past.update(*pair, i)
        with (
            replay(self.model, self.layer, hidden, tupled=self.tupled),
            replace(self.model, changes),
            _head_on(self.model, lambda h: h[rows, columns][None]),
        ):
            out = self.model(
                input_ids=self.chunk.ids[:, cut:],
                attention_mask=self.chunk.mask,
                position_ids=self.chunk.positions[:, cut:],
                past_key_values=past,
                use_cache=True,
            )
        return out.logits[0]


@contextlib.contextmanager
def _head_on(model: PreTrainedModel, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Apply the output embedding to `pick(hidden states)` only: logits are the dearest tensor of all."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if name is None:
        raise BadInput(
            "model", type(model).__name__, "has no output embedding", "give a causal language model"
        )
    with replace(model, {name: pick}, inputs=True):
        yield


@torch.no_grad()
def _upper(
    model: PreTrainedModel,
    chunk: Chunk,
    site: Site,
    entered: torch.Tensor,
    outs: dict[str, torch.Tensor],
    above: bool,
) -> _Upper:
    """Cache what every step shares.

    `entered` is the input of the site's block, `outs` its outputs; `above`: values are added to the block's output.
    """
    blocks = decoder_layers(model)
    tupled = site.block in outs.tuples  # type: ignore[attr-defined]
    index = site.index + above
    hidden, cut = outs[site.block] if above else entered, chunk.cut
    past: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    if cut:
        cache = DynamicCache()
        with (
            replay(model, blocks[index], hidden[:, :cut], tupled=tupled),
            _head_on(model, lambda h: h[:1, :1]),
        ):
            model(
                input_ids=chunk.ids[:, :cut],
                attention_mask=chunk.mask[:, :cut],
                position_ids=chunk.positions[:, :cut],
                past_key_values=cache,
                use_cache=True,
            )
        past = tuple((layer.keys, layer.values) for layer in cache.layers[index:])
    inside = None if above else site.module
    return _Upper(model, chunk, blocks[index], index, inside, hidden[:, cut:], past, tupled)


@torch.no_grad()
def _additive(
    model: PreTrainedModel, chunk: Chunk, site: Site, entered: torch.Tensor, outs: dict[str, torch.Tensor]
) -> bool:
    """Whether what is added to the down-projection's output is added to the block's output: tried on one row.

    It is not where the MLP's output is normalised or scaled (gemma3, olmo2, granite).
    """
    row = chunk.select(torch.tensor([len(chunk.ids) - 1], device=chunk.ids.device))
    made = outs[site.module][-1]
    probe = min(_PROBE, 0.25 * torch.finfo(made.dtype).max / max(1.0, float(made.abs().max())))
    with (
        replay(model, site.block, entered[-1:], tupled=site.block in outs.tuples),  # type: ignore[attr-defined]
        replace(model, {site.module: lambda value: (1 + probe) * value}),
        capture(model, site.block, stop=True) as seen,
    ):
        seen.run(**row.inputs(), use_cache=False)
    change = (seen[site.block] - outs[site.block][-1:])[0, chunk.cut].float()
    wanted = probe * made[chunk.cut].float()
    return bool((change - wanted).norm() <= 0.05 * wanted.norm())


class _Task:
    """Minimises each unit's loss over its own row of `delta`; a finished unit leaves the batch."""

    def __init__(
        self,
        upper: _Upper,
        rows: Sequence[Row],
        owner: Sequence[int],
        norms: torch.Tensor,
        width: int,
        how: Objective,
    ):
        self.upper, self.norms, self.how = upper, norms, how
        self.delta = norms.new_zeros(len(norms), width).requires_grad_()
        self.kept = torch.zeros_like(self.delta, requires_grad=False)
        self.active = torch.ones_like(norms, dtype=torch.bool)
        self.losses = torch.zeros_like(norms)
        self.steps = torch.zeros_like(norms, dtype=torch.long)
        self.before: torch.Tensor | None = None
        # One line per scored position: row, column from the subject on, gold token (-1 for the KL), unit.
        table, shares = [], []
        contexts = Counter(owner)  # the KL row included
        for number, (row, unit) in enumerate(zip(rows, owner, strict=True)):
            if not row.answer:
                table.append((number, 0, -1, unit))
                shares.append(0.0)
            first = len(row.ids) - len(row.answer) - row.position
            for k, token in enumerate(row.answer):
                table.append((number, first + k, token, unit))
                shares.append(1 / (len(row.answer) * (contexts[unit] - 1)))
        self.table = torch.tensor(table, device=norms.device)
        self.shares = torch.tensor(shares, dtype=norms.dtype, device=norms.device)

    def minimise(self) -> None:
        optimise(
            self.delta,
            self.loss,
            lr=self.how.lr,
            steps=self.how.steps,
            stop_below=self.how.stop_below or None,
            after_step=self.limit,
        )

    def loss(self) -> torch.Tensor:
        """Sum over the unfinished units; 0 when there is none, which ends the search."""
        per_unit = self.per_unit()
        values = per_unit.detach()
        self.losses = torch.where(self.active, values, self.losses)
        finished = self.active & (values < self.how.stop_below)
        if bool(finished.any()):
            self.kept = torch.where(finished[:, None], self.delta.detach(), self.kept)
            self.active = self.active & ~finished
            total = per_unit[self.active].sum()
            self.shrink()
            return total
        return per_unit[self.active].sum()

    def per_unit(self) -> torch.Tensor:
        """Loss of each unit, `[U]`; 0 for those that left the batch."""
        row, column, gold, unit = self.table.unbind(1)
        logits = self.upper.logits(self.delta[self.upper.chunk.owner], row, column).to(self.norms.dtype)
        scored = gold >= 0
        nll = cross_entropy(logits[scored], gold[scored], reduction="none") * self.shares[scored]
        now = log_softmax(logits[~scored], -1)
        if self.before is None:  # delta is still 0: these are the unedited model's predictions
            self.before = now.detach()
        old = self.before[unit[~scored]]
        decay = self.delta[unit[~scored]].norm(dim=1) / self.norms[unit[~scored]].square()
        total = torch.zeros_like(self.norms).index_add(0, unit[scored], nll)
        return total.index_add(
            0, unit[~scored], self.how.kl_factor * self.how.drift(old, now) + self.how.weight_decay * decay
        )

    def shrink(self) -> None:
        """Take the finished units' rows out of the batch."""
        if not bool(self.active.any()):
            return
        stays = self.active[self.upper.chunk.owner]
        number = stays.cumsum(0) - 1
        lines = stays[self.table[:, 0]]
        self.table, self.shares = self.table[lines].clone(), self.shares[lines]
        self.table[:, 0] = number[self.table[:, 0]]
        self.upper = self.upper.select(stays.nonzero()[:, 0])

    def limit(self) -> None:
        """After an update: clamp, and put finished units back to where they ended."""
        self.steps += self.active
        room = (
            self.how.clamp * self.norms / self.delta.norm(dim=1).clamp_min(torch.finfo(self.delta.dtype).tiny)
        )
        self.delta.mul_(room.clamp_max(1.0)[:, None])
        self.delta.copy_(torch.where(self.active[:, None], self.delta, self.kept))
