"""The model that twin-merging makes: a shared model, what each task adds to it, and a router between them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, CorruptFile, IncompatibleModels
from ..core.files import atomic_dir, check_writable, read_tensors, write_tensors
from ..core.lineage import write_lineage
from ..core.models import load
from ..core.runs import check_number, check_positive
from ..core.shards import SHARD_BYTES, Checkpoint, ShardWriter
from ._around import Around, check_prompt, examples_of, prompt_of
from ._mixing import Exclusive, Routing, attach
from ._opening import open_source
from ._router import Router, encode, masked_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TwinMergedModel", "masked_mean"]

FILE = "twin.safetensors"
_FORMAT = 1


class TwinMergedModel(Around):
    """Answers every example with the shared weights and the mix of exclusive ones that its router chooses.

    Called like the model it is made of. `TwinMerging(...).build()` makes one, `from_pretrained` loads one.

    Args:
        model: The model, with the shared weights; its layers are replaced.
        exclusives: By tensor, what the tasks add.
        tasks: Their names.
        router: Chooses from a feature vector; None asks for `routing` at every call.
        heads: By task, tensors that are not merged but the task's own, used when a call names the `task`.
        features: Module whose output, averaged over tokens, the router sees; None for the last hidden state.
        temperature: Divides the router's logits.
        top_k: Keep that many tasks per example; None for all.
        record: Facts for the lineage of a saved folder.

    Raises:
        BadInput: `temperature` or `top_k` out of range.
        NotApplicable: a layer that cannot be mixed.
    """

    def __init__(
        self,
        model: nn.Module,
        exclusives: Mapping[str, Exclusive],
        tasks: Sequence[str],
        *,
        router: Router | None = None,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        features: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        record: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_number("temperature", temperature, remedy="give 1, or less for sharper choices")
        if top_k is not None:
            check_positive(top_k=top_k)
        if top_k is not None and not 1 <= top_k <= len(tasks):
            raise BadInput("top_k", top_k, f"is not between 1 and {len(tasks)} tasks", "leave it out for all")
        self.tasks, self.features, self.temperature, self.top_k = list(tasks), features, temperature, top_k
        self.record = dict(record or {})
        self._exclusives = {name: dict(parts) for name, parts in exclusives.items()}
        self._heads = {task: dict(tensors) for task, tensors in (heads or {}).items()}
        self._routing = Routing()
        self._shared = [(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()]
        attach(model, self._exclusives, self._routing)
        self.model, self.router = model.requires_grad_(False).eval(), router
        self.eval()

    @property
    def exclusive_bytes(self) -> int:
        """Bytes of all that the tasks add, heads included."""
        parts = [*self._exclusives.values(), *self._heads.values()]
        return sum(tensor.nbytes for tensors in parts for tensor in tensors.values())

    def train(self, mode: bool = True) -> TwinMergedModel:
        """As any module, but the router stays in evaluation mode: its batch norms know no batch of one."""
        super().train(mode)
        if self.router is not None:
            self.router.eval()
        return self

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the router sees: the shared model's features, averaged over tokens, float32 `[B, d]`."""
        with self._routed(None):
            return encode(self.model, self.features, args, kwargs)

    @torch.no_grad()
    def routing_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """The share of every task for each example of a batch, float32 `[B, T]`, rows summing to 1.

        Raises:
            BadInput: there is no router.
        """
        if self.router is None:
            raise BadInput(
                "router", None, "was not trained", "call fit_router before build, or pass routing="
            )
        logits = self.router(self.encode(*args, **kwargs)) / self.temperature
        if self.top_k is not None:
            least = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits.softmax(-1)

    def one_hot(self, task: str, rows: int = 1) -> Tensor:
        """Routing `[rows, T]` that takes one task's change whole.

        Raises:
            BadInput: no such task.
        """
        weights = torch.zeros(rows, len(self.tasks), device=self.device)
        weights[:, self._number(task)] = 1.0
        return weights

    def forward(
        self, *args: Any, routing: Tensor | None = None, task: str | None = None, **kwargs: Any
    ) -> Any:
        """The model's output.

        Args:
            *args: The model's own arguments.
            routing: Shares of the tasks, `[B, T]` or `[T]`; by default the router's.
            task: Whose head to use; by default the base's.
            **kwargs: The model's own arguments.

        Raises:
            BadInput: there is no router; `routing` of another shape; a cache with tokens in it, without `routing`.
        """
        if routing is None:
            check_prompt(args, kwargs, "routing")
            weights = self.routing_weights(*args, **kwargs)
        else:
            weights = self._given(routing, args, kwargs)
        with self._routed(weights), self._head(task):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, routing: Tensor | None = None, task: str | None = None, **kwargs: Any
    ) -> Any:
        """The model's `generate`, with the routing chosen on the prompt and kept for all new tokens."""
        inputs = prompt_of(kwargs)
        weights = (
            self.routing_weights(*args, **inputs) if routing is None else self._given(routing, args, inputs)
        )
        model: Any = self.model
        with self._routed(weights), self._head(task):
            return model.generate(*args, **kwargs)

    def _given(self, routing: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        rows = examples_of(args, kwargs)
        weights = (routing if routing.dim() == 2 else routing[None]).to(self.device)
        weights = weights.expand(rows, -1) if len(weights) == 1 else weights
        if weights.shape != (rows, len(self.tasks)):
            raise BadInput(
                "routing",
                tuple(routing.shape),
                f"is not [{rows}, {len(self.tasks)}]",
                "give a row per example",
            )
        return weights

    @contextlib.contextmanager
    def _routed(self, weights: Tensor | None) -> Iterator[None]:
        before = self._routing.weights
        self._routing.weights = weights
        try:
            yield
        finally:
            self._routing.weights = before

    @contextlib.contextmanager
    def _head(self, task: str | None) -> Iterator[None]:
        """Put a task's own tensors in place of the base's."""
        if task is None:
            yield
            return
        self._number(task)
        own = dict(self._shared)
        kept = {name: own[name].data for name in self._heads.get(task, {})}
        try:
            for name in kept:
                own[name].data = self._heads[task][name].to(kept[name])
            yield
        finally:
            for name, value in kept.items():
                own[name].data = value

    def _number(self, task: str) -> int:
        if task not in self.tasks:
            raise BadInput("task", task, "is not a task of this model", f"use one of {', '.join(self.tasks)}")
        return self.tasks.index(task)

    # --- to disk and back ----------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """Write a folder: the shared model as transformers saves one, and `twin.safetensors` with all else.

        The shared model alone loads with `transfuse.load`.

        Args:
            folder: Replaced at once.
            tokenizer: Put beside it; `from_pretrained` needs one to load the model by itself.
        """
        target = check_writable(folder, "folder")
        tensors = {
            f"exclusive/{n}/{part}": t for n, parts in self._exclusives.items() for part, t in parts.items()
        }
        tensors |= {f"head/{task}/{n}": t for task, own in self._heads.items() for n, t in own.items()}
        if self.router is not None:
            tensors |= {f"router/{name}": tensor for name, tensor in self.router.state_dict().items()}
        facts = {
            "format": _FORMAT, "tasks": self.tasks, "features": self.features, "temperature": self.temperature,
            "top_k": self.top_k, "record": self.record,
        }  # fmt: skip
        with atomic_dir(target) as work:
            shared = open_source({name: tensor.data for name, tensor in self._shared}, "shared")
            ShardWriter(work, shared.infos, SHARD_BYTES).write(lambda name: [shared.tensor(name)])
            write_tensors(work / FILE, tensors, facts)
            config = copy.deepcopy(getattr(self.model, "config", None))
            if config is not None:
                config.architectures = [type(self.model).__name__]
            for part in (config, getattr(self.model, "generation_config", None), tokenizer):
                if part is not None:
                    part.save_pretrained(work)
            write_lineage(
                work,
                method="twin-merging",
                arguments=self.record.get("arguments"),
                measurements={"exclusive_bytes": self.exclusive_bytes, **self.record.get("report", {})},
                summary=f"A shared model and what {len(self.tasks)} tasks add to it: {', '.join(self.tasks)}.",
                usage="from transfuse.merge.twin_merging import TwinMergedModel\n\n"
                f'model = TwinMergedModel.from_pretrained("{target}")',
            )
        return target

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], model: nn.Module | None = None, **options: Any
    ) -> TwinMergedModel:
        """Load what `save_pretrained` wrote.

        Args:
            folder: The folder.
            model: A model of the same architecture to hold the weights, changed in place; by default it is loaded as
                the folder's configuration says.
            **options: Those of `transfuse.load`, where no model is given.

        Raises:
            BadInput: no such folder.
            CorruptFile: a file that is damaged, or of another format.
            IncompatibleModels: `model` has other tensors.
        """
        path = Path(folder)
        if not (path / FILE).is_file():
            raise BadInput(
                "folder", str(path), f"holds no {FILE}", "give a folder that save_pretrained wrote"
            )
        tensors, facts = read_tensors(path / FILE)
        if facts.get("format") != _FORMAT or not isinstance(facts.get("tasks"), list):
            raise CorruptFile("folder", str(path / FILE), "is of another format", "save the model again")
        if model is None:
            kinds = {"ForCausalLM": "causal-lm", "ForSequenceClassification": "sequence-classification"}
            names = str((open_source(path, "folder").config.get("architectures") or [""])[0])
            task = next((kind for end, kind in kinds.items() if names.endswith(end)), "encoder")
            model = load(path, **{"task": task, **options}).model
        else:
            _fill(model, Checkpoint(path), path)
        exclusives: dict[str, dict[str, Tensor]] = {}
        heads: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "exclusive":
                name, _, part = rest.rpartition("/")
                exclusives.setdefault(name, {})[part] = tensor
            elif kind == "head":
                task, _, name = rest.partition("/")
                heads.setdefault(task, {})[name] = tensor
            else:
                state[rest] = tensor
        router = None
        if state:
            router = Router(state["0.weight"].shape[1], len(facts["tasks"]))
            router.load_state_dict(state)
            router.requires_grad_(False).to(next(model.parameters()).device)
        return cls(
            model, exclusives, facts["tasks"], router=router, heads=heads, features=facts["features"],
            temperature=facts["temperature"], top_k=facts["top_k"], record=facts["record"],
        )  # fmt: skip


def _fill(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Copy a checkpoint's tensors into a model; tied ones are there once."""
    own = model.state_dict()
    for name, info in checkpoint.infos.items():
        if name not in own or tuple(own[name].shape) != info.shape:
            raise IncompatibleModels(
                "model", name, f"is not as in {path}", "give a model of the same architecture"
            )
    with torch.no_grad():
        for name in checkpoint.infos:
            own[name].copy_(checkpoint.tensor(name))
