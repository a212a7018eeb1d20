"""What makes a LoRA adapter of PEFT more than a product B A beside its base's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["changed_base", "no_product"]

_OPTIONS = {
    "use_dora": "is a DoRA", "alora_invocation_tokens": "is switched on by tokens",
    "layer_replication": "repeats layers", "target_parameters": "changes parameters without a layer of their own",
    "trainable_token_indices": "trains single tokens", "lora_bias": "has biases of its own",
    "kasa_config": "changed the base at its start", "use_qalora": "pools its inputs",
    "use_bdlora": "is block-diagonal", "arrow_config": "routes among adapters",
    "monteclora_config": "draws its factors at random", "velora_config": "compresses its inputs",
}  # fmt: skip
_NEW_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def no_product(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The option of an adapter's configuration that makes it more, and what it does; None for a plain LoRA."""
    return next(((name, problem) for name, problem in _OPTIONS.items() if config.get(name)), None)


def changed_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation of an adapter's configuration if it changes the weights under the adapter, else None."""
    start = str(config.get("init_lora_weights", True)).lower()
    return start if start.startswith(_NEW_BASE) else None
