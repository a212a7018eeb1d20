"""swing-distillation: what only this method must hold, and the scorers that feed it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tiny
from distilling import Trained, arguments, rows, shapes, state, token_case

from transfuse.core.divergence import forward_kl
from transfuse.core.errors import BadInput
from transfuse.core.training import generator, seeded
from transfuse.distill import Distiller
from transfuse.distill._base import Signal
from transfuse.distill._policy import AdaptivePolicy, Policy
from transfuse.distill._rows import Collator
from transfuse.distill.swing_distillation import (
    SwingDistillation,
    TokenPrivacyScorer,
    detector_recall,
    swing_temperature,
    swing_terms,
)

CALM = {"sigma_0": 0.0, "sigma_1": 0.0}


def privacy_column(g, b, t):
    return {"privacy": torch.rand(b, t, generator=g, dtype=torch.float64)}


def spread(z, tau):
    e = [torch.exp(x / tau) for x in z]
    return [x / sum(e) for x in e]


def by_hand(kd, student_tau="swing", low=2.0, high=20.0):
    """One token, from the definition; labels count where the token is not private."""

    def value(z, fixed, label, more):
        r = float(more["privacy"])
        tau = low * math.exp(r * math.log(high / low))
        p, q = spread(more["teacher"], tau), spread(z, tau if student_tau == "swing" else low)
        total = kd * low**2 * sum(a * torch.log(a / b) for a, b in zip(p, q))
        return total - (1 - kd) * torch.log(spread(z, 1.0)[label]) if r < 0.5 else total

    return value


CASES = [
    token_case("swing", lambda: SwingDistillation(**CALM), by_hand(1.0), columns=privacy_column),
    token_case(
        "labels", lambda: SwingDistillation(kd_weight=0.6, tau_base=1.5, tau_max=6.0, **CALM),
        by_hand(0.6, low=1.5, high=6.0), columns=privacy_column,
        least=None, without={"least": "the labels pull away from the teacher"},
    ),
    token_case(
        "base", lambda: SwingDistillation(student_tau="base", **CALM), by_hand(1.0, "base"),
        columns=privacy_column,
        least=None, without={"least": "the flattened target is not the student's own distribution"},
    ),
]  # fmt: skip


def scored(count=12, seed=0):
    found = rows(count, seed=seed)
    for i, row in enumerate(found):
        row["privacy"] = [float((i + t) % 3 == 0) for t in range(len(row["input_ids"]))]
    return found


def trainer(folder, objective=None, seed=0, data=None, **options):
    teacher, student = make_tiny("llama", seed=1, layers=2), make_tiny("llama", seed=2, layers=1)
    return Distiller(
        student=student, teacher=teacher, objective=objective or SwingDistillation(), train_dataset=data or scored(),
        args=arguments(folder, seed=seed, **options),
    )  # fmt: skip


@pytest.mark.parametrize("student_tau", ["swing", "base"])
def test_a_stored_teacher_and_a_temperature_per_token(student_tau):
    """The student is tempered over its whole vocabulary, the teacher as far as it is known."""
    p, q = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]
    stored = (torch.tensor([[[0, 1]] * 3]), torch.tensor(p[:2], dtype=torch.float64).log().expand(1, 3, 2))
    signals = Signal(logits=torch.tensor(q, dtype=torch.float64).log().expand(1, 3, 4)), Signal(sparse=stored)
    scores = [0.25, 1.0]
    batch = {
        "labels": torch.tensor([[1, 2, 0]]),
        "privacy": torch.tensor([[0.0, *scores]], dtype=torch.float64),
    }
    expected = 0.0
    for r in scores:
        tau = 2.0 * 10.0**r
        own = tau if student_tau == "swing" else 2.0
        roots, theirs = [x ** (1 / own) for x in q], [x ** (1 / tau) for x in (0.5, 0.3, 0.2)]
        ours = [x / sum(roots) for x in (roots[0], roots[1], roots[2] + roots[3])]
        expected += (
            4.0 * sum(x / sum(theirs) * math.log(x / sum(theirs) / y) for x, y in zip(theirs, ours)) / 2
        )
    found = SwingDistillation(student_tau=student_tau, **CALM)(*signals, batch)["loss"]
    assert float(found) == pytest.approx(expected, rel=1e-9)


def train(seed):
    made = trainer("unused", SwingDistillation(kd_weight=0.5), seed, max_steps=40)
    kept = state(made.model.readers[0].model)
    before = shapes(made.student)
    with seeded(seed):
        made.train()
    return Trained(made.losses, made.student, before, [(kept, made.model.readers[0].model)])


def batch(seed=0, dtype=torch.float64):
    g = generator(seed)
    z = [2 * torch.randn(4, 9, 7, generator=g, dtype=dtype) for _ in range(2)]
    labels = torch.randint(0, 7, (4, 9), generator=g)
    return *z, {"labels": labels, "privacy": torch.rand(4, 9, generator=g, dtype=dtype)}


def value(objective, student, teacher, given):
    other = None if teacher is None else Signal(logits=teacher)
    return objective(Signal(logits=student), other, given)["loss"]


# --- temperatures ------------------------------------------------------------------------------------------


def test_temperatures_by_hand():
    r = torch.tensor([0.0, 0.5, 1.0])
    assert swing_temperature(r, 2.0, 20.0).tolist() == pytest.approx([2.0, math.sqrt(40.0), 20.0])
    assert swing_temperature(r, 3.0, 3.0).tolist() == pytest.approx([3.0] * 3)


def test_public_text_is_ordinary_distillation():
    student, teacher, given = batch()
    given["privacy"] = torch.zeros_like(given["privacy"])
    ours = value(SwingDistillation(**CALM), student, teacher, given)
    plain = 4.0 * forward_kl(student[:, :-1], teacher[:, :-1], temperature=2.0)
    assert float(ours) == pytest.approx(float(plain))


def test_a_private_token_gives_next_to_no_slope():
    """With tau_base^2 the slope falls as 1/tau^2; with tau^2 it would not."""
    g = generator(1)
    teacher = 3 * torch.randn(1, 20, generator=g, dtype=torch.float64)

    def slope(r, **options):
        z = torch.zeros(1, 20, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(
            swing_terms(z, teacher, torch.tensor([r]), tau_base=2.0, tau_max=200.0, **options).sum(), z
        )
        return float(found.norm())

    assert slope(1.0) < 2e-4 * slope(0.0)
    assert slope(1.0, student_tau="base") < 0.1 * slope(0.0)


def test_base_temperature_of_the_student_pushes_to_flat_predictions():
    teacher = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for kind, pushed in (("base", True), ("swing", False)):
        terms = swing_terms(
            z, teacher, torch.ones(1), tau_base=1.0, tau_max=50.0, student_tau=kind
        )  # the student has copied the secret
        (slope,) = torch.autograd.grad(terms.sum(), z)
        assert bool(slope[0, 0] > 0.1) is pushed


def test_scores_belong_to_the_predicted_token():
    """Only the token after position 2 is private: the slope at position 2 is small, and nowhere else."""
    student, teacher, given = batch()
    given["privacy"] = torch.zeros(4, 9, dtype=torch.float64)
    plain = given["privacy"].clone()
    given["privacy"][:, 3] = 1.0
    slopes = []
    for scores in (given["privacy"], plain):
        z = student.clone().requires_grad_()
        loss = value(SwingDistillation(tau_max=200.0, **CALM), z, teacher, {**given, "privacy": scores})
        slopes.append(torch.autograd.grad(loss, z)[0].norm(dim=-1))
    assert float((slopes[0][:, 2] / slopes[1][:, 2]).max()) < 0.02
    others = [t for t in range(8) if t != 2]
    assert torch.allclose(slopes[0][:, others], slopes[1][:, others])


# --- labels ------------------------------------------------------------------------------------------------


def test_labels_of_private_tokens_do_not_count():
    student, _, given = batch()
    objective = SwingDistillation(kd_weight=0.0)
    other = given["labels"].clone()
    private = given["privacy"] >= 0.5
    other[private] = (other[private] + 1) % 7
    ours, theirs = (value(objective, student, None, {**given, "labels": x}) for x in (given["labels"], other))
    assert float(ours) == float(theirs)
    log_q = torch.log_softmax(student[:, :-1], -1).gather(-1, given["labels"][:, 1:, None]).squeeze(-1)
    expected = -(log_q * ~private[:, 1:]).sum() / private[:, 1:].numel()
    assert float(ours) == pytest.approx(float(expected))


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_a_classifier_without_a_class_are_left_out(stored):
    """Of both means, whatever their score is."""
    g = generator(0)
    z, t = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    labels, scores = torch.tensor([1, -100, 2, 0, -100]), torch.tensor([0.0, 7.0, 0.2, 0.7, math.nan])
    keep = labels != -100
    log_p, ids = torch.log_softmax(t, -1).topk(2)

    def loss(rows):
        teacher = Signal(sparse=(ids[rows], log_p[rows])) if stored else Signal(logits=t[rows])
        given = {"labels": labels[rows], "privacy": scores[rows]}
        return SwingDistillation(kd_weight=0.5, **CALM)(Signal(logits=z[rows]), teacher, given)

    whole, part = loss(torch.ones(5, dtype=torch.bool)), loss(keep)
    assert {name: float(v) for name, v in whole.items()} == {name: float(v) for name, v in part.items()}
    none = loss(~keep)
    assert float(none["loss"]) == 0.0


def test_half_private_is_private():
    student, _, given = batch()
    given["privacy"] = torch.full_like(given["privacy"], 0.5)
    assert float(value(SwingDistillation(kd_weight=0.0), student, None, given)) == 0.0


# --- noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scale"), [("gaussian", 1.0), ("laplace", math.sqrt(2.0))])
def test_noise_has_its_size(kind, scale):
    objective = SwingDistillation(sigma_0=0.5, sigma_1=3.0, noise=kind)
    r = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    drawn = objective._draw(torch.zeros(3, 40_000, dtype=torch.float64), objective.sigma(r))
    assert drawn.mean(-1).tolist() == pytest.approx([0.0] * 3, abs=0.1)
    assert (drawn.std(-1) / scale).tolist() == pytest.approx([0.5, 2.0, 3.5], rel=0.02)
    kurtosis = float(((drawn[0] / drawn[0].std()) ** 4).mean())
    assert kurtosis == pytest.approx({"gaussian": 3.0, "laplace": 6.0}[kind], rel=0.12)


def test_a_budget_sets_the_noise_of_all_tokens():
    objective = SwingDistillation(epsilon=0.5, sensitivity=3.0)
    assert objective.sigma(torch.tensor([0.0, 1.0])).tolist() == [6.0, 6.0]
    assert SwingDistillation().sigma(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.1, 2.1, 4.1])
    marks = torch.tensor([0, 1])
    assert SwingDistillation(epsilon=2.0).sigma(marks).tolist() == [0.5, 0.5]
    assert SwingDistillation().sigma(marks).tolist() == pytest.approx([0.1, 4.1])


def test_noise_moves_the_target_and_takes_no_gradient():
    student, teacher, given = batch()
    objective = SwingDistillation(sigma_0=1.0)
    z, source = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = value(objective, z, source, given)
    assert torch.autograd.grad(loss, source, allow_unused=True) == (None,)
    calm = value(SwingDistillation(**CALM), student, teacher, given)
    assert abs(float((loss - calm).detach())) > 1e-3
    drawn = torch.randn(5, 7, requires_grad=True)
    terms = swing_terms(
        torch.zeros(5, 7), torch.zeros(5, 7), torch.zeros(5), tau_base=1.0, tau_max=2.0, noise=drawn
    )
    assert not terms.requires_grad


def test_noise_repeats_by_seed_and_changes_from_pass_to_pass():
    student, teacher, given = batch()
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        objective = SwingDistillation(sigma_0=1.0, seed=seed)
        runs.append([float(value(objective, student, teacher, given)) for _ in range(2)])
        assert int(objective.draws) == 2 and int(objective.state_dict()["draws"]) == 2
    assert torch.equal(before, torch.get_rng_state())
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_it_resumes_its_noise(tmp_path):
    """A run stopped after a checkpoint and continued ends with the same weights, bit for bit."""
    noisy = {"sigma_0": 1.0, "sigma_1": 2.0}
    whole = trainer(tmp_path / "whole", SwingDistillation(**noisy), max_steps=6)
    whole.train()
    first = trainer(
        tmp_path / "parts", SwingDistillation(**noisy), max_steps=6, save_strategy="steps", save_steps=3
    )

    class Stop(Exception):
        pass

    def stop(*_):
        if first.state.global_step == 4:
            raise Stop

    first.objective.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        first.train()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    second = trainer(tmp_path / "parts", SwingDistillation(**noisy), max_steps=6)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.losses == whole.losses
    ends = [each.model.state_dict() for each in (whole, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tau_max", {"tau_max": 1.0}), ("tau_base", {"tau_base": 0.0}), ("sigma_0", {"sigma_0": -1.0}),
        ("sigma_1", {"sigma_1": math.nan}), ("kd_weight", {"kd_weight": 1.5}), ("epsilon", {"epsilon": 0.0}),
        ("noise", {"noise": "uniform"}), ("student_tau", {"student_tau": "max"}), ("rest", {"rest": "none"}),
        ("sensitivity", {"sensitivity": -1.0}), ("seed", {"seed": -1}), ("seed", {"seed": 1.5}),
        ("tau_base", {"tau_base": math.inf, "tau_max": math.inf}), ("tau_max", {"tau_max": math.inf}),
        ("sigma_0", {"sigma_0": math.inf}), ("sigma_1", {"sigma_1": math.inf}),
        ("sensitivity", {"sensitivity": math.inf, "epsilon": 1.0}),
    ],
)  # fmt: skip
def test_bad_input(name, given):
    with pytest.raises(BadInput, match=name):
        SwingDistillation(**given)


def test_scores_out_of_range_or_shape():
    student, teacher, given = batch()
    objective = SwingDistillation()
    for wrong in (1.5, -0.1, math.nan):
        changed = given["privacy"].clone()
        changed[2, 3] = wrong
        with pytest.raises(ValueError, match="not between 0 and 1"):
            value(objective, student, teacher, {**given, "privacy": changed})
        masked = given["labels"].clone()
        masked[2, 3] = -100
        value(
            objective, student, teacher, {"labels": masked, "privacy": changed}
        )  # a masked place may hold anything
    for wrong in (given["privacy"][:, 1:], None):
        with pytest.raises(BadInput, match="privacy"):
            value(objective, student, teacher, {**given, "privacy": wrong})


def test_a_data_set_without_scores_is_refused(tmp_path):
    with pytest.raises(BadInput, match="privacy"):
        trainer(tmp_path, data=rows())


@pytest.mark.parametrize("policy", [Policy(prompt_tokens=2), AdaptivePolicy(prompt_tokens=2)])
def test_a_policy_has_no_scores_for_what_it_writes(tmp_path, policy):
    teacher, student = make_tiny("llama", seed=1, layers=2), make_tiny("llama", seed=2, layers=1)
    with pytest.raises(BadInput, match=r"policy.*privacy.*leave it out"):
        Distiller(
            student=student, teacher=teacher, objective=SwingDistillation(), train_dataset=scored(),
            args=arguments(tmp_path), policy=policy,
        )  # fmt: skip


# --- the column in a batch ---------------------------------------------------------------------------------


def ragged(side, masked=True):
    """A collator that pads on a side, to a multiple of four."""

    def collate(given):
        length = 4 * math.ceil(max(len(row["input_ids"]) for row in given) / 4)

        def padded(values, fill):
            more = [fill] * (length - len(values))
            return more + list(values) if side == "left" else list(values) + more

        fills = {"input_ids": 0, "labels": -100, **({"attention_mask": 0} if masked else {})}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in given]
        return {key: torch.tensor([padded(row[key], fill) for row in rows]) for key, fill in fills.items()}

    return collate


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "privacy": [0.0, 0.1, 0.2, 0.3, 0.4]},
    {"input_ids": [5, 6], "labels": [5, 6], "privacy": [0.5, 0.6]},
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_stand_where_the_tokens_do(side):
    batch = Collator(ragged(side), ("privacy",))(ROWS)
    assert batch["privacy"].shape == batch["labels"].shape
    for i, row in enumerate(ROWS):
        assert batch["privacy"][i][batch["labels"][i] != -100].tolist() == pytest.approx(row["privacy"])
    assert float(batch["privacy"].sum()) == pytest.approx(sum(sum(row["privacy"]) for row in ROWS))


def test_columns_that_are_not_per_token_are_padded_on_the_right():
    given = [{**row, "more": torch.full((i + 1, 2), 7)} for i, row in enumerate(ROWS)]
    for masked in (True, False):
        batch = Collator(ragged("left", masked), ("more",))(given)
        assert batch["more"][0].tolist() == [[7, 7], [0, 0]] and batch["more"].shape == (2, 2, 2)


def test_a_run_does_not_depend_on_the_side_of_the_padding(tmp_path):
    rows_ = scored(6)
    for i, row in enumerate(rows_):
        for key in row:
            row[key] = row[key][: 10 - 3 * (i % 3)]
    found = []
    for side in ("right", "left"):
        made = Distiller(
            student=make_tiny("llama", seed=2, layers=1), teacher=make_tiny("llama", seed=1, layers=2),
            objective=SwingDistillation(**CALM), train_dataset=rows_, data_collator=ragged(side),
            args=arguments(tmp_path, max_steps=3),
        )  # fmt: skip
        made.train()
        found.append(made.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# --- scorers -----------------------------------------------------------------------------------------------


def marked(scores, tokenizer, ids, at_least=0.5):
    """The text of the tokens whose score is high."""
    return "".join(tokenizer.decode([i]) for i, s in zip(ids, scores.tolist()) if s >= at_least)


def test_patterns_and_sub_words(tiny_tokenizer):
    """All pieces of a match have the score, whole digits or not."""
    text = "The capital of France is 4711, built in 16."
    ids = tiny_tokenizer(text)["input_ids"]
    scores = TokenPrivacyScorer.from_regex(tiny_tokenizer, [r"\d{4}"], score=0.9)([ids])[0]
    assert scores.shape == (len(ids),)
    assert "4711" in marked(scores, tiny_tokenizer, ids) and "16" not in marked(scores, tiny_tokenizer, ids)
    assert set(scores.tolist()) == {0.0, float(torch.tensor(0.9))}
    assert (scores > 0).sum() >= 2


def test_the_default_patterns(tiny_tokenizer):
    score = TokenPrivacyScorer.from_regex(tiny_tokenizer)
    for secret in (
        "ines.varro@mail.example",
        "4012 8888 8888 1881",
        "+44 20 7946 0958",
        "078-05-1120",
        "8837261",
    ):
        ids = tiny_tokenizer(f"She wrote {secret} down.")["input_ids"]
        found = marked(score([ids])[0], tiny_tokenizer, ids).strip()
        assert secret in found and "She" not in found and "down" not in found, (secret, found)
    for harmless in ("In 1687 it was built.", "Version 3.11 of the text", "A question: who? 42!"):
        assert not score([tiny_tokenizer(harmless)["input_ids"]]).any(), harmless


LETTERS = [chr(i) for i in range(128)]


@pytest.mark.parametrize(
    "number",
    ["(555)123-4567", "(555) 123-4567", "555.123.4567", "555-123-4567", "555-1234", "030/1234567", "0171 2345678",
     "(030) 1234567", "+49 30 1234567", "+1 555 123 4567", "+442071838750"],
)  # fmt: skip
def test_telephone_numbers(number):
    score = TokenPrivacyScorer.from_regex(LETTERS)
    for before, after in (("call ", " now"), ("", "."), ("tel: ", ", or"), ("(at ", ")")):
        found = score([[ord(c) for c in before + number + after]])[0].tolist()
        kept = "".join(c for c, s in zip(before + number + after, found, strict=True) if s)
        assert kept.strip("(+)") == number.strip("(+)"), (number, kept)


@pytest.mark.parametrize(
    "text",
    ["from 1990 to 1995", "1990-1995", "3.14159", "about 3.1415 of 100.25", "version 1.2.3", "12.05", "room 101",
     "pages 12-17", "1.234", "10,000", "007", "0.12345", "in 04/2021", "x555-12", "a 50-50 split", "route 66.5"],
)  # fmt: skip
def test_plain_numbers_are_not_private(text):
    assert not TokenPrivacyScorer.from_regex(LETTERS)([[ord(c) for c in text]]).any()


def test_a_word_list(tiny_tokenizer):
    text = "The mayor of Port Ellery is ines varro, not Inessa."
    ids = tiny_tokenizer(text)["input_ids"]
    scorer = TokenPrivacyScorer.from_dictionary(tiny_tokenizer, {"Ines Varro": 0.8, "Paris": 0.3})
    found = marked(scorer([ids])[0], tiny_tokenizer, ids)
    assert found.strip() == "ines varro"
    exact = TokenPrivacyScorer.from_dictionary(tiny_tokenizer, ["Ines Varro"], ignore_case=False)
    assert not exact([ids]).any()


def test_a_tagger_and_its_pieces():
    """Pieces that touch, and the continuation of an entity, have the largest probability of the whole."""
    alphabet = [chr(i) for i in range(128)]
    text = "call Jo Smith in Quenby"
    records = [
        {"entity": "B-PER", "start": 5, "end": 6, "score": 0.6},
        {"entity": "B-PER", "start": 6, "end": 7, "score": 0.7},
        {"entity": "I-PER", "start": 8, "end": 13, "score": 0.9},
        {"entity": "B-LOC", "start": 17, "end": 23, "score": 0.4},
        {"entity": "O", "start": 0, "end": 4, "score": 0.99},
    ]
    row = [ord(c) for c in text]
    scores = TokenPrivacyScorer.from_ner(alphabet, lambda text: records)([row])[0].tolist()
    assert scores == pytest.approx([0.0] * 5 + [0.9] * 8 + [0.0] * 4 + [0.4] * 6)
    people = TokenPrivacyScorer.from_ner(alphabet, lambda text: records, labels=["PER"])([row])[0]
    assert people[17:].sum() == 0 and people[5] == pytest.approx(0.9)


class Bigram(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.table = torch.nn.Parameter(3 * torch.randn(6, 6, generator=generator(seed)))

    def forward(self, input_ids):
        assert not self.training
        return self.table[input_ids]


def test_what_the_teacher_knows_and_the_public_does_not():
    teacher, public = Bigram(0).train(), Bigram(1)
    row = [0, 3, 5, 1, 1, 4]
    scores = TokenPrivacyScorer.from_reference(teacher, public, kappa=2.0)([row])[0].tolist()
    assert teacher.training
    expected = [0.0]
    for a, b in zip(row, row[1:]):  # noqa: RUF007
        gap = torch.log_softmax(teacher.table, -1)[a, b] - torch.log_softmax(public.table, -1)[a, b]
        expected.append(min(1.0, max(0.0, float(gap.detach()) / 2.0)))
    assert scores == pytest.approx(expected, abs=1e-6)
    assert 0 < sum(0 < s < 1 for s in scores) + sum(s == 1 for s in scores) < 6
    words = ["a", " b", "c", "d", " ", "e"]  # the row reads "ade b b ": three tokens are one word
    whole = TokenPrivacyScorer.from_reference(teacher, public, kappa=2.0, tokenizer=words)([row])[0].tolist()
    assert whole == pytest.approx([max(scores[:3])] * 3 + scores[3:])
    assert whole[:3] != scores[:3]


class Ruled(Bigram):
    """Gives token 4 no probability."""

    def forward(self, input_ids):
        return super().forward(input_ids).index_fill(-1, torch.tensor(4), -math.inf)


def test_what_a_model_rules_out_has_a_score():
    row = [0, 4, 1]
    for teacher, public, expected in ((Ruled, Ruled, 0.0), (Bigram, Ruled, 1.0), (Ruled, Bigram, 0.0)):
        scores = TokenPrivacyScorer.from_reference(teacher(0), public(1))([row])[0].tolist()
        assert scores[1] == expected and not math.isnan(scores[2])


def test_token_ids_may_be_tensors():
    """Of which two equal ones are two keys of a dictionary."""
    table = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 1]])
    row = [1, 2, 3, 9]
    for rows_ in (table, list(table), [list(each) for each in table], table.numpy()):
        scorer = TokenPrivacyScorer.from_rarity(rows_)
        for ids in ([row], torch.tensor([row]), [torch.tensor(row)], [list(torch.tensor(row))]):
            assert scorer(ids)[0].tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0])
        assert scorer.annotate([{"input_ids": torch.tensor(row)}])[0]["privacy"] == pytest.approx(
            [0, 0.5, 1, 1]
        )


def test_rare_tokens():
    scorer = TokenPrivacyScorer.from_rarity([[1, 2], [1, 3], [1, 2], [1, 1]])
    found = scorer([[1, 2, 3, 9]])[0].tolist()
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0])  # 4, 2, 1 and 0 of 4 rows


def test_the_larger_score_and_ragged_rows():
    letters = dict(enumerate("abc1"))
    a = TokenPrivacyScorer.from_regex(letters, ["b"], score=0.4)
    b = TokenPrivacyScorer.from_regex(letters, ["b1", "c"], score=0.7)
    assert (a | b)([[0, 1], [1, 3, 0]]).tolist() == [
        pytest.approx([0.0, 0.4, 0.0]), pytest.approx([0.7, 0.7, 0.0])
    ]  # fmt: skip
    given = [{"input_ids": [0, 1], "labels": [0, 1]}, {"input_ids": [1, 3, 0], "labels": [1, 3, 0]}]
    made = (a | b).annotate(given, batch_size=1)
    assert [len(row["privacy"]) for row in made] == [2, 3] and "privacy" not in given[0]


def test_ids_that_are_not_how_the_text_is_tokenised(tiny_tokenizer):
    """Single bytes: characters made of several tokens belong to all of them."""
    text = "Zoë 4711"
    raw = [
        tiny_tokenizer.convert_tokens_to_ids(c)
        for c in tiny_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    ]
    raw += tiny_tokenizer("4711")["input_ids"]
    assert len(raw) > 5
    scores = TokenPrivacyScorer.from_regex(tiny_tokenizer, [r"ë4711"])([raw])[0].tolist()
    assert scores == [0.0, 0.0] + [1.0] * (len(raw) - 2)


def test_recall_is_reported():
    scores = torch.tensor([[0.0, 0.9, 0.2], [0.5, 0.0, 1.0]])
    private = torch.tensor([[False, True, True], [True, False, True]])
    assert detector_recall(scores, private) == 0.75
    with pytest.raises(BadInput, match="private"):
        detector_recall(scores, torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TokenPrivacyScorer.from_regex([], []), "patterns"),
        (lambda: TokenPrivacyScorer.from_regex([], "abc"), "patterns"),
        (lambda: TokenPrivacyScorer.from_regex([], ["("]), "patterns"),
        (lambda: TokenPrivacyScorer.from_regex([], ["a"], score=2.0), "score"),
        (lambda: TokenPrivacyScorer.from_dictionary([], []), "words"),
        (lambda: TokenPrivacyScorer.from_dictionary([], [" "]), "words"),
        (lambda: TokenPrivacyScorer.from_dictionary([], "ines"), "words"),
        (lambda: TokenPrivacyScorer.from_ner([], lambda text: [], labels="PER"), "labels"),
        (lambda: TokenPrivacyScorer.from_dictionary([], {"a": -1.0}), "words"),
        (lambda: TokenPrivacyScorer.from_reference(Bigram(0), Bigram(1), kappa=0.0), "kappa"),
        (lambda: TokenPrivacyScorer.from_rarity([[1]]), "rows"),
    ],
)  # fmt: skip
def test_bad_scorers(make, name):
    with pytest.raises(BadInput, match=name):
        make()
