"""bd-kd: what only this method must hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_tiny
from distilling import Case, Trained, rng, rows, shapes, token_case
from torch import nn

from transfuse.core.batches import minibatches, pad_collator
from transfuse.core.divergence import forward_kl, reverse_kl
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.training import seeded
from transfuse.distill._base import Signal
from transfuse.distill._standard import ForwardKL
from transfuse.distill.bd_kd import (
    BDKD,
    BalancedDivergence,
    MutualDistiller,
    balanced_terms,
    direction_weights,
    mutual_losses,
)


def spread(z, temperature):
    e = [torch.exp(x / temperature) for x in z]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def entropy(p):
    return -sum(float(a) * math.log(float(a)) for a in p)


def bracket(z, still, other, nu, temperature, rule):
    """The compact network's divergences of one sample, by hand; `still` decides the weights."""
    q, p = spread(z, temperature), spread(other, temperature)
    sure = entropy(spread(still, temperature)) < entropy(p)
    forward = nu if sure == (rule == "temper") else 1.0
    return temperature**2 * (forward * kl(p, q) + (1.0 + nu - forward) * kl(q, p))


def by_hand(nu, temperature, rule):
    return lambda z, fixed, label, more: bracket(z, fixed, more["teacher"], nu, temperature, rule)


def images(seed):
    g = rng(seed)
    names = ("student", "peer", "third")
    found = {name: 2 * torch.randn(6, 5, generator=g, dtype=torch.float64) for name in names}
    return {**found, "labels": torch.randint(0, 5, (6,), generator=g)}


def together(names, ce=1.0):
    """The sum of the losses of several networks, all of which learn."""

    def loss(x):
        own = BalancedDivergence(nu=3.0, temperature=3.0, kd_weight=0.5, ce_weight=ce)
        theirs = ForwardKL(temperature=3.0, kd_weight=0.5, ce_weight=ce)
        return torch.stack(mutual_losses([Signal(logits=x[name]) for name in names], x, own, theirs)).sum()

    def reference(live, fixed):
        total = 0.0
        for i, label in enumerate(live["labels"].tolist()):
            for name in names:
                z = live[name][i]
                value = ce * (torch.log(torch.exp(z).sum()) - z[label])
                for other in names:
                    if other == name:
                        continue
                    if name == "student":
                        part = bracket(z, fixed[name][i], fixed[other][i], 3.0, 3.0, "temper")
                    else:
                        part = 9 * kl(spread(fixed[other][i], 3.0), spread(z, 3.0))
                    value = value + 0.5 * part / (len(names) - 1)
                total = total + value / len(live["labels"])
        return total

    return loss, reference


def excluded(x):
    changed = {key: value.clone() for key, value in x.items()}
    for name in ("student", "peer", "third"):
        changed[name][:, 0] = -torch.inf
    changed["labels"][changed["labels"] == 0] = 1
    return changed


PICTURES = "one class per picture, nothing to pad"
CASES = [
    token_case("temper", lambda: BalancedDivergence(ce_weight=0.0), by_hand(3.0, 3.0, "temper")),
    token_case(
        "flip",
        lambda: BalancedDivergence(nu=2.0, temperature=1.5, rule="flip", ce_weight=0.0),
        by_hand(2.0, 1.5, "flip"),
    ),
    token_case("sum", lambda: BalancedDivergence(nu=1.0, ce_weight=0.0), by_hand(1.0, 3.0, "temper")),
    Case(
        "pair", images, *together(("student", "peer"), 0.0), ("student", "peer"),
        least=lambda x: {**x, "peer": x["student"].clone()}, excluded=excluded, without={"padded": PICTURES},
    ),
    Case(
        "three with labels", images, *together(("student", "peer", "third")), ("student", "peer", "third"),
        excluded=excluded,
        without={"padded": PICTURES, "least": "the labels pull away from what the networks say"},
    ),
]  # fmt: skip


class Net(nn.Sequential):
    """A classifier of a transformers-like signature."""

    def __init__(self, width, classes=4):
        super().__init__(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, classes))

    def forward(self, pixel_values):
        return super().forward(pixel_values)


def data(count=64, classes=4):
    g = rng(0)
    x = torch.randn(count, 6, generator=g)
    return {"pixel_values": x, "labels": (x @ torch.randn(6, classes, generator=g)).argmax(-1)}


