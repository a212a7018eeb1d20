"""Quantization: fewer bits per weight, spent where they matter most."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["transfer"]


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Any,
    output: str | os.PathLike[str],
    texts: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    held_out: str | os.PathLike[str] | None = None,
    held_out_dataset: str | None = None,
    windows: int = 4,
    length: int = 128,
    held_out_tokens: int = 1024,
    storage: Literal["plain", "packed"] = "plain",
) -> Path:
    """What `transfuse run` does with a quantizer: round the layers, measure before and after, save the model.

    The folder also holds `bit_plan.json`, with the plan and its form for GPTQModel, torchao and llama.cpp.

    Args:
        model: Is rounded in place.
        tokenizer: Its tokenizer.
        method: A quantizer.
        output: Folder of the result; replaced at once.
        texts: Calibration text: `.txt`, `.md`, or records with `text`.
        dataset: A text data set's name in its place (see `transfuse datasets`).
        held_out: Text on which perplexity is measured; by default the last fifth of the calibration text, which is
            then not calibrated on.
        held_out_dataset: A text data set's name in its place.
        windows: Number of calibration windows.
        length: Tokens of each.
        held_out_tokens: Tokens measured on, at most.
        storage: "plain", which any transformers loads, or "packed", the small form that `transfuse.load` reads.
    """
    from ._transfer import quantize

    return quantize(
        model, tokenizer, method=method, output=output, texts=texts, dataset=dataset, held_out=held_out,
        held_out_dataset=held_out_dataset, count=windows, length=length, held_out_tokens=held_out_tokens,
        storage=storage,
    )  # fmt: skip
