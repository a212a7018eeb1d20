"""talking-models: what only this method must hold."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny
from distilling import Case, Trained, rng, rows, shapes, state
from torch import nn

from transfuse.core.batches import minibatches, pad_collator
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.taps import decoder_layers
from transfuse.core.training import generator, seeded
from transfuse.distill._messages import Messengers, activation, from_places, places
from transfuse.distill._resume import Cut, default_cut, resume_from
from transfuse.distill.talking_models import TalkingModels, distance, talk

# --- the conversation by hand ----------------------------------------------------------------------------


def parts(rounds, student=(4, 4), teacher=(6, 6), relu=False):
    """Encoders and decoders, a teacher's upper layers and a student's head, all with fixed weights."""
    with seeded(7):
        activations = (torch.relu,) * 3 if relu else (None, None, None)
        messengers = Messengers(student, teacher, 3, 5, rounds, activations)
        upper, head = nn.Linear(teacher[0], teacher[1]), nn.Linear(student[1], 3)
    return messengers, upper, head


def conversation(
    name, *, rounds=1, tokens=False, student=(4, 4), teacher=(6, 6), relu=False, normalise=False
):
    def inputs(seed):
        g = rng(seed)
        lead = (3, 4) if tokens else (5,)
        widths = {"low": student[0], "high": student[1], "teacher": teacher[0]}
        made = {key: torch.randn(*lead, d, generator=g, dtype=torch.float64) for key, d in widths.items()}
        made["labels"] = torch.randint(0, 3, lead, generator=g)
        if tokens:
            made["keep"] = torch.ones(3, 4, dtype=torch.int64)
            made["keep"][0, 3] = made["keep"][2, 1] = 0
        return made

    def loss(x):
        messengers, upper, head = (each.double() for each in parts(rounds, student, teacher, relu))
        messengers = messengers.to(torch.promote_types(x["low"].dtype, torch.float32))
        dtype = next(messengers.parameters()).dtype
        upper, head = upper.to(dtype), head.to(dtype)
        keep = x["keep"].bool() if tokens else None

        def task(state):
            values = nn.functional.cross_entropy(
                head(state).flatten(0, 1), x["labels"].flatten(), reduction="none"
            )
            return values[keep.flatten()].mean() if tokens else values.mean()

        states = [places(x[key]) for key in ("low", "high", "teacher")]
        found = talk(
            messengers, *states, lambda t: torch.tanh(upper(t)), task, rounds=rounds, keep=keep,
            normalise=normalise,
        )  # fmt: skip
        return found["interact"] + 0.5 * found["message"] + 2 * found["state"]

    @torch.no_grad()
    def reference(live, fixed):
        messengers, upper, head = (each.double() for each in parts(rounds, student, teacher, relu))
        weights = dict(messengers.named_parameters())

        def mlp(prefix, v):
            v = torch.clamp(weights[f"{prefix}.0.weight"] @ v + weights[f"{prefix}.0.bias"], min=0)
            return weights[f"{prefix}.2.weight"] @ v + weights[f"{prefix}.2.bias"]

        def bent(v):
            return torch.clamp(v, min=0) if relu else v

        def squares(a, b):
            return ((a - b) ** 2).sum() / len(a)

        def states_apart(a, b):
            if normalise:
                a, b = ((v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5) for v in (a, b))
            return squares(a, b)

        total, count = torch.zeros((), dtype=torch.float64), 0
        lows, highs, knowns, labels = (
            live[key].reshape(-1, live[key].shape[-1]) if key != "labels" else live[key].reshape(-1)
            for key in ("low", "high", "teacher", "labels")
        )
        counted = live["keep"].reshape(-1).tolist() if tokens else [1] * len(labels)
        for s_l, s_u, t_l, y, use in zip(lows, highs, knowns, labels.tolist(), counted, strict=True):
            if not use:
                continue
            count += 1
            e_low, e_high = f"student_encoders.{len(s_l)}", f"student_encoders.{len(s_u)}"
            t_high = f"teacher_encoders.{teacher[1]}"
            said, meant = mlp(e_low, s_l), mlp(e_high, s_u)
            known = mlp(f"teacher_encoders.{len(t_l)}", t_l)
            total = total + 2 * states_apart(bent(mlp("student_decoder", meant)), s_u)
            total = total + 2 * states_apart(bent(mlp("teacher_decoder", known)), t_l)
            for turn in range(rounds):
                thought = torch.tanh(upper.weight @ bent(mlp("teacher_decoder", said)) + upper.bias)
                answer = mlp(t_high, thought)
                understood = bent(mlp("student_decoder", answer))
                z = head.weight @ understood + head.bias
                nll = torch.log(torch.exp(z).sum()) - z[y]
                total = total + (states_apart(understood, s_u) + nll) / rounds
                total = total + 0.5 * (squares(said, known) + squares(meant, answer)) / rounds
                if turn + 1 < rounds:
                    said = mlp(e_low, bent(mlp("again", understood)))
        return total / count

    def padded(x):
        more = {}
        for key, value in x.items():
            extra = value.new_zeros(3, 2, *value.shape[2:])
            more[key] = torch.cat([value, extra + 1e3 if value.is_floating_point() else extra], 1)
        return more

    without = {
        "least": "the losses are zero only where encoders and decoders are inverses, which random ones are not",
        "excluded": "hidden states have no excluded entries",
    }
    if not tokens:
        without["padded"] = "one vector per sample: nothing is padded; the case of tokens has padding"
    return Case(
        name, inputs, loss, reference, ("low", "high", "teacher"), padded=padded if tokens else None,
        count=(lambda x: float(x["keep"].sum())) if tokens else (lambda x: float(len(x["labels"]))),
        without=without,
    )  # fmt: skip


CASES = [
    conversation("one-round"),
    conversation("three-rounds-relu", rounds=3, relu=True),
    conversation("widths-differ", student=(4, 7), teacher=(6, 5), rounds=2),
    conversation("tokens", tokens=True, rounds=2),
    conversation("normalised", normalise=True),
]


def MLP(seed, width, outputs=2, inputs=6, kind=nn.Sequential):
    """Modules 0 to 4; the hidden states are those of 1 and 3."""
    with seeded(seed):
        return kind(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )


PLACES = {"student_layers": ("1", "3"), "teacher_layers": ("1", "3")}


def data(count=40, seed=0):
    x = torch.randn(count, 6, generator=generator(seed))
    return minibatches({"input": x, "labels": (x[:, 0] * x[:, 1] > 0).long()}, 10, seed=seed)


def train(seed):
    student, teacher = MLP(1, 8), MLP(2, 16, 5)
    kept, before = [(state(teacher), teacher)], shapes(student)
    talking = TalkingModels(student, teacher, message_dim=6, hidden=12, rounds=2, **PLACES)
    history = talking.fit(data(seed=seed), epochs=12, lr=1e-2, seed=seed)
    return Trained(history.losses, student, before, kept)


# --- resuming from a hidden state ------------------------------------------------------------------------


def test_a_sequential_is_resumed_without_what_is_below():
    model = MLP(1, 8)
    x = torch.randn(4, 6)
    low, high = model[:2](x), model[:4](x)
    assert torch.equal(resume_from(model, "1", low), model(x))
    assert torch.equal(resume_from(model, "1", low, to="3"), high)
    assert torch.equal(resume_from(model, "4", model(x)), model(x))


def test_a_sequential_inside_a_model_and_one_with_its_own_forward():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = MLP(1, 8, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(2 * x))

    class Own(nn.Sequential):
        def forward(self, x):
            return 3 * super().forward(x)

    x = torch.randn(4, 6)
    other = torch.randn(4, 8)
    outer, own = Outer(), MLP(1, 8, kind=Own)
    above = nn.Sequential(*list(own)[2:])(other)
    cases = ((outer, "body.1", outer.head(outer.body[2:](other))), (own, "1", 3 * above))
    for model, place, expected in cases:
        with pytest.raises(BadInput, match="batch"):
            resume_from(model, place, other)
        assert torch.allclose(resume_from(model, place, other, batch={"x": x}), expected)
    assert torch.allclose(resume_from(outer, "body.1", other, to="body.3"), outer.body[2:4](other))


def encoder(kind, layers=3):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"d_model": 32, "encoder_layers": layers, "decoder_layers": layers} if kind in ("bart",) else {}
    if kind == "t5":
        sizes = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": layers,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        }
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_labels=3,
        intermediate_size=48, pad_token_id=0, eos_token_id=1, **sizes,
    )  # fmt: skip
    with seeded(3):
        return AutoModelForSequenceClassification.from_config(config).eval()


def padded_batch():
    ids = torch.randint(3, 50, (3, 7), generator=generator(5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 0
    ids[:, -1] = ids[:, -1].masked_fill(mask[:, -1] == 1, 1)
    ids[1, 4] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma3"])
def test_a_decoder_stack_is_resumed_with_mask_and_positions(kind):
    model = make_tiny(kind, layers=4)
    batch = padded_batch()
    _, _, output = Cut(model, *default_cut(model)).states(batch, grad=False, whole=True)
    names = decoder_layers(model)
    for low in names:
        for high in names[names.index(low) + 1 :]:
            cut = Cut(model, low, high)
            a, b, _ = cut.states(batch, grad=False, whole=False)
            assert torch.allclose(cut.between(a, batch), b, atol=1e-5)
            assert torch.allclose(cut.above(b, batch).logits, output.logits, atol=1e-4)
            assert torch.allclose(resume_from(model, low, a, batch=batch).logits, output.logits, atol=1e-4)
    cut = Cut(model, names[1], names[3])
    other = torch.randn(a.shape, generator=generator(1), requires_grad=True)
    (slope,) = torch.autograd.grad(cut.between(other, batch).square().sum(), other)
    assert float(slope.abs().max()) > 0


def stack_of(kind):
    return {
        "bert": "bert.encoder.layer", "bart": "model.encoder.layers", "t5": "transformer.encoder.block",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "bart", "t5"])
def test_encoders_and_encoder_decoders(kind):
    """T5's blocks hand a position bias on, in tuples; BART's second stack is not the one that is skipped."""
    model, batch = encoder(kind), padded_batch()
    places_ = [f"{stack_of(kind)}.{i}" for i in range(3)]
    if kind == "bart":
        places_ = [name.replace("encoder", "decoder") for name in places_]
    with torch.no_grad():
        whole = model(**batch).logits
        for low, high in ((0, 1), (0, 2), (1, 2)):
            cut = Cut(model, places_[low], places_[high])
            a, b, _ = cut.states(batch, grad=False, whole=False)
            assert torch.allclose(cut.between(a, batch), b, atol=1e-5)
            assert torch.allclose(cut.above(b, batch).logits, whole, atol=1e-5)
            other = torch.randn(a.shape, generator=generator(1))
            changed = resume_from(model, places_[low], other, batch=batch).logits
            assert not torch.allclose(changed, whole, atol=1e-3)
            assert torch.allclose(cut.above(cut.between(other, batch), batch).logits, changed, atol=1e-5)


def test_nothing_is_left_behind():
    model, batch = make_tiny("llama", layers=3), padded_batch()
    before = model(**batch).logits
    cut = Cut(model, "model.layers.0", "model.layers.2")
    a, _, _ = cut.states(batch, grad=False, whole=False)
    cut.between(torch.randn_like(a), batch)
    with pytest.raises(RuntimeError):
        cut.between(torch.randn(3, 7, 5), batch)
    assert torch.equal(model(**batch).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Nested(nn.Module):
    """`stem`, `block`, `top`, and `aside`, which nothing reads; `top` comes first by its name's place."""

    def __init__(self, seed, width):
        super().__init__()
        with seeded(seed):
            self.early, self.top, self.block = Block(width), Block(width), Block(width)
            self.stem, self.aside, self.head = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, input):
        self.aside(input)
        return self.head(self.top(self.block(self.early(self.stem(input)))))


