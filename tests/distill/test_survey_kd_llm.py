"""survey-kd-llm: the standard objectives, each against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tiny
from distilling import Trained, arguments, rows, shapes, state, token_case

from transfuse.core.errors import BadInput
from transfuse.core.training import seeded
from transfuse.distill import Distiller
from transfuse.distill.survey_kd_llm import get


def spread(z, temperature=1.0):
    e = [torch.exp(x / temperature) for x in z]
    return [x / sum(e) for x in e]


def log(p):
    return torch.log(torch.clamp(p, min=1e-300))


def kl(p, q):
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True))


def forward(z, fixed, label, more):
    return 4.0 * kl(spread(more["teacher"], 2.0), spread(z, 2.0))


def reverse(z, fixed, label, more):
    return kl(spread(z), spread(more["teacher"]))


def variation(z, fixed, label, more):
    return 0.5 * sum(torch.abs(a - b) for a, b in zip(spread(z), spread(more["teacher"]), strict=True))


def jensen(beta):
    def value(z, fixed, label, more):
        p, q = spread(more["teacher"]), spread(z)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def skew(z, fixed, label, more):
    p, q = spread(more["teacher"]), spread(z)
    return kl(p, [0.1 * a + 0.9 * b for a, b in zip(p, q, strict=True)])


def skew_reverse(z, fixed, label, more):
    p, q = spread(more["teacher"]), spread(z)
    return kl(q, [0.9 * a + 0.1 * b for a, b in zip(p, q, strict=True)])


def adaptive(z, fixed, label, more):
    p, q, still = spread(more["teacher"]), spread(z), spread(fixed)
    head, total = set(), 0.0
    for v in sorted(range(len(p)), key=lambda v: float(p[v])):
        total += float(p[v])
        if total >= 0.5:
            head.add(v)
    gaps = [abs(float(a) - float(b)) for a, b in zip(p, still, strict=True)]
    high, low = (sum(g for v, g in enumerate(gaps) if (v in head) is side) for side in (True, False))
    share = high / (high + low) if high + low else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def decoupled(z, fixed, label, more):
    p, q = spread(more["teacher"]), spread(z)
    binary = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [v for v in range(len(p)) if v != label]
    rest = kl([p[v] / (1 - p[label]) for v in others], [q[v] / (1 - q[label]) for v in others])
    return 1.0 * binary + 0.5 * rest


def labels_and_teacher(z, fixed, label, more):
    return 0.5 * kl(spread(more["teacher"]), spread(z)) - 0.7 * log(spread(z)[label])


CASES = [
    token_case("forward", lambda: get("forward-kl", temperature=2.0), forward),
    token_case("reverse", lambda: get("reverse-kl"), reverse),
    token_case("variation", lambda: get("total-variation"), variation,
               least=None, without={"least": "its slope jumps where p = q: checked by hand below"}),
    token_case("jsd", lambda: get("jsd", beta=0.3), jensen(0.3)),
    token_case("skew", lambda: get("skew-kl"), skew),
    token_case("skew-reverse", lambda: get("skew-reverse-kl"), skew_reverse),
    token_case("adaptive", lambda: get("adaptive-kl"), adaptive),
    token_case("decoupled", lambda: get("dkd", beta=0.5), decoupled),
    token_case("labels", lambda: get("forward-kl", kd_weight=0.5, ce_weight=0.7), labels_and_teacher,
               least=None, without={"least": "the labels pull away from the teacher"}),
]  # fmt: skip


def train(seed):
    teacher, student = make_tiny("llama", seed=1, layers=2), make_tiny("llama", seed=2, layers=1)
    kept, before = state(teacher), shapes(student)
    with seeded(seed):
        made = Distiller(
            student=student, teacher=teacher, objective="jsd", train_dataset=rows(),
            args=arguments("unused", seed=seed, max_steps=30),
        )  # fmt: skip
        made.train()
    return Trained(made.losses, student, before, [(kept, teacher)])


def test_the_ends_of_jsd_are_the_two_kls():
    (case,) = [c for c in CASES if c.name == "jsd"]
    x = case.inputs(0)
    for beta, other in ((0.0, "forward-kl"), (1.0, "reverse-kl")):
        ends = [
            float(objective_loss(get(name, **more), x))
            for name, more in (("jsd", {"beta": beta}), (other, {}))
        ]
        assert ends[0] == pytest.approx(ends[1])


def objective_loss(objective, x):
    from transfuse.distill import Signal

    return objective(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)["loss"]


def test_jsd_is_bounded_and_variation_is_zero_at_equality():
    z = 50 * torch.randn(1, 30, 9, dtype=torch.float64)
    x = {"student": z, "teacher": -z, "labels": torch.ones(1, 30, dtype=torch.long)}
    assert float(objective_loss(get("jsd"), x)) <= math.log(2) + 1e-12
    assert float(objective_loss(get("total-variation"), {**x, "teacher": z})) == 0.0


def test_unknown_objectives_and_arguments():
    with pytest.raises(BadInput, match="forward-kl"):
        get("foward-kl")
    for name, given in (("jsd", {"beta": 1.5}), ("skew-kl", {"alpha": 0.0}), ("adaptive-kl", {"mu": 1.0}),
                            ("forward-kl", {"temperature": 0.0})):  # fmt: skip
        with pytest.raises(BadInput, match=next(iter(given))):
            get(name, **given)