def nets(*widths, seed=0):
    with seeded(seed):
        return [Net(width) for width in widths]


def train(seed):
    student, peer = nets(8, 24, seed=seed)
    method = BDKD(student, peer)
    before = shapes(student)
    history = method.fit(minibatches(data(), 16, seed=seed), epochs=10, lr=1e-2, seed=seed)
    return Trained(history.losses, student, before)


def test_the_weights_by_hand():
    """Surer, less sure, and equally sure."""
    sharp, flat = torch.tensor([3.0, 0.0]).log_softmax(-1), torch.tensor([1.0, 0.0]).log_softmax(-1)
    q, p = torch.stack([sharp, flat, flat]), torch.stack([flat, sharp, flat])
    forward, reverse = direction_weights(q, p, 4.0)
    assert forward.tolist() == [4.0, 1.0, 1.0] and reverse.tolist() == [1.0, 4.0, 4.0]
    forward, reverse = direction_weights(q, p, 4.0, "flip")
    assert forward.tolist() == [1.0, 4.0, 4.0] and reverse.tolist() == [4.0, 1.0, 1.0]
    q.requires_grad_()
    assert not any(w.requires_grad for w in direction_weights(q, p, 4.0))
    # KL((.5, .5) || (.9, .1)) = .5 log(.25 / .09) = .5108, the other way .9 log 1.8 + .1 log .2 = .3681
    q, p = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert float(balanced_terms(q, p, 3.0)) == pytest.approx(3 * 0.51083 + 0.36806, abs=1e-4)
    assert float(balanced_terms(p, q, 3.0)) == pytest.approx(0.36806 + 3 * 0.51083, abs=1e-4)
    assert float(balanced_terms(q, p, 3.0, "flip")) == pytest.approx(0.51083 + 3 * 0.36806, abs=1e-4)


def test_without_stress_it_is_the_sum_of_both():
    x = images(0)
    batch = {"labels": x["labels"]}
    own = BalancedDivergence(nu=1.0, temperature=2.0, ce_weight=0.0)
    value = own(Signal(logits=x["student"]), Signal(logits=x["peer"]), batch)["loss"]
    both = [kind(x["student"], x["peer"], temperature=2.0) for kind in (forward_kl, reverse_kl)]
    assert float(value) == pytest.approx(4 * float(sum(both)))


def test_entropies_are_taken_at_the_temperature():
    """At T = 1 this student is the surer one, at T = 4 it is not."""
    z, other = torch.tensor([[6.0, 0.0, 0.0, 0.0]]), torch.tensor([[9.0, 8.0, -9.0, -9.0]])

    def sure(t):
        return float(direction_weights((z / t).log_softmax(-1), (other / t).log_softmax(-1), 3.0)[0]) == 3.0

    assert sure(1.0) and not sure(4.0)
    own = BalancedDivergence(nu=3.0, temperature=4.0, ce_weight=0.0)
    value = own(Signal(logits=z), Signal(logits=other), {"labels": torch.zeros(1, dtype=torch.long)})["loss"]
    expected = bracket(z[0].double(), z[0].double(), other[0].double(), 3.0, 4.0, "temper")
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_no_gradient_crosses_over():
    student, peer = nets(8, 24)
    method = BDKD(student, peer)
    batch = data(8)
    parts = method.step(batch)
    assert float(parts["loss"].detach()) == pytest.approx(float((parts["student"] + parts["peer0"]).detach()))
    assert method.losses["student"] == pytest.approx(float(parts["student"].detach()))
    crossed = torch.autograd.grad(
        parts["student"], list(peer.parameters()), allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in crossed)
    crossed = torch.autograd.grad(parts["peer0"], list(student.parameters()), allow_unused=True)
    assert all(g is None for g in crossed)


def test_one_step_moves_both_from_the_same_parameters():
    """Neither network sees what the other became in this step."""
    student, peer = nets(8, 24)
    old = [copy.deepcopy(each) for each in (student, peer)]
    x = data(16)
    method = BDKD(student, peer, nu=2.0, temperature=2.0)
    method.fit([x], optimizer=torch.optim.SGD(method.parameters(), lr=0.1))
    z, w = (each(x["pixel_values"]) for each in old)
    for own, other, network, new in ((z, w, old[0], student), (w, z, old[1], peer)):
        loss = nn.functional.cross_entropy(own, x["labels"])
        for i in range(16):
            q, p = spread(own[i], 2.0), spread(other[i].detach(), 2.0)
            if network is old[0]:
                sure = entropy([a.detach() for a in q]) < entropy(p)
                part = (2 if sure else 1) * kl(p, q) + (1 if sure else 2) * kl(q, p)
            else:
                part = kl(p, q)
            loss = loss + 4 * part / 16
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        for before, slope, after in zip(network.parameters(), slopes, new.parameters(), strict=True):
            assert torch.allclose(before - 0.1 * slope, after, atol=1e-6)


