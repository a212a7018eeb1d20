"""taid: what only this method must hold."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from distilling import Trained, arguments, rows, shapes, state, token_case

from transfuse.core.divergence import forward_kl
from transfuse.core.errors import BadInput
from transfuse.core.training import seeded
from transfuse.distill import Distiller
from transfuse.distill._base import Signal
from transfuse.distill.taid import TAID, blend, next_t


def by_hand(t, track):
    """One token, from the definition."""

    def value(z, fixed, label, more):
        target = torch.softmax((1 - t) * fixed + t * more["teacher"], -1)
        log_q = z - torch.log(torch.exp(z).sum())
        total = torch.zeros((), dtype=z.dtype)
        for v in range(len(z)):
            log_p = torch.log(target[v]) if track == "kl" else 0.0
            total = total + target[v] * (log_p - log_q[v])
        return total

    return value


def entropy(x):
    """Mean entropy of the student, the least of -sum p log q."""
    keep = x["labels"][:, 1:] != -100
    p = torch.softmax(x["student"][:, :-1][keep], -1)
    return float(-(p * p.log()).sum(-1).mean())


CASES = [
    token_case("kl", lambda: TAID(t_start=0.3, track="kl"), by_hand(0.3, "kl")),
    token_case("ce", lambda: TAID(t_start=0.7, track="ce"), by_hand(0.7, "ce"), least_value=entropy),
]


def trainer(folder, objective=None, seed=0, data=None, **options):
    teacher, student = make_tiny("llama", seed=1, layers=2), make_tiny("llama", seed=2, layers=1)
    return Distiller(
        student=student, teacher=teacher, objective=objective or TAID(), train_dataset=data or rows(),
        args=arguments(folder, seed=seed, **options),
    )  # fmt: skip


def train(seed):
    made = trainer("unused", TAID(t_start=0.9), seed, max_steps=40)
    kept = state(made.model.readers[0].model)
    before = shapes(made.student)
    with seeded(seed):
        made.train()
    return Trained(made.losses, made.student, before, [(kept, made.model.readers[0].model)])


def test_the_ends_of_the_blend():
    z = torch.randn(2, 3, 5, 9)
    student, teacher = z
    assert torch.allclose(blend(student, teacher, 0.0), torch.log_softmax(student, -1))
    assert torch.allclose(blend(student, teacher, 1.0), torch.log_softmax(teacher, -1))
    student[..., 0] = -torch.inf
    assert torch.allclose(blend(student, teacher, 1.0), torch.log_softmax(teacher, -1))
    assert (blend(student, teacher, 0.5)[..., 0] == -torch.inf).all()


def test_all_teacher_is_forward_kl_and_all_student_is_still():
    z = torch.randn(4, 6, 9, requires_grad=True)
    teacher, labels = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    batch = {"labels": labels}
    ends = {t: TAID(t_start=0.5, track="kl") for t in (0.0, 1.0)}
    for t, objective in ends.items():
        objective.t.fill_(t)
    value = ends[1.0](Signal(logits=z), Signal(logits=teacher), batch)["loss"]
    assert torch.allclose(value, forward_kl(z[:, :-1], teacher[:, :-1]))
    still = ends[0.0](Signal(logits=z), Signal(logits=teacher), batch)["loss"]
    (slope,) = torch.autograd.grad(still, z)
    assert float(slope.abs().max()) < 1e-7


def test_the_schedule_by_hand():
    settings = {"total": 10, "t_start": 0.2, "t_end": 1.0, "alpha": 0.5, "beta": 0.9}
    assert next_t(0.2, 0.0, None, 2.0, step=1, **settings) == (0.2, 0.0)
    t, m = next_t(0.2, 0.0, 2.0, 1.0, step=2, **settings)
    assert m == pytest.approx(0.1 * 0.5)  # (2 - 1) / 2
    assert t == pytest.approx(0.2 + 0.5 / (1 + math.exp(-0.05)) * 0.8)
    assert next_t(0.2, 0.0, 2.0, 2.0, step=9, **{**settings, "alpha": 0.0})[0] == pytest.approx(
        0.2 + 0.8 * 0.9
    )
    assert next_t(0.99, 0.0, 2.0, 1.0, step=10, **settings)[0] == 1.0
    assert next_t(0.2, 0.0, 1e-20, 5.0, step=2, **settings)[1] == pytest.approx(-0.1)  # clamped


def test_t_rises_by_updates_alone(tmp_path):
    """Not by micro-batches, not by evaluation."""
    for accumulation in (1, 3):
        objective = TAID(t_start=0.2, alpha=0.0)
        made = trainer(tmp_path, objective, max_steps=4, gradient_accumulation_steps=accumulation)
        made.train()
        assert float(objective.t) == pytest.approx(1.0)
        before = copy.deepcopy(objective.state_dict())
        made.evaluate(rows(4, seed=5))
        assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())


def test_it_resumes_its_trajectory(tmp_path):
    """A run stopped after a checkpoint and continued ends with the same weights and the same t, bit for bit."""
    whole = trainer(tmp_path / "whole", TAID(t_start=0.2, alpha=0.3))
    whole.train()
    first = trainer(tmp_path / "parts", TAID(t_start=0.2, alpha=0.3), save_strategy="steps", save_steps=5)

    class Stop(Exception):
        pass

    def stop(*_):
        if first.state.global_step == 7:
            raise Stop

    first.objective.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        first.train()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"
    second = trainer(tmp_path / "parts", TAID(t_start=0.2, alpha=0.3), save_strategy="steps", save_steps=5)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.losses == whole.losses
    ends = [each.model.state_dict() for each in (whole, second)]
    assert ends[0].keys() == ends[1].keys() and "objective.t" in ends[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("t_start", 1.0), ("t_start", -0.1), ("t_end", 0.3), ("alpha", 1.5), ("beta", 2.0), ("track", "nll")],
)
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        TAID(**{name: value})


def test_an_unknown_length_is_refused():
    with pytest.raises(BadInput, match="max_steps"):
        TAID().on_step({"kd": 1.0, "loss": 1.0}, 1, 0)


def test_without_its_objective_there_is_nothing_to_watch(tmp_path):
    made = trainer(tmp_path, TAID(t_start=0.2, kd_weight=0.0, ce_weight=1.0), max_steps=2)
    made.train()
    assert set(made.figures[-1]) == {"loss", "ce"} and float(made.objective.t) == pytest.approx(0.2)


@pytest.mark.parametrize("track", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_the_student_alone_rules_out(track, dtype):
    """At t = 1 its log-probability counts as that of the smallest normal number, without a slope."""
    tiny = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}[dtype]
    p, q = [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]
    z = torch.tensor([[q] * 2], dtype=dtype).log().requires_grad_()
    objective = TAID(track=track)
    objective.t.fill_(1.0)
    teacher = Signal(logits=torch.tensor([[p] * 2], dtype=dtype).log())
    value = objective(Signal(logits=z), teacher, {"labels": torch.tensor([[0, 1]])})["loss"]
    expected = -sum(a * math.log(b or tiny) for a, b in zip(p, q, strict=True))
    expected += sum(a * math.log(a) for a in p) if track == "kl" else 0.0
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    (slope,) = torch.autograd.grad(value, z)
    assert slope[0, 0].tolist() == pytest.approx([0.75 * 0.75 - 0.5, 0.25 * 0.75 - 0.25, 0.0], abs=1e-6)


KILLED = """
    import hashlib, sys
    sys.path[:0] = [{tests!r}, {tests!r} + "/distill"]
    from test_taid import TAID, trainer
    from transfuse.core.checkpoints import last_checkpoint
    from pathlib import Path

    folder = Path(sys.argv[1])
    made = trainer(folder, TAID(t_start=0.2, alpha=0.3), save_strategy="steps", save_steps=4, max_steps=60)
    last = last_checkpoint(folder)
    print("FROM", 0 if last is None else last.name, flush=True)
    made.train(resume_from_checkpoint=None if last is None else str(last))
    state = made.model.state_dict()
    text = b"".join(state[name].contiguous().view(-1).numpy().tobytes() for name in sorted(state))
    print("END", hashlib.sha256(text).hexdigest(), float(made.objective.t), flush=True)
"""


def test_kill_9_and_go_on(tmp_path):
    """The process is killed while it trains; started again it ends with the weights and the t of a whole run."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(KILLED.format(tests=str(Path(__file__).resolve().parents[1]))))
    command = [sys.executable, str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)

    killed = start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert "END" not in killed.communicate()[0]
    outputs = [start(tmp_path / name).communicate()[0].splitlines() for name in ("killed", "whole")]
    assert outputs[0][0].startswith("FROM checkpoint-") and outputs[1][0] == "FROM 0"
    assert outputs[0][1] == outputs[1][1]
