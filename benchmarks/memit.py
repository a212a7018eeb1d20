"""Seconds per fact of a MEMIT edit with its statistics cached, split into value search, key collection and solve.

The split is taken inside of one edit of all facts, repeated on the same untouched model; what is left over
(preparing rows, applying and removing the updates) is `rest`. With `--easyedit`, a checkout of
https://github.com/zjunlp/EasyEdit edits the same model beside it, in turns: same facts, prefixes, covariance,
blocks, loss and updates. How far the two edits are apart is shown too. Prints medians; `--json FILE` writes them.

    python benchmarks/memit.py [--easyedit FOLDER] [--facts 8] [--prefixes 5] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfuse.bench.knowedit import read_records
from transfuse.core.data import Fact
from transfuse.core.datasets import dataset_path
from transfuse.core.lineage import hardware, versions
from transfuse.core.models import load
from transfuse.edit import memit

PARTS = {
    "value search": (memit, "search"),
    "key collection": (memit._Walk, "step"),
    "solve": (memit, "memit_update"),
}


@contextlib.contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds spent in each part."""

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, clocked(part, originals[part]))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


class EasyEdit:
    """The peer's MEMIT on a Llama-like model, given the prefixes and covariance of `editor`."""

    def __init__(self, checkout: Path, editor: memit.MEMIT, model: PreTrainedModel, facts: Sequence[Fact]):
        for name in (
            "",
            ".models",
            ".models.rome",
            ".models.memit",
            ".util",
        ):  # without what __init__.py imports
            package = types.ModuleType(f"easyeditor{name}")
            package.__path__ = [str(checkout / "easyeditor" / name.replace(".", "/").strip("/"))]
            sys.modules[package.__name__] = package
        self.main = importlib.import_module("easyeditor.models.memit.memit_main")
        known = editor._known._kept[model]
        self.main.CONTEXT_TEMPLATES_CACHE = [[f"{prefix}{{}}" for prefix in known.prefixes]]
        module = "model.layers.{}.mlp.down_proj"
        layers = editor._layers(model)
        folder = model.config._name_or_path.replace("/", "_")
        self.main.COV_CACHE.update(
            {(folder, module.format(i)): f.matrix.float() for i, f in known.factors.items() if f}
        )
        self.options = self.main.MEMITHyperParams(
            layers=layers, layer_selection="all", fact_token="subject_last", v_num_grad_steps=editor.steps + 1,
            v_lr=editor.lr, v_loss_layer=model.config.num_hidden_layers - 1, v_weight_decay=editor.weight_decay,
            clamp_norm_factor=editor.clamp, kl_factor=editor.kl_factor, mom2_adjustment=True,
            mom2_update_weight=editor.lam, rewrite_module_tmp=module, layer_module_tmp="model.layers.{}",
            mlp_module_tmp="model.layers.{}.mlp", attn_module_tmp="model.layers.{}.self_attn",
            lm_head_module="model.embed_tokens" if model.config.tie_word_embeddings else "lm_head",
            ln_f_module="model.norm", mom2_dataset="", mom2_n_samples=0, mom2_dtype="float32",
            alg_name="MEMIT", device=str(model.device), model_name=folder, stats_dir="",
        )  # fmt: skip
        self.requests = [
            {"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target, "case_id": i}
            for i, fact in enumerate(facts)
        ]

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Change of each edited weight, float64."""
        with contextlib.redirect_stdout(io.StringIO()):
            deltas = self.main.execute_memit(model, tokenizer, self.requests, self.options)
        return {name: values.double() @ keys.double().T for name, (keys, values) in deltas.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--prefixes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--easyedit", type=Path, help="a checkout of EasyEdit, for a Llama-like model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    tokenizer.padding_side = "right"  # the peer takes positions for those of unpadded text
    facts = read_records(dataset_path("counterfact/edit.json"))[: options.facts]
    editor = memit.MEMIT(prefixes=options.prefixes, per_subject=False)
    editor.fit(model, tokenizer, facts[:1])  # statistics and prefixes, and what first calls allocate
    peer = EasyEdit(options.easyedit, editor, model, facts) if options.easyedit else None
    rounds, apart = [], []
    for _ in range(options.repeats):
        spent = dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        with timed(spent):
            edit = editor.fit(model, tokenizer, facts)
        whole = time.perf_counter() - start
        rounds.append({**spent, "rest": whole - sum(spent.values()), "all": whole})
        if peer:
            start = time.perf_counter()
            theirs = peer.fit(model, tokenizer)
            rounds[-1]["easyedit"] = time.perf_counter() - start
            ours = {name: left.double() @ right.double() for name, (left, right) in edit.low_rank.items()}
            apart.append(max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs))
    medians = {part: statistics.median(r[part] for r in rounds) / len(facts) for part in rounds[0]}
    print(
        f"MEMIT, {options.model} ({model.dtype}), {len(facts)} facts at once, {options.prefixes} prefixes; "
        f"median of {len(rounds)}, per fact"
    )
    for part, seconds in medians.items():
        print(f"{part:<16} {seconds:>8.3f} s {seconds / medians['all']:>7.1%}")
    if apart:
        print(f"edits apart by {max(apart):.1e} of their norm")
    if options.json:
        whole = medians.pop("all")
        results = {"transfuse": {**medians, "seconds per fact": whole}}
        if peer:
            results["EasyEdit"] = {"seconds per fact": medians.pop("easyedit")}
            results["transfuse"].pop("easyedit")
        record = {
            "what": f"MEMIT on {options.model} in {options.dtype}: {len(facts)} CounterFact facts at once, "
            f"{options.prefixes} prefixes, at most {editor.steps} updates, statistics cached, "
            f"{torch.get_num_threads()} threads; median seconds per fact of {len(rounds)} runs in turns."
            + (f" The two edits are {max(apart):.0e} of their norm apart." if apart else ""),
            "methods": ["memit"],
            "command": f"python benchmarks/memit.py{' --easyedit EasyEdit' if peer else ''}",
            "results": results, "rounds": rounds, "versions": versions(), "hardware": hardware(),
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
