"""General knowledge transfer: move what any teacher knows better into a trained student, and keep the rest.

:arxiv: 2310.17653
:moves: what trained models of one label space get right -> another trained model's weights
:access: logits, weights, training data
:reversible: no
:context: no

Two models trained on the same data each get samples right that the other gets wrong, whichever is better overall.
`complementarity` measures that: rho_pos, the share that the teacher alone gets right, rho_neg, the share that the
student alone does, and how the former spread over classes. Plain distillation brings the first and destroys the second.
Here every sample has one teacher, chosen between the teacher z_t and a frozen copy z_st of the student at its start:

    partition="labels"        teacher where softmax(z_t)[y] > softmax(z_st)[y]           (KL-Dist + DP, supervised)
    partition="confidence"    teacher where max softmax(z_t) > max softmax(z_st)         (no labels needed)
    L = alpha T^2 mean KL(softmax(z* / T) || softmax(z_s / T)) + (1 - alpha) mean CE(z_s, y),    z* the chosen logits

A tie goes to the student. The choice never looks at the student in training. `partition="none"` is plain KL
(alpha = 0.5: XE-KL), "student" distils the frozen copy alone (a baseline). `tau` adds a slow copy of the weights,
theta_slow <- tau theta_slow + (1 - tau) theta every few updates, which is then what is kept (MCL; the paper has
alpha = 0.68 and tau = 0.9999 there). Several teachers: "parallel" chooses among all of them and the frozen copy;
"sequential" takes one after the other, with a new frozen copy and a new optimizer each; "soup" transfers from each
separately and averages the students. For causal language models all of this is per token, y being the next one.

Where paper and code differ: the code's cross-entropy takes probabilities for logits; here it takes logits
(`legacy_double_softmax` repeats the code). Its search for the classes that hold p % of the flips returns one class
too many, and with it its transfer rate; here they are exact, for any number of classes. Its slow weights share memory
with the student until the first update; here they start at the student's start, and updates are counted over epochs.
Its setting of MCL also leaves out samples that only the student gets right; the paper's equation does not.
An over-confident teacher wins the unsupervised choice: `calibrate` finds a temperature for each model first.

    from transfuse.distill.general_transfer import GeneralTransfer, complementarity

    print(complementarity(student, teacher, test_batches).positive)
    GeneralTransfer(student, teacher, partition="labels").fit(train_batches, epochs=20)   # changes `student`
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.divergence import forward_kl
from ..core.errors import BadInput
from ..core.files import hash_state
from ..core.runs import check_positive
from ..core.training import History, loop, seeded
from ._base import Reader, frozen
from ._distiller import same_tokenizers
from ._flips import (
    Batches,
    Flips,
    Prepare,
    accuracy,
    aligned,
    complementarity,
    labels_of,
    prediction_flips,
    same_classes,
    transfer_rate,
)
from ._zoo import calibrate, choose, compared, confidence, follow, soup, widened

__all__ = [
    "Flips",
    "GeneralTransfer",
    "Stage",
    "calibrate",
    "choose",
    "complementarity",
    "confidence",
    "prediction_flips",
    "soup",
    "transfer_loss",
    "transfer_rate",
]

KINDS = {
    "partition": ("labels", "confidence", "none", "student"),
    "mode": ("parallel", "sequential", "soup"),
    "order": ("given", "ascending", "descending"),
}
ROWS = 256  # the batch that the paper's learning rates belong to


def transfer_loss(
    student: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    legacy_double_softmax: bool = False,
) -> Tensor:
    """Alpha T^2 mean KL(softmax(target / T) || softmax(student / T)) + (1 - alpha) mean cross-entropy.

    Args:
        student: Logits `[n, C]`.
        target: Logits `[n, C]`, which take no gradient.
        labels: Classes `[n]`, needed for alpha < 1.
        temperature: T.
        alpha: Weight of the divergence.
        legacy_double_softmax: Give the cross-entropy probabilities in place of logits.

    Returns:
        A scalar in float32 at least.
    """
    value = alpha * temperature**2 * forward_kl(student, target.detach(), temperature=temperature)
    if alpha < 1:
        assert labels is not None
        logits = student.to(torch.promote_types(student.dtype, torch.float32))
        entries = torch.softmax(logits, -1) if legacy_double_softmax else logits
        total = nn.functional.cross_entropy(entries, labels, reduction="sum")
        value = value + (1 - alpha) * total / max(len(labels), 1)
    return value


@dataclass(frozen=True)
class Stage:
    """One run of training.

    Attributes:
        teachers: Numbers of its teachers, from 0.
        history: Its losses.
        teacher_share: Share of the rows whose target was a teacher's, over the updates made by this process.
    """

    teachers: tuple[int, ...]
    history: History
    teacher_share: float


class GeneralTransfer:
    """Transfer from one or more trained teachers into a trained student.

    Args:
        student: Returns logits; trained in place.
        teachers: One model or several, with the student's classes or vocabulary; not changed.
        partition: Who teaches which sample: "labels", "confidence", "none" (always the teacher) or "student".
        mode: What several teachers do: "parallel", "sequential" or "soup".
        order: In which order they come in sequence: as given, or by rising or falling accuracy on the batches.
        temperature: T of the divergence.
        alpha: Weight of the divergence; the rest is the cross-entropy's.
        tau: Decay of the slow weights, which are kept in float32 at least; None for none.
        every: Updates between slow steps; None is the paper's 2 at 256 rows per update, scaled to the same rows.
        calibration: Temperatures of the student and each teacher for the choice (`calibrate`).
        legacy_double_softmax: Repeat the code's cross-entropy of probabilities.
        freeze_batchnorm: Keep the student's batch-norm statistics: small data sets shift them.
        inputs: What the student and each teacher do to a batch first (None: nothing), where their
            preprocessing differs.
        tokenizer: Of a student that is a language model.
        teacher_tokenizers: Of its teachers, to be compared with it.

    Raises:
        BadInput: an argument out of range, or the student among the teachers.
        IncompatibleModels: other names of classes, or tokenizers; from `fit`, another number of classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        *,
        partition: Literal["labels", "confidence", "none", "student"] = "labels",
        mode: Literal["parallel", "sequential", "soup"] = "parallel",
        order: Literal["given", "ascending", "descending"] = "given",
        temperature: float = 1.0,
        alpha: float = 1.0,
        tau: float | None = None,
        every: int | None = None,
        calibration: Sequence[float] | None = None,
        legacy_double_softmax: bool = False,
        freeze_batchnorm: bool = False,
        inputs: Sequence[Prepare | None] | None = None,
        tokenizer: Any = None,
        teacher_tokenizers: Sequence[Any] = (),
    ):
        models = list(teachers) if isinstance(teachers, Sequence | nn.ModuleList) else [teachers]
        for name, value in (("partition", partition), ("mode", mode), ("order", order)):
            if value not in KINDS[name]:
                raise BadInput(name, value, "is not known", f"use one of {', '.join(KINDS[name])}")
        if not models:
            raise BadInput("teachers", "[]", "has no model", "give at least one")
        if any(model is student for model in models):
            raise BadInput("teachers", type(student).__name__, "is the student itself", "pass a deep copy")
        if not 0 <= alpha <= 1:
            raise BadInput("alpha", alpha, "is not between 0 and 1", "give a share")
        if not temperature > 0:
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        if tau is not None and not 0 <= tau < 1:
            raise BadInput("tau", tau, "is not from 0 to below 1", "give a decay, or None")
        check_positive(every=every)
        if partition == "none" and mode == "parallel" and len(models) > 1:
            problem = f"chooses none of {len(models)} parallel teachers"
            raise BadInput("partition", partition, problem, 'use "labels" or "confidence", or another mode')
        for name, given in (("calibration", calibration), ("inputs", inputs)):
            if given is not None and len(given) != len(models) + 1:
                problem = f"entries, for {len(models) + 1} models"
                raise BadInput(name, len(given), problem, "give the student's first, then each teacher's")
        if calibration is not None and not all(value > 0 for value in calibration):
            raise BadInput("calibration", list(calibration), "are not temperatures", "give numbers above 0")
        for model in models:
            same_classes(student, model)
        for other in teacher_tokenizers:
            same_tokenizers(tokenizer, other)
        self.student, self.teachers = student, models
        self.partition, self.mode, self.order = partition, mode, order
        self.temperature, self.alpha, self.tau, self.every = temperature, alpha, tau, every
        self.calibration, self.inputs = calibration, list(inputs or [None] * (len(models) + 1))
        self.legacy_double_softmax, self.freeze_batchnorm = legacy_double_softmax, freeze_batchnorm

    def fit(
        self,
        batches: Batches,
        *,
        epochs: int = 20,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        accumulation: int = 1,
        seed: int = 0,
        output_dir: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = True,
        on_step: Callable[[int, float], None] | None = None,
    ) -> list[Stage]:
        """Train the student, in one stage or one per teacher.

        Args:
            batches: Mappings with the models' inputs and, but for "confidence", "none" and "student" at
                alpha = 1, `labels`. As `core.training.loop` takes them; read once more for their size.
            epochs: Passes per stage.
            lr: Learning rate; None is the paper's: 1e-4 per 256 rows of an update, 0.01 with slow weights.
            momentum: Of SGD.
            weight_decay: Of the optimizer.
            optimizer: "sgd", the paper's, or "adamw".
            accumulation: Batches per update.
            seed: Of the run.
            output_dir: Folder of checkpoints, one folder per stage in it. A run that is started again needs the
                student it was started with.
            save_every: Updates between checkpoints.
            resume: Go on from them.
            on_step: Called after each update, with its number in the stage and its loss.

        Returns:
            The stages; `student` itself is changed.

        Raises:
            BadInput: batches without labels where they are needed.
            IncompatibleModels: models with another number of classes.
        """
        if optimizer not in ("sgd", "adamw"):
            raise BadInput("optimizer", optimizer, "is not known", 'use "sgd" or "adamw"')
        check_positive(epochs=epochs, accumulation=accumulation, save_every=save_every)
        models = [self.student, *self.teachers]
        rows = compared(models, self.inputs, batches, labels=self._needy, seed=seed) * accumulation
        rows *= Accelerator().num_processes  # each has batches of its own
        rate = (1e-4 if self.tau is None else 0.01) * rows / ROWS if lr is None else lr
        every = max(1, round(2 * ROWS / rows)) if self.every is None else self.every
        begin = {name: value.clone() for name, value in self.student.state_dict().items()}
        stages: list[Stage] = []
        ends: list[dict[str, Tensor]] = []
        for number, chosen in enumerate(self._plan(batches, seed)):
            if self.mode == "soup":
                self.student.load_state_dict(begin)
            slow = None if self.tau is None else widened(self.student)  # kept in checkpoints, too
            parts = {"student": self.student} | ({} if slow is None else {"slow": slow})
            weights = [p for p in self.student.parameters() if p.requires_grad]
            rule: torch.optim.Optimizer = (
                torch.optim.SGD(weights, lr=rate, momentum=momentum, weight_decay=weight_decay)
                if optimizer == "sgd"
                else torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay)
            )

            def stepped(count: int, loss: float, slow: nn.Module | None = slow) -> None:
                if slow is not None and count % every == 0:
                    follow(slow, self.student, self.tau or 0.0)
                if on_step is not None:
                    on_step(count, loss)

            shares: list[float] = []
            with contextlib.ExitStack() as stack:
                for k in chosen:
                    stack.enter_context(frozen(self.teachers[k]))
                history = loop(
                    nn.ModuleDict(parts), batches, self._step(chosen, shares), optimizer=rule, epochs=epochs,
                    accumulation=accumulation, seed=seed, save_every=save_every, resume=resume,
                    output_dir=None if output_dir is None else Path(output_dir) / f"stage-{number}",
                    on_step=stepped, identity=None if output_dir is None else self._identity(chosen, every),
                )  # fmt: skip
            if slow is not None:
                self.student.load_state_dict(slow.state_dict())
            stages.append(Stage(chosen, history, sum(shares) / len(shares) if shares else math.nan))
            if self.mode == "soup":
                ends.append({name: value.clone() for name, value in self.student.state_dict().items()})
        if ends:
            self.student.load_state_dict(soup(ends))
        return stages

    def _identity(self, chosen: tuple[int, ...], every: int) -> dict[str, Any]:
        """What a stage is recognised by, besides the loop's own arguments."""
        names = (
            "partition",
            "mode",
            "order",
            "temperature",
            "alpha",
            "tau",
            "calibration",
            "freeze_batchnorm",
        )
        settings = {name: getattr(self, name) for name in names}
        taught = {"every": every, "legacy": self.legacy_double_softmax, "chosen": chosen}
        teachers = [hash_state(self.teachers[k].state_dict()) for k in chosen]
        return {"general_transfer": {**settings, **taught, "teachers": teachers}}

    @property
    def _needy(self) -> bool:
        """Whether every batch must have labels."""
        return self.partition == "labels" or self.alpha < 1

    def _plan(self, batches: Batches, seed: int) -> list[tuple[int, ...]]:
        """The teachers of each stage."""
        numbers = list(range(len(self.teachers)))
        if self.mode == "parallel":
            return [tuple(numbers)]
        if self.order != "given":
            with seeded(seed):
                found = [accuracy(self.teachers[k], batches, self.inputs[k + 1]) for k in numbers]
            numbers.sort(key=found.__getitem__, reverse=self.order == "descending")
        return [(k,) for k in numbers]

    def _step(self, chosen: Sequence[int], shares: list[float]) -> Callable[[Any], Tensor]:
        """The loss of a batch, against the student as it is now."""
        kept = copy.deepcopy(self.student).eval().requires_grad_(False)
        student, fixed = Reader(self.student, fuse=False), Reader(kept, fuse=False)
        readers = [Reader(self.teachers[k], fuse=False) for k in chosen]
        own, *others = self.inputs
        heat = self.calibration and [self.calibration[0], *(self.calibration[k + 1] for k in chosen)]
        norms = [m for m in self.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

        def step(batch: Any) -> Tensor:
            for norm in norms if self.freeze_batchnorm else ():
                norm.eval()
            labels = labels_of(batch, causal=student.causal, needed=self._needy)
            mask = batch.get("attention_mask")

            def rows(reader: Reader, prepare: Prepare | None, grad: bool = False) -> Any:
                logits = reader(batch if prepare is None else prepare(batch), grad=grad).whole()
                return aligned(logits, labels, causal=student.causal, mask=mask)

            ours, truth = rows(student, own, grad=True)
            if self.partition in ("none", "student"):
                teacher = self.partition == "none"
                target = rows(readers[0], others[chosen[0]])[0] if teacher else rows(fixed, own)[0]
                shares.append(float(teacher))
            else:
                theirs = (rows(reader, others[k])[0] for k, reader in zip(chosen, readers, strict=True))
                gold = truth if self.partition == "labels" else None
                target, who = choose(rows(fixed, own)[0], theirs, gold, temperatures=heat)
                shares.append(float((who > 0).sum()) / max(len(who), 1))
            return transfer_loss(
                ours, target, truth, temperature=self.temperature, alpha=self.alpha,
                legacy_double_softmax=self.legacy_double_softmax,
            )  # fmt: skip

        return step
