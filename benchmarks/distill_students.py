"""A pretrained model cut to a third of its blocks and taught again on wikitext-2: held-out perplexity by objective.

Every student starts as the same depth-pruned copy and sees the same rows, once, in the same order. Learning: the
validation part; measured: the first rows of the test part. `--store K` also trains by forward KL from the teacher's
stored top-K, beside the teacher itself: tokens per second, bytes per token, difference of the final loss. Prints a
table; `--json FILE` writes the figures.

    python benchmarks/distill_students.py [--model smollm2-135m] [--layers 10] [--steps 100] [--store 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from transfuse.core.batches import text_rows
from transfuse.core.datasets import dataset_path
from transfuse.core.lineage import hardware, versions
from transfuse.core.models import load
from transfuse.core.training import seeded
from transfuse.distill import Distiller, LogitStore, prune
from transfuse.distill.survey_kd_llm import get
from transfuse.distill.taid import TAID


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--store", type=int, metavar="K")
    parser.add_argument("--objectives", nargs="+", default=["cross-entropy", "forward-kl", "taid"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    teacher, tokenizer = load(options.model)
    rows = text_rows(tokenizer, dataset_path("wikitext-2/valid.txt"), options.block)[
        : options.steps * options.batch
    ]
    held = text_rows(tokenizer, dataset_path("wikitext-2/test.txt"), options.block)[: options.held_out]
    results: dict[str, dict[str, Any]] = {}

    def show(name: str, **found: Any) -> None:
        results[name] = found
        print(f"{name:24s} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)

    def trainer(folder: str, objective: Any, source: Any) -> Distiller:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.batch, num_train_epochs=1, seed=0,
            per_device_eval_batch_size=options.batch, learning_rate=options.lr, lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=teacher.device.type == "cpu",
        )  # fmt: skip
        return Distiller(
            student=prune(teacher, layers=options.layers), teacher=source, objective=objective, train_dataset=rows,
            eval_dataset=held, processing_class=tokenizer, args=arguments,
        )  # fmt: skip

    def learn(name: str, objective: Any, source: Any, folder: str) -> dict[str, float]:
        made = trainer(folder, objective, source)
        start = time.perf_counter()
        with seeded(0):
            made.train()
        seconds = time.perf_counter() - start
        loss = made.evaluate()["eval_loss"]
        tokens = sum(len(row["input_ids"]) - 1 for row in rows)
        found = {"perplexity": math.exp(loss), "seconds": seconds, "tokens_per_second": tokens / seconds}
        show(name, **found)
        return {**found, "loss": loss}

    with tempfile.TemporaryDirectory() as folder:
        start = trainer(folder, "cross-entropy", None)
        show("pruned, untrained", perplexity=math.exp(start.evaluate()["eval_loss"]))
        start.student.to("meta")
        whole = Distiller(
            student=teacher, objective="cross-entropy", train_dataset=rows, eval_dataset=held,
            args=start.args, processing_class=tokenizer,
        )  # fmt: skip
        show("teacher", perplexity=math.exp(whole.evaluate()["eval_loss"]))
        del start, whole
        online: dict[str, float] = {}
        for name in options.objectives:
            objective = TAID(t_start=0.2) if name == "taid" else get(name)
            found = learn(name, objective, None if name == "cross-entropy" else teacher, folder)
            online = found if name == "forward-kl" else online
        if options.store:
            begun = time.perf_counter()
            store = LogitStore.capture(
                teacher, rows, Path(folder) / "store", k=options.store, batch_size=options.batch
            )
            captured = time.perf_counter() - begun
            stored = learn(f"forward-kl, stored {options.store}", get("forward-kl"), store, folder)
            more = {"capture_seconds": captured, "bytes_per_token": store.bytes_per_token}
            if online:
                more["tokens_per_second_ratio"] = stored["tokens_per_second"] / online["tokens_per_second"]
                more["loss_difference"] = stored["loss"] / online["loss"] - 1
            show("stored against online", **more)
    if options.json:
        record = {
            "results": results,
            "versions": versions(),
            "hardware": hardware(),
            "arguments": sys.argv[1:],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
