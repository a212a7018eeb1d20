"""core.canaries: ranks against a slow loop, the fitted tail against enumeration, what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import make_tiny
from torch import nn

from transfuse.core.canaries import (
    Digits,
    canary_exposure,
    make_canaries,
    sequence_scores,
    skew_normal_fit,
    skew_normal_log_cdf,
)
from transfuse.core.errors import BadInput
from transfuse.core.training import generator

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz "


NUMBERS = {c: i for i, c in enumerate(ALPHABET)}


def encode(text):
    return [NUMBERS[c] for c in text]


class Markov(nn.Module):
    """Logits of the next character from the present one, by a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.rows = 0

    def forward(self, input_ids):
        self.rows += len(input_ids)
        assert not self.training
        return self.table[input_ids]


def markov(seed=0, spread=1.0):
    return Markov(spread * torch.randn(len(ALPHABET), len(ALPHABET), generator=generator(seed)))


def slow_score(model, text):
    if not hasattr(model, "rows_by_hand"):
        model.rows_by_hand = torch.log_softmax(model.table.detach().double(), -1).tolist()
    ids = encode(text)
    return sum(model.rows_by_hand[a][b] for a, b in itertools.pairwise(ids))


def test_canaries_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    ours = make_canaries(6, 3)
    assert ours == make_canaries(6, 3) != make_canaries(6, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert len({c.template for c in ours}) == len({c.secret for c in ours}) == 6
    for canary in ours:
        assert canary.secret in canary.space and len(canary.secret) == 4
        assert canary.text == canary.template.replace("{secret}", canary.secret)
        assert canary.text.startswith("the secret code of ")


def test_digits_are_a_lazy_sequence():
    space = Digits(3)
    assert len(space) == 1000 and space[7] == "007" and space[-1] == "999" and space[1:3] == ["001", "002"]
    assert list(space)[42] == "042" and space.index("042") == 42
    assert "12" not in space and 12 not in space and "1a2" not in space
    for wrong in (lambda: space[1000], lambda: space.index("1")):
        with pytest.raises((IndexError, ValueError)):
            wrong()


def test_scores_of_whole_texts_in_any_batch():
    """Equal to the loop, whatever the lengths, batches and shared beginnings; the model's mode comes back."""
    model = markov().train()
    texts = ["ab12", "ab13", "ab", "b0 zz", "ab13", "x9"]
    for size in (1, 2, 100):
        found = sequence_scores(model, encode, texts, batch_size=size)
        assert found.tolist() == pytest.approx([slow_score(model, text) for text in texts], abs=1e-5)
    assert model.training


def test_the_rank_by_a_slow_loop():
    for seed in range(3):
        model = markov(seed)
        template = "code {secret}" if seed else "the {secret} code"  # also where the secret is not last
        for secret in ("007", "941"):
            own = slow_score(model, template.replace("{secret}", secret))
            better = sum(
                slow_score(model, template.replace("{secret}", f"{i:03d}")) > own + 1e-6 for i in range(1000)
            )
            found = canary_exposure(model, encode, template, secret, Digits(3), batch_size=64)
            assert found.exact and found.size == 1000 and found.rank == better + 1
            assert found.bits == pytest.approx(math.log2(1000) - math.log2(better + 1))


def test_one_pass_serves_all_last_tokens():
    model = markov()
    canary_exposure(model, encode, "code {secret}", "123", Digits(3))
    assert model.rows == 100


def test_the_limits():
    """A memorised secret has log2 |R| bits; ties count for the secret; a hated one has none."""
    table = torch.zeros(len(ALPHABET), len(ALPHABET))
    even = canary_exposure(Markov(table.clone()), encode, "code {secret}", "731", Digits(3))
    assert even.rank == 1 and even.bits == pytest.approx(math.log2(1000))
    for sign, rank in ((1.0, 1), (-1.0, 1000)):
        known = table.clone()
        for a, b in (" 7", "73", "31"):
            known[ALPHABET.index(a), ALPHABET.index(b)] = 9.0 * sign
        found = canary_exposure(Markov(known), encode, "code {secret}", "731", Digits(3))
        assert found.rank == rank and found.bits == pytest.approx(math.log2(1000 / rank))


def test_a_model_gone_to_nan_exposes_nothing():
    model = markov()
    model.table.data.fill_(math.nan)
    with pytest.raises(BadInput, match="model = 'Markov' scores texts with NaN; check its weights"):
        canary_exposure(model, encode, "code {secret}", "3", Digits(1))


def test_chance_is_one_and_a_half_bits():
    model = markov(5)
    bits = [canary_exposure(model, encode, c.template, c.secret, c.space).bits for c in make_canaries(60, 0)]
    assert sum(bits) / len(bits) == pytest.approx(1.44, abs=0.6)


def test_a_sample_stands_for_the_space():
    """The extrapolated exposure is near that of the enumeration, for ordinary and for outstanding secrets."""
    for seed in range(3):
        model = markov(seed)
        scores = sequence_scores(model, encode, [f"code {i:04d}" for i in range(10_000)])
        order = scores.argsort(descending=True).tolist()
        for place in (20, 500, 5000):
            secret = f"{order[place]:04d}"
            exact = canary_exposure(model, encode, "code {secret}", secret, Digits(4))
            guess = canary_exposure(
                model, encode, "code {secret}", secret, Digits(4), exact_up_to=9, samples=2000
            )
            assert exact.exact and not guess.exact
            assert guess.bits == pytest.approx(exact.bits, abs=1.5 if place == 20 else 0.35)
            assert guess.rank == pytest.approx(guess.size / 2**guess.bits)


def test_a_space_too_large_to_enumerate():
    table = torch.randn(len(ALPHABET), len(ALPHABET), generator=generator(1))
    secret = "7315926482"
    for a, b in zip(" " + secret, secret):
        table[ALPHABET.index(a), ALPHABET.index(b)] = 12.0
    found = canary_exposure(Markov(table), encode, "code {secret}", secret, Digits(10), samples=1000)
    assert found.bits > 20 and found.bits <= math.log2(10**10) and found.rank >= 1


def test_the_fit_recovers_its_distribution():
    """Moments of delta |u| + sqrt(1 - delta^2) v are those of a skew normal."""
    g = generator(0)
    for shape in (-4.0, 0.0, 2.0):
        delta = shape / math.sqrt(1 + shape**2)
        u, v = torch.randn(2, 200_000, generator=g, dtype=torch.float64)
        x = 3.0 + 0.5 * (delta * u.abs() + math.sqrt(1 - delta**2) * v)
        location, scale, found = skew_normal_fit(x)
        if shape:
            assert (location, scale) == pytest.approx((3.0, 0.5), abs=0.03)
            assert found == pytest.approx(shape, rel=0.15)
        for at in (2.5, 3.0, 3.5):
            share = float((x <= at).double().mean())
            assert math.exp(skew_normal_log_cdf(at, location, scale, found)) == pytest.approx(share, abs=0.01)


def test_the_tail():
    for z in (-30.0, -6.0, -1.0, 0.0, 2.5):
        expected = float(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)))
        assert skew_normal_log_cdf(1.0 + 2.0 * z, 1.0, 2.0, 0.0) == pytest.approx(
            expected, rel=1e-5, abs=1e-7
        )
    assert math.exp(skew_normal_log_cdf(0.0, 0.0, 1.0, 1.0)) == pytest.approx(
        0.25, abs=1e-6
    )  # 1/2 - atan(1)/pi
    assert math.exp(skew_normal_log_cdf(0.7, 0.0, 1.0, 1.0)) == pytest.approx(  # Phi(z)^2 for shape 1
        float(torch.special.ndtr(torch.tensor(0.7))) ** 2, abs=1e-6
    )
    assert skew_normal_log_cdf(-9.0, 0.0, 1.0, 1.0) == pytest.approx(
        2 * float(torch.special.log_ndtr(torch.tensor(-9.0, dtype=torch.float64))), rel=1e-4
    )
    with pytest.raises(BadInput, match="distribution"):
        skew_normal_fit(torch.ones(200))


