"""Where training happens: seeds, a minimiser for closures, one resumable loop, one thin Trainer wrapper.

Nothing else in the library seeds, calls `backward` or steps an optimizer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from .batches import data_identity, encode_examples, own_generators, pad_collator
from .checkpoints import (
    load_checkpoint,
    load_rng,
    load_weights,
    rng_state,
    save_checkpoint,
)
from .errors import BadInput, TrainingDiverged
from .runs import History, check_finite, check_number, check_positive, discard_run, open_run, training_mode

__all__ = ["History", "encode_examples", "fit", "generator", "loop", "optimise", "pad_collator", "seeded"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under `seed` (python, numpy, torch on every device) and put the old random states back.

    Raises:
        BadInput: `seed` is not an integer in [0, 2**32).
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise BadInput("seed", seed, "is not an integer from 0 to 2**32 - 1", "give such a seed")
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A `torch.Generator` of its own on `device`, started at `seed`; the global state is left alone."""
    return torch.Generator(device=device).manual_seed(seed)


def optimise(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    loss_fn: Callable[[], torch.Tensor],
    *,
    lr: float,
    steps: int,
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    weight_decay: float = 0.0,
    stop_below: float | None = None,
    patience: int = 1,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Minimise a closure over a few tensors in place: the inner problem of an editor, not a training run.

    Gradients are taken with respect to `parameters` only, so the model the closure runs through collects
    none, and no `.grad` is left on `parameters` either. Draws no random numbers of its own.

    Args:
        parameters: Leaf tensor(s) that require a gradient; changed in place.
        loss_fn: Returns the scalar loss; called once per step.
        lr: Learning rate.
        steps: Most updates made.
        optimizer: Update rule, with torch's defaults besides `lr` and `weight_decay`.
        weight_decay: As that optimizer defines it (decoupled for adamw).
        stop_below: A loss below this value is not followed by an update.
        patience: Stop at that many such losses in a row: 1, or the number of mini-batches where the closure
            takes them in turn.
        after_step: Called after each update under `torch.no_grad()`: a projection or a clamp.

    Returns:
        The loss before each update; with `stop_below` reached, the last entry belongs to the final values.

    Raises:
        BadInput: no parameters, or one that takes no gradient; a loss that is not a scalar or does not depend
            on them.
        TrainingDiverged: a loss or gradient is NaN or infinite. The tensors keep their last finite values.
    """
    wanted = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    rules = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    if optimizer not in rules:
        raise BadInput("optimizer", optimizer, "is not known", f"use one of {', '.join(rules)}")
    if not wanted or not all(p.is_leaf and p.requires_grad for p in wanted):
        raise BadInput(
            "parameters", len(wanted), "must be leaf tensors", "pass tensors with requires_grad=True"
        )
    rule = rules[optimizer](wanted, lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    low = 0
    try:
        for step in range(steps):
            with torch.enable_grad():
                loss = loss_fn()
            losses.append(check_finite(loss, step, lr))
            if stop_below is not None and losses[-1] < stop_below:
                low += 1
                if low >= patience:
                    break
                continue
            low = 0
            if not loss.requires_grad:
                raise BadInput(
                    "loss_fn", "its loss", "does not depend on the parameters", "use them in the closure"
                )
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    raise TrainingDiverged(
                        f"a gradient is not finite at step {step}; lower the learning rate"
                    )
                parameter.grad = gradient
            rule.step()
            if after_step is not None:
                with torch.no_grad():
                    after_step()
    finally:
        for parameter in wanted:
            parameter.grad = None
    return losses


def loop(
    model: torch.nn.Module,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    step: Callable[[Any], torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    epochs: int = 1,
    accumulation: int = 1,
    clip: float | None = None,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> History:
    """Train with a `step` closure: adversarial, bilevel, mutual learning, whatever does not fit a Trainer.

    Rests on `accelerate` for mixed precision and several processes: under `accelerate launch` the batches of
    an update are shared out and the gradients averaged, so that N processes equal N times the accumulation on
    one. A killed run started again with the same arguments ends with the same weights, on CPU bit for bit.

    Args:
        model: Holds every trained parameter (a `ModuleDict` if there are several models). Put into training
            mode for the duration; each submodule's mode is restored.
        batches: An iterable that can be iterated once per epoch, or a function of the epoch number that
            returns one. Its order may use the global random state when iteration begins, not later, and a
            `DataLoader`'s own generator. Tensors are moved to the model's device.
        step: Returns the loss of a batch, a scalar or a dict with `"loss"`.
        optimizer: A torch optimizer over the model's parameters.
        scheduler: A learning-rate scheduler, stepped after each update.
        epochs: Passes over `batches`.
        accumulation: Batches per update; their losses are averaged.
        clip: Largest norm of the whole gradient; None for no clipping.
        seed: Of python, numpy and torch during the run; the states from before come back afterwards.
        output_dir: Folder of the checkpoints. The last one stays there, so that a finished run is not
            repeated.
        save_every: Updates between checkpoints; None writes one at the end only.
        resume: Go on from a checkpoint in `output_dir`; False removes it and starts over.
        on_step: Called after each update with the number made and its loss.
        identity: JSON-able facts stored with each checkpoint, by which a later call recognises its own run: what
            decides the result and is in no other argument, such as the settings behind `step` and the data.

    Raises:
        BadInput: an argument out of range; an epoch without batches; a trained parameter outside of `model`,
            which checkpoints would miss; a checkpoint of a run with other arguments or another identity.
        TrainingDiverged: a loss or gradient became NaN or infinite. No update is made with it and the run's
            checkpoints are removed. (Loss scaling, for fp16, passes updates with infinite gradients by.)
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    check_positive(epochs=epochs, accumulation=accumulation, save_every=save_every)
    if clip is not None:
        check_number("clip", clip)
    remedy = "give a list, a DataLoader, or a function of the epoch that makes an iterator anew"
    if isinstance(batches, Iterator) and epochs > 1:
        raise BadInput("batches", type(batches).__name__, "can be iterated once only", remedy)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if output_dir is not None and not {id(p) for p in trained} <= {id(p) for p in model.parameters()}:
        problem = "has parameters that are not the model's, which no checkpoint would hold"
        raise BadInput("optimizer", type(optimizer).__name__, problem, "put all that is trained into `model`")
    groups = [
        {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    known = {"loop": [epochs, accumulation, clip, seed, type(optimizer).__name__, groups], **(identity or {})}
    folder, last = open_run(output_dir, known, resume)
    accelerator = Accelerator()
    world, rank = accelerator.num_processes, accelerator.process_index
    rule = accelerator.prepare(optimizer)
    device = next(model.parameters()).device
    private = own_generators(batches)
    losses: list[float] = []
    epoch_start: dict[str, Any] = {}
    at, skip, saved, started = 0, 0, -1, time.perf_counter()
    with seeded(seed), training_mode(model):
        if last is not None:
            load_weights(last, model)
            state = load_checkpoint(last, optimizer=rule, scheduler=scheduler)
            at, skip, losses, saved = state["epoch"], state["batch"], state["losses"], state["step"]
        resumed = len(losses)

        def save(epoch: int, batch: int) -> None:
            if folder is not None and accelerator.is_main_process:
                facts = {"identity": known, "epoch": epoch, "batch": batch, "losses": losses}
                save_checkpoint(
                    folder, len(losses), model=model, optimizer=rule, scheduler=scheduler, values=facts,
                    states={"epoch": epoch_start},
                )  # fmt: skip

        def update(group: list[Any]) -> float:
            total = 0.0
            rule.zero_grad()
            for batch in group[rank::world]:
                with accelerator.autocast():
                    out = step(send_to_device(batch, device))
                loss = out["loss"] if isinstance(out, Mapping) else out
                total += check_finite(loss, len(losses)) / len(group)
                accelerator.backward(loss * (world / len(group)))
            if world > 1:
                for p in trained:
                    p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
                total = float(accelerator.reduce(torch.tensor(total, device=device), "sum"))
            if clip is not None:
                norm = torch.as_tensor(accelerator.clip_grad_norm_(trained, clip))
            else:
                dense = [p.grad for p in trained if p.grad is not None and p.grad.layout == torch.strided]
                norm = torch.nn.utils.get_total_norm(dense)
            if accelerator.scaler is None:
                check_finite(norm, len(losses))
            rule.step()
            if scheduler is not None and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            return total

        try:
            for epoch in range(at, epochs):
                resuming = last if epoch == at else None
                if resuming is not None:
                    drawn = load_rng(resuming, "epoch")  # so that the epoch's order is drawn as it was
                    for i, own in enumerate(private):
                        own.set_state(drawn[f"own.{i}"])
                epoch_start = rng_state() | {f"own.{i}": own.get_state() for i, own in enumerate(private)}
                stream = iter(batches(epoch) if callable(batches) else batches)
                seen = 0
                if resuming is not None:
                    seen = sum(1 for _ in itertools.islice(stream, skip))
                    load_rng(resuming)
                    if seen < skip:
                        raise BadInput(
                            "batches", seen, f"are fewer than the {skip} made use of", "give the same"
                        )
                while group := list(itertools.islice(stream, accumulation * world)):
                    seen += len(group)
                    losses.append(update(group))
                    if on_step is not None:
                        on_step(len(losses), losses[-1])
                    if save_every is not None and len(losses) % save_every == 0:
                        save(epoch, seen)
                        saved = len(losses)
                if not seen:
                    raise BadInput("batches", f"epoch {epoch}", "gave none", remedy)
            if saved != len(losses):
                save(epochs, 0)
        except TrainingDiverged:
            discard_run(folder)
            raise
        finally:
            rule.zero_grad()
    return History(losses, time.perf_counter() - started, resumed)


def fit(
    model: Any,
    dataset: Any,
    *,
    lr: float,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 8,
    accumulation: int = 1,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Literal["constant", "linear", "cosine"] = "linear",
    warmup: float = 0.0,
    clip: float | None = 1.0,
    seed: int = 0,
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    group_by_length: bool = False,
    loss: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None,
    extra_loss: Callable[[Any], torch.Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    callbacks: Sequence[Any] = (),
    output_dir: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = True,
    identity: Mapping[str, Any] | None = None,
) -> History:
    """Train `model` in place with AdamW: a quiet, resumable call of `transformers.Trainer`.

    Trainer adds under a millisecond to a step, so it serves small runs as well; only its checkpoints are
    replaced, because they are pickles and not atomic: see `core.trainer.SafeTrainer`. The model stays on its
    device, keeps its mode and its `config.use_cache`; the global random state and log level are as before
    when the call returns.

    Args:
        model: A `PreTrainedModel` or PEFT model. What requires a gradient is trained.
        dataset: A sized dataset or list of rows (`encode_examples`).
        lr: Peak learning rate.
        epochs: Passes over the data; give this or `max_steps`.
        max_steps: Updates to make.
        batch_size: Rows per batch.
        accumulation: Batches per update, averaged over their tokens where the model supports it.
        weight_decay: Decoupled, not applied to biases and norms.
        betas: AdamW's decay of the mean and of the mean square of gradients.
        schedule: Learning rate after warm-up: constant, or to zero along a line or half a cosine.
        warmup: Updates of linear warm-up; below 1, a share of all updates.
        clip: Largest norm of the whole gradient; None for no clipping.
        seed: Of the data order and of dropout.
        collator: Makes a batch of rows; by default `pad_collator`.
        group_by_length: Batch rows of like length; their lengths are those of `input_ids`.
        loss: Replaces the model's own loss: gets model and batch.
        extra_loss: A regulariser of the model, added once per update.
        on_step: Called after each update with the number made, the number in all, and the loss.
        callbacks: Further `transformers.TrainerCallback`s.
        output_dir: Folder of the checkpoints. The last one stays there, so that a finished run is not
            repeated; saving the model itself is the caller's business.
        save_every: Updates between checkpoints; None writes one at the end only.
        resume: Go on from a checkpoint in `output_dir`; False removes it and starts over.
        identity: As in `loop`: what decides the result and is in no other argument, such as the settings of
            `loss`. Of functions, a checkpoint knows the names only.

    Raises:
        BadInput: an argument out of range, no rows, nothing to train; a checkpoint of another run.
        TrainingDiverged: the loss or a gradient became NaN or infinite. No update is made with it and the
            run's checkpoints are removed.
    """
    from .trainer import check_settings, run_trainer

    if (epochs is None) == (max_steps is None):
        raise BadInput("epochs", epochs, f"and max_steps = {max_steps} do not agree", "give one of the two")
    settings = {
        "lr": lr, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
        "accumulation": accumulation, "weight_decay": weight_decay, "betas": list(betas), "schedule": schedule,
        "warmup": warmup, "clip": clip, "seed": seed, "group_by_length": group_by_length,
    }  # fmt: skip
    check_positive(save_every=save_every)
    check_settings(settings)
    if not hasattr(dataset, "__len__"):
        raise BadInput("dataset", type(dataset).__name__, "has no length", "give a list or a `Dataset`")
    if len(dataset) == 0:
        raise BadInput("dataset", "[]", "has no rows", "give at least one example")
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(
            "model", type(model).__name__, "has nothing to train", "set requires_grad or add an adapter"
        )
    names = [
        None if f is None else getattr(f, "__qualname__", type(f).__name__)
        for f in (loss, extra_loss, collator)
    ]
    data = data_identity(dataset) if output_dir is not None else ""
    known = {"fit": settings, "functions": names, "data": data, **(identity or {})}
    folder, last = open_run(output_dir, known, resume)
    started = time.perf_counter()
    try:
        with seeded(seed), training_mode(model):
            losses, resumed = run_trainer(
                model, dataset, settings, identity=known, folder=folder, last=last, save_every=save_every,
                collator=collator, loss=loss, extra_loss=extra_loss, on_step=on_step, callbacks=callbacks,
            )  # fmt: skip
    except TrainingDiverged:
        discard_run(folder)
        raise
    finally:
        model.zero_grad(set_to_none=True)
    return History(losses, time.perf_counter() - started, resumed)
