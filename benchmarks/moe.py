"""Time and operations of feed-forward blocks cut into experts, beside the dense blocks they were cut from.

The blocks are those of a real model, or random ones of a given size; tokens are random, routers as drawn, and each
setting runs as in inference. Operations are counted while they run. `limit` is what the dense time would be if time
fell as operations do. Medians over the repeats, in which all settings take turns.

    python benchmarks/moe.py [--model smollm2-135m] [--tokens 512 1] [--experts 4] [--repeats 7] [--json FILE]
    python benchmarks/moe.py --random 2048 5632
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.core.lineage import hardware, versions
from transfuse.core.models import load
from transfuse.core.training import generator, seeded
from transfuse.moe.factorllm import FactorizedFFN, factorize


def random_model(width: int, inner: int) -> Any:
    """Two layers with blocks of this size."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    with seeded(0):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def blocks(model: Any) -> list[FactorizedFFN]:
    return [module for module in model.modules() if isinstance(module, FactorizedFFN)]


@torch.no_grad()
def timed(layers: list[Any], x: torch.Tensor) -> float:
    """Seconds for the tokens to pass all blocks."""
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start


@torch.no_grad()
def counted(layers: list[Any], x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            layer(x)
    return counter.get_total_flops()


def measure(model: Any, experts: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """The dense blocks and every K of E."""
    dense = [layer.mlp for layer in model.model.layers]
    settings: dict[int, list[Any]] = {0: dense}
    for k in range(1, experts + 1):
        cut = factorize(copy.deepcopy(model), experts=experts, top_k=k)
        settings[k] = blocks(cut)
    weight = dense[0].gate_proj.weight
    x = torch.randn(1, tokens, weight.shape[1], generator=generator(0)).to(weight.device, weight.dtype)
    times: dict[int, list[float]] = {k: [] for k in settings}
    for turn in range(repeats + 1):
        for k, layers in settings.items():
            seconds = timed(layers, x)
            if turn:
                times[k].append(seconds)
    operations = {k: counted(layers, x) for k, layers in settings.items()}
    whole, rows = statistics.median(times[0]), []
    for k, all_times in times.items():
        own, share = statistics.median(all_times), operations[k] / operations[0]
        name = f"{k} of {experts}" if k else "dense"
        print(
            f"{tokens:>6} {name:>8} {1e3 * own:>10.2f} {own / whole:>8.3f} {share:>8.3f} "
            f"{1e3 * whole * share:>10.2f}"
        )
        rows.append(
            {
                "tokens": tokens, "experts": experts, "top_k": k or None, "ms": 1e3 * own, "time_share": own / whole,
                "flops": operations[k], "flops_share": share, "ms_all": [1e3 * t for t in all_times],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--random", type=int, nargs=2, metavar=("WIDTH", "INNER"), help="random blocks instead"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 32, 1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.random:
        model, name = random_model(*options.random), f"random {options.random[0]} x {options.random[1]}"
    else:
        model, name = load(options.model, dtype=options.dtype).model, options.model
    print(f"{name}\n{'tokens':>6} {'experts':>8} {'ms':>10} {'time':>8} {'ops':>8} {'limit ms':>10}")
    figures = [row for n in options.tokens for row in measure(model, options.experts, n, options.repeats)]
    if options.json:
        record = {"model": name, "versions": versions(), "hardware": hardware(), "figures": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
