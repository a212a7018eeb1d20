"""ProC-KD: learned prototypes carry a teacher's local features to a student with another label space.

:arxiv: 2212.13180
:moves: a vision teacher's local features, across tasks -> a student's weights
:access: hidden, training data
:reversible: no
:context: no

Teacher and student solve different tasks, so no logits can be matched. What is shared are K prototypes C `[K, D]`, D
the student's width. Token features t = ReLU(Linear(three layers of the teacher)) meet them as in NetVLAD,

    x = t / |t|,   a = softmax_k(W x),   V_k = sum_n a_kn (x_n - c_k),   g = Linear(normalised, flattened V)
    v = two (linear, ReLU) of [t ; g],   g repeated for every token,

and an augmentation, one for both networks, writes tokens X in terms of the prototypes:

    X' = E X,   C' = E C,   X'' = softmax_k(X' C'^T) C',   Aug(X, C) = ReLU(MLP [X' ; X''] + X)

The student's own head reads its plain tokens (z), Aug(student tokens) (z_S) and Aug(v) (z_T), and

    L = CE(z, y) + l1 CE(z_T, y) + l2 CE(z_S, y) + l3 tau^2 KL(stopgrad softmax(z_S / tau) || softmax(z / tau))

The second term makes prototypes and augmentation take the teacher's features in, the last brings what they give to
the plain branch. All of it is left behind but the student; `augmented` gives z_S for who wants to keep the branch.

The published code, a port, has the architecture but neither runs as it is nor calls its teacher: its loop minimises
CE(z, y) alone (`weights=(0, 0, 0)`), beside two unused losses on logits. The loss above is our reading of the paper,
its weights are ours. From the code: linear maps over the channels (its 1x1 convolutions) have no bias; in V the
tokens are normalised, the prototypes are not (`normalise=True` to do so); prototypes start uniform in [0, 1]; the
softmax over prototypes has no 1 / sqrt(D), and saturates for wide tokens (`scale=True` puts it in). Which three layers
is not said; ours are the last of each third (`thirds` names them for a stack of blocks). Classification only.

    from transfuse.distill import Distiller
    from transfuse.distill.proc_kd import ProCKD

    objective = ProCKD(teacher_layers=("layer1", "layer2", "layer3"), student_layer="layer3", head="head")
    trainer = Distiller(student=student, teacher=teacher, objective=objective, train_dataset=rows)
    trainer.train()
    trainer.save_model("student")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.divergence import forward_kl
from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ..core.runs import check_positive
from ..core.taps import decoder_layers
from ..core.training import seeded
from ._base import Objective, Signal
from ._maps import exact, full_precision, same_grid, tokens_from_map

__all__ = ["ProCKD", "PrototypeAugment", "VLADAggregator", "augment", "proc_kd_terms", "thirds", "vlad"]


def vlad(tokens: Tensor, assignment: Tensor, prototypes: Tensor, *, normalise: bool = False) -> Tensor:
    """NetVLAD: residuals of the tokens to the prototypes, summed by soft assignment.

    Args:
        tokens: `[B, N, D]`; normalised here.
        assignment: Weight of the assignment, `[K, D]`.
        prototypes: C, `[K, D]`.
        normalise: Compare with prototypes of length 1.

    Returns:
        `[B, K D]`: every V_k of length 1, then the whole.
    """
    x = functional.normalize(tokens, dim=-1)
    centres = functional.normalize(prototypes, dim=-1) if normalise else prototypes
    shares = torch.softmax(x @ assignment.T, -1).transpose(1, 2)
    sums = shares @ x - shares.sum(-1, keepdim=True) * centres  # [B, K, D], never [B, K, N, D]
    return functional.normalize(functional.normalize(sums, dim=-1).flatten(1), dim=-1)


def augment(
    tokens: Tensor, prototypes: Tensor, embed: Tensor, first: Tensor, second: Tensor, *, scale: bool = False
) -> Tensor:
    """Aug(X, C): tokens written with the prototypes, added to themselves.

    Args:
        tokens: X, `[B, N, D]`.
        prototypes: C, `[K, D]`.
        embed: Weight of E, `[D, D]`.
        first: Weight of the first layer of the MLP, `[D, 2 D]`.
        second: Of its second, `[D, D]`.
        scale: Divide the products under the softmax by sqrt(D).

    Returns:
        `[B, N, D]`.
    """
    x, c = tokens @ embed.T, prototypes @ embed.T
    shares = torch.softmax(x @ c.T / (math.sqrt(x.shape[-1]) if scale else 1.0), -1)  # over the prototypes
    mixed = torch.cat([x, shares @ c], -1)
    return torch.relu(torch.relu(torch.relu(mixed @ first.T) @ second.T) + tokens)


def proc_kd_terms(
    plain: Tensor,
    augmented: Tensor | None,
    from_teacher: Tensor | None,
    labels: Tensor,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The loss and its parts, means over the batch.

    Args:
        plain: z, `[B, classes]`.
        augmented: z_S, of the same shape; needed where its weights are not 0.
        from_teacher: z_T, likewise.
        labels: int64 `[B]`.
        weights: l1 of CE(z_T, y), l2 of CE(z_S, y), l3 of the KL.
        temperature: tau of the KL.

    Returns:
        "loss", "ce" and, of the parts whose weight is not 0, "teacher", "augmented" and "kl".
    """
    found = {"ce": functional.cross_entropy(exact(plain), labels)}
    if weights[0]:
        assert from_teacher is not None
        found["teacher"] = functional.cross_entropy(exact(from_teacher), labels)
    if weights[1] or weights[2]:
        assert augmented is not None
        if weights[1]:
            found["augmented"] = functional.cross_entropy(exact(augmented), labels)
        if weights[2]:
            target = augmented.detach()
            found["kl"] = temperature**2 * forward_kl(plain, target, temperature=temperature)
    scales = {"ce": 1.0, "teacher": weights[0], "augmented": weights[1], "kl": weights[2]}
    return {"loss": torch.stack([scales[name] * value for name, value in found.items()]).sum(), **found}