def test_cuts_that_do_not_cut_are_refused():
    """A place inside the other, one that runs before the other, one that nothing reads."""
    model, hidden = Nested(1, 8), torch.randn(4, 8)
    with pytest.raises(BadInput, match="lower"):
        Cut(model, "block", "block.a")
    with pytest.raises(BadInput, match="not above"):
        resume_from(model, "block", hidden, batch={"input": torch.zeros(4, 6)}, to="block.a")
    good = ("early", "top")
    for cuts, name in (
        ({"student_layers": good, "teacher_layers": ("top", "block")}, "teacher_layers"),
        ({"student_layers": ("early", "aside"), "teacher_layers": good}, "student_layers"),
        ({"student_layers": good, "teacher_layers": ("early", "aside")}, "teacher_layers"),
    ):
        student = Nested(1, 8)
        talking = TalkingModels(student, Nested(2, 10), **cuts)
        with pytest.raises(BadInput, match=f"{name}.*do not cut"):
            talking.fit(data())
        assert torch.equal(student.head.weight, Nested(1, 8).head.weight)
    TalkingModels(Nested(1, 8), Nested(2, 10), student_layers=good, teacher_layers=good).fit(data(), epochs=1)


def Maps(seed, width, *, inplace=True, norm=False, stride=1):
    """Cut at convolutions, with what writes in place after them."""
    with seeded(seed):
        norms = [nn.BatchNorm2d(width)] if norm else []
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, stride=stride), nn.ReLU(inplace),
            nn.Conv2d(width, width, 3, padding=1), *norms, nn.ReLU(inplace),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
        )  # fmt: skip


