"""core.divergence: float64 loops, finite differences, limits, masks, -inf, memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfuse.core import divergence
from transfuse.core.divergence import adaptive_terms, decoupled_terms, forward_kl, jsd, kl_terms, reverse_kl
from transfuse.core.errors import BadInput, IncompatibleModels

KINDS = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jsd,
    "jsd.1": lambda *a, **k: jsd(*a, beta=0.1, **k),
}


def slow(kind, ours, theirs, temperature=1.0):
    """One token, plain Python floats."""

    def softmax(logits):
        top = max(logits)
        weights = [math.exp((x - top) / temperature) for x in logits]
        return [w / sum(weights) for w in weights]

    def kl(a, b):
        return sum(x * (math.log(x) - (math.log(y) if y else -math.inf)) for x, y in zip(a, b) if x > 0)

    q, p = softmax(ours.tolist()), softmax(theirs.tolist())
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    beta = 0.1 if kind == "jsd.1" else 0.5
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.3])
def test_against_loops(kind, temperature):
    ours, theirs = logits(2, 5, 7), logits(2, 5, 7, seed=1)
    values = KINDS[kind](ours, theirs, temperature=temperature, reduction="none")
    expected = [slow(kind, ours[i, j], theirs[i, j], temperature) for i in range(2) for j in range(5)]
    assert values.shape == (2, 5)
    assert values.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert KINDS[kind](ours, theirs, temperature=temperature).item() == pytest.approx(sum(expected) / 10)
    assert KINDS[kind](ours, theirs, temperature=temperature, reduction="sum").item() == pytest.approx(
        sum(expected)
    )


def test_by_hand():
    ours, theirs = torch.tensor([0.0, 0.0]).log_softmax(0)[None], torch.tensor([[0.75, 0.25]]).log()
    assert forward_kl(ours, theirs).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reverse_kl(ours, theirs).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind):
    theirs, mask = logits(4, 5, seed=1), torch.tensor([True, True, False, True])
    theirs[0, 2] = -torch.inf
    ours = logits(4, 5)
    if kind != "forward":  # the student may rule a token out as well
        ours[1, 3] = theirs[1, 3] = -torch.inf
    if kind == "reverse":
        ours[0, 2] = -torch.inf
    ours.requires_grad_()
    KINDS[kind](ours, theirs, mask=mask, temperature=1.7).backward()
    base = ours.detach()
    for i in range(4):
        for j in range(5):
            if torch.isinf(base[i, j]):
                assert ours.grad[i, j] == 0
                continue
            step = torch.zeros_like(base)
            step[i, j] = 1e-5
            up, down = (KINDS[kind](base + s * step, theirs, mask=mask, temperature=1.7) for s in (1, -1))
            assert ours.grad[i, j].item() == pytest.approx(((up - down) / 2e-5).item(), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_change_nothing(kind):
    ours, theirs = logits(2, 4, 6), logits(2, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    kept = KINDS[kind](ours[mask.bool()], theirs[mask.bool()])
    spoilt = ours.clone()
    spoilt[mask == 0] = torch.nan
    spoilt.requires_grad_()
    value = KINDS[kind](spoilt, theirs, mask=mask)
    value.backward()
    assert value.item() == pytest.approx(kept.item(), rel=1e-12)
    assert (spoilt.grad[mask == 0] == 0).all() and torch.isfinite(spoilt.grad).all()
    assert (KINDS[kind](spoilt, theirs, mask=mask, reduction="none")[mask == 0] == 0).all()


def test_nothing_counts():
    ours = logits(3, 4).requires_grad_()
    value = forward_kl(ours, logits(3, 4, seed=1), mask=torch.zeros(3))
    value.backward()
    assert value.item() == 0 and (ours.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_tokens(kind):
    ours, theirs = logits(3, 6), logits(3, 6, seed=1)
    ours[:, 4] = theirs[:, 4] = -torch.inf  # ruled out by both: as if it were not there
    without = [0, 1, 2, 3, 5]
    narrow = KINDS[kind](ours[:, without], theirs[:, without]).item()
    assert KINDS[kind](ours, theirs).item() == pytest.approx(narrow)


TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_only_one_side_rules_a_token_out(kind, dtype):
    """(1/2, 1/4, 1/4) from (3/4, 1/4, 0): its zero counts as the smallest normal number, without a slope."""
    wide, narrow = [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]
    last = math.log(0.25) - math.log(TINY[dtype])
    parts = [math.log(0.5 / 0.75), 0.0, last]
    value = sum(p * part for p, part in zip(wide, parts))
    if (
        kind == "forward"
    ):  # the student is the narrow one: sum of slopes by log q times q, less each one's own
        slope = [0.75 * 0.75 - 0.5, 0.25 * 0.75 - 0.25, 0.0]
    else:
        slope = [q * (part - value) for q, part in zip(wide, parts)]
    pair = [torch.tensor([x], dtype=dtype).log() for x in (narrow, wide)]
    ours, theirs = pair if kind == "forward" else pair[::-1]
    ours.requires_grad_()
    found = KINDS[kind](ours, theirs)
    assert found.dtype == dtype and found.item() == pytest.approx(value, rel=1e-6) and value > 0
    assert torch.autograd.grad(found, ours)[0][0].tolist() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    other = "reverse" if kind == "forward" else "forward"  # 0 log 0 there
    plain = 0.75 * math.log(1.5)
    assert KINDS[other](ours, theirs).item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("dtype", TINY)
def test_sides_that_share_no_token(dtype):
    ours, theirs = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=dtype).split(1)
    for kind in (forward_kl, reverse_kl):
        z = ours.clone().requires_grad_()
        value = kind(z, theirs)
        assert value.item() == pytest.approx(-math.log(TINY[dtype]), rel=1e-6)
        assert torch.autograd.grad(value, z)[0].isfinite().all()
    z = ours.clone().requires_grad_()
    for value in (
        adaptive_terms(z.log_softmax(-1), theirs),
        *(decoupled_terms(z.log_softmax(-1), theirs, torch.tensor([label])) for label in (0, 1)),
    ):
        assert 0 < value.item() < math.inf
        assert torch.autograd.grad(value, z)[0].isfinite().all()


def test_jsd_of_sides_that_share_no_token():
    disjoint = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert jsd(*disjoint).item() == pytest.approx(math.log(2))


def test_limits():
    ours, theirs = logits(5, 6), logits(5, 6, seed=1)
    for kind in KINDS.values():
        assert kind(ours, ours + 3.0).item() == pytest.approx(0.0, abs=1e-12)  # a shift of logits is nothing
    assert jsd(ours, theirs, beta=1e-6).item() / 1e-6 == pytest.approx(
        forward_kl(ours, theirs).item(), rel=1e-3
    )
    assert jsd(ours, theirs, beta=1 - 1e-6).item() / 1e-6 == pytest.approx(
        reverse_kl(ours, theirs).item(), rel=1e-3
    )
    assert jsd(ours, theirs).item() == pytest.approx(jsd(theirs, ours).item())


@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_never_negative_and_bounded(seed, beta):
    ours, theirs = logits(3, 5, seed=seed), logits(3, 5, seed=seed + 1)
    value = jsd(ours, theirs, beta=beta).item()
    assert -1e-12 <= value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert forward_kl(ours, theirs).item() >= value / beta - 1e-9  # KL(p || m) <= ... <= KL(p || q)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind, monkeypatch):
    ours, theirs = logits(3, 9, 5).requires_grad_(), logits(3, 9, 5, seed=1)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    whole = KINDS[kind](ours, theirs, mask=mask)
    (expected,) = torch.autograd.grad(whole, ours)
    monkeypatch.setattr(divergence, "_CHUNK_BYTES", 4 * 5 * 4)  # four tokens
    parts = KINDS[kind](ours, theirs, mask=mask)
    (found,) = torch.autograd.grad(parts, ours)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_float32(dtype):
    ours, theirs = logits(64, 400).to(dtype), logits(64, 400, seed=1).to(dtype)
    exact = forward_kl(ours.double(), theirs.double()).item()
    value = forward_kl(ours, theirs)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact, rel=1e-5)
    ours.requires_grad_()
    forward_kl(ours, theirs).backward()
    assert ours.grad.dtype == dtype


def test_backward_keeps_no_second_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(divergence, "_CHUNK_BYTES", 4 * 50 * 8)
    ours, theirs = logits(256, 50).requires_grad_(), logits(256, 50, seed=1)
    held = 0

    def count(tensor):
        nonlocal held
        if tensor.untyped_storage().data_ptr() not in (ours.untyped_storage().data_ptr(), theirs.data_ptr()):
            held += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        forward_kl(ours, theirs)
    assert held < ours.numel() / 4


def test_bad_input():
    with pytest.raises(IncompatibleModels, match="one vocabulary"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(BadInput, match="mask"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 5), mask=torch.ones(3))
    with pytest.raises(BadInput, match="temperature"):
        reverse_kl(torch.zeros(2, 5), torch.zeros(2, 5), temperature=0.0)
    for reduction in ("batchmean", None, True):
        with pytest.raises(BadInput, match="reduction"):
            forward_kl(torch.zeros(2, 5), torch.zeros(2, 5), reduction=reduction)
    for beta in (0.0, 1.0, -1.0):
        with pytest.raises(BadInput, match="beta"):
            jsd(torch.zeros(2, 5), torch.zeros(2, 5), beta=beta)


def test_a_probability_too_small_for_its_dtype_counts_as_none():
    """exp(-200) is 0 in float32; where the other side excludes that token, 0 times infinity must not appear."""
    log_p = torch.log_softmax(torch.tensor([[0.0, 1.0, -200.0]]), -1)
    log_q = torch.log_softmax(torch.tensor([[0.5, 0.5, -torch.inf]]), -1).requires_grad_()
    value = kl_terms(log_p, log_q)
    assert float(value.detach()) == pytest.approx(float(kl_terms(log_p[:, :2], log_q[:, :2]).detach()))
    (slope,) = torch.autograd.grad(value.sum(), log_q)
    assert not slope.isnan().any()
