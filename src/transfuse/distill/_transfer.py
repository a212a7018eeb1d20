"""What `transfuse run` does with an objective: rows from texts, the trainer, figures before and after, the folder."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..core.batches import data_identity, text_split
from ..core.checkpoints import load_checkpoint
from ..core.datasets import file_or_dataset
from ..core.errors import BadInput, NotApplicable
from ..core.files import atomic_write
from ..core.lineage import write_lineage
from ..core.runs import open_run
from ..core.workshop import tell
from ._base import Objective
from ._distiller import Distiller
from ._policy import Policy
from ._store import LogitStore

__all__ = ["distil"]

TOLD_EVERY = 5.0  # seconds between lines of progress


def distil(
    student: Any,
    tokenizer: Any,
    *,
    method: Any,
    output: str | os.PathLike[str],
    texts: os.PathLike[str] | None,
    dataset: str | None,
    held_out: os.PathLike[str] | None,
    held_out_dataset: str | None,
    teacher: str | None,
    scratch: Path | None,
    seed: int,
    options: dict[str, Any],
) -> Path:
    """The body of `distill.transfer`."""
    import torch

    from ..core.models import load

    if not isinstance(method, Objective):
        raise BadInput("method", type(method).__name__, "is no objective", "give one, such as TAID()")
    block = options["block"]
    held = None
    if held_out is not None or held_out_dataset is not None:
        held = file_or_dataset(held_out, held_out_dataset, "held_out")
    rows, kept = text_split(
        tokenizer, file_or_dataset(texts, dataset, "texts"), held, block, options["max_held_out"]
    )
    source: Any = None
    if teacher is not None:
        source, _ = load(teacher, dtype=str(student.dtype).removeprefix("torch."), device=str(student.device))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options["stored_top_k"] is not None and source is not None:
        if options["on_policy"]:
            problem = "writes texts that a stored teacher has not read"
            raise NotApplicable("on_policy", options["on_policy"], problem, "leave out stored_top_k")
        place = (scratch or Path(output)).parent / "logits"
        source = LogitStore.capture(
            source, rows, place, k=options["stored_top_k"], batch_size=options["batch_size"],
            on_shard=lambda done, total: tell(f"teacher: {done}/{total} rows stored"),
        )  # fmt: skip
    settings = {name: options[name] for name in ("lr", "epochs", "max_steps", "batch_size", "accumulation")}
    identity = {"distil": settings, "seed": seed, "data": data_identity(rows)}
    folder, last = open_run(scratch, identity, True)
    on_cpu = student.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder or Path(output).with_name("scratch")),
        learning_rate=options["lr"],
        lr_scheduler_type=options["schedule"],
        warmup_steps=options["warmup"],
        num_train_epochs=options["epochs"],
        max_steps=options["max_steps"] or -1,
        per_device_train_batch_size=options["batch_size"],
        per_device_eval_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulation"],
        weight_decay=options["weight_decay"],
        max_grad_norm=options["clip"] or 0.0,
        seed=seed,
        save_strategy="steps" if folder and options["save_every"] else "no",
        save_steps=options["save_every"] or 500,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False if world > 1 else None,
    )
    policy = Policy(fraction=options["on_policy"], prompt_tokens=block // 4) if options["on_policy"] else None
    trainer = Distiller(
        student=student, teacher=source, objective=method, train_dataset=rows, eval_dataset=kept, args=arguments,
        processing_class=tokenizer, align_vocab=options["align_vocab"], policy=policy, identity=identity,
    )  # fmt: skip
    before = math.exp(trainer.evaluate()["eval_loss"])
    state: dict[str, Any] = load_checkpoint(last) if last is not None else {}
    trainer.add_callback(_Told(trainer))
    started = time.perf_counter()
    if last is not None and state.get("finished"):
        trainer.resume_weights(last)
    else:
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    seconds = time.perf_counter() - started
    after = math.exp(trainer.evaluate()["eval_loss"])
    losses = trainer.losses
    if not trainer.is_world_process_zero():
        return Path(output)
    if folder is not None and not state.get("finished"):
        trainer.save_state(folder, finished=True)
    target = Path(output)
    with torch.no_grad():
        trainer.save_model(str(target))
    record = {"losses": losses, "perplexity": {"before": before, "after": after}}
    atomic_write(target / "training.json", json.dumps(record) + "\n")
    write_lineage(
        target,
        method=_slug(method),
        inputs={"texts": str(texts or dataset), "teacher": teacher},
        seed=seed,
        measurements={
            "perplexity_before": before, "perplexity_after": after, "first_loss": losses[0], "last_loss": losses[-1],
            "updates": len(losses), "training_seconds": round(seconds, 3), "held_out_rows": len(kept),
        },
        usage='model = AutoModelForCausalLM.from_pretrained("this folder")',
    )  # fmt: skip
    tell(f"held-out perplexity {before:.2f} -> {after:.2f} after {len(losses)} updates")
    return target


def _slug(method: Objective) -> str:
    """The method's name: that of its module."""
    module = type(method).__module__.rpartition(".")[2]
    return "survey-kd-llm" if module.startswith("_") else module.replace("_", "-")


class _Told(TrainerCallback):
    """A line of progress on standard error every few seconds, from the main process."""

    def __init__(self, trainer: Distiller):
        self.trainer, self.last, self.start, self.first = trainer, 0.0, time.perf_counter(), None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first, self.start = state.global_step, now
        if not state.is_world_process_zero or (
            now - self.last < TOLD_EVERY and state.global_step < state.max_steps
        ):
            return
        self.last = now
        made = state.global_step - self.first
        left = (state.max_steps - state.global_step) * (now - self.start) / made if made else float("nan")
        recent: Sequence[float] = self.trainer.losses[-10:]
        more = f", {left:.0f} s left" if made else ""
        tell(f"step {state.global_step}/{state.max_steps}, loss {sum(recent) / len(recent):.4f}{more}")
