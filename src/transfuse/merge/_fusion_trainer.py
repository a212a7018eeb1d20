"""FusionX's trainer: the target and the selection network under one optimiser, the sources read from their stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from ..core.batches import IGNORED, pad_collator
from ..core.errors import BadInput, IncompatibleModels
from ..core.runs import check_finite
from ..core.trainer import SafeTrainer
from ._fusion import MultiTeacherFusion, Rest
from ._fusion_store import Reading, SourceStore, gathered

__all__ = ["FusionTrainer"]


class FusionTrainer(SafeTrainer):
    """Continue a language model's training under several sources.

    A `transformers.Trainer`: its arguments, callbacks, schedules, mixed precision and `accelerate launch` work as
    there. The selection network is trained with the target and is in the checkpoints, which are those of
    `SafeTrainer`; `save_model` writes the target alone. The target's and the fusion loss are divided by the predicted
    tokens of the whole update, over micro-batches and processes, the feedback by the number of micro-batches.
    `evaluate` reports the cross-entropy with the labels, a mean over all predicted tokens (NaN without any).

    Args:
        model: The target, a causal language model.
        fusion: The loss, with one source per store.
        sources: What each source says about `train_dataset`, in the order of the gate's inputs.
        train_dataset: Rows with `input_ids` and `labels`.
        args: `transformers.TrainingArguments`.
        data_collator: Makes a batch of rows; pads on the right by default.
        processing_class: The target's tokenizer.
        gate_lr: Learning rate of the selection network; None for that of the target.
        rest: What becomes of the probability that a store lacks to 1: "spread" evenly over the entries it does not
            list, or "renormalise", none of it, as the released code.
        **options: Further arguments of `Trainer`.

    Attributes:
        figures: For each update loss, `lm`, `fusion`, `feedback`, `teachers` (heard per sequence on average), and the
            mean weight of each source (`weight_0`, ...).

    Raises:
        BadInput: no rows; another number of sources than the loss has; a store of other data; `gate_lr` without a gate.
        IncompatibleModels: a store over another vocabulary.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        fusion: MultiTeacherFusion,
        sources: Sequence[SourceStore],
        train_dataset: Sequence[Mapping[str, Any]],
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: Any = None,
        gate_lr: float | None = None,
        rest: Rest = "spread",
        **options: Any,
    ):
        if len(train_dataset) == 0:
            raise BadInput("train_dataset", "[]", "has no rows", "give at least one example")
        if len(sources) != fusion.n_sources:
            problem = f"are not the {fusion.n_sources} of the loss"
            raise BadInput("sources", len(sources), problem, "give one store per source")
        if gate_lr is not None and (fusion.gate is None or not gate_lr > 0):
            raise BadInput("gate_lr", gate_lr, "is not of use", 'give a positive rate with mode="gate"')
        reading = Reading(model)
        for i, store in enumerate(sources):
            if store.rows != len(train_dataset):
                problem = f"rows are stored, the data has {len(train_dataset)}"
                raise BadInput(
                    f"sources[{i}]", store.rows, problem, "capture the data set that is trained on"
                )
            if store.vocabulary != reading.vocabulary:
                problem = f"entries of vocabulary, the target has {reading.vocabulary}"
                remedy = "capture with the target's vocabulary"
                raise IncompatibleModels(f"sources[{i}]", store.vocabulary, problem, remedy)
        args = args or TrainingArguments()
        args.remove_unused_columns = False
        collate = data_collator or pad_collator(processing_class or 0)
        fusion.to(next(model.parameters()).device)
        super().__init__(
            model=_Fusing(model, fusion, reading, sources, rest), args=args, data_collator=_Numbering(collate),
            train_dataset=[{**row, "row": i} for i, row in enumerate(train_dataset)],
            processing_class=processing_class, **options,
        )  # fmt: skip
        self.target, self.fusion, self.gate_lr = model, fusion, gate_lr
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True
        self.figures: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._judged = torch.zeros(2, dtype=torch.float64)
        self._ce = torch.stack([store.ce for store in sources], -1)
        self.add_callback(_Collected(self))
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the gate in a group of its own where it has its own rate."""
        new = self.optimizer is None
        rule = super().create_optimizer(*args, **kwargs)
        if new and self.gate_lr is not None and self.fusion.gate is not None:
            mine = {id(p) for p in self.fusion.gate.parameters()}
            for group in rule.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in mine]
            own = list(self.fusion.gate.parameters())
            rule.add_param_group({"params": own, "lr": self.gate_lr, "weight_decay": 0.0})
        return rule

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """An update's micro-batches, its predicted tokens, and with each the cross-entropies of all its sequences."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        items = torch.tensor(sum(counts), device=device)
        processes = self.accelerator.num_processes
        if processes > 1 and self.args.average_tokens_across_devices:
            items = (
                self.accelerator.gather(items).sum() / processes
            )  # gradients are averaged over the processes
        if self.fusion.importance == "update" and batches:
            every = self._ce[torch.cat([batch["row"].cpu() for batch in batches])]
            batches = [{**batch, "update_ce": every} for batch in batches]
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The fused loss in training, cross-entropy with the labels in evaluation."""
        if not model.training:
            value = model(inputs, evaluate=True)["loss"]
            return (value, None) if return_outputs else value
        share = 1 / self.current_gradient_accumulation_steps
        found = model({**inputs, "items": num_items_in_batch}, share=share)
        teachers = found.pop("selected").float().sum(-1).mean()
        weights = found.pop("weights").detach().mean(0)
        parts = {"feedback": found["feedback"] * share, "teachers": teachers * share}
        parts |= {f"weight_{i}": weight * share for i, weight in enumerate(weights)}
        for name, figure in {**found, **parts}.items():
            self._now[name] = self._now.get(name, 0.0) + float(figure.detach())
        check_finite(found["loss"], self.state.global_step, self.args.learning_rate)
        return (found["loss"], None) if return_outputs else found["loss"]

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Evaluation: the loss alone, no logits kept."""
        with torch.no_grad():
            found = model(self._prepare_inputs(inputs), evaluate=True)
        sums, tokens = self.accelerator.gather_for_metrics((found["sums"], found["tokens"]))
        self._judged += torch.stack([sums.double().sum(), tokens.double().sum()]).cpu()
        return found["loss"].detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Trainer's, with the mean over tokens in place of the mean over batches."""
        self._judged = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        total, tokens = self._judged.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens if tokens else math.nan
        return output

    def end_update(self) -> None:
        """Keep the figures of an update."""
        self.figures.append(self._now)
        self._now = {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The target alone, in its own format; the tokenizer beside it."""
        folder = str(output_dir or self.args.output_dir)
        target: Any = self.target
        target.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


class _Fusing(nn.Module):
    """Target and loss as one module, so that optimizer, checkpoints and DDP see both; the stores stay outside."""

    def __init__(
        self,
        target: nn.Module,
        fusion: MultiTeacherFusion,
        reading: Reading,
        stores: Sequence[SourceStore],
        rest: Rest,
    ):
        super().__init__()
        self.target, self.fusion = target, fusion
        self.reading, self.stores, self.rest = reading, list(stores), rest

    @property
    def config(self) -> Any:
        """The target's."""
        return getattr(self.target, "config", None)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The target's."""
        target: Any = self.target
        target.gradient_checkpointing_enable(**options)

    def forward(
        self, batch: Mapping[str, Any], evaluate: bool = False, share: float = 1.0
    ) -> dict[str, Tensor]:
        student = self.reading(batch)
        if evaluate:
            keep = batch["labels"][:, 1:] != IGNORED
            rows = student[:, :-1][keep]
            logits = rows if self.reading.head is None else self.reading.head(rows)
            each = torch.zeros(keep.shape, device=keep.device)
            each[keep] = nn.functional.cross_entropy(
                logits.float(), batch["labels"][:, 1:][keep], reduction="none"
            )
            tokens = keep.sum(-1)
            return {"loss": each.sum() / tokens.sum().clamp_min(1), "sums": each.sum(-1), "tokens": tokens}
        sources, ce = gathered(self.stores, batch, self.rest)
        found = self.fusion(
            student, batch["labels"], sources, ce, head=self.reading.head, items=batch.get("items"),
            update_ce=batch.get("update_ce"), share=share,
        )  # fmt: skip
        return {name: getattr(found, name) for name in found.__dataclass_fields__}


class _Numbering:
    """Keeps the numbers of the rows, which a tokenizer's collator drops."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch


class _Collected(TrainerCallback):
    def __init__(self, trainer: FusionTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_update()
