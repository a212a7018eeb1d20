"""Objectives across tokenizers, each against its sums written out, and the batches they read."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SENTENCES, make_tiny
from cores import run_all
from distilling import Case, arguments, rng, shapes, state

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.fused import head_of
from transfuse.core.models import load_tokenizer
from transfuse.core.training import seeded
from transfuse.distill import Distiller, _cross
from transfuse.distill._base import Signal
from transfuse.distill._cross import ULD, CrossCollator, HybridULD, hybrid_terms, uld_terms

SHARED = ([0, 2, 5, 6], [1, 0, 7, 3])  # of vocabularies of 7 and 9

# Two sequences in tokens of both sides: -1 is no group; a group of several tokens on one side, the other, both.
LABELLED = [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]
GROUPS = [[-1, -1, 0, 1, 1, 2, 3], [0, 1, 2, 2, -1, -1, -1], [-1, 0, 1, 1, 2, 2, 2]]
THEIRS_LABELLED = [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
THEIR_GROUPS = [[-1, 0, 0, 1, 2, 2], [0, 1, 1, 1, 2, -1], [-1, 0, 0, 1, 2, 2]]


def inputs(seed):
    g = rng(seed)
    found = {
        "student": 1.5 * torch.randn(3, 7, 7, generator=g, dtype=torch.float64),
        "teacher": 1.5 * torch.randn(3, 6, 9, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, 7, (3, 7), generator=g),
        "teacher_labels": torch.randint(0, 9, (3, 6), generator=g),
        "groups": torch.tensor(GROUPS),
        "teacher_groups": torch.tensor(THEIR_GROUPS),
    }
    found["labels"][torch.tensor(LABELLED) == 0] = -100
    found["teacher_labels"][torch.tensor(THEIRS_LABELLED) == 0] = -100
    return found


def paired(x, b, plain):
    """Groups of one sequence that take part, as lists of positions on both sides."""
    sides = []
    for labels, groups in (("labels", "groups"), ("teacher_labels", "teacher_groups")):
        marks, found = x[labels][b].tolist(), {}
        labelled = [t for t, mark in enumerate(marks) if mark != -100]
        for t in range(len(marks)):
            n = (labelled.index(t) if t in labelled else -1) if plain else int(x[groups][b, t])
            if n >= 0:
                found.setdefault(n, []).append(t)
        sides.append({n: ts for n, ts in found.items() if all(t in labelled and t > 0 for t in ts)})
    return [(sides[0][n], sides[1][n]) for n in sides[0] if n in sides[1]]


def spread(z, temperature):
    e = torch.exp(z / temperature)
    return e / e.sum()


def merged(logits, labels, places, merge, temperature):
    base = places[0] if merge == "observed" else places[-1]
    p = spread(logits[base - 1], temperature)
    for t in places:
        if t != base:
            p = p * spread(logits[t - 1], temperature)[labels[t]]
    return p


def sorted_distance(p, q):
    p, q = (sorted(x, key=lambda v: -float(v)) for x in (p, q))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(max(len(p), len(q))):
        total = total + torch.abs((p[i] if i < len(p) else 0.0) - (q[i] if i < len(q) else 0.0))
    return total


def jensen(p, q, beta):
    if beta == 0.0:
        return sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return sum(
        beta * a * torch.log(a / c) + (1 - beta) * b * torch.log(b / c)
        for a, b, c in zip(p, q, m, strict=True)
    )


def hybrid(p, q, beta=0.5, weights=None):
    share = len(SHARED[1]) / len(p)
    first, second = weights or (share, 1 - share)
    left = [[v for i, v in enumerate(x) if i not in used] for x, used in ((p, SHARED[1]), (q, SHARED[0]))]
    same = jensen([p[i] for i in SHARED[1]], [q[i] for i in SHARED[0]], beta)
    return first * same + second * sorted_distance(*left)


def reference(distance, *, merge="observed", temperature=1.0, plain=False, kd=1.5, ce=1.0):
    def value(live, fixed):
        groups, tokens = [], []
        for b in range(len(live["labels"])):
            for ours, theirs in paired(live, b, plain):
                q = merged(live["student"][b], live["labels"][b], ours, merge, temperature)
                p = merged(fixed["teacher"][b], live["teacher_labels"][b], theirs, merge, temperature)
                groups.append(temperature**2 * distance(p, q))
            for t in range(1, live["labels"].shape[1]):
                label = int(live["labels"][b, t])
                if label != -100:
                    tokens.append(-torch.log(spread(live["student"][b, t - 1], 1.0)[label]))
        return kd * torch.stack(groups).mean() + (ce * torch.stack(tokens).mean() if ce else 0.0)

    return value


def signals(x):
    return Signal(logits=x["student"]), Signal(logits=x["teacher"])


def loss(objective):
    return lambda x: objective(*signals(x), x)["loss"]


def padded(x):
    more = {}
    for key, value in x.items():
        extra = value.new_full((len(value), 2, *value.shape[2:]), -100 if "labels" in key else -1)
        more[key] = torch.cat([value, extra + float("nan") if key in ("student", "teacher") else extra], 1)
    return more


def excluded(x):
    changed = {key: value.clone() for key, value in x.items()}
    for logits, labels in (("student", "labels"), ("teacher", "teacher_labels")):
        changed[logits][..., 4] = -torch.inf
        changed[labels][changed[labels] == 4] = 5
    return changed


def count(plain):
    return lambda x: float(sum(len(paired(x, b, plain)) for b in range(len(x["labels"]))))


def case(name, objective, value, **options):
    return Case(
        name, inputs, loss(objective), value, ("student",),
        **{
            "padded": padded, "excluded": excluded, "without": {"least": "the distance has a corner there"},
            "couples": "two means, over groups and over tokens", **options,
        },
    )  # fmt: skip


ALONE = {"ce_weight": 0.0, "kd_weight": 1.0}
LONE = {"couples": "", "count": count(False)}
CASES = [
    case("uld", ULD(), reference(sorted_distance)),
    case("uld-bayesian", ULD(merge="bayesian", **ALONE),
         reference(sorted_distance, merge="bayesian", kd=1.0, ce=0.0), **LONE),
    case("uld-warm", ULD(temperature=2.0, **ALONE),
         reference(sorted_distance, temperature=2.0, kd=1.0, ce=0.0), **LONE),
    case("uld-plain", ULD(alignment="plain", **ALONE), reference(sorted_distance, plain=True, kd=1.0, ce=0.0),
         **{**LONE, "count": count(True)}),
    case("hybrid", HybridULD(vocabulary=SHARED), reference(hybrid, kd=1.0, ce=0.0), **LONE),
    case("hybrid-fixed", HybridULD(vocabulary=SHARED, beta=0.0, shared_weight=0.3, other_weight=2.0,
                                   merge="bayesian", ce_weight=0.5),
         reference(lambda p, q: hybrid(p, q, 0.0, (0.3, 2.0)), merge="bayesian", kd=1.0, ce=0.5),
         excluded=None, without={"least": "it has a corner there",
                                 "excluded": "forward KL is infinite where the student excludes a token"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contract_of_a_core(case):
    run_all(case)


def test_terms_by_hand():
    q = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    p = torch.tensor([[0.1, 0.1, 0.6, 0.2]], dtype=torch.float64)
    # 0.5 0.3 0.2 0 against 0.6 0.2 0.1 0.1
    assert float(uld_terms(q.log(), p.log())) == pytest.approx(0.1 + 0.1 + 0.1 + 0.1)
    shared, other = hybrid_terms(q.log(), p.log(), torch.tensor([1]), torch.tensor([2]))
    m = 0.55
    assert float(shared) == pytest.approx(0.5 * 0.6 * math.log(0.6 / m) + 0.5 * 0.5 * math.log(0.5 / m))
    # 0.3 0.2 0 against 0.2 0.1 0.1
    assert float(other) == pytest.approx(0.3)
    nothing = torch.zeros(0, dtype=torch.long)
    shared, other = hybrid_terms(q.log(), p.log(), nothing, nothing)
    assert float(shared) == 0.0 and float(other) == pytest.approx(0.4)
    every = torch.arange(3)
    shared, other = hybrid_terms(q.log(), q.log(), every, every)
    assert float(shared) == pytest.approx(0.0, abs=1e-15) and float(other) == 0.0


def test_one_tokenizer_is_one_group_per_token():
    """Hybrid over a whole vocabulary that both share is JSD."""
    from transfuse.distill.survey_kd_llm import get

    g = rng(0)
    x = {
        "student": torch.randn(2, 6, 8, generator=g), "teacher": torch.randn(2, 6, 8, generator=g),
        "labels": torch.randint(0, 8, (2, 6), generator=g), "groups": torch.arange(6).repeat(2, 1),
    }  # fmt: skip
    x.update(teacher_labels=x["labels"], teacher_groups=x["groups"])
    every = list(range(8))
    objective = HybridULD(vocabulary=(every, every))
    assert float(loss(objective)(x)) == pytest.approx(float(loss(get("jsd"))(x)), rel=1e-5)
    same = {**x, "teacher": x["student"]}
    assert float(loss(objective)(same)) == pytest.approx(0.0, abs=1e-7)
    assert float(loss(ULD(**ALONE))(same)) == pytest.approx(0.0, abs=1e-6)


def test_nothing_to_align_and_nothing_to_predict():
    x = inputs(0)
    x["groups"][:] = -1
    found = ULD()(*signals(x), x)
    assert float(found["kd"]) == 0.0 and float(found["loss"]) == pytest.approx(float(found["ce"]))
    x["labels"][:] = -100
    x["student"].requires_grad_()
    found = ULD()(*signals(x), x)["loss"]
    assert float(found.detach()) == 0.0
    assert float(torch.autograd.grad(found, x["student"])[0].abs().sum()) == 0.0


def test_an_update_without_a_group_or_a_labelled_token_costs_nothing():
    labels = torch.full((1, 3), -100)
    x = {"labels": labels, "groups": labels, "teacher_labels": labels, "teacher_groups": labels}
    for predicted in (labels, torch.tensor([[-100, 3, 4]])):
        batch = {**x, "labels": predicted, "groups": torch.full((1, 3), -1)}
        both = Signal(logits=torch.randn(1, 3, 6, requires_grad=True)), Signal(logits=torch.randn(1, 3, 6))
        whole = {"items": (predicted != -100).sum(), **ULD().totals(batch)}
        found = ULD()(*both, {**batch, **whole})
        assert float(found["kd"]) == 0.0 and bool(torch.isfinite(found["loss"]))
        assert float(found["ce"]) == 0.0 or bool((predicted != -100).any())


def test_an_impossible_token_in_a_group():
    """A factor of zero: the group's distribution is zero, and no slope is NaN."""
    x = inputs(1)
    x["student"][0, 3, int(x["labels"][0, 4])] = -torch.inf
    x["student"].requires_grad_()
    found = ULD(**ALONE)(*signals(x), x)["loss"]
    assert math.isfinite(float(found.detach()))
    assert torch.autograd.grad(found, x["student"])[0].isfinite().all()


