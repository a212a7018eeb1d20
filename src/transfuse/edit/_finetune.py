"""Fine-tuning of one MLP down-projection on a few facts: what FT-L and FT-M have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.generate import pad_batch, pad_id_of
from ..core.taps import capture, replay
from ..core.training import optimise
from ._base import Editor, WeightEdit, check_facts, editable
from ._layers import block_name, check_number, depth, down_projection, encode_facts, still

__all__ = ["FineTune", "box"]

LLAMA_DEPTH = 21 / 32  # the study edits block 21 of Llama-2-7B's 32


class Cached(NamedTuple):
    """One mini-batch with the hidden states that enter the edited block.

    Attributes:
        inputs: Arguments of the model, left-padded.
        hidden: Input of the edited block, `[B, T, width]`.
        tupled: The model's blocks return tuples.
        targets: Target ids of each row.
    """

    inputs: dict[str, Any]
    hidden: torch.Tensor
    tupled: bool
    targets: list[list[int]]


class FineTune(Editor):
    """Adam on one down-projection. Subclasses say what the model reads and what the loss is.

    Args:
        layer: Block to edit; None takes the block at 21/32 of the depth.
        module: Name of the weight's module inside the block; None takes the MLP's down-projection.
        lr: Adam's learning rate.
        steps: Passes over the facts.
        stop_below: No update for a mini-batch whose loss (nats per token) is below this; all below: done.
        batch_size: Facts per update.
    """

    reads_target: bool

    def __init__(
        self,
        *,
        layer: int | None,
        module: str | None,
        lr: float,
        steps: int,
        stop_below: float,
        batch_size: int,
    ):  # the defaults are with the methods
        self.layer, self.module, self.lr, self.steps = layer, module, lr, steps
        self.stop_below, self.batch_size = stop_below, batch_size

    @abstractmethod
    def loss(self, logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scalar loss of a mini-batch, from logits `[B, n, V]` that end at the last position read."""

    def bounds(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Least and greatest value of each entry after an update, or None for no limit."""
        return None

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        check_facts(facts)
        check_number("lr", self.lr, least=0, above=True)
        check_number("steps", self.steps, least=0, whole=True)
        check_number("stop_below", self.stop_below, least=0)
        check_number("batch_size", self.batch_size, least=1, whole=True)
        layer = depth(model, self.layer, LLAMA_DEPTH)
        editable(model, down_projection(model, layer, self.module) + ".weight")
        encode_facts(model, tokenizer, facts)

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> WeightEdit:
        self.check(model, tokenizer, facts)
        layer = depth(model, self.layer, LLAMA_DEPTH)
        name = down_projection(model, layer, self.module) + ".weight"
        weight = editable(model, name).detach()
        # Steps of lr are lost in bf16's rounding: the sum of updates is kept in float32, and the model runs on
        # its rounded value, which is also what is installed.
        master = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
        limits = self.bounds(weight)

        def clamp() -> None:
            assert limits is not None
            master.copy_(torch.minimum(torch.maximum(master, limits[0]), limits[1]))

        with still(model):
            block = block_name(model, layer)
            batches = self._cache(model, tokenizer, facts, block)
            turn = iter(range(self.steps * len(batches)))

            def closure() -> torch.Tensor:
                batch = batches[next(turn) % len(batches)]
                with replay(model, block, batch.hidden, tupled=batch.tupled):
                    out = functional_call(model, {name: master.to(weight.dtype)}, kwargs=batch.inputs)
                return self.loss(out.logits, batch.targets)

            optimise(
                master,
                closure,
                lr=self.lr,
                steps=self.steps * len(batches),
                stop_below=self.stop_below,
                patience=len(batches),
                after_step=None if limits is None else clamp,
            )
        return WeightEdit(replaced={name: master.detach().to(weight.dtype)})

    def _cache(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], block: str
    ) -> list[Cached]:
        """Run the blocks below the edited one, once for each mini-batch."""
        pairs = encode_facts(model, tokenizer, facts)
        cached = []
        for start in range(0, len(pairs), self.batch_size):
            chosen = pairs[start : start + self.batch_size]
            rows = [p + t[:-1] if self.reads_target else p for p, t in chosen]
            ids, mask = pad_batch(rows, pad_id_of(tokenizer), side="left", device=model.device)
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
                "use_cache": False,
                "logits_to_keep": max(len(t) for _, t in chosen) if self.reads_target else 1,
            }
            with (
                torch.no_grad(),
                capture(model, block_name(model, 0)) as lowest,
                capture(model, block, inputs=True, stop=True) as seen,
            ):
                seen.run(**inputs)
            cached.append(Cached(inputs, seen[block], bool(lowest.tuples), [t for _, t in chosen]))
        return cached


def box(weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds `(low, high)` of |W - W0|_inf <= eps that still hold after rounding to the weight's own dtype.

    Both are representable in `weight.dtype`, and rounding is monotonic: a float32 value clamped between them is
    also between them once rounded. Their dtype is float32 (float64 for float64 weights).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)

    def edge(sign: float, away: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        value = (weight.double() + sign * eps).to(weight.dtype)
        outside = sign * (value.double() - weight.double()) > eps
        return torch.where(outside, away(value), value).to(wide)

    low = edge(-1.0, lambda value: _step(value, up=True))
    return low, edge(1.0, lambda value: _step(value, up=False))


def _step(value: torch.Tensor, *, up: bool) -> torch.Tensor:
    """The neighbouring representable number."""
    if value.dtype != torch.float16:
        return torch.nextafter(value, torch.full_like(value, torch.inf if up else -torch.inf))
    # torch has no nextafter for float16: neighbours differ by one in the bits, sign and magnitude.
    bits = value.view(torch.int16)
    grows = (value > 0) == up
    moved = torch.where(grows, bits + 1, bits - 1).view(torch.float16)
    tiny = torch.finfo(torch.float16).smallest_normal / 1024
    return torch.where(value == 0, torch.full_like(value, tiny if up else -tiny), moved)
