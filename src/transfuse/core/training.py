"""Where training happens: seeds, a minimiser for closures, one resumable loop, one thin Trainer wrapper.

Nothing else in the library seeds, calls `backward` or steps an optimizer.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import torch

from .batches import encode_examples, pad_collator
from .errors import BadInput, TrainingDiverged

__all__ = ["encode_examples", "generator", "optimise", "pad_collator", "seeded"]


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


def check_finite(loss: torch.Tensor, step: int, lr: float | None = None) -> float:
    """The loss as a number.

    Raises:
        BadInput: it is not one number.
        TrainingDiverged: it is NaN or infinite.
    """
    if loss.numel() != 1:
        raise BadInput("loss", tuple(loss.shape), "is not a scalar", "return the mean over the batch")
    value = float(loss.detach())
    if not math.isfinite(value):
        hint = "" if lr is None else f" (now {lr:g})"
        raise TrainingDiverged(
            f"the loss is {value} at step {step}; lower the learning rate{hint} or check the data"
        )
    return value


def optimise(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    loss_fn: Callable[[], torch.Tensor],
    *,
    lr: float,
    steps: int,
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    weight_decay: float = 0.0,
    stop_below: float | None = None,
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
        stop_below: Stop, before updating, once the loss is below this value.
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
    try:
        for step in range(steps):
            with torch.enable_grad():
                loss = loss_fn()
            losses.append(check_finite(loss, step, lr))
            if stop_below is not None and losses[-1] < stop_below:
                break
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