def pictures(count=12):
    x = torch.randn(count, 1, 6, 6, generator=generator(0))
    return [{"input": x, "labels": (x.mean((1, 2, 3)) > 0).long()}]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("place", [("0", "2"), ("1", "3"), ("1", "2")])
def test_modules_that_write_in_place_change_nothing(place, stride):
    """Neither the states that were read nor what was decoded is overwritten, means or not."""
    found = []
    for inplace in (False, True):
        talking = TalkingModels(
            Maps(1, 4, inplace=inplace), Maps(2, 6, inplace=inplace, stride=stride), rounds=2,
            student_layers=place, teacher_layers=place,
        )  # fmt: skip
        found.append((talking.fit(pictures(), epochs=3).losses, talking.figures))
        assert talking._means == (stride == 2)
    assert found[0] == found[1]


def test_a_resumed_state_is_not_written_into():
    model, hidden = Maps(1, 4), torch.randn(2, 4, 6, 6)
    kept = hidden.clone()
    resume_from(model, "2", hidden)
    assert torch.equal(hidden, kept)
    spread = from_places(torch.randn(2, 1, 4), hidden)
    spread.relu_()


@pytest.mark.parametrize("kind", [None, "own"])
def test_running_statistics_are_those_of_the_students_own_pass(kind):
    class Own(nn.Sequential):  # resumed by running it whole
        def forward(self, input):
            return super().forward(input)

    student, teacher = Maps(1, 4, norm=True), Maps(2, 6, norm=True)
    if kind:
        student, teacher = Own(*student), Own(*teacher)
    fresh = copy.deepcopy(student)
    norm, batch = student[3], pictures()[0]
    TalkingModels(student, teacher, student_layers=("0", "2"), teacher_layers=("0", "2"), rounds=2).fit(
        [batch] * 3, epochs=1, lr=0.0
    )
    for _ in range(3):
        fresh.train()(batch["input"])
    assert int(norm.num_batches_tracked) == 3 and norm.track_running_stats
    assert torch.allclose(norm.running_mean, fresh[3].running_mean, atol=1e-6)
    assert torch.allclose(norm.running_var, fresh[3].running_var, atol=1e-6)


