"""A few gradient steps on the key/value cache of a frozen model, so that given tokens become likelier.

The cache is kept in float32 whatever the model's type, so that small steps add up over a text; the model reads
it in its own type. Rows are independent: each has its own objective, and its own norm per layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from transfuse.core.errors import NotApplicable
from transfuse.core.runs import evaluating
from transfuse.core.streams import vocabulary_of
from transfuse.core.taps import contiguous_head

__all__ = ["Deltas", "Infused", "Reading", "Targets", "check_cache", "infuse", "objective"]

_FLOOR = 1e-15

Deltas = list[tuple[Tensor, Tensor]]
"""Per layer what is added to keys and to values, each `[B, heads, T, width]` float32."""


class Targets(NamedTuple):
    """Tokens to make likelier, row by row.

    Attributes:
        ids: `[B, n]` int64, distinct where they count.
        weights: `[B, n]` float, how often each counts; 0 fills rows up, and a row of zeros has no target.
    """

    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Sequence[dict[int, int]], device: torch.device, *, counted: bool) -> Targets:
        """From ids and their counts; without `counted` each id counts once."""
        width = max(1, *map(len, rows))
        ids = [[*row, *[0] * (width - len(row))] for row in rows]
        weights = [
            [*(row.values() if counted else [1] * len(row)), *[0] * (width - len(row))] for row in rows
        ]
        return cls(
            torch.tensor(ids, device=device), torch.tensor(weights, device=device, dtype=torch.float32)
        )

    @property
    def active(self) -> Tensor:
        """`[B]` bool, rows that have a target."""
        return (self.weights > 0).any(1)

    def mass(self, logits: Tensor) -> Tensor:
        """`[B]`, the probability of the targets together, each counted once."""
        return (logits.softmax(-1).gather(1, self.ids) * (self.weights > 0)).sum(1)


class Infused(NamedTuple):
    """One token read twice: over the cache as it was, and over the updated one.

    Attributes:
        plain: `[B, V]` float32, logits before the update.
        logits: `[B, V]` float32, logits after it; equal to `plain` in rows without a target.
        cache: The updated cache with the token appended, in float32.
        deltas: What was added, None where nothing was to be done.
        before: `[B]` float32, the objective before the update; NaN in rows without a target.
        after: `[B]` float32, the objective after it.
    """

    plain: Tensor
    logits: Tensor
    cache: DynamicCache
    deltas: Deltas | None
    before: Tensor
    after: Tensor


def objective(logits: Tensor, plain: Tensor, targets: Targets, *, kl_scale: float = 0.01) -> Tensor:
    """J = -log sum_j w_j p(j) + kl_scale KL(p || q), with p and q the softmax of `logits` and of `plain`.

    Args:
        logits: `[B, V]`, after the update.
        plain: `[B, V]`, before it.
        targets: The tokens j and their weights.
        kl_scale: lambda. Probabilities up to 1e-15 have 1e-15 added in this term.

    Returns:
        `[B]` in nats, at least float32; NaN in rows without a target.
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    log_p, active = logits.to(work).log_softmax(-1), targets.active
    # In rows without a target all weights are set to one: -inf there would turn the others' gradients to NaN.
    weights = torch.where(active[:, None], targets.weights.to(work), 1.0)
    reward = (log_p.gather(1, targets.ids) + weights.log()).logsumexp(1)
    p, q = (x + _FLOOR * (x <= _FLOOR) for x in (log_p.exp(), plain.to(work).softmax(-1)))
    value = kl_scale * (p * (p / q).log()).sum(1) - reward
    return torch.where(active, value, torch.nan)


