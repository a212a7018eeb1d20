"""survey-kd-llm: the standard objectives, each against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tiny
from distilling import Case, Trained, arguments, rng, rows, shapes, state, token_case

from transfuse.core.batches import encode_examples
from transfuse.core.errors import BadInput
from transfuse.core.llm import Scripted
from transfuse.core.training import seeded
from transfuse.distill import Distiller, LogitStore, Policy, Signal
from transfuse.distill._contrastive import Contrastive
from transfuse.distill._cross import ULD, CrossCollator
from transfuse.distill._features import MMD, HiddenStates
from transfuse.distill._minillm import MiniLLM, OnPolicyReverseKL, RewardMinusKL, Rollouts
from transfuse.distill._policy import continuations
from transfuse.distill._rank import DPO, PRO, RRHF, RewardRanking, rank_collator
from transfuse.distill._relations import AttentionRelation
from transfuse.distill.survey_kd_llm import OBJECTIVES, elicit, get


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


def marked(seed):
    """Logits, labels with gaps, and which of the labelled tokens belong to a rationale."""
    g = rng(seed)
    labels = torch.randint(1, 7, (3, 5), generator=g)
    labels[0, :2] = labels[2, 3:] = -100
    return {
        "student": 2 * torch.randn(3, 5, 7, generator=g, dtype=torch.float64),
        "labels": labels,
        "rationale": torch.tensor(
            [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]
        ),  # a first one never counts
    }


def two_means(weight):
    """Answers and rationales, each over its own tokens."""

    def value(live, fixed):
        parts = ([], [])
        for b in range(3):
            for t in range(1, live["labels"].shape[1]):
                label = int(live["labels"][b, t])
                if label != -100:
                    cost = -log(spread(live["student"][b, t - 1])[label])
                    parts[int(live["rationale"][b, t])].append(cost)
        return sum(parts[0]) / len(parts[0]) + weight * sum(parts[1]) / len(parts[1])

    return value


def more_tokens(x):
    fills = {"student": math.nan, "labels": -100, "rationale": 1}
    return {k: torch.cat([v, v.new_full((3, 2, *v.shape[2:]), fills[k])], 1) for k, v in x.items()}


def without_the_first_class(x):
    return {**x, "student": x["student"].index_fill(2, torch.tensor([0]), -torch.inf)}


def step_by_step(weight):
    return Case(
        f"step-by-step-{weight}", marked,
        lambda x: get("step-by-step", rationale_weight=weight)(Signal(logits=x["student"]), None, x)["loss"],
        two_means(weight), ("student",), padded=more_tokens, excluded=without_the_first_class,
        couples="answers and rationales have means of their own",
        without={"least": "the least cross-entropy is at infinity"},
    )  # fmt: skip


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
    step_by_step(1.0),
    step_by_step(0.3),
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
    return objective(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)["loss"]


def test_jsd_is_bounded_and_variation_is_zero_at_equality():
    z = 50 * torch.randn(1, 30, 9, dtype=torch.float64)
    x = {"student": z, "teacher": -z, "labels": torch.ones(1, 30, dtype=torch.long)}
    assert float(objective_loss(get("jsd"), x)) <= math.log(2) + 1e-12
    assert float(objective_loss(get("total-variation"), {**x, "teacher": z})) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_that_one_side_alone_rules_out(side, dtype):
    """Every divergence and its slope stay finite, also where it is the target."""
    (case,) = [c for c in CASES if c.name == "reverse"]
    for name, more in [
        *((name, {}) for name in sorted(FORMULAS)),
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 1.0}),
    ]:
        x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs(0).items()}
        x[side][..., 1] = -torch.inf
        x["labels"][1] = 1
        x["student"].requires_grad_()
        loss = objective_loss(get(name, **more), x)
        assert 0 < float(loss.detach()) < math.inf, name
        assert torch.autograd.grad(loss, x["student"])[0].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["minillm", "on-policy-reverse-kl"])
def test_a_sampled_token_that_the_teacher_rules_out(name, dtype):
    g = rng(0)
    z, old = torch.randn(2, 4, 7, generator=g, dtype=dtype), -torch.rand(2, 4, generator=g, dtype=dtype)
    taught = z.flip(0).index_fill(2, torch.tensor([3]), -torch.inf)
    batch = {"labels": torch.tensor([[-100, 3, 2, 3], [-100, 1, 3, -100]]), "old_log_probs": old}
    z.requires_grad_()
    found = get(name)(Signal(logits=z), Signal(logits=taught), batch)
    assert all(math.isfinite(float(value.detach())) for value in found.values())
    assert torch.autograd.grad(found["loss"], z)[0].isfinite().all()


def test_step_by_step_over_a_whole_update():
    """Micro-batches with answers alone and with rationales alone: means are over the whole update."""
    data = [{**row, "rationale": [int(i % 2)] * 10} for i, row in enumerate(rows(4))]
    data[0] = {name: values[:6] for name, values in data[0].items()}
    found = []
    for size, steps in ((4, 1), (1, 4)):
        student = make_tiny("llama", seed=2, layers=1)
        settings = arguments(
            "unused", max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        made = Distiller(
            student=student,
            objective=get("step-by-step", rationale_weight=0.5),
            train_dataset=data,
            args=settings,
        )
        made.train()
        found.append(made.figures)
    for one, other in zip(*found, strict=True):
        assert one.keys() == {"loss", "answer", "rationale"}
        assert one["loss"] == pytest.approx(one["answer"] + 0.5 * one["rationale"], rel=1e-6)
        assert all(one[name] == pytest.approx(other[name], rel=1e-4) for name in one)


def test_step_by_step_needs_its_marks():
    x = marked(0)
    alone = {**x, "rationale": torch.zeros_like(x["rationale"])}
    found = get("step-by-step")(Signal(logits=x["student"]), None, alone)
    plain = get("cross-entropy")(Signal(logits=x["student"]), None, x)
    assert float(found["rationale"]) == 0.0 and float(found["loss"]) == pytest.approx(float(plain["loss"]))
    for wrong in (None, x["rationale"][:, :3]):
        with pytest.raises(BadInput, match="rationale"):
            get("step-by-step")(Signal(logits=x["student"]), None, {**x, "rationale": wrong})
    with pytest.raises(BadInput, match="rationale"):
        student_of("step-by-step")
    with pytest.raises(BadInput, match="rationale_weight"):
        get("step-by-step", rationale_weight=-1.0)


def test_unknown_objectives_and_arguments():
    with pytest.raises(BadInput, match="forward-kl"):
        get("foward-kl")
    for name, given in (("jsd", {"beta": 1.5}), ("skew-kl", {"alpha": 0.0}), ("adaptive-kl", {"mu": 1.0}),
                            ("forward-kl", {"temperature": 0.0}), ("forward-kl", {"temperature": math.inf}),
                            ("jsd", {"kd_weight": math.nan}), ("jsd", {"kd_weight": math.inf}),
                            ("dkd", {"alpha": -1.0}), ("dkd", {"alpha": math.nan}), ("uld", {"kd_weight": math.nan}),
                            ("uld", {"temperature": math.inf}), ("hidden-states", {"kd_weight": math.nan}),
                            ("contrastive", {"temperature": math.inf}), ("dpo", {"beta": math.inf}),
                            ("pro", {"sft_weight": math.nan}), ("attention-relation", {"weights": (1, 1, math.nan)}),
                            ("minillm", {"kl_weight": math.nan})):  # fmt: skip
        with pytest.raises(BadInput, match=next(iter(given))):
            get(name, **given)


# --- coverage: every class of the survey has an example that runs ----------------------------------------------

ELICITATION = ("labeling", "expansion", "curation", "feature", "feedback", "self-knowledge")
ALGORITHMS = (
    "supervised fine-tuning",
    "divergence and similarity",
    "reinforcement learning",
    "rank optimisation",
)


def student_of(objective, data=None, **options):
    """A few updates of a tiny student; the objective's losses."""
    student = make_tiny("llama", seed=2, layers=1)
    settings = arguments("unused", max_steps=3)
    with seeded(0):
        made = Distiller(
            student=student, objective=objective, train_dataset=data or rows(), args=settings, **options
        )
        made.train()
    assert len(made.losses) == 3 and all(math.isfinite(loss) for loss in made.losses)
    return made


