"""proc-kd: what only this method must hold."""

from __future__ import annotations

import math

import pytest
import torch
from distilling import Case, Trained, arguments, rng, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller
from transfuse.distill._base import Signal
from transfuse.distill.proc_kd import (
    ProCKD,
    PrototypeAugment,
    VLADAggregator,
    augment,
    proc_kd_terms,
    thirds,
    vlad,
)

# --- the definitions, by loops --------------------------------------------------------------------------------


def softmax(values):
    e = [torch.exp(v) for v in values]
    return [x / sum(e) for x in e]


def relu(x):
    return torch.clamp(x, min=0)


def unit(x):
    return x / x.square().sum().sqrt().clamp(min=1e-12)


def tokens_of(image):
    """Vectors of one map [C, h, w]."""
    return [image[:, i, j] for i in range(image.shape[1]) for j in range(image.shape[2])]


def vlad_by_hand(tokens, assign, centres):
    """One image: the residual of every token to every prototype, weighted and summed."""
    parts = []
    shares = [softmax([w @ unit(t) for w in assign]) for t in tokens]
    for k, c in enumerate(centres):
        parts.append(unit(sum(a[k] * (unit(t) - c) for a, t in zip(shares, tokens, strict=True))))
    return unit(torch.cat(parts))


def augment_by_hand(tokens, centres, embed, first, second, scale=1.0):
    found = []
    mapped = [embed @ c for c in centres]
    for x in tokens:
        own = embed @ x
        shares = softmax([scale * (c @ own) for c in mapped])
        other = sum(a * c for a, c in zip(shares, mapped, strict=True))
        found.append(relu(relu(second @ relu(first @ torch.cat([own, other]))) + x))
    return found


def joined_by_hand(layers, w, centres):
    """v of one image from its layers, lists of tokens."""
    t = [
        relu(w["aggregator.project.weight"] @ torch.cat(list(parts)) + w["aggregator.project.bias"])
        for parts in zip(*layers, strict=True)
    ]
    g = vlad_by_hand(t, w["aggregator.assign.weight"], centres)
    g = w["aggregator.reduce.weight"] @ g + w["aggregator.reduce.bias"]
    first, second = w["aggregator.first.weight"], w["aggregator.second.weight"]
    return [relu(second @ relu(first @ torch.cat([x, g]))) for x in t]


def loss_by_hand(z, z_s, z_t, z_s_fixed, labels, weights, tau):
    total = 0.0
    for i, y in enumerate(labels):
        total = total - torch.log(softmax(list(z[i]))[int(y)])
        total = total - weights[0] * torch.log(softmax(list(z_t[i]))[int(y)])
        total = total - weights[1] * torch.log(softmax(list(z_s[i]))[int(y)])
        p, q = softmax(list(z_s_fixed[i] / tau)), softmax(list(z[i] / tau))
        kl = sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))
        total = total + weights[2] * tau**2 * kl
    return total / len(labels)


# --- cases ----------------------------------------------------------------------------------------------------

D, K, CLASSES = 4, 3, 5
SHAPES = {
    "prototypes": (K, D),
    "aggregator.project.weight": (D, 7), "aggregator.project.bias": (D,),
    "aggregator.assign.weight": (K, D),
    "aggregator.reduce.weight": (D, K * D), "aggregator.reduce.bias": (D,),
    "aggregator.first.weight": (D, 2 * D), "aggregator.second.weight": (D, D),
    "augmentation.embed.weight": (D, D),
    "augmentation.first.weight": (D, 2 * D), "augmentation.second.weight": (D, D),
}  # fmt: skip
WEIGHTS = {
    name: torch.randn(*shape, generator=rng(i), dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())
}  # fmt: skip
HEAD = {
    "head.weight": torch.randn(CLASSES, D, generator=rng(50), dtype=torch.float64),
    "head.bias": torch.randn(CLASSES, generator=rng(51), dtype=torch.float64),
}
SETTINGS = {"weights": (0.5, 0.8, 1.3), "temperature": 2.0}


