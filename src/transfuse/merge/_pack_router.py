"""Which skill a prompt asks for: a small network or nearest centroids on features of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import BadInput
from ._router import Router, check_training, encode, input_batches, train_router

__all__ = ["BASE", "INPUTS", "SkillRouter"]

BASE = "base"
"""The label of prompts that the base answers by itself."""
INPUTS = "inputs"
"""As `features`: the inputs themselves."""

Kind = Literal["network", "centroid"]


class SkillRouter:
    """Says for every prompt which skill it asks for, or "base".

    Args:
        model: The base, without packs.
        tokenizer: Its tokenizer, for texts.
        kind: "network", a feed-forward classifier; or "centroid", the label with the nearest mean feature vector.
        features: Module whose output, averaged over tokens, it sees; None for a transformers model's last hidden
            state; "inputs" for the flattened input tensor, which takes no model.
        lr: Of the network.
        epochs: Of the network.
        batch_size: Of the network.
        validation: Share of the prompts that choose the network's best epoch.
        seed: Of the network.

    Attributes:
        labels: After `fit`: the labels, in order of first appearance.
        accuracy: After `fit`: on the held-out prompts (network), or on all (centroid).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        kind: Kind = "network",
        features: str | None = None,
        lr: float = 5e-4,
        epochs: int = 50,
        batch_size: int = 1024,
        validation: float = 0.1,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.kind, self.features = model, tokenizer, kind, features
        self.lr, self.epochs, self.batch_size, self.validation = lr, epochs, batch_size, validation
        self.seed = seed
        self.labels: list[str] = []
        self.accuracy: float | None = None
        self._network: Router | None = None
        self._centroids: Tensor | None = None

    def fit(self, prompts: Any, labels: Sequence[str]) -> SkillRouter:
        """Learn from prompts and the skill each belongs to.

        Args:
            prompts: Texts, token rows `{"input_ids": [...]}`, a tensor (the model's first argument), or tensors by
                name.
            labels: One per prompt: the name of a skill, or "base".

        Returns:
            Itself.

        Raises:
            BadInput: fewer than two labels, another number of labels than of prompts, prompts of another form.
        """
        if self.kind not in ("network", "centroid"):
            raise BadInput("kind", self.kind, "is unknown", 'use "network" or "centroid"')
        if self.kind == "network":
            check_training(self.lr, self.epochs, self.batch_size, self.validation, self.seed)
        found = self._features(prompts)
        names = list(dict.fromkeys(labels))
        if len(found) != len(labels):
            raise BadInput(
                "labels", len(labels), f"are not one for each of {len(found)} prompts", "give as many"
            )
        if len(names) < 2:
            raise BadInput(
                "labels", names, "are fewer than two", 'give prompts of several skills, or of "base"'
            )
        numbers = torch.tensor([names.index(label) for label in labels])
        self.labels = names
        if self.kind == "centroid":
            self._centroids = torch.stack([found[numbers == i].mean(0) for i in range(len(names))])
            right = [a == b for a, b in zip(self.choose(found), labels, strict=True)]
            self.accuracy = sum(right) / len(right)
            return self
        self._network, self.accuracy = train_router(
            found, numbers, tasks=len(names), lr=self.lr, epochs=self.epochs, batch_size=self.batch_size,
            validation=self.validation, seed=self.seed,
        )  # fmt: skip
        return self

    def _features(self, prompts: Any) -> Tensor:
        batches = input_batches(prompts, self.tokenizer, len(prompts), "prompts")
        return torch.cat([self.encode(self.model, args, kwargs) for args, kwargs in batches])

    def encode(self, model: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """What it sees of a batch, float32 `[B, d]`.

        Args:
            model: The base, without packs.
            args: Positional arguments of the model.
            kwargs: The others.

        Raises:
            BadInput: no model, where features are a model's.
        """
        if self.features == INPUTS:
            return next(iter([*args, *kwargs.values()])).flatten(1).float().cpu()
        if model is None:
            raise BadInput("model", None, "is missing", 'pass the base, or features="inputs"')
        return encode(model, self.features, args, kwargs).cpu()

    @torch.no_grad()
    def choose(self, features: Tensor) -> list[str]:
        """The labels of feature vectors `[B, d]`.

        Raises:
            BadInput: it was not fitted.
        """
        if self._network is not None:
            numbers = self._network(features).argmax(-1)
        elif self._centroids is not None:
            numbers = torch.cdist(features, self._centroids).argmin(-1)
        else:
            raise BadInput("router", None, "was not fitted", "call fit first")
        return [self.labels[i] for i in numbers.tolist()]

    def route(self, prompts: Any) -> list[str]:
        """The labels of prompts, given as to `fit`."""
        return self.choose(self._features(prompts))

    # --- to disk and back ----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors, and facts for a header.

        Raises:
            BadInput: it was not fitted.
        """
        facts = {
            "kind": self.kind, "features": self.features, "labels": self.labels, "accuracy": self.accuracy
        }  # fmt: skip
        if self._network is not None:
            return dict(self._network.state_dict()), facts
        if self._centroids is not None:
            return {"centroids": self._centroids}, facts
        raise BadInput("router", None, "was not fitted", "call fit first")

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], model: nn.Module | None = None
    ) -> SkillRouter:
        """The router whose `state` that is."""
        made = cls(model, kind=facts["kind"], features=facts["features"])
        made.labels, made.accuracy = list(facts["labels"]), facts["accuracy"]
        if made.kind == "centroid":
            made._centroids = tensors["centroids"]
        else:
            network = Router(tensors["0.weight"].shape[1], len(made.labels))
            network.load_state_dict(dict(tensors))
            made._network = network.eval().requires_grad_(False)
        return made
