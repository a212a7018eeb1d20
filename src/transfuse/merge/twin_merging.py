"""Twin-Merging: a shared model, small per-task changes, and a router that mixes them for each input.

:arxiv: 2406.15479
:moves: several fine-tunes of one base -> one shared model, low-rank changes and a router
:access: weights
:reversible: no
:context: no

Static merging loses what the fine-tunes disagree about. Here what they share is merged once, what each has beyond
that is kept as a low-rank change, and a small network decides for every input how much of each is added:

    theta_s = theta_0 + lambda sum_t (theta_t - theta_0)                    the shared model (any static merge)
    v_t = SVD_r(theta_t - theta_s)                                          per matrix, r = rho min(m, n)
    w = softmax(R(e(x)) / temperature)                                      e: mean last hidden state of theta_s
    theta*(x) = theta_s + sum_t w_t v_t

The sum over tasks is never made for an example: each layer adds sum_t w_t (x V_t) S_t U_t^T, T r (m + n) products
per token. Vectors (norms) are kept whole. Tensors in whose name a pattern of `exclude` is found are not merged:
the base's stay, and each expert's own are kept as its head, used when a call names the `task`.

Where the paper and its code differ the paper is followed: experts that are LoRA adapters are merged and decomposed as
products B A, not factor by factor (their SVD is taken through the factors, without the matrices). The rank is
rounded, and at least 1; the code's truncated 0.1 * 20 = 1 comes with `rank_rounding="floor"`. The code chooses the
router's epoch on its test set, this one on a tenth of the inputs given. For generation the router sees the prompt.

    >>> from transfuse.merge.twin_merging import TwinMerging
    >>> twin = TwinMerging(base, {"sums": sums, "capitals": capitals}, rank=8)   # doctest: +SKIP
    >>> model = twin.fit_router({"sums": rows, "capitals": others}).build()      # doctest: +SKIP
    >>> model.generate(**tokenizer(["12 + 30 ="], return_tensors="pt"))          # doctest: +SKIP
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import BadInput
from ..core.lineage import amend_lineage, input_hash, jsonable
from ..core.models import load
from ..core.runs import check_number, check_positive
from ._base import by_task
from ._engine import merged_tensors
from ._exclusives import Exclusives, Rounding, Strategy, product_svd, rank_of, truncated_svd
from ._methods import StaticMerge
from ._opening import open_source
from ._plan import Plan, plan_merge
from ._router import Router, check_training, input_batches, train_router
from ._twin_model import TwinMergedModel

__all__ = [
    "TwinMergedModel",
    "TwinMerger",
    "TwinMerging",
    "normalised_score",
    "product_svd",
    "rank_of",
    "truncated_svd",
]


def normalised_score(scores: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """100 times the mean over tasks of a model's score divided by the task's own expert's.

    Raises:
        BadInput: other tasks, or an expert that scores 0.
    """
    if scores.keys() != experts.keys() or not scores:
        raise BadInput(
            "scores", sorted(scores), f"are not of the tasks {sorted(experts)}", "score every task once"
        )
    for task, score in experts.items():
        if score == 0:
            raise BadInput(f"experts[{task!r}]", score, "cannot be divided by", "leave the task out")
    return 100 * sum(scores[task] / experts[task] for task in scores) / len(scores)


class TwinMerging:
    """Merge fine-tunes of one base into a `TwinMergedModel`.

    Args:
        base: theta_0: a model, or its folder or name.
        experts: theta_1 ... theta_T: models, state dicts, folders, names or LoRA adapters; or a mapping from a task's
            name to its expert.
        tasks: Names of the tasks, in the order of `experts`; "0", "1", ... by default.
        shared: Static merge that makes the shared model: a name of `transfuse.merge.METHODS`, or such an object.
        scaling: lambda, where `shared` has one and is given by name.
        rank: Singular directions kept per matrix: a count, or a share of them.
        rank_rounding: How a share becomes a count; see `rank_of`.
        strategy: "svd"; or "magnitude" and "random", which keep that share of a matrix's elements, the latter
            scaled up. These are held as whole matrices.
        exclude: Regular expressions of tensors that are not merged.
        features: Module whose output the router sees; None for a transformers model's last hidden state.
        temperature: Divides the router's logits.
        top_k: Tasks mixed per input; None for all.
        lr: Of the router.
        epochs: Of the router.
        batch_size: Of the router; the paper's generative runs take 256.
        validation: Share of the router's inputs that choose its best epoch.
        max_inputs: Most inputs per task that the router learns from.
        seed: Of the router, and of the "random" strategy.

    Attributes:
        report: After `build`: per task the size of its change relative to the base (`change`), of what it has beyond
            the shared model relative to that (`beyond`), and the share of the latter's squared norm kept (`kept`).
        router_accuracy: After `fit_router`: on the held-out inputs.
    """

    reads: ClassVar[tuple[str, ...]] = ("prompts",)

    def __init__(
        self,
        base: nn.Module,
        experts: Sequence[str | os.PathLike[str] | nn.Module | Mapping[str, Any]],
        *,
        tasks: Sequence[str] | None = None,
        shared: str | StaticMerge = "task_arithmetic",
        scaling: float = 0.3,
        rank: float | int = 0.1,
        rank_rounding: Rounding = "round",
        strategy: Strategy = "svd",
        exclude: Sequence[str] = ("classifier", "bias"),
        features: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        lr: float = 5e-4,
        epochs: int = 50,
        batch_size: int = 1024,
        validation: float = 0.1,
        max_inputs: int = 5500,
        seed: int = 0,
    ):
        self.base, self.experts, self.tasks, self.shared, self.scaling = base, experts, tasks, shared, scaling
        self.rank, self.rank_rounding, self.strategy, self.exclude = rank, rank_rounding, strategy, exclude
        self.features, self.temperature, self.top_k = features, temperature, top_k
        self.lr, self.epochs, self.batch_size, self.validation = lr, epochs, batch_size, validation
        self.max_inputs, self.seed = max_inputs, seed
        self.report: dict[str, dict[str, float]] = {}
        self.router_accuracy: float | None = None
        self._router: Router | None = None
        self._plan: Plan | None = None
        self._state: dict[str, Tensor] = {}

    def fit_router(self, inputs_by_task: Mapping[str, Any], tokenizer: Any = None) -> TwinMerging:
        """Train the router to tell the tasks' inputs apart, on features of the shared model; no labels are needed.

        Args:
            inputs_by_task: By task: a tensor (the model's first argument), a mapping of such tensors, texts, or
                token rows `{"input_ids": [...]}`.
            tokenizer: For texts.

        Returns:
            Itself.

        Raises:
            BadInput: other tasks than the experts', or inputs of another form.
        """
        names = self._names()
        if set(inputs_by_task) != set(names):
            problem = f"are not the tasks {', '.join(names)}"
            raise BadInput("inputs_by_task", sorted(inputs_by_task), problem, "give inputs for every expert")
        frozen = TwinMergedModel(self._shared_model(), {}, names, features=self.features)
        found, labels = [], []
        for number, name in enumerate(names):
            batches = input_batches(inputs_by_task[name], tokenizer, self.max_inputs, name)
            features = [frozen.encode(*args, **kwargs).cpu() for args, kwargs in batches]
            found += features
            labels += [torch.full((len(part),), number) for part in features]
        self._router, self.router_accuracy = train_router(
            torch.cat(found), torch.cat(labels), tasks=len(names), lr=self.lr, epochs=self.epochs,
            batch_size=self.batch_size, validation=self.validation, seed=self.seed,
        )  # fmt: skip
        return self

    def build(self) -> TwinMergedModel:
        """The merged model; its `report` says how far the experts are from the base and from each other.

        Raises:
            BadInput: an argument out of range, or an expert that does not fit the base; names the tensor.
            NotApplicable: a matrix in a layer that cannot be mixed.
        """
        plan, names, model = self._planned(), self._names(), self._shared_model()
        parts = Exclusives(plan, self.rank, self.rank_rounding, self.strategy, self.seed)
        taken = {name: parts.of(name, self._state[name]) for name in plan.infos if name not in plan.kept}
        self.report = parts.report(names)
        for task, figures in self.report.items():
            if figures["change"] > 1:
                size = f"{figures['change']:.1f} times the base's norm"
                warnings.warn(
                    f"expert {task} differs from the base by {size}: is it a fine-tune?", stacklevel=2
                )
        router = copy.deepcopy(self._router)
        if router is not None:
            router.to(next(model.parameters()).device)
        return TwinMergedModel(
            model, {name: part for name, part in taken.items() if part}, names, router=router,
            heads=self._own_heads(), features=self.features, temperature=self.temperature, top_k=self.top_k,
            record={"arguments": self._arguments(), "report": self.report},
        )  # fmt: skip

    def transfer(
        self,
        tokenizer: Any,
        *,
        output: str | os.PathLike[str],
        scratch: Path | None,
        seed: int,
        **inputs: Any,
    ) -> Path:
        """What `transfuse run` does: train the router on `prompts`, build, and save with the tokenizer.

        Args:
            tokenizer: The base's.
            output: Folder of the result.
            scratch: Not used: there is nothing to go on from.
            seed: Of the run; the router's is the argument `seed`.
            **inputs: `prompts`: a file of `{"task": ..., "prompt": ...}` records. Without `tasks`, the order in which
                tasks first appear is that of `experts`.
        """
        prompts = by_task(inputs["prompts"])
        self.tasks = list(prompts) if self.tasks is None else self.tasks
        model = self.fit_router(prompts, tokenizer).build()
        target = model.save_pretrained(output, tokenizer)
        amend_lineage(
            target,
            inputs={"prompts": str(inputs["prompts"])},
            input_sha256={"prompts": input_hash(inputs["prompts"])},
        )
        return target

    # --- parts ---------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        names = list(self.experts) if isinstance(self.experts, Mapping) else None
        given = names if self.tasks is None else list(self.tasks)
        found = [str(i) for i in range(len(self.experts))] if given is None else [str(name) for name in given]
        if len(found) != len(self.experts) or len(set(found)) != len(found):
            raise BadInput(
                "tasks", found, f"are not names of {len(self.experts)} experts", "name each expert once"
            )
        if len(found) < 2:
            raise BadInput("experts", len(found), "are fewer than two", "merge at least two")
        return found

    def _planned(self) -> Plan:
        if self._plan is None:
            self._names()
            check_training(self.lr, self.epochs, self.batch_size, self.validation, self.seed)
            check_positive(max_inputs=self.max_inputs)
            check_number("temperature", self.temperature, remedy="give 1, or less for sharper choices")
            rank_of(self.rank, 1)
            if self.rank_rounding not in ("round", "floor"):
                raise BadInput("rank_rounding", self.rank_rounding, "is unknown", 'use "round" or "floor"')
            if not isinstance(self.base, (nn.Module, str, os.PathLike)):
                raise BadInput(
                    "base", type(self.base).__name__, "is no model", "give a model, a folder or a name"
                )
            experts = list(self.experts.values()) if isinstance(self.experts, Mapping) else list(self.experts)
            root = open_source(self.base, "base")
            opened = [open_source(expert, f"experts[{i}]", root) for i, expert in enumerate(experts)]
            scaled = isinstance(self.shared, str) and self.shared.replace("-", "_") not in ("linear", "slerp")
            options: dict[str, Any] = {"scaling": self.scaling} if scaled else {}
            self._plan = plan_merge(
                base=root, models=opened, method=self.shared, exclude=self.exclude,
                **options,
            )  # fmt: skip
        return self._plan

    def _shared_model(self) -> nn.Module:
        """A copy of the base that holds the shared weights."""
        plan = self._planned()
        if not self._state:
            self._state = merged_tensors(plan)
        model = copy.deepcopy(self.base) if isinstance(self.base, nn.Module) else load(self.base).model
        own = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._state.items():
                own[name].copy_(tensor)
        return model

    def _own_heads(self) -> dict[str, dict[str, Tensor]]:
        """Excluded tensors in which an expert differs from the base."""
        plan = self._planned()
        assert plan.base is not None
        heads: dict[str, dict[str, Tensor]] = {}
        for name in plan.kept:
            if not plan.infos[name].dtype.is_floating_point:
                continue
            base = plan.base.tensor(name)
            for task, model in zip(self._names(), plan.models, strict=True):
                own = model.tensor(name) if name in model.infos else base
                if own.shape != base.shape or not torch.equal(own.to(base.dtype), base):
                    heads.setdefault(task, {})[name] = own.to(base.dtype).clone()
        return heads

    def _arguments(self) -> dict[str, Any]:
        names = (
            "scaling", "rank", "rank_rounding", "strategy", "exclude", "features", "temperature", "top_k", "lr",
            "epochs", "batch_size", "validation", "max_inputs", "seed",
        )  # fmt: skip
        shared = self.shared if not isinstance(self.shared, StaticMerge) else repr(self.shared)
        return jsonable({"shared": shared, **{name: getattr(self, name) for name in names}})


TwinMerger = TwinMerging
"""Another name for the same class."""
