"""The family's trainer: what it refuses, what it evens out, what it keeps."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import make_tiny
from distilling import arguments, rows, state
from transformers import AutoModelForCausalLM

from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.distill import Distiller, LogitStore, Objective
from transfuse.distill._base import Reader, Signal, frozen
from transfuse.distill.survey_kd_llm import get
from transfuse.distill.taid import TAID


def models():
    return make_tiny("llama", seed=2, layers=1), make_tiny("llama", seed=1, layers=2)


def trainer(folder, *, student=None, teacher=None, objective="forward-kl", data=None, options=None, **more):
    a, b = models()
    return Distiller(
        student=student or a, teacher=teacher or b, objective=objective, train_dataset=data or rows(),
        args=arguments(folder, **(more.pop("settings", {}))), **(options or {}), **more,
    )  # fmt: skip


def weights(made):
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


def close(one, other, tolerance=2e-6):
    return all(torch.allclose(one[name], other[name], atol=tolerance) for name in one)


def test_the_loss_is_that_of_whole_logits(tmp_path):
    student, teacher = models()
    made = trainer(tmp_path, student=student, teacher=teacher)
    batch = made._prepare_inputs(made.data_collator(rows(4)))
    signals = [Signal(logits=m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
               for m in (student, teacher)]  # fmt: skip
    whole = get("forward-kl")(*signals, batch)["loss"]
    assert Reader(student).head is not None
    assert float(made.model(batch)["loss"].detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_micro_batches_do_not_matter(tmp_path):
    """Unequal numbers of tokens per micro-batch: every token weighs the same."""
    data = rows(8)
    for i, row in enumerate(data):
        row["labels"] = [-100] * (2 + i % 6) + row["input_ids"][2 + i % 6 :]
    ends = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
                    "max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}  # fmt: skip
        made = trainer(tmp_path, data=data, settings=settings)
        made.train()
        ends.append((weights(made), made.losses, made.figures))
    for found, losses, figures in ends[1:]:
        assert close(found, ends[0][0])
        assert losses == pytest.approx(ends[0][1], rel=1e-5)
        assert [f["kd"] for f in figures] == pytest.approx([f["kd"] for f in ends[0][2]], rel=1e-5)


@pytest.mark.parametrize("objective", ["forward-kl", "cross-entropy", "step-by-step"])
@pytest.mark.parametrize("fused", [True, False])
def test_an_update_without_a_labelled_token_moves_nothing(tmp_path, objective, fused):
    data = rows(4)
    data[1]["labels"] = data[2]["labels"] = [-100] * 10
    data = [{**row, "rationale": [0] * 10} for row in data]
    chosen = get(objective)
    chosen.needs_logits = not fused
    made = trainer(
        tmp_path, objective=chosen, data=data, settings={"per_device_train_batch_size": 1, "max_steps": 4}
    )
    made.train()
    assert sum(loss == 0.0 for loss in made.losses) == 2 and all(map(math.isfinite, made.losses))


def test_padding_on_either_side(tmp_path):
    student, teacher = models()
    objective = get("jsd")
    data = rows(4)
    data[1] = {name: values[:6] for name, values in data[1].items()}
    right = trainer(tmp_path, student=student, teacher=teacher, objective=objective, data=data)
    batch = right.data_collator(data)
    moved = {k: v.clone() for k, v in batch.items()}
    for k in moved:
        moved[k][1] = torch.roll(moved[k][1], 4)
    values = [float(right.model(b)["loss"].detach()) for b in (batch, moved)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_a_teacher_of_another_dtype_and_its_mode(tmp_path):
    student, teacher = models()
    teacher = teacher.to(torch.bfloat16).train()
    kept = state(teacher)
    made = trainer(tmp_path, student=student, teacher=teacher, settings={"max_steps": 2})
    made.train()
    assert not teacher.training and all(torch.equal(kept[n], t) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_several_teachers_are_averaged(tmp_path):
    student, teacher = models()
    other = make_tiny("llama", seed=5, layers=2)
    batch = None
    values = []
    for teachers, shares in (([teacher, other], (1.0, 0.0)), ([other, teacher], (0.0, 2.0)), (teacher, None)):
        options = {"teacher_weights": shares}
        made = trainer(tmp_path, student=student, teacher=teachers, options=options)
        batch = batch or made.data_collator(rows(4))
        values.append(float(made.model(batch)["loss"].detach()))
    assert values == pytest.approx([values[2]] * 3, rel=1e-5)
    with pytest.raises(BadInput, match="teacher_weights"):
        trainer(tmp_path, teacher=[teacher, other], options={"teacher_weights": (1.0,)})


def test_padding_rows_of_the_vocabulary(tmp_path):
    student, teacher = models()
    wide = make_tiny("llama", seed=1, layers=2, vocab=408)
    with torch.no_grad():
        own = dict(wide.named_parameters())
        for name, p in teacher.named_parameters():
            own[name][: p.shape[0]].copy_(p)
        own["lm_head.weight"][400:].zero_()
    with pytest.raises(IncompatibleModels, match=r"408.*400.*truncate"):
        trainer(tmp_path, student=student, teacher=wide)
    cut = trainer(tmp_path, student=student, teacher=wide, options={"align_vocab": "truncate"})
    plain = trainer(tmp_path, student=student, teacher=teacher)
    batch = plain.data_collator(rows(4))
    values = [float(each.model(batch)["loss"].detach()) for each in (cut, plain)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_it_saves_the_bare_student(tmp_path, tiny_tokenizer):
    student, teacher = models()
    options = {"processing_class": tiny_tokenizer}
    made = trainer(tmp_path, student=student, teacher=teacher, options=options, settings={"max_steps": 2})
    made.train()
    made.save_model(str(tmp_path / "student"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in student.state_dict().items())
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}


def test_evaluation_is_cross_entropy_of_the_labels(tmp_path):
    student, teacher = models()
    made = trainer(tmp_path, student=student, teacher=teacher)
    data = rows(4, seed=9)
    found = made.evaluate(data)["eval_loss"]
    batch = made.data_collator(data)
    right = student(**batch).loss
    assert found == pytest.approx(float(right.detach()), rel=1e-4)


class Plain(torch.nn.Module):
    """A language model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_a_plain_modules_tokens_are_evaluated_as_tokens(tmp_path):
    data, student = rows(4, vocab=40), Plain()
    made = trainer(
        tmp_path,
        student=student,
        teacher=Plain(),
        data=data,
        eval_dataset=data,
        data_collator=pad_collator(0),
    )
    ids = torch.tensor([row["input_ids"] for row in data])
    expected = torch.nn.functional.cross_entropy(student(ids)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_dense_labels_have_no_cross_entropy(tmp_path):
    class Dense(Objective):
        own = False

        def forward(self, student, teacher, batch):
            return {"loss": (student.whole() - batch["labels"]).square().mean()}

        def evaluation(self, student, batch):
            return (student.whole() - batch["labels"]).abs().mean() if self.own else None

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x)

    data = [{"x": torch.randn(2), "labels": torch.rand(3)} for _ in range(4)]
    made = trainer(tmp_path, student=Net(), teacher=Net(), objective=Dense(), data=data, eval_dataset=data)
    with pytest.raises(NotApplicable, match="classes"):
        made.evaluate()
    made.objective.own = True
    expected = [(made.student(row["x"]) - row["labels"]).abs().mean() for row in data]
    assert made.evaluate()["eval_loss"] == pytest.approx(float(sum(expected)) / 4, rel=1e-5)