class Headed(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.head = nn.Linear(D, CLASSES, dtype=dtype)
        self.load_state_dict(HEAD)
        self.requires_grad_(False)


def inputs(seed):
    g = rng(seed)
    return {
        "student_map": torch.randn(3, D, 2, 3, generator=g, dtype=torch.float64),
        "early": torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64),
        "middle": torch.randn(3, 2, 2, 2, generator=g, dtype=torch.float64),
        "late": torch.randn(3, 3, 2, 2, generator=g, dtype=torch.float64),
        "student": 2 * torch.randn(3, CLASSES, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, CLASSES, (3,), generator=g),
    }


def signals(x):
    return (
        Signal(logits=x["student"], taps={"s": x["student_map"]}),
        Signal(logits=torch.zeros(3, 9), taps={name: x[name] for name in ("early", "middle", "late")}),
    )


def objective(x, **options):
    """The method as it is used, with given weights and the student's head."""
    given = {**SETTINGS, **options}
    made = ProCKD(teacher_layers=("early", "middle", "late"), student_layer="s", num_prototypes=K, **given)
    made.setup(*signals(x), x)
    made.to(torch.promote_types(x["student"].dtype, torch.float32))
    made.load_state_dict({name: value for name, value in WEIGHTS.items() if name in made.state_dict()})
    return made.bind(Headed(made.prototypes.dtype))


def whole(x):
    return objective(x).requires_grad_(False)(*signals(x), x)["loss"]


def whole_by_hand(live, fixed, w=WEIGHTS):
    def branch(tokens):
        names = ("embed", "first", "second")
        y = augment_by_hand(tokens, w["prototypes"], *(w[f"augmentation.{name}.weight"] for name in names))
        return HEAD["head.weight"] @ (sum(y) / len(y)) + HEAD["head.bias"]

    ours, still, theirs = [], [], []
    for i in range(len(live["labels"])):
        ours.append(branch(tokens_of(live["student_map"][i])))
        still.append(branch(tokens_of(fixed["student_map"][i])))
        early = fixed["early"][i]
        coarse = torch.stack(
            [
                torch.stack(
                    [early[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2)) for c in range(2)], -1
                )
                for r in range(2)
            ],
            1,
        )
        layers = [tokens_of(part) for part in (coarse, fixed["middle"][i], fixed["late"][i])]
        theirs.append(branch(joined_by_hand(layers, w, w["prototypes"])))
    still = [z.detach() for z in still]
    return loss_by_hand(live["student"], ours, theirs, still, live["labels"], (0.5, 0.8, 1.3), 2.0)


def logit_inputs(seed):
    g = rng(seed)
    found = {
        name: 2 * torch.randn(3, CLASSES, generator=g, dtype=torch.float64) for name in ("z", "z_s", "z_t")
    }
    return {**found, "labels": torch.randint(0, CLASSES, (3,), generator=g)}


def excluded(names):
    def change(x):
        changed = {name: value.clone() for name, value in x.items()}
        for name in names:
            changed[name][:, 0] = -torch.inf
        changed["labels"][changed["labels"] == 0] = 1
        return changed

    return change


WITHOUT = {"padded": "images have no padding", "least": "the labels pull away from the other branch"}
CASES = [
    Case("loss", logit_inputs,
         lambda x: proc_kd_terms(x["z"], x["z_s"], x["z_t"], x["labels"], **SETTINGS)["loss"],
         lambda live, fixed: loss_by_hand(live["z"], live["z_s"], live["z_t"], fixed["z_s"], live["labels"],
                                          (0.5, 0.8, 1.3), 2.0),
         ("z", "z_s", "z_t"), excluded=excluded(("z", "z_s", "z_t")), without=WITHOUT),
    Case("whole", inputs, whole, whole_by_hand, ("student", "student_map"),
         without={**WITHOUT, "excluded": "the head's logits are finite"}),
]  # fmt: skip


# --- training -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three convolutions, a mean, a head."""

    def __init__(self, width, classes):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values):
        return self.head(self.layer3(self.layer2(self.layer1(pixel_values))).mean((2, 3)))


def net(seed, width, classes):
    with seeded(seed):
        return Net(width, classes)