def test_default_places():
    assert default_cut(MLP(1, 8)) == ("0", "3")
    assert default_cut(make_tiny("llama", layers=6)) == ("model.layers.1", "model.layers.5")
    with pytest.raises(BadInput, match="stack"):
        default_cut(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="two layers"):
        default_cut(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


# --- states, places, messages ----------------------------------------------------------------------------


def test_places_and_back():
    g = generator(0)
    vector, tokens, maps = (torch.randn(s, generator=g) for s in ((2, 5), (2, 3, 5), (2, 5, 3, 4)))
    for state_ in (vector, tokens, maps):
        assert torch.equal(from_places(places(state_), state_), state_)
    assert places(maps).shape == (2, 12, 5) and torch.equal(places(maps)[1, 5], maps[1, :, 1, 1])
    keep = torch.tensor([[True, True, False], [True, True, True]])
    mean = places(tokens, pooled=True, keep=keep)
    assert torch.allclose(mean[0, 0], tokens[0, :2].mean(0)) and torch.allclose(mean[1, 0], tokens[1].mean(0))
    spread = from_places(mean, maps)
    assert spread.shape == maps.shape and torch.equal(spread[0, :, 0, 0], spread[0, :, 2, 3])
    half = from_places(torch.full((1, 1, 2), 1e6), torch.zeros(1, 2, dtype=torch.float16))
    assert half.dtype == torch.float16 and bool(half.isfinite().all())


def test_decoded_states_go_through_the_activation_of_their_place():
    assert isinstance(activation(nn.ReLU()), nn.ReLU) and activation(nn.Linear(1, 1)) is None
    assert activation(nn.PReLU()) is None  # has weights of its own
    talking = TalkingModels(MLP(1, 8), MLP(2, 16), **PLACES)
    talking.fit(data(), epochs=1)
    heard = talking.messengers.teacher_hears(torch.randn(50, 1, 64))
    assert float(heard.detach().min()) == 0.0 and float(heard.detach().max()) > 0
    plain = TalkingModels(MLP(1, 8), MLP(2, 16), student_layers=("0", "2"), teacher_layers=("0", "2"))
    plain.fit(data(), epochs=1)
    assert float(plain.messengers.teacher_hears(torch.randn(50, 1, 64)).detach().min()) < 0


def test_distance_of_normalised_states_ignores_scale():
    a = torch.randn(2, 1, 5, generator=generator(0))
    assert float(distance(a, 7 * a + 3, normalise=True)) < 1e-5
    assert float(distance(a, 7 * a + 3)) > 1


def test_constant_messages_are_told():
    messengers, upper, head = parts(1)
    g = generator(0)
    low = torch.randn(20, 1, 4, generator=g)
    run = lambda x: talk(  # noqa: E731
        messengers, x, low, torch.randn(20, 1, 6, generator=g), upper, lambda s: head(s).mean()
    )["variance"]
    assert float(run(low)) > 1e-4
    assert float(run(low[:1].expand(20, 1, 4))) == pytest.approx(0.0, abs=1e-9)


# --- training --------------------------------------------------------------------------------------------


def test_the_student_learns_to_speak_through_the_frozen_teacher():
    """The gradient of what was understood reaches E_s and the student's low layer, and no weight of the teacher."""
    student, teacher = MLP(1, 8), MLP(2, 16, 5)
    talking = TalkingModels(student, teacher, message=0.0, state=0.0, **PLACES)
    talking.fit(data(), epochs=1, lr=0.0, weight_decay=0.0)
    speaks = talking.messengers.student_encoders["8"]
    batch = next(iter(data()(0)))
    teacher.requires_grad_(False)
    talking._step(batch)  # states are read as in training
    low, high, _ = talking.asking.states(batch, grad=True, whole=True)
    found = talk(
        talking.messengers, places(low), places(high), places(teacher[:2](batch["input"])), teacher[2:4],
        lambda s: nn.functional.cross_entropy(student[4](s.squeeze(1)), batch["labels"]),
    )  # fmt: skip
    wanted = [speaks[0].weight, student[0].weight]
    slopes = torch.autograd.grad(found["interact"], wanted)
    assert all(float(slope.abs().max()) > 0 for slope in slopes)


def test_two_steps_against_autograd():
    """The whole objective: L_task + interact L_interact + message L_message + state L_state, by Adam."""
    options = {"interact": 0.7, "message": 0.4, "state": 1.3, "message_dim": 5, "hidden": 7}
    x = torch.randn(10, 6, generator=generator(0))
    y = (x[:, 0] > 0).long()
    student, teacher = MLP(1, 8), MLP(2, 16, 5)
    talking = TalkingModels(student, teacher, **PLACES, **options)
    talking.fit([{"input": x, "labels": y}], epochs=2, lr=1e-2, weight_decay=1e-4, seed=3)

    again = MLP(1, 8)
    with seeded(3):
        fresh = Messengers((8, 8), (16, 16), 5, 7, 1, (torch.relu,) * 3)
    weights = [*again.parameters(), *fresh.parameters()]
    rule = torch.optim.Adam(weights, lr=1e-2, weight_decay=1e-4)
    e_s, e_t, relu = fresh.student_encoders["8"], fresh.teacher_encoders["16"], torch.relu
    d_s, d_t = fresh.student_decoder, fresh.teacher_decoder
    mse, ce = nn.functional.mse_loss, nn.functional.cross_entropy
    for _ in range(2):
        s_l, s_u, t_l = again[:2](x), again[:4](x), teacher[:2](x).detach()
        answer = e_t(teacher[2:4](relu(d_t(e_s(s_l)))))
        understood = relu(d_s(answer))
        loss = ce(again[4](s_u), y)
        loss = loss + 0.7 * (mse(understood, s_u) + ce(again[4](understood), y))
        loss = loss + 0.4 * (mse(e_s(s_l), e_t(t_l)) + mse(e_s(s_u), answer))
        loss = loss + 1.3 * (mse(relu(d_s(e_s(s_u))), s_u) + mse(relu(d_t(e_t(t_l))), t_l))
        for parameter, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            parameter.grad = slope
        rule.step()
    found = [*student.parameters(), *talking.messengers.parameters()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, weights, strict=True))