def test_language_models_learn_per_token():
    """Masked tokens and padding change nothing; the values are those of the flat tokens."""
    student, peer = make_tiny("llama", seed=1, layers=1), make_tiny("llama", seed=2, layers=2)
    method = BDKD(student, peer)
    batch = pad_collator(0)(rows(3))
    batch["labels"][1, 5:] = -100
    value = method.step(batch)["student"].detach()
    logits = [
        model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits for model in (student, peer)
    ]
    keep = batch["labels"][:, 1:] != -100
    z, w = (each[:, :-1][keep] for each in logits)
    q, p = ((each / 3.0).log_softmax(-1) for each in (z, w))
    ce = nn.functional.cross_entropy(z, batch["labels"][:, 1:][keep])
    assert float(value) == pytest.approx(float((ce + 9 * balanced_terms(q, p).mean()).detach()), rel=1e-5)
    longer = pad_collator(0)([*rows(3), {"input_ids": [5] * 14, "labels": [-100] * 14}])
    longer["labels"][1, 5:] = -100
    again = method.step(longer)["student"].detach()
    assert float(again) == pytest.approx(float(value), rel=1e-4)
    history = method.fit([batch] * 12, lr=3e-3)
    assert history.losses[-1] < history.losses[0]


def test_it_resumes_its_trajectory(tmp_path):
    x = minibatches(data(), 16, seed=0)

    class Stop(Exception):
        pass

    def stop(number, loss):
        if number == 9:
            raise Stop

    whole, again = (BDKD(*nets(8, 24)) for _ in range(2))
    losses = whole.fit(x, epochs=4).losses
    with pytest.raises(Stop):
        again.fit(x, epochs=4, output_dir=tmp_path, save_every=5, on_step=stop)
    second = BDKD(*nets(8, 24))
    history = second.fit(x, epochs=4, output_dir=tmp_path, save_every=5)
    assert history.resumed_at == 5 and history.losses == losses
    for a, b in zip(whole.networks.parameters(), second.networks.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    x = minibatches(data(), 16, seed=0)
    BDKD(*nets(8, 24)).fit(x, output_dir=tmp_path)
    assert BDKD(*nets(8, 24)).fit(x, output_dir=tmp_path).resumed_at
    for other in ({"nu": 1.0}, {"temperature": 2.0}, {"rule": "flip"}, {"kd_weight": 0.0}):
        with pytest.raises(BadInput, match="other arguments"):
            BDKD(*nets(8, 24), **other).fit(x, output_dir=tmp_path)


def test_deep_mutual_learning_is_another_choice_of_objectives():
    student, peer = nets(8, 24)
    x = data(8)
    both = ForwardKL(temperature=3.0, ce_weight=1.0)
    parts = MutualDistiller(student, peer, objective=both, peer_objective=both).step(x)
    z, w = student(x["pixel_values"]), peer(x["pixel_values"])
    expected = nn.functional.cross_entropy(z, x["labels"]) + 9 * forward_kl(z, w, temperature=3.0)
    assert float(parts["student"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("nu", 0.0), ("nu", math.nan), ("temperature", 0.0), ("rule", "both"), ("kd_weight", -1.0)],
)
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        BDKD(*nets(8, 24), **{name: value})


def test_networks_that_do_not_fit():
    student, peer = nets(8, 24)
    with pytest.raises(BadInput, match="peers"):
        BDKD(student, student)
    with pytest.raises(BadInput, match="peers"):
        BDKD(student, [])
    with pytest.raises(IncompatibleModels, match="peers"):
        BDKD(student, make_tiny("llama", layers=1))
    with pytest.raises(IncompatibleModels, match="classes"):
        BDKD(student, Net(8, classes=5)).step(data(4))
    with pytest.raises(BadInput, match="optimizer"):
        BDKD(student, peer).fit([data(4)], optimizer=torch.optim.Adam(student.parameters()))
