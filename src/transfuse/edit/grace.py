"""GRACE: a codebook beside one layer that answers where its keys are met.

:arxiv: 2211.11031
:moves: one fact -> one key and one value beside the weights
:access: hidden
:reversible: yes
:context: no

No weight changes. Beside one down-projection stands a codebook of keys h_i (the layer's input at the last token of an
edited prompt), values v_i (trained as the layer's output there) and radii eps_i. A new edit whose key lies at
distance D from the nearest key i

- makes a new entry of radius eps when D > eps + eps_i;
- with the same target, widens that entry: eps_i = max(eps_i, D);
- with another target, makes a new entry of radius D/2 and sets eps_i = D/2 - 1e-5.

When the model runs, each token's layer input is compared with the keys. The nearest one at D <= eps_i makes it a key
token: from there on the layer's output is v_i, until another key is met. Since a token's input does not depend on what
follows it, the outcome is the same in teacher forcing, in generation with or without a KV cache, and under any padding,
and nobody has to say where the prompt ends. Inputs that meet no key pass through bitwise unchanged. In half precision
the same prompt gives slightly different inputs from batch to batch (0.3 to 0.6 at norms of 20 to 30 in a 135M model):
`eps` must stay above that.

Where it differs from the study's code: labels are compared as token lists and kept in the order of the keys; several
facts are grown one after another but their values trained side by side, which Adam does not notice; a widened entry is
trained on only if its value does not give the target yet; a second edit of the very same prompt (D = 0, where the
rule would leave a radius of 0) takes the entry over. `replacement` says how far a value reaches: "replace_last" from
the key token on, "replace_key" at the key token only (what their code does), "replace_target" for as many tokens as the
target has, after which the model goes on in its own words.

    with edit(model, tokenizer, facts, method="grace", replacement="replace_target") as handle:
        model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core import taps
from ..core.data import Fact
from ..core.errors import BadInput
from ..core.generate import pad_batch, pad_id_of
from ..core.training import generator, optimise
from ._base import Editor, check_facts
from ._codebook import Codebook, GraceEdit, attached, carry, nearest
from ._layers import block_name, check_number, depth, down_projection, encode_facts, still

__all__ = ["GRACE", "Codebook", "carry", "grow", "nearest"]

LLAMA_DEPTH = 27 / 32  # the study edits block 27 of Llama-2-7B's 32
SPLIT_MARGIN = 1e-5
FOREVER = 2**31
REPLACEMENTS = ("replace_last", "replace_key", "replace_target")


def grow(
    book: Codebook, key: torch.Tensor, label: Sequence[int], *, eps: float, span: int
) -> tuple[Codebook, int, bool]:
    """Make room for one edit.

    Args:
        book: The codebook so far; not changed.
        key: `[m]`, the layer's input at the last prompt token.
        label: The target's token ids.
        eps: Radius of an entry made in free space.
        span: For how many tokens the value is used.

    Returns:
        The new codebook, the entry that serves the edit, and whether that entry's value is yet to be trained
        (it is zero then).
    """
    label = tuple(label)
    if len(book):
        found = nearest(book.keys, key)
        distance, index = float(found[0]), int(found[1])
        if distance <= eps + float(book.radii[index]):
            if label == book.labels[index]:
                radii = book.radii.clone()
                radii[index] = max(float(radii[index]), distance)
                return replace(book, radii=radii), index, False
            if distance == 0:
                values, spans = book.values.clone(), book.spans.clone()
                values[index], spans[index] = 0, span
                labels = (*book.labels[:index], label, *book.labels[index + 1 :])
                return replace(book, values=values, spans=spans, labels=labels), index, True
            radii = book.radii.clone()
            radii[index] = distance / 2 - SPLIT_MARGIN
            return _append(replace(book, radii=radii), key, label, distance / 2, span), len(book), True
    return _append(book, key, label, eps, span), len(book), True


def _append(book: Codebook, key: torch.Tensor, label: tuple[int, ...], radius: float, span: int) -> Codebook:
    return Codebook(
        torch.cat([book.keys, key.detach().float()[None]]),
        torch.cat([book.values, book.values.new_zeros(1, book.values.shape[1])]),
        torch.cat([book.radii, book.radii.new_tensor([radius])]),
        torch.cat([book.spans, book.spans.new_tensor([span])]),
        (*book.labels, label),
    )


class _Case(NamedTuple):
    """One fact as the layer and its block see it.

    Attributes:
        ids: Prompt and target but its last token.
        target: Target token ids.
        hidden: The block's input, `[1, T, width]`.
        tupled: The model's blocks return tuples.
        key: The layer's input at the last prompt token, `[m]`.
        width: d, of the layer's output.
    """

    ids: list[int]
    target: list[int]
    hidden: torch.Tensor
    tupled: bool
    key: torch.Tensor
    width: int


class GRACE(Editor):
    """Editor; see the module.

    Args:
        layer: Block to stand beside; None takes the one at 27/32 of the depth.
        module: Name of the layer inside the block; None takes the MLP's down-projection.
        eps: Radius of a new entry, in the unit of the layer's input.
        lr: Adam's learning rate for values.
        steps: Adam steps per value.
        replacement: How far a value reaches: "replace_last", "replace_key" or "replace_target" (see the module).
        batch_size: Facts whose values are trained side by side.
        seed: Values start uniform on [0, 1): entry i from the draw of `seed + i`.
    """

    def __init__(
        self,
        *,
        layer: int | None = None,
        module: str | None = None,
        eps: float = 1.0,
        lr: float = 1.0,
        steps: int = 50,
        replacement: Literal["replace_last", "replace_key", "replace_target"] = "replace_last",
        batch_size: int = 16,
        seed: int = 0,
    ):
        self.layer, self.module, self.eps, self.lr, self.steps = layer, module, eps, lr, steps
        self.replacement, self.batch_size, self.seed = replacement, batch_size, seed

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Refuse facts, layers and hyperparameters that cannot work."""
        check_facts(facts)
        check_number("eps", self.eps, least=0, above=True)
        check_number("lr", self.lr, least=0, above=True)
        check_number("steps", self.steps, least=0, whole=True)
        check_number("batch_size", self.batch_size, least=1, whole=True)
        check_number("seed", self.seed, least=0, whole=True)
        if self.replacement not in REPLACEMENTS:
            raise BadInput("replacement", self.replacement, "is unknown", f"use {', '.join(REPLACEMENTS)}")
        down_projection(model, depth(model, self.layer, LLAMA_DEPTH), self.module)
        encode_facts(model, tokenizer, facts)

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> GraceEdit:
        """Grow the layer's codebook by these facts, in order, and train the values they need."""
        self.check(model, tokenizer, facts)
        layer = depth(model, self.layer, LLAMA_DEPTH)
        block, module = block_name(model, layer), down_projection(model, layer, self.module)
        pad = pad_id_of(tokenizer)
        with still(model):
            cases = [_observe(model, block, module, *pair) for pair in encode_facts(model, tokenizer, facts)]
            below = attached(model, module)
            old = below[-1].book if below else None
            old = old or Codebook.empty(len(cases[0].key), cases[0].width, device=cases[0].key.device)
            book, served, fresh = old, dict[int, list[_Case]](), set[int]()
            for case in cases:
                span = {"replace_last": FOREVER, "replace_key": 1, "replace_target": len(case.target)}
                book, entry, untrained = grow(
                    book, case.key, case.target, eps=self.eps, span=span[self.replacement]
                )
                served.setdefault(entry, []).append(case)
                fresh |= {entry} if untrained else set()

            def logits(batch: Sequence[_Case], values: torch.Tensor) -> torch.Tensor:
                return _forced(model, block, module, batch, values, pad, self.replacement == "replace_key")

            values = book.values.clone()
            for entry in fresh:
                start = torch.rand(values.shape[1], generator=generator(self.seed + entry))
                values[entry] = start.to(values.device)
            wanting = {
                e: own for e, own in served.items() if e in fresh or not _gives(logits, own, values[e])
            }
            for chunk in _chunks(wanting, self.batch_size):
                values[chunk] = self._train(logits, [served[e] for e in chunk], values[chunk])
            trained = list(wanting)
        return GraceEdit(
            module=module,
            before=len(old),
            touched=trained,
            keys=book.keys[len(old) :].cpu(),
            values=values[trained].cpu(),
            radii=book.radii.cpu(),
            spans=book.spans.cpu(),
            labels=[book.labels[e] for e in trained],
        )

    def _train(self, logits: Logits, groups: Sequence[Sequence[_Case]], start: torch.Tensor) -> torch.Tensor:
        """Values `[n, d]` for n groups of facts; the groups do not see each other, as Adam works by element."""
        values = start.clone().requires_grad_()
        batch = [case for group in groups for case in group]
        row = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=start.device)
        share = [1 / len(group) for group in groups for _ in group]

        def loss() -> torch.Tensor:
            found = logits(batch, values[row]).float()
            losses = [
                weight * F.cross_entropy(each[-len(case.target) :], each.new_tensor(case.target).long())
                for each, case, weight in zip(found, batch, share)
            ]
            return torch.stack(losses).sum()

        optimise(values, loss, lr=self.lr, steps=self.steps)
        return values.detach()


