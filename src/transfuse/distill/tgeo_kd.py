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

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.divergence import kl_terms
from ..core.errors import BadInput, NotApplicable
from ..core.runs import History
from ..core.training import loop, seeded
from ._base import Reader, check_vocabulary, frozen, is_causal
from ._bilevel import Alternating, Turns, as_loss, check_data, epoch_of, held_out_rows, mixing_slopes

__all__ = ["TGeoKD", "TrilateralWeighting", "class_means", "mixed_terms", "trilateral_features"]

Features = Literal["full", "edges", "vertices"]
Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
_WIDTHS = {"full": 9, "edges": 3, "vertices": 4}


def trilateral_features(
    student: Tensor, teacher: Tensor, target: Tensor, mean: Tensor, kind: Features = "full"
) -> Tensor:
    """What the mixing network reads: corners and squared edges, element by element.

    Args:
        student: Probabilities S, `[B, C]`.
        teacher: Probabilities P, `[B, C]`.
        target: One-hot labels G, `[B, C]`.
        mean: The teacher's mean probabilities of each sample's class, Pbar, `[B, C]`.
        kind: "full", "edges" (those at S) or "vertices".

    Returns:
        `[B, 9C]`, `[B, 3C]` or `[B, 4C]`, in the order of the module's formula.
    """
    corners = [student, teacher, target, mean]
    near = [(mean - student) ** 2, (target - student) ** 2, (teacher - student) ** 2]
    far = [(teacher - target) ** 2, (mean - target) ** 2]
    chosen = {"full": corners + near + far, "edges": near, "vertices": corners}
    return torch.cat(chosen[kind], dim=-1)


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


class TrilateralWeighting(nn.Module):
    """The mixing network: from student, teacher and label to a ratio per sample.

    Args:
        num_classes: C.
        hidden: Widths of its hidden layers, each followed by a leaky ReLU.
        features: What it reads; see `trilateral_features`.

    Attributes:
        means: Pbar, a buffer `[C, C]`; uniform until it is set.

    Raises:
        BadInput: an argument out of range.
    """

    means: Tensor

    def __init__(self, num_classes: int, *, hidden: Sequence[int] = (32, 16), features: Features = "full"):
        super().__init__()
        if num_classes < 2:
            raise BadInput("num_classes", num_classes, "is below 2", "give the number of classes")
        if features not in _WIDTHS:
            raise BadInput("features", features, "is not known", f"use one of {', '.join(_WIDTHS)}")
        if any(width < 1 for width in hidden):
            raise BadInput("hidden", tuple(hidden), "holds a width below 1", "give positive widths")
        self.num_classes, self.features = num_classes, features
        widths = [_WIDTHS[features] * num_classes, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.register_buffer("means", torch.full((num_classes, num_classes), 1.0 / num_classes))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The ratios; they take a gradient by this network's weights only.

        Args:
            student: Logits `[B, C]`.
            teacher: Logits `[B, C]`.
            labels: int64 `[B]`.

        Returns:
            alpha `[B]`, between 0 and 1, in float32 (float64 for a network in float64).
        """
        dtype = self.means.dtype
        s, p = (torch.softmax(z.detach().to(dtype), dim=-1) for z in (student, teacher))
        target = nn.functional.one_hot(labels, self.num_classes).to(dtype)
        with torch.autocast(student.device.type, enabled=False):
            delta = trilateral_features(s, p, target, self.means[labels], self.features)
            return torch.sigmoid(self.net(delta)).squeeze(-1)


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
        positive = {"temperature": temperature, "inner_lr": inner_lr, "outer_every": outer_every}
        for name, value in {
            **positive,
            "mixing_lr": mixing_lr,
            "mixing_weight_decay": mixing_weight_decay,
        }.items():
            if not value >= 0 or (name in positive and value == 0):
                raise BadInput(name, value, "is out of range", "give a number above 0")
        if unroll not in ("exact", "difference"):
            raise BadInput("unroll", unroll, "is not known", 'use "exact" or "difference"')
        self.student, self.teacher, self.num_classes, self.seed = student, teacher, num_classes, seed
        self.temperature, self.inner_lr, self.outer_every = temperature, inner_lr, outer_every
        self.mixing_lr, self.mixing_weight_decay, self.unroll = mixing_lr, mixing_weight_decay, unroll
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
            IncompatibleModels: the teacher has another number of classes.
        """
        sums = torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64)
        counts = torch.zeros(self.num_classes, dtype=torch.long)
        number = 0
        with frozen(self.teacher):
            for batch in batches:
                labels = batch["labels"].cpu()
                if labels.dim() != 1 or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
                    raise BadInput(
                        "train", tuple(labels.shape), f"has labels that are not classes below {self.num_classes}",
                        "give one class per sample",
                    )  # fmt: skip
                logits = self._teacher_logits(batch).double().cpu()
                check_vocabulary(logits.new_zeros(len(labels), self.num_classes), logits)
                sums.index_add_(0, labels, torch.softmax(logits, dim=-1))
                counts += torch.bincount(labels, minlength=self.num_classes)
                number += 1
        if not number:
            raise BadInput("train", 0, "batches are no data", "give at least one batch")
        self.mixing.means.copy_(_means(sums, counts))
        return number

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
            validation: The same, of samples that are not trained on; gone through in turn.
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
            BadInput: no validation data, data that can be gone through only once, labels that are no classes.
            NotApplicable: more than one process.

        Warns:
            UserWarning: validation samples that are in the training data.
        """
        check_data(train, validation)
        assert validation is not None
        with seeded(self.seed):
            held_out_rows(self.student, epoch_of(train, 0), epoch_of(validation, 0))
            number = self.measure(epoch_of(train, 0))
        own = optimizer or torch.optim.Adam((p for p in self.student.parameters() if p.requires_grad), lr=lr)
        mixing = torch.optim.Adam(
            self.mixing.parameters(), lr=self.mixing_lr, weight_decay=self.mixing_weight_decay
        )
        order = Turns(number, self.outer_every)

        def step(item: Mapping[str, Any]) -> Tensor:
            if "held" in item:
                return self.outer_step(item["batch"], item["held"])
            return self.inner_step(item["batch"])

        def told(done: int, loss: float) -> None:
            if on_step is not None and order.inner(done - 1):
                on_step(order.count(done), loss)

        models = nn.ModuleDict({"student": self.student, "mixing": self.mixing})
        self.figures, self._said = [], None
        with frozen(self.teacher):
            history = loop(
                models, lambda epoch: order.items(epoch_of(train, epoch), epoch_of(validation, epoch)), step,
                optimizer=Alternating(own, mixing), epochs=epochs, clip=clip, seed=self.seed,
                output_dir=output_dir, save_every=save_every, resume=resume, on_step=told,
            )  # fmt: skip
        losses = [loss for i, loss in enumerate(history.losses) if order.inner(i)]
        return History(losses, history.seconds, order.count(history.resumed_at))
