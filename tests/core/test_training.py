"""core.training: seeds, the closure minimiser, the loop, fit, and what survives kill -9."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import socket
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from transfuse.core.batches import EpochOrder
from transfuse.core.checkpoints import clear_checkpoints, last_checkpoint, rng_state, set_rng_state
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, TrainingDiverged
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.training import encode_examples, fit, generator, loop, optimise, pad_collator, seeded


def rows(count: int = 24, *, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 400) for _ in range(draw.randrange(4, 12))] for _ in range(count)]
    return [{"input_ids": row, "labels": list(row)} for row in ids]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- seeds -------------------------------------------------------------------------------------------------


def draw_all() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_repeats_and_restores():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw_all()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with seeded(1):
        first = draw_all()
    with pytest.raises(KeyError), seeded(1):
        second = draw_all()
        raise KeyError
    assert first == second
    assert draw_all() == expected  # also after an error


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0"])
def test_seeded_refuses(seed):
    with pytest.raises(BadInput, match="seed"), seeded(seed):
        pass


def test_generator_is_its_own():
    before = torch.get_rng_state()
    a, b = (torch.rand(4, generator=generator(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_rng_state_round_trip():
    with seeded(11):
        random.gauss(0, 1), np.random.randn(), torch.randn(3)  # leaves a cached second gaussian behind
        state = rng_state()
        first = draw_all(), random.gauss(0, 1), np.random.randn()
        set_rng_state(state)
        assert (draw_all(), random.gauss(0, 1), np.random.randn()) == first


# --- optimise ----------------------------------------------------------------------------------------------


def adam_by_hand(x: float, target: float, lr: float, steps: int) -> tuple[float, list[float]]:
    m = v = 0.0
    losses = []
    for t in range(1, steps + 1):
        losses.append((x - target) ** 2)
        g = 2 * (x - target)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return x, losses


def test_optimise_is_adam():
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    losses = optimise(x, lambda: (x - 1) ** 2, lr=0.1, steps=20)
    value, expected = adam_by_hand(3.0, 1.0, 0.1, 20)
    assert abs(x.item() - value) < 1e-9
    assert losses == pytest.approx(expected, abs=1e-9)


def test_optimise_sgd_with_decay_and_projection():
    x = torch.tensor([2.0, -2.0], requires_grad=True)
    optimise([x], lambda: x.sum(), lr=0.5, steps=1, optimizer="sgd", weight_decay=0.1)
    assert x.tolist() == pytest.approx([2 - 0.5 * (1 + 0.2), -2 - 0.5 * (1 - 0.2)])
    optimise(x, lambda: x.sum(), lr=100.0, steps=3, optimizer="sgd", after_step=lambda: x.clamp_(-1, 1))
    assert x.tolist() == [-1, -1]


def test_optimise_stops_before_updating():
    x = torch.tensor(1.0, requires_grad=True)
    losses = optimise(x, lambda: x**2, lr=0.1, steps=50, optimizer="sgd", stop_below=0.5)
    assert losses[-1] < 0.5 <= losses[-2]
    assert losses[-1] == pytest.approx(float(x.detach()) ** 2)


def test_optimise_leaves_no_gradients(tiny_lm):
    model = tiny_lm("llama")
    delta = torch.zeros(32, requires_grad=True)
    ids = torch.tensor([[5, 6, 7, 8]])

    def loss():
        inputs = model.get_input_embeddings()(ids) + delta
        return model(inputs_embeds=inputs, labels=ids).loss

    before = weights(model)
    with torch.no_grad():  # works under a caller's no_grad too
        losses = optimise(delta, loss, lr=0.1, steps=5)
    assert losses[-1] < losses[0]
    assert delta.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert equal(before, weights(model))


def test_optimise_diverges_before_stepping():
    x = torch.tensor(1.0, requires_grad=True)
    count = 0

    def loss():
        nonlocal count
        count += 1
        return x * float("nan") if count == 3 else x**2

    with pytest.raises(TrainingDiverged, match="step 2"):
        optimise(x, loss, lr=0.1, steps=9, optimizer="sgd")
    assert float(x.detach()) == pytest.approx(0.8**2)  # two updates, none with the NaN
    assert x.grad is None
    y = torch.tensor(0.0, requires_grad=True)
    with pytest.raises(TrainingDiverged, match="gradient"):
        optimise(y, lambda: y.sqrt() * 0 + 1, lr=0.1, steps=1)
    assert float(y.detach()) == 0


def test_optimise_refuses():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(BadInput, match="scalar"):
        optimise(x, lambda: x**2, lr=0.1, steps=1)
    with pytest.raises(BadInput, match="requires_grad"):
        optimise(torch.zeros(2), lambda: x.sum(), lr=0.1, steps=1)
    with pytest.raises(BadInput, match="parameters"):
        optimise([], lambda: x.sum(), lr=0.1, steps=1)
    with pytest.raises(BadInput, match="depend"):
        optimise(x, lambda: torch.tensor(1.0), lr=0.1, steps=1)
    with pytest.raises(BadInput, match="optimizer"):
        optimise(x, lambda: x.sum(), lr=0.1, steps=1, optimizer="lion")


# --- examples and order ------------------------------------------------------------------------------------


def test_encode_examples(tiny_tokenizer):
    prompt, target = "The capital of France is", "Paris"
    (one,) = encode_examples(tiny_tokenizer, [(prompt, target)])
    whole = tiny_tokenizer(f"{prompt} {target}")["input_ids"]
    learnt = [i for i, label in zip(one["input_ids"], one["labels"], strict=True) if label != -100]
    assert one["input_ids"] == whole
    assert tiny_tokenizer.decode(learnt) == " Paris"
    assert one["labels"][-len(learnt) :] == learnt
    (every,) = encode_examples(tiny_tokenizer, [(prompt, target)], loss_on="all")
    assert every["labels"] == every["input_ids"] == whole
    (ended,) = encode_examples(tiny_tokenizer, [(prompt, target)], end=True)
    assert ended["input_ids"] == [*whole, tiny_tokenizer.eos_token_id]
    assert ended["labels"][-1] == tiny_tokenizer.eos_token_id
    (plain,) = encode_examples(tiny_tokenizer, [("", "Paris")], loss_on="all")
    assert tiny_tokenizer.decode(plain["input_ids"]) == "Paris"


def test_encode_examples_length(tiny_tokenizer):
    pair = ("The mayor of Port Ellery is", "Ines Varro")
    (full,) = encode_examples(tiny_tokenizer, [pair])
    size = len(full["input_ids"])
    assert encode_examples(tiny_tokenizer, [pair], max_length=size) == [full]
    with pytest.raises(BadInput, match=r"pairs\[1\].*max_length"):
        encode_examples(tiny_tokenizer, [("a", "b"), pair], max_length=size - 1)
    (cut,) = encode_examples(tiny_tokenizer, [pair], max_length=size - 2, truncate=True)
    assert cut["input_ids"] == full["input_ids"][2:]
    assert cut["labels"] == full["labels"][2:]
    target = sum(label != -100 for label in full["labels"])
    with pytest.raises(BadInput, match="max_length"):  # the target itself does not fit
        encode_examples(tiny_tokenizer, [pair], max_length=target - 1, truncate=True)
    with pytest.raises(BadInput, match="loss_on"):
        encode_examples(tiny_tokenizer, [pair], loss_on="prompt")
    with pytest.raises(BadInput, match="target"):
        encode_examples(tiny_tokenizer, [("The mayor is", " ")])


def test_pad_collator(tiny_tokenizer):
    collate = pad_collator(tiny_tokenizer)
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert pad_collator(9)([{"input_ids": [5], "labels": 1}])["labels"].tolist() == [1]
    assert pad_collator(9)([{"input_ids": [5]}, {"input_ids": [5, 6]}])["input_ids"].tolist() == [
        [5, 9],
        [5, 6],
    ]


def test_epoch_order():
    lengths = [i % 17 for i in range(103)]
    order = EpochOrder(103, seed=4, lengths=lengths, batch_size=8)
    first = list(order)
    assert sorted(first) == list(range(103))
    assert first == list(order)
    order.set_epoch(1)
    assert sorted(order) == list(range(103))
    assert list(order) != first
    assert list(EpochOrder(103, seed=5)) != list(EpochOrder(103, seed=4))
    spread = [
        max(lengths[i] for i in first[k : k + 8]) - min(lengths[i] for i in first[k : k + 8])
        for k in range(0, 96, 8)
    ]
    assert sum(spread) / len(spread) < 3  # unsorted: about 13


# --- loop --------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Dropout and running statistics, so that resuming must bring back random states and buffers."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.one, self.two = torch.nn.Linear(6, 16), torch.nn.Linear(16, 1)
        self.norm, self.drop = torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.two(self.drop(self.norm(self.one(x)))).squeeze(-1)


def regression(count: int = 44):
    x = torch.randn(count, 6, generator=generator(1))
    return torch.utils.data.TensorDataset(x, x.sum(-1))


def run_loop(folder=None, *, save_every=3, net=None, stop_at=None, batch_size=4, shuffle=True, **options):
    net = net or Net()
    rule = torch.optim.AdamW(net.parameters(), lr=1e-2)
    plan = torch.optim.lr_scheduler.LinearLR(rule, total_iters=30)
    batches = torch.utils.data.DataLoader(regression(), batch_size=batch_size, shuffle=shuffle)

    def watch(done, loss):
        if done == stop_at:
            raise KeyboardInterrupt

    def step(batch):
        return {"loss": torch.nn.functional.mse_loss(net(batch[0]), batch[1])}

    arguments = {"epochs": 3, "accumulation": 2, "clip": 1.0, **options}
    history = loop(
        net, batches, step, optimizer=rule, scheduler=plan, output_dir=folder, save_every=save_every,
        on_step=watch, **arguments,
    )  # fmt: skip
    return net, history


@pytest.mark.parametrize("stop_at", [1, 3, 5, 6, 7, 13, 18])
def test_loop_resumes_bitwise(tmp_path, stop_at):
    net, history = run_loop()
    assert history.steps == 18
    assert history.losses[-1] < history.losses[0]
    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path, stop_at=stop_at)
    again, resumed = run_loop(tmp_path)
    assert resumed.resumed_at == (stop_at - 1) // 3 * 3
    assert resumed.losses == history.losses
    assert equal(net.state_dict(), again.state_dict())
    third, done = run_loop(tmp_path)  # finished: nothing is trained again
    assert done.resumed_at == 18
    assert equal(net.state_dict(), third.state_dict())


def test_loop_leaves_the_outside_alone(tmp_path):
    net = Net().eval()
    net.one.train()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw_all()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    run_loop(net=net)
    assert draw_all() == expected
    assert net.one.training and not net.two.training and not net.training
    assert all(p.grad is None for p in net.parameters())


def test_loop_accumulation_equals_a_larger_batch():
    one, _ = run_loop(batch_size=8, accumulation=1, net=linear())
    two, _ = run_loop(batch_size=4, accumulation=2, net=linear())
    assert torch.allclose(one[0].weight, two[0].weight, atol=1e-6)


def linear():
    with seeded(0):
        return torch.nn.Sequential(torch.nn.Linear(6, 1), torch.nn.Flatten(0))


def test_loop_writes_no_pickle(tmp_path):
    run_loop(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    assert len(list(tmp_path.iterdir())) == 1  # one checkpoint, no remains


def test_loop_diverges_and_writes_nothing(tmp_path):
    net = Net()
    rule = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = iter(range(100))

    def step(batch):
        loss = net(batch[0]).mean()
        return loss * float("inf") if next(calls) == 6 else loss

    batches = torch.utils.data.DataLoader(regression(), batch_size=4)
    with pytest.raises(TrainingDiverged, match="step 6"):
        loop(net, batches, step, optimizer=rule, output_dir=tmp_path / "run", save_every=2)
    assert not (tmp_path / "run").exists()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_loop_refuses_another_run(tmp_path):
    run_loop(tmp_path)
    with pytest.raises(BadInput, match="other arguments"):
        run_loop(tmp_path, epochs=4)
    _, history = run_loop(tmp_path, epochs=4, resume=False)
    assert history.resumed_at == 0 and history.steps == 24
    with pytest.raises(BadInput, match="epochs"):
        run_loop(epochs=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="output_dir"):
        run_loop(tmp_path / "file")


def test_loop_recognises_its_run_by_its_identity(tmp_path):
    run_loop(tmp_path, identity={"tau": 4.0, "weights": (1.0, 0.1)})
    _, same = run_loop(tmp_path, identity={"tau": 4.0, "weights": [1.0, 0.1]})
    assert same.resumed_at == 18
    for other in ({"tau": 2.0, "weights": [1.0, 0.1]}, None):
        with pytest.raises(BadInput, match="other arguments"):
            run_loop(tmp_path, identity=other)


def test_loop_names_a_damaged_checkpoint(tmp_path):
    run_loop(tmp_path)
    folder = last_checkpoint(tmp_path)
    whole = (folder / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"optimizer\.safetensors"):
        run_loop(tmp_path)
    (folder / "state.json").write_text("{")
    with pytest.raises(CorruptFile, match=r"state\.json.*resume=False"):
        run_loop(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_loop_names_a_missing_file(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path, stop_at=7)  # the random states are read only by a run that goes on
    (last_checkpoint(tmp_path) / name).unlink()
    with pytest.raises(CorruptFile, match=rf"{re.escape(name)}.*resume=False"):
        run_loop(tmp_path)
    assert run_loop(tmp_path, resume=False)[1].resumed_at == 0


def interrupted(run, stop_at=None):
    """What `run(on_step)` gives; with `stop_at`, ended after so many updates."""

    def on_step(done, *_):
        if done == stop_at:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        return run(on_step)


def small_loop(folder=None, on_step=None, *, net=None, batches=None, rule=None, step=None, **options):
    net = net or linear()
    rule = rule or torch.optim.SGD(net.parameters(), lr=0.1)
    step = step or (lambda batch: net(batch[0]).square().mean())
    batches = torch.utils.data.DataLoader(regression(8), batch_size=2) if batches is None else batches
    loop(net, batches, step, optimizer=rule, output_dir=folder, save_every=1, on_step=on_step, **options)
    return net.state_dict()


@pytest.mark.parametrize("place", ["loader", "sampler", "batch_sampler"])
def test_loop_resumes_with_a_loaders_own_generator(tmp_path, place):
    def run(on_step, folder=tmp_path):
        own, data = generator(3), regression(8)
        chosen = torch.utils.data.RandomSampler(data, generator=own)
        options = {
            "loader": {"shuffle": True, "generator": own, "batch_size": 2},
            "sampler": {"sampler": chosen, "batch_size": 2},
            "batch_sampler": {"batch_sampler": torch.utils.data.BatchSampler(chosen, 2, drop_last=False)},
        }
        batches = torch.utils.data.DataLoader(data, **options[place])
        return small_loop(folder, on_step, batches=batches, epochs=3)

    interrupted(run, 7)  # in the second epoch
    assert equal(interrupted(run), run(None, None))


def test_loop_resumes_states_wider_than_their_parameters(tmp_path):
    """torch rounds an optimizer's float32 states to a bfloat16 parameter's dtype when it loads them."""
    from transformers.optimization import Adafactor

    def run(on_step, folder=tmp_path):
        with seeded(0):
            net = torch.nn.Linear(6, 6, dtype=torch.bfloat16)
        rule = Adafactor(net.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
        batches = torch.utils.data.DataLoader(regression(), batch_size=4)
        return small_loop(
            folder, on_step, net=net, rule=rule, batches=batches,
            step=lambda batch: (net(batch[0].bfloat16()) - 1).square().mean(),
        )  # fmt: skip

    interrupted(run, 6)
    assert equal(interrupted(run), run(None, None))


def test_loop_knows_its_run_by_a_rate_in_a_tensor(tmp_path):
    for _ in range(2):
        net = linear()
        small_loop(tmp_path, net=net, rule=torch.optim.Adam(net.parameters(), lr=torch.tensor(0.1)))


def test_loop_refuses_batches_that_run_out(tmp_path):
    batches = list(torch.utils.data.DataLoader(regression(8), batch_size=2))
    with pytest.raises(BadInput, match=r"batches.*once only"):
        small_loop(batches=iter(batches), epochs=2)
    small_loop(batches=iter(batches))
    with pytest.raises(BadInput, match="'epoch 1' gave none"):
        small_loop(batches=lambda epoch: batches[: 4 - 4 * epoch], epochs=2)
    with pytest.raises(BadInput, match="gave none"):
        small_loop(batches=[])
    interrupted(lambda on_step: small_loop(tmp_path, on_step, batches=batches), 4)
    with pytest.raises(BadInput, match="fewer than the 3"):
        small_loop(tmp_path, batches=batches[:2])


def test_loop_refuses_what_checkpoints_would_miss(tmp_path):
    inside, outside = linear(), torch.nn.Linear(6, 6)
    rule = torch.optim.SGD([*inside.parameters(), *outside.parameters()], lr=0.1)
    with pytest.raises(BadInput, match="not the model's"):
        small_loop(tmp_path, net=inside, rule=rule)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), "1"])
def test_norms_that_are_none(tiny_lm, clip):
    with pytest.raises(BadInput, match="clip"):
        small_loop(clip=clip)
    with pytest.raises(BadInput, match="clip"):
        fit(tiny_lm("llama", layers=1), rows(4), lr=1e-3, epochs=1, clip=clip)


class Broken(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.square().mean()

    @staticmethod
    def backward(ctx, slope):
        return torch.full(ctx.shape, float("nan"))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_update_with_a_gradient_that_is_not_finite(tiny_lm, clip):
    net = linear()
    with pytest.raises(TrainingDiverged, match="step 0"):
        small_loop(net=net, step=lambda batch: Broken.apply(net(batch[0])), clip=clip)
    assert equal(net.state_dict(), linear().state_dict())
    model = tiny_lm("llama", layers=1)
    with pytest.raises(TrainingDiverged, match="step 0"):
        fit(
            model, rows(4), lr=1e-3, epochs=1, clip=clip,
            loss=lambda m, batch: Broken.apply(m(input_ids=batch["input_ids"]).logits),
        )  # fmt: skip
    assert equal(weights(model), weights(tiny_lm("llama", layers=1)))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_loss_scaling_passes_an_overflow_by(monkeypatch, clip):
    import accelerate

    class Scaled(accelerate.Accelerator):
        """Scales losses as in fp16, which needs a GPU, beginning far too high."""

        mixed_precision = "fp16"

        def __init__(self):
            super().__init__()
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**127)

        autocast = staticmethod(contextlib.nullcontext)

    monkeypatch.setattr(accelerate, "Accelerator", Scaled)
    net = linear()
    rule = torch.optim.SGD(net.parameters(), lr=0.1)
    plan = torch.optim.lr_scheduler.StepLR(rule, 1, 0.5)
    batches = torch.utils.data.DataLoader(regression(8), batch_size=2)

    def step(batch):
        return 64 * (net(batch[0]) - batch[1]).square().mean()

    history = loop(net, batches, step, optimizer=rule, scheduler=plan, clip=clip, epochs=5)
    assert history.steps == 20 and all(torch.isfinite(p).all() for p in net.parameters())
    made = round(-np.log2(rule.param_groups[0]["lr"] / 0.1))
    assert 0 < made < 20  # the rate falls with the updates that were made
    assert not equal(net.state_dict(), linear().state_dict())


def test_trainer_leaves_an_overflow_to_loss_scaling(tmp_path, tiny_lm):
    from transformers import TrainingArguments

    from transfuse.core.trainer import SafeTrainer

    trainer = SafeTrainer(
        model=tiny_lm("llama", layers=1), args=TrainingArguments(str(tmp_path), report_to=[])
    )
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with pytest.raises(TrainingDiverged):
        trainer._get_grad_norm(trainer.model, torch.tensor(torch.inf))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, torch.tensor(torch.inf)) == torch.inf


def test_a_look_at_a_run_changes_nothing(tmp_path):
    """`last_checkpoint` is asked about runs in progress: what they are writing is theirs."""
    writing, removed = tmp_path / ".checkpoint-9.x.tmp", tmp_path / ".checkpoint-3.x.old"
    for half in (writing, removed):
        half.mkdir(parents=True)
        (half / "model.safetensors").write_bytes(b"x")
    assert last_checkpoint(tmp_path) is None and writing.is_dir() and removed.is_dir()
    run_loop(tmp_path)  # the run itself clears what a killed one left
    assert [path.name for path in tmp_path.iterdir()] == [last_checkpoint(tmp_path).name]


def test_a_checkpoint_is_hidden_before_it_is_emptied(tmp_path, monkeypatch):
    run_loop(tmp_path)

    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transfuse.core.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        clear_checkpoints(tmp_path)
    assert last_checkpoint(tmp_path) is None


# --- fit ---------------------------------------------------------------------------------------------------


def run_fit(tiny_lm, folder=None, *, stop_at=None, **options):
    model = tiny_lm("gpt2", layers=2)  # gpt2 has dropout in training mode

    def watch(done, total, loss):
        if done == stop_at:
            raise KeyboardInterrupt

    arguments = {"lr": 1e-3, "epochs": 3, "batch_size": 4, "save_every": 2, "warmup": 0.1, **options}
    history = fit(model, rows(22), output_dir=folder, on_step=watch, **arguments)
    return model, history


@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "group_by_length": True}])
def test_fit_resumes_bitwise(tmp_path, tiny_lm, options):
    model, history = run_fit(tiny_lm, **options)
    for stop_at in (3, 4, 7) if options else (5, 6, 7, 13):
        folder = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            run_fit(tiny_lm, folder, stop_at=stop_at, **options)
        again, resumed = run_fit(tiny_lm, folder, **options)
        assert resumed.resumed_at == (stop_at - 1) // 2 * 2
        assert resumed.losses == history.losses
        assert equal(weights(model), weights(again)), stop_at
    third, done = run_fit(tiny_lm, folder, **options)
    assert done.resumed_at == history.steps == done.steps
    assert equal(weights(model), weights(third))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and {p.suffix for p in files} == {".safetensors", ".json"}


def test_fit_max_steps_finishes_once(tmp_path, tiny_lm):
    model, history = run_fit(tiny_lm, tmp_path, epochs=None, max_steps=4, save_every=None)
    again, done = run_fit(tiny_lm, tmp_path, epochs=None, max_steps=4, save_every=None)
    assert history.steps == done.steps == done.resumed_at == 4
    assert equal(weights(model), weights(again))


def test_fit_is_plain_adamw(tiny_lm):
    """One constant-rate run, no clipping, against torch's AdamW on the same batches."""
    model, other = tiny_lm("llama", layers=2), tiny_lm("llama", layers=2)
    data = rows(12)
    history = fit(
        model, data, lr=1e-3, epochs=2, batch_size=4, schedule="constant", clip=None, seed=3, betas=(0.8, 0.9)
    )
    rule = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.8, 0.9))
    order, collate, losses = EpochOrder(12, seed=3), pad_collator(0), []
    for epoch in range(2):
        order.set_epoch(epoch)
        index = list(order)
        for k in range(0, 12, 4):
            loss = other(**collate([data[i] for i in index[k : k + 4]])).loss
            losses.append(float(loss.detach()))
            rule.zero_grad()
            loss.backward()
            rule.step()
    assert history.losses == pytest.approx(losses, abs=1e-5)
    for name, value in weights(model).items():
        assert torch.allclose(value, other.get_parameter(name), atol=1e-5), name


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9), (0.9,)])
def test_fit_refuses_betas_out_of_range(tiny_lm, betas):
    with pytest.raises(BadInput, match="betas"):
        fit(tiny_lm("llama", layers=1), rows(4), lr=1e-3, epochs=1, betas=betas)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_fit_adds_the_extra_loss_once_per_update(tiny_lm, accumulation):
    def run(extra):
        _, history = (model := tiny_lm("llama", layers=1)), fit(
            model, rows(12), lr=1e-4, max_steps=1, batch_size=4, accumulation=accumulation, extra_loss=extra
        )  # fmt: skip
        return history.losses[0]

    assert run(lambda m: torch.tensor(0.25)) - run(None) == pytest.approx(0.25, abs=1e-5)


