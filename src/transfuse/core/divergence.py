"""Divergences between two next-token distributions, from logits: masked, tempered, chunked over tokens.

Logits of any float dtype are taken to float32 (float64 stays) a chunk of tokens at a time, and recomputed in
the backward pass, so beside the two logit tensors and their gradients only one chunk exists at any moment.
A probability of zero (a logit of -inf) contributes 0 log 0 = 0. Where q is zero and p is not, KL(p || q) is infinite
by its formula; here such a q counts as the smallest normal number of its dtype (1.2e-38 in float32, log -87.3; 2.2e-308
in float64, log -708.4), which takes no gradient: values stay finite and non-negative, and slopes are those of p and of
the tokens that q allows. Values are in nats and are not multiplied by the squared temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import BadInput, IncompatibleModels

__all__ = [
    "adaptive_terms",
    "decoupled_terms",
    "floored",
    "forward_kl",
    "jsd",
    "jsd_terms",
    "kl_terms",
    "mixture",
    "reverse_kl",
    "skew_terms",
    "tokenwise",
    "variation_terms",
]

Reduction = Literal["mean", "sum", "none"]
_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits


def _bounded(log_p: Tensor) -> bool:
    """Whether no probability is known to be zero: then the passes that guard against it can be left out.

    Looked up on CPU only, where a look costs less than they do; on a GPU it would wait for the device.
    """
    if log_p.device.type != "cpu" or torch.compiler.is_compiling() or not log_p.numel():
        return False
    return bool(log_p.detach().min() > -torch.inf)


def floored(log_q: Tensor) -> Tensor:
    """Log-probabilities with the log of their dtype's smallest normal number, without gradient, in place of -inf."""
    return log_q.masked_fill(log_q == -torch.inf, math.log(torch.finfo(log_q.dtype).tiny))


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis from log-probabilities `[..., V]`; 0 log 0 = 0; log q is `floored`."""
    p = log_p.exp()
    if _bounded(log_p) and _bounded(log_q):
        return (p * (log_p - log_q)).sum(-1)
    absent = p == 0  # also where it is too small for its dtype
    return (p * (log_p.masked_fill(absent, 0.0) - floored(log_q))).sum(-1)


def check_share(name: str, value: float, remedy: str = "give such a number") -> None:
    """Refuse what is not strictly between 0 and 1.

    Raises:
        BadInput: it is not.
    """
    if not 0.0 < value < 1.0:
        raise BadInput(name, value, "is not strictly between 0 and 1", remedy)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) from log-probabilities; -inf where both are."""
    if _bounded(log_p) or _bounded(log_q):
        return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp has no gradient there
    mixed = torch.logaddexp(
        log_p.masked_fill(nowhere, 0.0) + math.log(share),
        log_q.masked_fill(nowhere, 0.0) + math.log1p(-share),
    )
    return mixed.masked_fill(nowhere, -torch.inf)


def jsd_terms(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Generalised JSD of `[..., V]` log-probabilities (see `jsd`), q the student's, p the teacher's."""
    log_m = mixture(log_p, log_q, beta)
    return beta * kl_terms(log_p, log_m) + (1.0 - beta) * kl_terms(log_q, log_m)


def skew_terms(log_q: Tensor, log_p: Tensor, alpha: float, *, reverse: bool = False) -> Tensor:
    """Skew KL (DistiLLM, arXiv 2402.03898): KL(p || alpha p + (1 - alpha) q); gradients pass the mixture too.

    Reversed: KL(q || (1 - alpha) p + alpha q). Finite where one of the two is zero.
    """
    if reverse:
        return kl_terms(log_q, mixture(log_p, log_q, 1.0 - alpha))
    return kl_terms(log_p, mixture(log_p, log_q, alpha))


def variation_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Total variation distance, 0.5 sum |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def adaptive_terms(log_q: Tensor, log_p: Tensor, mu: float = 0.5) -> Tensor:
    """Adaptive KL (AKL, arXiv 2404.02657): forward and reverse KL weighted by the gaps on the head and the tail.

    The head holds the tokens whose cumulative teacher probability, summed from the least likely up, reaches mu. The
    weights take no gradient.
    """
    p = log_p.exp()
    with torch.no_grad():
        ascending, order = p.sort(dim=-1)
        head = torch.zeros_like(p).scatter(-1, order, (ascending.cumsum(-1) >= mu).to(p.dtype))
        gaps = (p - log_q.exp()).abs()
        high, low = (gaps * head).sum(-1), (gaps * (1.0 - head)).sum(-1)
        share = torch.where(high + low > 0, high / (high + low).clamp_min(1e-30), 0.5)
    return share * kl_terms(log_p, log_q) + (1.0 - share) * kl_terms(log_q, log_p)


def decoupled_terms(
    log_q: Tensor, log_p: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Decoupled KD (DKD, arXiv 2203.08679): alpha KL(target against the rest) + beta KL over the other classes.

    Args:
        log_q: The student's log-probabilities `[n, V]`.
        log_p: The teacher's.
        labels: Target classes, int64 `[n]`.
        alpha: Weight of the binary part.
        beta: Weight of the part over the V - 1 others, each renormalised.
    """
    target = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), True)
    parts = []
    for each in (log_q, log_p):
        others = each.masked_fill(target, -torch.inf)
        alone = others.amax(-1, keepdim=True) == -torch.inf  # logsumexp has no gradient there
        rest = torch.logsumexp(others.masked_fill(alone, 0.0), -1, keepdim=True)
        rest = rest.masked_fill(alone, -torch.inf)
        binary = torch.cat([each.gather(-1, labels.unsqueeze(-1)), rest], -1)
        parts.append((binary, torch.where(rest > -torch.inf, others - rest, others)))
    (binary_q, others_q), (binary_p, others_p) = parts
    return alpha * kl_terms(binary_p, binary_q) + beta * kl_terms(others_p, others_q)


