"""A base with skill packs beside it: every call, or every example of a call, is answered with the packs it asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, CorruptFile, NotApplicable
from ..core.files import atomic_dir, check_writable, read_tensors, sha256_file, write_tensors
from ..core.lineage import write_lineage
from ..core.models import load
from ._around import Around, check_prompt, examples_of, prompt_of
from ._pack import SkillPack, plug, plugged, read_header, unplug, write_header
from ._pack_router import BASE, SkillRouter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GraftedModel"]

HEADER = "graft.json"
ROUTER = "router.safetensors"
_FORMAT = 1

Task = str | Sequence[str]


class GraftedModel(Around):
    """A base and its packs, called like the base.

    A call names its `task`: a skill, several joined by a plus ("math+code": the sum of their changes), or "base"; one
    for all examples, or a list with one for each. Without, the router decides for each example; without a router, all
    packs are added. Examples of one batch that take different packs are run one group after the other; of their
    outputs those with a row per example are put together, the others (caches) are left out.

    Args:
        base: The model. Its weights are set as calls ask for, and given back by `release`.
        packs: By the names that tasks are called by; or a list, under their own names.
        router: Chooses a task from a prompt.
        unpack: Hold the packs' changes unpacked, 4 bytes per changed number: another task then costs an addition.

    Raises:
        IncompatibleModels: a pack of another base; names the tensor where shapes differ.
        BadInput: names that are taken, or have a plus in them; a router that knows other tasks.
    """

    def __init__(
        self,
        base: nn.Module,
        packs: Mapping[str, SkillPack] | Sequence[SkillPack] = (),
        router: SkillRouter | None = None,
        *,
        unpack: bool = True,
    ):
        super().__init__()
        given = list(packs.items()) if isinstance(packs, Mapping) else [(pack.name, pack) for pack in packs]
        if plugged(base):
            names = ", ".join(pack.name for pack in plugged(base))
            raise BadInput("base", type(base).__name__, f"has packs already: {names}", "remove them first")
        self.model, self.unpack = base.eval(), unpack
        self.packs: dict[str, SkillPack] = {}
        self._router: SkillRouter | None = None
        try:
            for name, pack in given:
                self.add(name, pack)
            self.router = router
        finally:
            unplug(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of all packs."""
        return sum(pack.nbytes for pack in self.packs.values())

    @property
    def router(self) -> SkillRouter | None:
        """Chooses a task from a prompt."""
        return self._router

    @router.setter
    def router(self, router: SkillRouter | None) -> None:
        if router is not None:
            for label in router.labels:
                self._chosen(label)
        self._router = router

    def add(self, name: str, pack: SkillPack) -> None:
        """Put a pack beside the base; answers of the other tasks stay as they are.

        Raises:
            IncompatibleModels: it is of another base.
            BadInput: the name is taken, or not a name.
        """
        if not name or name == BASE or "+" in name or name in self.packs:
            raise BadInput("name", name, "is taken, or no name of a skill", "give another word")
        plug(self.model, [pack])
        self.packs[name] = pack.unpack() if self.unpack else pack

    def drop(self, name: str) -> SkillPack:
        """Take a pack away: the skill is gone.

        Raises:
            BadInput: there is no such pack.
        """
        if name not in self.packs:
            known = ", ".join(self.packs) or "none"
            raise BadInput("name", name, "is not a skill of this model", f"its skills: {known}")
        if self.router is not None and name in self.router.labels:
            raise BadInput("name", name, "is a choice of the router", "set router first")
        plug(self.model, [])
        return self.packs.pop(name).unpack(False)

    def release(self) -> nn.Module:
        """The base with its own weights, bit for bit."""
        unplug(self.model)
        return self.model

    def use(self, task: str) -> nn.Module:
        """Plug in a task's packs, and return the base that now carries them, until the next call."""
        plug(self.model, self._chosen(task))
        return self.model

    def _chosen(self, task: str) -> list[SkillPack]:
        if task == BASE:
            return []
        names = list(dict.fromkeys(task.split("+")))
        if wrong := [name for name in names if name not in self.packs]:
            known = ", ".join([*self.packs, BASE])
            raise BadInput("task", wrong[0], "is not a skill of this model", f"use some of {known}")
        return [self.packs[name] for name in names]

    def tasks(self, *args: Any, task: Task | None = None, **kwargs: Any) -> list[str]:
        """The task of every example: as a call names it, or as the router chooses.

        Args:
            *args: The model's own arguments.
            task: See the class.
            **kwargs: The model's own arguments.

        Raises:
            BadInput: no such task, or not one for each example; where the router decides, a cache with tokens in it.
        """
        rows = examples_of(args, kwargs)
        if task is None and self.router is not None:
            check_prompt(args, kwargs, "task")
            features = self.router.encode(self.use(BASE), args, kwargs)
            return self.router.choose(features)
        if task is None:
            task = "+".join(self.packs) or BASE
        found = [task] * rows if isinstance(task, str) else list(task)
        if len(found) != rows:
            raise BadInput("task", len(found), f"tasks are not for {rows} examples", "give one for each")
        for each in dict.fromkeys(found):
            self._chosen(each)
        return found

    def forward(self, *args: Any, task: Task | None = None, **kwargs: Any) -> Any:
        """The model's output.

        Args:
            *args: The model's own arguments.
            task: See the class.
            **kwargs: The model's own arguments.
        """
        parts = [
            (rows, self.use(name)(*own, **named))
            for name, rows, own, named in _split(self.tasks(*args, task=task, **kwargs), args, kwargs)
        ]
        return _joined(parts)

    def generate(self, *args: Any, task: Task | None = None, **kwargs: Any) -> Any:
        """The model's `generate`, with the task chosen on the prompt and kept for all new tokens.

        Rows of examples with different tasks are filled up on the right to one length.
        """
        inputs = prompt_of(kwargs)
        found: list[tuple[Tensor, Any]] = []
        for name, rows, own, given in _split(self.tasks(*args, task=task, **inputs), args, kwargs):
            model: Any = self.use(name)
            found.append((rows, model.generate(*own, **given)))
        if len(found) == 1:
            return found[0][1]
        if not all(isinstance(out, Tensor) for _, out in found):
            problem = "comes from examples of several tasks"
            raise NotApplicable("return_dict_in_generate", True, problem, "leave it out, or name one task")
        settings: Any = self.model.generation_config
        pad = next((v for v in (kwargs.get("pad_token_id"), settings.pad_token_id) if v is not None), 0)
        width = max(out.shape[1] for _, out in found)
        each = len(found[0][1]) // len(found[0][0])  # sequences per example
        padded = [
            (rows, nn.functional.pad(out, (0, width - out.shape[1]), value=pad).view(len(rows), each, width))
            for rows, out in found
        ]
        return _joined(padded).flatten(0, 1)

    # --- to disk and back ----------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """Write a folder: every pack in one of its own under `packs`, and the router; the base is not in it.

        Args:
            folder: Replaced at once.
            tokenizer: Put beside them.
        """
        target = check_writable(folder, "folder")
        with atomic_dir(target) as work:
            for number, pack in enumerate(self.packs.values()):
                (work / "packs" / str(number)).mkdir(parents=True)
                pack.write(work / "packs" / str(number))
            facts = None
            if self.router is not None:
                tensors, facts = self.router.state()
                write_tensors(work / ROUTER, tensors)
                facts = {**facts, "sha256": sha256_file(work / ROUTER)}
            write_header(work / HEADER, {"format": _FORMAT, "names": list(self.packs), "router": facts})
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            first = next(iter(self.packs.values()), None)
            write_lineage(
                work,
                method="graftllm",
                arguments=None if first is None else first.facts["policy"],
                measurements={f"bytes: {name}": pack.nbytes for name, pack in self.packs.items()},
                summary=f"Skill packs for one base: {', '.join(self.packs)}.",
                usage="from transfuse.merge.graftllm import GraftedModel\n\n"
                f'model = GraftedModel.from_pretrained("{target}", base)',
            )
        return target

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], base: nn.Module | str | os.PathLike[str], *, unpack: bool = True
    ) -> GraftedModel:
        """Load what `save_pretrained` wrote.

        Args:
            folder: The folder.
            base: The packs' base, or its folder or name.
            unpack: See the class.

        Raises:
            BadInput: no such folder.
            CorruptFile: a byte of a file is not as it was written.
            IncompatibleModels: another base.
        """
        path = Path(folder)
        body = read_header(path / HEADER, "holds no packs of a grafted model")
        if body.get("format") != _FORMAT:
            raise CorruptFile("folder", str(path), f"is of format {body.get('format')}", "make it again")
        packs = {
            name: SkillPack.load(path / "packs" / str(number)) for number, name in enumerate(body["names"])
        }
        model = base if isinstance(base, nn.Module) else load(base).model
        router = None
        if body["router"] is not None:
            file = path / ROUTER
            if not file.is_file() or sha256_file(file) != body["router"]["sha256"]:
                raise CorruptFile("folder", str(file), "is not as it was written", "copy it again")
            router = SkillRouter.restored(read_tensors(file)[0], body["router"], model)
        return cls(model, packs, router, unpack=unpack)


def _split(
    tasks: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Tensor, tuple[Any, ...], dict[str, Any]]]:
    """Per task: its name, the numbers of its examples, and the arguments cut down to them."""
    found = []
    names = list(dict.fromkeys(tasks))
    if len(names) > 1 and any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        problem = "is one for examples of several tasks"
        raise NotApplicable("past_key_values", "cache", problem, "call it with one task at a time")
    for name in names:
        rows = torch.tensor([i for i, task in enumerate(tasks) if task == name])

        def cut(value: Any, rows: Tensor = rows) -> Any:
            own = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(tasks)
            return value[rows.to(value.device)] if own and len(names) > 1 else value

        found.append((name, rows, tuple(cut(v) for v in args), {n: cut(v) for n, v in kwargs.items()}))
    return found


def _joined(parts: Sequence[tuple[Tensor, Any]]) -> Any:
    """Outputs of groups of examples as one, in the order of the examples."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    order = torch.cat([rows for rows, _ in parts]).argsort()

    def whole(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[order.to(values[0].device)]

    if isinstance(first, Tensor):
        return whole([out for _, out in parts])
    if not isinstance(first, Mapping):
        problem = "cannot be put together from examples of several tasks"
        raise NotApplicable("output", type(first).__name__, problem, "call it with one task at a time")
    kept = {}
    for key in first:
        values = [out[key] for _, out in parts]
        if all(
            isinstance(v, Tensor) and v.dim() and len(v) == len(rows)
            for v, (rows, _) in zip(values, parts, strict=True)
        ):
            kept[key] = whole(values)
    return type(first)(**kept)