def check_cache(model: PreTrainedModel, cache: Cache | None = None) -> None:
    """Refuse caches that are not keys and values of attention, one pair per layer.

    Args:
        model: Whose configuration says which cache it builds.
        cache: One that exists already, filled.

    Raises:
        NotApplicable: naming the type.
    """
    kinds: set[str] = set()
    if cache is None:
        config = model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config)
        kinds |= {"shared between layers"} if getattr(config, "num_kv_shared_layers", None) else set()
    elif type(cache) is DynamicCache:
        kinds |= {"shared between layers" for layer in cache.layers if not layer.is_initialized}
    if type(cache) is not DynamicCache:
        kinds.add(type(cache).__name__)
    for layer in getattr(cache, "layers", []):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kinds.add(type(layer).__name__)
    if kinds:
        problem = "is a cache whose keys and values cannot be perturbed layer by layer"
        raise NotApplicable(
            "cache", ", ".join(sorted(kinds)), problem, "use a model of plain attention layers"
        )


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes part in a graph; afterwards all are as they were."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _read(
    model: PreTrainedModel, cache: DynamicCache | None, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, DynamicCache]:
    """Logits `[B, V]` of the last of `ids`, and the cache with them appended; `mask` covers both."""
    accepted = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    total = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    seen = torch.ones_like(ids[:, :1]).expand(-1, total) if mask is None else mask
    kwargs: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if "position_ids" in accepted:
        kwargs["position_ids"] = (seen.cumsum(1) - 1).clamp_min(0)[:, total - ids.shape[1] :]
    if "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = 1
    # Without padding no mask is given, as in transformers' own loop: the plain causal kernels are faster.
    mask = None if bool(seen.all()) else seen
    with evaluating(model):
        output = model(input_ids=ids, attention_mask=mask, **kwargs)
    return output.logits[:, -1, : vocabulary_of(model)], output.past_key_values


def _moved(cache: DynamicCache, deltas: Deltas | None) -> DynamicCache:
    """A copy for the model to read, in the model's type, with the deltas added."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for n, layer in enumerate(made.layers):
        keys, values = layer.keys, layer.values
        if deltas is not None:
            keys, values = keys + deltas[n][0], values + deltas[n][1]
        layer.keys, layer.values = keys.to(layer.dtype), values.to(layer.dtype)
    return made


def _precise(cache: DynamicCache) -> DynamicCache:
    """A copy in float32 (float64 stays); its layers remember the model's type."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        work = torch.promote_types(layer.keys.dtype, torch.float32)
        layer.keys, layer.values = layer.keys.to(work), layer.values.to(work)
    return made


@torch.no_grad()
def _advance(
    model: PreTrainedModel, cache: DynamicCache, deltas: Deltas | None, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, DynamicCache]:
    """Read `ids` over the cache with the deltas added for good."""
    logits, read = _read(model, _moved(cache, deltas), ids, mask)
    read = _precise(read)
    for n, (old, new) in enumerate(zip(cache.layers, read.layers)):
        if new.dtype == old.keys.dtype:
            continue  # nothing was rounded when the model read it
        kept = new.keys.shape[-2]
        for name, delta in zip(("keys", "values"), (None, None) if deltas is None else deltas[n]):
            exact = getattr(old, name) if delta is None else getattr(old, name) + delta
            joined = torch.cat([exact, getattr(new, name)[..., -ids.shape[1] :, :]], dim=-2)
            setattr(new, name, joined[..., joined.shape[-2] - kept :, :])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), read


