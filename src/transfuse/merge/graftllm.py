"""GraftLLM: skills of fine-tuned models as compressed packs beside an untouched base, plugged in and taken out.

:arxiv: 2505.18502
:moves: several fine-tunes of one base -> one skill pack each, beside the base
:access: weights
:reversible: yes
:context: no

What full fine-tuning (on a source model's answers, then on its preferences) taught a model is stored as the difference
to its base, each tensor's by an operator of its own:

    theta_i - theta_base  ~  D_i                                              in float32
    embeddings, head:        the share of the entries that are largest in magnitude
    attention, MLP:          U diag(S) V^T of rank r; groups of singular columns, the largest first, in 8, 4, 2 bits
    norms, biases:           all of it, in 16 bits
    theta(packs)             =  theta_base + sum_i D_i                        removing a pack leaves the others

A group's V^T is rounded by GPTQ on the layer's inputs x, then its U on what the rounded V makes of them, x V diag(S)
(`_gptq`). Groups that are done are added to the layer before the next is rounded, and layers are taken in the order of
their calls, each on the inputs that the rounded ones below it give (`_pack_calibrate`). Without calibration inputs,
factors are rounded to nearest. The format of a pack's folder stands in `_pack`.

Where the paper and its code differ: the code leaves embeddings, head and norms uncompressed, taken from the fine-tune
and not counted; here every byte is counted, and they are in the pack. Its loop hands the output of a block, not its
input, to the second and third group; here every group sees the block's own input. Its factors are bfloat16 before they
are rounded, float32 here. The share of entries kept in embeddings and the router are not in the code, and not specified
in the paper: `ModulePolicy.share` is 0.1, the router is a small network on the base's mean last hidden state.

    >>> from transfuse.merge.graftllm import GraftedModel, ModulePolicy, SkillPack, SkillRouter
    >>> maths = SkillPack.from_models(tuned, base, name="maths", calibration=rows)   # doctest: +SKIP
    >>> maths.save_pretrained("maths-pack")                                          # doctest: +SKIP
    >>> model = GraftedModel(base, [maths, code])                                    # doctest: +SKIP
    >>> model.generate(**prompt, task="maths")                                       # doctest: +SKIP
    >>> model.router = SkillRouter(base, tokenizer).fit(prompts, labels)             # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from ..core.batches import pad_collator, text_rows
from ..core.errors import BadInput
from ..core.lineage import amend_lineage, input_hash
from ..core.runs import check_positive
from ._base import by_task
from ._gptq import gptq
from ._grafted import GraftedModel
from ._pack import SkillPack
from ._pack_pieces import ModulePolicy
from ._pack_router import BASE, SkillRouter

__all__ = ["GraftLLM", "GraftedModel", "ModulePolicy", "SkillPack", "SkillRouter", "gptq"]

_ROWS = 8  # texts of calibration at a time


class GraftLLM:
    """Make a pack of each of several fine-tunes, and a `GraftedModel` of them all.

    Args:
        base: The model that they were made from; a `GraftedModel` works on it in place.
        experts: The fine-tunes: models, state dicts, folders, names or LoRA adapters; or a mapping from a task's name
            to its fine-tune.
        tasks: Names of the tasks, in the order of `experts`; "0", "1", ... by default.
        policy: Operators per tensor; see `ModulePolicy`.
        calibration: Inputs for GPTQ; see `SkillPack.from_models`. From a run's `texts`, where there are any.
        samples: Calibration texts of a run, at most.
        length: Tokens of each.
        router: Kind of the router; see `SkillRouter`.
        features: What the router sees; see `SkillRouter`.
        lr: Of the router.
        epochs: Of the router.
        batch_size: Of the router.
        seed: Of the router.

    Attributes:
        packs: After `compress`: by name of the task.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    may_read: ClassVar[tuple[str, ...]] = ("texts", "prompts")

    def __init__(
        self,
        base: nn.Module,
        *,
        experts: Sequence[str | os.PathLike[str] | nn.Module | Mapping[str, Any]]
        | Mapping[str, str | os.PathLike[str] | nn.Module | Mapping[str, Any]] = (),
        tasks: Sequence[str] | None = None,
        policy: ModulePolicy | None = None,
        calibration: Any = None,
        samples: int = 128,
        length: int = 2048,
        router: Literal["network", "centroid"] = "network",
        features: str | None = None,
        lr: float = 5e-4,
        epochs: int = 50,
        batch_size: int = 1024,
        seed: int = 0,
    ):
        self.base, self.experts, self.tasks, self.policy = base, experts, tasks, policy
        self.calibration, self.samples, self.length = calibration, samples, length
        self.router, self.features = router, features
        self.lr, self.epochs, self.batch_size, self.seed = lr, epochs, batch_size, seed
        self.packs: dict[str, SkillPack] = {}
        self._router: SkillRouter | None = None

    def compress(self) -> dict[str, SkillPack]:
        """The packs, by name of the task.

        Raises:
            BadInput: no experts, or names that are not one for each.
            IncompatibleModels: an expert that does not fit the base; names the tensor.
        """
        if not self.packs:
            names = self._names()
            given = self.experts.values() if isinstance(self.experts, Mapping) else self.experts
            self.packs = {
                name: SkillPack.from_models(
                    tuned, self.base, name=name, policy=self.policy, calibration=self.calibration
                )
                for name, tuned in zip(names, given, strict=True)
            }
        return self.packs

    def fit_router(self, prompts_by_task: Mapping[str, Any], tokenizer: Any = None) -> GraftLLM:
        """Train a router on prompts of the tasks, and of "base" where some are answered best without a pack.

        Args:
            prompts_by_task: By task: texts, or token rows `{"input_ids": [...]}`.
            tokenizer: For texts.

        Returns:
            Itself.

        Raises:
            BadInput: a task that there is no expert for.
        """
        known = [*self._names(), BASE]
        if wrong := [task for task in prompts_by_task if task not in known]:
            raise BadInput("prompts_by_task", wrong[0], "is not a task", f"use {', '.join(known)}")
        made = SkillRouter(
            self.base, tokenizer, kind=self.router, features=self.features, lr=self.lr, epochs=self.epochs,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        prompts = [prompt for own in prompts_by_task.values() for prompt in own]
        labels = [task for task, own in prompts_by_task.items() for _ in own]
        self._router = made.fit(prompts, labels)
        return self

    def build(self) -> GraftedModel:
        """The base with the packs beside it, and with the router where one was fitted.

        Raises:
            BadInput, IncompatibleModels: as `compress`.
        """
        return GraftedModel(self.base, self.compress(), self._router)

    def transfer(
        self,
        tokenizer: Any,
        *,
        output: str | os.PathLike[str],
        scratch: Path | None,
        seed: int,
        **inputs: Any,
    ) -> Path:
        """What `transfuse run` does: compress, train the router where there are prompts, and save with the tokenizer.

        Args:
            tokenizer: The base's.
            output: Folder of the result: the packs and the router, not the base.
            scratch: Not used: there is nothing to go on from.
            seed: Of the run; the router's is the argument `seed`.
            **inputs: `texts`: a file of calibration texts, see `core.batches.text_rows`. `prompts`: a file of
                `{"task": ..., "prompt": ...}` records, where the task may be "base". Without `tasks`, the order in
                which the others first appear is that of `experts`.

        Raises:
            BadInput: an argument or a file that cannot be used.
        """
        check_positive(samples=self.samples, length=self.length)
        if "texts" in inputs and self.calibration is None:
            rows = text_rows(tokenizer, inputs["texts"], self.length)
            rows = rows[:: max(1, len(rows) // self.samples)][: self.samples]
            collate = pad_collator(tokenizer)
            self.calibration = [
                collate([{"input_ids": row["input_ids"]} for row in rows[i : i + _ROWS]])
                for i in range(0, len(rows), _ROWS)
            ]
        if "prompts" in inputs:
            prompts = by_task(inputs["prompts"])
            if self.tasks is None and not isinstance(self.experts, Mapping):
                self.tasks = [task for task in prompts if task != BASE]
            self.fit_router(prompts, tokenizer)
        target = self.build().save_pretrained(output, tokenizer)
        names = (
            "experts", "tasks", "policy", "samples", "length", "router", "features", "lr", "epochs", "batch_size",
            "seed",
        )  # fmt: skip
        amend_lineage(
            target,
            arguments={name: getattr(self, name) for name in names},
            inputs={name: str(path) for name, path in inputs.items()},
            input_sha256={name: input_hash(path) for name, path in inputs.items()},
        )
        return target

    def _names(self) -> list[str]:
        named = list(self.experts) if isinstance(self.experts, Mapping) else None
        given = named if self.tasks is None else list(self.tasks)
        found = [str(i) for i in range(len(self.experts))] if given is None else [str(name) for name in given]
        if not found:
            raise BadInput("experts", "[]", "are none", "give at least one fine-tune of the base")
        if len(found) != len(self.experts) or len(set(found)) != len(found):
            problem = f"are not names of {len(self.experts)} experts"
            raise BadInput("tasks", found, problem, "name each expert once")
        return found
