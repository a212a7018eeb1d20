"""The contract of the family: an objective, what it is shown of student and teacher, and when it is told.

An `Objective` is a module: what it trains beside the student (projections) and what it remembers (a schedule's
state) are its parameters and buffers, and so end up in optimizer and checkpoints like the student's own.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.batches import IGNORED
from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ..core.fused import Head, fused_sums, head_of
from ..core.runs import evaluating
from ._sparse import reduced

__all__ = [
    "CrossEntropy",
    "Objective",
    "Reader",
    "Signal",
    "TokenObjective",
    "frozen",
    "is_causal",
    "logits_of",
    "model_inputs",
    "settings_of",
]


@dataclass
class Signal:
    """What one model says about a batch; only what the objective asked for is there.

    Attributes:
        logits: `[B, T, V]` of a language model, `[B, C]` of a classifier, or whatever the model returns.
        hidden: A language model's states before its head, `[B, T, D]`, in place of logits.
        head: The head that belongs to `hidden`.
        sparse: Stored top-k of a teacher: ids int64 `[B, T, k]` and log-probabilities float32 `[B, T, k]`, both
            sorted by falling probability; row t speaks about the token at t + 1, as logits do.
        taps: Module name -> activation, of the modules the objective named.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    sparse: tuple[Tensor, Tensor] | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)

    def whole(self) -> Tensor:
        """The logits, made from the hidden states if need be."""
        if self.logits is None:
            if self.hidden is None or self.head is None:
                raise NotApplicable("teacher", "stored top-k", "has no whole logits", "use a teacher model")
            self.logits = self.head(self.hidden)
        return self.logits


class Objective(nn.Module, abc.ABC):
    """A loss between a student and what it learns from.

    Subclasses implement `forward`. The class attributes say what it needs; nothing else is computed or kept.

    Attributes:
        needs_teacher: Whether there is a loss without a teacher; False for self-distillation.
        needs_logits: Whether it reads whole logits (`Signal.logits`); False lets a language model's head be
            fused with the loss.
        student_taps: Module names or wildcards of the student whose activations it reads.
        teacher_taps: The same of the teacher.
        columns: Further columns of the batch it reads, beside the models' inputs and `labels`.
        cross_vocabulary: Whether student and teacher may have vocabularies of their own.
        additive: Whether `forward` divides sums by `batch["items"]` and `totals` where these are set.
    """

    needs_teacher: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()
    cross_vocabulary: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __init__(self, *, student_taps: Sequence[str] = (), teacher_taps: Sequence[str] = ()):
        super().__init__()
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)

    @abc.abstractmethod
    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            student: With gradients.
            teacher: Without; None where there is no teacher.
            batch: The collated batch: the models' inputs, `labels`, and `columns`.

        Returns:
            `"loss"`, a differentiable scalar, and further scalars to log. A mean over the batch; where
            `batch["items"]` is set (the number of predicted tokens of the whole update, over all its micro-batches
            and processes), a sum divided by it.
        """

    def prepare(
        self, student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None, theirs: Any = None
    ) -> None:
        """Called first of all, with the models and, where they are given, the two tokenizers: choose the taps."""

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Counts of a batch, beside predicted tokens, that `forward` divides by.

        In training it finds their sums over the whole update in its batch, under these names.
        """
        return {}

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Called once before training with the signals of a small batch: build projections, refuse misfits."""

    def evaluation(self, student: Signal, batch: Mapping[str, Any]) -> Tensor | None:
        """What `Distiller.evaluate` reports of a held-out batch, a scalar; None for the labels' cross-entropy."""
        return None

    def on_step(self, figures: Mapping[str, float], step: int, total: int) -> None:
        """Called after each update, not in evaluation.

        Args:
            figures: What `forward` returned, over the update's micro-batches and processes.
            step: Number of the update, from 1.
            total: Number of updates in all.
        """

    def on_epoch(self, student: nn.Module, epoch: int, total: int) -> None:
        """Called at the start of each epoch, counted from 0: take a snapshot, move a schedule."""


