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
    policy, student = AdaptivePolicy(buffer=5, max_new_tokens=1), make_tiny("llama", seed=2, layers=1)
    for loss, phi in ((2.0, 0.0), (1.5, 0.0), (1.6, 0.1), (1.5, 0.2), (1.4, 0.2), (9.0, 0.3)):
        policy.on_evaluate(loss)
        assert float(policy.phi) == pytest.approx(phi)
    policy.phi.fill_(0.5)
    draws, made = [], []
    monkeypatch.setattr("random.random", lambda: draws.pop(0))

    def sampled(student, b):
        """Two rows of two tokens and of one after the prompt 1 2; each row has a number of its own."""
        number = 10 * (len(made) + 1)
        made.append({
            "input_ids": torch.tensor([[1, 2, number, 5], [1, 2, number + 1, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
            "labels": torch.tensor([[-100, -100, number, 5], [-100, -100, number + 1, -100]]),
        })  # fmt: skip
        return made[-1]

    monkeypatch.setattr(policy, "sampled", sampled)
    found = batch(2)

    def ask(draw, progress):
        draws.append(draw)
        return policy.replace(student, found, progress=progress)

    def numbers():
        return [ids[2] for ids, _ in policy.stored]

    assert ask(0.6, 0.0) is found
    assert ask(0.4, 0.9) is made[0] and numbers() == [10, 11]  # not below 0.05, but the buffer has room
    assert ask(0.4, 0.9) is made[1] and numbers() == [10, 11, 20, 21]
    assert ask(0.4, 0.9) is made[2] and numbers() == [11, 20, 21, 30, 31]  # rows count, and the oldest goes
    pairs = set()
    for _ in range(60):  # full: stored rows of any batch, no row twice
        again = ask(0.4, 0.9)
        chosen = [int(row[2]) for row in again["input_ids"]]
        assert len(set(chosen)) == 2 and set(chosen) < set(numbers()) and len(made) == 3
        pairs.add(tuple(chosen))
        for ids, mask, labels, number in zip(*again.values(), chosen, strict=True):
            own = [number] if number % 10 else [number, 5]
            assert ids[mask.bool()].tolist() == [1, 2, *own]
            assert labels.tolist() == [-100, -100, *own] + [-100] * (len(ids) - 2 - len(own))
            assert mask.sum() == 2 + len(own)
    assert len(pairs) > 10  # of 20
    assert ask(0.04, 0.9) is made[3] and numbers() == [21, 30, 31, 40, 41]  # new
    assert ask(0.5, 0.0) is found
    assert set(policy.state_dict()) == {"phi", "best"}
    with pytest.raises(BadInput, match="buffer"):
        AdaptivePolicy(buffer=1).replace(student, found, progress=0.0)


def test_the_teacher_writes_the_other_batches():
    """GKD's seq_kd: the student with probability `fraction`, else the teacher; the data never."""
    student, teacher = make_tiny("llama", seed=2, layers=1), make_tiny("llama", seed=1, layers=2)
    found, expected = batch(), {}
    for name, model in (("student", student), ("teacher", teacher)):
        with seeded(3):
            expected[name] = continuations(model, prompts_of(found), torch.device("cpu"), max_new_tokens=6)
    assert not torch.equal(expected["student"]["input_ids"], expected["teacher"]["input_ids"])
    for fraction, writer in ((0.0, "teacher"), (1.0, "student")):
        policy = Policy(fraction=fraction, max_new_tokens=6, seq_kd=True)
        policy.prepare([teacher.train()])
        with seeded(3):
            made = policy.replace(student, found, progress=0.0)
        assert made.keys() == expected[writer].keys()
        assert all(torch.equal(value, expected[writer][name]) for name, value in made.items()), writer
        assert teacher.training and not policy.state_dict()  # the teacher is no part of it
    adaptive = AdaptivePolicy(max_new_tokens=6, seq_kd=True)
    adaptive.prepare([teacher])
    with seeded(3):
        assert torch.equal(
            adaptive.replace(student, found, progress=0.0)["labels"], expected["teacher"]["labels"]
        )
    for teachers in ([], [teacher, student], [torch.nn.Linear(2, 2)]):
        with pytest.raises(BadInput, match="seq_kd"):
            Policy(seq_kd=True).prepare(teachers)
    with pytest.raises(BadInput, match="prepare"):
        Policy(fraction=0.0, seq_kd=True).replace(student, found, progress=0.0)
    with pytest.raises(BadInput, match="seq_kd"):
        Distiller(
            student=student, objective="cross-entropy", train_dataset=rows(4), policy=Policy(seq_kd=True)
        )


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
