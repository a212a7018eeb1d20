"""LoRA: train a low-rank adapter on the edits and leave the weights alone.

:arxiv: 2106.09685
:moves: one fact -> one adapter beside the attention's query and value maps
:access: weights
:reversible: yes
:context: no

PEFT's own layers on the query and value projections of every block, trained by Adam on the teacher-forced
cross-entropy of the target tokens with the prompt masked. The edit holds the adapter: attaching puts PEFT's layers
around the projections, detaching takes them off again, and the model is the same object with the same weights bitwise.
`adaptive=True` takes PEFT's AdaLoRA instead (what the study reports): singular triplets from 3/2 of the rank are pruned
to `rank` on average between the first tenth and the last third of the steps, with its orthogonality penalty. The
study's code never calls the step that prunes, so that all triplets stay there.

Adapters are kept in float32 where the model is in half precision. The model stays in eval mode while training; only
the adapter's own dropout is active. Several facts given at once share one adapter and one optimizer: `steps` passes,
`batch_size` facts per update. All of them are made, as in the study's code, where an end at a loss of 1e-3 is commented
out; `stop_below` puts such an end back.

    with edit(model, tokenizer, facts, method="lora", rank=8) as handle:
        handle.save("delta")
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput, IncompatibleModels
from ..core.generate import pad_batch, pad_id_of
from ..core.training import optimise, seeded
from ._base import Editor, RoutedEdit, check_facts
from ._layers import check_number, encode_facts, still

__all__ = ["LoRA", "LoraEdit"]

IGNORED = -100


class LoraEdit(RoutedEdit):
    """A trained adapter.

    Args:
        adapter: Its tensors, `<module>::<part>` -> values.
        config: Rank, alpha, dropout, targets, whether it is AdaLoRA, and its steps.
    """

    kind = "lora"

    def __init__(self, *, adapter: Mapping[str, torch.Tensor], config: Mapping[str, Any]):
        self.adapter, self.config = dict(adapter), dict(config)
        self.name: str | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Put PEFT's layers, with this adapter in them, around the model's projections."""
        name = _free_name(model)
        with seeded(0):  # PEFT draws first values, which are overwritten
            _insert(model, self.config, name, trainable=False)
        parts = _parts(model, name)
        if {k: p.shape for k, p in parts.items()} != {k: t.shape for k, t in self.adapter.items()}:
            _remove(model, name)
            raise IncompatibleModels(
                "edit", f"{len(self.adapter)} tensors", "do not fit the model's projections",
                "use the model it was made for",
            )  # fmt: skip
        with torch.no_grad():
            for key, part in parts.items():
                part.copy_(self.adapter[key])
        self.name = name

    def detach(self, model: PreTrainedModel) -> None:
        """Take the adapter off; with the last one, PEFT's layers go too."""
        if self.name is not None:
            _remove(model, self.name)
        self.name = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors."""
        return self.adapter

    def meta(self) -> dict[str, Any]:
        """The adapter's configuration."""
        return {"config": self.config}

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> LoraEdit:
        """Rebuild from `tensors` and `meta`."""
        return cls(adapter=tensors, config=meta["config"])


class LoRA(Editor):
    """Editor; see the module.

    Args:
        rank: Of the adapter; on average per projection when `adaptive`.
        alpha: The update is scaled by alpha / rank.
        dropout: On the adapter's input, while training.
        lr: Adam's learning rate.
        steps: Passes over the facts.
        targets: Endings of the names of the projections; None takes query and value as PEFT knows them.
        adaptive: Use AdaLoRA.
        stop_below: No update for a mini-batch whose loss (nats per token) is below this; all below: done. 0: never.
        batch_size: Facts per update.
        seed: Of the adapter's first values and of dropout.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float = 32,
        dropout: float = 0.1,
        lr: float = 5e-3,
        steps: int = 70,
        targets: Sequence[str] | None = None,
        adaptive: bool = False,
        stop_below: float = 0.0,
        batch_size: int = 1,
        seed: int = 0,
    ):
        self.rank, self.alpha, self.dropout, self.lr, self.steps = rank, alpha, dropout, lr, steps
        self.targets, self.adaptive, self.stop_below = targets, adaptive, stop_below
        self.batch_size, self.seed = batch_size, seed

    def check(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Refuse facts, targets and hyperparameters that cannot work."""
        check_facts(facts)
        check_number("rank", self.rank, least=1, whole=True)
        check_number("alpha", self.alpha, least=0, above=True)
        check_number("dropout", self.dropout, least=0)
        if self.dropout >= 1:
            raise BadInput("dropout", self.dropout, "drops everything", "give a share below 1")
        check_number("lr", self.lr, least=0, above=True)
        check_number("steps", self.steps, least=5 if self.adaptive else 0, whole=True)
        check_number("stop_below", self.stop_below, least=0)
        check_number("batch_size", self.batch_size, least=1, whole=True)
        check_number("seed", self.seed, least=0, whole=True)
        _check_adapters(model)
        self._targets(model)
        encode_facts(model, tokenizer, facts)

    def _targets(self, model: PreTrainedModel) -> list[str]:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
            model.config.get_text_config().model_type
        )
        wanted = list(self.targets if self.targets is not None else known or ("q_proj", "v_proj"))
        endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        for target in wanted:
            if target.rpartition(".")[2] not in endings:
                raise BadInput(
                    "targets", target, f"names no module of {type(model).__name__}",
                    'give the endings of its query and value projections, such as ["q_proj", "v_proj"]',
                )  # fmt: skip
        return wanted

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> LoraEdit:
        """Train an adapter on these facts; the model is left without it."""
        self.check(model, tokenizer, facts)
        config = {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": self._targets(model),
            "adaptive": self.adaptive,
            "steps": self.steps,
        }
        batches = self._batches(model, tokenizer, facts)
        name = _free_name(model)
        with still(model), seeded(self.seed):
            tuner = _insert(model, config, name, trainable=True)
            try:
                for layer in _layers(model, name):
                    layer.lora_dropout[name].train()
                parts = _parts(model, name)
                turn = iter(range(self.steps * len(batches)))
                done = 0

                def closure() -> torch.Tensor:
                    return tuner(**batches[next(turn) % len(batches)]).loss

                def allocate() -> None:
                    nonlocal done
                    done += 1
                    if self.adaptive and done % len(batches) == 0:
                        tuner.update_and_allocate(done // len(batches))

                optimise(
                    [part for part in parts.values() if part.requires_grad],
                    closure,
                    lr=self.lr,
                    steps=self.steps * len(batches),
                    stop_below=self.stop_below,
                    patience=len(batches),
                    after_step=allocate,
                )
                adapter = {key: part.detach().cpu().clone() for key, part in parts.items()}
            finally:
                _remove(model, name)
        return LoraEdit(adapter=adapter, config=config)

    def _batches(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> list[dict[str, Any]]:
        pairs = encode_facts(model, tokenizer, facts)
        batches = []
        for start in range(0, len(pairs), self.batch_size):
            chosen = pairs[start : start + self.batch_size]
            ids, mask = pad_batch([p + t for p, t in chosen], pad_id_of(tokenizer), device=model.device)
            labels, _ = pad_batch([[IGNORED] * len(p) + t for p, t in chosen], IGNORED, device=model.device)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False})
        return batches