def settings_of(objective: Objective) -> str:
    """An objective's class and plain attributes: what tells two runs with it apart, see `core.training.loop`."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    plain = {
        name: value
        for name, value in vars(objective).items()
        if isinstance(value, kinds) and not name.startswith("_") and name != "training"
    }
    return f"{type(objective).__qualname__} {sorted(plain.items())}"


class TokenObjective(Objective):
    """An objective that is a sum of terms per token (or per image of a classifier), made of logits alone.

    Subclasses implement `terms`. From that follow: language models with head and loss fused, classifiers, stored
    top-k teachers (the k tokens and one class for the rest become the vocabulary), masks, normalisation.

    Args:
        kd_weight: Weight of the terms.
        ce_weight: Weight of the cross-entropy with the labels (at temperature 1).
        rest: What a stored top-k teacher's remaining mass is: "bucket", one more class; or "zero", nothing (its k
            probabilities are renormalised, and so are the student's).
        compile: Pass a chunk's loss and gradient through `torch.compile`.
    """

    needs_logits = False
    additive = True

    def __init__(
        self, *, kd_weight: float = 1.0, ce_weight: float = 0.0, rest: str = "bucket", compile: bool = False
    ):
        super().__init__()
        if any(not 0 <= weight < math.inf for weight in (kd_weight, ce_weight)) or kd_weight + ce_weight == 0:
            weights = f"{kd_weight}, ce_weight = {ce_weight}"
            raise BadInput("kd_weight", weights, "are not weights", "give numbers from 0 up, not both 0")
        if rest not in ("bucket", "zero"):
            raise BadInput("rest", rest, "is not known", 'use "bucket" or "zero"')
        self.kd_weight, self.ce_weight, self.rest = kd_weight, ce_weight, rest
        self.compiled = compile

    @abc.abstractmethod
    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            student: Logits `[n, V]`, float32 or float64.
            teacher: Logits of the same shape, without gradient.
            labels: int64 `[n]`: the token that follows, or the class.
            **columns: `[n]` each, those of `columns`, at the predicted token.

        Returns:
            `[n]`.
        """

    def student_temperature(self, student: Tensor, **columns: Tensor) -> Tensor | float:
        """What `terms` divides these logits by: a number, or `[n]`; asked for a stored teacher only."""
        return 1.0

    def combine(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        **columns: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted terms and cross-entropy, each `[n]`; `ids` and `log_probs` stand for a stored teacher."""
        found: dict[str, Tensor] = {}
        if self.kd_weight:
            if ids is not None and log_probs is not None:
                heat = self.student_temperature(student, **columns)
                ours, theirs, where = reduced(student, ids, log_probs, labels, self.rest, heat)
                found["kd"] = self.terms(ours, theirs, where, **columns)
            else:
                assert teacher is not None
                found["kd"] = self.terms(student, teacher, labels, **columns)
        if self.ce_weight:
            found["ce"] = nn.functional.cross_entropy(student, labels, reduction="none")
        weights = {"kd": self.kd_weight, "ce": self.ce_weight}
        total = [value * weights[name] for name, value in found.items()]
        return {"loss": total[0] if len(total) == 1 else total[0] + total[1], **found}

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        source = student.hidden if student.hidden is not None else student.whole()
        tokens = source.dim() == 3
        labels = batch["labels"]
        keep = torch.ones_like(labels, dtype=torch.bool)
        if tokens:  # the state at t speaks about the token at t + 1
            labels = labels[:, 1:]
            keep = labels != IGNORED
        where = keep.nonzero(as_tuple=True)

        def rows(values: Tensor) -> Tensor:
            return values[:, : labels.shape[1]][where] if tokens else values

        columns = {"labels": labels[where]}
        for name in self.columns:
            columns[name] = batch[name][:, 1:][where] if tokens else batch[name]
        theirs: Any = None
        if teacher is not None:
            if teacher.sparse is not None:
                columns["ids"], columns["log_probs"] = (rows(part) for part in teacher.sparse)
            elif teacher.hidden is not None and teacher.head is not None:
                theirs = (rows(teacher.hidden), teacher.head)
            else:
                theirs = rows(teacher.whole())
        if student.hidden is not None and student.head is not None:
            sums = fused_sums(
                self.combine, rows(student.hidden), student.head, teacher=theirs, columns=columns,
                compile=self.compiled,
            )  # fmt: skip
        else:
            logits = rows(student.whole())
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if isinstance(theirs, tuple):
                theirs = theirs[1](theirs[0])
            if theirs is not None:
                check_vocabulary(logits, theirs)
                theirs = theirs.to(logits.dtype)
            sums = {name: value.sum() for name, value in self.combine(logits, theirs, **columns).items()}
        items = batch.get("items")
        count = at_least_one(int(keep.sum()) if items is None else items)
        return {name: value / count for name, value in sums.items()}


def at_least_one(count: Any) -> Any:
    """A count to divide by: where nothing is counted, as in an update without a labelled token, a sum stays 0."""
    return count + (count == 0)


class CrossEntropy(TokenObjective):
    """Learning from the labels alone: fine-tuning, or SeqKD where a teacher wrote the sequences."""

    needs_teacher = False

    def __init__(self, *, ce_weight: float = 1.0, compile: bool = False):
        super().__init__(kd_weight=0.0, ce_weight=ce_weight, compile=compile)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        return student.new_zeros(len(student))


def check_vocabulary(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of different widths.

    Raises:
        IncompatibleModels: they differ.
    """
    if student.shape != teacher.shape:
        raise IncompatibleModels(
            "teacher", teacher.shape[-1], f"classes, the student has {student.shape[-1]}",
            "use models with one label space or vocabulary",
        )  # fmt: skip


class Reader:
    """Runs a model on batches and keeps what an objective asked for.

    Args:
        model: A transformers model, a PEFT model, or any module that returns logits.
        patterns: Modules to tap.
        fuse: Stop before the head of a causal language model where that is possible.
        prefix: Of the columns that are this model's own, see `model_inputs`.
    """

    def __init__(
        self, model: nn.Module, *, patterns: Sequence[str] = (), fuse: bool = True, prefix: str = ""
    ):
        self.model, self.prefix = model, prefix
        self.names = [name for pattern in patterns for name in taps.match(model, pattern)]
        self.causal = is_causal(model)
        inner = unwrapped(model)
        self.head = head_of(inner) if fuse and self.causal else None
        self.body: Any = inner.base_model if self.head is not None else model

    def cut(self, vocabulary: int | None) -> Reader:
        """Leave out the entries from `vocabulary` on, where the head is known; returns the reader."""
        if self.head is not None and vocabulary is not None:
            self.head = replace(self.head, rows=vocabulary)
        return self

    def __call__(self, batch: Mapping[str, Any], *, grad: bool) -> Signal:
        """The signal on a batch; with `grad=False` no graph is built."""
        with contextlib.ExitStack() as stack:
            if not grad:
                stack.enter_context(torch.no_grad())
            seen = stack.enter_context(taps.capture(self.model, self.names, grad=grad)) if self.names else {}
            inputs = model_inputs(self.body, batch, self.prefix)
            device = next(self.model.parameters()).device
            moved = {name: value.to(device) for name, value in inputs.items()}
            output = self.body(**moved, **({"use_cache": False} if self.causal else {}))
        home = next(iter(inputs.values())).device  # a teacher may live on another device
        found = {name: value.to(home) for name, value in seen.items()}
        if self.head is not None:
            return Signal(hidden=output.last_hidden_state.to(home), head=self.head, taps=found)
        return Signal(logits=logits_of(output).to(home), taps=found)


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_causal(model: nn.Module) -> bool:
    """Whether `model` is a causal language model of transformers (PEFT's included)."""
    return type(unwrapped(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, or a record with `logits`."""
    return output if isinstance(output, Tensor) else output.logits


@functools.lru_cache(maxsize=256)
def _accepted(kind: Any) -> frozenset[str]:
    """Names of the arguments that modules of a class take."""
    return frozenset(inspect.signature(kind.forward).parameters)


def model_inputs(model: nn.Module, batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Those entries of `batch` that the model's `forward` takes, without labels.

    Where some are there under `prefix` and their name (`teacher_input_ids`), they are the model's own: these alone.
    Position numbers are added for a language model, so that the side of the padding does not matter.
    """
    kind: Any = type(model)
    accepted = _accepted(kind)
    own = {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
    for source in (own, batch):
        inputs = {name: value for name, value in source.items() if name in accepted and name != "labels"}
        if inputs:
            break
    if "position_ids" in accepted and "attention_mask" in inputs and "position_ids" not in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return inputs


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for `model`'s own weights inside the block; all is put back after it.

    Gradients still pass through it.
    """
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, state in wanted:
            parameter.requires_grad_(state)