def test_without_weights_it_is_the_task_alone():
    student, alone = MLP(1, 8), MLP(1, 8)
    TalkingModels(student, MLP(2, 16), interact=0.0, message=0.0, state=0.0, **PLACES).fit(data(), epochs=2)
    rule = torch.optim.Adam(alone.parameters(), lr=3e-3, weight_decay=1e-4)
    for epoch in (0, 1):
        for batch in data()(epoch):
            loss = nn.functional.cross_entropy(alone(batch["input"]), batch["labels"])
            for parameter, slope in zip(
                alone.parameters(), torch.autograd.grad(loss, [*alone.parameters()]), strict=True
            ):
                parameter.grad = slope
            rule.step()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(student.parameters(), alone.parameters(), strict=True)
    )


def test_the_teacher_is_in_evaluation_mode_and_its_state_comes_back():
    teacher = MLP(2, 16).train()
    teacher.insert(2, nn.Dropout(0.9))
    kept = state(teacher)
    losses = []
    for mode in (True, False):
        teacher.train(mode)
        talking = TalkingModels(MLP(1, 8), teacher, student_layers=("1", "3"), teacher_layers=("1", "4"))
        losses.append(talking.fit(data(), epochs=2).losses)
        assert teacher.training == mode and all(p.requires_grad for p in teacher.parameters())
    assert losses[0] == losses[1]
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    TalkingModels(
        MLP(1, 8), teacher, tune_teacher=True, student_layers=("1", "3"), teacher_layers=("1", "4")
    ).fit(data(), epochs=1)
    assert not torch.equal(kept["3.weight"], teacher[3].weight)
    assert torch.equal(kept["5.weight"], teacher[5].weight)  # above the high place nothing is used


