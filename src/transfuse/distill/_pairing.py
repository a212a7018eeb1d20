"""Student, objective and teachers as one module, and what makes them fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ..core.runs import evaluating
from ._base import CrossEntropy, Objective, Reader, Signal, is_causal
from ._policy import Policy
from ._store import LogitStore

__all__ = ["Pair", "Teacher", "align", "check_policy", "first_state", "models_of", "same_tokenizers"]

Teacher = nn.Module | LogitStore | Sequence[nn.Module] | None


class Pair(nn.Module):
    """Student and objective as one module, so that optimizer, checkpoints and DDP see both; teachers stay outside."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        reader: Reader,
        readers: Sequence[Reader],
        store: LogitStore | None,
        weights: Sequence[float] | None,
    ):
        super().__init__()
        self.student, self.objective = student, objective
        self.reader, self.readers, self.store = reader, list(readers), store
        given = list(weights) if weights is not None else [1.0] * len(self.readers)
        if len(given) != len(self.readers) or (given and not sum(given) > 0):
            raise BadInput(
                "teacher_weights", weights, f"does not fit {len(self.readers)} teachers", "one weight each"
            )
        self.weights = [weight / sum(given) for weight in given]

    @property
    def config(self) -> Any:
        """The student's."""
        return getattr(self.student, "config", None)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The student's."""
        student: Any = self.student
        student.gradient_checkpointing_enable(**options)

    def teacher(self, batch: Mapping[str, Any]) -> Signal | None:
        """What the teachers say, as one signal."""
        if self.store is not None:
            return self.store.signal(batch)
        if not self.readers:
            return None
        for reader in self.readers:
            reader.model.eval()
        signals = [reader(batch, grad=False) for reader in self.readers]
        if len(signals) == 1:
            return signals[0]
        shapes = [tuple(signal.whole().shape) for signal in signals]
        for shape in shapes:
            if shape != shapes[0]:
                remedy = "average teachers of one label space or vocabulary"
                raise IncompatibleModels("teacher", shape, f"is not the first's {shapes[0]}", remedy)
        logits = sum(w * signal.whole() for w, signal in zip(self.weights, signals, strict=True))
        assert isinstance(logits, Tensor)
        taps = {
            f"{i}.{name}": value for i, signal in enumerate(signals) for name, value in signal.taps.items()
        }
        return Signal(logits=logits, taps=taps)

    def set_up(self, batch: Mapping[str, Any]) -> None:
        """Let the objective see what it will get."""
        with evaluating(self.student):
            self.objective.setup(self.reader(batch, grad=False), self.teacher(batch), batch)
        self.objective.to(next(self.student.parameters()).device)

    def forward(self, batch: Mapping[str, Any], evaluate: bool = False) -> dict[str, Tensor]:
        if evaluate:
            return {"loss": self._held_out(batch)}
        return self.objective(self.reader(batch, grad=True), self.teacher(batch), batch)

    def _held_out(self, batch: Mapping[str, Any]) -> Tensor:
        signal = self.reader(batch, grad=False)
        own = self.objective.evaluation(signal, batch)
        if own is not None:
            return own
        if batch["labels"].is_floating_point():
            problem = (
                f"labels are no classes, and {type(self.objective).__name__} has no evaluation of its own"
            )
            raise NotApplicable(
                "eval_dataset", batch["labels"].dtype, problem, "measure the student yourself"
            )
        if self.reader.causal or signal.whole().dim() == 3:
            return _NLL(signal, None, batch)["loss"]
        return nn.functional.cross_entropy(signal.whole().float(), batch["labels"])


_NLL = CrossEntropy()


@torch.no_grad()
def first_state(module: nn.Module) -> None:
    """Put a module's buffers back to what they were when this was first called with it.

    An objective or policy used before so begins as it did then, and not where the last run ended. What is not kept in
    checkpoints is left alone.
    """
    kept = module.state_dict()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    first = module.__dict__.setdefault("_first_state", {name: b.clone() for name, b in buffers.items()})
    for name, buffer in buffers.items():
        if name in first and first[name].shape == buffer.shape:
            buffer.copy_(first[name])


def check_policy(policy: Policy, student: nn.Module, teacher: Teacher, objective: Objective) -> None:
    """Refuse a policy that cannot write what is learnt from.

    Raises:
        NotApplicable: with the reason.
    """
    problem = None
    if objective.cross_vocabulary:
        problem = "writes one vocabulary only"
    elif objective.columns:
        problem = f"writes sequences without the column {objective.columns[0]!r} that the objective reads"
    elif isinstance(teacher, LogitStore):
        problem = "writes texts that a stored teacher has not read"
    elif not is_causal(student):
        problem = "needs a student that writes, a causal language model"
    if problem:
        raise NotApplicable("policy", type(policy).__name__, problem, "leave it out")


def models_of(student: nn.Module, teacher: Teacher, objective: Objective) -> list[nn.Module]:
    """The teachers that are models, checked."""
    if teacher is None:
        if objective.needs_teacher and getattr(objective, "kd_weight", True):
            raise BadInput(
                "teacher", None, f"is needed by {type(objective).__name__}", "give a model or a LogitStore"
            )
        return []
    if isinstance(teacher, LogitStore):
        if objective.teacher_taps or objective.needs_logits:
            problem = f"has no hidden states or whole logits, and {type(objective).__name__} reads them"
            raise BadInput("teacher", "LogitStore", problem, "use a teacher model")
        return []
    models = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    if any(model is student for model in models):
        raise BadInput(
            "teacher", type(student).__name__, "is the student itself", "pass a copy (copy.deepcopy)"
        )
    return models


def align(reader: Reader, readers: Sequence[Reader], teacher: Teacher, rule: str) -> int | None:
    """Compare vocabularies; under "truncate", cut all heads to the shortest, whose size it returns where any is cut."""
    if rule not in ("refuse", "truncate"):
        raise BadInput("align_vocab", rule, "is not known", 'use "refuse" or "truncate"')
    if not reader.causal:
        return None
    sizes = [_vocabulary(r) for r in readers]
    if isinstance(teacher, LogitStore):
        sizes.append(teacher.vocabulary)
    ours = _vocabulary(reader)
    least = min([ours, *sizes])
    if all(size == ours for size in sizes):
        return None
    theirs = next(size for size in sizes if size != ours)
    every = (reader, *readers)
    if rule == "refuse" or any(each.head is None for each in every):
        remedy = (
            'pass align_vocab="truncate" where they differ by padding rows, or a cross-tokenizer objective'
        )
        raise IncompatibleModels("teacher", theirs, f"entries of vocabulary, the student has {ours}", remedy)
    for each in every:
        each.cut(least)
    return least


def _vocabulary(reader: Reader) -> int:
    return reader.head.vocabulary if reader.head is not None else int(reader.model.config.vocab_size)  # type: ignore[union-attr,arg-type]


def same_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse two tokenizers whose ids mean different tokens.

    Raises:
        IncompatibleModels: the first id that differs is named.
    """
    if student is None or teacher is None or student is teacher:
        return
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() & theirs.keys()):
        if ours[i] != theirs[i]:
            problem = f"means {theirs[i]!r} to the teacher and {ours[i]!r} to the student"
            raise IncompatibleModels("teacher_tokenizer", i, problem, "use a cross-tokenizer objective (ULD)")