def models():
    student = make_tiny("llama", seed=2, layers=1)
    teacher = make_tiny("gpt2", seed=1, layers=2, vocab=300)
    return student, teacher


def spelling_tokenizer():
    """Another tokenizer of the same sentences: 300 tokens, begin of text first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES[:2] * 4,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<bos>", "<eos>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_fused_with_the_head_as_from_whole_logits(merge, tiny_tokenizer, monkeypatch):
    """Value and every gradient, with chunks of few tokens."""
    monkeypatch.setattr(_cross, "_CHUNK_BYTES", 4 * 400 * 5)
    monkeypatch.setattr(_cross, "_LEAST_ROWS", 5)
    student, teacher = models()
    batch = CrossCollator(tiny_tokenizer, spelling_tokenizer())(SENTENCES)
    inner = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
    runs = [
        (m, {k: b[k] for k in ("input_ids", "attention_mask")})
        for m, b in ((student, batch), (teacher, inner))
    ]
    objective = HybridULD(vocabulary=([5, 9, 20], [7, 4, 30]), merge=merge, ce_weight=0.4)
    fused = [
        Signal(hidden=m.base_model(**b, use_cache=False).last_hidden_state, head=head_of(m)) for m, b in runs
    ]
    whole = [Signal(logits=m(**b, use_cache=False).logits.double()) for m, b in runs]
    found = [objective(*each, batch) for each in (fused, whole)]
    assert {"loss", "kd", "ce", "shared", "other"} == found[0].keys() == found[1].keys()
    for name in found[0]:
        assert float(found[0][name].detach()) == pytest.approx(float(found[1][name].detach()), rel=1e-4)
    slopes = [torch.autograd.grad(each["loss"], list(student.parameters())) for each in found]
    for a, b in zip(*slopes, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


class TestCollator:
    @pytest.fixture(scope="class")
    def smollm(self):
        return load_tokenizer("smollm2-135m")

    @pytest.fixture(scope="class")
    def gemma(self):
        return load_tokenizer("gemma3-270m")

    def pairs(self, collator, batch, b=0):
        """The strings of the groups, from the ids."""
        found = []
        for prefix, tokenizer in zip(("", "teacher_"), collator.tokenizers, strict=True):
            ids, groups = batch[f"{prefix}input_ids"][b], batch[f"{prefix}groups"][b]
            found.append([tokenizer.decode(ids[groups == n]) for n in range(int(groups.max()) + 1)])
        return list(zip(*found, strict=True))

    def test_texts(self, smollm, gemma):
        collator = CrossCollator(smollm, gemma)
        texts = ["Hello  world, na\u00efve \U0001f642!", "Short."]
        batch = collator(texts)
        assert batch["labels"][0, 0] == -100 and batch["teacher_labels"][0, 0] == -100
        assert "".join(a for a, _ in self.pairs(collator, batch)) == texts[0]
        assert all(a == b for a, b in self.pairs(collator, batch))
        for prefix in ("", "teacher_"):
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            labels, groups = batch[f"{prefix}labels"], batch[f"{prefix}groups"]
            assert ids.shape == mask.shape == labels.shape == groups.shape
            assert (labels[mask == 0] == -100).all() and (groups[mask == 0] == -1).all()
            assert torch.equal(labels[:, 1:][mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1])
        assert batch["teacher_input_ids"][0, 0] == gemma.bos_token_id
        again = collator([{"text": text} for text in texts])
        assert all(torch.equal(again[name], value) for name, value in batch.items())
        kept = collator(collator.encode(texts))
        assert all(torch.equal(kept[name], value) for name, value in batch.items())

    def test_prompts_are_neither_predicted_nor_aligned(self, smollm, gemma):
        collator = CrossCollator(smollm, gemma, end=True)
        batch = collator([("Where is it?", "In Port Ellery."), {"prompt": "A:", "target": "b"}])
        pairs = self.pairs(collator, batch)
        assert "".join(a for a, _ in pairs[:-1]) == " In Port Ellery."
        assert pairs[-1] == (smollm.eos_token, gemma.eos_token)
        for prefix in ("", "teacher_"):
            assert ((batch[f"{prefix}groups"] >= 0) == (batch[f"{prefix}labels"] != -100)).all()

    def test_chats_in_either_template(self, smollm, gemma, tiny_tokenizer):
        chat = [{"role": "user", "content": "Where is it?"}]
        with pytest.raises(BadInput, match="template"):
            CrossCollator(smollm, gemma)([(chat, "There.")])
        gemma.chat_template = (
            "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.content }}{% endfor %}"
        )
        try:
            collator = CrossCollator(smollm, gemma)
            batch = collator([(chat, "In Port Ellery.")])
        finally:
            gemma.chat_template = None
        assert "".join(a for a, _ in self.pairs(collator, batch)) == "In Port Ellery."
        assert batch["input_ids"][0, 0] == smollm.convert_tokens_to_ids("<|im_start|>")
        assert batch["teacher_input_ids"][0, 1] == gemma.convert_tokens_to_ids("<start_of_turn>")

    def test_what_is_cut_off_opens_no_group(self, smollm, gemma):
        text = "Hello  world, na\u00efve \u65e5\u672c\u8a9e"
        whole, cut = (CrossCollator(smollm, gemma, max_length=n) for n in (None, 4))
        ours, theirs = (c([text]) for c in (whole, cut))
        assert theirs["input_ids"].shape[1] == theirs["teacher_input_ids"].shape[1] == 4
        assert self.pairs(cut, theirs) == [p for p in self.pairs(whole, ours) if p in self.pairs(cut, theirs)]
        assert self.pairs(cut, theirs)

    def test_bad_input(self, smollm, gemma, tiny_tokenizer):
        with pytest.raises(BadInput, match="rows"):
            CrossCollator(smollm, gemma)([3])
        with pytest.raises(BadInput, match="rows"):
            CrossCollator(smollm, gemma)(["  "])
        with pytest.raises(BadInput, match="max_length"):
            CrossCollator(smollm, gemma, max_length=1)


SHORT = ["The capital of France", "Ines Varro was born", "An answer: 1687.", "New facts"]


def trainer(folder, tokenizer, objective, data=SHORT, **options):
    student, teacher = models()
    other = spelling_tokenizer()
    return Distiller(
        student=student, teacher=teacher, objective=objective, train_dataset=data, processing_class=tokenizer,
        teacher_tokenizer=other, data_collator=CrossCollator(tokenizer, other), args=arguments(folder, **options),
    )  # fmt: skip


@pytest.mark.parametrize("objective", [ULD, lambda: ULD(alignment="plain"), HybridULD])
def test_it_trains_and_leaves_the_teacher_alone(objective, tiny_tokenizer, tmp_path):
    runs = []
    for _ in range(2):
        made = trainer(tmp_path, tiny_tokenizer, objective(), SHORT, max_steps=6, learning_rate=1e-2)
        teacher, before = made.model.readers[0].model, shapes(made.student)
        kept = state(teacher)
        with seeded(0):
            made.train()
        assert sum(made.losses[-2:]) < sum(made.losses[:2])
        assert shapes(made.student) == before
        assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
        runs.append(made)
    assert runs[0].losses == runs[1].losses
    assert runs[0].evaluate(SHORT)["eval_loss"] > 0


def test_an_update_is_one_whatever_its_micro_batches(tiny_tokenizer, tmp_path):
    """Both means are over the whole update."""
    ends = []
    for size, steps in ((2, 1), (1, 2)):
        made = trainer(
            tmp_path, tiny_tokenizer, ULD(), SHORT[:2], max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        made.train()
        ends.append((made.figures, made.student.state_dict()))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert one.keys() == other.keys() == {"loss", "kd", "ce"}
        assert all(one[name] == pytest.approx(other[name], rel=1e-4) for name in one)
    assert all(torch.allclose(ends[0][1][k], ends[1][1][k], atol=1e-5) for k in ends[0][1])


def test_the_shared_tokens_come_from_the_tokenizers(tiny_tokenizer, tmp_path):
    objective = HybridULD()
    trainer(tmp_path, tiny_tokenizer, objective)
    ours, theirs = tiny_tokenizer.get_vocab(), spelling_tokenizer().get_vocab()
    same = {(ours[k], theirs[k]) for k in ours.keys() & theirs.keys()}
    assert {(int(i), int(j)) for i, j in zip(objective.ours, objective.theirs, strict=True)} == same
    assert len(same) >= 256
    student, teacher = models()
    with pytest.raises(BadInput, match="processing_class"):
        Distiller(student=student, teacher=teacher, objective=HybridULD(), train_dataset=SENTENCES)


def test_what_makes_two_tokens_one():
    """A space is written in two ways: by their spelling words after one are not shared, by their text they are."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(words, before):
        built = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
        built.pre_tokenizer = before
        return PreTrainedTokenizerFast(tokenizer_object=built)

    ours = tokenizer(["A", "\u0120world", "!"], tokenizers.pre_tokenizers.ByteLevel())
    theirs = tokenizer(["\u2581world", "!", "?", "A"], tokenizers.pre_tokenizers.Metaspace())
    for by, pairs in (("text", {0: 3, 1: 0, 2: 1}), ("piece", {0: 3, 2: 1})):
        objective = HybridULD(by=by)
        objective.prepare(torch.nn.Identity(), [], ours, theirs)
        assert dict(zip(objective.ours.tolist(), objective.theirs.tolist(), strict=True)) == pairs