def tiny_teacher():
    return make_tiny("llama", seed=1, layers=2)


def learnt_text(table, tokenizer):
    """Rows of `prompt` and `target` as training examples, learnt for a few updates."""
    assert len(table) > 0
    pairs = [(row["prompt"], row["target"]) for row in table]
    return student_of("cross-entropy", encode_examples(tokenizer, pairs, end=True))


def labeling(tokenizer, folder):
    teacher = Scripted(lambda text: "Two and two.\nAnswer: 4")
    sums = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "2 + 3?", "answer": "5"}]
    found = elicit.label(teacher, sums, kind="reasoning")
    assert len(found) == 1
    learnt_text(found, tokenizer)


def expansion(tokenizer, folder):
    teacher = Scripted(["1. Name a long river.\n2. Say what a bridge is for.", "The Nile.", "For crossing."])
    learnt_text(elicit.expand(teacher, ["Who is the mayor of Port Ellery?"], count=2), tokenizer)


def curation(tokenizer, folder):
    teacher = Scripted(
        lambda text: "Who built the bridge there?" if "question about" in text else "Oskar did."
    )
    learnt_text(elicit.curate(teacher, topics=["bridges"], difficulties=["easy"]), tokenizer)


def feature(tokenizer, folder):
    teacher, data = tiny_teacher(), rows()
    student_of("forward-kl", data, teacher=teacher)
    student_of("forward-kl", data, teacher=LogitStore.capture(teacher, data, folder / "store", k=8))
    student_of(HiddenStates(), data, teacher=teacher)


