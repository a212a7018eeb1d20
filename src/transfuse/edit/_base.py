"""The editors' contract: an `Editor` turns facts into `Edit`s; a handle applies them, rolls back, saves.

Three kinds of edit cover every group of editors: `WeightEdit` changes parameters, `RoutedEdit` decides at
inference (codebooks, side memories, adapters), `PromptEdit` rewrites the prompt. An editor that must be trained
first (a hypernetwork) takes its trained state as a constructor argument; one that routes at inference returns a
`RoutedEdit`.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput, IncompatibleModels

__all__ = [
    "Edit",
    "EditHandle",
    "Editor",
    "PromptEdit",
    "RoutedEdit",
    "WeightEdit",
    "check_facts",
    "editable",
]


class Edit(ABC):
    """One reversible change of one model, not yet applied when an editor returns it.

    Subclasses register themselves under `kind`, by which a saved edit is loaded again.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Edit]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Edit.kinds[cls.kind] = cls

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Apply to `model`, in place."""

    @abstractmethod
    def detach(self, model: PreTrainedModel) -> None:
        """Undo `attach`, bitwise. Edits are detached in the reverse order of their attachment."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be stored to apply the edit again: tensors by name."""

    def meta(self) -> dict[str, Any]:
        """JSON-able rest of the stored edit."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Edit:
        """Rebuild an edit from `tensors()` and `meta()`."""

    def rewrite(self, prompt: str) -> str:
        """The prompt the edited model should be asked with; unchanged for all but `PromptEdit`."""
        return prompt


# Parameter -> the edits in place on it, oldest first. Those nobody holds any more cannot be undone, and do not count.
_IN_PLACE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class WeightEdit(Edit):
    """New values for some parameters, as low-rank updates or as whole replacements.

    Args:
        low_rank: Parameter name -> `(left [d_out, r], right [r, d_in])` in float32, added as `left @ right`; as the
            transposed product where only that has the weight's shape (`Conv1D`).
        replaced: Parameter name -> its new value.
    """

    kind = "weights"

    def __init__(
        self,
        *,
        low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        replaced: Mapping[str, torch.Tensor] | None = None,
    ):
        self.low_rank = dict(low_rank or {})
        self.replaced = dict(replaced or {})
        self._kept: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = []

    def attach(self, model: PreTrainedModel) -> None:
        if self._kept:
            raise BadInput("edit", self._kept[0][0], "is in place already", "undo it first, or make another")
        parameters = dict(model.named_parameters())
        for name in [*self.low_rank, *self.replaced]:
            if name not in parameters:
                raise IncompatibleModels(
                    "edit", name, "is not a parameter of this model", "use the model it was made for"
                )
        updates: dict[str, torch.Tensor] = {}
        for name, (left, right) in self.low_rank.items():
            weight = parameters[name]
            change = left.to(weight.device, torch.float32) @ right.to(weight.device, torch.float32)
            if change.shape != weight.shape and change.T.shape == weight.shape:
                change = change.T
            updates[name] = (self._fits(name, change, weight) + weight.detach()).to(weight.dtype)
        for name, value in self.replaced.items():
            updates[name] = self._fits(name, value, parameters[name]).to(
                parameters[name].device, parameters[name].dtype
            )
        try:
            with torch.no_grad():
                for name, new in updates.items():
                    parameter = parameters[name]
                    # The parameter itself is kept: an adapter put around its module later gives it another name.
                    self._kept.append((name, parameter, parameter.detach().to("cpu", copy=True)))
                    _IN_PLACE.setdefault(parameter, []).append(weakref.ref(self))
                    parameter.copy_(new)
        except BaseException:
            try:
                self.detach(model)
            finally:
                self._kept = []
            raise

    @staticmethod
    def _fits(name: str, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if value.shape != weight.shape:
            raise IncompatibleModels(
                name, tuple(value.shape), f"does not fit the weight's shape {tuple(weight.shape)}",
                "use the model the edit was made for",
            )  # fmt: skip
        return value

    def detach(self, model: PreTrainedModel) -> None:
        here = [[edit for ref in _IN_PLACE.get(p, []) if (edit := ref())] for _, p, _ in self._kept]
        for (name, _, _), edits in zip(self._kept, here, strict=True):
            if self in edits and edits[-1] is not self:
                raise BadInput("edit", name, "has later edits on top of it", "roll those back first")
        with torch.no_grad():
            for (_, parameter, value), edits in zip(self._kept, here, strict=True):
                parameter.copy_(value)
                _IN_PLACE[parameter] = [weakref.ref(edit) for edit in edits if edit is not self]
        self._kept = []

    def tensors(self) -> dict[str, torch.Tensor]:
        stored = {f"{name}::new": value for name, value in self.replaced.items()}
        for name, (left, right) in self.low_rank.items():
            stored[f"{name}::left"], stored[f"{name}::right"] = left, right
        return stored

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> WeightEdit:
        low_rank, replaced = {}, {}
        for key, value in tensors.items():
            name, _, part = key.rpartition("::")
            if part == "new":
                replaced[name] = value
            elif part == "left":
                low_rank[name] = (value, tensors[f"{name}::right"])
        return cls(low_rank=low_rank, replaced=replaced)


class RoutedEdit(Edit):
    """Base of edits that live beside the weights and act during the forward pass (codebooks, adapters)."""


class PromptEdit(Edit):
    """Base of edits that change no weights: `rewrite` puts the knowledge into the prompt."""

    def attach(self, model: PreTrainedModel) -> None:
        """Nothing to apply."""

    def detach(self, model: PreTrainedModel) -> None:
        """Nothing to undo."""


class Editor(ABC):
    """Turns facts into an `Edit`. Subclasses take keyword-only, typed hyperparameters with the paper's defaults.

    Class attributes:
        batched: `fit` takes many facts at once; otherwise the handle calls it fact by fact.
    """

    batched: ClassVar[bool] = True

    @abstractmethod
    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> Edit:
        """Compute the edit. The model's weights, mode and hooks are as before when this returns or raises."""

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Raise `BadInput` for anything that cannot work, before any work is done."""
        check_facts(facts)


def check_facts(facts: Sequence[Fact]) -> None:
    """Refuse empty lists, empty targets, subjects not in their prompt and uneven answers, naming the record."""
    if not facts:
        raise BadInput("facts", [], "is empty", "give at least one fact")
    for i, fact in enumerate(facts):
        where = f"facts[{i}] ({fact.label})"
        if not fact.target.strip():
            raise BadInput(f"{where}: target", fact.target, "is empty", "give the wanted answer")
        if not fact.subject.strip() or fact.subject not in fact.prompt:
            raise BadInput(
                f"{where}: subject", fact.subject, f"is not in the prompt {fact.prompt!r}",
                "write the subject exactly as it stands in the prompt",
            )  # fmt: skip
        if fact.neighbour_answers and len(fact.neighbour_answers) != len(fact.neighbours):
            raise BadInput(
                f"{where}: neighbour_answers", fact.neighbour_answers,
                f"are {len(fact.neighbour_answers)} for {len(fact.neighbours)} neighbours",
                "give one for each, None where it is not known",
            )  # fmt: skip


def editable(model: PreTrainedModel, name: str) -> torch.nn.Parameter:
    """The parameter `name`, if an editor may change it.

    Raises:
        BadInput: no such parameter; it is quantized or on the meta device; or it is tied to another one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        holder = name.rpartition(".")[0]
        if hasattr(dict(model.named_modules()).get(holder), "base_layer"):
            raise BadInput(
                "layer", holder, "is wrapped by an adapter",
                'merge the adapter, or give module="....base_layer" to edit the weights under it',
            )  # fmt: skip
        raise BadInput(
            "layer", name, f"is not a parameter of {type(model).__name__}", "see model.named_parameters()"
        )
    weight = parameters[name]
    if getattr(model, "is_quantized", False) or not weight.is_floating_point():
        raise BadInput(
            "model", name, f"is quantized ({weight.dtype})", "load the model in bf16 or float32 to edit it"
        )
    if weight.is_meta:
        raise BadInput("model", name, "is on the meta device", "load its weights first")
    twins = [other for other, value in parameters.items() if value is weight and other != name]
    if twins:
        raise BadInput(
            "layer", name, f"shares its values with {twins[0]}", "choose a weight that is not tied"
        )
    return weight


