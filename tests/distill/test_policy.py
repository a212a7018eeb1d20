"""Which sequences the student learns on."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from distilling import arguments, rows

from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput
from transfuse.core.training import seeded
from transfuse.distill import AdaptivePolicy, Distiller, Policy
from transfuse.distill._policy import continuations, prompts_of


def batch(count=4):
    return pad_collator(0)(rows(count))


def test_prompts_are_what_comes_before_the_labels():
    found = batch()
    assert prompts_of(found) == [row["input_ids"][:2] for row in rows(4)]
    whole = {**found, "labels": found["input_ids"]}
    with pytest.raises(BadInput, match="prompt_tokens"):
        prompts_of(whole)
    assert [len(p) for p in prompts_of(whole, 3)] == [3] * 4


def test_continuations_are_the_models_own():
    """Samples under a fixed seed; the end of text counts, what follows it does not; no prompt is predicted."""
    model = make_tiny("llama", seed=2, layers=1).train()
    with seeded(0):
        free = continuations(model, prompts_of(batch(8)), torch.device("cpu"), max_new_tokens=12)
    model.generation_config.eos_token_id = [2, int(free["input_ids"][0, 5])]  # ends there, at least
    with seeded(0):
        found = continuations(model, prompts_of(batch(8)), torch.device("cpu"), max_new_tokens=12)
    assert model.training
    ended, stops = 0, set(model.generation_config.eos_token_id)
    for ids, mask, labels in zip(found["input_ids"], found["attention_mask"], found["labels"], strict=True):
        n = int(mask.sum())
        assert (labels[:2] == -100).all() and (labels[2:n] == ids[2:n]).all() and (labels[n:] == -100).all()
        tokens = labels[2:n].tolist()
        assert 1 <= len(tokens) <= 12 and not stops & set(tokens[:-1])
        ended += tokens[-1] in stops
    assert ended
    with seeded(0):
        again = continuations(model, prompts_of(batch(8)), torch.device("cpu"), max_new_tokens=12)
    assert torch.equal(found["input_ids"], again["input_ids"])


def test_the_share_of_batches():
    model = make_tiny("llama", seed=2, layers=1)
    found = batch()
    assert Policy(fraction=0.0).replace(model, found, progress=0.0) is found
    always = Policy(fraction=1.0, max_new_tokens=3).replace(model, found, progress=0.0)
    assert always["input_ids"].shape[1] <= 5
    with seeded(1):
        half = Policy(fraction=0.5, max_new_tokens=1)
        kept = sum(half.replace(model, found, progress=0.0) is found for _ in range(60))
    assert 18 <= kept <= 42


def test_the_adaptive_scheme_by_hand(monkeypatch):
    policy = AdaptivePolicy(buffer=2, max_new_tokens=1)
    for loss, phi in ((2.0, 0.0), (1.5, 0.0), (1.6, 0.1), (1.5, 0.2), (1.4, 0.2), (9.0, 0.3)):
        policy.on_evaluate(loss)
        assert float(policy.phi) == pytest.approx(phi)
    policy.phi.fill_(0.5)
    draws = []
    monkeypatch.setattr("random.random", lambda: draws.pop(0))
    monkeypatch.setattr(policy, "sampled", lambda student, b: {"made": len(policy.stored)})
    found = {"data": True}

    def ask(draw, progress):
        draws.append(draw)
        return policy.replace(None, found, progress=progress)

    assert ask(0.6, 0.0) is found
    assert ask(0.4, 0.9) == {"made": 0}  # not below 0.05, but the buffer has room
    assert ask(0.4, 0.9) == {"made": 1}
    assert "made" in ask(0.4, 0.9) and len(policy.stored) == 2  # full: a stored one
    assert ask(0.04, 0.9) == {"made": 2} and len(policy.stored) == 2  # new, the oldest goes
    assert ask(0.5, 0.0) is found
    assert set(policy.state_dict()) == {"phi", "best"}


def test_on_policy_training(tmp_path):
    """Gradients do not pass the sampling; the number of tokens is that of the samples."""
    student, teacher = make_tiny("llama", seed=2, layers=1), make_tiny("llama", seed=1, layers=2)
    made = Distiller(
        student=student, teacher=teacher, objective="reverse-kl", train_dataset=rows(16),
        policy=Policy(fraction=1.0, max_new_tokens=8), args=arguments(tmp_path, max_steps=30),
    )  # fmt: skip
    with seeded(0):
        made.train()
    assert sum(made.losses[-5:]) < sum(made.losses[:5])
    batches, items = made.get_batch_samples(iter(made.get_train_dataloader()), 1, torch.device("cpu"))
    assert int(items) == int((batches[0]["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize(
    ("name", "value"), [("fraction", 1.5), ("fraction", -0.1), ("max_new_tokens", 0), ("temperature", 0.0)]
)
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        Policy(**{name: value})
    with pytest.raises(BadInput, match="buffer"):
        AdaptivePolicy(buffer=0)