def pictures(count=24, seed=0):
    """Bars whose place is the class."""
    g = rng(seed)
    found = []
    for i in range(count):
        image = 0.2 * torch.randn(1, 8, 8, generator=g)
        image[:, 2 * (i % 3) : 2 * (i % 3) + 2] += 1.0
        found.append({"pixel_values": image, "labels": torch.tensor(i % 3)})
    return found


def trainer(folder, seed=0, student=None, given=None, teacher=True, **options):
    return Distiller(
        student=student or net(2, 4, 3), teacher=net(1, 8, 7) if teacher else None, train_dataset=pictures(),
        objective=ProCKD(**{"num_prototypes": 6, **(given or {})}),
        args=arguments(folder, seed=seed, per_device_train_batch_size=8, learning_rate=1e-2, **options),
    )  # fmt: skip


def train(seed):
    made = trainer("unused", seed, max_steps=50)
    kept, before = state(made.model.readers[0].model), shapes(made.student)
    made.train()
    return Trained(made.losses, made.student, before, [(kept, made.model.readers[0].model)])


# --- values and pitfalls --------------------------------------------------------------------------------------


def test_vlad_by_hand():
    """Two unit tokens, two prototypes, no preference: V_k = (x_1 + x_2) / 2 - c_k."""
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]], dtype=torch.float64)
    centres = torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    found = vlad(tokens, torch.zeros(2, 2, dtype=torch.float64), centres)
    root = 1 / math.sqrt(2)
    expected = torch.tensor([[root, root, 0.0, 1.0]], dtype=torch.float64) * root
    assert torch.allclose(found, expected)


def test_vlad_against_the_residuals_one_by_one():
    g = rng(0)
    tokens = torch.randn(2, 5, D, generator=g, dtype=torch.float64)
    assign, centres = torch.randn(2, K, D, generator=g, dtype=torch.float64)
    for normalise in (False, True):
        found = vlad(tokens, assign, centres, normalise=normalise)
        used = [unit(c) if normalise else c for c in centres]
        expected = torch.stack([vlad_by_hand(image, assign, used) for image in tokens])
        assert torch.allclose(found, expected)
    scaled = vlad(tokens, assign, 7 * centres)
    assert not torch.allclose(scaled, vlad(tokens, assign, centres))  # prototypes are not normalised
    assert torch.allclose(vlad(7 * tokens, assign, centres), vlad(tokens, assign, centres))  # tokens are


def test_the_softmax_of_aug_runs_over_prototypes():
    """A token's output depends on itself alone, and the shares of its prototypes sum to one."""
    g = rng(1)
    tokens = torch.randn(1, 6, D, generator=g, dtype=torch.float64)
    centres = torch.ones(K, D, dtype=torch.float64) * 0.7  # all equal: the mixture is that prototype
    matrices = [torch.randn(D, n, generator=g, dtype=torch.float64) for n in (D, 2 * D, D)]
    found = augment(tokens, centres, *matrices)
    assert torch.allclose(augment(tokens[:, :2], centres, *matrices), found[:, :2])
    single = augment(tokens, centres[:1], *matrices)
    assert torch.allclose(single, found)


@pytest.mark.parametrize("scale", [False, True])
def test_aug_by_loops_with_and_without_scale(scale):
    g = rng(2)
    tokens = torch.randn(2, 6, D, generator=g, dtype=torch.float64)
    centres = torch.randn(K, D, generator=g, dtype=torch.float64)
    matrices = [torch.randn(D, n, generator=g, dtype=torch.float64) for n in (D, 2 * D, D)]
    found = augment(tokens, centres, *matrices, scale=scale)
    factor = 1 / math.sqrt(D) if scale else 1.0
    for image, y in zip(tokens, found, strict=True):
        assert torch.allclose(y, torch.stack(augment_by_hand(image, centres, *matrices, factor)))