def thirds(model: nn.Module) -> tuple[str, str, str]:
    """Names of the last block of each third of a model's stack of blocks.

    Raises:
        BadInput: there is no stack, or one of fewer than three.
    """
    blocks = decoder_layers(model)
    count = len(blocks)
    if count < 3:
        raise BadInput("model", count, "blocks have no thirds", "name the layers yourself")
    return blocks[count // 3 - 1], blocks[2 * count // 3 - 1], blocks[-1]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class VLADAggregator(nn.Module):
    """v: a teacher's token features joined with what VLAD makes of all of them.

    Args:
        teacher_width: Sum of the widths of the teacher's layers.
        dim: D.
        num_prototypes: K.
        normalise: See `vlad`.
    """

    def __init__(self, teacher_width: int, dim: int, num_prototypes: int, *, normalise: bool = False):
        super().__init__()
        self.project = nn.Linear(teacher_width, dim)
        self.assign = _linear(dim, num_prototypes)
        self.reduce = nn.Linear(num_prototypes * dim, dim)
        self.first, self.second = _linear(2 * dim, dim), _linear(dim, dim)
        self.normalise = normalise

    def forward(self, layers: Sequence[Tensor], prototypes: Tensor) -> Tensor:
        """From layers `[B, N, D_t]` and C `[K, D]` to v `[B, N, D]`."""
        _check_width("prototypes", prototypes, self.assign.in_features)
        joined = torch.cat(list(layers), -1)
        _check_width("teacher_layers", joined, self.project.in_features)
        t = torch.relu(_apply(self.project, joined))
        g = _apply(self.reduce, vlad(t, self.assign.weight.to(t.dtype), prototypes, normalise=self.normalise))
        v = torch.cat([t, g.unsqueeze(1).expand_as(t)], -1)
        for layer in (self.first, self.second):
            v = torch.relu(_apply(layer, v))
        return v


class PrototypeAugment(nn.Module):
    """Aug.

    Args:
        dim: D.
        scale: See `augment`.
    """

    def __init__(self, dim: int, *, scale: bool = False):
        super().__init__()
        self.embed, self.first, self.second = _linear(dim, dim), _linear(2 * dim, dim), _linear(dim, dim)
        self.scale = scale

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """From X `[B, N, D]` and C `[K, D]` to `[B, N, D]`."""
        _check_width("tokens", tokens, self.embed.in_features)
        _check_width("prototypes", prototypes, self.embed.in_features)
        layers = (self.embed, self.first, self.second)
        return augment(
            tokens, prototypes, *(layer.weight.to(tokens.dtype) for layer in layers), scale=self.scale
        )


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, layer.weight.to(x.dtype), bias)


