"""TGeo-KD: learn, per sample, how far to trust the teacher and how far the label.

:arxiv: 2312.15112
:moves: a teacher's class probabilities, as far as each sample deserves -> a student's weights
:access: logits, weights, training data
:reversible: no
:context: no

A teacher is right on some samples and wrong on others, and so are labels. A small network looks at the triangle of
the student's probabilities S, the teacher's P and the one-hot label G, and at Pbar, the teacher's mean over the
training samples of that label, which shows how unusual the sample is. It answers with a ratio per sample and step:

    delta   = [S, P, G, Pbar, (Pbar - S)^2, (G - S)^2, (P - S)^2, (P - G)^2, (Pbar - G)^2]        [B, 9C]
    alpha   = sigmoid(MLP_omega(delta))                                                         9C -> 32 -> 16 -> 1
    L_train = mean_i [alpha_i T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha_i) CE(z_s, y)]

The student's weights theta minimise L_train. omega minimises the cross-entropy of the trained student on held-out
samples, through one virtual step of plain gradient descent on the student:

    theta'    = theta - eta grad_theta L_train(theta, omega)
    L_val     = mean CE(f(theta', x_val), y_val),        an Adam step on omega by its gradient

Then alpha is computed again, without gradient, and the student's own optimizer moves theta by L_train. The features
take no gradient. `unroll="exact"` differentiates through theta'; `unroll="difference"` needs no second derivative:
with v = grad_theta' L_val and eps = 0.01 / |v|, the product is the difference of the slopes by omega of L_train at
theta + eps v and theta - eps v, times -eta / (2 eps). Both take the features at theta. Use it for large students and
for layers without a second derivative. The virtual step draws the dropout masks of the real one, and leaves the
statistics of batch norms alone.

The paper states the two levels and not their solver; one step of unrolling, eta = 1, the mixing network's learning
rate 3e-2 and T = 2 are this library's (the authors' script has T = 1.5, and 0.1 with weight decay 0.05). Where that
script differs from the paper, this follows the paper: there the ratio is computed without gradient and the outer
loss does not see it, so that it stays what the random weights give; the cross-entropy is applied to probabilities;
Pbar comes from the batch at hand. Here Pbar is measured once over all of the training data, and is uniform for a
class that does not occur. `features` chooses the 9C above ("full"), the three squared edges at S ("edges", 3C) or
the four corners ("vertices", 4C).

    from transfuse.distill.tgeo_kd import TGeoKD

    method = TGeoKD(student, teacher, num_classes=10)
    method.fit(train_batches, validation_batches, epochs=40)
    student.save_pretrained("student")
    print(method.figures[-1])      # quantiles of alpha, the validation loss
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.divergence import kl_terms
from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ..core.files import hash_state
from ..core.runs import History, check_positive
from ..core.training import loop, seeded
from ._base import Reader, check_vocabulary, frozen, is_causal
from ._bilevel import (
    Alternating,
    Turns,
    as_loss,
    check_data,
    check_labels,
    check_optimizer,
    epoch_of,
    held_out_rows,
    mixing_slopes,
)
from ._trilateral import Features, TrilateralWeighting, trilateral_features

__all__ = ["TGeoKD", "TrilateralWeighting", "class_means", "mixed_terms", "trilateral_features"]

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


def class_means(probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pbar: the mean of `probs` over the samples of each label.

    Args:
        probs: The teacher's, on training samples, `[N, C]`.
        labels: int64 `[N]`.
        num_classes: C.

    Returns:
        `[C, C]`, row c for label c; uniform where c does not occur.
    """
    sums = probs.new_zeros(num_classes, num_classes).index_add_(0, labels, probs)
    return _means(sums, torch.bincount(labels, minlength=num_classes))


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    found = sums / counts.clamp_min(1).unsqueeze(-1)
    return torch.where(counts.unsqueeze(-1) > 0, found, 1.0 / sums.shape[-1])


def both_terms(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(T^2 KL(p_t || p_s) at temperature T, CE with the label at 1), each `[B]`, in float32 or float64."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    z, w = student.to(dtype), teacher.to(dtype)
    log_q, log_p = (torch.log_softmax(x / temperature, dim=-1) for x in (z, w))
    return temperature**2 * kl_terms(log_p, log_q), nn.functional.cross_entropy(z, labels, reduction="none")


def mixed_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: Tensor, temperature: float = 2.0
) -> Tensor:
    """Alpha T^2 KL(p_t || p_s) + (1 - alpha) CE of each sample.

    Args:
        student: Logits `[B, C]`.
        teacher: Logits `[B, C]`, without gradient.
        labels: int64 `[B]`.
        alpha: Ratios `[B]`, from 0 (the label alone) to 1 (the teacher alone).
        temperature: T of the divergence.

    Returns:
        `[B]`.
    """
    kd, ce = both_terms(student, teacher, labels, temperature)
    return alpha * kd + (1.0 - alpha) * ce