def test_slopes_of_everything_that_trains_beside_the_student():
    x = inputs(3)
    made = objective(x)
    found = made(*signals(x), x)["loss"]
    slopes = torch.autograd.grad(found, list(made.parameters()))
    weights = {name: value.clone().requires_grad_() for name, value in WEIGHTS.items()}
    expected = torch.autograd.grad(whole_by_hand(x, x, weights), list(weights.values()))
    for (name, _), slope in zip(made.named_parameters(), slopes, strict=True):
        assert torch.allclose(slope, expected[list(weights).index(name)], atol=1e-10), name


def test_the_kl_moves_the_plain_branch_alone():
    x = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in logit_inputs(0).items()}
    found = proc_kd_terms(x["z"], x["z_s"], x["z_t"], x["labels"])
    slopes = torch.autograd.grad(found["kl"], [x["z"], x["z_s"]], allow_unused=True)
    assert slopes[1] is None and float(slopes[0].abs().sum()) > 0
    same = proc_kd_terms(x["z"], x["z"].detach(), x["z_t"], x["labels"])
    assert float(same["kl"].detach()) == pytest.approx(0.0, abs=1e-12)


def test_no_weights_is_the_released_loop():
    """Cross-entropy of the plain branch, nothing beside it, no teacher."""
    x = inputs(4)
    made = ProCKD(student_layer="s", weights=(0, 0, 0))
    made.setup(signals(x)[0], None, x)
    found = made(signals(x)[0], None, x)
    assert found.keys() == {"loss", "ce"} and not list(made.parameters())
    assert float(found["loss"]) == pytest.approx(
        float(nn.functional.cross_entropy(x["student"], x["labels"]))
    )


def test_prototypes_of_the_student_alone_need_no_teacher(tmp_path):
    made = trainer(tmp_path, given={"weights": (0, 1, 1)}, teacher=False)
    assert made.objective.aggregator is None and made.objective.prototypes is not None
    made.train()
    assert set(made.figures[-1]) == {"loss", "ce", "augmented", "kl"}
    with pytest.raises(BadInput, match="teacher"):
        trainer(tmp_path, teacher=False)


def test_a_teacher_that_could_be_trained_is_frozen_with_a_warning(recwarn):
    student, teacher = net(2, 4, 3), net(1, 8, 7)
    ProCKD(weights=(0, 1, 1)).prepare(student, [teacher])  # no teacher is read
    assert all(p.requires_grad for p in teacher.parameters()) and not recwarn
    with pytest.warns(UserWarning, match="frozen"):
        ProCKD().prepare(student, [teacher])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    recwarn.clear()
    ProCKD().prepare(student, [teacher])
    assert not recwarn


def test_it_starts_as_the_code_does():
    """Prototypes uniform in [0, 1], 72 of them, no bias in what are its 1x1 convolutions; the seed decides."""
    x = inputs(0)
    made = [ProCKD(teacher_layers=("early", "middle", "late"), student_layer="s", seed=s) for s in (0, 0, 1)]
    for each in made:
        each.setup(*signals(x), x)
    first = made[0].prototypes.detach()
    assert first.shape == (72, D) and 0 <= float(first.min()) < 0.05 and 0.95 < float(first.max()) <= 1
    assert torch.equal(first, made[1].prototypes) and not torch.equal(first, made[2].prototypes)
    biased = {name for name, _ in made[0].named_parameters() if name.endswith("bias")}
    assert biased == {"aggregator.project.bias", "aggregator.reduce.bias"}


def test_tokens_of_transformers_are_pooled_by_their_first():
    """CLS on both sides; a map beside it keeps its mean; `pool` overrules."""
    x = inputs(5)
    rows = x["student_map"].flatten(2).transpose(1, 2)
    made = objective(x)
    y = augment(rows, *(value for name, value in WEIGHTS.items() if name[:2] in ("pr", "au")))
    for first, pooled in ((True, y[:, 0]), (False, y.mean(1))):
        expected = pooled @ HEAD["head.weight"].T + HEAD["head.bias"]
        assert torch.allclose(made.augmented(rows, first=first), expected)
    tokens, maps = Signal(taps={"s": rows}), Signal(taps={"s": x["student_map"]})
    for pool, expected in (("auto", (True, False)), ("mean", (False, False)), ("first", (True, True))):
        assert (ProCKD(pool=pool)._first(tokens), ProCKD(pool=pool)._first(maps)) == expected


