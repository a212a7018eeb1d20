"""Static merges of 1 GB checkpoints beside mergekit and beside `cp`, and twin-merging's cost per token.

Makes a base and three fine-tunes of it (random weights of a Llama's shapes, bf16), and merges the three. Every case
is a process of its own, run in turn with the files in the page cache; what is reported is the median over the rounds.

- `cp` copies all folders that the merge reads. Throughput is bytes read plus bytes written, over seconds: cp writes
  as much as it reads, a merge writes one model. The merge's seconds are those of the call; `process` in the table
  counts the start of Python too, as for mergekit.
- Peak memory is the process's largest resident set.

    python benchmarks/merge.py [--mergekit /path/to/mergekit-yaml] [--folder /tmp/merge-bench] [--rounds 3] [--json F]
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model

from transfuse.core.lineage import hardware, versions
from transfuse.core.models import load
from transfuse.core.shards import ShardWriter, TensorInfo, row_blocks
from transfuse.core.training import generator
from transfuse.merge.twin_merging import TwinMerging

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000
KINDS = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {"scaling": 0.4}),
    "ties": ("ties", {"density": 0.2, "scope": "tensor"}),
    "ties_model": ("ties", {"density": 0.2}),
}
CALL = """
import sys, time
from transfuse.merge import merge, read_config
given = read_config(sys.argv[1])
start = time.perf_counter()
merge(**{**given, "output": sys.argv[2]})
print(time.perf_counter() - start)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"model.layers.{i}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        found[f"model.layers.{i}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        found[f"model.layers.{i}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, layers: int) -> list[Path]:
    """A base and three models near it; returns their folders."""
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes(layers).items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    places = [folder / name for name in ("base", "one", "two", "three")]
    for number, place in enumerate(places):
        if (place / "config.json").is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)

        def produce(name: str, number: int = number) -> Any:
            common, own = generator(zlib.crc32(name.encode())), generator(number)
            for start, stop in row_blocks(infos[name], 1 << 22):
                shape = (stop - start, *infos[name].shape[1:])
                weights = 0.02 * torch.randn(shape, generator=common)
                if number:
                    weights += 0.002 * torch.randn(shape, generator=own)
                yield weights.to(torch.bfloat16)

        ShardWriter(place, infos).write(produce)
        (place / "config.json").write_text(json.dumps(config))
    return places


LAUNCH = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print()
print(json.dumps([status, time.perf_counter() - start, usage.ru_maxrss]))
"""


def process(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory of a process, and the number it prints last, if it is one.

    It is started by a small process: the peak of a child counts that of its parent, from before it became itself.
    """
    run = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    lines = subprocess.run(
        run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout
    *said, last = [line for line in lines.splitlines() if line.strip()]
    status, seconds, peak = json.loads(last)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(said[-20:]))
    found = {"process": seconds, "peak_mb": peak * 1024 / 1e6}
    try:
        found["seconds"] = float(said[-1])
    except (ValueError, IndexError):
        found["seconds"] = seconds
    return found


def configs(kind: str, places: list[Path], work: Path) -> dict[str, Path]:
    """YAML files: ours with and without checksums, and mergekit's."""
    method, arguments = KINDS[kind]
    base, *models = map(str, places)
    based = {} if method == "linear" else {"base": base}
    ours = {**based, "models": models, "method": {"uses": method, "with": arguments}, "dtype": "bfloat16"}
    rows = [
        {"model": m, "parameters": {"weight": 1.0, **({"density": 0.2} if method == "ties" else {})}}
        for m in models
    ]
    theirs = {"merge_method": method, "models": rows, "dtype": "bfloat16"}
    if method != "linear":
        theirs |= {"base_model": base, "parameters": {"lambda": arguments.get("scaling", 1.0)}}
    found = {}
    for name, value in (
        ("ours", ours),
        ("ours, no checksums", {**ours, "checksums": False}),
        ("mergekit", theirs),
    ):
        found[name] = work / f"{kind}-{name.replace(', ', '-').replace(' ', '-')}.yml"
        found[name].write_text(yaml.safe_dump(value))
    return found