def _free_name(model: PreTrainedModel) -> str:
    """A name no adapter of the model has."""
    taken = getattr(model, "peft_config", {})
    return next(f"edit{i}" for i in range(len(taken) + 1) if f"edit{i}" not in taken)


def _check_adapters(model: PreTrainedModel) -> None:
    """Refuse a model whose own adapters are merged (PEFT would unmerge them for good) or off (ours would be too)."""
    for layer in _layers(model):
        if layer.merged or layer.disable_adapters:
            state = "merged into its weights" if layer.merged else "switched off"
            raise BadInput(
                "model", type(model).__name__, f"has adapters that are {state}",
                "unmerge or enable them, or call merge_and_unload() or unload()",
            )  # fmt: skip


def _insert(model: PreTrainedModel, config: Mapping[str, Any], name: str, *, trainable: bool) -> LoraModel:
    """Put a fresh adapter on the model beside those it has; all adapters are active, the others frozen."""
    _check_adapters(model)
    common = {
        "r": config["rank"],
        "lora_alpha": config["alpha"],
        "lora_dropout": config["dropout"],
        "target_modules": list(config["targets"]),
        "inference_mode": not trainable,
    }
    if config["adaptive"]:
        steps = config["steps"]
        made = AdaLoraConfig(
            **common, target_r=config["rank"], init_r=-(-3 * config["rank"] // 2), total_step=steps,
            tinit=steps // 10, tfinal=steps // 3, deltaT=1,
        )  # fmt: skip
    else:
        made = LoraConfig(**common)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    before = {id(layer): layer.active_adapters for layer in _layers(model)}
    try:
        with (
            warnings.catch_warnings()
        ):  # PEFT warns of a second adapter, and of Conv1D's layout, which it handles
            warnings.simplefilter("ignore")
            tuner = (AdaLoraModel if config["adaptive"] else LoraModel)(model, made, name)
        cast_adapter_dtype(model, name)
        for layer in _layers(model, name):
            layer.set_adapter([*before.get(id(layer), []), name], inference_mode=True)
            layer.train(layer.get_base_layer().training)
    except BaseException:
        _remove(model, name)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if trainable:
        for key, part in _parts(model, name).items():
            part.requires_grad_(not key.endswith("::ranknum"))
    return tuner


def _remove(model: PreTrainedModel, name: str) -> None:
    """Take one adapter off, and PEFT's layers where it was the last one."""
    for module_name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        if name in layer.lora_A:
            layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, attribute = module_name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    configs = getattr(model, "peft_config", {})
    configs.pop(name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config


def _layers(model: PreTrainedModel, name: str | None = None) -> list[LoraLayer]:
    """PEFT's layers in the model; those that hold adapter `name`."""
    return [m for m in model.modules() if isinstance(m, LoraLayer) and (name is None or name in m.lora_A)]


def _parts(model: PreTrainedModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters as `<module>::<part>`."""
    found = {}
    for module_name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            for attribute in ("lora_A", "lora_B", "lora_E", "ranknum"):
                held = getattr(layer, attribute, {})
                if name in held:
                    part = held[name]
                    found[f"{module_name}::{attribute}"] = (
                        part if isinstance(part, torch.nn.Parameter) else part.weight
                    )
    return found