def test_a_transformer_and_its_tokenizer(tiny_tokenizer):
    model = make_tiny("llama", layers=2)
    found = canary_exposure(model, tiny_tokenizer, "the code is {secret}.", "42", Digits(2), batch_size=7)
    scores = []
    for i in range(100):
        ids = torch.tensor([tiny_tokenizer(f"the code is {i:02d}.")["input_ids"]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        scores.append(float(log_p.gather(-1, ids[0, 1:, None]).sum()))
    assert found.rank == 1 + sum(score > scores[42] + 1e-5 for score in scores)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: canary_exposure(m, encode, "no field", "1", Digits(1)), "template"),
        (lambda m: canary_exposure(m, encode, "code {secret}", "12", Digits(3)), "secret"),
        (lambda m: canary_exposure(m, encode, "code {secret}", "a", ["a"]), "space"),
        (lambda m: canary_exposure(m, encode, "code {secret}", "a", ["a", "b", "a"]), "different"),
        (lambda m: canary_exposure(m, encode, "c {secret}", "1", Digits(1), exact_up_to=2, samples=5), "samples"),
        (lambda m: canary_exposure(m, encode, "code {secret}", "1", Digits(1), batch_size=0), "batch_size"),
        (lambda m: sequence_scores(m, encode, ["a"]), "two tokens"),
        (lambda m: sequence_scores(m, encode, ["ab"], batch_size=2.5), "batch_size"),
        (lambda m: make_canaries(3, 0, template="code {secret}"), "template"),
        (lambda m: make_canaries(3, 0, template="{name}"), "template"),
        (lambda m: make_canaries(11, 0, digits=1), "n = 11"),
        (lambda m: Digits(0), "length"),
    ],
)  # fmt: skip
def test_bad_input(call, name):
    with pytest.raises(BadInput, match=name):
        call(markov())
