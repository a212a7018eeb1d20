"""`transformers.Trainer` with checkpoints that are atomic, resume exactly and hold no pickle."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .batches import EpochOrder, pad_collator
from .checkpoints import load_checkpoint, load_rng, load_weights, read_json, save_checkpoint
from .errors import BadInput
from .runs import check_finite, check_number, check_positive

__all__ = ["SafeTrainer", "check_settings", "run_trainer"]


class SafeTrainer(Trainer):
    """A `Trainer` whose checkpoints are `core.checkpoints` folders.

    Trainer's own keep optimizer, scheduler and random states in pickles, in a folder filled bit by bit.
    Here the trained tensors, the optimizer and the random states are safetensors, the rest JSON, and the
    folder appears whole; the previous one goes only then. The data order depends on seed and epoch alone
    (`EpochOrder`), so that a run killed at any moment and resumed ends with the same weights, on CPU bit
    for bit. A loss or gradient that is not finite raises `TrainingDiverged` before the update.

    Args:
        loss: Replaces the model's own loss: gets model and batch, returns a mean over the batch.
        extra_loss: A regulariser of the model, added once per update (not in evaluation).
        identity: Facts stored with each checkpoint, by which a later call recognises its own run.
        **options: Those of `transformers.Trainer`.

    Raises:
        BadInput: options whose checkpoints would need pickle (DeepSpeed, FSDP), or that need several
            checkpoints to be kept (`load_best_model_at_end`).
    """

    def __init__(
        self,
        *,
        loss: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None,
        extra_loss: Callable[[Any], torch.Tensor] | None = None,
        identity: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.loss, self.extra_loss, self.identity = loss, extra_loss, dict(identity or {})
        self.losses: list[float] = []
        self._parts: list[float] = []
        if loss is not None:
            self.model_accepts_loss_kwargs = False  # a mean over the batch, to be divided by the accumulation
        if self.args.load_best_model_at_end:
            remedy = "evaluate and choose in a callback"
            raise BadInput("load_best_model_at_end", True, "needs every checkpoint, and one is kept", remedy)
        if self.args.save_strategy != "no" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            remedy = 'pass save_strategy="no" and save the model at the end'
            raise BadInput(
                "save_strategy", self.args.save_strategy, "is not offered with sharded models", remedy
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss (or `loss`), plus `extra_loss` in training, checked to be finite."""
        if self.loss is not None:
            value, outputs = self.loss(model, inputs), None
        else:
            value, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if self.extra_loss is not None and model.training:
            whole = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            share = 1 / self.current_gradient_accumulation_steps if whole else 1.0
            value = value + share * self.extra_loss(self.accelerator.unwrap_model(model))
        if model.training:
            check_finite(value.mean(), self.state.global_step, self.args.learning_rate)
        return (value, outputs) if return_outputs else value

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; the losses of an update are added up in `losses`."""
        value = super().training_step(*args, **kwargs)
        self._parts.append(float(value))
        if len(self._parts) == self.current_gradient_accumulation_steps:
            self.losses.append(sum(self._parts))
            self._parts = []
        return value

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of an update's gradient, clipped or not: asked for before every update."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # fp16's loss scaling passes such an update by
            check_finite(torch.as_tensor(norm), self.state.global_step, self.args.learning_rate)
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        lengths = None
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = [len(data[i]["input_ids"]) for i in range(len(data))]
        return EpochOrder(len(data), seed=self.args.seed, lengths=lengths, batch_size=self._train_batch_size)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        if self.args.should_save:
            self.save_state(Path(self._get_output_dir(trial=trial)))

    def save_state(self, folder: Path, *, finished: bool = False) -> Path:
        """Write the checkpoint of the present state into `folder`; `finished` marks a run's last one."""
        text = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
        return save_checkpoint(
            folder,
            self.state.global_step,
            model=self.accelerator.unwrap_model(self.model),
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            values={"identity": self.identity, "losses": self.losses, "finished": finished},
            extra={TRAINER_STATE_NAME: text},
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer reads it next, and would not say what to do.
        read_json(Path(resume_from_checkpoint), TRAINER_STATE_NAME)
        load_weights(Path(resume_from_checkpoint), self.model if model is None else model)

    def resume_weights(self, folder: Path) -> None:
        """Take weights and losses of a finished run's last checkpoint."""
        load_weights(folder, self.accelerator.unwrap_model(self.model))
        self.losses = load_checkpoint(folder)["losses"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = load_checkpoint(Path(checkpoint), optimizer=self.optimizer, scheduler=self.lr_scheduler)
            self.losses = state["losses"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng(Path(checkpoint))

    def _save_scaler(self, output_dir: str) -> None:
        """Loss scaling (fp16) starts afresh after a resumption."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """See `_save_scaler`."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        super()._save(str(folder), state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of `args`
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of `core.training.fit`.

    Raises:
        BadInput: one is out of range.
    """
    check_positive(**{name: settings[name] for name in ("epochs", "max_steps", "batch_size", "accumulation")})
    check_number("lr", settings["lr"])
    for name in ("weight_decay", "warmup"):
        check_number(name, settings[name], zero=True)
    if settings["clip"] is not None:
        check_number("clip", settings["clip"])
    betas, schedule = settings["betas"], settings["schedule"]
    if schedule not in ("constant", "linear", "cosine"):
        raise BadInput("schedule", schedule, "is not known", 'use "constant", "linear" or "cosine"')
    if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
        raise BadInput(
            "betas", betas, "are not two numbers from 0 to below 1", "give a pair like (0.9, 0.95)"
        )


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int, float], None], losses: Callable[[], list[float]]):
        self.report, self.losses = report, losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps, self.losses()[-1])


def run_trainer(
    model: Any,
    dataset: Any,
    settings: Mapping[str, Any],
    *,
    identity: Mapping[str, Any],
    folder: Path | None,
    last: Path | None,
    save_every: int | None,
    collator: Callable[[list[Any]], dict[str, Any]] | None,
    loss: Callable[[Any, dict[str, Any]], torch.Tensor] | None,
    extra_loss: Callable[[Any], torch.Tensor] | None,
    on_step: Callable[[int, int, float], None] | None,
    callbacks: Sequence[Any],
) -> tuple[list[float], int]:
    """The body of `core.training.fit`: losses of every update, and how many `last` already held."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    config = getattr(model, "config", None)
    use_cache, verbosity = getattr(config, "use_cache", None), transformers.logging.get_verbosity()
    schedule = settings["schedule"]
    if settings["warmup"] and schedule == "constant":
        schedule = "constant_with_warmup"
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=str(folder or scratch),
            learning_rate=settings["lr"],
            num_train_epochs=settings["epochs"] or 1,
            max_steps=settings["max_steps"] or -1,
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=settings["accumulation"],
            weight_decay=settings["weight_decay"],
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            lr_scheduler_type=schedule,
            warmup_steps=settings["warmup"],
            max_grad_norm=settings["clip"] or 0.0,
            seed=settings["seed"],
            train_sampling_strategy="group_by_length" if settings["group_by_length"] else "random",
            save_strategy="steps" if folder and save_every else "no",
            save_steps=save_every or 500,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
        )
        trainer = SafeTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collator or pad_collator(_pad_id(config)),
            callbacks=list(callbacks),
            loss=loss,
            extra_loss=extra_loss,
            identity=identity,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if on_step is not None:
            trainer.add_callback(_Progress(on_step, lambda: trainer.losses))
        try:
            state: dict[str, Any] = load_checkpoint(last) if last is not None else {"step": 0}
            if last is not None and state.get("finished"):
                trainer.resume_weights(last)
                return state["losses"], state["step"]
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
            if folder is not None:
                trainer.save_state(folder, finished=True)
            return trainer.losses, state["step"]
        finally:
            transformers.logging.set_verbosity(verbosity)
            if config is not None and use_cache is not None:
                config.use_cache = use_cache


def _pad_id(config: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0