def test_averaged_teachers_have_the_same_classes(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.layer = torch.nn.Linear(2, classes)

        def forward(self, x):
            return self.layer(x)

    data = [{"x": torch.randn(2), "labels": 1} for _ in range(4)]
    with pytest.raises(IncompatibleModels, match="teacher"):
        trainer(tmp_path, student=Net(3), teacher=[Net(3), Net(4)], data=data)


def test_an_objective_used_before_starts_afresh(tmp_path):
    """TAID's t in a second run is that of a first one, to the last bit."""
    objective, runs = TAID(t_start=0.2), []
    for _ in range(2):
        made = trainer(tmp_path, objective=objective, settings={"max_steps": 3})
        assert float(objective.t) == pytest.approx(0.2) and math.isnan(float(objective.previous))
        made.train()
        runs.append((made.losses, float(objective.t)))
    assert runs[0] == runs[1] and runs[0][1] > 0.2


def test_an_objective_used_before_resumes_where_its_checkpoint_says(tmp_path):
    objective = TAID(t_start=0.2)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    made = trainer(tmp_path, objective=objective, settings=settings)
    made.train()
    again = trainer(tmp_path, objective=objective, settings=settings)
    assert float(objective.t) == pytest.approx(0.2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert float(objective.t) > 0.2 and again.losses == made.losses


def test_an_adapter_is_a_student_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    student, teacher = models()
    before = state(student)
    adapted = get_peft_model(
        student, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    made = trainer(
        tmp_path, student=adapted, teacher=teacher, settings={"max_steps": 60, "learning_rate": 1e-2}
    )
    made.train()
    assert sum(made.losses[-10:]) < sum(made.losses[:10])
    assert all(torch.equal(before[n], t) for n, t in adapted.unload().state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"objective": "forward_kl"}, "did you mean"),
        ({"data": [{"input_ids": [5, 6], "labels": [-100, -100]}]}, "predicts no token"),
        ({"data": [{"input_ids": [5, 6], "labels": [5, -100]}]}, "predicts no token"),
        ({"options": {"align_vocab": "pad"}}, "align_vocab"),
    ],
)
def test_what_is_refused(tmp_path, change, says):
    with pytest.raises(BadInput, match=says) as caught:
        trainer(tmp_path, **change)
    assert "\n" not in str(caught.value)


