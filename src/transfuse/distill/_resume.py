"""Run a model's upper part from a hidden state that comes from somewhere else, with gradients through it.

`resume_from(model, path, hidden)` answers: what would the model say, had the module `path` put out `hidden`? What
is below `path` is not run where that can be avoided: in an `nn.Sequential` the modules after it are called one by one,
in a transformer's stack the blocks below are skipped while the model builds masks and positions (rotary ones too) from
its inputs as usual. Anything else is run whole, with the module's output replaced; that is right wherever what
follows reads nothing else from below. Running statistics of batch norms do not move, and `hidden` itself is kept
from modules that write in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.errors import BadInput
from ._base import frozen, is_causal, logits_of, model_inputs

__all__ = ["Cut", "default_cut", "module_at", "resume_from"]


def module_at(model: nn.Module, path: str, argument: str = "path") -> nn.Module:
    """The module of exactly this name.

    Raises:
        BadInput: there is none; the nearest name is suggested.
    """
    try:
        found = taps.match(model, path)
    except BadInput as error:
        raise BadInput(argument, path, error.problem, error.remedy) from None
    if found != [path]:
        raise BadInput(argument, path, "is a pattern", f"name one module, {found[0]!r} for instance")
    return model.get_submodule(path)


def default_cut(model: nn.Module) -> tuple[str, str]:
    """A low and a high place of a stack: a third of the way up, and its last hidden state.

    Of a transformer: its blocks, the last one being the high place. Of an `nn.Sequential`: its modules, without the
    last one, the head.

    Raises:
        BadInput: the model is neither, or too short.
    """
    if isinstance(model, nn.Sequential):
        names = list(model._modules)[:-1]
    else:
        names = taps.decoder_layers(model)
    if len(names) < 2:
        raise BadInput(
            "model", type(model).__name__, "has fewer than two layers", "name the places to cut at"
        )
    return names[max(1, len(names) // 3) - 1], names[-1]


def resume_from(
    model: nn.Module,
    path: str,
    hidden: Tensor,
    *,
    batch: Mapping[str, Any] | None = None,
    to: str | None = None,
    tupled: bool | None = None,
) -> Any:
    """Run `model` from the output of `path` on.

    Args:
        model: Any module; gradients reach `hidden` through it.
        path: Name of the module whose output `hidden` stands for.
        hidden: Of the shape of that output.
        batch: The model's inputs, needed but where all that is left to run are modules of one `nn.Sequential`: a
            transformer makes masks and positions from them.
        to: Stop at this module; None runs to the model's end.
        tupled: Whether the block `path` of a transformer returns a tuple; None finds out by a pass up to it.

    Returns:
        The output of `to` (of a tuple its first entry), or the model's own.

    Raises:
        BadInput: an unknown module, `to` not above `path`, or no batch where one is needed.
    """
    module_at(model, path)
    if to is not None:
        module_at(model, to, "to")
        if not _above(model, path, to):
            raise BadInput("to", to, f"is not above {path!r}", "name a later module")
    hidden = hidden.clone()
    rest = _chain(model, path, to)
    if rest is not None:
        with _untracked(model):
            for module in rest:
                hidden = module(hidden)
        return hidden
    if batch is None:
        raise BadInput(
            "batch", None, f"is needed to run {type(model).__name__} above {path!r}", "pass its inputs"
        )
    inputs = _inputs(model, batch)
    blocks = _blocks(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_untracked(model))
        # Blocks that return tuples may hand each other more than the state (T5's position bias): none is skipped.
        if path in blocks and not (_tupled(model, path, inputs) if tupled is None else tupled):
            later = blocks.index(path) + 1
            if later < len(blocks):
                stack.enter_context(taps.replay(model, blocks[later], hidden))
            else:  # the last block runs once more, and its output is replaced
                stack.enter_context(taps.replay(model, path, hidden))
                stack.enter_context(taps.replace(model, {path: lambda _: hidden}))
        else:
            stack.enter_context(taps.replace(model, {path: lambda _: hidden}))
        if to is None:
            return model(**inputs)
        store = stack.enter_context(taps.capture(model, to, grad=True, stop=True))
        store.run(**inputs)
        return store[to]


class Cut:
    """A model cut at a low and a high place.

    Args:
        model: Any module.
        low: Name of the module whose output is the low state.
        high: Of the high state; above `low`.
        argument: What the names are called in errors.

    Raises:
        BadInput: unknown names, or a high place that is not above the low one.
    """

    def __init__(self, model: nn.Module, low: str, high: str, *, argument: str = "layers"):
        modules = [module_at(model, name, argument) for name in (low, high)]
        if not _above(model, low, high):
            raise BadInput(
                argument, (low, high), "are not a lower and a higher place", "put the lower one first"
            )
        self.model, self.low, self.high, self.argument = model, low, high, argument
        self.low_module, self.high_module = modules
        self.tupled: bool | None = None

    def states(self, batch: Mapping[str, Any], *, grad: bool, whole: bool) -> tuple[Tensor, Tensor, Any]:
        """Low state, high state, and the model's output (None unless `whole`)."""
        names = (self.low, self.high)
        with contextlib.ExitStack() as stack:
            if not grad:
                stack.enter_context(torch.no_grad())
            store = stack.enter_context(taps.capture(self.model, names, grad=grad, stop=not whole))
            # What follows gets copies, lest it writes into the states that were captured.
            stack.enter_context(taps.replace(self.model, dict.fromkeys(names, torch.clone)))
            output = store.run(**_inputs(self.model, batch))
        self.tupled = self.low in store.tuples
        return store[self.low], store[self.high], output

    def between(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The high state that follows from a low one."""
        return resume_from(self.model, self.low, hidden, batch=batch, to=self.high, tupled=self.tupled)

    def above(self, hidden: Tensor, batch: Mapping[str, Any]) -> Any:
        """The model's output that follows from a high state."""
        return resume_from(self.model, self.high, hidden, batch=batch, tupled=self.tupled)

    def check(
        self, batch: Mapping[str, Any], *, low: Tensor | None = None, high: Tensor | None = None
    ) -> None:
        """Refuse a cut whose upper parts do not read the states they are given.

        Args:
            batch: The model's inputs.
            low: A low state, for what is between.
            high: A high state, for what is above.

        Raises:
            BadInput: no gradient of the result reaches the state.
        """
        with frozen(self.model), torch.enable_grad():
            for state, above in ((low, False), (high, True)):
                if state is None:
                    continue
                given = state.detach().requires_grad_()
                found = logits_of(self.above(given, batch)) if above else self.between(given, batch)
                if not found.requires_grad:
                    read = (
                        f"the output does not read {self.high!r}"
                        if above
                        else "the higher does not read the lower"
                    )
                    remedy = "name places that all that follows passes through"
                    raise BadInput(
                        self.argument, (self.low, self.high), f"do not cut the model: {read}", remedy
                    )


def _above(model: nn.Module, low: str, high: str) -> bool:
    """Whether a module comes after another one, and is no part of it."""
    names = [name for name, _ in model.named_modules()]
    return names.index(high) > names.index(low) and not high.startswith(f"{low}.")


@contextlib.contextmanager
def _untracked(model: nn.Module) -> Iterator[None]:
    """Batch norms in training keep using the batch's statistics, and do not add them to their running ones."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _chain(model: nn.Module, path: str, to: str | None) -> list[nn.Module] | None:
    """The modules from `path` (left out) up to `to`, if they all stand in one `nn.Sequential`."""
    place, _, name = path.rpartition(".")
    parent = model.get_submodule(place)
    if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
        return None  # what an own `forward` does between or after its modules is not known
    children = list(parent._modules)
    modules = [module for module in parent._modules.values() if module is not None]
    start = children.index(name) + 1
    if to is None:
        return modules[start:] if parent is model else None
    above, _, last = to.rpartition(".")
    return modules[start : children.index(last) + 1] if above == place else None


def _blocks(model: nn.Module) -> list[str]:
    try:
        return taps.decoder_layers(model)
    except BadInput:
        return []


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = model_inputs(model, batch)
    return {**inputs, "use_cache": False} if is_causal(model) else inputs


def _tupled(model: nn.Module, path: str, inputs: Mapping[str, Any]) -> bool:
    with torch.no_grad(), taps.capture(model, path, stop=True) as store:
        store.run(**inputs)
    return path in store.tuples
