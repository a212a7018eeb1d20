"""Talking models: a student asks a frozen teacher in messages and learns to understand the answer.

:arxiv: 2310.03188
:moves: what a teacher's upper layers make of a student's hidden states -> the student's weights
:access: hidden, weights, training data
:reversible: no
:context: no

The student may have its own task, label space and input distribution. Both models are cut at a low and a high layer.
Each owns an encoder E (state to message) and a decoder D (message to state), small MLPs around one message space:

    m_s  = E_s(s_l)           the student speaks
    t~_l = D_t(m_s)           the teacher hears it as a low state of its own,
    t~_u = h_{l->u}(t~_l)     and thinks: its weights are frozen, the gradient passes through them
    m_t  = E_t(t~_u)          the teacher answers
    s~_u = D_s(m_t)           the student understands

    L_interact = d(s~_u, s_u) + task(head(s~_u), y)                  the answer fits the student, and its task
    L_message  = d(E_s(s_l), E_t(t_l)) + d(E_s(s_u), m_t)            both say the same about the same input
    L_state    = d(D_s(E_s(s_u)), s_u) + d(D_t(E_t(t_l)), t_l)       what is said can be read again
    L = task(head(s_u), y) + interact L_interact + message L_message + state L_state,     d = mean squared error

With several rounds the understood s~_u, brought to the low layer by one more decoder, is what the student says
next; the losses are averaged over rounds. In the end the bare student is kept: messages cost nothing in use.

There is no official code, and the paper's text leaves distances and weights open: the forms above, weights of 1,
sizes and rates are choices made here. Where a model's two places differ in width, it has an encoder for each.
States of token sequences and feature maps are exchanged place by place where both models have the same places, else
as their mean (padding left out), which is heard as a sequence or map of equal places. Where a cut is at an activation
(ReLU), the decoded state goes through it too. Encoders and decoders compute in float32 under mixed precision.

    from transfuse.distill.talking_models import TalkingModels

    talk = TalkingModels(student, teacher, student_layers=("1", "3"), teacher_layers=("1", "3"), message_dim=24)
    talk.fit(batches, epochs=50)   # changes `student`
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batches import IGNORED
from ..core.errors import BadInput, IncompatibleModels
from ..core.files import hash_state
from ..core.runs import check_positive
from ..core.training import History, loop, seeded
from ._base import frozen, is_causal, logits_of
from ._messages import Messengers, activation, from_places, keep_of, places
from ._resume import Cut, default_cut

__all__ = ["Messengers", "TalkingModels", "distance", "from_places", "places", "talk"]

Batches = Iterable[Mapping[str, Any]] | Callable[[int], Iterable[Mapping[str, Any]]]


def distance(a: Tensor, b: Tensor, keep: Tensor | None = None, *, normalise: bool = False) -> Tensor:
    """Mean squared error of states or messages.

    Args:
        a: `[B, n, d]`.
        b: The same.
        keep: bool `[B, n]`: the places that count; None for all.
        normalise: Layer-normalise both first, so that scales do not count.

    Returns:
        A scalar: the mean over all numbers of the places kept; 0 without any.
    """
    if normalise:
        a, b = (nn.functional.layer_norm(x, x.shape[-1:]) for x in (a, b))
    if keep is not None:
        a, b = a[keep], b[keep]
    return (a - b).square().sum() / max(a.numel(), 1)


def talk(
    messengers: Messengers,
    student_low: Tensor,
    student_high: Tensor,
    teacher_low: Tensor,
    think: Callable[[Tensor], Tensor],
    task: Callable[[Tensor], Tensor],
    *,
    rounds: int = 1,
    keep: Tensor | None = None,
    normalise: bool = False,
) -> dict[str, Tensor]:
    """The conversation about a batch, and its three losses, averaged over rounds.

    Args:
        messengers: Encoders and decoders.
        student_low: s_l, `[B, n, d]`.
        student_high: s_u.
        teacher_low: t_l.
        think: The teacher's layers from its low to its high place, on `[B, n, d]`.
        task: The task's loss of a high state of the student.
        rounds: Number of rounds.
        keep: bool `[B, n]`: the places that count.
        normalise: Compare states layer-normalised.

    Returns:
        "interact", "message", "state", and "variance": of the student's first messages over the batch, the mean over
        their entries, without gradient. Near 0 it tells that all inputs are spoken of alike.
    """
    dtype = next(messengers.parameters()).dtype
    student_low, student_high, teacher_low = (x.to(dtype) for x in (student_low, student_high, teacher_low))
    said, meant = messengers.student_says(student_low), messengers.student_says(student_high)
    known = messengers.teacher_says(teacher_low)

    def apart(a: Tensor, b: Tensor, states: bool = True) -> Tensor:
        return distance(a, b, keep, normalise=normalise and states)

    state = apart(messengers.student_hears(meant), student_high)
    state = state + apart(messengers.teacher_hears(known), teacher_low)
    spoken = said.detach() if keep is None else said.detach()[keep]
    variance = spoken.flatten(0, -2).var(0, unbiased=False).mean()
    interact, message = torch.zeros_like(state), torch.zeros_like(state)
    for turn in range(rounds):
        answer = messengers.teacher_says(think(messengers.teacher_hears(said)).to(dtype))
        understood = messengers.student_hears(answer)
        interact = interact + apart(understood, student_high) + task(understood)
        message = message + apart(said, known, states=False) + apart(meant, answer, states=False)
        if turn + 1 < rounds:
            said = messengers.student_says(messengers.next_low(understood))
    return {"interact": interact / rounds, "message": message / rounds, "state": state, "variance": variance}


def _task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes (also per token; 0 without any label), mean squared error of numbers."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    total = nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp_min(1)


class TalkingModels:
    """Interactive distillation of a frozen teacher into a student that is trained on its own task.

    Args:
        student: Returns the task's logits or numbers; trained in place.
        teacher: Any model; only its states are used.
        student_layers: Names of the student's low and high place (module outputs). None: a third of the way up, and
            the last hidden state, of a transformer's blocks or an `nn.Sequential`.
        teacher_layers: The teacher's.
        message_dim: Width of a message.
        hidden: Width of the encoders' and decoders' hidden layer.
        rounds: Rounds of conversation.
        interact: Weight of L_interact.
        message: Weight of L_message.
        state: Weight of L_state.
        normalise: Compare layer-normalised states, for places of very different scale.
        pooled: Exchange means over places; "auto" where the places do not pair up in the first batch, or states are
            sequences and `teacher_inputs` is given: equal lengths are then a coincidence.
        tune_teacher: Train the teacher too, which the paper allows; its weights then change.
        task_loss: Of the student's output and the labels; None: cross-entropy for whole labels, the next token's for
            causal language models, mean squared error for numbers.
        teacher_inputs: What the teacher gets of a batch, where it reads other inputs than the student.

    Raises:
        BadInput: an argument out of range, a place that does not exist, a high place not above the low one; from
            `fit`: places that what follows does not read.
        IncompatibleModels: from `fit`: places that do not pair up, with `pooled=False`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_layers: tuple[str, str] | None = None,
        teacher_layers: tuple[str, str] | None = None,
        message_dim: int = 64,
        hidden: int = 128,
        rounds: int = 1,
        interact: float = 1.0,
        message: float = 1.0,
        state: float = 1.0,
        normalise: bool = False,
        pooled: bool | Literal["auto"] = "auto",
        tune_teacher: bool = False,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ):
        if student is teacher:
            raise BadInput("teacher", type(teacher).__name__, "is the student itself", "pass a deep copy")
        check_positive(message_dim=message_dim, hidden=hidden, rounds=rounds)
        for name, weight in (("interact", interact), ("message", message), ("state", state)):
            if not weight >= 0:
                raise BadInput(name, weight, "is not a weight", "give a number from 0 up")
        self.asking = Cut(student, *(student_layers or default_cut(student)), argument="student_layers")
        self.answering = Cut(teacher, *(teacher_layers or default_cut(teacher)), argument="teacher_layers")
        self.student, self.teacher = student, teacher
        self.message_dim, self.hidden, self.rounds = message_dim, hidden, rounds
        self.weights = {"interact": interact, "message": message, "state": state}
        self.normalise, self.pooled, self.tune_teacher = normalise, pooled, tune_teacher
        self.task_loss, self.teacher_inputs = task_loss, teacher_inputs
        self.messengers: Messengers | None = None
        self.figures: list[dict[str, float]] = []
        self._means: bool | None = (
            None  # whether means over places are exchanged; known from the first batch on
        )

    def fit(
        self,
        batches: Batches,
        *,
        epochs: int = 50,
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
        accumulation: int = 1,
        clip: float | None = None,
        seed: int = 0,
        output_dir: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = True,
    ) -> History:
        """Train the student, and encoders and decoders with it, by Adam.

        `messengers` holds the latter afterwards, `figures` the single losses of each batch.

        Args:
            batches: Mappings with the models' inputs and `labels`, as `core.training.loop` takes them; the first is
                looked at once more for the states' sizes.
            epochs: Passes over them.
            lr: Learning rate.
            weight_decay: Added to the gradient.
            accumulation: Batches per update.
            clip: Largest norm of the gradient.
            seed: Of the encoders' and decoders' first weights, and of the run.
            output_dir: Folder of checkpoints.
            save_every: Updates between them.
            resume: Go on from them.

        Raises:
            BadInput: no batch, or none with labels; places that what follows does not read.
            IncompatibleModels: places that do not pair up.
        """
        with seeded(seed):
            batch = next(iter(batches(0) if callable(batches) else batches), None)
            if batch is None or "labels" not in batch:
                raise BadInput(
                    "batches", batch and sorted(batch), "have no labels", "give rows with `labels`"
                )
            self.messengers = self._made(batch)
        parts = {"student": self.student, "messengers": self.messengers}
        if self.tune_teacher:
            parts["teacher"] = self.teacher
        model = nn.ModuleDict(parts)
        weights = [p for p in model.parameters() if p.requires_grad]
        rule = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay)
        self.figures = []
        with contextlib.nullcontext() if self.tune_teacher else frozen(self.teacher):
            return loop(
                model, batches, self._step, optimizer=rule, epochs=epochs, accumulation=accumulation, clip=clip,
                seed=seed, output_dir=output_dir, save_every=save_every, resume=resume,
                identity=None if output_dir is None else self._identity(),
            )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What a run is recognised by, besides the loop's own arguments; a teacher that is trained changes."""
        names = ("message_dim", "hidden", "rounds", "weights", "normalise", "pooled", "tune_teacher")
        settings = {name: getattr(self, name) for name in names}
        cuts = [self.asking.low, self.asking.high, self.answering.low, self.answering.high]
        teacher = None if self.tune_teacher else hash_state(self.teacher.state_dict())
        return {"talking_models": {**settings, "cuts": cuts, "teacher": teacher}}

    def _heard(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return batch if self.teacher_inputs is None else self.teacher_inputs(batch)

    def _places(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Any, heard: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """s_l, s_u, t_l as `[B, n, d]`, and which places count; decides once whether means are exchanged."""
        counts = [places(x).shape[1] for x in (*student, *teacher)]
        if self._means is None:
            apart = len({*counts}) > 1 or (
                self.teacher_inputs is not None and any(x.dim() == 3 for x in (*student, *teacher))
            )
            self._means = apart if self.pooled == "auto" else self.pooled
        if len({*counts}) > 1 and not self._means:
            problem = "places of the student's and the teacher's low and high states do not pair up"
            raise IncompatibleModels("pooled", counts, problem, "use pooled=True")
        known = ((student[0], batch), (student[1], batch), (teacher[0], heard))
        masks = [keep_of(x, each) for x, each in known]
        low, high, other = (
            places(x, pooled=self._means, keep=mask) for (x, _), mask in zip(known, masks, strict=True)
        )
        given = [mask for mask in masks if mask is not None]
        return low, high, other, None if self._means or not given else given[0] & given[-1]

    def _made(self, batch: Mapping[str, Any]) -> Messengers:
        """New encoders and decoders, for the states of a first batch."""
        heard = self._heard(batch)
        with frozen(self.student), frozen(self.teacher):
            asked = self.asking.states(batch, grad=False, whole=False)[:2]
            known = self.answering.states(heard, grad=False, whole=False)[:2]
        self._means = None
        self._places(asked, known, batch, heard)
        widths = [places(x).shape[-1] for x in (*asked, *known)]
        cuts = (self.asking.low_module, self.asking.high_module, self.answering.low_module)
        made = Messengers(
            (widths[0], widths[1]), (widths[2], widths[3]), self.message_dim, self.hidden, self.rounds,
            tuple(activation(module) for module in cuts),
        )  # fmt: skip
        self.asking.check(batch, high=asked[1])
        self.answering.check(heard, low=known[0])
        return made.to(asked[0].device)

    def _step(self, batch: Any) -> dict[str, Tensor]:
        """The loss of a batch."""
        assert self.messengers is not None
        low, high, output = self.asking.states(batch, grad=True, whole=True)
        found = {"task": self._task(output, batch)}
        loss = found["task"]
        if any(self.weights.values()):
            heard = self._heard(batch)
            self.teacher.eval()
            known = self.answering.states(heard, grad=self.tune_teacher, whole=False)[:2]
            s_low, s_high, t_low, keep = self._places((low, high), known, batch, heard)

            def think(state: Tensor) -> Tensor:
                end = self.answering.between(from_places(state, known[0]), heard)
                return places(end, pooled=bool(self._means), keep=keep_of(end, heard))

            def task(state: Tensor) -> Tensor:
                return self._task(self.asking.above(from_places(state, high), batch), batch)

            found |= talk(
                self.messengers, s_low, s_high, t_low, think, task, rounds=self.rounds, keep=keep,
                normalise=self.normalise,
            )  # fmt: skip
            loss = loss + sum(weight * found[name] for name, weight in self.weights.items())
        self.figures.append({name: float(value.detach()) for name, value in found.items()})
        return {"loss": loss}

    def _task(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        logits, labels = logits_of(output), batch["labels"]
        if is_causal(self.student):
            logits, labels = logits[:, :-1], labels[:, 1:]
        return (self.task_loss or _task_loss)(logits, labels)
