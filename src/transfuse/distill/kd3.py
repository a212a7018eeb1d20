"""KD3: distil with images crawled from the web, whose distribution is not the teacher's.

:arxiv: 2307.11469
:moves: a frozen image classifier and unlabelled foreign images -> a smaller classifier's weights
:access: logits, hidden, weights, training data
:reversible: no
:context: no

The teacher h_T(x) = W phi_T(x) is there, its data are not; a pool of crawled images is, with other styles and other
things in it. Three parts make up for the shift:

1. Selection. At the start of epoch e (e epochs are done, of E) every image of the pool gets the prediction
   p = (1 - a) p_T + a p_S with a = 0.5 e / E, and 0 while e < warm-up. Of the images predicted as class c those are
   kept whose confidence max p is in the class's top rho and at least 1.5 / C. The teacher stays in the mixture, so
   that the student cannot confirm its own mistakes.
2. A shared classifier. The student's head becomes W psi(phi_S(x)): a projector psi to the teacher's width, and a frozen
   copy of the teacher's classifier. Features are aligned where they matter for the class c = argmax p:

       L_align = mean |w * (psi(phi_S) - phi_T)|^2,    w_d = D |W_cd| / sum_d |W_cd|

3. MixDistribution. A copy of each image takes on channel statistics mixed with another's, mu_mix = l mu + (1 - l) mu'
   and s_mix alike, l ~ Beta(0.1, 0.1), x~ = s_mix (x - mu) / s + mu_mix. With u = psi(phi_S) of unit length, x and x~
   are each other's positive among the batch: cross-entropy of u u~^T / t with the diagonal, in both directions.

The loss is L_kd + L_align + 0.1 L_con, with L_kd = tau^2 KL(softmax(h_T / tau) || softmax(h_S / tau)); the student's
body and psi are trained. The student that comes out keeps its class and its body; in place of its head it has psi and
the teacher's classifier, so psi's parameters and W's are more than it had.

The paper's formulas could not be had, and there is no code: its three parts are as it describes them, and the way
each is computed (thresholds, weights w, MixStyle's exchange of statistics, the loss weights) is this module's reading.

    from transfuse.distill.kd3 import KD3

    run = KD3(teacher, student, crawled, teacher_head="fc", student_head="fc")
    run.fit(epochs=40, batch_size=64)
    student = run.student
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.batches import minibatches
from ..core.divergence import kl_terms
from ..core.errors import BadInput, IncompatibleModels
from ..core.runs import check_positive
from ..core.training import History, loop, seeded
from ._base import frozen, logits_of
from ._kd3 import (
    MixDistribution,
    NothingSelected,
    Selection,
    SharedHead,
    check_modules,
    check_pool,
    identity_of,
    install,
    last_linear,
    mix_distribution,
    outputs,
    select,
    suited,
)

__all__ = [
    "KD3",
    "MixDistribution",
    "NothingSelected",
    "Selection",
    "SharedHead",
    "alignment_loss",
    "combined",
    "contrast_loss",
    "gradient_importance",
    "importance",
    "mix_distribution",
    "select",
    "share_of_student",
    "soft_label_loss",
]


def share_of_student(done: int, total: int, warmup: int = 2) -> float:
    """a_e: 0.5 e / E after e of E epochs, 0 during the first `warmup` epochs."""
    return 0.0 if done < warmup else 0.5 * done / total


def combined(teacher: Tensor, student: Tensor, share: float) -> Tensor:
    """P = (1 - share) softmax(teacher) + share softmax(student) in float64, from logits `[B, C]`.

    In float32 sure predictions round to 1, and the choice of the surest would take all of them.
    """
    return (1.0 - share) * teacher.double().softmax(-1) + share * student.double().softmax(-1)


def importance(weight: Tensor, classes: Tensor) -> Tensor:
    """How much each feature counts for a class, with mean 1: w_d = D |W_cd| / sum_d |W_cd|.

    Args:
        weight: The teacher's classifier, `[C, D]`.
        classes: c of each image, int64 `[B]`.

    Returns:
        `[B, D]`, without gradient.
    """
    size = _exact(weight.detach()).abs()[classes]
    return size.shape[-1] * size / size.sum(-1, keepdim=True).clamp_min(1e-12)


def gradient_importance(head: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """The same for a head that is not linear: |gradient of the top logit| in place of |W_c|.

    Args:
        head: From features `[B, D]` to logits `[B, C]`, each row by itself.
        features: `[B, D]`.
    """
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        (slope,) = torch.autograd.grad(head(leaf).max(-1).values.sum(), leaf)
    size = _exact(slope).abs()
    return size.shape[-1] * size / size.sum(-1, keepdim=True).clamp_min(1e-12)


def alignment_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """L_align: mean over the batch of |w * (psi(phi_S) - phi_T)|^2, all three `[B, D]`; slopes for the first alone."""
    gap = weights.detach() * (_exact(student) - _exact(teacher).detach())
    return gap.square().sum(-1).mean()


def contrast_loss(student: Tensor, perturbed: Tensor, temperature: float = 0.1) -> Tensor:
    """L_con: each row of one `[B, D]` finds its partner among the rows of the other, mean of both directions."""
    u, v = (nn.functional.normalize(_exact(x), dim=-1) for x in (student, perturbed))
    alike = u @ v.T / temperature
    own = torch.arange(len(alike), device=alike.device)
    return (nn.functional.cross_entropy(alike, own) + nn.functional.cross_entropy(alike.T, own)) / 2


def soft_label_loss(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """L_kd: tau^2 KL(teacher || student) of softened logits `[B, C]`, mean over the batch."""
    log_p = torch.log_softmax(_exact(teacher).detach() / tau, -1)
    return tau**2 * kl_terms(log_p, torch.log_softmax(_exact(student) / tau, -1)).mean()


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class KD3:
    """Distil a teacher into a student with a pool of crawled images.

    Args:
        teacher: The classifier, called with images; not changed.
        student: The network that is trained, called with images. With `share_classifier` its head is replaced when
            `fit` begins.
        pool: Unlabelled images `[U, C, H, W]`, floating-point; rows of it go to the models' devices and dtypes.
        teacher_head: Name of the teacher's classifier; by default its last linear layer with one output per class.
        student_head: The student's.
        rho: Share of each predicted class that is kept; None trains on the whole pool.
        floor: Least confidence, times 1 / C.
        warmup: Epochs in which the teacher selects alone.
        follow_student: Whether the student has a say in the selection after that; else the teacher selects alone.
        share_classifier: Whether the student takes over the teacher's classifier; else it keeps its own, and a
            projector beside it serves `weights` alone.
        projector: psi, from the student's features `[B, D_s]` to `[B, D_t]`; by default linear, batch norm, ReLU.
            Give one without ReLU for teachers whose features may be negative.
        tau: Temperature of the soft labels.
        weights: Of soft labels, alignment, contrast.
        beta: Of the Beta distribution of MixDistribution's shares.
        temperature: t of the contrast.
        perturb_at: Module of the student whose output is perturbed; None perturbs the image.
        augment: A function of images `[B, C, H, W]` that is applied to each training batch.

    Raises:
        BadInput: an argument out of range; a pool without images; a name that does not exist.
        TypeError: no linear classifier was found and no name given (a `BadInput` as well).
        IncompatibleModels: student and teacher have different classes.

    Attributes:
        selections: What was kept, one `Selection` per epoch.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        pool: Tensor,
        *,
        teacher_head: str | None = None,
        student_head: str | None = None,
        rho: float | None = 0.5,
        floor: float = 1.5,
        warmup: int = 2,
        follow_student: bool = True,
        share_classifier: bool = True,
        projector: nn.Module | None = None,
        tau: float = 4.0,
        weights: Sequence[float] = (1.0, 1.0, 0.1),
        beta: float = 0.1,
        temperature: float = 0.1,
        perturb_at: str | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        if teacher is student:
            raise BadInput("teacher", type(student).__name__, "is the student itself", "pass a copy")
        if rho is not None and not 0.0 < rho <= 1.0:
            raise BadInput(
                "rho", rho, "is not a share above 0", "give a number up to 1, or None for the pool"
            )
        for name, value in (("tau", tau), ("beta", beta), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise BadInput(name, value, "is not positive", "give a number above 0")
        if len(weights) != 3 or any(not 0 <= weight < math.inf for weight in weights) or not sum(weights):
            remedy = "give soft labels', alignment's and contrast's, from 0 up and not all 0"
            raise BadInput("weights", tuple(weights), "are not three weights", remedy)
        if not floor >= 0 or warmup < 0:
            name, number = ("floor", floor) if not floor >= 0 else ("warmup", warmup)
            raise BadInput(name, number, "is negative", "give a number from 0 up")
        check_pool(pool)
        self.teacher, self.student, self.pool = teacher, student, pool
        self.teacher_head = teacher_head or last_linear(teacher, pool[:2], "teacher")
        self.student_head = student_head or last_linear(student, pool[:2], "student")
        self.rho, self.floor, self.warmup, self.follow_student = rho, floor, warmup, follow_student
        self.share_classifier, self.projector, self.augment = share_classifier, projector, augment
        self.tau, self.weights, self.temperature = tau, tuple(weights), temperature
        self.mix, self.perturb_at = MixDistribution(beta), perturb_at
        self.selections: list[Selection] = []
        self._psi: nn.Module | None = None  # made by `fit`
        check_modules(self)

    def fit(
        self,
        *,
        epochs: int = 40,
        batch_size: int = 64,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        max_steps: int | None = None,
        seed: int = 0,
        output_dir: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = True,
    ) -> History:
        """Train the student in place; afterwards it is in evaluation mode.

        Args:
            epochs: Passes over what is selected.
            batch_size: Images per batch.
            lr: Learning rate of SGD.
            momentum: Of SGD.
            weight_decay: Of SGD.
            optimizer: Makes another optimizer of the trained parameters.
            max_steps: Updates per epoch at most; None for whole passes.
            seed: Of the new weights, the order, and the perturbations.
            output_dir: Folder of checkpoints, see `core.training.loop`.
            save_every: Updates between them.
            resume: Go on from one.

        Raises:
            BadInput: a pool smaller than one batch, batches of one image, or a projector of another width.
            IncompatibleModels: student and teacher have different classes.
            NothingSelected: an epoch's selection is empty (a `RuntimeError`); it shows the confidences.
        """
        check_positive(epochs=epochs, batch_size=batch_size, max_steps=max_steps)
        if batch_size == 1:
            remedy = "give at least 2: an image is told from others of its batch"
            raise BadInput("batch_size", 1, "image is no batch", remedy)
        if len(self.pool) < batch_size:
            remedy = "give more images or smaller batches"
            raise BadInput("pool", len(self.pool), f"images are less than one batch of {batch_size}", remedy)
        z, phi = outputs(self.teacher, self.pool, self.teacher_head)
        classes = outputs(self.student, self.pool[:2], self.student_head)[0].shape[-1]
        if classes != z.shape[-1]:
            problem = f"classes, the student has {classes}"
            raise IncompatibleModels("teacher", z.shape[-1], problem, "use models with one label space")
        with seeded(seed):
            psi = self._psi = install(self, phi.shape[-1]) if self._psi is None else self._psi
        memory = _Memory(len(self.pool), z.shape[-1]).to(self.pool.device)
        parts = {"student": self.student, "memory": memory}
        if not self.share_classifier and (self.weights[1] or self.weights[2]):
            parts["projector"] = psi
        model = nn.ModuleDict(parts)
        trained = [p for p in model.parameters() if p.requires_grad]
        rule = optimizer(trained) if optimizer else torch.optim.SGD(
            trained, lr=lr, momentum=momentum, weight_decay=weight_decay
        )  # fmt: skip
        self.selections = []
        known = {} if output_dir is None else identity_of(self, batch_size=batch_size, max_steps=max_steps)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            if int(memory.epoch) != epoch:  # a resumed epoch keeps its selection
                share = share_of_student(epoch, epochs, self.warmup) if self.follow_student else 0.0
                said = outputs(self.student, self.pool, self.student_head)[0] if share else z
                memory.p.copy_(combined(z, said, share))
                memory.epoch.fill_(epoch)
            found = select(memory.p, self.rho, floor=self.floor)
            self.selections.append(found)
            rows = found.kept.nonzero().squeeze(1)
            columns = {"x": self.pool[rows], "z": z[rows], "phi": phi[rows], "c": memory.p[rows].argmax(-1)}
            size = min(batch_size, len(rows))
            stream = minibatches(columns, size, seed=seed, drop_last=True)(epoch)
            for number, batch in enumerate(stream):
                if max_steps is not None and number == max_steps:
                    return
                yield batch

        history = loop(
            model, batches, lambda batch: self._loss(batch, psi), optimizer=rule, epochs=epochs, seed=seed,
            output_dir=output_dir, save_every=save_every, resume=resume, identity=known,
        )  # fmt: skip
        self.student.eval()
        return history

    def _loss(self, batch: dict[str, Tensor], psi: nn.Module) -> dict[str, Tensor]:
        x, z, phi = suited(batch["x"], self.student), batch["z"], batch["phi"]
        if self.augment is not None:
            x = self.augment(x)
            z, phi = outputs(self.teacher, x, self.teacher_head)
        said, ours = self._read(x, psi)
        kd, align, con = self.weights
        found = {"kd": soft_label_loss(said, z, self.tau)}
        total = [kd * found["kd"]] if kd else []
        if align:
            found["align"] = alignment_loss(ours, phi, self._importance(phi, batch["c"]))
            total.append(align * found["align"])
        if con:
            found["con"] = contrast_loss(ours, self._read_perturbed(x, psi), self.temperature)
            total.append(con * found["con"])
        return {"loss": torch.stack(total).sum(), **found}

    def _read(self, x: Tensor, psi: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and psi(phi_S), with gradients."""
        if self.share_classifier:
            name = f"{self.student_head}.projector"
            with taps.capture(self.student, name, grad=True) as seen:
                said = logits_of(self.student(x))
            return said, seen[name]
        with taps.capture(self.student, self.student_head, inputs=True, grad=True) as seen:
            said = logits_of(self.student(x))
        used = self.weights[1] or self.weights[2]
        return said, psi(seen[self.student_head]) if used else seen[self.student_head]

    def _read_perturbed(self, x: Tensor, psi: nn.Module) -> Tensor:
        if self.perturb_at is None:
            return self._read(self.mix(x), psi)[1]
        with taps.replace(self.student, {self.perturb_at: self.mix}):
            return self._read(x, psi)[1]

    def _importance(self, phi: Tensor, classes: Tensor) -> Tensor:
        head = self.teacher.get_submodule(self.teacher_head)
        if isinstance(head, nn.Linear):
            return importance(head.weight.to(phi.device), classes)
        with frozen(head):
            return gradient_importance(head, suited(phi, head)).to(phi.device)


class _Memory(nn.Module):
    """The predictions by which the present epoch was selected; in checkpoints."""

    p: Tensor
    epoch: Tensor

    def __init__(self, images: int, classes: int):
        super().__init__()
        self.register_buffer("p", torch.zeros(images, classes, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(-1))
