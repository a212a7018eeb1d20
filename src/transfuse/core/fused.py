"""A language model's head and a loss per token in one: logits exist for a chunk of tokens at a time.

The value and the exact gradients with respect to hidden states and head are computed together, chunk by chunk,
in the forward pass; the backward pass only scales them. Whatever the batch, memory holds the logits of one
chunk, one float32 gradient of the head, and one gradient of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput, IncompatibleModels

__all__ = ["Head", "fused_sums", "head_of"]

_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits
_LEAST_ROWS = 64  # below this the products with the head are slow whatever the vocabulary

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
        """Float32 logits (float64 for float64) from the product."""
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` `[..., D]`, on its device."""
        return self.finish(self.product(hidden)).to(hidden.device)


def head_of(model: Any) -> Head | None:
    """The head of a causal language model, or None where its logits are made in a way not known here.

    The model is run once on a few tokens, and its logits are compared with the head's.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", None)
    if not isinstance(layer, nn.Linear) or body is None or body is model:
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    head = Head(layer.weight, layer.bias, softcap, scale)
    ids = torch.arange(1, 5, device=layer.weight.device).unsqueeze(0) % layer.weight.shape[0]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            ours = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        for module, mode in modes:
            module.training = mode
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
    rows = max(_LEAST_ROWS, chunk_bytes // (4 * head.vocabulary))
    plan = _Plan(terms, head, teacher, columns, rows)
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

    def names(self, hidden: Tensor) -> tuple[str, ...]:
        """What `terms` returns, "loss" first; asked of it with no token."""
        with torch.no_grad():
            found = self.terms(*self.inputs(hidden, slice(0, 0)), **self.cut(slice(0, 0)))
        return ("loss", *(name for name in found if name != "loss"))

    def cut(self, rows: slice) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self.columns.items()}

    def reference(self, rows: slice) -> Tensor | None:
        """The teacher's logits of a chunk."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, tuple):
            return self.teacher[1](self.teacher[0][rows].detach())
        logits = self.teacher[rows].detach()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def inputs(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.head(hidden[rows]), self.reference(rows)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, names: tuple[str, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        _, _, on_hidden, on_weight, on_bias = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if on_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if on_weight else None
        d_bias = (
            torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and on_bias else None
        )
        sums = torch.zeros(len(names), dtype=wide, device=hidden.device)
        vocabulary = plan.head.vocabulary

        def piece(product: Tensor, reference: Tensor | None, cut: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = plan.terms(plan.head.finish(product), reference, **cut)
            totals = [found[name].sum().to(wide) for name in names]
            return totals[0], torch.stack([total.detach() for total in totals])

        differentiate = torch.func.grad_and_value(piece, has_aux=True)
        for start in range(0, len(hidden), plan.rows):
            chunk = slice(start, min(start + plan.rows, len(hidden)))
            reference, cut = plan.reference(chunk), plan.cut(chunk)
            states = hidden[chunk].to(weight.dtype)
            product = plan.head.product(states)
            if not (on_hidden or on_weight or on_bias):
                sums += piece(product, reference, cut)[1]
                continue
            slope, (_, totals) = differentiate(product, reference, cut)
            del product, reference
            sums += totals
            if d_hidden is not None:
                d_hidden[chunk] = (slope @ weight[:vocabulary]).to(hidden.dtype)
            if d_weight is not None:
                d_weight[:vocabulary] += slope.T @ states
            if d_bias is not None:
                d_bias[:vocabulary] += slope.sum(0, dtype=wide)
        ctx.gradients = [
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]
        values = sums.unbind()
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are as large as the head
        if gradients is None:
            raise RuntimeError("fused_sums can be differentiated once only")
        return (None, None, *(None if g is None else g.mul_(slopes[0].to(g.dtype)) for g in gradients))