@pytest.mark.parametrize("rounds", [1, 2])
def test_language_models_talk_token_by_token_and_padding_does_not_matter(rounds):
    collate = pad_collator(0)
    examples = rows(4)
    examples[0] = {key: value[:6] for key, value in examples[0].items()}
    losses = []
    for extra in (0, 3):
        batch = collate(examples)
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[key] = nn.functional.pad(batch[key], (0, extra), value=fill)
        talking = TalkingModels(
            make_tiny("llama", seed=2, layers=2, hidden=16), make_tiny("qwen2", seed=1, layers=3), rounds=rounds,
            student_layers=("model.layers.0", "model.layers.1"),
        )  # fmt: skip
        losses.append(talking.fit([batch], epochs=3, lr=1e-2).losses)
        assert talking._means is False
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


class Conv(nn.Module):
    def __init__(self, seed, widths, stride):
        super().__init__()
        with seeded(seed):
            self.stage1 = nn.Conv2d(1, widths[0], 3, padding=1)
            self.stage2 = nn.Conv2d(widths[0], widths[1], 3, stride=stride, padding=1)
            self.head = nn.Linear(widths[1], 2)

    def forward(self, pixel_values):
        return self.head(self.stage2(torch.relu(self.stage1(pixel_values))).mean((2, 3)))


