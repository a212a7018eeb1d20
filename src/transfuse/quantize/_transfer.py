"""The body of the family's `transfer`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ..core.datasets import file_or_dataset
from ..core.errors import BadInput
from ..core.files import atomic_write
from ..core.lineage import amend_lineage, input_hash
from ..core.metrics import perplexity
from ._base import Quantizer, read_texts, windows
from ._plan import BitPlan
from ._store import Storage, save

__all__ = ["quantize"]

FEWEST = 16  # tokens that a perplexity is worth


def quantize(
    model: Any,
    tokenizer: Any,
    *,
    method: Any,
    output: str | os.PathLike[str],
    texts: str | os.PathLike[str] | None,
    dataset: str | None,
    held_out: str | os.PathLike[str] | None,
    held_out_dataset: str | None,
    count: int,
    length: int,
    held_out_tokens: int,
    storage: Storage,
) -> Path:
    """See `transfuse.quantize.transfer`."""
    if not isinstance(method, Quantizer):
        raise BadInput(
            "method", type(method).__name__, "is no quantizer", "give one, such as LayerwiseQuant()"
        )
    used = {"texts": file_or_dataset(texts, dataset, "texts")}
    calibration = "\n\n".join(read_texts(used["texts"], "texts"))
    if held_out is None and held_out_dataset is None:
        at, named = int(0.8 * len(calibration)), "texts"
        calibration, judged = calibration[:at], calibration[at:]
    else:
        used["held_out"] = file_or_dataset(held_out, held_out_dataset, "held_out")
        judged, named = "\n\n".join(read_texts(used["held_out"], "held_out")), "held_out"
    ids = tokenizer(judged, add_special_tokens=False, verbose=False)["input_ids"][:held_out_tokens]
    if len(ids) < FEWEST:
        raise BadInput(named, f"{len(ids)} tokens", "are too few to measure on", "give a longer text")
    judged = tokenizer.decode(ids)
    rows = windows(tokenizer, calibration, count, length)
    before = perplexity(model, tokenizer, judged)
    started = time.perf_counter()
    report = (done := method.quantize(model, rows)).report
    seconds = time.perf_counter() - started
    figures = {
        "average_bits": report.average_bits,
        "stored_bits": report.stored_bits,
        "bytes_before": report.before,
        "bytes_packed": report.after,
        "perplexity_before": before,
        "perplexity_after": perplexity(model, tokenizer, judged),
        "quantize_seconds": round(seconds, 3),
    }
    target = save(model, output, tokenizer=tokenizer, storage=storage, measurements=figures)
    atomic_write(target / "bit_plan.json", json.dumps(_forms(done.plan), indent=2) + "\n")
    amend_lineage(
        target,
        inputs={name: str(path) for name, path in used.items()},
        input_sha256={name: input_hash(path) for name, path in used.items()},
    )
    return target


def _forms(plan: BitPlan) -> dict[str, Any]:
    """The plan, and what other tools take."""
    return {
        "plan": plan.to_dict(),
        "gptqmodel": plan.to_gptqmodel_dynamic(),
        "torchao": plan.to_torchao_fqn_config(),
        "llamacpp": plan.to_llamacpp_tensor_types(),
    }
