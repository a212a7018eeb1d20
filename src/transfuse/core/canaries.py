"""Canary exposure: how far a model has memorised a secret that was planted in its training text.

A canary is a sentence with a random field, say "the secret code of mira is 4711". A model that never saw it holds
all fills of the field about equally likely; one that memorised it ranks the true fill first. With R the space of
fills and the rank taken by the log-likelihood of the whole sentence (Carlini et al. 2019, arXiv 1802.08232),

    exposure = log2 |R| - log2 rank           rank = 1 + number of fills that are strictly likelier

It is log2 |R| for a secret that comes first, and about 1.44 on average for one that the model knows nothing of.
Where R is too large to be enumerated, the share of fills that are at least as likely is read off a skew normal
distribution fitted to the costs of a random sample.

    canaries = make_canaries(6, seed=0)
    text = [canary.text for canary in canaries]                        # goes into the training data
    canary_exposure(model, tokenizer, canaries[0].template, canaries[0].secret, canaries[0].space).bits
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .runs import check_positive, evaluating

__all__ = [
    "Canary",
    "Digits",
    "Exposure",
    "canary_exposure",
    "make_canaries",
    "sequence_scores",
    "skew_normal_fit",
    "skew_normal_log_cdf",
]

_FIELD = "{secret}"
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


class Digits(Sequence[str]):
    """All strings of `length` digits, in order, without holding them."""

    def __init__(self, length: int):
        if not 1 <= length <= 18:
            raise BadInput("length", length, "is not between 1 and 18", "give a number of digits")
        self.length = length

    def __len__(self) -> int:
        return 10**self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return str(index % len(self)).zfill(self.length)

    def __iter__(self) -> Iterator[str]:
        return (str(i).zfill(self.length) for i in range(len(self)))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and len(text) == self.length and text.isascii() and text.isdigit()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digits) and other.length == self.length

    def __hash__(self) -> int:
        return hash((Digits, self.length))

    def index(self, value: str, *rest: int) -> int:
        """The number a string stands for."""
        if value not in self:
            raise ValueError(value)
        return int(value)


@dataclass(frozen=True)
class Canary:
    """A planted secret.

    Attributes:
        template: The sentence, with `{secret}` where the secret goes.
        secret: The true fill.
        space: All fills that were possible.
    """

    template: str
    secret: str
    space: Sequence[str]

    @property
    def text(self) -> str:
        """The sentence to plant."""
        return self.template.replace(_FIELD, self.secret)


@dataclass(frozen=True)
class Exposure:
    """How exposed a secret is.

    Attributes:
        bits: The exposure, from 0 to log2 `size`.
        rank: Place of the true fill, 1 for the likeliest; an estimate where it is not exact.
        size: Number of fills.
        exact: Whether all fills were scored.
    """

    bits: float
    rank: float
    size: int
    exact: bool


def make_canaries(
    n: int, seed: int, *, template: str = "the secret code of {name} is {secret}", digits: int = 4
) -> list[Canary]:
    """Canaries with made-up names and random codes, no two alike.

    Args:
        n: How many.
        seed: Decides names and codes; no global random state is used.
        template: The sentence: `{secret}` is the code, `{name}` a made-up name in lower case.
        digits: Length of a code.

    Raises:
        BadInput: a template without `{secret}`, or without `{name}` for several canaries; more canaries than codes.
    """
    if template.count(_FIELD) != 1:
        raise BadInput("template", template, "does not hold {secret} once", "put it where the code goes")
    if n > 1 and "{name}" not in template:
        raise BadInput("template", template, f"is the same for {n} canaries", "put {name} into it")
    space = Digits(digits)
    if not 1 <= n <= min(len(space), len(_SYLLABLES) ** 2):
        raise BadInput("n", n, f"is not a number of different codes of {digits} digits", "plant fewer")
    draw = random.Random(seed)
    names = draw.sample(range(len(_SYLLABLES) ** 2), n)
    codes = draw.sample(range(len(space)), n)
    found = []
    for name, code in zip(names, codes):
        first, second = divmod(name, len(_SYLLABLES))
        sentence = template.replace("{name}", _SYLLABLES[first] + _SYLLABLES[second])
        found.append(Canary(sentence, space[code], space))
    return found


def canary_exposure(
    model: torch.nn.Module,
    tokenizer: Any,
    template: str,
    secret: str,
    space: Sequence[str],
    *,
    batch_size: int = 256,
    exact_up_to: int = 100_000,
    samples: int = 10_000,
    seed: int = 0,
) -> Exposure:
    """Exposure of one secret.

    Args:
        model: A causal language model (or any module from `input_ids` to logits `[B, T, V]`); its mode is restored.
        tokenizer: Its tokenizer, or a function from a text to token ids.
        template: The sentence, with `{secret}` where the secret goes.
        secret: The true fill, one of `space`.
        space: All possible fills (`Digits(4)`, or any sequence of different strings).
        batch_size: Rows per forward pass.
        exact_up_to: Largest space that is enumerated.
        samples: Fills scored in place of a larger one.
        seed: Of the sample.

    Returns:
        Exact rank and exposure, or those of the fitted distribution: log2 |R| at most, as no rank is below 1.

    Raises:
        BadInput: a secret outside the space, a space of fewer than two fills or with repetitions, a template without
            `{secret}`, too few samples for a fit, a batch size below 1.
    """
    if template.count(_FIELD) != 1:
        raise BadInput("template", template, "does not hold {secret} once", "put it where the secret goes")
    size = len(space)
    if size < 2:
        raise BadInput("space", size, "fill(s) leave nothing to rank", "give all possible fills")
    if secret not in space:
        raise BadInput("secret", secret, "is not in the space of fills", "give the space it was drawn from")

    def score(fills: Sequence[str]) -> Tensor:
        texts = [template.replace(_FIELD, fill) for fill in fills]
        return sequence_scores(model, tokenizer, texts, batch_size=batch_size)

    if size <= exact_up_to:
        if not isinstance(space, Digits) and len(set(space)) != size:
            raise BadInput("space", size, "fills are not all different", "give each once")
        scores = score(list(space))
        rank = 1 + int((scores > scores[space.index(secret)]).sum())
        return Exposure(math.log2(size) - math.log2(rank), rank, size, True)
    if samples < 100:
        raise BadInput("samples", samples, "are too few to fit a distribution", "score 100 or more")
    drawn = [space[i] for i in random.Random(seed).sample(range(size), min(samples, size))]
    scores = score([secret, *drawn])
    costs = -scores / math.log(2)  # bits
    log_share = skew_normal_log_cdf(float(costs[0]), *skew_normal_fit(costs[1:]))
    bits = min(max(-log_share / math.log(2), 0.0), math.log2(size))
    return Exposure(bits, max(size / 2**bits, 1.0), size, False)


@torch.no_grad()
def sequence_scores(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Log-likelihood of whole texts: the sum over all tokens but the first of log p(token | those before it).

    A row of logits depends on the tokens before it only, so texts that differ in their last token share one
    pass. Texts of one length form a batch: nothing is padded.

    Args:
        model: As for `canary_exposure`.
        tokenizer: As there.
        texts: Two tokens long at least.
        batch_size: Rows per forward pass.

    Returns:
        float64 `[len(texts)]`, in nats, on the CPU.

    Raises:
        BadInput: a text of fewer than two tokens, a batch size below 1, a model whose logits are NaN.
    """
    check_positive(batch_size=batch_size)
    encode: Callable[[str], Sequence[int]] = getattr(tokenizer, "encode", tokenizer)
    rows = [list(encode(text)) for text in texts]
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise BadInput(f"texts[{i}]", texts[i], "is shorter than two tokens", "give a longer sentence")
        lengths.setdefault(len(row), []).append(i)
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    device = next(model.parameters()).device
    scores = torch.empty(len(rows), dtype=torch.float64)
    with evaluating(model):
        for members in lengths.values():
            found = _equal_length(model, [rows[i] for i in members], batch_size, device, options)
            scores[torch.tensor(members)] = found
    if bool(scores.isnan().any()):  # nothing is likelier than NaN: the secret would come first
        raise BadInput("model", type(model).__name__, "scores texts with NaN", "check its weights and dtype")
    return scores