def test_fit_with_its_own_loss(tiny_lm):
    model = tiny_lm("llama", layers=1)
    history = fit(
        model, rows(8), lr=1e-3, epochs=4, batch_size=4, accumulation=2,
        loss=lambda m, batch: m(input_ids=batch["input_ids"]).logits.pow(2).mean(),
    )  # fmt: skip
    assert history.steps == 4
    assert history.losses[-1] < history.losses[0]


def test_fit_leaves_the_outside_alone(tiny_lm, capsys):
    import transformers

    model = tiny_lm("llama", layers=1).eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.clone()
    verbosity, cache = transformers.logging.get_verbosity(), model.config.use_cache
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw_all()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    fit(model, rows(8), lr=1e-3, epochs=1)
    assert draw_all() == expected
    assert transformers.logging.get_verbosity() == verbosity
    assert model.config.use_cache == cache
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(frozen, model.model.embed_tokens.weight)
    assert capsys.readouterr().out == ""
    assert not Path("trainer_output").exists()


def test_fit_trains_bf16(tiny_lm):
    model = tiny_lm("llama", layers=1).to(torch.bfloat16)
    history = fit(model, rows(8), lr=1e-2, epochs=5)
    assert history.losses[-1] < history.losses[0]
    assert next(model.parameters()).dtype == torch.bfloat16