Logits = Callable[[Sequence[_Case], torch.Tensor], torch.Tensor]


def _chunks(served: Mapping[int, Sequence[_Case]], size: int) -> list[list[int]]:
    """Entries in lists of about `size` facts; an entry's facts stay together."""
    chunks: list[list[int]] = []
    room = 0
    for entry, cases in served.items():
        if room < len(cases):
            chunks.append([])
            room = max(size, len(cases))
        chunks[-1].append(entry)
        room -= len(cases)
    return chunks


def _observe(model: PreTrainedModel, block: str, module: str, prompt: list[int], target: list[int]) -> _Case:
    """Run the model up to the layer, on single rows without padding.

    The key is taken from the prompt alone: the same prompt then gives the same key, bitwise, whatever its target.
    """
    key, hidden, width, tupled = _inputs(model, block, module, prompt)
    if len(target) > 1:
        _, hidden, *_ = _inputs(model, block, module, prompt + target[:-1])
    return _Case(prompt + target[:-1], target, hidden, tupled, key, width)


def _inputs(
    model: PreTrainedModel, block: str, module: str, row: list[int]
) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """The layer's input at the last token `[m]`, the block's input `[1, T, width]`, d, whether blocks return tuples."""
    ids = torch.tensor([row], device=model.device)
    with (
        torch.no_grad(),
        taps.capture(model, block_name(model, 0)) as lowest,
        taps.capture(model, [block, module], inputs=True) as into,
        taps.capture(model, module, stop=True) as out,
    ):
        out.run(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    key = into[module].reshape(len(row), -1)[-1].float()
    return key, into[block], out[module].shape[-1], bool(lowest.tuples)


def _forced(
    model: PreTrainedModel,
    block: str,
    module: str,
    batch: Sequence[_Case],
    values: torch.Tensor,
    pad: int,
    key_only: bool,
) -> torch.Tensor:
    """Logits `[B, n, V]` at the last n positions, with `values` `[B, d]` standing from each key token on."""
    ids, mask = pad_batch([case.ids for case in batch], pad, side="left", device=model.device)
    width = ids.shape[1]
    hidden = torch.cat([F.pad(case.hidden, (0, 0, width - case.hidden.shape[1], 0)) for case in batch])
    place = torch.arange(width, device=ids.device)
    key = torch.tensor([[width - len(case.target)] for case in batch], device=ids.device)
    stands = ((place == key) if key_only else (place >= key))[..., None]

    def put(output: torch.Tensor) -> torch.Tensor:
        whole = output.view(len(batch), width, -1)
        return torch.where(stands, values[:, None].to(output.dtype), whole).view(output.shape)

    with taps.replay(model, block, hidden, tupled=batch[0].tupled), taps.replace(model, {module: put}):
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=max(len(case.target) for case in batch),
        ).logits


def _gives(logits: Logits, cases: Sequence[_Case], value: torch.Tensor) -> bool:
    """Whether `value` makes every target token of `cases` the most likely one."""
    with torch.no_grad():
        found = logits(cases, value.expand(len(cases), -1)).argmax(-1).tolist()
    return all(row[-len(case.target) :] == case.target for row, case in zip(found, cases))