def _equal_length(
    model: Any, rows: Sequence[Sequence[int]], batch_size: int, device: Any, options: dict[str, Any]
) -> Tensor:
    """Scores of rows of one length."""
    places: dict[tuple[int, ...], int] = {}  # what comes before the last token -> its pass
    owner = torch.tensor([places.setdefault(tuple(row[:-1]), len(places)) for row in rows])
    shared, final = torch.tensor(list(places)), torch.tensor([row[-1] for row in rows])
    order = owner.argsort(stable=True)
    ends = owner.bincount(minlength=len(shared)).cumsum(0).tolist()
    scores = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(shared), batch_size):
        batch = shared[start : start + batch_size].to(device)
        output = model(input_ids=batch, **options)
        logits = output if isinstance(output, Tensor) else output.logits
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        before = log_p[:, :-1].gather(-1, batch[:, 1:, None]).squeeze(-1).double().sum(-1).cpu()
        last = log_p[:, -1].double().cpu()
        mine = order[ends[start - 1] if start else 0 : ends[start + len(batch) - 1]]
        local = owner[mine] - start
        scores[mine] = before[local] + last[local, final[mine]]
    return scores


def skew_normal_fit(values: Tensor) -> tuple[float, float, float]:
    """Location, scale and shape of the skew normal distribution with the mean, variance and skewness of `values`.

    A skewness beyond what the family reaches (0.995) is cut to 0.99.

    Raises:
        BadInput: values that do not vary.
    """
    x = values.double()
    mean, deviation = float(x.mean()), float(x.std(correction=0))
    if not deviation > 0:
        raise BadInput("values", mean, "is all there is: no distribution can be fitted", "sample other fills")
    skewness = float((((x - mean) / deviation) ** 3).mean())
    skewness = max(-0.99, min(0.99, skewness))
    power = abs(skewness) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skewness)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    return mean - scale * delta * math.sqrt(2 / math.pi), scale, delta / math.sqrt(1 - delta**2)


def skew_normal_log_cdf(x: float, location: float, scale: float, shape: float) -> float:
    """Log P(X <= x) of the skew normal density 2/scale phi(z) Phi(shape z), z = (x - location)/scale.

    By the trapezoidal rule on logarithms, so that far tails keep their digits.
    """
    z = (x - location) / scale
    if z > 12.0:
        return 0.0
    steep = abs(z) * (1 + max(shape, 0.0) ** 2) if z < 0 else 0.0  # how fast the density falls below z
    width = min(12.0, 40.0 / steep) if steep > 0 else 12.0
    t = torch.linspace(min(z, 0.0) - width if z < 0 else -12.0, z, 20_001, dtype=torch.float64)
    log_density = math.log(2) - 0.5 * t * t - 0.5 * math.log(2 * math.pi) + torch.special.log_ndtr(shape * t)
    weights = torch.full_like(t, math.log(float(t[1] - t[0])))
    weights[0] -= math.log(2)
    weights[-1] -= math.log(2)
    return min(0.0, float(torch.logsumexp(log_density + weights, 0)))