def test_half_precision_is_computed_in_float32():
    x = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs(6).items()}
    again = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    made = objective({**x, "student": x["student"].float()})
    y = made.student_tokens(signals(x)[0])
    exact = objective(again).augmented(made.student_tokens(signals(again)[0]))
    assert torch.allclose(made.augmented(y).double(), exact, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = made.augmentation(y, made.prototypes).dtype, made.augmented(y).dtype
    assert kept[1] == torch.bfloat16  # the student's head follows the run
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made.augmented(y)
    assert torch.allclose(inside.double(), exact, rtol=2e-2, atol=0.2)


def test_the_thirds_of_a_stack():
    stack = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])})
    assert thirds(stack) == ("blocks.3", "blocks.7", "blocks.11")
    with pytest.raises(BadInput, match="thirds"):
        thirds(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_prototypes", 1), ("weights", (1.0, 1.0)), ("weights", (1.0, -1.0, 0.0)), ("weights", (math.nan, 1, 1)),
     ("temperature", 0.0), ("pool", "max"), ("teacher_layers", ()), ("head", ())],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        ProCKD(**{name: value})


def test_misfits_are_refused(tmp_path):
    with pytest.raises(IncompatibleModels, match="prototypes"):
        PrototypeAugment(4)(torch.zeros(1, 2, 4), torch.zeros(3, 5))
    with pytest.raises(IncompatibleModels, match="tokens"):
        PrototypeAugment(4)(torch.zeros(1, 2, 5), torch.zeros(3, 4))
    with pytest.raises(IncompatibleModels, match="teacher_layers"):
        VLADAggregator(6, 4, 3)([torch.zeros(1, 2, 4)], torch.zeros(3, 4))
    with pytest.raises(IncompatibleModels, match="prototypes"):
        VLADAggregator(6, 4, 3)([torch.zeros(1, 2, 6)], torch.zeros(3, 5))
    with pytest.raises(IncompatibleModels, match="student_layer"):
        trainer(tmp_path, given={"student_layer": "layer*"})
    with pytest.raises(BadInput, match="pattern"):
        trainer(tmp_path, given={"teacher_layers": ("stage9",)})
    with pytest.raises(BadInput, match="'classifier' is no module"):
        trainer(tmp_path, given={"head": "classifier"}).train()
    wide = net(2, 4, 3)
    wide.layer2[0], wide.layer3[0] = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 4, 3, 2, 1)
    with pytest.raises(IncompatibleModels, match="head"):
        trainer(tmp_path, student=wide, given={"student_layer": "layer2"}).train()
    wide.head = nn.Sequential(nn.Dropout(0.1), wide.head)
    with pytest.raises(IncompatibleModels, match="head"):
        trainer(tmp_path, student=wide, given={"student_layer": "layer2"}).train()
    x = inputs(0)
    with pytest.raises(NotApplicable, match="classifier"):
        ProCKD(student_layer="s").setup(Signal(logits=torch.zeros(1, 2, 3), taps=signals(x)[0].taps), None, x)
    made = ProCKD(student_layer="s", weights=(0, 1, 1))
    made.setup(signals(x)[0], None, x)
    with pytest.raises(BadInput, match="bind"):
        made(signals(x)[0], None, x)


def test_the_head_stays_the_students_and_checkpoints_hold_the_rest(tmp_path):
    made = trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=5)
    names = {name for name, _ in made.objective.named_parameters()}
    assert names == set(SHAPES)
    stops = made.objective.register_forward_pre_hook(lambda *_: halt(made.state.global_step))
    with pytest.raises(InterruptedError):
        made.train()
    assert made.objective._heads == [made.student.head]
    assert {name for name, _ in made.objective.named_parameters()} == names
    stops.remove()
    ends = []
    for resume in (str(tmp_path / "checkpoint-5"), None):
        again = trainer(tmp_path / "other", max_steps=8)
        again.train(resume_from_checkpoint=resume)
        ends.append(state(again.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def halt(step):
    if step == 7:
        raise InterruptedError
