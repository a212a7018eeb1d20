"""Read and replace activations of any transformers model, by module pattern; always restored.

Every forward hook of the library is registered here. All functions are context managers: hooks and swapped
modules are put back on exit, on error, and when contexts are nested. What `torch.compile` made of a model does not
look for hooks that came after it, so compiled models run uncompiled inside.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import BadInput

__all__ = [
    "Stopped",
    "capture",
    "contiguous_head",
    "decoder_layers",
    "match",
    "replace",
    "replay",
    "skip",
    "watch",
]


class Stopped(Exception):
    """Ends a forward pass once everything asked for was seen; never leaves the `run` that it belongs to."""


def match(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that `pattern` (shell wildcards) selects, in definition order.

    A module in several places has several names, and is found once: under the first that fits.

    Raises:
        BadInput: nothing matches; the nearest name is suggested.
    """
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    names = [name for name, _ in places]
    first = {id(module): name for name, module in reversed(places) if fnmatch.fnmatchcase(name, pattern)}
    found = [name for name, module in places if first.get(id(module)) == name]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "list them with model.named_modules()"
        raise BadInput("pattern", pattern, f"matches no module of {type(model).__name__}", hint)
    return found


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the model's stack of blocks: of its language model's, if it is one of several parts.

    The first `ModuleList` of as many modules as the configuration says; without one, the longest whose modules are
    of one class.

    Raises:
        BadInput: the model has no such stack.
    """
    config = getattr(model, "config", None)
    language: Callable[[], Any] = getattr(model, "get_decoder", lambda: model)
    inner: Any = model if getattr(config, "is_encoder_decoder", False) else language()
    count = getattr(getattr(inner, "config", config), "num_hidden_layers", None)
    parts = set(inner.modules()) if isinstance(inner, nn.Module) else set(model.modules())
    best, size = "", 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or module not in parts:
            continue
        if len(module) == count:
            best, size = name, len(module)
            break
        alike = len({type(m.block if isinstance(m, _Skip) else m) for m in module}) == 1
        if alike and len(module) > size:
            best, size = name, len(module)
    if not size:
        raise BadInput("model", type(model).__name__, "has no stack of blocks", "give a transformer model")
    return [f"{best}.{i}" for i in range(size)]


def _first(value: Any) -> torch.Tensor:
    """The tensor of an output: itself, or the first of a tuple or of one of transformers' records."""
    if isinstance(value, Mapping):
        return next(iter(value.values()))
    return value if isinstance(value, torch.Tensor) else value[0]