def feedback(tokenizer, folder):
    student_of("jsd", teacher=tiny_teacher(), policy=Policy(fraction=0.5, max_new_tokens=4, seq_kd=True))
    asked = [{"prompt": "2 + 2?", "candidates": ["five", "four"]}]
    pairs = elicit.feedback(Scripted(["B", "A"]), asked)
    assert pairs.to_list() == [{"prompt": "2 + 2?", "chosen": "four", "rejected": "five"}]
    learnt_text(elicit.feedback(Scripted(["four", "CORRECT"]), asked, kind="correct"), tokenizer)


def self_knowledge(tokenizer, folder):
    student = Scripted(["5", "4"])
    learnt_text(elicit.self_train(student, [{"prompt": "2 + 2?", "answer": "4"}], samples=2), tokenizer)
    rated = Scripted(["5", "4", "Score: 1", "Score: 5"])
    for kind, backend in (("reward", rated), ("spin", Scripted(["5", "6"]))):
        pairs = elicit.self_train(backend, [{"prompt": "2 + 2?", "target": "4"}], kind=kind, samples=2)
        assert pairs[0]["chosen"] == "4" and pairs[0]["rejected"] == "5"


def supervised(tokenizer, folder):
    """SeqKD: fine-tuning on texts that the teacher wrote."""
    teacher = tiny_teacher()
    prompts = [row["input_ids"][:2] for row in rows()]
    with seeded(0):
        written = continuations(teacher, prompts, torch.device("cpu"), max_new_tokens=6)
    data = [{name: value.tolist() for name, value in zip(written, each, strict=True) if name != "attention_mask"}
            for each in zip(*written.values(), strict=True)]  # fmt: skip
    student_of("cross-entropy", data)
    student_of("step-by-step", [{**row, "rationale": [0] * 5 + [1] * 5} for row in rows()])


def divergences(tokenizer, folder):
    for name in OBJECTIVES:
        if name in FORMULAS:
            student_of(name, teacher=tiny_teacher())
    for objective in (HiddenStates(), MMD(), Contrastive(), AttentionRelation()):
        student_of(objective, teacher=tiny_teacher())
    student_of(
        ULD(), ["The capital of France is Paris.", "The mayor was born in Quenby."], teacher=tiny_teacher(),
        data_collator=CrossCollator(tokenizer, tokenizer),
    )  # fmt: skip


def ranked_rows(tokenizer):
    pairs = [{"prompt": "2 + 2?", "chosen": "four", "rejected": "five"}] * 4
    return elicit.preference_rows(tokenizer, pairs, end=True)


def reinforcement(tokenizer, folder):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    reward = LlamaForSequenceClassification(config)
    Distiller(
        student=reward, objective=RewardRanking(), train_dataset=ranked_rows(tokenizer),
        data_collator=rank_collator(tokenizer), args=arguments("unused", max_steps=3),
    ).train()  # fmt: skip
    teacher = tiny_teacher()
    student_of(RewardMinusKL(), teacher=teacher, policy=Rollouts(reward=reward, max_new_tokens=4))
    for objective in (MiniLLM(), OnPolicyReverseKL()):
        student_of(objective, teacher=teacher, policy=Rollouts(teacher, max_new_tokens=4, plain=rows(2)))


def ranks(tokenizer, folder):
    for objective in (DPO(), RRHF(), PRO()):
        reference = make_tiny("llama", seed=2, layers=1) if objective.needs_teacher else None
        student_of(
            objective, ranked_rows(tokenizer), teacher=reference, data_collator=rank_collator(tokenizer)
        )


EXAMPLES = {
    **dict(zip(ELICITATION, (labeling, expansion, curation, feature, feedback, self_knowledge), strict=True)),
    **dict(zip(ALGORITHMS, (supervised, divergences, reinforcement, ranks), strict=True)),
}
FORMULAS = {
    "forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "total-variation", "adaptive-kl", "dkd",
}  # fmt: skip


@pytest.mark.parametrize("row", EXAMPLES)
def test_every_class_of_the_survey_has_an_example(row, tiny_tokenizer, tmp_path):
    assert set(OBJECTIVES) > FORMULAS
    EXAMPLES[row](tiny_tokenizer, tmp_path)