class EditHandle:
    """Applied edits of one model: answer with `model`, then keep, `save` or `rollback`.

    Use as a context manager to roll back at the end of the block, also on error.

    Attributes:
        model: The edited model, the same object that was given.
        tokenizer: Its tokenizer.
        facts: What was edited in.
        method: Slug of the editor.
        active: Whether the edits are applied now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        method: str,
        arguments: Mapping[str, Any] | None = None,
        facts: Sequence[Fact] = (),
        base: str | None = None,
    ):
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.arguments, self.facts, self._base = dict(arguments or {}), list(facts), base
        self._edits: list[Edit] = []
        self.active = True

    def add(self, edit: Edit) -> None:
        """Apply one more edit on top of the others."""
        edit.attach(self.model)
        self._edits.append(edit)
        self.active = True

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits, in order of application."""
        return tuple(self._edits)

    def rewrite(self, prompt: str) -> str:
        """The prompt to ask the edited model with (unchanged, unless the editor works through the prompt)."""
        for edit in self._edits:
            prompt = edit.rewrite(prompt)
        return prompt

    def rollback(self) -> None:
        """Undo all edits: weights are bitwise what they were. Calling it again does nothing.

        Raises:
            BadInput: later edits, of another handle, stand on these; nothing is lost, roll those back first.
        """
        while self.active and self._edits:
            self._edits[-1].detach(self.model)
            self._edits.pop()
        self.active = False

    def __enter__(self) -> EditHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.rollback()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that `save` writes."""
        return sum(t.numel() * t.element_size() for edit in self._edits for t in edit.tensors().values())

    def save(self, folder: str | os.PathLike[str], *, measurements: Mapping[str, Any] | None = None) -> Path:
        """Write the edits (a delta, not a model) as safetensors with their lineage; replaces `folder` atomically.

        Raises:
            BadInput: nothing is applied, or the folder cannot be written.
        """
        from ..core.files import atomic_dir, check_writable, write_tensors
        from ..core.lineage import write_lineage

        if not self._edits:
            raise BadInput("handle", self.method, "was rolled back", "save before rolling back")
        target = check_writable(folder, "folder")
        with atomic_dir(target) as made:
            for i, edit in enumerate(self._edits):
                header = {
                    "kind": edit.kind, "meta": edit.meta(), "base": self._base, "method": self.method,
                    "of": len(self._edits),
                }  # fmt: skip
                write_tensors(made / f"edit-{i:05d}.safetensors", edit.tensors(), header)
            write_lineage(
                made,
                method=self.method,
                arguments=self.arguments,
                inputs={"model": self._base, "facts": [asdict(fact) for fact in self.facts]},
                measurements=dict(measurements or {}),
            )
        return target