class TGeoKD:
    """Bilevel distillation of a classifier with learned ratios per sample.

    `figures` holds, for each update of the student, the mean and quantiles of alpha and the last validation loss: a
    ratio that ends at 0 or 1 everywhere says that the teacher or the label is not worth mixing, or that the
    validation samples were trained on.

    Args:
        student: The classifier that is trained.
        teacher: A trained classifier of the same classes.
        num_classes: C.
        temperature: T of the divergence.
        hidden: Widths of the mixing network.
        features: What it reads.
        mixing_lr: Learning rate of its Adam; lower it where the ratios end at 0 everywhere. 0 leaves the first weights.
        mixing_weight_decay: L2 term of that Adam.
        inner_lr: eta, the length of the virtual step.
        outer_every: Updates of the student per update of the mixing network.
        unroll: "exact", or "difference" for large students.
        seed: Of the mixing network's first weights and of the run.

    Raises:
        BadInput: an argument out of range; student and teacher are one object.
        NotApplicable: a causal language model.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        num_classes: int,
        temperature: float = 2.0,
        hidden: Sequence[int] = (32, 16),
        features: Features = "full",
        mixing_lr: float = 3e-2,
        mixing_weight_decay: float = 0.0,
        inner_lr: float = 1.0,
        outer_every: int = 1,
        unroll: Literal["exact", "difference"] = "exact",
        seed: int = 0,
    ):
        if student is teacher:
            raise BadInput("teacher", type(teacher).__name__, "is the student", "give two models")
        for name, model in (("student", student), ("teacher", teacher)):
            if is_causal(model):
                raise NotApplicable(name, type(model).__name__, "predicts tokens", "give a classifier")
        check_positive(num_classes=num_classes, outer_every=outer_every)
        positive = {"temperature": temperature, "inner_lr": inner_lr}
        more = {"mixing_lr": mixing_lr, "mixing_weight_decay": mixing_weight_decay}
        for name, value in {**positive, **more}.items():
            if not 0 <= value < math.inf or (name in positive and value == 0):
                raise BadInput(name, value, "is out of range", "give a number above 0")
        if unroll not in ("exact", "difference"):
            raise BadInput("unroll", unroll, "is not known", 'use "exact" or "difference"')
        self.student, self.teacher, self.num_classes, self.seed = student, teacher, num_classes, seed
        self.temperature, self.inner_lr, self.outer_every = temperature, inner_lr, outer_every
        self.mixing_lr, self.mixing_weight_decay, self.unroll = mixing_lr, mixing_weight_decay, unroll
        self.hidden = tuple(hidden)
        with seeded(seed):
            self.mixing = TrilateralWeighting(num_classes, hidden=hidden, features=features)
        self.mixing.to(next(student.parameters()).device)
        self.readers = Reader(student, fuse=False), Reader(teacher, fuse=False)
        self.figures: list[dict[str, float]] = []
        self._said: Tensor | None = None
        self._validation_loss = float("nan")

    def measure(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Set Pbar from the training data.

        Args:
            batches: All of it, once.

        Returns:
            The number of batches.

        Raises:
            BadInput: no batch, or a label that is no class.
            IncompatibleModels: student or teacher has another number of classes.
        """
        sums = torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64)
        counts = torch.zeros(self.num_classes, dtype=torch.long)
        number = 0
        with frozen(self.teacher):
            for batch in batches:
                labels = check_labels(batch, self.num_classes, "train")
                if not number:
                    self._check_student(batch)
                logits = self._teacher_logits(batch).double().cpu()
                check_vocabulary(logits.new_zeros(len(labels), self.num_classes), logits)
                sums.index_add_(0, labels, torch.softmax(logits, dim=-1))
                counts += torch.bincount(labels, minlength=self.num_classes)
                number += 1
        if not number:
            raise BadInput("train", 0, "batches are no data", "give at least one batch")
        self.mixing.means.copy_(_means(sums, counts))
        return number

    def _check_student(self, batch: Mapping[str, Any]) -> None:
        with frozen(self.student):
            shape = tuple(self.readers[0](batch, grad=False).whole().shape)
        if shape != (len(batch["labels"]), self.num_classes):
            problem, remedy = f"is not the logits of {self.num_classes} classes", "give num_classes as it is"
            raise IncompatibleModels("student", shape, problem, remedy)

    def _settings(self) -> dict[str, Any]:
        names = ("num_classes", "temperature", "hidden", "inner_lr", "outer_every", "unroll")
        made = {"features": self.mixing.features, "teacher": hash_state(self.teacher.state_dict())}
        return {**{name: getattr(self, name) for name in names}, **made}

    def _teacher_logits(self, batch: Mapping[str, Any]) -> Tensor:
        return self.readers[1](batch, grad=False).whole()

    def outer_step(self, batch: Mapping[str, Any], held: Mapping[str, Any]) -> Tensor:
        """The validation loss after a virtual step of the student; its gradient reaches the mixing network alone.

        Args:
            batch: Training samples, `labels` among them.
            held: Validation samples.

        Returns:
            A scalar to minimise. Student and its statistics are as before.
        """
        self._said = self._teacher_logits(batch)
        loss, slopes = mixing_slopes(
            self.student, self.mixing, batch, self._said, held,
            terms=lambda z: both_terms(z, self._said, batch["labels"], self.temperature),  # type: ignore[arg-type]
            inner_lr=self.inner_lr, exact=self.unroll == "exact",
        )  # fmt: skip
        self._validation_loss = float(loss)
        return as_loss(loss, list(self.mixing.parameters()), slopes)

    def inner_step(self, batch: Mapping[str, Any]) -> Tensor:
        """L_train with the present ratios; its gradient reaches the student alone."""
        said = self._said if self._said is not None else self._teacher_logits(batch)
        self._said = None
        logits = self.readers[0](batch, grad=True).whole()
        with torch.no_grad():
            alpha = self.mixing(logits, said, batch["labels"])
        marks = torch.tensor([0.05, 0.5, 0.95], dtype=alpha.dtype, device=alpha.device)
        figures = torch.cat([alpha.mean().unsqueeze(0), alpha.quantile(marks)]).tolist()
        names = ("alpha", "alpha_q05", "alpha_q50", "alpha_q95")
        self.figures.append({**dict(zip(names, figures, strict=True)), "validation": self._validation_loss})
        return mixed_terms(logits, said, batch["labels"], alpha, self.temperature).mean()

    def fit(
        self,
        train: Batches,
        validation: Batches | None,
        *,
        epochs: int = 1,
        lr: float = 2e-3,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = True,
        on_step: Callable[[int, float], None] | None = None,
    ) -> History:
        """Train the student in place, on one process; it keeps its mode. Runs on `core.training.loop`.

        Args:
            train: Dicts of the models' inputs and `labels`: an iterable that can be iterated again, or a function
                of the epoch that returns one. Every epoch has the same number of batches.
            validation: The same, of samples that are not trained on; gone through in turn, on over the epochs. Each
                pass has the same number of batches and a random state of its own.
            epochs: Passes over `train`.
            lr: Learning rate of the student's Adam, where no `optimizer` is given.
            optimizer: The student's, over its parameters.
            clip: Largest norm of each of the two gradients.
            output_dir: Folder of the checkpoints: student, mixing network and both optimizers.
            save_every: Updates between checkpoints, those of the mixing network included.
            resume: Go on from a checkpoint.
            on_step: Called after each update of the student with the number made and its loss.

        Returns:
            L_train at each update of the student.

        Raises:
            BadInput: no validation data, data that can be gone through only once, labels that are no classes, an
                optimizer that is not the student's.
            IncompatibleModels: student or teacher has another number of classes.
            NotApplicable: more than one process.

        Warns:
            UserWarning: validation samples that are in the training data.
        """
        check_data(train, validation)
        assert validation is not None
        with seeded(self.seed):
            rows = epoch_of(train, 0), epoch_of(validation, 0)
            held, data = held_out_rows(self.student, *rows, self.num_classes)
            number = self.measure(epoch_of(train, 0))
        own = optimizer or torch.optim.Adam((p for p in self.student.parameters() if p.requires_grad), lr=lr)
        check_optimizer(own, self.student)
        mixing = torch.optim.Adam(
            self.mixing.parameters(), lr=self.mixing_lr, weight_decay=self.mixing_weight_decay
        )
        order = Turns(number, self.outer_every, held)

        def step(item: Mapping[str, Any]) -> Tensor:
            if "held" in item:
                return self.outer_step(item["batch"], item["held"])
            return self.inner_step(item["batch"])

        def told(done: int, loss: float) -> None:
            if on_step is not None and order.inner(done - 1):
                on_step(order.count(done), loss)

        def passes(number: int) -> list[Any]:
            with seeded((self.seed + number) % 2**32):  # so that a pass taken up again has its order
                return list(epoch_of(validation, number))

        models = nn.ModuleDict({"student": self.student, "mixing": self.mixing})
        known = {} if output_dir is None else {"tgeo_kd": {**self._settings(), "data": data}}
        self.figures, self._said = [], None
        with frozen(self.teacher):
            history = loop(
                models, lambda epoch: order.items(epoch_of(train, epoch), passes, epoch), step,
                optimizer=Alternating(own, mixing), epochs=epochs, clip=clip, seed=self.seed,
                output_dir=output_dir, save_every=save_every, resume=resume, on_step=told, identity=known,
            )  # fmt: skip
        losses = [loss for i, loss in enumerate(history.losses) if order.inner(i)]
        return History(losses, history.seconds, order.count(history.resumed_at))