def test_a_real_model_beside_itself(smollm):
    """Rows meet the tokens they predict: one row off, the cross-entropy would be far higher."""
    from transfuse.distill._base import Reader

    model, tokenizer = smollm
    batch = CrossCollator(tokenizer, tokenizer)(["The capital of France is Paris."])
    signals = [Reader(model, prefix=prefix)(batch, grad=False) for prefix in ("", "teacher_")]
    objective = HybridULD(ce_weight=1.0)
    objective.prepare(model, [model], tokenizer, tokenizer)
    assert len(objective.ours) == len(tokenizer)
    for each in (objective, ULD()):
        found = each(*signals, batch)
        assert float(found["kd"]) == pytest.approx(0.0, abs=1e-5) and 0.0 < float(found["ce"]) < 4.0


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ULD, "alignment", "words"), (ULD, "merge", "mean"), (ULD, "temperature", 0.0), (ULD, "kd_weight", 0.0),
        (HybridULD, "by", "sound"),
        (HybridULD, "beta", 1.5), (HybridULD, "shared_weight", 0.5), (HybridULD, "vocabulary", ([1], [1, 2])),
    ],
)  # fmt: skip
def test_bad_arguments(kind, name, value):
    with pytest.raises(BadInput, match=name):
        kind(**{name: value})


def test_misfits(tiny_tokenizer, tmp_path):
    from transfuse.distill import Policy

    student, teacher = models()
    with pytest.raises(NotApplicable, match="policy"):
        Distiller(student=student, teacher=teacher, objective=ULD(), train_dataset=SENTENCES, policy=Policy())
    with pytest.raises(BadInput, match="groups"):
        Distiller(
            student=student, teacher=teacher, objective=ULD(), args=arguments(tmp_path),
            train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}],
        )  # fmt: skip
    stored = Signal(sparse=(torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 3)))
    with pytest.raises(NotApplicable, match="CrossCollator"):
        ULD().setup(Signal(logits=torch.zeros(1, 2, 3)), stored, {})
    with pytest.raises(NotApplicable, match="CrossCollator"):
        ULD().setup(Signal(logits=torch.zeros(1, 2, 3)), None, {})
