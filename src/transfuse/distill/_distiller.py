"""The family's trainer: a `transformers.Trainer` that runs student, teacher and objective on each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from ..core.batches import IGNORED, pad_collator
from ..core.errors import BadInput
from ..core.files import write_tensors
from ..core.runs import check_finite
from ..core.trainer import SafeTrainer
from ._base import Objective, Reader
from ._pairing import Pair, Teacher, align, check_policy, first_state, models_of, same_tokenizers
from ._policy import Policy
from ._rows import Collator, Numbered
from ._store import LogitStore

__all__ = ["Distiller", "same_tokenizers"]


class Distiller(SafeTrainer):
    """Train a student on what a teacher says, through an objective.

    A `transformers.Trainer`: its arguments, callbacks, schedules, mixed precision and `accelerate launch` work as
    there. The teacher runs in evaluation mode, without gradients, on its own device and in its own dtype. Losses of
    language models are normalised by the predicted tokens of the whole update, over micro-batches and processes.
    `evaluate` reports the student's cross-entropy with the labels, whatever the objective, unless that has an
    evaluation of its own. Checkpoints are those of `SafeTrainer`; the objective's own parameters and state are in
    them. An objective or policy used before starts afresh. `save_model` writes the student alone.

    Args:
        student: The model that is trained: causal language model, PEFT model, classifier, or any module that
            returns logits.
        teacher: A model, a `LogitStore`, several models (their logits are averaged by `teacher_weights`), or None
            where the objective needs none.
        objective: An `Objective`, or the name of a standard one (`"forward-kl"`).
        args: `transformers.TrainingArguments`.
        train_dataset: Rows with the model's inputs and `labels`.
        data_collator: Makes a batch of rows; `pad_collator` by default for language models.
        processing_class: The student's tokenizer.
        teacher_tokenizer: The teacher's, if it differs: the two vocabularies are then compared.
        teacher_weights: Weights of several teachers; equal by default.
        align_vocab: "refuse" vocabularies of different sizes, or "truncate" both to the shorter one: right where
            they differ by padding rows only.
        policy: Replaces training sequences by the student's own; None keeps the data as they are.
        **options: Further arguments of `Trainer`.

    Raises:
        BadInput: student and teacher are one object; no teacher where one is needed; a store of other rows; no
            token to predict; an unknown objective; modules to tap that do not exist.
        IncompatibleModels: vocabularies or tokenizers that differ.
        NotApplicable: a policy with a stored teacher, an objective that reads columns, or a student that does not
            write.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher = None,
        objective: Objective | str,
        train_dataset: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: Any = None,
        teacher_tokenizer: Any = None,
        teacher_weights: Sequence[float] | None = None,
        align_vocab: Literal["refuse", "truncate"] = "refuse",
        policy: Policy | None = None,
        **options: Any,
    ):
        if isinstance(objective, str):
            from .survey_kd_llm import get

            objective = get(objective)
        models = models_of(student, teacher, objective)
        if len(train_dataset) == 0:
            raise BadInput("train_dataset", "[]", "has no rows", "give at least one example")
        first_state(objective)
        objective.prepare(student, models, processing_class, teacher_tokenizer)
        if policy is not None:
            check_policy(policy, student, teacher, objective)
            first_state(policy)
            policy.prepare(models)
        fuse = not objective.needs_logits
        reader = Reader(student, patterns=objective.student_taps, fuse=fuse)
        taps = objective.teacher_taps
        readers = [Reader(model, patterns=taps, fuse=fuse, prefix="teacher_") for model in models]
        if not objective.cross_vocabulary:
            same_tokenizers(processing_class, teacher_tokenizer)
            least = align(reader, readers, teacher, align_vocab)
            if policy is not None:
                policy.vocabulary = least
        collate = data_collator or (pad_collator(processing_class or 0) if reader.causal else None)
        store = teacher if isinstance(teacher, LogitStore) else None
        if store is not None:
            store.check_rows(train_dataset)
            train_dataset = Numbered(train_dataset)
        if collate is not None:
            collate = Collator(collate, objective.columns)
        pair = Pair(student, objective, reader, readers, store, teacher_weights)
        args = args or TrainingArguments()
        args.remove_unused_columns = False
        there = Path(args.output_dir).exists()
        super().__init__(
            model=pair, args=args, train_dataset=train_dataset, data_collator=collate,
            processing_class=processing_class, **options,
        )  # fmt: skip
        if (
            not there and args.save_strategy == "no"
        ):  # Trainer makes the folder even where nothing goes into it
            with contextlib.suppress(OSError):
                Path(args.output_dir).rmdir()
        self.student, self.objective, self.policy = student, objective, policy
        self.model_accepts_loss_kwargs = reader.causal and objective.additive
        self.can_return_loss = True
        self._figures: dict[str, float] = {}
        self.figures: list[dict[str, float]] = []
        if policy is not None:
            pair.policy = policy
        self._check_rows(reader)
        first = self._first_batch()
        pair.set_up(first)
        self.add_callback(_Lifecycle(self))
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)

    def _check_rows(self, reader: Reader) -> None:
        """At least one row must have something to predict."""
        if not reader.causal:
            return
        for i in range(len(self.train_dataset)):
            row = self.train_dataset[i]
            if not isinstance(row, Mapping) or "input_ids" not in row:  # texts: the collator labels them
                return
            labels = row.get("labels", ())
            if any(label != IGNORED for label in list(labels)[1:]):
                return
        raise BadInput("train_dataset", f"{len(self.train_dataset)} rows", "predicts no token", "label some")

    def _first_batch(self) -> dict[str, Any]:
        rows = [self.train_dataset[i] for i in range(min(2, len(self.train_dataset)))]
        batch = self._prepare_inputs(self.data_collator(rows))
        missing = [name for name in self.objective.columns if name not in batch]
        if missing:
            raise BadInput("train_dataset", missing[0], "is a column it lacks", "add it; see the objective")
        return batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of an update, with the student's own sequences in place where the policy says so."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.policy is not None:
            progress = self.state.global_step / max(self.state.max_steps, 1)
            batches = [self.policy.replace(self.student, batch, progress=progress) for batch in batches]
        if not self.model_accepts_loss_kwargs:
            return batches, items
        counts = [self.objective.totals(batch) for batch in batches]
        names = counts[0] if counts else ()
        totals = {name: self._whole([each[name] for each in counts], device) for name in names}
        return [{**batch, **totals} for batch in batches], self._predicted(batches, device)

    def _predicted(self, batches: Sequence[Mapping[str, Any]], device: Any) -> Tensor:
        """Tokens that an update predicts, over its micro-batches and processes.

        Versions of Trainer count them each in their own way; nothing predicts a row's first token.
        """
        return self._whole([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches], device)

    def _whole(self, counts: Sequence[Tensor], device: Any) -> Tensor:
        """The sum of counts over micro-batches and processes."""
        count = torch.stack(list(counts)).sum().to(device) if counts else torch.zeros((), device=device)
        if self.accelerator.num_processes > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss in training, cross-entropy with the labels in evaluation."""
        if not model.training:
            value = model(inputs, evaluate=True)["loss"]
            return (value, None) if return_outputs else value
        whole = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        found = model({**inputs, "items": num_items_in_batch} if whole else inputs)
        share = 1.0 if whole else 1 / self.current_gradient_accumulation_steps
        world = self.accelerator.num_processes if whole and self.args.average_tokens_across_devices else 1
        for name, figure in found.items():
            self._figures[name] = self._figures.get(name, 0.0) + float(figure.detach()) * share * world
        value = found["loss"] * world
        check_finite(value, self.state.global_step, self.args.learning_rate)
        return (value, None) if return_outputs else value

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Evaluation: the loss alone, no logits kept."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def end_update(self) -> None:
        """Tell the objective what the update brought; processes agree on it."""
        names = sorted(self._figures)
        values = torch.tensor(
            [self._figures[name] for name in names], device=self.args.device, dtype=torch.float64
        )
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        self._figures = {}
        found = dict(zip(names, values.tolist(), strict=True))
        self.figures.append(found)
        if self.accelerator.num_processes > 1:
            self.losses[-1] = found["loss"]  # each process knew its share alone
        self.objective.on_step(found, self.state.global_step, self.state.max_steps)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; tells the policy the loss, if there is one: of several data sets, their mean."""
        found = super().evaluate(*args, **options)
        prefix = options.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        several = [value for name, value in found.items() if name.endswith("_loss")]
        losses = [found["eval_loss"]] if "eval_loss" in found else several
        if (
            self.policy is not None and prefix == "eval" and losses
        ):  # of a set among several, the prefix is longer
            self.policy.on_evaluate(sum(losses) / len(losses))
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student alone, in its own format; the tokenizer beside it."""
        folder = Path(output_dir or self.args.output_dir)
        student: Any = self.student
        if hasattr(student, "save_pretrained"):
            student.save_pretrained(str(folder))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / "model.safetensors", student.state_dict())
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))


class _Lifecycle(TrainerCallback):
    def __init__(self, trainer: Distiller):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epochs = max(int(state.num_train_epochs), 1)
        self.trainer.objective.on_epoch(self.trainer.student, int(state.epoch or 0), epochs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self.trainer.figures:
            logs.update({f"loss/{k}": v for k, v in self.trainer.figures[-1].items() if k != "loss"})