def test_maps_and_means():
    """Equal maps are exchanged place by place; others, and a vector with a map, as means."""
    x = torch.randn(16, 1, 6, 6, generator=generator(0))
    batches = [{"pixel_values": x, "input": x.flatten(1), "labels": (x.mean((1, 2, 3)) > 0).long()}]
    cut = {"student_layers": ("stage1", "stage2"), "teacher_layers": ("stage1", "stage2")}
    for student, options, means in (
        (Conv(1, (3, 4), 1), cut, False),
        (Conv(1, (3, 4), 2), cut, True),
        (MLP(1, 8, inputs=36), {**cut, "student_layers": ("1", "3")}, True),
    ):
        talking = TalkingModels(student, Conv(2, (5, 6), 1), rounds=2, message_dim=8, **options)
        losses = talking.fit(batches, epochs=25, lr=1e-2).losses
        assert talking._means == means and losses[-1] < losses[0]
    with pytest.raises(IncompatibleModels, match="pooled"):
        TalkingModels(Conv(1, (3, 4), 2), Conv(2, (5, 6), 1), pooled=False, **cut).fit(batches)
    TalkingModels(Conv(1, (3, 4), 1), Conv(2, (5, 6), 1), pooled=True, **cut).fit(batches, epochs=1)


class Texts(nn.Module):
    def __init__(self, seed, width):
        super().__init__()
        with seeded(seed):
            self.table, self.low = nn.Embedding(20, width), nn.Linear(width, width)
            self.high, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, input_ids):
        return self.head(self.high(torch.relu(self.low(self.table(input_ids)))).mean(1))


def test_sequences_of_the_teachers_own_are_exchanged_as_means():
    """Whatever the lengths of the first batch: that they are equal there means nothing."""
    g = generator(0)

    def batch(ours, theirs):
        ids = [torch.randint(0, 20, (4, n), generator=g) for n in (ours, theirs)]
        return {"input_ids": ids[0], "theirs": ids[1], "labels": torch.tensor([0, 1, 0, 1])}

    cut = {"student_layers": ("low", "high"), "teacher_layers": ("low", "high")}
    for batches in ([batch(5, 5), batch(5, 6)], [batch(5, 6), batch(5, 5)]):
        talking = TalkingModels(
            Texts(1, 8), Texts(2, 10), teacher_inputs=lambda b: {"input_ids": b["theirs"]}, **cut
        )
        talking.fit(batches, epochs=2)
        assert talking._means is True
    own = TalkingModels(Texts(1, 8), Texts(2, 10), **cut)
    own.fit([batch(5, 5)], epochs=1)
    assert own._means is False


def test_a_batch_without_labelled_rows_has_no_task():
    batches = list(data()(0))
    batches[1] = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    talking = TalkingModels(MLP(1, 8), MLP(2, 16), interact=0.5, **PLACES)
    talking.fit(batches, epochs=1)
    assert talking.figures[1]["task"] == 0.0 < talking.figures[0]["task"]
    assert (
        float(distance(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool))) == 0.0
    )


def test_numbers_as_labels_and_the_teachers_own_inputs():
    x = torch.randn(30, 6, generator=generator(0))
    batches = [{"input": x, "wide": x.repeat(1, 2), "labels": x[:, 0]}]
    student, teacher = MLP(1, 8, 1), MLP(2, 16, inputs=12)
    talking = TalkingModels(student, teacher, teacher_inputs=lambda b: {"input": b["wide"]}, **PLACES)
    talking.fit(batches, epochs=60, lr=1e-2)
    error = float((student(x).squeeze(1) - x[:, 0]).square().mean())
    assert error < 0.3 * float(x[:, 0].var())
    assert talking.figures[-1]["task"] < talking.figures[0]["task"]
    assert set(talking.figures[0]) == {"task", "interact", "message", "state", "variance"}
    doubled = TalkingModels(
        MLP(1, 8, 1), MLP(2, 16), task_loss=lambda z, y: 2 * (z[:, 0] - y).square().mean(), **PLACES
    )
    plain = TalkingModels(MLP(1, 8, 1), MLP(2, 16), **PLACES)
    first = [each.fit(batches, epochs=1) and each.figures[0]["task"] for each in (doubled, plain)]
    assert first[0] == pytest.approx(2 * first[1])