def merges(
    places: list[Path], work: Path, mergekit: str | None, rounds: int, kinds: list[str]
) -> list[dict[str, Any]]:
    """All kinds, all contestants, in turn."""
    size = sum(file.stat().st_size for file in places[0].glob("*.safetensors"))
    rows = []
    print(
        f"{'':<16}{'':<20}{'seconds':>9}{'process':>9}{'GB/s':>7}{'peak MB':>9}{'of cp':>7}{'of mergekit':>12}"
    )
    for kind in kinds:
        method = KINDS[kind][0]
        read = places[1:] if method == "linear" else places
        files = configs(kind, places, work)
        commands = {"cp": ["cp", "-r", *map(str, read), str(work / "out")]}
        for name in ("ours", "ours, no checksums"):
            commands[name] = [sys.executable, "-c", CALL, str(files[name]), str(work / "out")]
        if mergekit is not None and kind != "ties_model":
            commands["mergekit"] = [
                mergekit,
                str(files["mergekit"]),
                str(work / "out"),
                "--no-copy-tokenizer",
            ]
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                if name == "cp":
                    (work / "out").mkdir()
                for place in read:  # into the page cache
                    for file in place.glob("*.safetensors"):
                        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
                measured[name].append(process(command))
                shutil.rmtree(work / "out")
        medians = {
            name: {key: statistics.median(r[key] for r in found) for key in found[0]}
            for name, found in measured.items()
        }
        for name, figures in medians.items():
            moved = size * len(read) * 2 if name == "cp" else size * (len(read) + 1)
            figures["gb_per_s"] = moved / figures["seconds"] / 1e9
            row = {
                "kind": kind,
                "who": name,
                **figures,
                "of_cp": figures["gb_per_s"] / medians["cp"]["gb_per_s"],
            }
            if "mergekit" in medians:
                row["of_mergekit"] = figures["process"] / medians["mergekit"]["process"]
            rows.append({**row, "all": measured[name]})
            print(
                f"{kind:<16}{name:<20}{figures['seconds']:>9.2f}{figures['process']:>9.2f}{figures['gb_per_s']:>7.2f}"
                f"{figures['peak_mb']:>9.0f}{row['of_cp']:>7.2f}{row.get('of_mergekit', float('nan')):>12.2f}",
                flush=True,
            )
    return rows


def twin(spec: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per decoded token of four mixed tasks, beside the dense model."""
    base = load(spec, dtype="float32").model
    adapters = []
    for number in range(4):
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model, random = (
            get_peft_model(copy.deepcopy(base), LoraConfig(r=32, target_modules=names)),
            generator(number),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=random))
        adapters.append(model)
    source, rows = generator(0), []
    contestants: dict[str, Any] = {"dense": base}
    for rank in (8, 32):
        contestants[f"twin, 4 tasks, rank {rank}"] = TwinMerging(base, adapters, rank=rank).build()
    print(f"\n{'milliseconds per token':<34}{'':>8}{'of dense':>10}")
    for batch in (1, 8):
        ids = torch.randint(10, base.config.vocab_size, (batch, 64), generator=source)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds + 1):  # the first round warms up
            for name, model in contestants.items():
                given = {} if name == "dense" else {"routing": torch.full((4,), 0.25)}
                spent = []
                for count in (1, 1 + tokens):  # the prompt's part cancels
                    start = time.perf_counter()
                    model.generate(
                        input_ids=ids, max_new_tokens=count, min_new_tokens=count, **options, **given
                    )
                    spent.append(time.perf_counter() - start)
                times[name].append((spent[1] - spent[0]) / tokens)
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        for name, seconds in medians.items():
            print(
                f"{f'batch {batch}, {name}':<34}{1e3 * seconds:>8.1f}{seconds / medians['dense']:>10.2f}",
                flush=True,
            )
            rows.append({"batch": batch, "who": name, "ms": 1e3 * seconds, "of_dense": seconds / medians["dense"],
                         "all_ms": [1e3 * t for t in times[name][1:]]})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mergekit", help="path of mergekit-yaml, in an environment of its own")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "transfuse-merge-bench")
    parser.add_argument("--layers", type=int, default=7, help="7 make 1 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--only", choices=("merges", "twin"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }
    if options.only != "twin":
        places = make(options.folder / f"llama-{options.layers}", options.layers)
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            record["merges"] = merges(places, Path(work), options.mergekit, options.rounds, options.kinds)
    if options.only != "merges":
        record["twin"] = twin(options.model, options.tokens, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