def infuse(
    model: PreTrainedModel,
    cache: DynamicCache,
    input_ids: Tensor,
    targets: Targets,
    *,
    attention_mask: Tensor | None = None,
    steps: int = 3,
    step_size: float = 0.01,
    kl_scale: float = 0.01,
    gamma: float = 1.5,
) -> Infused:
    """Perturb the cache that `input_ids` are read over so that the targets become likelier after them.

    From delta = 0, `steps` times, for each row and layer on its own:

        g = dJ / d delta,  m = max(m, |g|_2)  (at the first step |g|_2 + 1e-15),  delta -= step_size g / m^gamma

    the norm being over keys and values together. The first step's forward pass gives the plain logits as well.

    Args:
        model: Its weights take no part, and keep their `requires_grad`.
        cache: Of the tokens before `input_ids`, in any floating type; it is left as it is.
        input_ids: `[B, L]` int64, in decoding the one token read last.
        targets: What should follow.
        attention_mask: `[B, T + L]`, over the cache and `input_ids`, padding on the left; None for no padding.
        steps: Gradient steps; 0 reads without an update.
        step_size: eta.
        kl_scale: lambda, see `objective`.
        gamma: Exponent of the norm.
    """
    active, cache = targets.active, _precise(cache)
    deltas: Deltas | None = None
    plain: Tensor | None = None
    norms: list[Tensor] = []
    with _frozen(model):
        for _ in range(steps if bool(active.any()) else 0):
            deltas = deltas or [(torch.zeros_like(x.keys), torch.zeros_like(x.values)) for x in cache.layers]
            leaves = [tensor.detach().requires_grad_() for pair in deltas for tensor in pair]
            with torch.enable_grad():
                moved = _moved(cache, list(zip(leaves[::2], leaves[1::2])))
                logits, _ = _read(model, moved, input_ids, attention_mask)
                plain = logits.detach() if plain is None else plain
                loss = objective(logits, plain, targets, kl_scale=kl_scale)[active].sum()
                gradients = torch.autograd.grad(loss, leaves)
            norms = _step(
                deltas, gradients, norms, active, attention_mask, input_ids.shape[1], step_size, gamma
            )
        logits, advanced = _advance(model, cache, deltas, input_ids, attention_mask)
    plain = logits if plain is None else plain.to(logits.dtype)
    logits = torch.where(active[:, None], logits, plain)
    before, after = (objective(z, plain, targets, kl_scale=kl_scale) for z in (plain, logits))
    return Infused(plain, logits, advanced, deltas, before, after)


@torch.no_grad()
def _step(
    deltas: Deltas,
    gradients: Sequence[Tensor],
    norms: list[Tensor],
    active: Tensor,
    mask: Tensor | None,
    length: int,
    step_size: float,
    gamma: float,
) -> list[Tensor]:
    """Change `deltas` by one step; returns the largest norms so far, `[B]` per layer."""
    largest = []
    for n, pair in enumerate(deltas):
        counts = active[:, None].to(pair[0].device)
        if mask is not None:  # sliding layers keep the last positions only
            past = mask.shape[1] - length
            counts = counts & mask[:, past - pair[0].shape[-2] : past].bool().to(counts.device)
        kept = [gradient * counts[:, None, :, None] for gradient in gradients[2 * n : 2 * n + 2]]
        norm = torch.stack([x.square().sum((1, 2, 3)) for x in kept]).sum(0).sqrt()
        largest.append(torch.maximum(norms[n], norm) if norms else norm + _FLOOR)
        for delta, gradient in zip(pair, kept):
            delta -= step_size * gradient / largest[n].pow(gamma)[:, None, None, None]
    return largest


class Reading:
    """Prompts being continued, with the cache of all but the last token of each.

    Args:
        model: Which reads.
        ids: `[B, T]` int64, padded on the left, two tokens or more in each row.
        mask: `[B, T]`, 0 on padding.
        use_cache: False keeps the deltas of each step instead of the cache, and reads the whole text again with
            them at every step: slow, for verification.

    Raises:
        NotApplicable: the model's cache is of a kind that cannot be perturbed.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, *, use_cache: bool = True):
        check_cache(model)
        self.model, self.ids, self.mask, self.use_cache = model, ids, mask, use_cache
        self._prompt = ids.shape[1] - 1
        self._history: list[Deltas | None] = []
        self._cache = self._first() if use_cache else None

    def step(self, targets: Targets, **settings: Any) -> Infused:
        """Read the last token, see `infuse`."""
        cache = self._again() if self._cache is None else self._cache
        found = infuse(self.model, cache, self.ids[:, -1:], targets, attention_mask=self.mask, **settings)
        if self.use_cache:
            self._cache = found.cache
        else:
            self._history.append(found.deltas)
        return found

    def append(self, tokens: Tensor) -> None:
        """Go on with the tokens `[B]` that were chosen."""
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids)], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)

    @torch.no_grad()
    def _first(self) -> DynamicCache:
        with contiguous_head(self.model):
            _, cache = _read(self.model, None, self.ids[:, : self._prompt], self.mask[:, : self._prompt])
        check_cache(self.model, cache)
        return _precise(cache)

    def _again(self) -> DynamicCache:
        cache = self._first()
        for end, deltas in enumerate(self._history, start=self._prompt + 1):
            _, cache = _advance(self.model, cache, deltas, self.ids[:, end - 1 : end], self.mask[:, :end])
        return cache