def _with_first(value: Any, new: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return new
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed[next(iter(value))] = new
        return changed
    return (new, *value[1:])


_EAGER: list[contextlib.ExitStack] = []  # one for each tap in place; torch's stance is put back with the last


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled graphs are not asked again whether there are hooks: with none seen, later ones would be passed by."""
    compiler = sys.modules.get(
        "torch._dynamo.eval_frame"
    )  # without it nothing was compiled; its import takes a second
    if not getattr(compiler, "cached_backends", compiler):
        yield
        return
    here = contextlib.ExitStack()
    if not _EAGER:
        here.enter_context(torch.compiler.set_stance("force_eager"))
    _EAGER.append(here)
    try:
        yield
    finally:
        _EAGER.remove(here)
        left = here.pop_all()
        if _EAGER:  # taps end in any order
            _EAGER[-1].push(left)
        elif not sys.is_finalizing():
            left.close()


@contextlib.contextmanager
def capture(
    model: nn.Module,
    patterns: str | Sequence[str],
    *,
    inputs: bool = False,
    grad: bool = False,
    stop: bool = False,
) -> Iterator[_Store]:
    """Record the output (or first input) of the matching modules at their latest call.

    Args:
        model: Any module.
        patterns: Module names or wildcards (`model.layers.*.mlp`).
        inputs: Record the first positional input instead of the output.
        grad: Keep the graph; tensors are detached otherwise. Gradient checkpointing of the reentrant kind makes none
            in its forward pass: use the other (`use_reentrant=False`, transformers' default).
        stop: End a pass made by `store.run(**batch)` as soon as all matching modules were called once: layers
            above cost nothing, and the model's own output is not available. Plain calls run to their end.

    Yields:
        A dict, module name -> tensor as the module saw it (of a tuple, the first element). It also has
        `run(**batch)`, and `tuples`: the names of the modules whose output was a tuple.
    """
    names = [n for p in ([patterns] if isinstance(patterns, str) else patterns) for n in match(model, p)]
    store = _Store(model, names)

    def see(name: str, value: Any) -> None:
        tensor = _first(value)
        store[name] = tensor if grad else tensor.detach()
        if isinstance(value, tuple):
            store.tuples.add(name)
        store.waiting.discard(name)
        if stop and store.running and not store.waiting:
            raise Stopped(store)

    def hook(name: str) -> Callable[..., None]:
        if inputs:
            return lambda module, args, kwargs: see(name, args[0] if args else next(iter(kwargs.values())))
        return lambda module, args, output: see(name, output)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_uncompiled())
        for name in names:
            module = model.get_submodule(name)
            handle = (
                module.register_forward_pre_hook(hook(name), with_kwargs=True)
                if inputs
                else module.register_forward_hook(hook(name))
            )
            stack.callback(handle.remove)
        yield store


class _Store(dict[str, torch.Tensor]):
    """Captured tensors; `run` calls the model and swallows the early end."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, list(names)
        self.waiting = set(names)
        self.running = False
        self.tuples: set[str] = set()

    def run(self, **batch: Any) -> Any:
        """Call the model on `batch`; returns its output, or None when the pass ended early."""
        self.waiting.update(self.names)
        self.running = True
        try:
            return self.model(**batch)
        except Stopped as end:
            if end.args[0] is not self:
                raise
            return None
        finally:
            self.running = False


@contextlib.contextmanager
def replace(
    model: nn.Module,
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    *,
    inputs: bool = False,
) -> Iterator[None]:
    """Pass the output (or first input) of matching modules through a function, in every forward pass inside.

    Gradient checkpointing makes forward passes again during the backward pass, which then belongs inside too.

    Args:
        model: Any module.
        changes: Pattern -> function of the tensor `[batch, tokens, width]`, returning one of the same shape.
        inputs: Change the first positional input instead of the output.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_uncompiled())
        for pattern, function in changes.items():
            for name in match(model, pattern):
                module = model.get_submodule(name)
                if inputs:

                    def pre(module: nn.Module, args: Any, kwargs: Any, f: Any = function) -> Any:
                        if args:
                            return (f(args[0]), *args[1:]), kwargs
                        key = next(iter(kwargs))
                        return args, {**kwargs, key: f(kwargs[key])}

                    handle = module.register_forward_pre_hook(pre, with_kwargs=True)
                else:

                    def post(module: nn.Module, args: Any, output: Any, f: Any = function) -> Any:
                        return _with_first(output, f(_first(output)))

                    handle = module.register_forward_hook(post)
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def watch(module: nn.Module, function: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `function` with the arguments of every forward pass of `module`, by name, before the pass runs."""
    signature = inspect.signature(module.forward)

    def pre(module: nn.Module, args: Any, kwargs: Any) -> None:
        function(dict(signature.bind_partial(*args, **kwargs).arguments))

    handle = module.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        with _uncompiled():
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Hand the output embedding contiguous hidden states; its result does not change.

    `logits_to_keep` cuts the last columns out of `[B, T, d]`, and torch multiplies such a strided view by frozen
    weights row by row: it copies the whole embedding `[d, V]` for each of the B rows first.
    """
    find: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if head is None:
        yield
        return

    def pre(module: nn.Module, args: Any) -> Any:
        return (args[0].contiguous(), *args[1:]) if args else None

    handle = head.register_forward_pre_hook(pre)
    try:
        yield
    finally:
        handle.remove()


class _Skip(nn.Module):
    """Stands in for a skipped block: hands its input on; other attributes are the block's."""

    def __init__(self, block: nn.Module, tupled: bool):
        super().__init__()
        block = block.block if isinstance(block, _Skip) else block
        self.__dict__["block"] = block  # not registered: parameters keep one owner
        self.tupled = tupled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.tupled else hidden_states


@contextlib.contextmanager
def replay(model: nn.Module, layer: str, hidden: torch.Tensor, *, tupled: bool = False) -> Iterator[None]:
    """Run `model` from block `layer` upwards on cached `hidden` states: the blocks below are skipped.

    Call the model with the `input_ids` and `attention_mask` that produced `hidden`, so that masks and
    positions are built as usual. The skipped blocks leave no entry in a KV cache: pass `use_cache=False`, or
    a cache of your own whose first entries have the right length.

    Args:
        model: A transformer with a stack of blocks.
        layer: Name of the first block to run (see `decoder_layers`).
        hidden: Its input, `[batch, tokens, width]` (from `capture(model, layer, inputs=True)`).
        tupled: The architecture's blocks return tuples (see `tuples` of `capture`).

    Raises:
        BadInput: `layer` is not one of the model's blocks.
    """
    layers = decoder_layers(model)
    if layer not in layers:
        raise BadInput("layer", layer, "is not a block of the model", f"use {layers[0]!r} ... {layers[-1]!r}")
    below = range(layers.index(layer))
    with skip(model, below, tupled=tupled), replace(model, {layer: lambda _: hidden}, inputs=True):
        yield


@contextlib.contextmanager
def skip(model: nn.Module, layers: Iterable[int], *, tupled: bool = False) -> Iterator[None]:
    """Run `model` without some of its blocks: each hands its input on. They leave no entry in a KV cache.

    Args:
        model: A transformer with a stack of blocks.
        layers: Numbers of the blocks left out.
        tupled: The architecture's blocks return tuples (see `tuples` of `capture`).

    Raises:
        BadInput: a number that no block has.
    """
    names, chosen = decoder_layers(model), list(layers)
    if wrong := [i for i in chosen if not 0 <= i < len(names)]:
        raise BadInput("layers", wrong, "are not blocks of the model", f"use 0 to {len(names) - 1}")
    blocks = model.get_submodule(names[0].rpartition(".")[0])
    assert isinstance(blocks, nn.ModuleList)
    kept = {i: blocks[i] for i in chosen}
    try:
        for i, block in kept.items():
            blocks[i] = _Skip(block, tupled)
        yield
    finally:
        for i, block in kept.items():
            blocks[i] = block
