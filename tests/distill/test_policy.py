"""Which sequences the student learns on."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from distilling import arguments, rows

from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput, NotApplicable
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


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 50.0}, {"min_p": 0.99}, {"suppress_tokens": list(range(3, 400))}, {"num_beams": 3},
     {"typical_p": 0.01}, {"no_repeat_ngram_size": 1}, {"top_k": 1}, {"min_new_tokens": 9}, {"do_sample": False},
     {"forced_eos_token_id": 5}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
@pytest.mark.parametrize("adapter", [False, True])
def test_a_models_own_generation_settings_do_not_count(settings, adapter):
    model = make_tiny("llama", seed=2, layers=1)
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    prompts, found = prompts_of(batch(8)), []
    for given in ({}, settings):
        for name, value in given.items():
            setattr(model.generation_config, name, value)
        before = model.generation_config
        with seeded(0):
            found.append(continuations(model, prompts, torch.device("cpu"), max_new_tokens=8)["input_ids"])
        assert model.generation_config is before
        assert all(getattr(before, name) == value for name, value in given.items())
    assert torch.equal(*found)


def test_samples_follow_the_students_distribution():
    model, prompt = make_tiny("llama", seed=2, layers=1, vocab=40), [1, 5, 6, 7]
    model.generation_config.repetition_penalty = 1.5
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    with seeded(0):
        found = continuations(model, [prompt] * 20000, torch.device("cpu"), max_new_tokens=1)
    drawn = torch.bincount(found["labels"][:, len(prompt)], minlength=40) / 20000
    assert float((drawn - expected).abs().sum()) / 2 < 0.02


@pytest.mark.parametrize("kind", ["student", "teacher", "adaptive"])
def test_truncated_vocabularies_bound_what_is_written(tmp_path, kind):
    """What is drawn has a meaning to the narrower model."""
    data = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 8
    sizes = (60, 400) if kind == "teacher" else (400, 60)
    models = [make_tiny("llama", seed=2 - i, layers=1, vocab=size) for i, size in enumerate(sizes)]
    policy = {
        "student": Policy(fraction=1.0, max_new_tokens=16),
        "teacher": Policy(fraction=0.0, seq_kd=True, max_new_tokens=16),
        "adaptive": AdaptivePolicy(max_new_tokens=16),
    }[kind]
    made = Distiller(student=models[0], teacher=models[1], objective="jsd", policy=policy, align_vocab="truncate",
                     train_dataset=data, args=arguments(tmp_path, max_steps=2))  # fmt: skip
    if kind == "adaptive":
        policy.phi.fill_(1.0)
    made.train()
    assert policy.vocabulary == 60
    written = policy.replace(models[0], batch(4) if kind != "teacher" else batch(2), progress=0.0)
    assert int(written["labels"].max()) < 60
    again = make_tiny("llama", seed=1, layers=1)
    Distiller(student=make_tiny("llama", seed=2, layers=1), teacher=again, objective="jsd", policy=policy,
              train_dataset=rows(8), args=arguments(tmp_path))  # fmt: skip
    assert policy.vocabulary is None


def test_sampling_leaves_every_submodules_mode(tmp_path):
    model = make_tiny("llama", seed=2, layers=1).train()
    model.model.layers[0].eval()
    Policy(fraction=1.0, max_new_tokens=2).replace(model, batch(), progress=0.0)
    assert model.training and not model.model.layers[0].training


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


def test_a_policy_used_before_starts_afresh(tmp_path):
    policy = AdaptivePolicy(max_new_tokens=2)
    for _ in range(2):
        made = Distiller(
            student=make_tiny("llama", seed=2, layers=1), teacher=make_tiny("llama", seed=1, layers=1),
            objective="jsd", policy=policy, train_dataset=rows(8), eval_dataset=rows(4),
            args=arguments(tmp_path, max_steps=2),
        )  # fmt: skip
        assert float(policy.phi) == 0.0 and float(policy.best) == torch.inf and not policy.stored
        made.evaluate()
        made.evaluate()  # no better
        assert float(policy.phi) == pytest.approx(0.1)
        policy.phi.fill_(1.0)
        made.train()
        assert policy.stored


def test_the_mean_of_several_evaluations_counts(tmp_path):
    policy = AdaptivePolicy(max_new_tokens=2)
    made = Distiller(
        student=make_tiny("llama", seed=2, layers=1), teacher=make_tiny("llama", seed=1, layers=1),
        objective="jsd", policy=policy, train_dataset=rows(8), args=arguments(tmp_path),
        eval_dataset={"a": rows(4), "b": rows(4, seed=1)},
    )  # fmt: skip
    found = made.evaluate()
    assert float(policy.best) == pytest.approx((found["eval_a_loss"] + found["eval_b_loss"]) / 2)
    made.evaluate()
    assert float(policy.phi) == pytest.approx(0.1)


def test_a_loss_that_is_nan_is_no_better():
    policy = AdaptivePolicy()
    for loss in (2.0, float("nan"), 3.0, 1.0):
        policy.on_evaluate(loss)
    assert float(policy.phi) == pytest.approx(0.2) and float(policy.best) == 1.0


def test_a_student_that_does_not_write_is_refused(tmp_path):
    net = torch.nn.Linear(4, 3)
    with pytest.raises(NotApplicable, match="policy"):
        Distiller(student=net, teacher=torch.nn.Linear(4, 3), objective="forward-kl", policy=Policy(),
                  train_dataset=[{"input": torch.zeros(4), "labels": 1}], args=arguments(tmp_path))  # fmt: skip


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
    ("name", "value"),
    [("fraction", 1.5), ("fraction", -0.1), ("max_new_tokens", 0), ("max_new_tokens", 2.5), ("temperature", 0.0),
     ("temperature", float("inf")), ("prompt_tokens", 0), ("prompt_tokens", -3)],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        Policy(**{name: value})
    with pytest.raises(BadInput, match="buffer"):
        AdaptivePolicy(buffer=0)
    for increase in (-0.1, 1.5, float("nan")):
        with pytest.raises(BadInput, match="increase"):
            AdaptivePolicy(increase=increase)