def _check_width(name: str, x: Tensor, width: int) -> None:
    if x.shape[-1] != width:
        raise IncompatibleModels(name, tuple(x.shape), f"are not {width} wide", "project them to D first")


class ProCKD(Objective):
    """Prototype-guided cross-task distillation.

    Prototypes, aggregation and augmentation are its parameters. D is the width of the student's tokens, because the
    student's head reads what comes out; the teacher's layers are projected to it.

    Args:
        teacher_layers: Modules of the teacher: maps `[B, C, h, w]`, finer ones averaged down to the coarsest, or
            tokens `[B, N, C]`. The paper takes three.
        student_layer: Module of the student whose tokens, pooled, are what its head reads; another grid or number of
            tokens than the teacher's is fine.
        head: Modules of the student that make logits of pooled tokens, in order: ("norm", "head"), say.
        pool: "mean" of the tokens, the "first" one (CLS), or "auto": the mean of a map, the first of tokens.
        num_prototypes: K.
        weights: l1, l2, l3. With l1 = 0 no teacher is read or needed: prototypes of the student's own.
        temperature: tau of the KL.
        scale: Divide by sqrt(D) under the softmax of Aug.
        normalise: Normalise prototypes in the aggregation.
        seed: Of the modules' first weights.

    Raises:
        BadInput: an argument out of range.
    """

    def __init__(
        self,
        *,
        teacher_layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        student_layer: str = "layer3",
        head: str | Sequence[str] = "head",
        pool: Literal["auto", "mean", "first"] = "auto",
        num_prototypes: int = 72,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        temperature: float = 1.0,
        scale: bool = False,
        normalise: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            student_taps=[student_layer], teacher_taps=teacher_layers if any(weights[:1]) else ()
        )
        check_positive(teacher_layers=len(teacher_layers), head=len(head))
        if num_prototypes < 2:
            raise BadInput("num_prototypes", num_prototypes, "gives nothing to choose from", "give 2 or more")
        if len(weights) != 3 or not all(0.0 <= weight < math.inf for weight in weights):
            raise BadInput("weights", weights, "are not three weights", "give three numbers from 0 up")
        if not 0.0 < temperature < math.inf:
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        if pool not in ("auto", "mean", "first"):
            raise BadInput("pool", pool, "is not known", 'use "auto", "mean" or "first"')
        self.head = (head,) if isinstance(head, str) else tuple(head)
        self.pool, self.num_prototypes, self.weights = pool, num_prototypes, tuple(weights)
        self.kd_weight = self.weights[0]  # at 0 the trainer asks for no teacher
        self.temperature, self.scale, self.normalise, self.seed = temperature, scale, normalise, seed
        self.prototypes: nn.Parameter | None = None
        self.aggregator: VLADAggregator | None = None
        self.augmentation: PrototypeAugment | None = None
        self._heads: list[nn.Module] = []  # the student's, so in a list: not a part of this module

    def prepare(
        self, student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None, theirs: Any = None
    ) -> None:
        """Freeze the teacher, with a warning, where its parameters could be trained and l1 is not 0."""
        if self.weights[0] and any(p.requires_grad for model in teachers for p in model.parameters()):
            warnings.warn("the teacher could be trained: its parameters are frozen now", stacklevel=3)
            for model in teachers:
                model.requires_grad_(False)

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Build prototypes and modules.

        Raises:
            NotApplicable: not one class per image.
            IncompatibleModels: layers of the teacher with token numbers that do not go together.
        """
        logits = student.whole()
        if logits.dim() != 2:
            raise NotApplicable("student", tuple(logits.shape), "are no classifier's logits", "use one")
        width = self.student_tokens(student).shape[-1]
        if any(self.weights):
            with seeded(self.seed):
                self.prototypes = nn.Parameter(torch.rand(self.num_prototypes, width))
                self.augmentation = PrototypeAugment(width, scale=self.scale)
                if self.weights[0]:
                    assert teacher is not None
                    theirs = sum(layer.shape[-1] for layer in self.teacher_tokens(teacher))
                    self.aggregator = VLADAggregator(
                        theirs, width, self.num_prototypes, normalise=self.normalise
                    )

    def bind(self, student: nn.Module) -> ProCKD:
        """Look the head up in the student; `Distiller` does so when training starts.

        Raises:
            BadInput: it has no such module.
            IncompatibleModels: the head does not read what is as wide as the student's tokens.
        """
        names = dict(student.named_modules())
        for name in self.head:
            if name not in names:
                remedy = "name the modules from pooled tokens to logits"
                raise BadInput("head", name, f"is no module of {type(student).__name__}", remedy)
        self._heads = [names[name] for name in self.head]
        layers = (layer for head in self._heads for layer in head.modules())
        reads = next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)
        width = reads if self.prototypes is None else self.prototypes.shape[-1]
        if reads is not None and reads != width:
            remedy = "tap the layer whose pooled tokens the head reads"
            raise IncompatibleModels("head", reads, f"inputs are read, the tokens have {width}", remedy)
        return self

    def on_epoch(self, student: nn.Module, epoch: int, total: int) -> None:
        """Bind the head."""
        self.bind(student)

    def student_tokens(self, student: Signal) -> Tensor:
        """X `[B, N, D]`, in float32 at least.

        Raises:
            IncompatibleModels: the layer names several modules.
        """
        if len(student.taps) != 1:
            names = list(student.taps)
            raise IncompatibleModels("student_layer", names, "is not one module", "name one")
        (value,) = student.taps.values()
        return exact(tokens_from_map(value))

    def teacher_tokens(self, teacher: Signal) -> list[Tensor]:
        """The layers as `[B, N, D_t]`, in their order."""
        layers = same_grid([exact(value) for value in teacher.taps.values()])
        return [tokens_from_map(layer).detach() for layer in layers]

    def augmented(self, tokens: Tensor, *, first: bool = False) -> Tensor:
        """Logits of the augmented branch: the student's head on Aug(tokens, C), pooled.

        Args:
            tokens: `[B, N, D]`.
            first: Pool by taking the first token, not the mean.
        """
        assert self.augmentation is not None and self.prototypes is not None, "setup comes first"
        if not self._heads:
            raise BadInput("head", self.head, "is not looked up yet", "call bind(student) first")
        with full_precision(tokens):
            y = self.augmentation(tokens, self.prototypes.to(tokens.dtype))
        pooled = y[:, 0] if first else y.mean(1)
        weight = next((p for head in self._heads for p in head.parameters()), pooled)
        pooled = pooled.to(weight.dtype)
        for head in self._heads:
            pooled = head(pooled)
        return pooled

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        ours = theirs = None
        if self.weights[1] or self.weights[2]:
            ours = self.augmented(self.student_tokens(student), first=self._first(student))
        if self.weights[0]:
            assert teacher is not None and self.aggregator is not None and self.prototypes is not None
            layers = self.teacher_tokens(teacher)
            with full_precision(layers[0]):
                v = self.aggregator(layers, self.prototypes.to(layers[0].dtype))
            theirs = self.augmented(v, first=self._first(teacher))
        return proc_kd_terms(
            student.whole(), ours, theirs, batch["labels"], weights=self.weights, temperature=self.temperature
        )

    def _first(self, signal: Signal) -> bool:
        return self.pool == "first" or (
            self.pool == "auto" and all(value.dim() == 3 for value in signal.taps.values())
        )