def tokenwise(
    terms: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Reduce `terms(student log-probabilities, teacher log-probabilities)` over the tokens that count.

    Args:
        terms: From two log-probability tensors `[n, V]` to `[n]`.
        student: Logits `[..., V]`, any float dtype.
        teacher: Logits of the same shape; detach them unless gradients are wanted.
        mask: `[...]`, bool or 0/1: which tokens count. The others may hold anything, NaN included.
        temperature: Divides both logits.
        reduction: "mean" over the tokens that count (0 when there is none), their "sum", or "none": `[...]`
            with 0 where masked.

    Returns:
        A scalar, or `[...]`, in float32 (float64 for float64 logits).

    Raises:
        IncompatibleModels: the shapes differ.
        BadInput: a mask of another shape, a temperature that is not positive, an unknown reduction.
    """
    if student.shape != teacher.shape:
        shapes = (tuple(student.shape), tuple(teacher.shape))
        remedy = "use models with one vocabulary, and equal tokens"
        raise IncompatibleModels("logits", shapes, "differ in shape", remedy)
    if not temperature > 0:
        raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
    if reduction not in ("mean", "sum", "none"):
        raise BadInput("reduction", reduction, "is not known", 'use "mean", "sum" or "none"')
    tokens, width = student.shape[:-1], student.shape[-1]
    if mask is None:
        counts = torch.ones(tokens, dtype=torch.bool, device=student.device)
    elif mask.shape == tokens:
        counts = mask.to(device=student.device, dtype=torch.bool)
    else:
        raise BadInput("mask", tuple(mask.shape), f"is not {tuple(tokens)}", "give one entry per token")

    def piece(ours: Tensor, theirs: Tensor, keep: Tensor) -> Tensor:
        dtype = torch.promote_types(ours.dtype, torch.float32)
        dropped = ~keep.unsqueeze(-1)
        log_q, log_p = (
            torch.log_softmax(x.to(dtype).masked_fill(dropped, 0.0) / temperature, dim=-1)
            for x in (ours, theirs)
        )
        return terms(log_q, log_p).masked_fill(~keep, 0.0)

    rows = max(1, _CHUNK_BYTES // (4 * width))
    # `split` hands its gradient back in one piece; slicing would allocate a full-size one for every chunk.
    pieces = zip(student.reshape(-1, width).split(rows), teacher.reshape(-1, width).split(rows),
                 counts.reshape(-1).split(rows), strict=True)  # fmt: skip
    if len(counts.reshape(-1)) <= rows:  # one chunk: nothing is saved by making it twice
        values = torch.cat([piece(*three) for three in pieces])
    else:
        values = torch.cat([checkpoint(piece, *three, use_reentrant=False) for three in pieces])
    if reduction == "none":
        return values.reshape(tokens)
    total = values.sum()
    return total if reduction == "sum" else total / counts.sum().clamp(min=1)


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher || student): the student must cover all that the teacher holds possible.

    Finite where it does not: see the module's text. Arguments, result and errors as in `tokenwise`.
    """
    return tokenwise(
        lambda log_q, log_p: kl_terms(log_p, log_q),
        student, teacher, mask=mask, temperature=temperature, reduction=reduction,
    )  # fmt: skip


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(student || teacher): the student must stay where the teacher is.

    Finite where it does not: see the module's text. Arguments, result and errors as in `tokenwise`.
    """
    return tokenwise(kl_terms, student, teacher, mask=mask, temperature=temperature, reduction=reduction)


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649, eq. 1), p the teacher, q the student.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Bounded by the entropy of
    (beta, 1 - beta), also where one distribution is zero. Divided by beta it tends to the forward KL for
    beta -> 0, divided by 1 - beta to the reverse KL for beta -> 1.

    Args:
        student: Logits `[..., V]`.
        teacher: Logits of the same shape.
        beta: Weight of the teacher, strictly between 0 and 1.
        mask: As in `tokenwise`, like the rest.
        temperature: Divides both logits.
        reduction: "mean", "sum" or "none".
    """
    check_share("beta", beta, "use forward_kl or reverse_kl at the ends")
    return tokenwise(
        lambda log_q, log_p: jsd_terms(log_q, log_p, beta),
        student, teacher, mask=mask, temperature=temperature, reduction=reduction,
    )  # fmt: skip
