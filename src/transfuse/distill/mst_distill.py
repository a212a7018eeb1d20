"""MST-Distill: teachers of other modalities, masked towards what the student can say and routed per sample.

:arxiv: 2507.07015
:moves: what models of other or more modalities know -> a model of one modality
:access: logits, hidden, weights, training data
:reversible: no
:context: no

The student S sees one modality, the teachers another one or both. With KD(p <- q) = tau^2 KL(softmax(q / tau) ||
softmax(p / tau)), three stages:

1. All models learn together: the sum of their cross-entropies and of KD(i <- j) over all ordered pairs of models, with
   gradients into both sides.
2. All models are frozen. Each chosen layer of each teacher gets a small network that maps the layer's output z to a
   mask in (0, 1) per channel; with mask * z in place of z the teacher becomes one of E specialised teachers. Each mask
   alone learns KD(masked teacher <- S), that is, the teacher is drawn to the student. The epoch with the lowest
   validation sum is kept.
3. Masks are frozen too. c = softmax(G(S logits)) says per sample which teachers teach:

       L = w_task CE(S, y) + w_kl (1/k) sum over the k largest c of KD(S <- teacher) + w_lb balance(c)

   S and G share one Adam. At the end of epoch e (from 0) w_lb shrinks by 0.9 if e is a multiple of 10, w_kl by 0.5 if
   it is one of 30; both do so at e = 0. The student of the epoch with the lowest validation cross-entropy is kept.

Only the student is used afterwards. In stage 3 teachers and masks stand still, so their logits are computed once.

Routes (`gate`): "hard" is the published rule; no gradient of the distillation reaches G, which is moved by the balance
term alone, and since G reads the student's logits undetached, that term moves the student too. "soft" distils from the
teachers' logits weighted by c, without gradient to c, as in the authors' code. "st" is ours: each chosen teacher's KD
is multiplied by its c, so that the routing learns. "random" chooses evenly, for comparison. The balance "kl" is
KL(uniform || mean c); the code divides it by E, which is followed here, and `balance_factor=1.0` is the formula of the
paper. "cv" is the unbiased deviation over the mean of the summed c. A layer's width comes from a dry run. The masks of
stage 2 share one Adam: their losses have no parameter in common, so this equals one for each.

    from transfuse.distill.mst_distill import MSTDistill

    method = MSTDistill(
        student, {"both": both, "audio": audio}, mask_layers={"both": ["fc1", "fc2"], "audio": ["fc1", "fc2"]}
    )
    method.fit({"image": images, "audio": sounds, "labels": labels}, held_out)  # arguments of the models' forward
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.batches import minibatches
from ..core.errors import BadInput, IncompatibleModels
from ..core.training import History, loop, seeded
from ._base import frozen, logits_of, model_inputs
from ._featuremasks import FeatureMask1d, FeatureMask2d, mask_for, masked_by
from ._routing import (
    Balance,
    Best,
    DenseGate,
    Gate,
    Route,
    Stages,
    cross_entropy,
    kd_terms,
    load_balance,
    routed_terms,
    together,
)

__all__ = [
    "DenseGate",
    "FeatureMask1d",
    "FeatureMask2d",
    "Gate",
    "MSTDistill",
    "Stages",
    "UnknownLayer",
    "kd_terms",
    "load_balance",
    "routed_terms",
    "together",
]

Columns = Mapping[str, Tensor]


class UnknownLayer(BadInput, KeyError):
    """A layer that a teacher does not have."""

    __str__ = Exception.__str__  # KeyError shows the representation of its text


class MSTDistill:
    """The three stages on data held in tensors.

    A model takes from the columns what its `forward` names. `fit` runs all stages; each can be called by itself.

    Args:
        student: Sees its modality alone; changed in place.
        teachers: Models by name; stage 1 trains them.
        mask_layers: Modules of each teacher that get a mask. A teacher with none teaches as it is.
        k: Teachers per sample.
        gate: How a sample's teachers are chosen, "hard", "soft", "st" or "random".
        balance: "kl" or "cv".
        balance_factor: See `load_balance`.
        tau: Temperature.
        w_task: Weight of the cross-entropy in stage 3.
        w_kl: Of the distillation.
        w_lb: Of the balance.
        kl_decay: What w_kl is multiplied by at the end of every `kl_every`-th epoch, the first included.
        kl_every: See there.
        lb_decay: The same of w_lb.
        lb_every: The same of w_lb.
        heads: Heads of a mask's attention.
        factor: Divides a mask's token width.
        epochs: Of the three stages; 0 leaves one out (of the second: masks as they were drawn).
        lr: Of the three Adams.
        batch_size: Samples per update.
        precompute: Compute the teachers' logits of stage 3 once for all samples; False saves their memory.
        seed: Of masks, gate and the order of the samples.

    Raises:
        BadInput: arguments out of range; more teachers per sample than there are.
        UnknownLayer: layers that do not exist; the message lists those that do.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        *,
        mask_layers: Mapping[str, Sequence[str]],
        k: int = 1,
        gate: Route = "hard",
        balance: Balance = "kl",
        balance_factor: float | None = None,
        tau: float = 4.0,
        w_task: float = 1.0,
        w_kl: float = 1.0,
        w_lb: float = 1.0,
        kl_decay: float = 0.5,
        kl_every: int = 30,
        lb_decay: float = 0.9,
        lb_every: int = 10,
        heads: int = 3,
        factor: int = 2,
        epochs: tuple[int, int, int] = (1, 1, 100),
        lr: float = 1e-4,
        batch_size: int = 512,
        precompute: bool = True,
        seed: int = 0,
    ):
        if gate not in ("hard", "soft", "st", "random"):
            raise BadInput("gate", gate, "is not known", 'use "hard", "soft", "st" or "random"')
        if balance not in ("kl", "cv"):
            raise BadInput("balance", balance, "is not known", 'use "kl" or "cv"')
        for name, weight in {"w_task": w_task, "w_kl": w_kl, "w_lb": w_lb}.items():
            if not weight >= 0:
                raise BadInput(name, weight, "is not a weight", "give a number from 0 up")
        positive = {
            "tau": tau,
            "lr": lr,
            "batch_size": batch_size,
            "kl_every": kl_every,
            "lb_every": lb_every,
        }
        for name, number in positive.items():
            if not number > 0:
                raise BadInput(name, number, "is not positive", "give a number above 0")
        if len(epochs) != 3 or min(epochs) < 0:
            raise BadInput("epochs", epochs, "are not three counts", "give one for each stage")
        if not teachers or set(mask_layers) != set(teachers):
            names = sorted(teachers)
            raise BadInput(
                "mask_layers", sorted(mask_layers), f"are not the teachers {names}", "give a list for each"
            )
        if any(model is student for model in teachers.values()):
            raise BadInput("teachers", type(student).__name__, "is the student itself", "pass another model")
        self.routes: list[tuple[str, str | None]] = []
        for name, layers in mask_layers.items():
            known = [each for each, _ in teachers[name].named_modules() if each]
            for layer in layers:
                if layer not in known:
                    remedy = f"use one of {', '.join(known)}"
                    raise UnknownLayer(f"mask_layers[{name}]", layer, "does not exist", remedy)
            self.routes += [(name, layer) for layer in layers] or [(name, None)]
        least = 2 if balance == "cv" else 1
        if not 1 <= k <= len(self.routes) or len(self.routes) < least:
            raise BadInput(
                "k", k, f"does not fit {len(self.routes)} specialised teachers", "choose fewer, or add layers"
            )
        self.student, self.teachers = student, dict(teachers)
        self.k, self.gate, self.balance, self.balance_factor, self.tau = k, gate, balance, balance_factor, tau
        self.w_task, self.w_kl, self.w_lb = w_task, w_kl, w_lb
        self.kl_decay, self.kl_every, self.lb_decay, self.lb_every = kl_decay, kl_every, lb_decay, lb_every
        self.heads, self.factor, self.epochs, self.lr = heads, factor, tuple(epochs), lr
        self.batch_size, self.precompute, self.seed = batch_size, precompute, seed
        self.masks: nn.ModuleList | None = None
        self.gate_net: nn.Module | None = None
        self.stages = Stages()

    def fit(self, train: Columns, val: Columns | None = None) -> Stages:
        """Run the three stages.

        Args:
            train: Columns by name, `labels` among them, one row per sample in each.
            val: The same of validation data; without it the last epochs are kept.

        Raises:
            BadInput: columns that are missing or of unequal length.
            IncompatibleModels: models that disagree about the classes.
            TrainingDiverged: a loss became NaN or infinite.
        """
        self.stages = Stages()
        if self.epochs[0]:
            self.initialise(train)
        self.specialise(train, val)
        if self.epochs[2]:
            self.distil(train, val)
        return self.stages

    def initialise(self, train: Columns) -> History:
        """Stage 1: student and teachers learn together."""
        models = self._checked(train)

        def step(batch: Columns) -> Tensor:
            return together([_say(model, batch) for model in models], batch["labels"], tau=self.tau)

        done = self._run(nn.ModuleList(models), train, step, self.epochs[0])
        self.stages.together = done.losses
        return done

    def specialise(self, train: Columns, val: Columns | None = None) -> History:
        """Stage 2: make the masks and draw each masked teacher to the student."""
        models = self._checked(train, val)
        with frozen(nn.ModuleList(models)):
            first = next(self._parts(train, 2))
            self.masks = nn.ModuleList()
            with seeded(self.seed), torch.no_grad():
                for name, layer in self.routes:
                    if layer is None:
                        self.masks.append(nn.Identity())
                        continue
                    with taps.capture(self.teachers[name], layer) as seen:
                        _say(self.teachers[name], first)
                    self.masks.append(mask_for(seen[layer], heads=self.heads, factor=self.factor))
            if not self.epochs[1] or not any(True for _ in self.masks.parameters()):
                self.masks.eval()
                return History([], 0.0, 0)

            def step(batch: Columns) -> Tensor:
                with torch.no_grad():
                    goal = _say(self.student, batch)
                said = [
                    out for out, (_, layer) in zip(self._specialists(batch), self.routes) if layer is not None
                ]
                return torch.stack([kd_terms(out, goal, tau=self.tau).mean() for out in said]).sum()

            self.stages.mask_validation = []
            keep = Best(self.masks, self.stages.mask_validation)
            done = self._run(self.masks, train, step, self.epochs[1], self._watch(keep, val, step))
            keep.restore()
        self.masks.eval()
        self.stages.masks = done.losses
        return done

    def distil(self, train: Columns, val: Columns | None = None) -> History:
        """Stage 3: the student learns from the labels and the teachers that the gate chooses."""
        models = self._checked(train, val)
        if self.masks is None:
            raise BadInput("masks", None, "have not been made", "call specialise first, or fit")
        student, masks = self.student, self.masks.eval()
        w_kl, w_lb, counts = self.w_kl, self.w_lb, torch.zeros(len(self.routes))
        columns = dict(train)
        with frozen(nn.ModuleList([*models[1:], masks])):
            if self.precompute:
                parts = self._parts(train, self.batch_size)
                with torch.no_grad():
                    columns["_taught"] = torch.cat(
                        [self._taught(part).to(train["labels"].device) for part in parts]
                    )
            with seeded(self.seed):
                build = Gate if len(self._shape) == 2 else DenseGate
                device = next(student.parameters()).device
                self.gate_net = gate = build(self._shape[1], len(self.routes)).to(device, self._dtype)

            def step(batch: Columns) -> Tensor:
                nonlocal counts
                said = _say(student, batch)
                said = said.to(self._dtype)
                shares = torch.softmax(gate(said), dim=1)
                taught = batch["_taught"] if self.precompute else self._taught(batch)
                terms, chosen = routed_terms(said, taught, shares, k=self.k, gate=self.gate, tau=self.tau)
                counts = counts + torch.bincount(chosen.flatten(), minlength=len(self.routes)).cpu()
                uneven = load_balance(shares, self.balance, factor=self.balance_factor)
                return (
                    self.w_task * cross_entropy(said, batch["labels"]) + w_kl * terms.mean() + w_lb * uneven
                )

            self.stages.validation, self.stages.routing = [], []
            keep = Best(student, self.stages.validation)
            watch = self._watch(keep, val, lambda batch: cross_entropy(_say(student, batch), batch["labels"]))

            def end(epoch: int) -> None:
                nonlocal w_kl, w_lb, counts
                watch(epoch)
                self.stages.routing.append((counts / counts.sum()).tolist())
                counts = torch.zeros_like(counts)
                w_lb *= self.lb_decay if epoch % self.lb_every == 0 else 1.0
                w_kl *= self.kl_decay if epoch % self.kl_every == 0 else 1.0

            done = self._run(nn.ModuleList([student, gate]), columns, step, self.epochs[2], end)
            self.stages.kept = keep.restore()
        self.stages.student = done.losses
        return done

    def _specialists(self, batch: Columns) -> list[Tensor]:
        """Logits of every specialised teacher."""
        assert self.masks is not None
        said = []
        for mask, (name, layer) in zip(self.masks, self.routes, strict=True):
            changes: dict[str, Callable[[Tensor], Tensor]] = {}
            if layer is not None:
                changes[layer] = lambda z, mask=mask: masked_by(mask, z)  # type: ignore[misc]
            with taps.replace(self.teachers[name], changes):
                said.append(_say(self.teachers[name], batch))
        return said

    def _taught(self, batch: Columns) -> Tensor:
        with torch.no_grad():
            return torch.stack(self._specialists(batch), 1)

    def _parts(self, columns: Columns, size: int) -> Iterator[Columns]:
        """The columns in order, cut and moved to the student's device."""
        device = next(self.student.parameters()).device
        pieces = {name: column.split(size) for name, column in columns.items()}
        for i in range(len(pieces["labels"])):
            yield {name: piece[i].to(device) for name, piece in pieces.items()}

    def _watch(
        self, keep: Best, val: Columns | None, loss: Callable[[Columns], Tensor]
    ) -> Callable[[int], None]:
        def end(epoch: int) -> None:
            if val is None:
                return
            with frozen(keep.model), torch.no_grad():
                sums = [float(loss(part)) * len(part["labels"]) for part in self._parts(val, self.batch_size)]
            keep.see(math.fsum(sums) / len(val["labels"]), epoch)

        return end

    def _run(
        self,
        model: nn.Module,
        columns: Columns,
        step: Callable[[Columns], Tensor],
        epochs: int,
        end: Callable[[int], None] = lambda epoch: None,
    ) -> History:
        batches = minibatches(columns, self.batch_size, seed=self.seed)

        def epoch(number: int) -> Iterator[dict[str, Tensor]]:
            yield from batches(number)
            end(number)  # the loop asks for more once the last update is made

        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        return loop(model, epoch, step, optimizer=optimizer, epochs=epochs, seed=self.seed)

    def _checked(self, *data: Columns | None) -> list[nn.Module]:
        """All models, the student first, once data and models fit."""
        models = [self.student, *self.teachers.values()]
        for name, columns in zip(("train", "val"), data):
            if columns is None:
                continue
            sizes = {key: len(column) for key, column in columns.items()}
            if "labels" not in sizes or len(set(sizes.values())) != 1 or not sizes["labels"]:
                problem = "are not columns of one length with labels among them"
                raise BadInput(name, sizes, problem, "pair the modalities sample by sample")
            for model in models:
                if not model_inputs(model, columns):
                    raise BadInput(
                        name, sorted(sizes), f"hold no input of {type(model).__name__}", "name the column so"
                    )
        assert data[0] is not None
        with frozen(nn.ModuleList(models)), torch.no_grad():
            said = [_say(model, next(self._parts(data[0], 2))) for model in models]
        self._shape = said[0].shape
        self._dtype = torch.promote_types(said[0].dtype, torch.float32)
        for name, out in zip(self.teachers, said[1:]):
            if out.shape != said[0].shape:
                sizes_of = (tuple(out.shape[1:]), tuple(said[0].shape[1:]))
                raise IncompatibleModels(f"teachers[{name}]", sizes_of[0], f"is not the student's {sizes_of[1]}",
                                         "use models of the same classes")  # fmt: skip
        return models


def _say(model: nn.Module, batch: Columns) -> Tensor:
    return logits_of(model(**model_inputs(model, batch)))