def test_a_teacher_is_needed_and_is_not_the_student(tmp_path):
    student, teacher = models()
    with pytest.raises(BadInput, match="student itself"):
        trainer(tmp_path, student=student, teacher=student)
    with pytest.raises(BadInput, match="is needed by TAID"):
        Distiller(student=student, objective=TAID(), train_dataset=rows(), args=arguments(tmp_path))
    with pytest.raises(BadInput, match="train_dataset"):
        Distiller(
            student=student, teacher=teacher, objective="jsd", train_dataset=[], args=arguments(tmp_path)
        )
    plain = Distiller(
        student=student, objective="cross-entropy", train_dataset=rows(), args=arguments(tmp_path)
    )
    plain.train()
    assert plain.losses[-1] < plain.losses[0]


def test_tokenizers_are_compared(tmp_path, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["Quillmere"])
    options = {"processing_class": tiny_tokenizer, "teacher_tokenizer": other}
    trainer(tmp_path, options=options)  # one more token at the end means nothing else
    swapped = {token: (i + 1 if i == 7 else i - 1 if i == 8 else i) for token, i in other.get_vocab().items()}
    other.get_vocab = lambda: swapped
    with pytest.raises(IncompatibleModels, match="7 means"):
        trainer(tmp_path, options=options)


def test_modules_that_do_not_exist_are_named(tmp_path):
    objective = get("forward-kl")
    objective.teacher_taps = ("model.layers.9",)
    with pytest.raises(BadInput, match=r"model\.layers\.9"):
        trainer(tmp_path, objective=objective)


def test_frozen_lets_gradients_through_and_puts_all_back():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout())
    layer[0].bias.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    with frozen(layer):
        assert not layer.training and not any(p.requires_grad for p in layer.parameters())
        (slope,) = torch.autograd.grad(layer(x).sum(), x)
    assert slope.abs().sum() > 0 and layer.training and layer[1].training
    assert layer[0].weight.requires_grad and not layer[0].bias.requires_grad


PROGRAM = """
    import sys, json, torch
    sys.path[:0] = [{tests!r}, {tests!r} + "/distill"]
    from conftest import make_tiny
    from distilling import arguments, rows
    from transfuse.distill import Distiller
    from transfuse.distill.taid import TAID

    folder, size = sys.argv[1], int(sys.argv[2])
    data = rows(16)
    for i, row in enumerate(data):
        row["labels"] = [-100] * (2 + i % 6) + row["input_ids"][2 + i % 6:]
    made = Distiller(
        student=make_tiny("llama", seed=2, layers=1), teacher=make_tiny("llama", seed=1, layers=2),
        objective=TAID(t_start=0.2, alpha=0.5), train_dataset=data,
        args=arguments(folder, per_device_train_batch_size=size, max_steps=4, gradient_accumulation_steps=1,
                       ddp_find_unused_parameters=False),
    )
    made.train()
    if made.is_world_process_zero():
        print("RESULT " + json.dumps([[f["loss"] for f in made.figures], float(made.objective.t),
            float(sum(p.detach().double().pow(2).sum() for p in made.student.parameters()))]))
"""


def launched(tmp_path, command, size):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(tests=os.path.dirname(os.path.dirname(__file__)))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, str(program), str(tmp_path / f"out{size}"), str(size)],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return __import__("json").loads(lines[0][7:])


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Two CPU processes (accelerate launches none itself, torch's launcher does): losses, TAID's t and weights."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two, one = launched(tmp_path, launch, 2), launched(tmp_path, [], 4)
    assert two[0] == pytest.approx(one[0], abs=1e-4)
    assert two[1] == pytest.approx(one[1], abs=1e-6)
    assert two[2] == pytest.approx(one[2], rel=1e-5)


def test_stored_teachers_have_no_hidden_states(tmp_path):
    student, teacher = models()
    store = LogitStore.capture(teacher, rows(), tmp_path / "store", k=8)
    objective = get("forward-kl")
    objective.needs_logits = True
    with pytest.raises(BadInput, match="no hidden states"):
        trainer(tmp_path, student=student, teacher=store, objective=objective)