def test_fit_diverges_and_writes_nothing(tmp_path, tiny_lm):
    model = tiny_lm("llama", layers=1)
    calls = iter(range(100))

    def extra(_):
        return torch.tensor(float("nan") if next(calls) == 4 else 0.0)

    with pytest.raises(TrainingDiverged, match="step 4"):
        fit(
            model,
            rows(),
            lr=1e-3,
            epochs=2,
            extra_loss=extra,
            batch_size=4,
            output_dir=tmp_path / "r",
            save_every=1,
        )
    assert not (tmp_path / "r").exists()
    assert all(torch.isfinite(p).all() and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"epochs": None}, "epochs"),
        ({"max_steps": 3}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulation": 0}, "accumulation"),
        ({"seed": -1}, "seed"),
        ({"lr": float("inf")}, "lr"),
        ({"schedule": "step"}, "schedule"),
        ({"warmup": -1}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_fit_refuses(tiny_lm, options, named):
    with pytest.raises(BadInput, match=named):
        fit(tiny_lm("llama", layers=1), rows(4), **{"lr": 1e-3, "epochs": 1, **options})


def test_fit_refuses_another_loss_or_identity(tiny_lm, tmp_path):
    def own(model, batch):
        return model(**batch).loss

    def run(**options):
        return fit(tiny_lm("llama", layers=1), rows(4), lr=1e-3, epochs=1, output_dir=tmp_path, **options)

    run(loss=own, identity={"tau": 2.0})
    assert run(loss=own, identity={"tau": 2.0}).resumed_at == 1
    for other in ({}, {"loss": own}, {"identity": {"tau": 2.0}}, {"loss": own, "identity": {"tau": 1.0}}):
        with pytest.raises(BadInput, match="other arguments"):
            run(**other)


def test_fit_takes_rows_of_tensors(tiny_lm):
    data = datasets.Dataset.from_list(rows(6))
    plain, other = tiny_lm("llama", layers=1), tiny_lm("llama", layers=1)
    fit(plain, data, lr=1e-3, epochs=1)
    fit(other, data.with_format("torch"), lr=1e-3, epochs=1)
    assert equal(weights(plain), weights(other))


@pytest.mark.parametrize("content", ["{", None])
def test_fit_names_a_damaged_trainer_state(tiny_lm, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        run_fit(tiny_lm, tmp_path, stop_at=3)
    file = last_checkpoint(tmp_path) / "trainer_state.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CorruptFile, match=r"trainer_state\.json.*resume=False"):
        run_fit(tiny_lm, tmp_path)


def test_fit_refuses_what_cannot_be_trained(tiny_lm, tmp_path):
    model = tiny_lm("llama", layers=1)
    with pytest.raises(BadInput, match="dataset"):
        fit(model, [], lr=1e-3, epochs=1)
    with pytest.raises(BadInput, match="length"):
        fit(model, iter(rows(4)), lr=1e-3, epochs=1)
    fit(model, rows(4), lr=1e-3, epochs=1, output_dir=tmp_path)
    with pytest.raises(BadInput, match="other arguments"):
        fit(model, rows(4), lr=1e-4, epochs=1, output_dir=tmp_path)
    with pytest.raises(BadInput, match="other arguments"):
        fit(model, rows(4, seed=9), lr=1e-3, epochs=1, output_dir=tmp_path)
    with pytest.raises(IncompatibleModels, match="does not fit"):
        fit(tiny_lm("llama", layers=2), rows(4), lr=1e-3, epochs=1, output_dir=tmp_path)
    with pytest.raises(BadInput, match="model"):
        fit(model.requires_grad_(False), rows(4), lr=1e-3, epochs=1)


# --- kill -9, several processes ----------------------------------------------------------------------------

PRELOADED = ["accelerate", "transfuse.core.trainer", "transfuse.core.training", "conftest"]


def child(kind: str, folder: Path) -> None:
    """What the killed process runs: a training of about a second, then its final weights."""
    from conftest import make_tiny

    torch.set_num_threads(1)
    net: torch.nn.Module
    if kind == "loop":
        net = Net()
        rule = torch.optim.AdamW(net.parameters(), lr=1e-2)
        batches = torch.utils.data.DataLoader(regression(), batch_size=4, shuffle=True)

        def step(batch):
            time.sleep(0.002)
            return torch.nn.functional.mse_loss(net(batch[0]), batch[1])

        loop(net, batches, step, optimizer=rule, epochs=8, output_dir=folder / "run", save_every=3)
    else:
        net = make_tiny("gpt2", layers=1)
        fit(net, rows(22), lr=1e-3, epochs=10, batch_size=4, output_dir=folder / "run", save_every=3)
    write_tensors(folder / "final.safetensors", {n: p.clone() for n, p in net.state_dict().items()})


@pytest.mark.parametrize("kind", ["loop", "fit"])
def test_kill_minus_nine(tmp_path, kind):
    """Killed at random moments and started again, it ends with the weights of an uninterrupted run."""
    context = multiprocessing.get_context("forkserver")  # one import of torch for all the processes
    context.set_forkserver_preload(PRELOADED)

    def start(folder: Path):
        process = context.Process(target=child, args=(kind, folder))
        process.start()
        return process

    def finish(folder: Path) -> float:
        began = time.perf_counter()
        process = start(folder)
        process.join(120)
        assert process.exitcode == 0
        return time.perf_counter() - began

    finish(tmp_path / "whole")  # the first one also starts the server
    duration = finish(tmp_path / "timed")
    hurt, draw, moments = tmp_path / "hurt", random.Random(kind), set()
    for kill in range(int(os.environ.get("TRANSFUSE_KILLS", "8"))):
        before = last_checkpoint(hurt / "run")
        process = start(hurt)
        if kill % 2:  # soon after it has made headway, however slow the machine is
            while process.is_alive() and last_checkpoint(hurt / "run") == before:
                time.sleep(0.005)
            time.sleep(draw.random() * duration * 0.1)
        else:
            time.sleep(draw.random() * duration * 0.7)
        process.kill()
        process.join()
        last = last_checkpoint(hurt / "run")
        moments.add(None if last is None else last.name)
    assert len(moments) >= 2  # some had made headway
    finish(hurt)
    expected, _ = read_tensors(tmp_path / "whole" / "final.safetensors")
    assert equal(expected, read_tensors(tmp_path / "timed" / "final.safetensors")[0])
    assert equal(expected, read_tensors(hurt / "final.safetensors")[0])
    assert not [p for p in hurt.rglob("*") if ".tmp" in p.name and p.parent.name == "run"]


def shared(rank: int, port: int, folder: Path) -> None:
    """One of two processes that train together."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
    net, history = run_loop(folder / "run", net=linear(), accumulation=1, shuffle=False)
    assert history.steps == 18
    write_tensors(folder / f"{rank}.safetensors", dict(net.state_dict()))


def test_two_processes_equal_accumulation(tmp_path):
    expected, _ = run_loop(net=linear(), accumulation=2, shuffle=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pair = [context.Process(target=shared, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    for rank in (0, 1):
        found, _ = read_tensors(tmp_path / f"{rank}.safetensors")
        assert all(
            torch.allclose(found[name], value, atol=1e-6) for name, value in expected.state_dict().items()
        )