def test_mixed_precision_keeps_messages_exact():
    messengers = Messengers((4, 4), (6, 6), 3, 5)
    x = torch.randn(3, 1, 4)
    exact = messengers.student_says(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(messengers.student_says(x), exact)
        assert messengers.student_encoders["4"](x).dtype == torch.bfloat16  # what would happen


def test_half_precision_models():
    teacher = MLP(2, 16).bfloat16()
    x = torch.randn(8, 6, generator=generator(0))
    batches = [{"input": x, "labels": (x[:, 0] > 0).long()}]
    halved = lambda batch: {"input": batch["input"].bfloat16()}  # noqa: E731
    losses = TalkingModels(MLP(1, 8), teacher, teacher_inputs=halved, **PLACES).fit(batches, epochs=20).losses
    assert losses[-1] < losses[0]


def test_it_resumes(tmp_path):
    class Stop(Exception):
        pass

    def run(folder, stop=None):
        student = MLP(1, 8)
        talking = TalkingModels(student, MLP(2, 16), rounds=2, **PLACES)
        own = talking._step

        def step(batch):
            if stop is not None and len(talking.figures) == stop:
                raise Stop
            return own(batch)

        talking._step = step
        talking.fit(data(), epochs=2, output_dir=folder, save_every=3)
        return student

    whole = run(None)
    with pytest.raises(Stop):
        run(tmp_path / "run", 5)
    again = run(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    def fit(teacher=2, **options):
        talking = TalkingModels(MLP(1, 8), MLP(teacher, 16), **{**PLACES, **options})
        return talking.fit(data(), epochs=1, output_dir=tmp_path)

    fit()
    assert fit().resumed_at
    for other in ({"interact": 0.5}, {"normalise": True}, {"teacher_layers": ("1", "2")}, {"teacher": 3}):
        with pytest.raises(BadInput, match="other arguments"):
            fit(**other)


# --- what is refused -------------------------------------------------------------------------------------


def test_bad_places():
    with pytest.raises(BadInput, match=r"student_layers.*layers.1"):
        TalkingModels(
            make_tiny("llama", layers=2), MLP(2, 16), student_layers=("model.layer.1", "model.norm")
        )
    with pytest.raises(BadInput, match=r"teacher_layers.*lower"):
        TalkingModels(MLP(1, 8), MLP(2, 16), student_layers=("1", "3"), teacher_layers=("3", "1"))
    with pytest.raises(BadInput, match="lower"):
        TalkingModels(MLP(1, 8), MLP(2, 16), student_layers=("1", "1"), teacher_layers=("1", "3"))
    with pytest.raises(BadInput, match="pattern"):
        TalkingModels(MLP(1, 8), MLP(2, 16), student_layers=("*", "3"))
    with pytest.raises(BadInput, match="not above"):
        resume_from(MLP(1, 8), "3", torch.zeros(1, 8), to="1")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("message_dim", {"message_dim": 0}),
        ("hidden", {"hidden": 0}),
        ("rounds", {"rounds": 0}),
        ("interact", {"interact": -1.0}),
        ("message", {"message": float("nan")}),
        ("state", {"state": -0.1}),
    ],
)
def test_bad_input(name, options):
    with pytest.raises(BadInput, match=name):
        TalkingModels(MLP(1, 8), MLP(2, 16), **PLACES, **options)


def test_bad_models_and_data():
    student = MLP(1, 8)
    with pytest.raises(BadInput, match="itself"):
        TalkingModels(student, student, **PLACES)
    for batches in ([], [{"input": torch.zeros(2, 6)}]):
        with pytest.raises(BadInput, match="labels"):
            TalkingModels(student, copy.deepcopy(student), **PLACES).fit(batches)
