"""A language model's head and a loss per token in one: logits exist for a chunk of tokens at a time.

The value and the exact gradients with respect to hidden states and head are computed together, chunk by chunk,
in the forward pass; the backward pass only scales them. Whatever the batch, memory holds the logits of one
chunk (in the head's dtype; float32 copies of a few rows of it), one gradient of the head, one of the states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import BadInput, IncompatibleModels
from .runs import evaluating

__all__ = ["Head", "fused_sums", "head_of"]

_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits
_LEAST_ROWS = {
    "cpu": 256,
    "cuda": 32,
}  # below this the products with the head are slow whatever the vocabulary
_CACHE_BYTES = (
    2**20
)  # on a CPU, the terms of so many bytes of logits are made at a time: they stay in its cache

Terms = Callable[..., Mapping[str, Tensor]]
"""`terms(student logits [n, V], teacher logits [n, V] or None, **columns)` -> {"loss": [n], ...}."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        softcap: Logits become softcap * tanh(logits / softcap) (Gemma 2), or None.
        scale: Factor on the logits (Cohere, Granite).
        rows: Keep the first `rows` entries of the vocabulary only, or None for all.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    rows: int | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.weight.shape[0] if self.rows is None else self.rows

    def product(self, hidden: Tensor) -> Tensor:
        """The matrix product alone, `[n, D]` to `[n, V]`, in the weight's dtype and on its device."""
        weight, bias = self.weight[: self.vocabulary], self.bias
        return nn.functional.linear(
            hidden.to(weight), weight, None if bias is None else bias[: self.vocabulary]
        )

    def finish(self, product: Tensor) -> Tensor:
        """Logits from the product, see `finished`."""
        return finished(product, self.softcap, self.scale)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` `[..., D]`, on its device."""
        return self.finish(self.product(hidden)).to(hidden.device)


def finished(product: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Float32 logits (float64 for float64) from the product of hidden states with a head's weight."""
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def head_of(model: Any) -> Head | None:
    """The head of a causal language model, or None where its logits are made in a way not known here.

    The model is run once on a few tokens, and its logits are compared with the head's.

    Args:
        model: A transformers model or a PEFT model around one.
    """
    if hasattr(model, "get_base_model"):  # PEFT's own `base_model` is its tuner
        model = model.get_base_model()
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", None)
    if (
        not isinstance(layer, nn.Linear)
        or body is None
        or body is model
        or hasattr(layer, "parametrizations")
    ):
        return None  # a parametrized weight is another tensor at every call
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    head = Head(layer.weight, layer.bias, softcap, scale)
    ids = torch.arange(1, 5, device=layer.weight.device).unsqueeze(0) % layer.weight.shape[0]
    with evaluating(model), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        ours = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    coarse = whole.dtype in (torch.bfloat16, torch.float16)
    close = torch.allclose(ours, whole.to(ours.dtype), atol=1e-4, rtol=2e-2 if coarse else 1e-4)
    return head if close else None


def fused_sums(
    terms: Terms,
    hidden: Tensor,
    head: Head,
    *,
    teacher: tuple[Tensor, Head] | Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
    compile: bool = False,
) -> dict[str, Tensor]:
    """Sums over tokens of what `terms` gives, with exact gradients of the sum of `"loss"`.

    Args:
        terms: From float32 logits `[n, V]` of student and teacher (None without one) and the columns' rows, to
            `{"loss": [n], other figures: [n]}`. Called once per chunk; must treat tokens independently.
        hidden: The student's states before its head, `[N, D]`: only tokens that count.
        head: The student's head; gradients reach its weight and bias where they require one.
        teacher: The teacher's states `[N, D']` and head, or its logits `[N, V]`; no gradient reaches them.
        columns: Tensors `[N, ...]` cut along with the tokens and handed to `terms` by name.
        chunk_bytes: Most bytes of one float32 copy of a chunk's logits.
        compile: Pass a chunk's loss and slope through `torch.compile`; kept as long as `terms` is the same object.

    Returns:
        Float32 scalars by name (float64 for float64 states); `"loss"` can be differentiated once.

    Raises:
        BadInput: rows of a column or of the teacher do not match `hidden`.
        IncompatibleModels: the vocabularies differ.
    """
    columns = dict(columns or {})
    states = teacher[0] if isinstance(teacher, tuple) else teacher
    for name, column in {"teacher": states, **columns}.items():
        if column is not None and len(column) != len(hidden):
            raise BadInput(
                name, len(column), f"does not match {len(hidden)} tokens", "give one row per token"
            )
    if teacher is not None:
        theirs = teacher[1].vocabulary if isinstance(teacher, tuple) else teacher.shape[-1]
        if theirs != head.vocabulary:
            raise IncompatibleModels(
                "teacher", theirs, f"entries of vocabulary, the student has {head.vocabulary}",
                'use one tokenizer; align_vocab="truncate" where only padding rows differ',
            )  # fmt: skip
    rows = max(_LEAST_ROWS.get(hidden.device.type, 32), chunk_bytes // (4 * head.vocabulary))
    inner = max(1, _CACHE_BYTES // (4 * head.vocabulary)) if hidden.device.type == "cpu" else rows
    plan = _Plan(terms, head, teacher, columns, rows, inner, compile)
    names = plan.names(hidden)
    values = _Fused.apply(plan, names, hidden, head.weight, head.bias)
    return dict(zip(names, values, strict=True))


@dataclass
class _Plan:
    terms: Terms
    head: Head
    teacher: tuple[Tensor, Head] | Tensor | None
    columns: dict[str, Tensor]
    rows: int
    inner: int
    compile: bool

    def names(self, hidden: Tensor) -> tuple[str, ...]:
        """What `terms` returns, "loss" first; asked of it with no token."""
        none = slice(0, 0)
        with torch.no_grad():
            theirs = self.reference(self.products(none), none, hidden.device)
            cut = {name: column[none] for name, column in self.columns.items()}
            found = self.terms(self.head(hidden[none]), theirs, **cut)
        return ("loss", *(name for name in found if name != "loss"))

    def products(self, chunk: slice) -> Tensor | None:
        """The teacher's logits of a chunk, or the product they are made from."""
        if isinstance(self.teacher, tuple):
            return self.teacher[1].product(self.teacher[0][chunk].detach())
        return None if self.teacher is None else self.teacher[chunk].detach()

    def reference(self, products: Tensor | None, few: slice, device: torch.device) -> Tensor | None:
        """The teacher's logits of some rows of a chunk."""
        if products is None:
            return None
        head = self.teacher[1] if isinstance(self.teacher, tuple) else None
        softcap, scale = (None, 1.0) if head is None else (head.softcap, head.scale)
        return finished(products[few], softcap, scale).to(device)


@dataclass(frozen=True)
class _Piece:
    """A chunk's summed terms, from the product of its states with the head."""

    terms: Terms
    names: tuple[str, ...]
    softcap: float | None
    scale: float

    def __call__(
        self, product: Tensor, reference: Tensor | None, columns: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        found = self.terms(finished(product, self.softcap, self.scale), reference, **columns)
        totals = [
            found[name].sum().to(torch.promote_types(product.dtype, torch.float32)) for name in self.names
        ]
        return totals[0], torch.stack([total.detach() for total in totals])

    def slope(
        self, product: Tensor, reference: Tensor | None, columns: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The gradient of the first sum by the product, and all sums."""
        found: Any = torch.func.grad_and_value(self, has_aux=True)(product, reference, columns)
        return found


@functools.lru_cache(maxsize=32)
def _compiled(piece: _Piece) -> Callable[..., Any]:
    return torch.compile(piece.slope, dynamic=True)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, names: tuple[str, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        _, _, on_hidden, on_weight, on_bias = ctx.needs_input_grad
        wanted = on_hidden or on_weight or on_bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if on_hidden else None
        d_weight: Tensor | None = None
        d_bias = None if bias is None or not on_bias else torch.zeros_like(bias, dtype=wide)
        sums = torch.zeros(len(names), dtype=wide, device=hidden.device)
        piece = _Piece(plan.terms, names, plan.head.softcap, plan.head.scale)
        slope_of = _compiled(piece) if plan.compile else piece.slope
        kept = weight[: plan.head.vocabulary]
        several = len(hidden) > plan.rows
        for start in range(0, max(len(hidden), 1), plan.rows):
            chunk = slice(start, min(start + plan.rows, len(hidden)))
            states = hidden[chunk].to(weight.dtype)
            product, theirs = plan.head.product(states), plan.products(chunk)
            for first in range(0, len(product), plan.inner):
                few = slice(first, first + plan.inner)
                reference = plan.reference(theirs, few, hidden.device)
                cut = {name: column[chunk][few] for name, column in plan.columns.items()}
                if wanted:
                    slope, (_, totals) = slope_of(product[few], reference, cut)
                    product[few] = slope  # the product's memory is not needed again
                else:
                    _, totals = piece(product[few], reference, cut)
                sums += totals
            if d_hidden is not None:
                d_hidden[chunk] = (product @ kept).to(hidden.dtype)
            if d_bias is not None:
                d_bias[: len(kept)] += product.sum(0, dtype=wide)
            if on_weight:
                part = product.T @ states
                if d_weight is None:  # one chunk needs no wider sum
                    d_weight = part.to(wide) if several else part
                else:
                    d_weight += part
        if d_weight is not None:
            if weight.dtype != torch.float16:  # whose range is too small for a sum over tokens
                d_weight = d_weight.to(weight.dtype)
            if len(kept) < len(weight):
                d_weight = nn.functional.pad(d_weight, (0, 0, 0, len(weight) - len(kept)))
        ctx.gradients, ctx.dtype = [d_hidden, d_weight, d_bias], weight.dtype
        values = sums.unbind()
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable  # to a second derivative the first ones would look constant
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are as large as the head
        if gradients is None:
            raise RuntimeError("fused_sums can be differentiated once only")
        on_hidden, *on_head = (None if g is None else g.mul_(slopes[0].to(g.dtype)) for g in gradients)
        return (None, None, on_hidden, *(None if g is None else g.to(ctx.dtype) for g in on_head))
