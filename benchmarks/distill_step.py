"""One distillation step beside TRL's GKD trainer (and, on a GPU, Liger's fused JSD): time and peak memory.

Student and teacher are the same for all: a pretrained teacher and its depth-pruned copy, bfloat16, one batch of
random tokens, JSD(0.5). A step is the trainer's own `training_step`: both forward passes, loss and backward pass.
Each contender runs in a process of its own. Memory is the highest mark during the step above what lay there before
it: weights, gradients and optimizer state are allocated beforehand and do not count. Needs the extra `bench`, and
`pip install liger-kernel` for that column.

    python benchmarks/distill_step.py [--model smollm2-135m] [--layers 10] [--batch 4] [--length 256]
                                      [--repeats 5] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from transfuse.core.lineage import hardware, versions

CONTENDERS = ("transfuse", "trl")


def random_batch(vocabulary: int, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary - 10, (options.batch, options.length), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def models(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Student, teacher, tokenizer; `random:V:D:L` gives a random llama of that vocabulary, width and depth."""
    from transfuse.core.training import seeded
    from transfuse.distill import prune

    if options.model.startswith("random:"):
        from transformers import AutoConfig, AutoModelForCausalLM

        vocabulary, width, depth = map(int, options.model.split(":")[1:])
        config = AutoConfig.for_model(
            "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
        )  # fmt: skip
        with seeded(0):
            teacher, tokenizer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), None
    else:
        from transfuse.core.models import load

        teacher, tokenizer = load(options.model, dtype="bfloat16")
    return prune(teacher, layers=options.layers).to(options.device), teacher.to(options.device), tokenizer


def trainer_of(
    contender: str, options: argparse.Namespace, folder: str
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The contender's trainer and the batch."""
    student, teacher, tokenizer = models(options)
    batch = random_batch(student.config.get_text_config().vocab_size, options)
    rows = [{k: v[i].tolist() for k, v in batch.items()} for i in range(options.batch)]
    settings = {
        "output_dir": folder, "report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": options.device == "cpu", "per_device_train_batch_size": options.batch, "max_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if contender == "trl":
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, processing_class=tokenizer,
            args=GKDConfig(lmbda=0.0, beta=0.5, seq_kd=False, bf16=False, **settings),
            train_dataset=Dataset.from_list([{"messages": messages}]),
        )  # fmt: skip
        trainer.lmbda = -1.0  # `random() <= lmbda` is true for a draw of 0
    else:
        from transformers import TrainingArguments

        from transfuse.distill import Distiller
        from transfuse.distill.survey_kd_llm import get

        trainer = Distiller(
            student=student, teacher=teacher, objective=get("jsd", beta=0.5, compile=options.compile),
            train_dataset=rows, args=TrainingArguments(**settings),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer, {k: v.to(options.device) for k, v in batch.items()}


class Peak:
    """The highest memory of a block above its start, in bytes."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = self.status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.bytes = self.status("VmHWM") - self.start

    @staticmethod
    def status(name: str) -> int:
        """A line of this process's status, in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc has no {name}")


def measure(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of `repeats` steps, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = trainer_of(contender, options, folder)
        model = trainer.accelerator.prepare(trainer.model)
        items = (batch["labels"][:, 1:] != -100).sum()
        seconds, peaks, losses = [], [], []
        for i in range(options.repeats + 1):
            for p in trainer.model.parameters():  # as an optimizer that has made a step leaves them
                if p.requires_grad:
                    p.grad = torch.zeros_like(p)
            with Peak(options.device) as peak:
                start = time.perf_counter()
                loss = trainer.training_step(model, dict(batch), items)
                if options.device != "cpu":
                    torch.cuda.synchronize()
                spent = time.perf_counter() - start
            if i:
                seconds.append(spent)
                peaks.append(peak.bytes)
            losses.append(float(loss))
        return {
            "loss": losses[-1], "seconds": statistics.median(seconds), "all": seconds,
            "peak_bytes": statistics.median(peaks),
        }  # fmt: skip


def liger(options: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """Liger's fused linear JSD, or this library's, on hidden states alone: time and memory of forward and backward."""
    from transfuse.core.fused import Head, fused_sums
    from transfuse.distill.survey_kd_llm import get

    student, teacher, _ = models(options)
    batch = {k: v.to(options.device) for k, v in random_batch(student.config.vocab_size, options).items()}
    with torch.no_grad():
        states = [
            m.base_model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
            for m in (student, teacher)
        ]
    labels = batch["labels"][:, 1:].flatten()
    mine, theirs = (s[:, :-1].flatten(0, 1) for s in states)
    heads = [m.get_output_embeddings().weight for m in (student, teacher)]
    objective = get("jsd", beta=0.5, compile=options.compile)
    if not ours:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        other = LigerFusedLinearJSD(jsd_beta=0.5)
    seconds, peaks = [], []
    for i in range(options.repeats + 2):
        hidden = mine.detach().clone().requires_grad_()
        weight = heads[0].detach().requires_grad_()
        with Peak(options.device) as peak:
            start = time.perf_counter()
            if ours:
                sums = fused_sums(
                    objective.combine, hidden, Head(weight), teacher=(theirs, Head(heads[1])),
                    columns={"labels": labels}, compile=options.compile,
                )  # fmt: skip
                loss = sums["loss"] / len(labels)
            else:
                loss = other(hidden, weight, theirs, heads[1], labels)
            torch.autograd.grad(loss, [hidden, weight])
            torch.cuda.synchronize()
            spent = time.perf_counter() - start
        if i > 1:
            seconds.append(spent)
            peaks.append(peak.bytes)
    return {
        "loss": float(loss), "seconds": statistics.median(seconds), "all": seconds,
        "peak_bytes": statistics.median(peaks),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile this library's loss")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        if options.run.startswith("head-"):
            found = liger(options, options.run == "head-transfuse")
        else:
            found = measure(options.run, options)
        print("RESULT " + json.dumps(found))
        return
    results = {}
    for contender in options.contenders:
        command = [sys.executable, __file__, "--run", contender, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{contender}: failed\n{done.stderr[-2000:]}")
            continue
        results[contender] = found = json.loads(lines[0][7:])
        print(
            f"{contender:16s} {found['seconds']:8.3f} s  {found['peak_bytes'] / 2**20:8.0f} MiB  "
            f"loss {found['loss']:.5f}",
            flush=True,
        )
    for ours, theirs in (("transfuse", "trl"), ("head-transfuse", "head-liger")):
        if ours in results and theirs in results:
            a, b = results[ours], results[theirs]
            print(
                f"{ours} / {theirs}: time {a['seconds'] / b['seconds']:.2f}, "
                f"peak memory {a['peak_bytes'] / b['peak_bytes']:.2f}"
            )
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
